"""Learning-rate schedule: linear change."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Linear(Schedule):
    """Change the learning rate linearly from one factor to another.

    Same as torch.optim.lr_scheduler.LinearLR.

    start_factor: factor of the learning rate at the start, 0 to 1
    end_factor: factor of the learning rate at the end and afterwards, 0 to 1
    total_iters: duration of the change; the rest of the run if none
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    start_factor: float = 1 / 3
    end_factor: float = 1.0
    total_iters: Duration | None = 5
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("start_factor", "end_factor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is 0 to 1, not {getattr(self, name)}")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        done = min(1.0, position / self.duration(run, self.total_iters))
        return self.start_factor + (self.end_factor - self.start_factor) * done
