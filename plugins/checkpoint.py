"""Checkpoints."""
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from os.path import realpath
from pathlib import Path
from typing import Any, Literal

from loopctl import Monitor, Run, UsageError, checkpoint, files, hookimpl, pieces, world

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
    def train(self, run):
        self.watch = Monitor(self.monitor, self.mode)
        self.ended = self.best = self.checked = False
        self.signal = 0
        self.together = world.Together()
        self.good: list[Path] = []              # the checkpoints to keep, the last one first
        self.best_pieces: str | None = None     # the folder that best.pt is about, if its tensors are in pieces
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
            if self.signal and world.lost(error):       # torchrun's, which ends this one because another has ended
                raise SystemExit(128 + self.signal) from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def heed(self, number: int, frame: Any) -> None:
        """Note that the run is to leave at the next safe point. A second signal ends it at once, but where torchrun has
        started several processes, which passes on to them what they may have had already."""
        if self.signal and world.launched() == 1:
            raise SystemExit(128 + number)
        self.signal = number

    @hookimpl
    def train_start(self, run):
        self.watch.start(run)
        self.folder = run.out / self.dir
        self.since = time.monotonic()
        if run.rank == 0:
            self.claim(run)

    def claim(self, run: Run) -> None:
        """Refuse a folder that cannot be written to, or that others write to."""
        try:
            files.writable(self.folder / "best.safetensors")
        except OSError as error:
            raise UsageError(f"{self.folder} cannot be written ({error.strerror}); say another dir") from error
        there = [*checkpoint.numbered(self.folder), *self.folder.glob("best.*")]
        goes_on = [realpath(file) for file in checkpoint.candidates(run.resume)] if run.resume else []
        # A run that goes on and has no checkpoint was killed before its first, and begins at the start.
        if there and realpath(there[0]) not in goes_on and not (run.resume and not goes_on):
            raise UsageError(f"{there[0]} exists and is not overwritten; move it, or say another dir")
        for name, other in run.hook.plugins.items():
            if other is not self and isinstance(other, Checkpoint) and Path(other.dir) == Path(self.dir):
                raise UsageError(f"{name} writes to dir={self.dir} too; say another dir in one of them")

    @hookimpl
    def epoch_start(self, run):
        if not self.checked:
            if run.rank == 0:
                checkpoint.check(run)
            self.checked = True
            # Those after the one gone on from are damaged.
            last = checkpoint.number(run.saved) if run.saved else -1
            self.good = [file for file in checkpoint.numbered(self.folder) if checkpoint.number(file) <= last]
            if any(self.folder.glob("*.pieces")) and (self.folder / "best.pt").exists():
                self.best_pieces = files.read(self.folder / "best.pt").get("pieces")

    @hookimpl
    def after_evaluate(self, run):
        if self.watch.improved(run):
            file, weights = self.folder / "best.safetensors", files.Weights(run.model)
            done = run.rank == 0 and self.tried(run, file, lambda: files.save_weights(weights, file))
            self.best = world.told(run, done)

    @hookimpl
    def epoch_end(self, run):
        self.ended = True

    @hookimpl
    def safe_point(self, run):
        late = self.every_minutes is not None and time.monotonic() - self.since >= 60 * self.every_minutes
        signal, late = self.together(run, (self.signal, late)) or (0, False)
        ended, self.ended = self.ended and (run.over or run.epoch % self.every_epochs == 0), False
        if ended or self.best or signal or late or (self.every_steps and run.attempts % self.every_steps == 0):
            done = self.save(run)
            if signal and not run.over:
                self.leave(run, signal, self.settle(run) and done)

    def save(self, run: Run) -> bool:
        """Write a checkpoint, then take away those that are too many. Whether it could be written, as far as known."""
        self.settle(run)
        file = self.folder / f"step-{run.attempts:08}.pt"
        best, self.best, self.since = self.best, False, time.monotonic()
        content, parts = pieces.taken_out(checkpoint.state(run))
        put = partial(self.put, run, file, content, best) if run.rank == 0 else lambda: True
        if not parts:
            self.writing = file, put
            return self.settle(run)
        # In pieces it is written by all, and while training goes on. The file comes last: with it the rest is whole. At
        # an epoch's end it is written once more, to another folder, for the one before is whole until that is too.
        content = deepcopy(content) | {"pieces": f"{file.stem}-{run.epoch}.pieces"}
        put = partial(self.put, run, file, content, best) if run.rank == 0 else lambda: True
        if run.rank == 0:
            shutil.rmtree(self.folder / content["pieces"], ignore_errors=True)      # which a killed run has left
        written = pieces.save(parts, self.folder / content["pieces"])
        self.writing = file, ThreadPoolExecutor(1).submit(lambda: bool(written.result()) and put()).result
        return True

    def settle(self, run: Run) -> bool:
        """Wait for the checkpoint that is being written. Whether all processes could write it."""
        if not self.writing:
            return True
        (file, result), self.writing = self.writing, None
        done = all(world.gathered(run, self.tried(run, file, result)))
        run.saved = file if done else run.saved
        return done

    def put(self, run: Run, file: Path, content: dict[str, Any], best: bool) -> bool:
        files.save(content, file)
        if best:
            self.tried(run, self.folder / "best.pt", partial(linked, file, self.folder / "best.pt"))
            self.best_pieces = content.get("pieces")
        self.good = [*dict.fromkeys((file, *self.good))][:self.keep]
        for old in (*checkpoint.numbered(self.folder), *self.folder.glob("*.new")):
            if old not in self.good and checkpoint.number(old) <= checkpoint.number(file) and not old.is_dir():
                self.tried(run, old, partial(old.unlink, missing_ok=True))
        for old in self.folder.glob("step-*.pieces"):
            its = old.with_name(f"{old.name.rpartition('-')[0]}.pt")
            gone = old.name != content["pieces"] if its == file else not its.exists()
            if gone and old.name != self.best_pieces:
                self.tried(run, old, partial(shutil.rmtree, old))
        return True

    def tried(self, run: Run, file: Path, write: Callable[[], Any]) -> bool:
        """Whether `write` could write `file`. If not, a line says so, and the run goes on."""
        try:
            write()
        except OSError as error:
            last = f"the last one is {run.saved}" if run.saved else "there is none yet"
            log.warning("checkpoint: %s cannot be written (%s); %s", file, error.strerror or error, last)
            return False
        return True

    def leave(self, run: Run, number: int, done: bool) -> None:
        way = f"resuming goes on from {run.saved}" if run.saved else "there is no checkpoint to go on from"
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
    with files.replacing(name) as aside:
        aside.unlink(missing_ok=True)
        try:
            os.link(file, aside)
        except OSError:
            shutil.copyfile(file, aside)
