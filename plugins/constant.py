"""Learning-rate schedule: a constant factor at the start."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Constant(Schedule):
    """Multiply the learning rate by a constant factor at the start, and by 1 afterwards.

    Same as torch.optim.lr_scheduler.ConstantLR.

    factor: factor of the learning rate at the start, 0 to 1
    total_iters: duration for which the factor applies; the rest of the run if none
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    factor: float = 1 / 3
    total_iters: Duration | None = 5
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.factor <= 1:
            raise ValueError(f"factor is 0 to 1, not {self.factor}")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        return self.factor if position < self.duration(run, self.total_iters) else 1.0
