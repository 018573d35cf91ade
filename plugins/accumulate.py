"""Gradient accumulation over several batches."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

from loopctl import Run, hookimpl
from loopctl.data.micro_batches import grouped
from loopctl.optim.duration import parse_duration


@dataclass(eq=False)
class Accumulate:
    """Accumulate gradients over several batches: the update of one big batch in less memory.

    With a number that grows during the run the batch size is warmed up (arXiv:1711.00489, with more batches per update
    in place of larger ones): 1,4@5ep makes an update of each batch in the first five epochs, then of four.

    every: batches per update; or several numbers, each but the first with the epoch or step that it holds from, such as
        1,4@5ep or 1,2@500st,8@2000st. The batches that remain at the end of an epoch make a smaller update
    """

    every: int | list[int | str] = 4
    topic = "gradients"

    def __post_init__(self) -> None:
        if isinstance(self.every, list) and not self.every:
            raise ValueError("every has no number; write one, such as 4")
        first, *later = self.every if isinstance(self.every, list) else [self.every]
        if "@" in str(first):
            raise ValueError(f"every={self.every}: the first number holds from the start and has no position; write "
                             "1,4@1ep")
        self.first = batches_per_update(first)
        self.later = [parse_change(item) for item in later]         # (number, unit, position)
        for unit in ("epoch", "step"):
            positions = [position for _, kind, position in self.later if kind == unit]
            if positions != sorted(set(positions)):
                raise ValueError(f"every={self.every}: the {unit}s do not increase; write them in order")
        self.grouping_changes = bool(self.later)

    @hookimpl
    def group_batches(self, run: Run, batches: Iterable[Any]) -> Iterator[Sequence[Any]]:
        return grouped(run, batches, partial(self.number, run.epoch))

    @hookimpl
    def train_start(self, run: Run) -> None:
        for number, unit, position in self.later:
            length = run.epochs if unit == "epoch" else run.planned_steps
            if position >= length:
                run.say_once("accumulate", f"accumulate: every={number} from {unit} {position:,} on is never reached, "
                                           f"as the run has {length:,}")

    def number(self, epoch: int, step: int) -> int:
        """How many batches make the update of a step, in an epoch; both count from 0."""
        found = self.first
        for number, unit, position in self.later:
            if (epoch if unit == "epoch" else step) >= position:
                found = number
        return found


def parse_change(text: Any) -> tuple[int, str, int]:
    """The number, the unit and the position of a text such as 4@5ep. Raises ValueError for another text."""
    number, at, where = str(text).partition("@")
    try:
        position, unit = parse_duration(where) if at else (0.0, "")
    except ValueError:
        unit = ""
    if unit not in ("epoch", "step"):
        raise ValueError(f"every has {text!r}; write from which epoch or step on, such as 4@5ep or 4@500st")
    return batches_per_update(number), unit, ceil(position - 1e-9)


def batches_per_update(number: Any) -> int:
    """A number of at least 1, also where it is written as text. Raises ValueError for another value."""
    if isinstance(number, str):
        whole = number.isascii() and number.isdigit()
    else:
        whole = not isinstance(number, bool) and float(number).is_integer()
    if not whole or int(number) < 1:
        raise ValueError(f"every takes a whole number of at least 1, not {number!r}")
    return int(number)
