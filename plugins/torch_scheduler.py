"""Learning-rate schedule: any torch LRScheduler."""
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from loopctl import Run, UsageError
from loopctl.optim.group_numbers import initial_key
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class TorchScheduler(Schedule):
    """Use any torch LRScheduler, including one of your own.

    The scheduler changes the rates of a stand-in optimizer, from which factors of the learning rate are computed. So it
    multiplies with every other schedule and never changes the real optimizer. Momentum that it cycles changes in the
    stand-in alone; onecycle and cyclic change the real momentum.

    cls: scheduler class, or a function that takes an optimizer and returns a scheduler
    options: keyword arguments of cls; on the command line each by its own name, next to cls
    by: call the scheduler's step() every epoch or every step
    """

    cls: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if isinstance(self.cls, type) and issubclass(self.cls, ReduceLROnPlateau):
            raise ValueError("cls=ReduceLROnPlateau needs a metric; use the plugin plateau")
        self.name = getattr(self.cls, "__name__", self.cls)
        self.done = 0                               # calls of the scheduler's step()
        self.stand_in: Any = None                  # the stand-in
        super().__post_init__()

    def check(self, run: Run) -> None:
        super().check(run)
        self.begin(run)

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        index = [id(param_group) for param_group in run.optimizer.param_groups].index(id(group))
        if (self.stand_in is None or position < self.done
                or self.stand_in.param_groups[index]["begins_at"] != initial_value(group, self.option)):
            self.begin(run)         # a scheduler cannot step back, nor start from another initial rate
        while self.done < position:
            try:
                self.scheduler.step()
            except Exception as error:          # such as a division by an option that is 0
                raise UsageError(f"cls={self.name}: {' '.join(str(error).split())}") from error
            self.done += 1
        return float(self.stand_in.param_groups[index]["lr"]) / initial_lr

    def begin(self, run: Run) -> None:
        """Create the scheduler on a new stand-in optimizer."""
        self.done, self.stand_in = 0, StandIn(run.optimizer, self.option)
        try:
            self.scheduler = self.cls(self.stand_in, **self.options)
        except Exception as error:                  # a class may raise anything for wrong options
            raise UsageError(f"cls={self.name}: {' '.join(str(error).split())}") from error
        self.stand_in.step()                       # a scheduler warns if it steps before the optimizer
        if not isinstance(self.scheduler, LRScheduler):
            raise UsageError(f"cls={self.name} made a {type(self.scheduler).__name__}, not a torch LRScheduler")
        try:
            signature(self.scheduler.step).bind()
        except TypeError as error:
            raise UsageError(f"cls={self.name}: its step is {error}; for a metric, use the plugin plateau") from error

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "optimizer": self.stand_in.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self.stand_in.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


def initial_value(group: dict[str, Any], option: str) -> float:
    """The initial value of a number of a parameter group; of a group that does not have it, its learning rate."""
    return group.get(initial_key(option), group["initial_lr"])


class StandIn(torch.optim.Optimizer):
    """An optimizer with the parameter groups of another one, and dummy parameters.

    option: the number of those groups whose initial values are the learning rates
    """

    def __init__(self, real: torch.optim.Optimizer, option: str) -> None:
        groups = []
        for group in real.param_groups:
            initial = initial_value(group, option)
            groups.append({**group, "params": [torch.zeros(1)], "lr": initial, "begins_at": initial})
            del groups[-1]["initial_lr"]            # it is taken for another scheduler's
        super().__init__(groups, {"momentum": 0.0, **real.defaults})

    def step(self, closure: Any = None) -> None:    # type: ignore[override]
        """Do nothing: there is nothing to train."""
