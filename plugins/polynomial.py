"""Learning-rate schedule: polynomial decay."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Polynomial(Schedule):
    """Lower the learning rate to zero along a polynomial.

    Same as torch.optim.lr_scheduler.PolynomialLR.

    total_iters: duration of the descent, after which the rate stays at 0; the rest of the run if none
    power: degree of the polynomial, above 0; 1 is a straight line, 2 a parabola
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    total_iters: Duration | None = 5
    power: float = 1.0
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.power > 0:
            raise ValueError(f"power is above 0, not {self.power}")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        return max(0.0, 1 - position / self.duration(run, self.total_iters)) ** self.power
