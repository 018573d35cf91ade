"""Learning-rate schedule: exponential decay."""
from dataclasses import dataclass
from typing import Literal

from loopctl import Run, hookimpl


@dataclass(eq=False)
class Exponential:
    """Multiply the learning rate by a factor every epoch or step.

    Same as torch.optim.lr_scheduler.ExponentialLR.

    gamma: factor per epoch or step, above 0
    by: change the rate every epoch or every step
    """

    gamma: float
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma is above 0, not {self.gamma}")

    @hookimpl
    def lr_scale(self, run: Run) -> float | None:
        return self.gamma ** run.position(self.by)
