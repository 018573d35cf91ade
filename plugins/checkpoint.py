"""Checkpoints."""
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Monitor, UsageError, checkpoint, hookimpl


@dataclass(eq=False)
class Checkpoint:
    """Save the best weights, and the whole state of the run, from which it can go on.

    They are best.safetensors and last.pt. A run goes on from the end of the epoch that last.pt holds.

    monitor: the metric that tells which weights are best; val_loss if left out, or train_loss without validation
    mode: whether smaller or larger is better; auto knows losses and errors from accuracies by name
    every_epochs: how often last.pt is written; at the run's end in any case
    dir: the folder, relative to the run's
    """

    monitor: str = ""
    mode: Literal["auto", "min", "max"] = "auto"
    every_epochs: int = 1
    dir: str = "checkpoints"

    def __post_init__(self) -> None:
        if self.every_epochs < 1:
            raise ValueError(f"every_epochs is at least 1, not {self.every_epochs}")
        self.watch = Monitor(self.monitor, self.mode)
        self.due = False

    @hookimpl
    def train_start(self, run):
        self.watch.start(run)
        self.folder = run.out / self.dir
        for name in ("best.safetensors", "last.pt"):
            if (self.folder / name).exists() and not run.resume:
                raise UsageError(f"{self.folder / name} exists and is not overwritten; move it, or say another dir")

    @hookimpl
    def after_evaluate(self, run):
        if self.watch.improved(run):
            checkpoint.save_weights(run.model, self.folder / "best.safetensors")

    @hookimpl
    def epoch_end(self, run):
        self.due = run.over or run.epoch % self.every_epochs == 0

    @hookimpl
    def safe_point(self, run):
        if self.due:
            self.due = False
            checkpoint.save(checkpoint.state(run), self.folder / "last.pt")

    def state_dict(self) -> dict[str, Any]:
        return self.watch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state)
