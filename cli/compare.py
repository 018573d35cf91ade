"""`loopctl compare`: tables and curves of how runs differ, read from their folders without importing torch."""
from __future__ import annotations

import csv
import sys
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopctl.composition.quoting import split, unquote
from loopctl.errors import UsageError, one_line
from loopctl.report import charts, html

MARK, HTML_MARK = " *", "\u00a0*"   # follows the best value of a row; in HTML with a no-break space
Row = tuple[str, list[str]]         # the label of a row, and a cell per run


@dataclass
class RecordedRun:
    """One run, as read from its folder."""

    name: str
    config: dict[str, Any]                      # empty for a run started in Python
    history: list[dict[str, float]]             # a dict per epoch, of the numbers only
    state: str

    def points(self, metric: str) -> list[tuple[float, float | None]]:
        """Pairs (epoch, value) of a metric, one per row of the history."""
        epochs = [row.get("epoch") for row in self.history]
        return [(epoch if epoch is not None and charts.number(epoch) else index, row.get(metric))
                for index, (epoch, row) in enumerate(zip(epochs, self.history, strict=True), 1)]


def compare_runs(folders: tuple[Path, ...], out: Path | None) -> str:
    """Return tables of the differences as text; with `out`, also write an HTML page with curves. Raises UsageError."""
    if len(folders) < 2:
        raise UsageError("compare takes two runs or more; name their folders, such as runs/a runs/b")
    if out and out.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"--out {out}: the comparison is an HTML page; use {out}.html")
    runs = [read_run(folder, name) for folder, name in zip(folders, run_names(folders), strict=True)]
    tables = {"Configuration": configuration(runs), "Result": results(runs)}
    if out:
        write_page(html_page(runs, tables), out)
    texts = [text_table(title, runs, rows) for title, rows in tables.items()]
    return "\n".join([*texts, f"{MARK.strip()} the best of them"])


def run_names(folders: tuple[Path, ...]) -> list[str]:
    """Name each run after its folder; where two folders have the same name, use the paths as given."""
    resolved = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, resolved, strict=True):
        if resolved.count(path) > 1:
            raise UsageError(f"{folder} is given twice; name each run once")
    names = [path.name for path in resolved]
    return [name if names.count(name) == 1 else str(folder) for folder, name in zip(folders, names, strict=True)]


# Reading a run's folder


def read_run(folder: Path, name: str) -> RecordedRun:
    """Read the run in `folder`. Raises UsageError if there is none or it cannot be read."""
    is_folder = False
    with suppress(OSError):                     # raised for a name that is too long
        is_folder = folder.is_dir()
    if not is_folder:
        raise UsageError(f"there is no folder {folder}; name the folders of runs, such as runs/a runs/b")
    config = read_config(folder / "run.toml")
    file = folder / log_path(config)
    history = read_history(file)
    if not config and not file.is_file():
        raise UsageError(f"{folder} is not the folder of a run: it has neither run.toml nor {file.name}")
    finished = (folder / "weights.safetensors").exists()
    return RecordedRun(name, config, history, "finished" if finished else "unfinished" if config else "")


def read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = tomllib.loads(file.read_text(encoding="utf-8"))
        str(config)                                             # raises for a number too long for the table
        return config
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} cannot be read: {one_line(error)}") from error


def log_path(config: dict[str, Any]) -> str:
    """The path, within the run's folder, that its csv plugin writes to."""
    specs = config.get("plugin")
    texts = [str(spec)[4:] for spec in (specs if isinstance(specs, list) else []) if str(spec).startswith("csv:")]
    paths = [option[5:] for text in texts for option in split(text) if option.startswith("path=")]
    try:
        return unquote(paths[0]) if paths else "metrics.csv"
    except ValueError:
        return paths[0]


def read_history(file: Path) -> list[dict[str, float]]:
    """Read the numbers in the csv plugin's file, a dict per epoch; an empty list if there is no file."""
    history: list[dict[str, float]] = []
    if not file.is_file() and not file.is_dir():
        return history
    try:
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                history.append({})
                for key, value in row.items():
                    with suppress(TypeError, ValueError):               # an empty cell, or text
                        history[-1][str(key)] = float(value)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{file} cannot be read: {one_line(error)}") from error
    return history


# The rows of the tables


def configuration(runs: list[RecordedRun]) -> list[Row]:
    """The rows of options on which the runs differ, below one that says which runs have no configuration."""
    configs = [run.config for run in runs if run.config]
    rows = []
    if len(configs) < len(runs):
        rows.append(("run.toml", ["" if run.config else "none, as of a run in Python" for run in runs]))
    for key in sorted({key for config in configs for key in config}):
        values = [config.get(key) for config in configs]
        if any(value != values[0] for value in values):
            rows.append((key, [option_text(run.config.get(key), values) if run.config else "unknown" for run in runs]))
    return rows


def option_text(value: Any, values: list[Any]) -> str:
    """One run's value as text. Of a list, the items that not all runs have, or all items if only the order differs."""
    if not isinstance(value, list):
        return "" if value is None else str(value)
    not_shared = [item for item in value if not all(isinstance(other, list) and item in other for other in values)]
    reordered = all(isinstance(other, list) and sorted(map(str, other)) == sorted(map(str, value)) for other in values)
    return "\n".join(map(str, value if reordered else not_shared))


def results(runs: list[RecordedRun]) -> list[Row]:
    """The rows of results: the epochs and updates made, then the last and the best value of each metric."""
    epochs_done = [format_number(last_value(run.points("epoch"))) for run in runs]
    rows = [("end", [run.state for run in runs]),
            ("epochs", [f"{epochs or 0} of {run.config['epochs']}" if "epochs" in run.config else epochs
                        for run, epochs in zip(runs, epochs_done, strict=True)]),
            ("updates", [format_number(last_value(run.points("step"))) for run in runs])]
    for metric in dict.fromkeys(key for run in runs for row in run.history for key in row):
        if metric in ("epoch", "step"):
            continue
        points = [run.points(metric) for run in runs]
        rows.append((f"{metric} last", mark_best(metric, [last_value(curve) for curve in points])))
        if any(best := [charts.best(metric, curve) for curve in points]):
            cells = mark_best(metric, [point[1] if point else None for point in best])
            rows.append((f"{metric} best", [f"{cell} in epoch {format_number(point[0])}" if point else ""
                                            for cell, point in zip(cells, best, strict=True)]))
    return [row for row in rows if any(row[1])]


def last_value(points: list[tuple[float, float | None]]) -> float | None:
    return points[-1][1] if points else None


def format_number(value: float | None) -> str:
    return charts.shown(value)


def mark_best(metric: str, values: list[float | None]) -> list[str]:
    """The values as text, with a mark after the best ones, unless all are equal."""
    best = charts.best(metric, enumerate(values))
    all_equal = len({value for value in values if charts.number(value)}) < 2
    return [format_number(value) + MARK * (best is not None and not all_equal and value == best[1]) for value in values]


# Output as text and as HTML


def text_table(title: str, runs: list[RecordedRun], rows: list[Row]) -> str:
    """A table as text for the terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return f"{title}: no difference\n"
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in (title, *(run.name for run in runs)):
        table.add_column(Text(heading), overflow="fold")        # in a narrow terminal, break lines; do not cut
    for label, cells in rows:
        printable = ["\n".join(map(one_line, cell.split("\n"))) for cell in cells]
        table.add_row(Text(one_line(label)), *(Text(cell, style="bold" if MARK in cell else "") for cell in printable))
    console = Console(width=None if sys.stdout.isatty() else 1000)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().strip().splitlines()) + "\n"


def html_page(runs: list[RecordedRun], tables: dict[str, list[Row]]) -> str:
    """The HTML page: the tables, and a chart per metric with the curves of all runs."""
    parts = []
    for title, rows in tables.items():
        heading, kind = ["", *(run.name for run in runs)], "results stacked" if title == "Result" else "wide stacked"
        table = html.table(heading, [[label, *map(html_cell, cells)] for label, cells in rows], kind)
        parts.append(html.section(title, table if rows else "<p>No difference.</p>"))
    metrics = dict.fromkeys(key for run in runs for row in run.history for key in row if key not in ("epoch", "step"))
    figures = []
    for key, metric in enumerate(metrics):
        lines = [charts.Line(run.name, run.points(metric)) for run in runs]
        figures.append(charts.figure(key, metric, [line for line in lines if line.drawn or len(runs) < 8]))
    parts += [html.section("Curves", f'<div class="charts">{"".join(figures)}</div>')] * bool(figures)
    return html.page(f"{len(runs)} runs compared", ", ".join(run.name for run in runs), parts)


def html_cell(cell: str) -> str:
    """A cell as HTML, in bold type if it has the mark of the best value."""
    if MARK not in cell:
        return html.breaking(cell)
    return html.Markup(f"<b>{html.escaped(cell.replace(MARK, HTML_MARK))}</b>")


def write_page(content: str, out: Path) -> None:
    """Write the page. Overwrite a page that loopctl wrote, but no other file. Raises UsageError."""
    try:
        if out.exists() and not html.is_report(out):
            raise UsageError(f"--out {out} exists and was not written by loopctl, so it is not overwritten; "
                             "choose another file")
        html.write(content, out)
    except OSError as error:
        raise UsageError(f"--out {out} cannot be written: {error.strerror or error}; choose another file") from error
