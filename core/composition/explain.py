"""Explain a run before it is started: which plugins act at each hook, and how many steps at which learning rate."""
from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from loopctl import hooks
from loopctl.composition.compose import SPECS, compose
from loopctl.data.batch import sample_count
from loopctl.errors import counted, names
from loopctl.model.own_names import own_parameters
from loopctl.optim.learning_rate import describe_groups, distinct_curves, lr_curve
from loopctl.optim.schedule import scheduled_numbers
from loopctl.optim.several import Optimizers

if TYPE_CHECKING:
    from loopctl.run import Run


def explain(plugins: Iterable[Any] = (), run: Run | None = None) -> str:
    """Return the hook tree with the plugins that act at each hook, in order; for a prepared `run` also its plan.

    Raises UsageError if the plugins cannot be combined.
    """
    composed = run.hook if run else compose(plugins)
    lines = []
    for line in hook_tree():
        hook = line.split()[0]
        name = line[:line.index(hook) + len(hook)]
        lines.append(f"{name:22}{', '.join(composed.acting[hook])}".rstrip())
    return "\n".join([*lines, "", *describe_plan(run)] if run else lines)


def hook_tree() -> list[str]:
    """Return the lines of the hook tree: the name of a hook, indented, and what it is for."""
    return [line for line in (hooks.__doc__ or "").splitlines() if line.split()[:1] and line.split()[0] in SPECS]


def describe_plan(run: Run) -> list[str]:
    """Return lines with the planned number of updates, batch sizes and learning rates of a prepared run."""
    plan = run.planned.per_epoch
    steps, micro_batches = plan[0]
    size = getattr(run.train, "batch_size", None) or sample_count(next(iter(run.train)))
    phases = [(len([*same]), *each) for each, same in groupby(plan)]        # where epochs differ
    effective = [counted(size * -(-batches // updates) * run.world_size, "sample") for _, updates, batches in phases]
    rates, numbers = [], []
    for _, values in lr_curve(run):
        rates.append(values)
        numbers.append([(number.name, number.value(run)) for number in scheduled_numbers(run)])
    curves = distinct_curves(rates)
    others = {(values[0][0], tuple(value for _, value in values)) for values in zip(*numbers, strict=True)}
    each = f", {micro_batches / steps:.3g} micro-batches each" if micro_batches != steps else ""
    epochs = f"{counted(run.epochs, 'epoch')} of {steps:,}{each}"
    if len(phases) > 1:
        epochs = ", then ".join(f"{counted(length, 'epoch')} of {updates:,}" for length, updates, _ in phases)
    return [
        f"updates          {run.planned_steps:,}: {epochs}",
        *[f"processes        {run.world_size}, each with batches of {counted(size, 'sample')}"] * (run.world_size > 1),
        f"effective batch  {', then '.join(dict.fromkeys(effective))}",
        *[f"{'' if number else 'learning rate':17}"
          f"{f'{describe_groups(run.optimizer, groups)}: ' * (len(curves) > 1)}"
          f"{lrs[0]:.3g} at the start, {max(lrs):.3g} at its peak, {lrs[-1]:.3g} at the end"
          for number, (lrs, groups) in enumerate(curves.items())],
        *[f"{name:17}{values[0]:.3g} at the start, {max(values):.3g} at its peak, {values[-1]:.3g} at the end"
          for name, values in sorted(others)],
        *[f"{'' if number else 'optimizers':17}{line}" for number, line in enumerate(describe_shares(run))],
    ]


def describe_shares(run: Run) -> list[str]:
    """Return a line for each of several optimizers: its class, and which parameters it trains."""
    if not isinstance(run.optimizer, Optimizers):
        return []
    known = {id(parameter): name for name, parameter in own_parameters(run.model).items()}
    lines = []
    for name, one in run.optimizer.named.items():
        held = [parameter for group in one.param_groups for parameter in group["params"]]
        few = [known.get(id(parameter), "one of loss_fn") for parameter in held[:3]]
        few += [f"{len(held) - 3} more"] * (len(held) > 3)
        numbers = sum(parameter.numel() for parameter in held)
        lines.append(f"{name}: {type(one).__name__} with {counted(numbers, 'number')}, {names(few)}")
    return lines
