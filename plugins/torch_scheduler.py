"""Any schedule written for torch."""
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from loopctl import Run, UsageError, hookimpl


@dataclass(eq=False)
class TorchScheduler:
    """Follow any torch LRScheduler, one's own included.

    It moves the rates of a stand-in, from which the factors are read: it multiplies with other schedules, and cannot
    disturb the optimizer. A momentum that it cycles stays in the stand-in; onecycle and cyclic move the real one.

    cls: the class, or a function that takes an optimizer and returns a scheduler
    options: its own options; on the command line each by its name, beside cls
    by: step it every epoch, or every step
    """

    cls: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        if isinstance(self.cls, type) and issubclass(self.cls, ReduceLROnPlateau):
            raise ValueError("cls=ReduceLROnPlateau judges a metric; use the plugin plateau")
        self.name = getattr(self.cls, "__name__", self.cls)
        self.done = 0                               # steps that the scheduler has made
        self.optimizer: Any = None

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.start(run)

    @hookimpl
    def lr_scale(self, run: Run, initial_lr: float, group: dict[str, Any]) -> float | None:
        position = run.position(self.by)
        groups = [id(one) for one in run.optimizer.param_groups]
        number = groups.index(id(group))
        if (self.optimizer is None or position < self.done
                or self.optimizer.param_groups[number]["begins_at"] != initial_lr):
            self.start(run)
        while self.done < position:
            try:
                self.scheduler.step()
            except Exception as error:          # such as an option that it divides by
                raise UsageError(f"cls={self.name}: {' '.join(str(error).split())}") from error
            self.done += 1
        return float(self.optimizer.param_groups[number]["lr"]) / initial_lr

    def start(self, run: Any) -> None:
        self.done, self.optimizer = 0, StandIn(run.optimizer)
        try:
            self.scheduler = self.cls(self.optimizer, **self.options)
        except Exception as error:                  # a class may raise anything on options that it does not take
            raise UsageError(f"cls={self.name}: {' '.join(str(error).split())}") from error
        self.optimizer.step()                       # once; a scheduler warns where none has been
        if not isinstance(self.scheduler, LRScheduler):
            raise UsageError(f"cls={self.name} made a {type(self.scheduler).__name__}, not a torch LRScheduler")
        try:
            signature(self.scheduler.step).bind()
        except TypeError as error:
            raise UsageError(f"cls={self.name}: its step is {error}; for a metric, use the plugin plateau") from error

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])


class StandIn(torch.optim.Optimizer):
    """The parameter groups of an optimizer, with their initial rates and nothing to train."""

    def __init__(self, real: torch.optim.Optimizer) -> None:
        groups = [{**group, "params": [torch.zeros(1)], "lr": group["initial_lr"]} for group in real.param_groups]
        for group in groups:
            group["begins_at"] = group.pop("initial_lr")    # a scheduler that finds it takes it for another one's
        super().__init__(groups, {"momentum": 0.0, **real.defaults})

    def step(self, closure: Any = None) -> None:    # type: ignore[override]
        """There is nothing to train."""
