"""`loopctl lr`: the learning-rate curve of a run, as text and as an image, without training."""
from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from loopctl.checkpoint.state import parameter_names
from loopctl.cli.train import prepare_run
from loopctl.composition.compose import blame_plugin
from loopctl.errors import UsageError, counted
from loopctl.optim.learning_rate import describe_groups, distinct_curves, divisor, lr_curve
from loopctl.report import plots
from loopctl.run import Run


def draw(settings: dict[str, Any], out: Path | None) -> str:
    """Return the curve as text; with `out`, also write it as an image, in the format of its file extension."""
    if out and not out.suffix:
        raise UsageError(f"--out {out} has no extension to choose the image format by; use {out}.png or {out}.svg")
    run = prepare_run(settings)
    steps: list[int] = []
    rates: list[list[float]] = []
    factors: list[dict[str, float]] = []
    with blame_plugin(run.hook):
        for step, lrs in lr_curve(run):
            steps.append(step)
            rates.append(lrs)
            factors.append(schedule_factors(run))
    if out:
        try:
            draw_image(run, steps, rates, active_spans(steps, factors), out)
        except UsageError as error:
            reason = str(error).removeprefix("it ").removeprefix(f"{out} ")
            raise UsageError(f"--out {reason}" if reason.startswith("needs") else f"--out {out} {reason}") from error
    length = f"{counted(run.epochs, 'epoch')}, {counted(run.planned_steps, 'step')}"
    drawn = chart([groups[0] for groups in rates], length)
    curves = [f"{label}: start {values[0]:.3g}, end {values[-1]:.3g}" for label, values in labelled_curves(run, rates)]
    return "\n".join([drawn, *(["", f"{curves[0]} (drawn)", *curves[1:]] if curves[1:] else [])])


def chart(values: list[float], length: str, width: int | None = None, height: int = 12) -> str:
    """Draw rates as filled columns of text. The line below has the first and the last rate, and `length`."""
    return plots.bars(values, f"start {values[0]:.3g}, end {values[-1]:.3g}; {length}", width, height)


def schedule_factors(run: Run) -> dict[str, float]:
    """The factor of each schedule at the current step of `run`, for the first parameter group, by the plugin's name."""
    group = run.optimizer.param_groups[0]
    arguments = {"run": run, "initial_lr": divisor(group), "group": group}
    factors: dict[str, float] = {}
    for impl in reversed([impl for impl in run.hook.hookimpls if impl.function.__name__ == "lr_scale"]):
        result = impl.function(*(arguments[name] for name in impl.argnames))
        if impl.wrapper:                # its factor is its own rate over the rate of the schedules that it wraps
            inner = [prod(factors.values())]
            next(result)
            try:
                result.send(inner)
            except StopIteration as end:
                result = prod(end.value) / inner[0] if inner[0] else 1.0
        factors[impl.plugin_name] = result
    return {name: factors[name] for name in run.hook.acting["lr_scale"]}


def active_spans(steps: list[int], factors: list[dict[str, float]]) -> dict[str, tuple[int, int]]:
    """The first and the last step at which each schedule changes the rate, by the plugin's name.

    A schedule that starts with a factor other than 1 is active from the first step. One that never changes the rate is
    left out.
    """
    spans = {}
    for name in factors[0]:
        values = [by_name[name] for by_name in factors]
        changes = [index for index, (old, new) in enumerate(pairwise(values), 1) if old != new]
        if changes:
            first = 0 if values[0] != 1 else changes[0] - 1
            spans[name] = steps[first], steps[changes[-1]]
    return spans


def draw_image(run: Run, steps: list[int], rates: list[list[float]], spans: dict[str, tuple[int, int]],
               out: Path) -> None:
    """Draw the curve of every parameter group and, below, a bar for each schedule over the steps where it is active."""
    epochs = [run.planned.epochs(step) for step in [*steps, run.planned_steps]]
    groups = list(labelled_curves(run, rates))
    groups = [*groups[:12], *(("_", values) for _, values in groups[12:])]      # no legend for "_"
    legend = 0.2 * min(12, len(groups)) if len(groups) > 1 else 0.0
    strip = 0.2 * len(spans)
    with plots.picture(out, height=3.2 + strip + legend) as figure:
        if spans:
            axes, bars = figure.subplots(2, sharex=True, height_ratios=(3, strip))
        else:
            axes, bars = figure.add_subplot(), None
        for number, (label, values) in enumerate(groups):
            extended = [*values, values[-1]]            # the last rate holds to the end of the last step
            axes.plot(epochs, extended, label=label, zorder=3, **plots.stroke(number))
        peaks = [max(values) for _, values in groups if max(values) > 0]
        if peaks and max(peaks) > 50 * min(peaks):
            axes.set_yscale("log")
            axes.set_ylim(min(peaks) / 100, max(peaks) * 2)
        elif all(value >= 0 for _, values in groups for value in values):
            axes.set_ylim(bottom=0)
        axes.set(ylabel="learning rate", xlim=(0, epochs[-1]))
        axes.grid(color=plots.GREY, linewidth=0.4, linestyle=":")
        axes.xaxis.get_major_locator().set_params(integer=True)
        above = axes.secondary_xaxis("top", functions=(
            np.vectorize(run.planned.steps, otypes=[float]), np.vectorize(run.planned.epochs, otypes=[float])))
        above.set_xlabel("step")
        above.xaxis.get_major_locator().set_params(integer=True)
        (axes if bars is None else bars).set_xlabel("epoch")
        if bars is not None:
            axes.tick_params(labelbottom=False)
            bars.set_yticks(range(len(spans)), spans)
            bars.tick_params(axis="y", length=0, labelsize=8)
            bars.invert_yaxis()
            for row, (first, last) in enumerate(spans.values()):
                begin, end = run.planned.epochs(first), run.planned.epochs(last)
                length = max(end - begin, epochs[-1] / 200)         # wide enough to be visible
                bars.barh(row, length, left=begin, height=0.5, color=plots.GREY)
        if legend:
            figure.legend(loc="outside lower left", fontsize=8, handlelength=4)


def labelled_curves(run: Run, rates: list[list[float]]) -> Iterator[tuple[str, list[float]]]:
    """Each distinct curve once, with a label that names the parameter groups that have it."""
    parameters = parameter_names(run)
    for values, numbers in distinct_curves(rates).items():
        members = [name for number in numbers for name in parameters[number]]
        few = members if len(members) <= 3 else [members[0], f"{len(members) - 2} more", members[-1]]
        yield f"{describe_groups(run.optimizer, numbers)}: {', '.join(few)}", list(values)
