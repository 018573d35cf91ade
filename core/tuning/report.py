"""What `tune` has found: the rows of its table, the table, and which of data and model is the limit."""
from __future__ import annotations

from dataclasses import dataclass, field
from math import isnan, nan
from typing import Any

from loopctl.model.summary import render
from loopctl.tuning.choices import Choice, Composition, described
from loopctl.tuning.trial import Result

DATA_GROUPS = ("data", "prefetch")      # what is chosen with the data as it is read
EVEN = 1.1          # data and model whose speeds differ by less than this factor are called equally fast


@dataclass(eq=False)
class Row:
    """One line of the table: a composition, what its trial showed, and how far its loss strays from the plain run's."""

    composition: Composition
    result: Result
    ratio: float = nan              # how many times as fast as the run as it was given, measured at about the same time
    strays: float = nan
    allowed: bool = True            # whether it may be chosen, by its loss
    with_data: bool = False         # whether it read the data, in place of repeating a few batches

    @property
    def rate(self) -> float:
        return self.result.rate

    @property
    def loader_choice(self) -> Choice | None:
        return next((choice for choice in self.composition if choice.group == "data"), None)


@dataclass
class Tuning:
    """What `tune` has found. Its text, `str(tuning)`, is the table.

    plugins: to add to those of the run, as text
    optimizer: the factory of the optimizer, or the optimizer, with the options that were found
    settings: the arguments of `torch_settings`
    num_workers: the number of loader processes, None where it stays as it is
    """

    plugins: list[str]
    optimizer: Any
    settings: dict[str, Any]
    num_workers: int | None
    chosen: Composition
    rows: list[Row]
    model_rate: float               # samples per second of the model alone, with what was chosen
    data_rate: float                # of the data alone, as it is read then
    gain: float                     # how many times as fast the run is with all of it, its data included
    seeds_differ: float             # how far the loss strays with another seed; 0 where steps draw no random numbers
    left_out: list[Composition] = field(default_factory=list)      # for lack of time

    def __str__(self) -> str:
        return report(self)


def report(found: Tuning) -> str:
    """The table of all trials, what failed and why, and the speeds of model and data."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    table = Table("The model alone", "Samples/s", "Of plain", "Memory", "Loss strays", "", box=SIMPLE, pad_edge=False)
    for column in table.columns[1:5]:
        column.justify, column.no_wrap = "right", True
    parts = [row for row in found.rows if not row.with_data], [row for row in found.rows if row.with_data]
    for rows in parts:
        for row in rows:
            if not isnan(row.rate):
                table.add_row(Text(described(row.composition)), *cells(row), Text(note(row, found)))
        if rows is parts[0] and parts[1]:
            table.add_section()
            table.add_row(Text("With the data as it is read", style="bold"))
    failed = [row for row in found.rows if isnan(row.rate)]
    lines = [f"{described(row.composition)}: {row.result.reason}" for row in failed]
    if found.left_out:
        names = dict.fromkeys(described(composition[-1:]) for composition in found.left_out)
        lines.append(f"not tried, for lack of time: {', '.join(names)}; pass more seconds")
    if found.seeds_differ:
        lines.append(f"its steps draw random numbers: with another seed the loss strays {found.seeds_differ:.1e}, and "
                     "compile draws others")
    return "\n".join([render(table), *lines, limit(found)])


def cells(row: Row) -> list[str]:
    memory, strays = row.result.memory, row.strays
    return [f"{row.rate:,.0f}", f"{row.ratio:.2f}",
            "" if isnan(memory) else f"{memory / 2**30:.2f} GiB", "" if isnan(strays) else f"{strays:.1e}"]


def note(row: Row, found: Tuning) -> str:
    if not row.allowed and row.ratio > 1:
        return "not chosen: the loss strays"
    part = found.chosen if row.with_data else [choice for choice in found.chosen if choice.group not in DATA_GROUPS]
    return "chosen" if row.composition and {*row.composition} == {*part} else ""


def limit(found: Tuning) -> str:
    """Which of data and model is the limit, in a sentence."""
    model, data = found.model_rate, found.data_rate
    if isnan(data):
        return f"model: {model:,.0f} samples/s; the data has too few batches to measure its speed"
    speeds = f"model: {model:,.0f} samples/s; data: {data:,.0f} samples/s"
    if max(model, data) < EVEN * min(model, data):
        return f"{speeds}; they are about equally fast"
    slower, faster = ("data", "model") if data < model else ("model", "data")
    factor = max(model, data) / min(model, data)
    return f"{speeds}; the {slower} is the limit, and the {faster} is {factor:.1f} times as fast"
