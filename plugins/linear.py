"""Learning-rate schedule: linear change."""
from dataclasses import dataclass
from typing import Literal

from loopctl import Duration, Run, hookimpl


@dataclass(eq=False)
class Linear:
    """Change the learning rate linearly from one factor to another.

    Same as torch.optim.lr_scheduler.LinearLR.

    start_factor: factor of the learning rate at the start, above 0 and at most 1
    end_factor: factor of the learning rate at the end and afterwards, 0 to 1
    total_iters: duration of the change
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    start_factor: float = 1 / 3
    end_factor: float = 1.0
    total_iters: Duration = 5
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if not 0 < self.start_factor <= 1:
            raise ValueError(f"start_factor is above 0 and at most 1, not {self.start_factor}")
        if not 0 <= self.end_factor <= 1:
            raise ValueError(f"end_factor is 0 to 1, not {self.end_factor}")

    @hookimpl
    def lr_scale(self, run: Run) -> float | None:
        done = min(1.0, run.position(self.by) / run.duration(self.total_iters, self.by))
        return self.start_factor + (self.end_factor - self.start_factor) * done
