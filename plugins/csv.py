"""CSV logs: a row of losses and metrics per epoch, and a row of losses and learning rates every so many steps."""
import csv
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.atomic_files import atomic_write, claim_output
from loopctl.checkpoint.step_file import StepFile
from loopctl.metrics.step_values import StepLogger, step_loss
from loopctl.optim.learning_rate import step_rates

log = logging.getLogger("loopctl")


@dataclass(eq=False)
class Csv(StepLogger):
    """Write a row per epoch to a CSV file: losses, metrics and the learning rate.

    Where parameter groups have different learning rates, each has a column: lr_ and the group's name, or its number; lr
    is that of the first group. Other numbers that a schedule moves, such as weight_decay, have columns too.

    With every_steps, the loss and the learning rates of every N-th step, and of the first one, are written to a second
    file. Its step counts updates made and skipped, as the names of checkpoints do; its epoch is a fraction, such as
    2.25. No step waits for the device: a row is written when its values have arrived on the host. A resumed run
    continues the file; rows of steps after its checkpoint, which it makes again, are removed.

    path: CSV file, relative to the run's folder; it must not exist yet
    every_steps: also write the loss and the learning rates of every N-th step
    steps_path: CSV file of the steps, relative to the run's folder; it must not exist yet
    """

    path: str = "metrics.csv"
    every_steps: int | None = None
    steps_path: str = "steps.csv"
    rank_zero_only: ClassVar[bool] = True
    topic = "logging and reports"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every_steps is None:
            for hook in ("train", "epoch_start", "after_step", "after_evaluate", "train_end"):
                setattr(self, hook, None)               # it is not called at these hooks

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.file = run.out / self.path
        claim_output(self.file, resumed=bool(run.resume))
        if self.every_steps is None:
            return
        self.step_file = StepFile(run.out / self.steps_path, "csv")
        self.step_file.claim(bool(run.resume), "steps_path")
        for name, other in run.hook.plugins.items():
            if isinstance(other, Csv) and Path(self.steps_path) in other.files(but=self):
                raise UsageError(f"{name} writes to {self.steps_path} too; choose another steps_path")

    def files(self, but: "Csv") -> list[Path]:
        """The files that it writes to; of `but`, that of the epochs."""
        return [Path(self.path), *([Path(self.steps_path)] if self.every_steps and self is not but else [])]

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

    def begin(self, run: Run) -> None:
        self.step_file.begin(run.attempts)

    def values(self, run: Run) -> dict[str, Any]:
        return {"epoch": run.epochs_done, **step_loss(run), **step_rates(run.optimizer)}

    def write_values(self, run: Run, step: int, values: dict[str, Any]) -> None:
        self.step_file.add([{"step": step, **values}])

    def target(self) -> Path:
        return self.step_file.file
