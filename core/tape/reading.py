"""Read a tape: its updates, each with the tables of fingerprints that were taken of it."""
from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from struct import unpack
from typing import Any

from loopctl.tape.tape_file import COLUMNS, MISSING, records, unpacked


@dataclass(frozen=True, eq=False)
class Table:
    """The fingerprints of some tensors, a row each. Two are equal if the tensors have the same bits.

    So the norms and projections, which may be NaN, and whose rounding depends on the number of threads, do not count.
    """

    names: tuple[str, ...]
    checksums: tuple[int, ...]
    norms: tuple[float, ...]            # -1 where there was no tensor
    projections: tuple[float, ...]

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, Table) and self.names == other.names and self.checksums == other.checksums
                and self.missing == other.missing)

    def __hash__(self) -> int:
        return hash((self.names, self.checksums))

    @property
    def norm(self) -> float:
        """The norm of all rows together."""
        return sum(norm * norm for norm in self.norms if norm != MISSING) ** 0.5

    @property
    def missing(self) -> frozenset[int]:
        """The rows without a tensor."""
        return frozenset(index for index, norm in enumerate(self.norms) if norm == MISSING)


@dataclass
class Update:
    """What was recorded of one update."""

    number: int                         # counts updates made and skipped, from 1 on
    values: dict[str, Any]
    names: dict[int, tuple[str, ...]] = field(repr=False)
    epoch: int | None = None
    skipped: bool = False

    @cached_property
    def observed(self) -> dict[tuple[str, str], Any]:
        """By what and point, in order: a Table, a column of int32 numbers, or a number."""
        numbers, start, found = unpacked(self.values["data"]), 0, {}      # type: array[int], int, dict[Any, Any]
        for what, point, rows, columns in self.values["points"]:
            if columns == 0:
                found[what, point] = rows
                continue
            names = self.names[rows] if columns == COLUMNS else ()
            size = len(names) * COLUMNS if columns == COLUMNS else rows
            part, start = numbers[start:start + size], start + size
            if columns == COLUMNS:
                found[what, point] = Table(names, tuple(part[::3]), floats(part[1::3]), floats(part[2::3]))
            else:
                found[what, point] = floats(part)[0] if what in SCALARS else tuple(part)
        return found

    @property
    def readable(self) -> bool:
        """Whether points and data belong together, and the names of all rows are known."""
        try:
            size = 0
            for what, point, rows, columns in self.values["points"]:
                if not isinstance(what, str) or not isinstance(point, str) or (columns == 0) == isinstance(rows, int):
                    return False
                size += len(self.names[rows]) * COLUMNS if columns == COLUMNS else rows if columns == 1 else 0
            return len(unpacked(self.values["data"])) == size
        except (ValueError, TypeError, KeyError):
            return False

    def table(self, what: str, point: str) -> Table | None:
        return self.observed.get((what, point))

    def points(self, what: str) -> list[str]:
        """The points at which something was observed, in order."""
        return [point for name, point in self.observed if name == what]

    def number_of(self, what: str, point: str = "") -> float | None:
        return self.observed.get((what, point))


SCALARS = ("loss", "samples weight", "backward", "loss of a batch", "numbers")      # columns of one float32


def floats(numbers: array[int]) -> tuple[float, ...]:
    """The float32 numbers whose bits these are."""
    return unpack(f"{len(numbers)}f", numbers.tobytes())


@dataclass
class TapeContent:
    """A tape that was read."""

    file: Path
    header: dict[str, Any]
    updates: dict[int, Update]
    evaluations: list[dict[str, Any]]
    end: dict[str, Any] | None          # None where it was cut off
    damaged: int                        # records that could not be read

    def __iter__(self) -> Iterator[Update]:
        return iter(self.updates.values())


def read_tape(file: Path) -> TapeContent:
    """Read a tape. Of an update that is there twice, after a resume, the later one counts.

    Raises UsageError where the file is no tape.
    """
    header: dict[str, Any] = {}
    names: dict[int, tuple[str, ...]] = {}
    changes: list[dict[str, Any]] = []
    tape = TapeContent(file, header, {}, [], None, 0)
    for record in records(file):
        if record is None:
            tape.damaged += 1
        elif record["kind"] == "tape":
            header |= record
        elif record["kind"] == "rows":
            names[record["id"]] = tuple(record["names"])
        elif record["kind"] == "update":
            tape.updates[record["update"]] = Update(record["update"], record, names, record.get("epoch"),
                                                    bool(record.get("skipped")))
        elif record["kind"] == "changed":
            changes.append(record)
        elif record["kind"] == "evaluation":
            tape.evaluations.append(record)
        elif record["kind"] == "end":
            tape.end = record
    for number, update in [*tape.updates.items()]:
        if not update.readable:
            del tape.updates[number]
            tape.damaged += 1
    for record in reversed(changes):        # what was changed between two updates is what the next one starts from
        following = next((update for update in tape if update.number > record["update"]), None)
        if following and not starts_unchanged(following, tape.updates.get(record["update"])):
            following.values["changed_by"] = [record["by"], *following.values.get("changed_by", ())]
    return tape


def starts_unchanged(update: Update, before: Update | None) -> bool:
    """Whether an update starts from the weights that the one before it has made, so that none were changed between."""
    return (before is not None and update.number == before.number + 1
            and update.table("weights", "start") == before.table("weights", "end") is not None)
