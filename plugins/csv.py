"""CSV log: a row of losses and metrics per epoch."""
import csv
import logging
from dataclasses import dataclass
from typing import ClassVar

from loopctl import Run, hookimpl
from loopctl.checkpoint.atomic_files import atomic_write, claim_output

log = logging.getLogger("loopctl")


@dataclass(eq=False)
class Csv:
    """Write a row per epoch to a CSV file: losses, metrics and the learning rate.

    Where parameter groups have different learning rates, each has a column: lr_ and the group's name, or its number; lr
    is that of the first group. Other numbers that a schedule moves, such as weight_decay, have columns too.

    path: CSV file, relative to the run's folder; it must not exist yet
    """

    path: str = "metrics.csv"
    rank_zero_only: ClassVar[bool] = True
    topic = "logging and reports"

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.file = run.out / self.path
        claim_output(self.file, resumed=bool(run.resume))

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        # Write the whole history each time: the file is complete even if the run is killed, and a metric that first
        # appears in a later epoch gets a column.
        columns = dict.fromkeys(key for row in run.history for key in row)
        try:
            with atomic_write(self.file) as temporary, temporary.open(
                    "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(run.history)
        except OSError as error:
            log.warning("csv: %s cannot be written (%s); trying again after the next epoch", self.file, error.strerror)
