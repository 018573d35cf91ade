"""Line charts over epochs as SVG, and what curves say in numbers. It needs neither torch nor the network."""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10
from typing import Any

from loopctl.metrics.monitor import direction
from loopctl.report.html import escaped, table

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 64, 408, 26, 212         # of the frame that the axes make
MOST = 400                                          # points drawn of one line
LARGEST = 1e300                                     # what is beyond is drawn as a gap

COLOURS, DASHES = 7, ("", "6 3", "2 3", "9 3 2 3")
MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0", "M-2.7-2.7h5.4v5.4h-5.4z", "M0-3.8L3.6 2.8H-3.6z", "M0-4L4 0L0 4L-4 0z",
    "M-3-3L3 3M-3 3L3-3",
)
PARTS = {"train": "train", "val": "valid"}          # whose metrics share a chart
TITLES = {"lr": "learning rate", "grad_norm": "gradient norm", "memory_gb": "memory", "data_wait": "wait for data",
          "mfu": "FLOP utilization"}
UNITS = {"memory_gb": "GiB", "data_wait": "part of the time", "mfu": "part of the peak"}


@dataclass
class Line:
    """One curve. A point without a number is a gap."""

    name: str
    points: list[tuple[float, Any]]

    @property
    def drawn(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if number(y) and abs(y) < LARGEST]


@dataclass
class Scale:
    """Where a value is on paper: `low` is at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        place = log10(value) if self.log else value
        return round(self.start + (place - self.low) / (self.high - self.low) * (self.end - self.start), 1)


# What a history has


def curves(history: list[dict[str, Any]]) -> dict[str, list[Line]]:
    """The lines of each chart that `history`, a dict per epoch, gives; training and validation are in one."""
    found: dict[str, list[Line]] = {}
    for column in dict.fromkeys(key for row in history for key in row):
        values = [row.get(column) for row in history]
        if column in ("epoch", "step") or not any(type(value) in (int, float) for value in values):
            continue
        part, _, rest = column.partition("_")
        name, line = (rest, PARTS[part]) if part in PARTS and rest else (column, "")
        epochs = [row["epoch"] if number(row.get("epoch")) else index for index, row in enumerate(history, 1)]
        found.setdefault(name, []).append(Line(line, [*zip(epochs, values, strict=True)]))
    return found


def number(value: Any) -> bool:
    return type(value) in (int, float) and isfinite(value)


def best(metric: str, points: Iterable[tuple[float, Any]]) -> tuple[float, float] | None:
    """The first of the points with the best value; None where the name does not tell which way is better."""
    better, numbers = direction(metric), [(x, y) for x, y in points if number(y)]
    if not (better and numbers) or metric == "grad_norm":          # which is smaller, not better
        return None
    return (max if better == "max" else min)(numbers, key=lambda point: point[1])


def shown(value: Any) -> str:
    """A value in few characters; nothing for a missing one."""
    if type(value) not in (int, float):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e9 else f"{value:.5g}"


# Charts


def figure(key: int, metric: str, lines: list[Line]) -> str:
    """One chart with its legend and its numbers, as HTML. `key` is its own on the page."""
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
    """A line of the legend."""
    colour, dash = style(index)
    return (f'<li class="line{colour}"><svg viewBox="0 0 30 10" aria-hidden="true"><polyline points="0,5 30,5" {dash}/>'
            f'{marker(index, 15, 5)}</svg>{escaped(name)}</li>')


def titled(metric: str) -> tuple[str, str]:
    """What a chart is called, and the name and unit of what it shows."""
    if metric.endswith("_per_s"):
        return f"{metric[:-6]} per second", f"{metric[:-6]}/s"
    title = TITLES.get(metric, metric)
    return title, UNITS.get(metric, title)


def svg(key: int, title: str, unit: str, lines: list[Line], epochs: list[float], rows: list[list[str]]) -> str:
    """The drawing. `rows` has the text of each of `epochs`: the epoch, then every line's value."""
    across, x_ticks = over_epochs(epochs[0], epochs[-1])
    up, y_ticks = over_values([y for line in lines for _, y in line.drawn])
    said = ". ".join(f"{line.name or title}: {described(line)}" for line in lines)
    parts = [f'<title id="t{key}">{escaped(title)} per epoch</title><desc id="d{key}">{escaped(said)}</desc>']
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
        placed = [[(across.at(x), up.at(y)) for x, y in part] for part in segments(line.points)]
        drawn = "".join(f'<polyline points="{" ".join(f"{x},{y}" for x, y in part)}" {dash}/>'
                        for part in placed if len(part) > 1)
        alone = {part[0] for part in placed if len(part) == 1}
        flat = [point for part in placed for point in part]
        marked = flat[index % 3 if len(flat) > 12 else 0::max(1, len(flat) // 8)]
        drawn += "".join(marker(index, *point) for point in flat if point in alone or point in marked)
        parts.append(f'<g class="line{colour}">{drawn}</g>')
    names = [line.name or title for line in lines]
    texts = ["\n".join([f"epoch {epoch}", *(f"{name} {text}" for name, text in zip(names, cells, strict=True) if text)])
             for epoch, *cells in rows]
    data = escaped(json.dumps([*zip(map(across.at, epochs), texts, strict=True)], separators=(",", ":")))
    return (f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t{key} d{key}" '
            f'data-at="{data}">{"".join(parts)}</svg>')


def cut(text: str, most: int = 48) -> str:
    return text if len(text) <= most else f"{text[:most - 1]}…"


def style(index: int) -> tuple[int, str]:
    """The colour and the dashes of a line: no two of the first 28 have both."""
    dash = DASHES[index % len(DASHES)]
    return index % COLOURS, f'stroke-dasharray="{dash}"' if dash else ""


def marker(index: int, x: float, y: float) -> str:
    return f'<path class="mark" transform="translate({x} {y})" d="{MARKERS[index % len(MARKERS)]}"/>'


def described(line: Line) -> str:
    """A curve in words."""
    if not (drawn := line.drawn):
        return "no numbers"
    low, high = (choose(drawn, key=lambda point: point[1]) for choose in (min, max))
    places = {"first": drawn[0], "last": drawn[-1], "lowest": low, "highest": high}
    return ", ".join(f"{what} {shown(y)} in epoch {shown(x)}" for what, (x, y) in places.items())


def segments(points: list[tuple[float, Any]]) -> Iterator[list[tuple[float, float]]]:
    """The stretches of points between gaps."""
    part: list[tuple[float, float]] = []
    for x, y in [*points, (0, None)]:
        if number(y) and abs(y) < LARGEST:
            part.append((x, y))
        elif part:
            yield part
            part = []


def thinned(points: list[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """Of many points the lowest and the highest of every few, and the first gap; so no peak is lost."""
    size = ceil(len(points) / (MOST // 2))
    if size <= 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        few = points[start:start + size]
        numbers = [point for point in few if number(point[1])]
        gaps = [point for point in few if not number(point[1])]
        chosen = [choose(numbers, key=lambda point: point[1]) for choose in (min, max) if numbers] + gaps[:1]
        kept += [point for point in few if any(point is one for one in chosen)]
    return kept if kept[-1] is points[-1] else [*kept, points[-1]]


# Axes


def over_epochs(low: float, high: float) -> tuple[Scale, list[tuple[float, str]]]:
    """The scale from the first epoch to the last, and its ticks, at whole epochs."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    scale = Scale(low, high, LEFT + 8, RIGHT - 8)
    marks = [tick for tick in ticks(low, high)[0] if low <= tick <= high and abs(tick - round(tick)) < 1e-6]
    return scale, [(scale.at(tick), f"{tick:,.0f}") for tick in marks]


def over_values(values: list[float]) -> tuple[Scale, list[tuple[float, str]]]:
    """The scale that holds `values`, and its ticks. Positive ones over three powers of ten or more: logarithmic."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and log10(high) - log10(low) >= 3:
        least, most = floor(log10(low)), ceil(log10(high))
        every = ceil((most - least) / 6)
        powers = range(least, least + every * ceil((most - least) / every) + 1, every)
        scale = Scale(powers[0], powers[-1], BOTTOM, TOP, log=True)
        # In place of 10.0**power, which may be too small for a number.
        return scale, [(round(BOTTOM + (power - powers[0]) / (powers[-1] - powers[0]) * (TOP - BOTTOM), 1),
                        f"1e{power}" if abs(power) > 4 else f"{10.0**power:g}") for power in powers]
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = max(abs(low), abs(high)) / 10 or 1.0
        low, high = low - pad, high + pad
    marks, step = ticks(low, high)
    scale = Scale(marks[0], marks[-1], BOTTOM, TOP)
    return scale, [(scale.at(tick), label(tick, step, max(map(abs, marks)))) for tick in marks]


def ticks(low: float, high: float, most: int = 5) -> tuple[list[float], float]:
    """Multiples of 1, 2 or 5 times a power of ten, about `most` of them, the outer ones around `low` and `high`."""
    least = high / most - low / most
    power = 10.0 ** floor(log10(least))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= least * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)], step


def label(tick: float, step: float, largest: float) -> str:
    """A tick's number, with as many digits as tell it from the next."""
    power = floor(log10(step) + 1e-9)
    if abs(tick) < step / 2:
        return "0"
    if 1e-3 <= largest < 1e6:
        return f"{tick:,.{max(0, -power)}f}"
    digits, _, exponent = f"{tick:.{max(0, floor(log10(abs(tick)) + 1e-9) - power)}e}".partition("e")
    return f"{digits}e{int(exponent)}"
