"""Learning-rate schedule: step decay."""
from dataclasses import dataclass
from typing import Literal

from loopctl import Duration, Run, hookimpl


@dataclass(eq=False)
class Step:
    """Multiply the learning rate by a factor at regular intervals.

    Same as torch.optim.lr_scheduler.StepLR.

    step_size: duration between two changes
    gamma: factor of each change, above 0
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    step_size: Duration
    gamma: float = 0.1
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma is above 0, not {self.gamma}")

    @hookimpl
    def lr_scale(self, run: Run) -> float | None:
        return self.gamma ** (run.position(self.by) // run.duration(self.step_size, self.by))
