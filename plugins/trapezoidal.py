"""The trapezoidal schedule."""
from dataclasses import dataclass
from typing import Literal

from loopctl import Duration, Run, hookimpl


@dataclass(eq=False)
class Trapezoidal:
    """Raise the learning rate along a line, hold it, and lower it along a line.

    The shape is from A Walk with SGD, arXiv:1802.08770; also called warmup-stable-decay.

    max_lr: the rate at the top, above 0
    step_size: length of the rise, and of the descent
    anneal_start: where the descent begins, from the start of the run; if left out, so that it ends with the run
    base_lr: the rate at the start and after the descent; the optimizer's own if left out
    by: move every epoch, or every step
    """

    max_lr: float
    step_size: Duration
    anneal_start: Duration | None = None
    base_lr: float | None = None
    by: Literal["epoch", "step"] = "step"

    def __post_init__(self) -> None:
        if not self.max_lr > 0:
            raise ValueError(f"max_lr is above 0, not {self.max_lr}")
        if self.base_lr is not None and not self.base_lr >= 0:
            raise ValueError(f"base_lr is at least 0, not {self.base_lr}")

    @hookimpl
    def lr_scale(self, run: Run, initial_lr: float) -> float | None:
        base = initial_lr if self.base_lr is None else self.base_lr
        position, size = run.position(self.by), run.duration(self.step_size, self.by)
        end = run.duration(self.anneal_start, self.by) + (0 if self.anneal_start is None else size)
        height = max(0.0, min(1.0, position / size, (end - position) / size))
        return (base + (self.max_lr - base) * height) / initial_lr
