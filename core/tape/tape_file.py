"""The file of a tape: a record per line, each with its checksum, so that damage is found and costs one record."""
from __future__ import annotations

import json
import logging
import zlib
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from loopctl.errors import UsageError, one_line

FORMAT = 1
log = logging.getLogger("loopctl")


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


def decoded(line: str) -> dict[str, Any] | None:
    """The record in a line; None where the line is damaged."""
    text, _, checksum = line.rstrip("\n").rpartition("\t")
    if not text or checksum != f"{zlib.crc32(text.encode(errors='replace')):08x}":
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) and isinstance(record.get("kind"), str) else None


def records(file: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the records of a tape in order, and None for each damaged line, such as one that was cut short.

    Raises UsageError where the file is no tape, or of another version.
    """
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            first = decoded(next(lines, ""))
            if first is None or first["kind"] != "tape":
                raise UsageError(f"{file} is no tape; one is written by the plugin tape or by loopctl.tape.record")
            if first.get("format") != FORMAT:
                raise UsageError(f"{file} is a tape of another version of loopctl; record it again")
            yield first
            yield from map(decoded, lines)
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror or one_line(error)}") from error


class TapeWriter:
    """Write records to a tape. What was written completely stays readable, whatever happens later."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.opened: IO[str] | None = None
        self.names: dict[tuple[str, ...], int] = {}         # lists of row names, each written once

    def begin(self, header: dict[str, Any], attempts: int = 0) -> None:
        """Begin a tape, or go on with one after update `attempts`; what follows that is recorded again and removed."""
        kept = [encoded({"kind": "tape", "format": FORMAT} | header)]
        if attempts and self.file.exists():
            kept = []
            for record in records(self.file):
                if record and record.get("update", 0) <= attempts:
                    kept.append(encoded(record))
                    if record["kind"] == "rows":
                        self.names[tuple(record["names"])] = record["id"]
        self.opened = self.file.open("w", encoding="utf-8", newline="")
        self.opened.writelines(kept)
        self.opened.flush()

    def add(self, record: dict[str, Any]) -> None:
        if self.opened:
            self.opened.write(encoded(record))

    def rows(self, names: tuple[str, ...]) -> int:
        """The number by which later records refer to a list of names."""
        if names not in self.names:
            self.names[names] = len(self.names)
            self.add({"kind": "rows", "id": self.names[names], "names": names})
        return self.names[names]

    def flush(self) -> None:
        if self.opened:
            self.opened.flush()

    def close(self) -> None:
        if self.opened:
            self.opened.close()
            self.opened = None
