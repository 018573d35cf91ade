"""Learning rates: compute them from the schedules and set them; and the momentum that some schedules cycle."""
from __future__ import annotations

from collections.abc import Iterator
from math import inf, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loopctl.errors import UsageError, names, one_line
from loopctl.optim.group_numbers import initial_key, numbers_by_name, read_number
from loopctl.optim.schedule import Schedule
from loopctl.optim.several import each_optimizer

if TYPE_CHECKING:
    from loopctl.run import Run


# Stands in for an initial rate of 0, by which a schedule could not divide. A power of two, so that the division and the
# multiplication are exact; so small that two rates divided by it are too large for float32 and do not pass unnoticed.
NO_RATE = 2.0**-500


def scheduled_rates(run: Run) -> list[float]:
    """The learning rate of each parameter group at the current step: its initial rate times all schedules' factors.

    An initial rate of 0 stays 0, unless a schedule sets a rate of its own, such as `onecycle`. Raises UsageError where
    two schedules do so in such a group, because then there is no rate that their factors belong to.
    """
    rates = []
    for group in run.optimizer.param_groups:
        initial_lr = divisor(group)
        rate = initial_lr * prod(run.hook.lr_scale(run=run, initial_lr=initial_lr, group=group))
        rates.append(rate if group["initial_lr"] else rate_from_zero(run, rate))
    return rates


def divisor(group: dict[str, Any]) -> float:
    """The initial learning rate of a parameter group as schedules get it, never 0, because they divide by it."""
    return group["initial_lr"] or NO_RATE


def rate_from_zero(run: Run, rate: float) -> float:
    """The learning rate of a group whose initial rate is 0: 0.0 where no schedule has set a rate of its own."""
    if abs(rate) >= 1e100:
        schedules = names(run.hook.acting["lr_scale"])
        raise UsageError(f"{schedules}: two of them set a rate of their own, and the initial learning rate is 0; use "
                         "one of them, or an initial rate above 0")
    return rate if abs(rate) > 1e-100 else 0.0


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


def group_names(optimizer: Optimizer) -> list[str]:
    """The name of each parameter group: what its key `name` says, else its index. A repeated name gets it too."""
    found = [one_line(group.get("name") or index) for index, group in enumerate(optimizer.param_groups)]
    return [name if found.count(name) == 1 else f"{name} ({index})" for index, name in enumerate(found)]


def describe_groups(optimizer: Optimizer, indices: list[int]) -> str:
    """The parameter groups with these indices, for a message: `group 0`, `groups layer 1 and layer 2`."""
    labels = group_names(optimizer)
    return f"group{'s' * (len(indices) > 1)} {names([labels[index] for index in indices])}"


def recorded_rates(optimizer: Optimizer) -> dict[str, float]:
    """The columns of the history: `lr` of the first parameter group; where groups differ, `lr_NAME` of each.

    Likewise for each other number that is scheduled, such as `weight_decay`, of the groups in which it is.
    """
    columns: dict[str, float] = {}
    found = [scheduled_values(group) for group in optimizer.param_groups]
    for option in dict.fromkeys(option for values in found for option in values):
        having = {name: values[option] for name, values in zip(group_names(optimizer), found, strict=True)
                  if option in values}
        initial = {group.get(initial_key(option)) for group in optimizer.param_groups} - {None}
        columns[option] = next(iter(having.values()))
        if len({*having.values()}) > 1 or len(initial) > 1:
            columns |= {f"{option}_{name}": value for name, value in having.items()}
    return columns


def scheduled_values(group: dict[str, Any]) -> dict[str, float]:
    """The values of those numbers of a parameter group that have an initial value: `lr`, and what schedules move."""
    return {name: read_number(group, place) for name, place in numbers_by_name(group).items()
            if initial_key(name) in group}


def step_rates(optimizer: Optimizer) -> dict[str, float | Tensor]:
    """The rates of a step for logs, as they are, which waits for no device: `lr` of the first parameter group, and of
    several groups `lr_NAME` of each."""
    rates = [group["lr"] for group in optimizer.param_groups]
    named = zip(group_names(optimizer), rates, strict=True) if len(rates) > 1 else ()
    return {"lr": rates[0]} | {f"lr_{name}": rate for name, rate in named}


def check_momentum_cycling(run: Run, plugin: Any) -> list[float]:
    """Return the momentum of each parameter group, or the first of its betas.

    Raises UsageError where the optimizer has no momentum to cycle, or where another plugin cycles it too: one whose
    option `cycle_momentum` is true.
    """
    for one in each_optimizer(run.optimizer):
        if not {"momentum", "betas"} & set(one.param_groups[0]):
            raise UsageError(f"{type(one).__name__} has no momentum to cycle; pass cycle_momentum=false")
    if plugin.optimizer:
        raise UsageError(f"optimizer={plugin.optimizer}: the momentum of every optimizer would be cycled; pass "
                         "cycle_momentum=false")
    for name, other in run.hook.plugins.items():
        if other is not plugin and getattr(other, "cycle_momentum", False):
            raise UsageError(f"{name} cycles the momentum too; pass cycle_momentum=false to one of them")
        if isinstance(other, Schedule) and other.option == "momentum":
            raise UsageError(f"{name} schedules the momentum too; leave it out, or pass cycle_momentum=false")
    return [group["betas"][0] if "betas" in group else group["momentum"] for group in run.optimizer.param_groups]


def set_momentum(run: Run, *momenta: float) -> None:
    """Set the momentum of each parameter group, or the first of its betas. `momenta`: one for all, or one each."""
    groups = run.optimizer.param_groups
    for group, momentum in zip(groups, momenta * len(groups) if len(momenta) == 1 else momenta, strict=True):
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


def distinct_curves(rates: list[list[float]]) -> dict[tuple[float, ...], list[int]]:
    """The indices of the parameter groups that have each curve. rates: of each group, for each step of `lr_curve`."""
    found: dict[tuple[float, ...], list[int]] = {}
    for index, values in enumerate(zip(*rates, strict=True)):
        found.setdefault(values, []).append(index)
    return found


def lr_curve(run: Run, points: int = 2000) -> Iterator[tuple[int, list[float]]]:
    """Yield a step and the learning rate of each group, for about `points` steps of a prepared run. Trains nothing.

    Raises UsageError where a schedule never acts, or where a rate is beyond float32.
    """
    for plugin in run.hook.plugins.values():
        if isinstance(plugin, Schedule):
            plugin.check(run)
    every = max(1, run.planned_steps // points)
    for step in sorted({*range(0, run.planned_steps, every), run.planned_steps - 1}):
        epoch, seen = run.planned.position(step)
        with run.counters.temporarily(epoch=epoch, attempts=step, seen=seen):
            yield step, checked_rates(run, step)
