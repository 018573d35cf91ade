"""A log of epochs as comma-separated values."""
import csv
import os
from dataclasses import dataclass
from pathlib import Path

from loopctl import UsageError, hookimpl


@dataclass(eq=False)
class Csv:
    """Write a row per epoch: losses, metrics, the learning rate, what plugins measured.

    path: the file, relative to the run's folder; it must not exist yet
    """

    path: str = "metrics.csv"

    @hookimpl
    def train_start(self, run):
        self.file = run.out / self.path
        if self.file.exists() and not run.resume:
            raise UsageError(f"{self.file} exists and is not overwritten; move it, or say another path")

    @hookimpl
    def epoch_end(self, run):
        # The whole history each time: complete whenever the run is killed, and with every column any epoch has.
        columns = dict.fromkeys(key for row in run.history for key in row)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(f"{self.file}.new")
        with aside.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(run.history)
        os.replace(aside, self.file)
