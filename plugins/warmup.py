"""Learning-rate schedule: linear warmup."""
from dataclasses import dataclass
from typing import Literal

from loopctl import Duration, Run, hookimpl


@dataclass(eq=False)
class Warmup:
    """Raise the learning rate linearly at the start of the run.

    Same as torch.optim.lr_scheduler.LinearLR with end_factor=1; multiplies with every other schedule.

    length: duration of the rise
    start_factor: factor of the learning rate at the first step, above 0 and at most 1
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    length: Duration = "5%"
    start_factor: float = 1 / 3
    by: Literal["epoch", "step"] = "step"

    def __post_init__(self) -> None:
        if not 0 < self.start_factor <= 1:
            raise ValueError(f"start_factor is above 0 and at most 1, not {self.start_factor}")

    @hookimpl
    def lr_scale(self, run: Run) -> float | None:
        done = min(1.0, run.position(self.by) / run.duration(self.length, self.by))
        return self.start_factor + (1 - self.start_factor) * done
