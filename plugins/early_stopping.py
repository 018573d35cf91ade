"""Early stopping: end the run when a metric stops improving."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Monitor, Run, hookimpl
from loopctl.model.own_names import load_own_state_dict, own_state_dict
from loopctl.report.terminal import counted


@dataclass(eq=False)
class EarlyStopping:
    """End the run when a metric has stopped improving.

    monitor: metric to watch; the run's monitor if left out, by default val_loss
    mode: whether smaller (min) or larger (max) is better; auto decides by the name of the metric
    patience: evaluations without improvement after which the run ends; one evaluation per epoch unless eval_every is
        set
    min_delta: only an improvement by more than this counts
    restore_best: at the end of the run, restore the weights of the best evaluation
    """

    monitor: str = ""
    mode: Literal["auto", "min", "max"] = "auto"
    patience: int = 10
    min_delta: float = 0.0
    restore_best: bool = False
    topic = "checkpoints and stopping"

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience is at least 1, not {self.patience}")
        if not self.min_delta >= 0:
            raise ValueError(f"min_delta is at least 0, not {self.min_delta}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.watch = Monitor(self.monitor, self.mode, self.min_delta)
        self.num_bad = 0            # evaluations without improvement since the best one
        self.weights: dict[str, Any] = {}
        self.watch.start(run)

    @hookimpl
    def after_evaluate(self, run: Run) -> None:
        if self.watch.improved(run):
            self.num_bad = 0
            if self.restore_best:
                self.weights = {name: value.clone() for name, value in own_state_dict(run.model).items()}
        else:
            self.num_bad += 1
        if self.num_bad >= self.patience:
            reason = "been NaN" if self.watch.best is None else f"not improved on {self.watch.best:.4g}"
            run.stop = f"{self.watch.metric} has {reason} for {counted(self.num_bad, 'evaluation')}"

    @hookimpl
    def train_end(self, run: Run) -> None:
        if self.weights:
            load_own_state_dict(run.model, self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {**self.watch.state_dict(), "waited": self.num_bad, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state)
        self.num_bad, self.weights = state["waited"], state["weights"]
