"""Learning-rate schedule: trapezoidal (warmup-stable-decay)."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Trapezoidal(Schedule):
    """Raise the learning rate linearly, hold it, and lower it linearly.

    Also called warmup-stable-decay; from A Walk with SGD, arXiv:1802.08770.

    max_lr: learning rate while it is held, above 0
    step_size: duration of the rise, and of the descent
    anneal_start: duration from the schedule's start to the descent; if left out, the descent ends with the run
    base_lr: learning rate at the start and after the descent; the optimizer's own if left out
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    max_lr: float
    step_size: Duration
    anneal_start: Duration | None = None
    base_lr: float | None = None
    by: Literal["epoch", "step"] = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_lr > 0:
            raise ValueError(f"max_lr is above 0, not {self.max_lr}")
        if self.base_lr is not None and not self.base_lr >= 0:
            raise ValueError(f"base_lr is at least 0, not {self.base_lr}")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        base = initial_lr if self.base_lr is None else self.base_lr
        size = self.duration(run, self.step_size)
        end = self.duration(run, self.anneal_start) + (0 if self.anneal_start is None else size)
        fraction = max(0.0, min(1.0, position / size, (end - position) / size))
        return (base + (self.max_lr - base) * fraction) / initial_lr
