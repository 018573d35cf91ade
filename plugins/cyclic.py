"""Learning-rate schedule: cyclical learning rates."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Duration, Run, hookimpl
from loopctl.optim.learning_rate import check_momentum_cycling, per_group, set_momentum
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Cyclic(Schedule):
    """Move the learning rate up and down between two values, and the momentum the other way.

    Same as torch.optim.lr_scheduler.CyclicLR; from Cyclical Learning Rates, arXiv:1506.01186.

    base_lr: lower learning rate, in place of the optimizer's own; or a list with one per parameter group
    max_lr: upper learning rate; or a list with one per parameter group
    step_size_up: duration of a rise
    step_size_down: duration of a fall; the same as step_size_up if left out
    mode: amplitude of the cycles: constant (triangular), halved after each cycle (triangular2), or multiplied by gamma
        in every epoch or step (exp_range)
    gamma: with exp_range, factor of the amplitude per epoch or step; above 0
    cycle_momentum: also cycle the momentum, or the first of betas
    base_momentum: momentum at the upper learning rate
    max_momentum: momentum at the lower learning rate
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    base_lr: float | list[float]
    max_lr: float | list[float]
    step_size_up: Duration = 2000
    step_size_down: Duration | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0
    cycle_momentum: bool = True
    base_momentum: float = 0.8
    max_momentum: float = 0.9
    by: Literal["epoch", "step"] = "step"

    def __post_init__(self) -> None:
        for name in ("base_lr", "max_lr"):
            value = getattr(self, name)
            for lr in value if isinstance(value, list | tuple) else [value]:
                if not lr >= 0:
                    raise ValueError(f"{name} is at least 0, not {lr}")
        if not self.gamma > 0:
            raise ValueError(f"gamma is above 0, not {self.gamma}")
        for name in ("base_momentum", "max_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is 0 to 1, not {getattr(self, name)}")
        if self.option != "lr" and self.cycle_momentum:
            raise ValueError(f"option={self.option}: the momentum would be cycled too; pass cycle_momentum=false")
        if not self.cycle_momentum:
            super().__post_init__()

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        lower, upper = (per_group(run, group, name, getattr(self, name)) for name in ("base_lr", "max_lr"))
        return (lower + (upper - lower) * self.fraction(run, position)) / initial_lr

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
            fraction = self.fraction(run, position)
            set_momentum(run, self.max_momentum - (self.max_momentum - self.base_momentum) * fraction)

    def fraction(self, run: Run, position: int) -> float:
        """Where the rate is between the lower (0) and the upper (1) learning rate at a position."""
        up = self.duration(run, self.step_size_up)
        down = up if self.step_size_down is None else self.duration(run, self.step_size_down)
        cycle, position_in_cycle = divmod(position, up + down)
        fraction = min(position_in_cycle / up, (up + down - position_in_cycle) / down)
        return fraction * {"triangular": 1.0, "triangular2": 0.5**cycle, "exp_range": self.gamma**position}[self.mode]
