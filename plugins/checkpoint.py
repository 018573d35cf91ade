"""Checkpoints."""
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
    Weights,
    atomic_write,
    claim_output,
    read_checkpoint,
    save_checkpoint,
    save_weights,
)
from loopctl.checkpoint.sharded_tensors import extract_sharded, save_sharded
from loopctl.checkpoint.state import capture_state, check_serializable, checkpoints_in, find_candidates, step_number
from loopctl.distributed.process_group import (
    StopConsensus,
    all_gather,
    broadcast_from_rank0,
    is_peer_failure,
    launched_processes,
)

log = logging.getLogger("loopctl")


@dataclass(eq=False)
class Checkpoint:
    """Save the whole state of the run, from which it goes on exactly, and the best weights.

    A checkpoint is step-N.pt, with N updates planned so far. The last one is written when the run ends, and before
    leaving on SIGTERM or SIGUSR1, which batch systems send. best.safetensors are the weights that were judged best,
    best.pt the whole state soon after. A checkpoint that cannot be written stops nothing: a line says so, and the
    one before it stays.

    every_epochs: save at the end of every so many epochs
    every_steps: save every so many steps too
    every_minutes: save when so many minutes have passed since the last time, too
    monitor: the metric that tells which weights are best; val_loss if left out, or train_loss without validation
    mode: whether smaller or larger is better; auto knows losses and errors from accuracies by name
    keep: how many checkpoints stay, besides the best; with two, a damaged one has one before it
    dir: the folder, relative to the run's
    """

    every_epochs: int = 1
    every_steps: int | None = None
    every_minutes: float | None = None
    monitor: str = ""
    mode: Literal["auto", "min", "max"] = "auto"
    keep: int = 2
    dir: str = "checkpoints"

    def __post_init__(self) -> None:
        for name in ("every_epochs", "every_steps", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        if self.every_minutes is not None and not self.every_minutes > 0:
            raise ValueError(f"every_minutes is above 0, not {self.every_minutes}")

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        self.watch = Monitor(self.monitor, self.mode)
        self.ended = self.best = self.checked = False
        self.signal = 0
        self.together = StopConsensus()
        self.good: list[Path] = []              # the checkpoints to keep, the last one first
        self.best_sharded: str | None = None     # the folder that best.pt is about, if its tensors are in pieces
        self.writing: tuple[Path, Callable[[], bool]] | None = None     # the one being written; wait for the result
        before = {number: signal.signal(number, self.heed) for number in free_signals()}
        try:
            result = yield
            self.settle(run)
            return result
        except BaseException as error:
            if self.writing:            # let it come to its end before processes leave each other
                with suppress(Exception):
                    self.writing[1]()
            if self.signal and is_peer_failure(error):       # torchrun's, which ends this one because another has ended
                raise SystemExit(128 + self.signal) from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def heed(self, number: int, frame: Any) -> None:
        """Note that the run is to leave at the next safe point. A second signal ends it at once, but where torchrun has
        started several processes, which passes on to them what they may have had already."""
        if self.signal and launched_processes() == 1:
            raise SystemExit(128 + number)
        self.signal = number

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.watch.start(run)
        self.folder = run.out / self.dir
        self.since = time.monotonic()
        if run.rank == 0:
            self.claim(run)

    def claim(self, run: Run) -> None:
        """Raise UsageError for a folder that cannot be written to, or that holds files of another run."""
        def files_of_others() -> list[Path]:
            files = [*checkpoints_in(self.folder), *self.folder.glob("best.*")]
            resumed = [realpath(file) for file in find_candidates(run.resume)] if run.resume else []
            # A resumed run without a checkpoint was killed before its first one, and starts from the beginning.
            own = realpath(files[0]) in resumed if files and resumed else bool(run.resume)
            return [] if own else files

        claim_output(self.folder, False, "dir", files_of_others)
        for name, other in run.hook.plugins.items():
            if other is not self and isinstance(other, Checkpoint) and Path(other.dir) == Path(self.dir):
                raise UsageError(f"{name} writes to dir={self.dir} too; choose another dir in one of them")

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if not self.checked:
            if run.rank == 0:
                check_serializable(run)
            self.checked = True
            # Those after the one gone on from are damaged.
            last = step_number(run.last_checkpoint) if run.last_checkpoint else -1
            self.good = [file for file in checkpoints_in(self.folder) if step_number(file) <= last]
            if any(self.folder.glob("*.sharded")) and (self.folder / "best.pt").exists():
                self.best_sharded = read_checkpoint(self.folder / "best.pt").get("sharded")

    @hookimpl
    def after_evaluate(self, run: Run) -> None:
        if self.watch.improved(run):
            file, weights = self.folder / "best.safetensors", Weights(run.model)
            done = run.rank == 0 and self.tried(run, file, lambda: save_weights(weights, file))
            self.best = broadcast_from_rank0(run, done)

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        self.ended = True

    @hookimpl
    def safe_point(self, run: Run) -> None:
        late = self.every_minutes is not None and time.monotonic() - self.since >= 60 * self.every_minutes
        signal, late = self.together(run, (self.signal, late)) or (0, False)
        ended, self.ended = self.ended and (run.finished or run.epoch % self.every_epochs == 0), False
        if ended or self.best or signal or late or (self.every_steps and run.attempts % self.every_steps == 0):
            done = self.save(run)
            if signal and not run.finished:
                self.leave(run, signal, self.settle(run) and done)

    def save(self, run: Run) -> bool:
        """Write a checkpoint, then take away those that are too many. Whether it could be written, as far as known."""
        self.settle(run)
        file = self.folder / f"step-{run.attempts:08}.pt"
        best, self.best, self.since = self.best, False, time.monotonic()
        content, parts = extract_sharded(capture_state(run))
        put = partial(self.put, run, file, content, best) if run.rank == 0 else lambda: True
        if not parts:
            self.writing = file, put
            return self.settle(run)
        # In pieces it is written by all, and while training goes on. The file comes last: with it the rest is whole. At
        # an epoch's end it is written once more, to another folder, for the one before is whole until that is too.
        content = deepcopy(content) | {"sharded": f"{file.stem}-{run.epoch}.sharded"}
        put = partial(self.put, run, file, content, best) if run.rank == 0 else lambda: True
        if run.rank == 0:
            shutil.rmtree(self.folder / content["sharded"], ignore_errors=True)      # which a killed run has left
        written = save_sharded(parts, self.folder / content["sharded"])
        self.writing = file, ThreadPoolExecutor(1).submit(lambda: bool(written.result()) and put()).result
        return True

    def settle(self, run: Run) -> bool:
        """Wait for the checkpoint that is being written. Whether all processes could write it."""
        if not self.writing:
            return True
        (file, result), self.writing = self.writing, None
        done = all(all_gather(run, self.tried(run, file, result)))
        run.last_checkpoint = file if done else run.last_checkpoint
        return done

    def put(self, run: Run, file: Path, content: dict[str, Any], best: bool) -> bool:
        save_checkpoint(content, file)
        if best:
            self.tried(run, self.folder / "best.pt", partial(linked, file, self.folder / "best.pt"))
            self.best_sharded = content.get("sharded")
        self.good = [*dict.fromkeys((file, *self.good))][:self.keep]
        for old in (*checkpoints_in(self.folder), *self.folder.glob("*.new")):
            if old not in self.good and step_number(old) <= step_number(file) and not old.is_dir():
                self.tried(run, old, partial(old.unlink, missing_ok=True))
        for old in self.folder.glob("step-*.sharded"):
            its = old.with_name(f"{old.name.rpartition('-')[0]}.pt")
            gone = old.name != content["sharded"] if its == file else not its.exists()
            if gone and old.name != self.best_sharded:
                self.tried(run, old, partial(shutil.rmtree, old))
        return True

    def tried(self, run: Run, file: Path, write: Callable[[], Any]) -> bool:
        """Whether `write` could write `file`. If not, a line says so, and the run goes on."""
        try:
            write()
        except OSError as error:
            last = f"the last one is {run.last_checkpoint}" if run.last_checkpoint else "there is none yet"
            log.warning("checkpoint: %s cannot be written (%s); %s", file, error.strerror or error, last)
            return False
        return True

    def leave(self, run: Run, number: int, done: bool) -> None:
        last = run.last_checkpoint
        way = f"resume continues from {last}" if last else "there is no checkpoint to resume from"
        name = signal.Signals(number).name
        if run.rank == 0:
            log.warning("checkpoint: left on %s after %d updates, in epoch %d; %s", name, run.step, run.epoch + 1, way)
        raise SystemExit(128 + number if done else 1)

    def state_dict(self) -> dict[str, Any]:
        return self.watch.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.watch.load_state_dict(state)


def free_signals() -> list[int]:
    """The signals that batch systems send to say that time is up, where nobody else listens to them already."""
    if threading.current_thread() is not threading.main_thread():
        return []
    found = [getattr(signal, name, None) for name in ("SIGTERM", "SIGUSR1")]
    return [one for one in found if one and signal.getsignal(one) == signal.SIG_DFL]


def linked(file: Path, name: Path) -> None:
    """Give `file` a second name, or a copy where the file system has no links."""
    with atomic_write(name) as aside:
        aside.unlink(missing_ok=True)
        try:
            os.link(file, aside)
        except OSError:
            shutil.copyfile(file, aside)
