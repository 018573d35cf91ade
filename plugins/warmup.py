"""Learning-rate schedule: linear warmup."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Warmup(Schedule):
    """Raise the learning rate linearly at the start of the run.

    Same as torch.optim.lr_scheduler.LinearLR with end_factor=1; multiplies with every other schedule.

    length: duration of the rise
    start_factor: factor of the learning rate at the first step, 0 to 1
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    length: Duration = "5%"
    start_factor: float = 1 / 3
    by: Literal["epoch", "step"] = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.start_factor <= 1:
            raise ValueError(f"start_factor is 0 to 1, not {self.start_factor}")

    def check(self, run: Run) -> None:
        super().check(run)
        last = max(0, int(run.duration(None, self.unit)) - 1 - self.origin(self.window(run)[0]))
        reached = self.scale(run, last, 1.0, {})
        if self.duration(run, self.length) > last + 1:
            what = "learning rate" if self.option == "lr" else self.option
            run.say_once("warmup", f"warmup: length={self.length} is longer than the run, whose {what} reaches only "
                                   f"{reached:.0%} of its full value; use a shorter length, such as 5%")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        done = min(1.0, position / self.duration(run, self.length))
        return self.start_factor + (1 - self.start_factor) * done
