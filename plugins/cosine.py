"""Learning-rate schedule: cosine annealing."""
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Cosine(Schedule):
    """Lower the learning rate along half a cosine wave.

    Same as torch.optim.lr_scheduler.CosineAnnealingLR; from SGDR, arXiv:1608.03983.

    t_max: duration of the descent, after which the rate rises again; if left out, the rest of the run, after which it
        stays at its minimum
    eta_min: minimum learning rate
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    t_max: Duration | None = None
    eta_min: float = 0.0
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eta_min >= 0:
            raise ValueError(f"eta_min is at least 0, not {self.eta_min}")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        minimum = self.eta_min / initial_lr
        length = self.duration(run, self.t_max)
        done = min(position, length) if self.t_max is None else position    # a run may have more steps than planned
        return minimum + (1 - minimum) * (1 + cos(pi * done / length)) / 2
