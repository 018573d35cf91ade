"""Early stopping."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Monitor, Run, hookimpl


@dataclass(eq=False)
class EarlyStopping:
    """End the run when a metric has not improved for a while.

    monitor: the metric to judge; val_loss if left out, or train_loss without validation
    mode: whether smaller or larger is better; auto knows losses and errors from accuracies by name
    patience: evaluations without improvement after which the run ends; one per epoch unless eval_every asks for more
    min_delta: what counts as an improvement is better by more than this
    restore_best: end with the weights of the best evaluation in place of the last
    """

    monitor: str = ""
    mode: Literal["auto", "min", "max"] = "auto"
    patience: int = 10
    min_delta: float = 0.0
    restore_best: bool = False

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience is at least 1, not {self.patience}")
        if not self.min_delta >= 0:
            raise ValueError(f"min_delta is at least 0, not {self.min_delta}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.watch = Monitor(self.monitor, self.mode, self.min_delta)
        self.waited = 0
        self.weights: dict[str, Any] = {}
        self.watch.start(run)

    @hookimpl
    def after_evaluate(self, run: Run) -> None:
        if self.watch.improved(run):
            self.waited = 0
            if self.restore_best:
                self.weights = {name: value.clone() for name, value in run.model.state_dict().items()}
        else:
            self.waited += 1
        if self.waited >= self.patience:
            best = "never been a number" if self.watch.best is None else f"not improved on {self.watch.best:.4g}"
            run.stop = f"{self.watch.metric} has {best} for {self.waited} evaluations"

    @hookimpl
    def train_end(self, run: Run) -> None:
        if self.weights:
            run.model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {**self.watch.state_dict(), "waited": self.waited, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state)
        self.waited, self.weights = state["waited"], state["weights"]
