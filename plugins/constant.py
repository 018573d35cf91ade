"""Learning-rate schedule: a constant factor at the start."""
from dataclasses import dataclass
from typing import Literal

from loopctl import Duration, Run, hookimpl


@dataclass(eq=False)
class Constant:
    """Multiply the learning rate by a constant factor at the start, and by 1 afterwards.

    Same as torch.optim.lr_scheduler.ConstantLR.

    factor: factor of the learning rate at the start, 0 to 1
    total_iters: duration for which the factor applies
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    factor: float = 1 / 3
    total_iters: Duration = 5
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if not 0 <= self.factor <= 1:
            raise ValueError(f"factor is 0 to 1, not {self.factor}")

    @hookimpl
    def lr_scale(self, run: Run) -> float | None:
        return self.factor if run.position(self.by) < run.duration(self.total_iters, self.by) else 1.0
