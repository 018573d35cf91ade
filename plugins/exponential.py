"""Learning-rate schedule: exponential decay."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Exponential(Schedule):
    """Multiply the learning rate by a factor every epoch or step.

    Same as torch.optim.lr_scheduler.ExponentialLR.

    gamma: factor per epoch or step, above 0
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    gamma: float
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma > 0:
            raise ValueError(f"gamma is above 0, not {self.gamma}")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        return self.gamma ** position
