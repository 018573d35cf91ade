"""Learning-rate schedule: step decay."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Step(Schedule):
    """Multiply the learning rate by a factor at regular intervals.

    Same as torch.optim.lr_scheduler.StepLR.

    step_size: duration between two changes
    gamma: factor of each change, above 0
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    step_size: Duration
    gamma: float = 0.1
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma > 0:
            raise ValueError(f"gamma is above 0, not {self.gamma}")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        return self.gamma ** (position // self.duration(run, self.step_size))
