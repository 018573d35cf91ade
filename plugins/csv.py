"""A log of epochs as comma-separated values."""
import csv
import logging
from dataclasses import dataclass
from typing import ClassVar

from loopctl import Run, hookimpl
from loopctl.checkpoint.atomic_files import atomic_write, claim_output

log = logging.getLogger("loopctl")


@dataclass(eq=False)
class Csv:
    """Write a row per epoch: losses, metrics, the learning rate, what plugins measured.

    path: the file, relative to the run's folder; it must not exist yet
    """

    path: str = "metrics.csv"
    rank_zero_only: ClassVar[bool] = True

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.file = run.out / self.path
        claim_output(self.file, resumed=bool(run.resume))

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        # The whole history each time: complete whenever the run is killed, and with every column any epoch has.
        columns = dict.fromkeys(key for row in run.history for key in row)
        try:
            with atomic_write(self.file) as aside, aside.open("w", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(run.history)
        except OSError as error:
            log.warning("csv: %s cannot be written (%s); the next epoch tries again", self.file, error.strerror)
