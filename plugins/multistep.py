"""Step decay at given moments."""
from dataclasses import dataclass
from typing import Literal

from loopctl import Duration, Run, hookimpl


@dataclass(eq=False)
class Multistep:
    """Multiply the learning rate by a factor at each milestone.

    It is torch.optim.lr_scheduler.MultiStepLR.

    milestones: lengths from the start, in any order; 30,80 or 50%,75%; one given twice counts twice
    gamma: the factor, above 0
    by: count in epochs, or in steps
    """

    milestones: list[Duration]
    gamma: float = 0.1
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if not self.milestones:
            raise ValueError("milestones are one length or more, such as 30,80")
        if not self.gamma > 0:
            raise ValueError(f"gamma is above 0, not {self.gamma}")

    @hookimpl
    def lr_scale(self, run: Run) -> float | None:
        position = run.position(self.by)
        return self.gamma ** sum(position >= run.duration(milestone, self.by) for milestone in self.milestones)
