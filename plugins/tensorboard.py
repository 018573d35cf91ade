"""What TensorBoard shows."""
import logging
import warnings
from collections import deque
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.atomic_files import claim_output
from loopctl.checkpoint.state import run_config
from loopctl.metrics.host_copy import HostCopy

log = logging.getLogger("loopctl")


@dataclass(eq=False)
class Tensorboard:
    """Write metrics, learning rates and the configuration for TensorBoard.

    It is torch.utils.tensorboard; `tensorboard --logdir runs` shows it. At every evaluation all metrics; train_loss and
    val_loss are one chart, loss, with a line of training and one of validation, for each is written to a folder of its
    own. Every so many steps that step's loss, and the learning rate of each parameter group. Where the run begins or
    goes on the configuration, as text; at the end the hyperparameters with the final metrics. The axis is the number of
    updates planned so far, as in the names of checkpoints. No step waits for the device: on CUDA a loss is written when
    it has arrived, on others than that and the CPU at the next evaluation.

    A run that goes on writes on in the same folder, and what was written after its checkpoint is taken back.

    dir: the folder, relative to the run's
    every_steps: how often to write the loss and the learning rates of a step
    """

    dir: str = "tensorboard"
    every_steps: int = 50
    rank_zero_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.every_steps < 1:
            raise ValueError(f"every_steps is at least 1, not {self.every_steps}")
        self.writers: dict[str, Any] = {}                           # by folder: train, valid, and . for all else
        self.coming: deque[tuple[int, str, HostCopy]] = deque()     # values that may not have arrived yet
        self.saved: Any = None
        self.refused = False                                        # by the disk: the run is worth more than its charts

    @hookimpl(wrapper=True)
    def train(self) -> Generator[None, None, None]:
        with ExitStack() as self.closing:           # ends here, also after an exception
            return (yield)

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

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if not self.writers and not self.refused:   # only now is it known where the run goes on
            self.saved = run.last_checkpoint
            self.attempt(self.open, run)

    def open(self, run: Run) -> None:
        # What the last step wrote stays. What an evaluation after it wrote stays where the checkpoint knows of it, or
        # else it is done again. Hence they are in different folders.
        first = run.attempts + (run.counters.evaluated == run.attempts)
        for name, purge in {"train": first, "valid": first, ".": run.attempts + 1}.items():
            if name != "valid" or run.valid is not None:
                folder = self.folder / name
                self.writers[name] = self.writer(str(folder), purge_step=purge if run.resume else None)
        self.closing.callback(self.attempt, self.close)
        config = run.config or run_config(run)
        rows = "".join(f"| {key} | {str(value).replace('|', '&#124;')} |\n" for key, value in config.items())
        acting = "".join(f"    {hook:16}{', '.join(who)}\n" for hook, who in run.hook.acting.items() if who)
        self.writers["."].add_text("configuration", f"| option | value |\n|---|---|\n{rows}", run.attempts)
        self.writers["."].add_text("composition", acting or "no plugin", run.attempts)

    @hookimpl
    def after_step(self, run: Run) -> None:
        if run.attempts % self.every_steps == 0 or run.attempts == 1:
            groups = run.optimizer.param_groups
            for number, group in enumerate(groups):
                self.send(run, f"lr/group_{number}" if len(groups) > 1 else "lr", group["lr"])
            if run.loss is not None:
                self.send(run, "step_loss", run.loss)
            self.write_arrived()
        if run.last_checkpoint is not self.saved:             # what a checkpoint counts as done is in the file
            self.saved = run.last_checkpoint
            self.attempt(self.flush)

    @hookimpl
    def after_evaluate(self, run: Run) -> None:
        self.write_arrived(wait=True)
        self.attempt(self.write_metrics, run)

    @hookimpl
    def train_end(self, run: Run) -> None:
        self.attempt(self.write_hyperparameters, run)

    def send(self, run: Run, tag: str, value: Any) -> None:
        """Write a value of the step once it is on the host."""
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value), dtype=torch.float64)
        self.coming.append((run.attempts, tag, HostCopy(value)))

    def write_arrived(self, wait: bool = False) -> None:
        while self.coming and (wait or self.coming[0][2].arrived):
            step, tag, copy = self.coming.popleft()
            self.attempt(self.write, ".", tag, float(copy.wait()), step)

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
        told = {key: value if isinstance(value, int | float) else ", ".join(value) if isinstance(value, list)
                else str(value) for key, value in (optimizer | config).items() if value is not None}
        final = {f"final/{name}": value for name, value in run.metrics.items() if isinstance(value, int | float)}
        # add_hparams would write them into a file of its own, whose place among the others depends on the second.
        for summary in hparams(told, final):
            self.writers["."].file_writer.add_summary(summary)
        for name, value in final.items():
            self.writers["."].add_scalar(name, value, run.attempts)

    def attempt(self, write: Callable[..., None], *arguments: Any) -> None:
        """Write, unless the disk has refused; then a line says so, and the run goes on."""
        if self.refused:
            return
        try:
            write(*arguments)
        except OSError as error:
            self.refused = True
            log.warning("tensorboard: %s cannot be written (%s); nothing more is", self.folder, error.strerror or error)

    def flush(self) -> None:
        for writer in self.writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()
        self.writers = {}
