"""A CSV file with rows of steps that a resumed run continues: no step is in it twice, and none is missing."""
from __future__ import annotations

import csv
import io
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from loopctl.checkpoint.atomic_files import atomic_write, claim_output
from loopctl.errors import UsageError, one_line

log = logging.getLogger("loopctl")


class StepFile:
    """A CSV file whose first column is the step. Rows are appended, and are in the file if the process is killed.

    file: the file
    owner: the name of the plugin, for warnings
    """

    def __init__(self, file: Path, owner: str) -> None:
        self.file, self.owner = file, owner
        self.columns: dict[str, None] = {}
        self.size = 0                           # of what was written completely, in bytes
        self.unwritten: list[dict[str, Any]] = []
        self.warned = False

    def claim(self, resumed: bool, option: str) -> None:
        """Raise UsageError where the file cannot be written, or is not to be overwritten. Call it in `train_start`.

        option: the plugin's option that names the file
        """
        claim_output(self.file, resumed, option)
        if resumed and self.file.exists():
            try:
                self.read()
            except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
                raise UsageError(f"{self.file} is not a log of steps ({one_line(error)}) and is not overwritten; move "
                                 f"it, or choose another {option}") from error

    def begin(self, attempts: int) -> None:
        """Begin after step number `attempts`: rows of later steps, which the run makes again, are removed.

        Call it when it is known from which step the run resumes, such as in the first `epoch_start`.
        """
        try:
            if self.file.exists():
                if kept := [row for row in self.read() if int(row["step"]) <= attempts]:
                    self.write_anew(kept)
                else:
                    self.file.unlink()
        except OSError as error:
            self.warn(error)

    def read(self) -> list[dict[str, str]]:
        """The rows of the file. A last line without its end, which a power cut may leave, is left out."""
        text = self.file.read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text[:text.rfind("\n") + 1])))
        for row in rows:
            int(row["step"])
            if None in row or None in row.values():
                raise ValueError("its lines have different lengths")
        return rows

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows. Where the disk refuses, they are kept and written with the next ones."""
        self.unwritten += rows
        if not self.unwritten:
            return
        columns = dict.fromkeys(key for row in self.unwritten for key in row)
        try:
            if not self.columns:
                self.write_anew(self.unwritten)
            elif columns.keys() <= self.columns.keys():
                with self.file.open("r+b") as file:
                    file.seek(self.size)                    # before a row that a full disk has cut
                    file.write(self.encoded(self.unwritten))
                    self.size = file.tell()
            else:
                self.write_anew([*self.read(), *self.unwritten])
        except OSError as error:
            self.warn(error)
        else:
            self.unwritten, self.warned = [], False

    def write_anew(self, rows: list[Any]) -> None:
        """Replace the file by one with these rows and the columns that they have."""
        self.columns = dict.fromkeys(key for row in rows for key in row)
        with atomic_write(self.file) as temporary:
            temporary.write_bytes(self.encoded([dict(zip(self.columns, self.columns, strict=True)), *rows]))
            self.size = temporary.stat().st_size

    def encoded(self, rows: list[Any]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode("utf-8", "backslashreplace")

    def warn(self, error: OSError) -> None:
        if not self.warned:
            log.warning("%s: %s cannot be written (%s); trying again later", self.owner, self.file,
                        error.strerror or error)
        self.warned = True
