"""A reduced rate at the start."""
from dataclasses import dataclass
from typing import Literal

from loopctl import Duration, Run, hookimpl


@dataclass(eq=False)
class Constant:
    """Multiply the learning rate by a constant factor at the start, and by 1 after it.

    It is torch.optim.lr_scheduler.ConstantLR.

    factor: the part of the rate at the start, 0 to 1
    total_iters: how long that lasts
    by: count in epochs, or in steps
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
