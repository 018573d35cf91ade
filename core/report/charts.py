"""Line charts of metrics over epochs, as SVG in HTML, with their values as text. Needs neither torch nor a network."""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10
from typing import Any

from loopctl.metrics.monitor import direction
from loopctl.report.html import escaped, table

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 408, 26, 212         # edges of the area between the axes
MAX_POINTS = 400                                    # drawn per line
LARGEST = 1e300                                     # larger values are drawn as gaps

COLOURS, DASHES = 7, ("", "6 3", "2 3", "9 3 2 3")
MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "M-2.7-2.7h5.4v5.4h-5.4z", "M0-3.8L3.6 2.8H-3.6z", "M0-4L4 0L0 4L-4 0z",
    "M-3-3L3 3M-3 3L3-3",
)
PARTS = {"train": "train", "val": "valid"}          # the metrics of these share a chart
TITLES = {"lr": "learning rate", "grad_norm": "gradient norm", "memory_gb": "memory", "data_wait": "wait for data",
          "mfu": "FLOP utilization"}
UNITS = {"memory_gb": "GiB", "data_wait": "part of the time", "mfu": "part of the peak"}


@dataclass
class Line:
    """One curve, as points of epoch and value. A point whose value is not a finite number is a gap."""

    name: str
    points: list[tuple[float, Any]]

    @property
    def drawn(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if number(y) and abs(y) < LARGEST]


@dataclass
class Scale:
    """Maps values to coordinates of the drawing: `low` to `start`, `high` to `end`; of their log10 if `log` is true."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        position = log10(value) if self.log else value
        return round(self.start + (position - self.low) / (self.high - self.low) * (self.end - self.start), 1)


# Curves and values of a history


def curves(history: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """Return the lines of each chart, by metric, from a dict per epoch. Training and validation share a chart, and so
    do the learning rates of parameter groups."""
    charts: dict[str, list[Line]] = {}
    columns = dict.fromkeys(key for row in history for key in row)
    if any(column.startswith("lr_") for column in columns):         # one of them is the first group's, which `lr` is
        columns.pop("lr", None)
    for column in columns:
        values = [row.get(column) for row in history]
        if column in ("epoch", "step") or not any(type(value) in (int, float) for value in values):
            continue
        part, _, rest = column.partition("_")
        name, line = (rest, PARTS[part]) if part in PARTS and rest else (part, rest) if part == "lr" else (column, "")
        epochs = [row["epoch"] if number(row.get("epoch")) else index for index, row in enumerate(history, 1)]
        charts.setdefault(name, []).append(Line(line, [*zip(epochs, values, strict=True)]))
    return charts


def number(value: Any) -> bool:
    """Whether `value` is a finite number."""
    return type(value) in (int, float) and isfinite(value)


def best(metric: str, points: Iterable[tuple[float, Any]]) -> tuple[float, float] | None:
    """Return the first point with the best value; None if the metric's name does not tell whether higher is better."""
    better, numbers = direction(metric), [(x, y) for x, y in points if number(y)]
    if not (better and numbers) or metric == "grad_norm":          # a smaller gradient norm is not a better one
        return None
    return (max if better == "max" else min)(numbers, key=lambda point: point[1])


def shown(value: Any) -> str:
    """Return a value as short text; empty for None."""
    if type(value) not in (int, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e9 else f"{value:.5g}"


# Charts


def figure(key: int | str, metric: str, lines: list[Line]) -> str:
    """Return a chart with its legend and a table of its values, as HTML. `key` is unique on the page."""
    title, unit = titled(metric)
    legend = "".join(entry(index, line.name) for index, line in enumerate(lines) if line.name)
    lines = [Line(line.name, thinned(line.points)) for line in lines]
    by_line = [dict(line.points) for line in lines]
    epochs = sorted({x for points in by_line for x in points})
    rows = [[shown(x), *(shown(points.get(x)) for points in by_line)] for x in epochs]
    numbers = table(["epoch", *(line.name or title for line in lines)], rows, "numbers")
    return (f'<figure><figcaption><h3>{escaped(title)}</h3><ul class="legend">{legend}</ul></figcaption>'
            f'<div class="plot">{svg(key, title, unit, lines, epochs, rows)}<div class="readout" hidden></div></div>'
            f'<details><summary>Numbers</summary>{numbers}</details></figure>')


def entry(index: int, name: str) -> str:
    """Return the legend's entry for the line called `name`."""
    colour, dash = style(index)
    return (f'<li class="line{colour}"><svg viewBox="0 0 30 10" aria-hidden="true"><polyline points="0,5 30,5" {dash}/>'
            f'{marker(index, 15, 5)}</svg>{escaped(name)}</li>')


def titled(metric: str) -> tuple[str, str]:
    """Return the title of a metric's chart, and the label of its y axis."""
    if metric.endswith("_per_s"):
        return f"{metric[:-6]} per second", f"{metric[:-6]}/s"
    title = TITLES.get(metric, metric)
    return title, UNITS.get(metric, title)


def svg(key: int | str, title: str, unit: str, lines: list[Line], epochs: list[float], rows: list[list[str]]) -> str:
    """Return the drawing as SVG. `rows` has the text shown at each epoch: the epoch, then the value of each line."""
    across, x_ticks = over_epochs(epochs[0], epochs[-1])
    up, y_ticks = over_values([y for line in lines for _, y in line.drawn])
    description = ". ".join(f"{line.name or title}: {described(line)}" for line in lines)
    parts = [f'<title id="t{key}">{escaped(title)} per epoch</title><desc id="d{key}">{escaped(description)}</desc>']
    parts += [f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/><text class="y" x="{LEFT - 6}" y="{y + 4}">{label}</text>'
              for y, label in y_ticks]
    parts += [f'<path class="tick" d="M{x} {BOTTOM}v4"/><text class="x" x="{x}" y="{BOTTOM + 17}">{label}</text>'
              for x, label in x_ticks]
    parts += [f'<path class="axis" d="M{LEFT} {TOP}V{BOTTOM}H{RIGHT}"/>',
              f'<text class="name" x="4" y="13">{escaped(cut(unit))}{" (log scale)" if up.log else ""}</text>',
              f'<text class="x" x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 4}">epoch</text>',
              f'<path class="cursor" d="M0 {TOP}V{BOTTOM}" visibility="hidden"/>']
    for index, line in enumerate(lines):
        colour, dash = style(index)
        parts_drawn = [[(across.at(x), up.at(y)) for x, y in part] for part in segments(line.points)]
        drawn = "".join(f'<polyline points="{" ".join(f"{x},{y}" for x, y in part)}" {dash}/>'
                        for part in parts_drawn if len(part) > 1)
        isolated = {part[0] for part in parts_drawn if len(part) == 1}      # no line would show them
        flat = [point for part in parts_drawn for point in part]
        marked = flat[index % 3 if len(flat) > 12 else 0::max(1, len(flat) // 8)]
        drawn += "".join(marker(index, *point) for point in flat if point in isolated or point in marked)
        parts.append(f'<g class="line{colour}">{drawn}</g>')
    names = [line.name or title for line in lines]
    texts = ["\n".join([f"epoch {epoch}", *(f"{name} {text}" for name, text in zip(names, cells, strict=True) if text)])
             for epoch, *cells in rows]
    data = escaped(json.dumps([*zip(map(across.at, epochs), texts, strict=True)], separators=(",", ":")))
    return (f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t{key} d{key}" '
            f'data-at="{data}">{"".join(parts)}</svg>')


def cut(text: str, length: int = 48) -> str:
    """Shorten text to at most `length` characters."""
    return text if len(text) <= length else f"{text[:length - 1]}…"


def style(index: int) -> tuple[int, str]:
    """Return the colour number and the dash attribute of a line; the first 28 lines have different pairs."""
    dash = DASHES[index % len(DASHES)]
    return index % COLOURS, f'stroke-dasharray="{dash}"' if dash else ""


def marker(index: int, x: float, y: float) -> str:
    """Return the marker of line `index` at a point, as SVG."""
    return f'<path class="mark" transform="translate({x} {y})" d="{MARKERS[index % len(MARKERS)]}"/>'


def described(line: Line) -> str:
    """Return the first, last, lowest and highest value of a line, in words."""
    if not (drawn := line.drawn):
        return "no numbers"
    low, high = (choose(drawn, key=lambda point: point[1]) for choose in (min, max))
    points = {"first": drawn[0], "last": drawn[-1], "lowest": low, "highest": high}
    return ", ".join(f"{kind} {shown(y)} in epoch {shown(x)}" for kind, (x, y) in points.items())


def segments(points: list[tuple[float, Any]]) -> Iterator[list[tuple[float, float]]]:
    """Yield the runs of consecutive points between gaps."""
    part: list[tuple[float, float]] = []
    for x, y in [*points, (0, None)]:
        if number(y) and abs(y) < LARGEST:
            part.append((x, y))
        elif part:
            yield part
            part = []


def thinned(points: list[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """Reduce many points to the lowest, the highest and the first gap of each group of neighbours, so peaks remain."""
    size = ceil(len(points) / (MAX_POINTS // 2))
    if size <= 2:
        return points
    thin = []
    for start in range(0, len(points), size):
        group = points[start:start + size]
        numbers = [point for point in group if number(point[1])]
        gaps = [point for point in group if not number(point[1])]
        chosen = [choose(numbers, key=lambda point: point[1]) for choose in (min, max) if numbers] + gaps[:1]
        thin += [point for point in group if any(point is other for other in chosen)]
    return thin if thin[-1] is points[-1] else [*thin, points[-1]]


# Axes


def over_epochs(low: float, high: float) -> tuple[Scale, list[tuple[float, str]]]:
    """Return the scale of the x axis, from the first epoch to the last, and its ticks, which are at whole epochs."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    scale = Scale(low, high, LEFT + 8, RIGHT - 8)
    marks = [tick for tick in ticks(low, high)[0] if low <= tick <= high and abs(tick - round(tick)) < 1e-6]
    return scale, [(scale.at(tick), f"{tick:,.0f}") for tick in marks]


def over_values(values: list[float]) -> tuple[Scale, list[tuple[float, str]]]:
    """Return the scale of the y axis for `values`, and its ticks.

    It is logarithmic if all values are positive and span three powers of ten or more.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and log10(high) - log10(low) >= 3:
        first, last = floor(log10(low)), ceil(log10(high))
        stride = ceil((last - first) / 6)
        powers = range(first, first + stride * ceil((last - first) / stride) + 1, stride)
        scale = Scale(powers[0], powers[-1], BOTTOM, TOP, log=True)
        # Not scale.at(10.0**power), because a float may be too small to hold 10.0**power.
        return scale, [(round(BOTTOM + (power - powers[0]) / (powers[-1] - powers[0]) * (TOP - BOTTOM), 1),
                        f"1e{power}" if abs(power) > 4 else f"{10.0**power:g}") for power in powers]
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = max(abs(low), abs(high)) / 10 or 1.0
        low, high = low - pad, high + pad
    marks, step = ticks(low, high)
    scale = Scale(marks[0], marks[-1], BOTTOM, TOP)
    return scale, [(scale.at(tick), label(tick, step, max(map(abs, marks)))) for tick in marks]


def ticks(low: float, high: float, count: int = 5) -> tuple[list[float], float]:
    """Return about `count` ticks that enclose `low` and `high`, and their distance: 1, 2 or 5 times a power of ten."""
    least = high / count - low / count
    power = 10.0 ** floor(log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)], step


def label(tick: float, step: float, largest: float) -> str:
    """Return the text of a tick, with enough digits to tell it from its neighbours."""
    power = floor(log10(step) + 1e-9)
    if abs(tick) < step / 2:
        return "0"
    if 1e-3 <= largest < 1e6:
        return f"{tick:,.{max(0, -power)}f}"
    digits, _, exponent = f"{tick:.{max(0, floor(log10(abs(tick)) + 1e-9) - power)}e}".partition("e")
    return f"{digits}e{int(exponent)}"
