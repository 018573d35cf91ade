"""Learning-rate schedule: cosine annealing."""
from dataclasses import dataclass
from math import cos, pi
from typing import Literal

from loopctl import Duration, Run, hookimpl


@dataclass(eq=False)
class Cosine:
    """Lower the learning rate along half a cosine wave.

    Same as torch.optim.lr_scheduler.CosineAnnealingLR; from SGDR, arXiv:1608.03983.

    t_max: duration of the descent, after which the rate rises again; the whole run if left out
    eta_min: minimum learning rate
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    t_max: Duration | None = None
    eta_min: float = 0.0
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if not self.eta_min >= 0:
            raise ValueError(f"eta_min is at least 0, not {self.eta_min}")

    @hookimpl
    def lr_scale(self, run: Run, initial_lr: float) -> float | None:
        minimum = self.eta_min / initial_lr
        return minimum + (1 - minimum) * (1 + cos(pi * run.position(self.by) / run.duration(self.t_max, self.by))) / 2
