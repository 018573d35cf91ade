"""The report of benchmarks/gpu.py: what its parts printed, as the tables of docs/performance.md."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from statistics import median
from typing import Any

from watch import Outcome

RATE = "images/s"       # the column whose ratio to the first row is shown


def report(machine: str, outcomes: dict[str, Outcome]) -> str:
    """The whole report: a heading for each part, why it is not complete, and what it found."""
    parts = [machine]
    for name, outcome in outcomes.items():
        found = {"tests": failures, "kill_resume": results}.get(name, tables)(outcome.lines)
        parts += [f"### {name}, {outcome.seconds:.0f} s", *[f"Not complete: {outcome.reason}"] * bool(outcome.reason)]
        parts += [found] * bool(found)
    return "\n\n".join(parts) + "\n"


def results(lines: list[str]) -> str:
    """What kill_resume found for each composition."""
    return "\n".join(f"- {line}" for line in lines if ": equal" in line or ": FAILED" in line)


def failures(lines: list[str]) -> str:
    """The last line of pytest, and the names of the failures, also where it was ended before it listed them."""
    failed = dict[str, str]()
    for line in lines:
        if found := re.search(r"\b(?:FAILED|ERROR) (\S+::.+?)(?: - (.*))?$", line):
            failed[found[1]] = found[2] or failed.get(found[1], "")
    last = next((line.strip("= ") for line in reversed(lines) if line.strip()), "nothing was printed")
    listed = [f"- `{name}`{f': {why}' if why else ''}" for name, why in failed.items()]
    return "\n".join([f"`{last}`", *[""] * bool(listed), *listed])


def tables(lines: Iterable[str]) -> str:
    """The tables of the records among `lines`."""
    titles: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line.startswith('{"table"'):
            record = json.loads(line)
            titles.setdefault(record.pop("table"), []).append(record)
    return "\n\n".join(f"{title}:\n\n{table(records)}" for title, records in titles.items())


def table(records: list[dict[str, Any]]) -> str:
    """The table of records, below their texts. Of several figures for a cell, the median.

    The ratio of a row's images per second to the first row's is the median of the ratios of the rounds.
    """
    head, rows, parts = "", dict[str, dict[str, list[Any]]](), list[str]()
    for record in records:
        if "text" in record:
            parts.append(f"```text\n{record['text'].rstrip()}\n```")
            continue
        (head, row), *cells = record["cells"].items()
        for column, value in cells:
            rows.setdefault(row, {}).setdefault(column, []).append(value)
    if rows:
        columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
        lines = [[head, *columns], ["---"] * (1 + len(columns))]
        lines += [[row, *(shown(cells.get(column, [])) for column in columns)] for row, cells in rows.items()]
        first = next(iter(rows))
        if (base := figures(rows[first].get(RATE, []))) and len(rows) > 1:
            ratios = ([one / other for one, other in zip(figures(cells.get(RATE, [])), base, strict=False)]
                      for cells in rows.values())
            more = [f"of {first}", "---", *(f"{median(each):.2f}" if each else "" for each in ratios)]
            place = 2 + columns.index(RATE)
            lines = [[*line[:place], ratio, *line[place:]] for line, ratio in zip(lines, more, strict=True)]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def figures(values: list[Any]) -> list[float]:
    return [value for value in values if not isinstance(value, str)]


def shown(values: list[Any]) -> str:
    """A cell: the median of its figures, or why there are none."""
    if not (known := figures(values)):
        return str(values[-1]).replace("|", "\\|") if values else ""
    return f"{median(known):,.0f}" if median(known) >= 10 else f"{median(known):.2f}"
