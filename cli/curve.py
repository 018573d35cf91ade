"""The learning rate over a run, drawn without training."""
from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from loopctl.checkpoint.state import parameter_names
from loopctl.cli.train import prepared
from loopctl.composition.compose import blame_plugin
from loopctl.errors import UsageError, names
from loopctl.optim.learning_rate import lr_curve
from loopctl.report import plots
from loopctl.run import Run


def drawn(settings: dict[str, Any], out: Path | None) -> str:
    """The curve that the settings make, as text; with `out` also as a picture, of the kind its name says."""
    if out and not out.suffix:
        raise UsageError(f"--out {out}: its ending says what kind of picture it is; use {out}.png or {out}.svg")
    run = prepared(settings)
    steps: list[int] = []
    rates: list[list[float]] = []
    factors: list[dict[str, float]] = []
    with blame_plugin(run.hook):
        for step, lr in lr_curve(run):
            steps.append(step)
            rates.append(lr)
            factors.append(said(run))
    if out:
        try:
            picture(run, steps, rates, phases(steps, factors), out)
        except UsageError as error:
            what = str(error).removeprefix("it ").removeprefix(f"{out} ")
            raise UsageError(f"--out {what}" if what.startswith("needs") else f"--out {out} {what}") from error
    return chart([one[0] for one in rates], f"{run.epochs} epochs, {run.planned_steps:,} steps")


def chart(values: list[float], length: str, width: int | None = None, height: int = 12) -> str:
    """Rates as filled columns, with where they start and end, and `length`, below."""
    return plots.bars(values, f"start {values[0]:.3g}, end {values[-1]:.3g}; {length}", width, height)


def said(run: Run) -> dict[str, float]:
    """What each schedule makes of the first group's rate where `run` is now: a factor, by the plugin's name."""
    group = run.optimizer.param_groups[0]
    given = {"run": run, "initial_lr": group["initial_lr"], "group": group}
    found: dict[str, float] = {}
    if not group["initial_lr"]:
        return found
    for impl in reversed([one for one in run.hook.hookimpls if one.function.__name__ == "lr_scale"]):
        result = impl.function(*(given[name] for name in impl.argnames))
        if impl.wrapper:                # it acts where it says another rate than the others
            inner = [prod(found.values())]
            next(result)
            try:
                result.send(inner)
            except StopIteration as end:
                result = prod(end.value) / inner[0] if inner[0] else 1.0
        found[impl.plugin_name] = result
    return {name: found[name] for name in run.hook.acting["lr_scale"]}


def phases(steps: list[int], factors: list[dict[str, float]]) -> dict[str, tuple[int, int]]:
    """The steps from which to which each schedule moves the rate, by the plugin's name; of those that do.

    One that holds the rate at a factor at first acts from the beginning.
    """
    found = {}
    for name in factors[0]:
        values = [one[name] for one in factors]
        moves = [index for index, (old, new) in enumerate(pairwise(values), 1) if old != new]
        if moves:
            begins = 0 if values[0] != 1 else moves[0] - 1
            found[name] = steps[begins], steps[moves[-1]]
    return found


def picture(run: Run, steps: list[int], rates: list[list[float]], acting: dict[str, tuple[int, int]],
            out: Path) -> None:
    """Draw the curve of every parameter group, and below it a bar for each schedule while it acts."""
    per_epoch = run.plan()[0]
    epochs = [step / per_epoch for step in [*steps, run.planned_steps]]
    groups = list(labelled(run, rates))
    groups = [*groups[:12], *(("_", values) for _, values in groups[12:])]          # "_" is not in the legend
    legend = 0.2 * min(12, len(groups)) if len(groups) > 1 else 0.0
    strip = 0.2 * len(acting)
    with plots.picture(out, height=3.2 + strip + legend) as figure:
        if acting:
            axes, bars = figure.subplots(2, sharex=True, height_ratios=(3, strip))
        else:
            axes, bars = figure.add_subplot(), None
        for number, (label, values) in enumerate(groups):
            lasting = [*values, values[-1]]             # to the end of the last step
            axes.plot(epochs, lasting, label=label, zorder=3, **plots.stroke(number))
        peaks = [max(values) for _, values in groups if max(values) > 0]
        if peaks and max(peaks) > 50 * min(peaks):
            axes.set_yscale("log")
            axes.set_ylim(min(peaks) / 100, max(peaks) * 2)
        elif all(value >= 0 for _, values in groups for value in values):
            axes.set_ylim(bottom=0)
        axes.set(ylabel="learning rate", xlim=(0, epochs[-1]))
        axes.grid(color=plots.GREY, linewidth=0.4, linestyle=":")
        axes.xaxis.get_major_locator().set_params(integer=True)
        above = axes.secondary_xaxis("top", functions=(lambda x: x * per_epoch, lambda x: x / per_epoch))
        above.set_xlabel("step")
        above.xaxis.get_major_locator().set_params(integer=True)
        (axes if bars is None else bars).set_xlabel("epoch")
        if bars is not None:
            axes.tick_params(labelbottom=False)
            bars.set_yticks(range(len(acting)), acting)
            bars.tick_params(axis="y", length=0, labelsize=8)
            bars.invert_yaxis()
            for row, (begins, ends) in enumerate(acting.values()):
                length = max(ends - begins, run.planned_steps / 200) / per_epoch        # so that it is seen
                bars.barh(row, length, left=begins / per_epoch, height=0.5, color=plots.GREY)
        if legend:
            figure.legend(loc="outside lower left", fontsize=8, handlelength=4)


def labelled(run: Run, rates: list[list[float]]) -> Iterator[tuple[str, list[float]]]:
    """Each different curve once, with the parameter groups that follow it."""
    found: dict[tuple[float, ...], list[int]] = {}
    for number, values in enumerate(zip(*rates, strict=True)):
        found.setdefault(values, []).append(number)
    parameters = parameter_names(run)
    for values, numbers in found.items():
        mine = [name for number in numbers for name in parameters[number]]
        few = mine if len(mine) <= 3 else [mine[0], f"{len(mine) - 2} more", mine[-1]]
        which = names([str(number) for number in numbers])
        yield f"group{'s' * (len(numbers) > 1)} {which}: {', '.join(few)}", list(values)
