"""Learning-rate schedule: cosine annealing with warm restarts."""
from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class CosineRestarts(Schedule):
    """Lower the learning rate along half a cosine wave, and restart from the top each time.

    Same as torch.optim.lr_scheduler.CosineAnnealingWarmRestarts; from SGDR, arXiv:1608.03983.

    t_0: duration of the first descent
    t_mult: factor by which each descent is longer than the one before
    eta_min: minimum learning rate
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    t_0: Duration
    t_mult: int = 1
    eta_min: float = 0.0
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_mult < 1:
            raise ValueError(f"t_mult is at least 1, not {self.t_mult}")
        if not self.eta_min >= 0:
            raise ValueError(f"eta_min is at least 0, not {self.eta_min}")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        done, length = float(position), self.duration(run, self.t_0)
        if self.t_mult == 1:
            done %= length
        while done >= length:
            done, length = done - length, length * self.t_mult
        minimum = self.eta_min / initial_lr
        return minimum + (1 - minimum) * (1 + cos(pi * done / length)) / 2
