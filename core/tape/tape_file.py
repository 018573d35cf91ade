"""The file of a tape: a record per line, each with its checksum, so that damage is found and costs one record."""
from __future__ import annotations

import json
import re
import zlib
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import IO, Any

from loopctl.checkpoint.atomic_files import atomic_write
from loopctl.errors import UsageError, one_line

FORMAT = 1
NOTHING: Any = object()
RECORD = re.compile(r"(\{[^\t]*)\t([0-9a-f]{8})")         # its JSON, in which a tab is escaped, and the checksum
COLUMNS = 3                 # of a table of fingerprints: checksum, norm, projection
MISSING = -1.0              # the norm of a tensor that is not there, such as the gradient of a frozen parameter
# What every record of a kind has, besides other values.
FIELDS: dict[str, dict[str, type]] = {
    "tape": {}, "rows": {"id": int, "names": list}, "update": {"update": int, "points": list, "data": str},
    "changed": {"update": int, "by": list}, "evaluation": {"update": int}, "end": {"update": int}}


def packed(numbers: Iterable[int]) -> str:
    """int32 numbers as text."""
    return b64encode(array("i", numbers).tobytes()).decode()


def unpacked(text: str) -> array[int]:
    """The numbers that `packed` made text of."""
    found = array("i")
    found.frombytes(b64decode(text))
    return found


def encoded(record: dict[str, Any]) -> str:
    """A record as a line: JSON, a tab and the checksum of the JSON."""
    text = json.dumps(record, separators=(",", ":"), default=str)
    return f"{text}\t{zlib.crc32(text.encode()):08x}\n"


def records_of(line: str) -> Iterator[dict[str, Any] | None]:
    """Yield the record in a line; of a damaged one None, and what is whole in it, where the end of a line is lost."""
    found = [*RECORD.finditer(line)]
    if len(found) != 1 or found[0].group().rstrip("\n") != line.rstrip("\n"):
        yield None
    for text, checksum in (match.groups() for match in found):
        if (record := decoded(text, checksum)) or len(found) == 1:
            yield record


def decoded(text: str, checksum: str) -> dict[str, Any] | None:
    """A record of its JSON; None where the checksum is not that of the text, or where it is no record."""
    if checksum != f"{zlib.crc32(text.encode(errors='replace')):08x}":
        return None
    try:
        record = json.loads(text)
        fields = FIELDS[record["kind"]]
        return record if all(type(record[name]) is kind for name, kind in fields.items()) else None
    except (ValueError, TypeError, KeyError, RecursionError):       # its checksum is right, so it was made so
        return None


def records(file: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the records of a tape in order, and None for each damaged line, such as one that was cut short.

    Raises UsageError where the file is no tape, or of another version.
    """
    try:
        with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            found = chain.from_iterable(map(records_of, lines))
            damaged = 0                     # lines at the start
            while (first := next(found, NOTHING)) is None:
                damaged += 1
            if first is NOTHING:
                raise UsageError(f"{file} is no tape; one is written by the plugin tape or by loopctl.tape.record")
            if first.get("format", FORMAT) != FORMAT:
                raise UsageError(f"{file} is a tape of another version of loopctl; record it again")
            yield from [None] * damaged
            yield first
            yield from found
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or one_line(error)}") from error


class TapeWriter:
    """Write records to a tape. What was written completely stays readable, whatever happens later."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.opened: IO[str] | None = None
        self.names: dict[tuple[str, ...], int] = {}         # lists of row names, each written twice

    def begin(self, header: dict[str, Any], attempts: int = 0, evaluated: int = -1) -> None:
        """Begin a tape, or go on with one after update `attempts`; what follows that is recorded again and removed.

        evaluated: the update after which the last evaluation was that counts
        """
        kept: list[dict[str, Any]] = [{"kind": "tape", "format": FORMAT} | header]
        if attempts and self.file.exists():
            kept = [record for record in records(self.file) if record and stays(record, attempts, evaluated)]
            for record in kept:
                if record["kind"] == "rows":
                    self.names[tuple(record["names"])] = record["id"]
        with atomic_write(self.file) as temporary:
            temporary.write_text("".join(map(encoded, kept)), encoding="utf-8")
        self.opened = self.file.open("a", encoding="utf-8", newline="")

    def add(self, record: dict[str, Any]) -> None:
        if self.opened:
            self.opened.write(encoded(record))

    def add_update(self, update: int, vector: Iterable[int], points: list[list[Any]], values: dict[str, Any]) -> None:
        """Add the observations of an update."""
        new = [names for _, _, names, _ in points if isinstance(names, tuple) and names not in self.names]
        rows = []
        for names in dict.fromkeys(new):
            self.names[names] = max(self.names.values(), default=-1) + 1
            rows.append({"kind": "rows", "id": self.names[names], "names": names})
        points = [[what, point, self.names[names] if isinstance(names, tuple) else names, columns]
                  for what, point, names, columns in points]
        # The names are there twice, before and after, because without them no update could be read.
        for record in (*rows, {"kind": "update", "update": update, **values, "points": points, "data": packed(vector)},
                       *rows):
            self.add(record)

    def flush(self) -> None:
        if self.opened:
            self.opened.flush()

    def close(self) -> None:
        opened, self.opened = self.opened, None
        if opened:
            opened.close()


def stays(record: dict[str, Any], attempts: int, evaluated: int) -> bool:
    """Whether a record stays in a tape that goes on after update `attempts`."""
    after_evaluation = record["kind"] == "evaluation" or (
        record["kind"] == "changed" and record["by"][:1] in (["after_evaluate"], ["epoch_end"]))
    made_again = record["kind"] == "changed" and record["by"][:1] == ["epoch_start"] and record["update"] == attempts
    last = evaluated if after_evaluation else attempts
    return record["kind"] != "end" and record.get("update", 0) <= last and not made_again
