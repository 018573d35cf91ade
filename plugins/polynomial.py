"""Learning-rate schedule: polynomial decay."""
from dataclasses import dataclass
from typing import Literal

from loopctl import Duration, Run, hookimpl


@dataclass(eq=False)
class Polynomial:
    """Lower the learning rate to zero along a polynomial.

    Same as torch.optim.lr_scheduler.PolynomialLR.

    total_iters: duration of the descent, after which the rate stays at 0
    power: degree of the polynomial, above 0; 1 is a straight line, 2 a parabola
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    total_iters: Duration = 5
    power: float = 1.0
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise ValueError(f"power is above 0, not {self.power}")

    @hookimpl
    def lr_scale(self, run: Run) -> float | None:
        return max(0.0, 1 - run.position(self.by) / run.duration(self.total_iters, self.by)) ** self.power
