"""Learning-rate schedule: decay at given milestones."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Multistep(Schedule):
    """Multiply the learning rate by a factor at each milestone.

    Same as torch.optim.lr_scheduler.MultiStepLR.

    milestones: durations from the schedule's start, in any order, such as 30,80 or 50%,75%; one given twice counts
        twice
    gamma: factor at each milestone, above 0
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    milestones: list[Duration]
    gamma: float = 0.1
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.milestones:
            raise ValueError("milestones needs at least one duration, such as 30,80")
        if not self.gamma > 0:
            raise ValueError(f"gamma is above 0, not {self.gamma}")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        return self.gamma ** sum(position >= self.duration(run, milestone) for milestone in self.milestones)
