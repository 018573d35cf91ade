"""Logs for TensorBoard."""
import re
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.atomic_files import claim_output
from loopctl.checkpoint.state import run_config
from loopctl.metrics.histograms import bin_edges, histogram
from loopctl.metrics.step_values import StepLogger, StepValues, step_loss
from loopctl.model.ownership import named_parameters
from loopctl.optim.learning_rate import group_names


@dataclass(eq=False)
class Tensorboard(StepLogger):
    """Write metrics, learning rates and the configuration for TensorBoard.

    It is torch.utils.tensorboard; `tensorboard --logdir runs` shows it. All metrics are written at every evaluation;
    train_loss and val_loss share one chart, loss, with a line for training and one for validation. The loss of a step
    and the learning rate of each parameter group are written every so many steps, the configuration when the run starts
    or is resumed, the hyperparameters with the final metrics at the end. The horizontal axis counts updates made and
    skipped, as the names of checkpoints do. No step waits for the device: on CUDA a loss is written when it has arrived
    on the host, on other devices at the next evaluation.

    A resumed run writes to the same folder, and what was written after its checkpoint is removed.

    dir: the folder, relative to the run's
    every_steps: how often to write the loss and the learning rates of a step
    histogram_steps: how often to write histograms of each weight after the step, and of its gradient before other
        plugins change it; never if left out
    """

    dir: str = "tensorboard"
    every_steps: int = 50
    histogram_steps: int | None = None
    rank_zero_only: ClassVar[bool] = True
    observer_only: ClassVar[bool] = True
    topic = "logging and reports"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.histogram_steps is None:
            self.grads_ready = None         # type: ignore[assignment, method-assign]
        elif self.histogram_steps < 1:
            raise ValueError(f"histogram_steps is at least 1, not {self.histogram_steps}")
        self.writers: dict[str, Any] = {}                           # by folder: train, valid, and . for all else

    @hookimpl
    def train_start(self, run: Run) -> None:
        try:
            with warnings.catch_warnings(action="ignore"):          # of the packages that it imports
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError("tensorboard is not installed; install it with: "
                             "pip install 'loopctl[tensorboard]'") from None
        self.writer, self.folder = SummaryWriter, run.out / self.dir
        claim_output(self.folder, bool(run.resume), "dir", lambda: [self.folder] if any(
            self.folder.rglob("events.out.tfevents.*")) else [])
        for name, other in run.hook.plugins.items():
            if other is not self and isinstance(other, Tensorboard) and other.dir == self.dir:
                raise UsageError(f"{name} writes to dir={self.dir} too; choose another dir in one of them")

    def begin(self, run: Run) -> None:
        self.histograms = StepValues(self.histogram_steps or 1)
        self.gradients: dict[str, Tensor] = {}          # histograms of this step's
        # What the last step wrote stays. What an evaluation after it wrote stays only if the checkpoint was saved after
        # that evaluation, else it is evaluated again. So the two are in different folders.
        first = run.attempts + (run.counters.evaluated == run.attempts)
        for name, purge in {"train": first, "valid": first, ".": run.attempts + 1}.items():
            if name != "valid" or run.valid is not None:
                folder = self.folder / name
                self.writers[name] = self.writer(str(folder), purge_step=purge if run.resume else None)
        config = run.config or run_config(run)
        rows = "".join(f"| {key} | {str(value).replace('|', '&#124;')} |\n" for key, value in config.items())
        acting = "".join(f"    {hook:16}{', '.join(who)}\n" for hook, who in run.hook.acting.items() if who)
        self.writers["."].add_text("configuration", f"| option | value |\n|---|---|\n{rows}", run.attempts)
        self.writers["."].add_text("composition", acting or "no plugin", run.attempts)

    @hookimpl(wrapper=True)
    def grads_ready(self, run: Run) -> Generator[None, None, None]:
        if self.histogram_due(run.attempts + 1):
            self.gradients |= {f"gradients/{name}": histogram(parameter.grad)
                               for name, parameter in named_parameters(run).items() if parameter.grad is not None}
        yield

    @hookimpl
    def after_step(self, run: Run) -> None:
        if self.histogram_due(run.attempts):
            weights = {f"weights/{name}": histogram(parameter) for name, parameter in named_parameters(run).items()}
            self.histograms.send(run.attempts, weights | self.gradients)
            self.gradients = {}
        super().after_step(run)

    def histogram_due(self, attempts: int) -> bool:
        return self.histogram_steps is not None and self.histograms.due(attempts)

    def write_arrived(self, run: Run, wait: bool = False) -> None:
        super().write_arrived(run, wait)
        for step, found in self.histograms.arrived(wait) if self.histogram_steps else ():
            self.attempt(self.write_histograms, step, found)

    def write_histograms(self, step: int, found: dict[str, Any]) -> None:
        for tag, (low, high, total, squares, *counts) in found.items():
            if low <= high:                 # some value is finite
                self.writers["."].add_histogram_raw(
                    tag, low, high, sum(counts), total, squares, bin_edges(low, high), counts, step)

    def values(self, run: Run) -> dict[str, Any]:
        groups = run.optimizer.param_groups
        rates = {tag: group["lr"] for tag, group in zip(rate_tags(run.optimizer), groups, strict=True)}
        return rates | step_loss(run, "step_loss")

    def write_values(self, run: Run, step: int, values: Mapping[str, Any]) -> None:
        for tag, value in values.items():
            self.write(".", tag, value, step)

    def log_values(self, run: Run, step: int, values: Mapping[str, float]) -> None:
        """Write values that another plugin has measured in a step."""
        if self.writers:
            tags = {re.sub(r"[^\w./-]", "_", name): value for name, value in values.items()}
            self.attempt(self.write_values, run, step, tags)

    @hookimpl
    def train_end(self, run: Run) -> None:
        super().train_end(run)
        self.attempt(self.write_hyperparameters, run)

    def write(self, where: str, tag: str, value: float, step: int) -> None:
        self.writers[where].add_scalar(tag, value, step)

    def write_metrics(self, run: Run) -> None:
        for name, value in run.metrics.items():
            if isinstance(value, int | float):
                kind, _, rest = name.partition("_")
                where = "valid" if kind == "val" and "valid" in self.writers else "train"
                self.write(where, rest if rest and kind in ("train", "val") else name, value, run.attempts)
        self.flush()

    def write_hyperparameters(self, run: Run) -> None:
        from torch.utils.tensorboard.summary import hparams

        config = run.config or run_config(run)
        optimizer = {"optimizer": type(run.optimizer).__name__, "lr": run.optimizer.param_groups[0]["initial_lr"]}
        values = {key: value if isinstance(value, int | float) else ", ".join(value) if isinstance(value, list)
                else str(value) for key, value in (optimizer | config).items() if value is not None}
        final = {f"final/{name}": value for name, value in run.metrics.items() if isinstance(value, int | float)}
        # add_hparams would write them to a file of its own, whose name depends on the time.
        for summary in hparams(values, final):
            self.writers["."].file_writer.add_summary(summary)
        for name, value in final.items():
            self.writers["."].add_scalar(name, value, run.attempts)

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()

    def end(self, run: Run, error: BaseException | None) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers = {}

    def target(self) -> Path:
        return self.folder


def rate_tags(optimizer: torch.optim.Optimizer) -> list[str]:
    """The tags of the learning rates: with the names of the groups in letters that TensorBoard takes, or numbers."""
    if len(optimizer.param_groups) == 1:
        return ["lr"]
    labels = [re.sub(r"[^\w.-]", "_", name) for name in group_names(optimizer)]
    unique = labels if len(set(labels)) == len(labels) else range(len(labels))
    return [f"lr/group_{label}" for label in unique]
