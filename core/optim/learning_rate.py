"""Learning rates: compute them from the schedules and set them; and the momentum that some schedules cycle."""
from __future__ import annotations

from collections.abc import Iterator
from math import inf, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loopctl.errors import UsageError, names

if TYPE_CHECKING:
    from loopctl.run import Run


def scheduled_rates(run: Run) -> list[float]:
    """The learning rate of each parameter group at the current step: its initial rate times all schedules' factors.

    An initial rate of 0 stays 0.
    """
    return [
        initial_lr and initial_lr * prod(run.hook.lr_scale(run=run, initial_lr=initial_lr, group=group))
        for group in run.optimizer.param_groups for initial_lr in [group["initial_lr"]]
    ]


def per_group(run: Run, group: dict[str, Any], name: str, value: Any) -> Any:
    """The value of an option for one parameter group: `value` itself, or its item if it is a list with one per group.

    name: of the option, for the message. Raises UsageError where the list has another length.
    """
    if not isinstance(value, list | tuple):
        return value
    groups = [id(other) for other in run.optimizer.param_groups]
    if len(value) not in (1, len(groups)):
        raise UsageError(f"{name} has {len(value)} values; parameter groups: {len(groups)}")
    return value[groups.index(id(group)) if len(value) > 1 else 0]


def apply_schedules(run: Run) -> None:
    """Set the learning rates from the schedules. Not called without schedules: then the rates are the user's own."""
    set_learning_rates(run.optimizer, scheduled_rates(run))


def set_learning_rates(optimizer: Optimizer, values: list[float]) -> None:
    """Set the learning rate of each parameter group."""
    for group, lr in zip(optimizer.param_groups, values, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)           # in place, for compiled and captured steps
        else:
            group["lr"] = lr


def check_momentum_cycling(run: Run, plugin: Any) -> None:
    """Raise UsageError where the optimizer has no momentum to cycle, or where another plugin cycles it too.

    A plugin cycles the momentum where its option `cycle_momentum` is true.
    """
    if not {"momentum", "betas"} & set(run.optimizer.param_groups[0]):
        raise UsageError(f"{type(run.optimizer).__name__} has no momentum to cycle; pass cycle_momentum=false")
    for name, other in run.hook.plugins.items():
        if other is not plugin and getattr(other, "cycle_momentum", False):
            raise UsageError(f"{name} cycles the momentum too; pass cycle_momentum=false to one of them")


def set_momentum(run: Run, momentum: float) -> None:
    """Set the momentum of every parameter group, or the first of its betas."""
    for group in run.optimizer.param_groups:
        group |= {"betas": (momentum, *group["betas"][1:])} if "betas" in group else {"momentum": momentum}


def checked_rates(run: Run, step: int) -> list[float]:
    """The learning rates at the current step. Raises UsageError where one is beyond float32."""
    try:
        rates = scheduled_rates(run)
    except OverflowError:
        rates = [inf]
    if not all(abs(rate) <= torch.finfo(torch.float32).max for rate in rates):
        schedules = names(run.hook.acting["lr_scale"] or ["lr"])
        raise UsageError(f"{schedules}: the learning rate is {max(rates, key=abs):.3g} at step {step + 1:,}; "
                         "choose other numbers")
    return rates


def lr_curve(run: Run, points: int = 2000) -> Iterator[tuple[int, list[float]]]:
    """Yield a step and the learning rate of each group, for about `points` steps of a prepared run. Trains nothing."""
    per_epoch, micro_batches = run.plan()
    every = max(1, run.planned_steps // points)
    for step in sorted({*range(0, run.planned_steps, every), run.planned_steps - 1}):
        seen = round(step / per_epoch * micro_batches)
        with run.counters.temporarily(epoch=step // per_epoch, attempts=step, seen=seen):
            yield step, checked_rates(run, step)
