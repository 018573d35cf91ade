"""Checkpoints: save the state of the run, to resume it later, and keep the best weights."""
import csv
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from os.path import realpath
from pathlib import Path
from typing import Any, Literal

from loopctl import Monitor, Run, UsageError, hookimpl
from loopctl.checkpoint.atomic_files import (
    DamagedCheckpoint,
    Weights,
    atomic_write,
    claim_output,
    read_checkpoint,
    save_checkpoint,
    save_weights,
)
from loopctl.checkpoint.finding import checkpoints_in, resume_candidates, resumes_own_folder, step_number
from loopctl.checkpoint.folder_lock import CHECKPOINTS, FolderLock
from loopctl.checkpoint.sharded_tensors import extract_sharded, save_sharded, sharded_files
from loopctl.checkpoint.state import capture_state, check_serializable, plain_content
from loopctl.distributed.process_group import (
    StopConsensus,
    all_gather,
    broadcast_from_rank0,
    is_peer_failure,
    launched_processes,
)
from loopctl.report.terminal import counted

log = logging.getLogger("loopctl")


@dataclass(eq=False)
class Checkpoint:
    """Save checkpoints, from which the run resumes exactly, and the best weights.

    A checkpoint is a file step-00000123.pt, numbered by steps, skipped ones included. The last one is written when the
    run ends, or leaves at a safe point: with `max_time`, after Ctrl-C, or after SIGTERM or SIGUSR1, which batch systems
    send. best.safetensors holds the best weights so far, best.pt the whole state at the next safe point. If a
    checkpoint cannot be written, the run continues: a warning is logged, and the previous checkpoint is kept. The
    folder is locked while the run trains.

    every_epochs: save at the end of every N-th epoch
    every_steps: also save every N steps
    every_minutes: also save when N minutes have passed since the last checkpoint
    monitor: metric that decides which weights are best; the run's monitor if left out, by default val_loss
    mode: whether smaller (min) or larger (max) is better; auto decides by the name of the metric
    keep: number of checkpoints to keep besides the best; with two, one is left if the last is damaged
    dir: folder of the checkpoints, relative to the run's folder
    """

    every_epochs: int = 1
    every_steps: int | None = None
    every_minutes: float | None = None
    monitor: str = ""
    mode: Literal["auto", "min", "max"] = "auto"
    keep: int = 2
    dir: str = "checkpoints"
    topic = "checkpoints and stopping"

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_steps", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"every_minutes is above 0, not {self.every_minutes}")

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        self.watch = Monitor(self.monitor, self.mode)
        self.epoch_ended = False
        self.best = False                       # the weights are the best so far, and best.pt is not yet written
        self.checked = False                    # the first epoch has begun, and the state was found serializable
        self.optimizer_checked = False
        self.signal = 0                         # the number of the signal received, if any
        self.overdue_consensus = StopConsensus()
        self.kept: list[Path] = []              # the checkpoints to keep, latest first
        self.best_sharded: str | None = None    # the folder with the sharded tensors of best.pt, if it has any
        self.pending: tuple[Path, Callable[[], bool]] | None = None     # being written: its file; wait for the result
        self.folder = run.out / self.dir
        self.lock = FolderLock(self.folder, CHECKPOINTS)
        self.made: list[Path] = []              # the folders made to hold the lock, innermost first
        run.checkpoint_folders.append(self.folder)
        on_signal = partial(self.on_signal, run)
        previous_handlers = {number: signal.signal(number, on_signal) for number in unhandled_signals()}
        try:
            result = yield
            self.wait_for_pending(run)
            return result
        except BaseException as error:
            if self.pending:            # the other processes take part in writing it: finish before leaving the group
                with suppress(Exception):
                    self.pending[1]()
            # torchrun has sent the signal because another process failed, and that process reports the error.
            if self.signal and is_peer_failure(error):
                raise end_by(self.signal) from None
            raise
        finally:
            self.lock.__exit__()
            for folder in self.made if not run.attempts else ():        # the run was refused: it leaves nothing behind
                with suppress(OSError):
                    folder.rmdir()
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)

    def on_signal(self, run: Run, number: int, frame: Any) -> None:
        """Make the run save and exit at the next safe point. A second signal ends it at once, except in a process group
        started by torchrun, which forwards signals that its processes may have received already. Ctrl-C ends it at once
        too where training has not begun."""
        nothing_to_save = number == signal.SIGINT and not self.checked
        if nothing_to_save or (self.signal and launched_processes() == 1):
            raise end_by(number)
        self.signal = number
        run.leave = signal.Signals(number).name

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.watch.start(run)
        self.last_time = time.monotonic()
        if run.rank == 0:
            self.check_folder(run)

    def check_folder(self, run: Run) -> None:
        """Raise UsageError for a folder that cannot be written to, or that holds files of another run."""
        def files_of_others() -> list[Path]:
            self.found = checkpoints_in(self.folder)
            # A resumed run without a checkpoint here was killed before its first one.
            own = realpath(self.found[0]) in map(realpath, candidates) if self.found else resumes_own_folder(run)
            return [] if own else [*self.found, *self.folder.glob("best.*")]

        candidates = resume_candidates(run) if run.resume else []
        claim_output(self.folder, False, "dir", files_of_others)
        if resumes_own_folder(run) and not candidates:
            self.check_not_further(run)
        for name, other in run.hook.plugins.items():
            if other is not self and isinstance(other, Checkpoint) and Path(other.dir) == Path(self.dir):
                raise UsageError(f"{name} writes to dir={self.dir} too; choose another dir in one of them")

    def check_not_further(self, run: Run) -> None:
        """Raise UsageError where the log of a run without checkpoints shows that it had some.

        A run may have been killed, or its disk may have been full, between its first epoch and its first checkpoint.
        """
        file = run.out / getattr(run.hook.plugins.get("csv"), "path", "metrics.csv")
        epochs = last_epoch(file)
        if epochs > self.folder.is_dir():
            raise UsageError(f"{file} has {counted(epochs, 'epoch')}, but {self.folder} has no checkpoint to resume "
                             "from; mount or restore the folder, or begin a new run")

    def lock_folder(self) -> None:
        """Lock the folder. Raises UsageError where another run uses it, or has used it since this one began."""
        self.made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        with suppress(OSError):                 # where it cannot be made, a warning says so at the first checkpoint
            self.folder.mkdir(parents=True, exist_ok=True)
        self.lock.__enter__()
        if checkpoints_in(self.folder) != self.found:
            raise UsageError(f"{self.folder}: another run has written checkpoints there since this one began; resume "
                             "that run, or choose another dir")

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if not self.checked:
            if run.rank == 0:
                check_serializable(run)
                self.lock_folder()
                # What a killed run has left half written. Not later: the best weights may be written while a checkpoint
                # is, in the background.
                for left in (*self.folder.glob("best.*.new"), *self.folder.glob("step-*.new")):
                    self.try_write(run, left, partial(left.unlink, missing_ok=True))
            self.checked = True
            # Checkpoints later than the one resumed from are damaged.
            last = step_number(run.last_checkpoint) if run.last_checkpoint else -1
            self.kept = [file for file in checkpoints_in(self.folder) if step_number(file) <= last]
            if any(self.folder.glob("*.sharded")) and (self.folder / "best.pt").exists():
                with suppress(DamagedCheckpoint):       # then its shards are not kept
                    self.best_sharded = sharded_files(read_checkpoint(self.folder / "best.pt"), self.folder)[0].name

    @hookimpl
    def after_evaluate(self, run: Run) -> None:
        if self.watch.improved(run):
            self.lock.check()
            file, weights = self.folder / "best.safetensors", Weights(run.model)
            written = run.rank == 0 and self.try_write(run, file, lambda: save_weights(weights, file))
            self.best = broadcast_from_rank0(run, written)

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        self.epoch_ended = True

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if not self.optimizer_checked:              # its state exists since the first step
            self.optimizer_checked = True
            if run.rank == 0:
                check_serializable(run)
        overdue = self.every_minutes is not None and self.overdue_consensus(
            run, time.monotonic() - self.last_time >= 60 * self.every_minutes)
        epoch_due = self.epoch_ended and (run.finished or run.epoch % self.every_epochs == 0)
        self.epoch_ended = False
        step_due = self.every_steps and run.attempts % self.every_steps == 0
        if epoch_due or step_due or overdue or self.best or run.leaving:
            saved = self.save(run)
            if run.leaving and run.leave in signal.Signals.__members__:
                self.exit_on_signal(run, signal.Signals[run.leave], self.wait_for_pending(run) and saved)

    def save(self, run: Run) -> bool:
        """Write a checkpoint and delete old ones. Returns whether it was written; True while it is being written."""
        self.wait_for_pending(run)
        self.lock.check()
        file = self.folder / f"step-{run.attempts:08}.pt"
        best, self.best, self.last_time = self.best, False, time.monotonic()
        content, shards = extract_sharded(capture_state(run))
        write = partial(self.write_checkpoint, run, file, content, best) if run.rank == 0 else lambda: True
        if not shards:
            self.pending = file, write
            return self.wait_for_pending(run)
        # All processes write their shards in the background. The file is written last, so if it exists, all shards do.
        # The end of an epoch may save the same step again. Its shards go to another folder, because the existing file
        # refers to the first one until it is replaced.
        name = f"{file.stem}-{run.epoch}.sharded"
        content = deepcopy(content)
        checksums = save_sharded(shards, self.folder / name)

        def write_file_last() -> bool:
            content["sharded"] = {"folder": name, "checksums": checksums.result()}
            return run.rank > 0 or self.write_checkpoint(run, file, content, best)

        self.pending = file, ThreadPoolExecutor(1).submit(write_file_last).result
        return True

    def wait_for_pending(self, run: Run) -> bool:
        """Wait for the checkpoint that is being written, if any. Returns whether all processes have written it."""
        if not self.pending:
            return True
        (file, result), self.pending = self.pending, None
        written = all(all_gather(run, self.try_write(run, file, result)))
        run.last_checkpoint = file if written else run.last_checkpoint
        return written

    def write_checkpoint(self, run: Run, file: Path, content: dict[str, Any], best: bool) -> bool:
        """Write the file of a checkpoint, update best.pt, and delete checkpoints and shards that are not kept."""
        self.lock.check()
        save_checkpoint(plain_content(content), file)
        if best:
            self.try_write(run, self.folder / "best.pt", partial(link_or_copy, file, self.folder / "best.pt"))
            self.best_sharded = content.get("sharded", {}).get("folder")
        self.kept = [*dict.fromkeys((file, *self.kept))][:self.keep]
        for old in (*checkpoints_in(self.folder), *self.folder.glob("step-*.new")):
            if old not in self.kept and step_number(old) <= step_number(file) and not old.is_dir():
                self.try_write(run, old, partial(old.unlink, missing_ok=True))
        for folder in self.folder.glob("step-*.sharded"):
            owner = folder.with_name(f"{folder.name.rpartition('-')[0]}.pt")
            unused = folder.name != content.get("sharded", {}).get("folder") if owner == file else not owner.exists()
            if unused and folder.name != self.best_sharded:
                self.try_write(run, folder, partial(shutil.rmtree, folder))
        return True

    def try_write(self, run: Run, file: Path, write: Callable[[], Any]) -> bool:
        """Call `write` and return whether that succeeded.

        An OSError, and a state that a checkpoint cannot hold, are logged as a warning about `file`.
        """
        try:
            write()
        except (OSError, UsageError) as error:
            last = run.last_checkpoint
            remaining = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
            reason = getattr(error, "strerror", None) or error
            log.warning("checkpoint: %s cannot be written (%s); %s", file, reason, remaining)
            return False
        return True

    def exit_on_signal(self, run: Run, number: signal.Signals, saved: bool) -> None:
        last = run.last_checkpoint
        resume = f"resume continues from {last}" if last else "there is no checkpoint to resume from"
        if run.rank == 0:
            log.warning("checkpoint: stopped by %s after %d updates, in epoch %d; %s",
                        number.name, run.step, run.epoch + 1, resume)
        raise end_by(number) if saved or number == signal.SIGINT else SystemExit(1)

    def state_dict(self) -> dict[str, Any]:
        return self.watch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state)


def unhandled_signals() -> list[int]:
    """Ctrl-C, and the signals that batch systems send when time is up, except those that already have a handler."""
    if threading.current_thread() is not threading.main_thread():      # only the main thread can install handlers
        return []
    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGUSR1")]
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    return [number for number in numbers if number and signal.getsignal(number) in defaults]


def end_by(number: int) -> BaseException:
    """What Python raises to end a program at Ctrl-C, and to end it with the status that a shell shows for a signal."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


def last_epoch(file: Path) -> int:
    """The number of epochs that the log of the plugin csv shows; 0 where there is none."""
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            return max((int(float(row["epoch"])) for row in csv.DictReader(stream)), default=0)
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return 0


def link_or_copy(file: Path, target: Path) -> None:
    """Make `target` a hard link to `file`, or a copy if the file system has no links."""
    with atomic_write(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(file, temporary)
        except OSError:
            shutil.copyfile(file, temporary)
