"""Learning-rate warmup."""
from dataclasses import dataclass
from typing import Literal

from loopctl import Duration, Run, hookimpl


@dataclass(eq=False)
class Warmup:
    """Raise the learning rate linearly at the start, to what the other schedules say.

    It is torch.optim.lr_scheduler.LinearLR with an end_factor of 1, and multiplies with every other schedule.

    length: how long the rise takes
    start_factor: the part of the rate that the first step has, above 0 and at most 1
    by: move every epoch, or every step
    """

    length: Duration = "5%"
    start_factor: float = 1 / 3
    by: Literal["epoch", "step"] = "step"

    def __post_init__(self) -> None:
        if not 0 < self.start_factor <= 1:
            raise ValueError(f"start_factor is above 0 and at most 1, not {self.start_factor}")

    @hookimpl
    def lr_scale(self, run: Run) -> float | None:
        risen = min(1.0, run.position(self.by) / run.duration(self.length, self.by))
        return self.start_factor + (1 - self.start_factor) * risen
