"""Learning-rate schedule: reduce on plateau."""
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

from loopctl import Monitor, Run, hookimpl
from loopctl.optim.learning_rate import per_group


@dataclass(eq=False)
class Plateau:
    """Lower the learning rate when a metric has stopped improving.

    Same as torch.optim.lr_scheduler.ReduceLROnPlateau; multiplies with every other schedule.

    monitor: metric to watch; the run's monitor if left out, by default val_loss
    mode: whether smaller (min) or larger (max) is better; auto decides by the name of the metric
    factor: factor of each reduction, at least 0 and below 1
    patience: evaluations without improvement that are tolerated; one evaluation per epoch unless eval_every is set
    threshold: only an improvement by more than this counts
    threshold_mode: threshold is relative to the best value (rel), or absolute (abs)
    cooldown: evaluations after a reduction that are not counted
    min_lr: minimum learning rate; or a list with one per parameter group
    eps: a reduction of the rate by no more than this is not made
    """

    monitor: str = ""
    mode: Literal["auto", "min", "max"] = "auto"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    min_lr: float | list[float] = 0.0
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not 0 <= self.factor < 1:
            raise ValueError(f"factor is at least 0 and below 1, not {self.factor}")
        for name in ("patience", "threshold", "cooldown", "eps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is at least 0, not {getattr(self, name)}")
        for lr in self.min_lr if isinstance(self.min_lr, list | tuple) else [self.min_lr]:
            if not lr >= 0:
                raise ValueError(f"min_lr is at least 0, not {lr}")
        self.rates: list[float] = []                 # of the parameter groups; empty before the first reduction

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.watch = Monitor(self.monitor, self.mode)
        self.best: float | None = None
        self.num_bad = 0                             # evaluations without improvement
        self.cooldown_left = 0                       # evaluations that are still not counted
        self.rates = []
        self.watch.start(run)
        for group in run.optimizer.param_groups:
            per_group(run, group, "min_lr", self.min_lr)         # raises if the list has another length

    @hookimpl
    def lr_scale(self, run: Run, initial_lr: float, group: dict[str, Any]) -> float | None:
        return per_group(run, group, "rates", self.rates) / initial_lr if self.rates else 1.0

    @hookimpl
    def after_evaluate(self, run: Run) -> None:
        value, sign = run.metrics[self.watch.metric], 1 if self.watch.mode == "max" else -1
        best = -sign * inf if self.best is None else self.best
        margin = best * (1 + sign * self.threshold) if self.threshold_mode == "rel" else best + sign * self.threshold
        improved = sign * value > sign * margin      # NaN is no improvement
        self.best, self.num_bad = (value, 0) if improved else (self.best, self.num_bad + 1)
        if self.cooldown_left:
            self.cooldown_left, self.num_bad = self.cooldown_left - 1, 0
        if self.num_bad > self.patience:
            self.cooldown_left, self.num_bad = self.cooldown, 0
            self.reduce(run)

    def reduce(self, run: Any) -> None:
        groups = run.optimizer.param_groups
        self.rates = self.rates or [group["initial_lr"] for group in groups]
        for number, (group, old) in enumerate(zip(groups, self.rates, strict=True)):
            new = max(old * self.factor, per_group(run, group, "min_lr", self.min_lr))
            self.rates[number] = new if old - new > self.eps else old

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "bad": self.num_bad, "cooling": self.cooldown_left, "rates": self.rates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.num_bad, self.cooldown_left = state["best"], state["bad"], state["cooling"]
        self.rates = list(state["rates"])
