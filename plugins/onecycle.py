"""Learning-rate schedule: the 1cycle policy."""
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi
from typing import Any, Literal

from loopctl import Duration, Run, hookimpl
from loopctl.optim.learning_rate import check_momentum_cycling, per_group, set_momentum
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Onecycle(Schedule):
    """Raise the learning rate to a peak, then lower it to almost 0; momentum the other way.

    Same as torch.optim.lr_scheduler.OneCycleLR; from Super-Convergence, arXiv:1708.07120.

    max_lr: learning rate at the peak, in place of the optimizer's own; or a list with one per parameter group
    total_steps: duration of the cycle, after which the rate stays at its minimum; the rest of the run if left out
    pct_start: fraction of the cycle in which the rate rises, 0 to 1
    anneal_strategy: rise and fall along half a cosine wave (cos), or linearly
    cycle_momentum: also cycle the momentum, or the first of betas
    base_momentum: momentum at the peak
    max_momentum: momentum at the start and at the end
    div_factor: the initial learning rate is max_lr divided by this
    final_div_factor: the final learning rate is the initial one divided by this
    three_phase: fall to the initial rate in the same time as the rise, and then to the final rate
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    max_lr: float | list[float]
    total_steps: Duration | None = None
    pct_start: float = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    cycle_momentum: bool = True
    base_momentum: float = 0.85
    max_momentum: float = 0.95
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False
    by: Literal["epoch", "step"] = "step"

    def __post_init__(self) -> None:
        for lr in self.max_lr if isinstance(self.max_lr, list | tuple) else [self.max_lr]:
            if not lr > 0:
                raise ValueError(f"max_lr is above 0, not {lr}")
        for name in ("pct_start", "base_momentum", "max_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is 0 to 1, not {getattr(self, name)}")
        for name in ("div_factor", "final_div_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is above 0, not {getattr(self, name)}")
        if self.option != "lr" and self.cycle_momentum:
            raise ValueError(f"option={self.option}: the momentum would be cycled too; pass cycle_momentum=false")
        if not self.cycle_momentum:
            super().__post_init__()

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        peak = per_group(run, group, "max_lr", self.max_lr)
        first = peak / self.div_factor
        return self.interpolate(run, position, first, peak, first / self.final_div_factor) / initial_lr

    @hookimpl
    def train_start(self, run: Run) -> None:
        super().train_start(run)
        if self.cycle_momentum:
            self.own_momentum = check_momentum_cycling(run, self)

    @hookimpl
    def before_step(self, run: Run) -> None:
        if not self.cycle_momentum:
            super().before_step(run)
            return
        position = self.position(run)
        if position is None:
            set_momentum(run, *self.own_momentum)
        else:
            set_momentum(run, self.interpolate(run, position, self.max_momentum, self.base_momentum, self.max_momentum))

    def interpolate(self, run: Run, position: int, first: float, peak: float, last: float) -> float:
        """The value at a position of a quantity that moves from `first` to `peak` to `last` during the cycle."""
        total = self.duration(run, self.total_steps)
        rise = self.pct_start * total - 1
        second_phase = [(2 * rise, first)] if self.three_phase else []
        points = [(0, first), (rise, peak), *second_phase, (total - 1, last)]
        for (start, old), (end, new) in pairwise(points):   # noqa: B007
            if position <= end:
                break
        done = min(1.0, (position - start) / ((end - start) or 1))
        return new + (old - new) * (1 - done if self.anneal_strategy == "linear" else (1 + cos(pi * done)) / 2)
