"""What differs between runs: what they were asked for, and what came of it. Read from their folders, without torch."""
from __future__ import annotations

import csv
import sys
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopctl.errors import UsageError, one_line
from loopctl.report import charts, html

MARK, NEAR = " *", "\u00a0*"        # after the best of a row; where lines break, in the same line
Row = tuple[str, list[str]]         # what it is about, and a text per run


@dataclass
class Found:
    """One run, as far as its folder tells."""

    name: str
    config: dict[str, Any]                      # empty for a run begun in Python
    history: list[dict[str, float]]             # a dict per epoch; what is no number is not in it
    state: str

    def points(self, metric: str) -> list[tuple[float, float | None]]:
        epochs = [row.get("epoch") for row in self.history]
        return [(epoch if epoch is not None and charts.number(epoch) else index, row.get(metric))
                for index, (epoch, row) in enumerate(zip(epochs, self.history, strict=True), 1)]


def compared(folders: tuple[Path, ...], out: Path | None) -> str:
    """The tables of what differs, as text; with `out` a page with the curves too. Raises UsageError."""
    if len(folders) < 2:
        raise UsageError("compare takes two runs or more; name their folders, such as runs/a runs/b")
    if out and out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: what is written is a page of HTML; use {out}.html")
    runs = [read(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    tables = {"Configuration": configuration(runs), "Result": results(runs)}
    if out:
        write(whole(runs, tables), out)
    return "\n".join([*(text(title, runs, rows) for title, rows in tables.items()), f"{MARK.strip()} the best of them"])


def names(folders: tuple[Path, ...]) -> list[str]:
    """What to call each run: its folder's name, or the path as it was given where names are alike."""
    real = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, real, strict=True):
        if real.count(path) > 1:
            raise UsageError(f"{folder} is given twice; name two runs or more")
    last = [path.name for path in real]
    return [name if last.count(name) == 1 else str(folder) for folder, name in zip(folders, last, strict=True)]


# A run's folder


def read(folder: Path, name: str) -> Found:
    """The run in `folder`. Raises UsageError where there is none, or where it cannot be read."""
    there = False
    with suppress(OSError):                     # of a name that no folder can have
        there = folder.is_dir()
    if not there:
        raise UsageError(f"there is no folder {folder}; name the folders of runs, such as runs/a runs/b")
    config = read_config(folder / "run.toml")
    file = folder / log_path(config)
    history = read_history(file)
    if not config and not file.is_file():
        raise UsageError(f"{folder} is not the folder of a run: it has neither run.toml nor {file.name}")
    finished = (folder / "weights.safetensors").exists()
    return Found(name, config, history, "finished" if finished else "unfinished" if config else "")


def read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
        str(found)                                              # so that whatever is in it can be shown
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {one_line(error)}") from error


def log_path(config: dict[str, Any]) -> str:
    """Where the run's csv plugin writes."""
    specs = config.get("plugin")
    paths = [str(spec)[9:] for spec in (specs if isinstance(specs, list) else []) if str(spec).startswith("csv:path=")]
    return paths[0] if paths else "metrics.csv"


def read_history(file: Path) -> list[dict[str, float]]:
    """The numbers in a log of epochs; of one that is not there, none."""
    history: list[dict[str, float]] = []
    if not file.is_file() and not file.is_dir():
        return history
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                history.append({})
                for key, value in row.items():
                    with suppress(TypeError, ValueError):               # an epoch without this metric, or no number
                        history[-1][str(key)] = float(value)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{file} cannot be read: {one_line(error)}") from error
    return history


# What differs


def configuration(runs: list[Found]) -> list[Row]:
    """What the runs were asked for, where they do not agree."""
    asked = [run.config for run in runs if run.config]
    rows = []
    for key in sorted({key for config in asked for key in config}):
        values = [config.get(key) for config in asked]
        if any(value != values[0] for value in values):
            rows.append((key, [setting(run.config.get(key), values) if run.config else "unknown" for run in runs]))
    return rows


def setting(value: Any, values: list[Any]) -> str:
    """One run's value as text; of a list what not all have, unless it is the order that differs."""
    if not isinstance(value, list):
        return "" if value is None else str(value)
    own = [item for item in value if not all(isinstance(other, list) and item in other for other in values)]
    same = all(isinstance(other, list) and sorted(map(str, other)) == sorted(map(str, value)) for other in values)
    return "\n".join(map(str, value if same else own))


def results(runs: list[Found]) -> list[Row]:
    """How far the runs came, then the last and the best value of each metric."""
    done = [shown(last(run.points("epoch"))) for run in runs]
    rows = [("end", [run.state for run in runs]),
            ("epochs", [f"{epochs or 0} of {run.config['epochs']}" if "epochs" in run.config else epochs
                        for run, epochs in zip(runs, done, strict=True)]),
            ("updates", [shown(last(run.points("step"))) for run in runs])]
    for metric in dict.fromkeys(key for run in runs for row in run.history for key in row):
        if metric in ("epoch", "step"):
            continue
        points = [run.points(metric) for run in runs]
        rows.append((f"{metric} last", marked(metric, [last(one) for one in points])))
        if any(tops := [charts.best(metric, one) for one in points]):
            cells = marked(metric, [top[1] if top else None for top in tops])
            rows.append((f"{metric} best", [f"{cell} in epoch {shown(top[0])}" if top else ""
                                            for cell, top in zip(cells, tops, strict=True)]))
    return [row for row in rows if any(row[1])]


def last(points: list[tuple[float, float | None]]) -> float | None:
    return points[-1][1] if points else None


def shown(value: float | None) -> str:
    return charts.shown(value)


def marked(metric: str, values: list[float | None]) -> list[str]:
    """The values as text, the best ones marked where they are not all alike."""
    top = charts.best(metric, enumerate(values))
    alike = len({value for value in values if charts.number(value)}) < 2
    return [shown(value) + MARK * (top is not None and not alike and value == top[1]) for value in values]


# How it is shown


def text(title: str, runs: list[Found], rows: list[Row]) -> str:
    """A table for the terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return f"{title}: no difference\n"
    found = Table(box=SIMPLE, pad_edge=False)
    for heading in (title, *(run.name for run in runs)):
        found.add_column(Text(heading), overflow="fold")        # where the terminal is narrow, cut nothing off
    for label, cells in rows:
        visible = ["\n".join(map(one_line, cell.split("\n"))) for cell in cells]
        found.add_row(Text(one_line(label)), *(Text(cell, style="bold" if MARK in cell else "") for cell in visible))
    console = Console(width=None if sys.stdout.isatty() else 1000)
    with console.capture() as captured:
        console.print(found)
    return "\n".join(line.rstrip() for line in captured.get().strip().splitlines()) + "\n"


def whole(runs: list[Found], tables: dict[str, list[Row]]) -> str:
    """The page: the same tables, and the curves over each other."""
    parts = []
    for title, rows in tables.items():
        heading, kind = ["", *(run.name for run in runs)], "results" if title == "Result" else "wide"
        table = html.table(heading, [[label, *map(bold, cells)] for label, cells in rows], kind)
        parts.append(html.section(title, table if rows else "<p>No difference.</p>"))
    metrics = dict.fromkeys(key for run in runs for row in run.history for key in row if key not in ("epoch", "step"))
    drawn = []
    for key, metric in enumerate(metrics):
        lines = [charts.Line(run.name, run.points(metric)) for run in runs]
        drawn.append(charts.figure(key, metric, [line for line in lines if line.drawn or len(runs) < 8]))
    parts += [html.section("Curves", f'<div class="charts">{"".join(drawn)}</div>')] * bool(drawn)
    return html.page(f"{len(runs)} runs compared", ", ".join(run.name for run in runs), parts)


def bold(cell: str) -> str:
    if MARK not in cell:
        return html.breaking(cell)
    return html.Markup(f"<b>{html.escaped(cell.replace(MARK, NEAR))}</b>")


def write(content: str, out: Path) -> None:
    """Write the page, over an older one but over nothing else."""
    try:
        if out.exists() and not html.is_report(out):
            raise UsageError(f"--out {out} exists, is no page of loopctl's, and is not overwritten; choose another file")
        html.write(content, out)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}; choose another file") from error
