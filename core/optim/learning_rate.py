"""Learning rates: what the schedules say, and setting it; and the momentum that some of them move."""
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
    """The learning rate of each parameter group where `run` is now: its initial one times all schedules' factors."""
    return [
        initial_lr and initial_lr * prod(run.hook.lr_scale(run=run, initial_lr=initial_lr, group=group))    # 0 stays 0
        for group in run.optimizer.param_groups for initial_lr in [group["initial_lr"]]
    ]


def per_group(run: Run, group: dict[str, Any], name: str, value: Any) -> Any:
    """`value`, or its item for one parameter group where it is a list of several."""
    if not isinstance(value, list | tuple):
        return value
    groups = [id(one) for one in run.optimizer.param_groups]
    if len(value) not in (1, len(groups)):
        raise UsageError(f"{name} has {len(value)} values; parameter groups: {len(groups)}")
    return value[groups.index(id(group)) if len(value) > 1 else 0]


def apply_schedules(run: Run) -> None:
    """Set the learning rates to what the schedules say. Without schedules they are the user's own to change."""
    set_learning_rates(run.optimizer, scheduled_rates(run))


def set_learning_rates(optimizer: Optimizer, values: list[float]) -> None:
    """Set the learning rate of each parameter group."""
    for group, lr in zip(optimizer.param_groups, values, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)           # in place, so that compiled and captured steps see it
        else:
            group["lr"] = lr


def check_momentum_cycling(run: Run, plugin: Any) -> None:
    """Refuse, with UsageError, a plugin that cycles a momentum which there is not, or which another one cycles too.

    A plugin cycles the momentum where its option `cycle_momentum` is true.
    """
    if not {"momentum", "betas"} & set(run.optimizer.param_groups[0]):
        raise UsageError(f"{type(run.optimizer).__name__} has no momentum to cycle; add cycle_momentum=false")
    for name, other in run.hook.plugins.items():
        if other is not plugin and getattr(other, "cycle_momentum", False):
            raise UsageError(f"{name} cycles the momentum too; add cycle_momentum=false to one of them")


def set_momentum(run: Run, momentum: float) -> None:
    """Set the momentum of every parameter group, or the first of its betas."""
    for group in run.optimizer.param_groups:
        group |= {"betas": (momentum, *group["betas"][1:])} if "betas" in group else {"momentum": momentum}


def checked_rates(run: Run, step: int) -> list[float]:
    """The rates where `run` is now. Raises UsageError where one is more than can be computed with."""
    try:
        found = scheduled_rates(run)
    except OverflowError:
        found = [inf]
    if not all(abs(rate) <= torch.finfo(torch.float32).max for rate in found):
        who = names(run.hook.acting["lr_scale"] or ["lr"])
        raise UsageError(f"{who}: the learning rate is {max(found, key=abs):.3g} at step {step + 1:,}; "
                         "choose other numbers")
    return found


def lr_curve(run: Run, points: int = 2000) -> Iterator[tuple[int, list[float]]]:
    """The step and each group's learning rate, at no more than `points` steps of a prepared run; nothing is trained."""
    per_epoch, micro_batches = run.plan()
    every = max(1, run.planned_steps // points)
    for step in sorted({*range(0, run.planned_steps, every), run.planned_steps - 1}):
        seen = round(step / per_epoch * micro_batches)
        with run.counters.temporarily(epoch=step // per_epoch, attempts=step, seen=seen):
            yield step, checked_rates(run, step)
