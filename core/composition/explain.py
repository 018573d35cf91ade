"""Show what a composition does before it runs: who acts where, and the plan in numbers."""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from loopctl import hooks
from loopctl.composition.compose import SPECS, compose
from loopctl.data.batch import sample_count
from loopctl.optim.learning_rate import lr_curve

if TYPE_CHECKING:
    from loopctl.run import Run


def explain(plugins: Iterable[Any] = (), run: Run | None = None) -> str:
    """The hook tree with the plugins that act at each hook, in their order; of a prepared `run` the plan too.

    Raises UsageError where the plugins do not go together.
    """
    composed = run.hook if run else compose(plugins)
    lines = []
    for line in hook_tree():
        hook = line.split()[0]
        name = line[:line.index(hook) + len(hook)]
        lines.append(f"{name:22}{', '.join(composed.acting[hook])}".rstrip())
    return "\n".join([*lines, "", *describe_plan(run)] if run else lines)


def hook_tree() -> list[str]:
    """The lines of the hook tree: a hook, indented, and what it is for."""
    return [line for line in (hooks.__doc__ or "").splitlines() if line.split()[:1] and line.split()[0] in SPECS]


def describe_plan(run: Run) -> list[str]:
    """What a prepared run is going to do, in numbers: updates, batch sizes, learning rates."""
    steps, micro_batches = run.plan()
    size = getattr(run.train, "batch_size", None) or sample_count(next(iter(run.train)))
    several = run.world_size > 1
    lrs = [lr[0] for _, lr in lr_curve(run)]
    each = f", {micro_batches / steps:.3g} micro-batches each" if micro_batches != steps else ""
    return [
        f"updates          {run.planned_steps:,}: {run.epochs} epochs of {steps:,}{each}",
        *[f"processes        {run.world_size}, each with batches of {size:,} samples"] * several,
        f"effective batch  {size * -(-micro_batches // steps) * run.world_size:,} samples",
        f"learning rate    {lrs[0]:.3g} at the start, {max(lrs):.3g} at its peak, {lrs[-1]:.3g} at the end",
    ]
