"""The 1cycle policy."""
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi
from typing import Any, Literal

from loopctl import Duration, Run, hookimpl
from loopctl.optim.learning_rate import check_momentum_cycling, per_group, set_momentum


@dataclass(eq=False)
class Onecycle:
    """Raise the learning rate to a peak and lower it to almost nothing, momentum the other way.

    It is torch.optim.lr_scheduler.OneCycleLR; from Super-Convergence, arXiv:1708.07120.

    max_lr: the rate at the peak, in place of the optimizer's own; or a list with one per parameter group
    total_steps: length of the cycle, after which the rate stays at its lowest; the whole run if left out
    pct_start: the part of the cycle that the rise takes, 0 to 1
    anneal_strategy: rise and fall along half a cosine, or along a line
    cycle_momentum: move momentum, or the first of betas, too
    base_momentum: momentum at the peak
    max_momentum: momentum at both ends
    div_factor: the first rate is max_lr divided by this
    final_div_factor: the last rate is the first divided by this
    three_phase: come down to the first rate in as long as the rise took, and then to the last
    by: move every epoch, or every step
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
        if not self.cycle_momentum:
            self.train_start = self.before_step = None          # type: ignore[assignment, method-assign]

    @hookimpl
    def lr_scale(self, run: Run, initial_lr: float, group: dict[str, Any]) -> float | None:
        peak = per_group(run, group, "max_lr", self.max_lr)
        first = peak / self.div_factor
        return self.between(run, first, peak, first / self.final_div_factor) / initial_lr

    @hookimpl
    def train_start(self, run: Run) -> None:
        check_momentum_cycling(run, self)

    @hookimpl
    def before_step(self, run: Run) -> None:
        momentum = self.between(run, self.max_momentum, self.base_momentum, self.max_momentum)
        set_momentum(run, momentum)

    def between(self, run: Any, first: float, peak: float, last: float) -> float:
        """Where a value that goes from `first` over `peak` to `last` is now."""
        position, total = run.position(self.by), run.duration(self.total_steps, self.by)
        top = self.pct_start * total - 1
        back = [(2 * top, first)] if self.three_phase else []
        for (start, old), (end, new) in pairwise([(0, first), (top, peak), *back, (total - 1, last)]):   # noqa: B007
            if position <= end:
                break
        done = min(1.0, (position - start) / ((end - start) or 1))
        return new + (old - new) * (1 - done if self.anneal_strategy == "linear" else (1 + cos(pi * done)) / 2)
