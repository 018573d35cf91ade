"""Loaders that can resume in the middle of an epoch: `ResumableLoader` wraps `run.train` and `run.valid`."""
from __future__ import annotations

import atexit
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import islice
from math import inf
from multiprocessing.sharedctypes import RawValue
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from loopctl.data.device_loader import DeviceLoader
from loopctl.data.identity import data_identity
from loopctl.data.sharding import find_shard
from loopctl.rng import host_rng_state, rng_state, set_host_rng_state, set_rng_state

if TYPE_CHECKING:
    from loopctl.run import Run


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block `SIGNALS` in this thread. Processes started meanwhile unblock them when they can handle them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def open_loaders(run: Run) -> Iterator[None]:
    """Set `run.loaders` for the block; at its end, also after an exception, stop their workers."""
    run.loaders = {name: ResumableLoader(run, name) for name in run.data_sets()}
    try:
        yield
    finally:
        for loader in run.loaders.values():
            loader.close()


class ResumableLoader:
    """Iterates over the batches of `run.train` or `run.valid`, and can start a pass in its middle.

    A resumed pass has the same batches as one that was not interrupted: in the same order, with the same random numbers
    in the loader and in its workers. For a DataLoader that draws indices, consumed batches are not read again: the
    indices are drawn again, and only the remaining ones are used. A loader with a `state_dict`, such as torchdata's
    StatefulDataLoader, resumes by itself. Anything else is read again from the start of the pass up to there, with the
    random numbers it started with.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.current_pass: Generator[Any] | None = None
        self.iterator: Any = None                       # the one of `loader`
        self.loaded_state: dict[str, Any] = {}          # from a checkpoint, for the next pass
        self.set_source()
        self.identity = data_identity(self.source)      # of what the run started with

    def set_source(self) -> None:
        """Use what the data set of the run is now, which a plugin may have replaced."""
        self.source = self.loader = source = self.run.data_sets()[self.name]
        self.shard = find_shard(source)           # None in a run of one process
        self.batch_sampler: ResumableBatchSampler | None = None
        self.workers: WorkerStates | None = None
        self.keeps_own_state = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        if samples_by_index(source) and not self.keeps_own_state:
            # Iterate over a changed copy, so that the user's own loader is not changed.
            self.loader, self.batch_sampler = copy(source), ResumableBatchSampler(source)
            changes: dict[str, Any] = {"batch_sampler": self.batch_sampler, "_iterator": None}
            if not getattr(source, "in_order", True) and source.num_workers and self.may_be_saved:
                # Batches that come in the order of their completion could not be found again after a resume.
                self.run.say_once(f"in_order {self.name}", f"{self.name} has in_order=False, which a run that can be "
                                  "resumed exactly does not use; its batches come in order")
                changes["in_order"] = True
            if source.num_workers and self.may_be_saved:
                self.workers = WorkerStates(source)
                changes |= {"collate_fn": CollateWithState(source.collate_fn),
                            "worker_init_fn": WorkerInit(source.worker_init_fn, self.workers)}
            if isinstance(source, DeviceLoader):
                changes["as_collated"] = True               # `start_pass` has it finish them
            vars(self.loader).update(changes)

    @property
    def may_be_saved(self) -> bool:
        """Whether a plugin may save the run. Then workers report their random-number state and ignore signals."""
        return bool(self.run.hook.acting["safe_point"] or self.run.resume)

    @property
    def consumed(self) -> int:
        """The number of batches of the current pass that are consumed already."""
        return self.run.seen_in_epoch if self.name == "train" else 0

    def __iter__(self) -> Iterator[Any]:
        """Start a pass over the batches, from the first one that is not consumed."""
        if self.run.data_sets()[self.name] is not self.source:
            self.close()
            self.set_source()
        self.iterator = None
        self.current_pass = self.remaining_batches()
        return self.current_pass

    def close(self) -> None:
        """End the current pass and its workers now, even where a traceback still holds references to them."""
        if self.workers:
            self.workers.close()
        if self.current_pass:
            self.current_pass.close()
        # The traceback of an error in the data keeps the iterator alive. If Python's garbage collector found it later,
        # the iterator could no longer signal its workers and would wait five seconds for each of them. Workers that
        # the user's own loader keeps, because it has persistent workers or a state of its own, are not stopped.
        keeps_workers = self.keeps_own_state or getattr(self.source, "persistent_workers", False)
        if self.loader is not self.source or not keeps_workers:
            getattr(self.iterator, "_shutdown_workers", lambda: None)()
        self.iterator, self.loader = None, self.source

    def remaining_batches(self) -> Generator[Any]:
        index = self.batch_index = self.consumed_before = self.consumed
        try:
            for batch in self.start_pass():
                self.batch_index = index                # of the batch that is being processed
                yield batch
                index += 1
            if self.batch_sampler and self.batch_sampler.drawn > index - self.consumed_before:
                raise RuntimeError("the data set or the collate function raised StopIteration, which would end the "
                                   "epoch here without a word; raise another error")
        except Exception as error:
            epoch = f", epoch {self.run.epoch + 1}" if self.name == "train" else ""
            error.add_note(f"raised by {self.name} in batch {index + 1}{epoch}")
            raise

    def start_pass(self) -> Iterable[Any]:
        """Return the remaining batches, with the random-number generators set as an uninterrupted pass has them."""
        for name in ("sampler", "batch_sampler"):
            sampler: Any = getattr(self.source, name, None)
            if self.name == "train" and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.run.epoch)
        first, saved, self.loaded_state = self.consumed, self.loaded_state, {}
        if self.shard is not None:
            self.shard.start_pass(first, saved.get("consumed", 0))
        resume_state = rng_state(self.source)
        if first:
            set_rng_state(saved["began"], self.source)
        self.start_state = rng_state(self.source)
        if self.keeps_own_state:
            if saved.get("loader"):
                self.source.load_state_dict(saved["loader"])
            batches = iter(self.source)
            if saved.get("loader"):
                # A resuming loader may draw any number of seeds. One that starts a new pass draws one: do the same.
                set_rng_state(resume_state, self.source)
                torch.empty((), dtype=torch.int64).random_()
        elif self.batch_sampler:
            sampler_state = saved.get("indices")
            if saved.get("workers") and not first:
                # New workers draw a base seed here, which the persistent workers of the saved run did not.
                sampler_state = resume_state
            self.batch_sampler.prepare(first, sampler_state)
            if self.workers:
                self.workers.prepare(saved)
                with signals_blocked():
                    self.iterator = iter(self.loader)
                batches = self.workers.separate_states(self.iterator, self)
            else:
                batches = self.iterator = iter(self.loader)
            if isinstance(self.source, DeviceLoader):
                batches = map(self.source.finish, batches)
        else:
            batches = self.iterator = iter(self.source)
            for _ in islice(batches, first):
                pass
        if first:
            set_rng_state(resume_state, self.source)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to resume after the batches consumed so far."""
        return self.loaded_state or {
            "began": self.start_state if self.consumed else None,
            "consumed": self.shard.consumed_by_all(self.consumed) if self.shard is not None and self.consumed
                        else self.consumed,
            "seed": self.shard.seed if self.shard is not None else None,
            "indices": self.batch_sampler.start_state if self.batch_sampler and self.consumed else None,
            "workers": self.workers.state_dict(self.consumed) if self.workers else {},
            "loader": self.source.state_dict() if self.keeps_own_state and self.current_pass else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded_state = state
        if self.shard is not None and self.shard.seed is not None:
            self.shard.seed = state["seed"]


def samples_by_index(source: Any) -> bool:
    """Return whether `source` is a DataLoader that draws batches of indices, with no `__iter__` of a user's class."""
    return (isinstance(source, DataLoader) and type(source).__iter__ in (DataLoader.__iter__, DeviceLoader.__iter__)
            and source.batch_sampler is not None and not isinstance(source.dataset, IterableDataset))


class ResumableBatchSampler:
    """Draws the batches of indices of a loader's batch sampler, and skips the first ones of a resumed pass."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.sampler: Any = loader.batch_sampler
        self.prepare(0, None)

    def prepare(self, first: int, sampler_state: dict[str, Any] | None) -> None:
        """Skip `first` batches in the next iteration. `sampler_state`: the random-number state to draw them with."""
        self.first, self.sampler_state, self.drawn = first, sampler_state, 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        # A generator: this runs when the first batch is asked for, which is when a sampler draws.
        resume_state = rng_state(self.loader)
        if self.sampler_state:
            set_rng_state(self.sampler_state, self.loader)
        self.start_state = rng_state(self.loader)
        batches = iter(self.sampler)
        for _ in islice(batches, self.first):
            pass
        if self.first:
            set_rng_state(resume_state, self.loader)
            # Workers take turns. Empty batches for the first turns make each worker resume with its own batches.
            yield from [[]] * (self.first % self.loader.num_workers if self.loader.num_workers else 0)
        for indices in batches:
            self.drawn += 1             # more than the batches that arrive if reading one raised StopIteration
            yield indices


class WorkerStates:
    """The random-number state of each of a loader's workers, after the last batch of it that was consumed.

    Workers take turns: batch `n` of an epoch comes from worker `n % num_workers`.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.num_workers, self.persistent = loader.num_workers, loader.persistent_workers
        self.states: dict[int, dict[str, Any]] = {}                # by worker
        self.pending: deque[tuple[int, dict[str, Any]]] = deque()  # states after batches that may not be consumed yet
        self.closing: Any = RawValue("b", 0)                       # in shared memory, so that the workers see it
        atexit.register(self.close)                                # runs before Python terminates remaining workers

    def close(self) -> None:
        self.closing.value = 1
        atexit.unregister(self.close)

    def prepare(self, saved: dict[str, Any]) -> None:
        if not self.persistent:
            self.states.clear()
        self.states.update(saved.get("workers", {}))

    def separate_states(self, items: Iterable[Any], loader: ResumableLoader) -> Iterator[Any]:
        """Yield the batches of `items`, pairs of a batch and its worker's state; keep the states."""
        first = loader.consumed
        self.pending.clear()
        for number, (batch, state) in enumerate(items, first - first % self.num_workers):
            if number >= first:                                    # the ones before are empty batches
                if state:
                    self.pending.append((number, state))
                self.record(loader.consumed if loader.name == "train" else inf)
                yield batch

    def record(self, consumed: float) -> None:
        """Take over the pending states of the batches before number `consumed`."""
        while self.pending and self.pending[0][0] < consumed:
            number, state = self.pending.popleft()
            self.states[number % self.num_workers] = state

    def state_dict(self, consumed: int) -> dict[int, dict[str, Any]]:
        self.record(consumed or inf)                               # 0: a pass ended, so all its batches are consumed
        return dict(self.states) if consumed or self.persistent else {}


@dataclass
class CollateWithState:
    """A collate_fn for workers: returns the batch and the worker's random-number state, None if it did not change."""

    collate_fn: Callable[[Any], Any]
    last_state: dict[str, Any] | None = None

    def __call__(self, samples: Any) -> Any:
        if isinstance(samples, list) and not samples:
            return None, None
        batch, before = self.collate_fn(samples), self.last_state
        self.last_state = host_rng_state()
        return batch, None if self.last_state == before else self.last_state


class WorkerInit:
    """A worker_init_fn: starts a worker with its saved random-number state, and has it ignore signals until the end."""

    def __init__(self, worker_init_fn: Callable[[int], None] | None, workers: WorkerStates) -> None:
        self.worker_init_fn, self.states, self.closing = worker_init_fn, workers.states, workers.closing

    def __call__(self, worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, self.handle_signal)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.worker_init_fn:
            self.worker_init_fn(worker)
        if worker in self.states:
            set_host_rng_state(self.states[worker])

    def handle_signal(self, number: int, frame: Any) -> None:
        # A batch system sends its signal to all processes. The main process handles it, and needs its workers until
        # the next safe point, where it can save. So a worker exits only once the loader is closing.
        if self.closing.value:
            os._exit(0)             # status 0, as torch's own workers: the main process reports any other as a crash
