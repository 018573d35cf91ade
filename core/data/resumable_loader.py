"""The training data, one epoch after another, each of which can be gone on with in its middle."""
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

from loopctl.data.batch import length_or_none
from loopctl.data.sharding import find_shard
from loopctl.rng import host_rng_state, rng_state, set_host_rng_state, set_rng_state

if TYPE_CHECKING:
    from loopctl.run import Run


SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Have signals wait, in the processes that are begun meanwhile too, until each of them can heed them."""
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
    """Have what gives `run` its batches, and end its workers afterwards, also after an exception."""
    run.loaders = {name: ResumableLoader(run, name) for name in ("train", "valid")}
    try:
        yield
    finally:
        for feed in run.loaders.values():
            feed.close()


class ResumableLoader:
    """Gives the batches of `run.train` or `run.valid`, and knows how to begin a pass over them with a later batch.

    A pass goes on as if it had never ended: in the same order, with the same random numbers in the loader and in its
    workers. What was consumed is not read again where a DataLoader draws indices: they are drawn again, and those that
    are left are given out. A loader with a `state_dict`, such as torchdata's StatefulDataLoader, goes on by itself.
    Anything else is read again up to there, with the random numbers that it began with.
    """

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.passing: Generator[Any] | None = None
        self.reading: Any = None                # the loader's own iterator
        self.saved: dict[str, Any] = {}
        self.take()
        # Batch size and samples, as far as they are known, of what the run began with.
        self.size = [getattr(self.source, "batch_size", None), length_or_none(getattr(self.source, "dataset", None))]

    def take(self) -> None:
        """Give what the run has now, which a plugin may have replaced."""
        self.source = self.loader = source = getattr(self.run, self.name)
        self.shard = find_shard(source)           # where there are more processes
        self.indices: ResumableBatchSampler | None = None
        self.workers: WorkerStates | None = None
        self.keeps_own_state = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        if samples_by_index(source) and not self.keeps_own_state:
            # A loader of its own, alike but for these; the user's stays as it is.
            self.loader, self.indices = copy(source), ResumableBatchSampler(source)
            mine: dict[str, Any] = {"batch_sampler": self.indices, "_iterator": None}
            if source.num_workers and self.recorded:
                self.workers = WorkerStates(source)
                mine |= {"collate_fn": CollateWithState(source.collate_fn),
                         "worker_init_fn": WorkerInit(source.worker_init_fn, self.workers)}
            vars(self.loader).update(mine)

    @property
    def recorded(self) -> bool:
        """Whether somebody may save the run: workers say where their random numbers are, and leave signals to it."""
        return bool(self.run.hook.acting["safe_point"] or self.run.resume)

    @property
    def first(self) -> int:
        """How many batches of the pass at hand are consumed already."""
        return self.run.seen_in_epoch if self.name == "train" else 0

    def __iter__(self) -> Iterator[Any]:
        """The batches of the pass at hand, from the first that is not consumed."""
        if getattr(self.run, self.name) is not self.source:
            self.close()
            self.take()
        self.reading = None
        self.passing = self.rest()
        return self.passing

    def close(self) -> None:
        """Let go of the loader and its workers now; what an exception holds on to, Python might clean up late."""
        if self.workers:
            self.workers.close()
        if self.passing:
            self.passing.close()
        # An error in the data holds on to the iterator, and one that is found by Python's garbage collector cannot tell
        # its workers any more: it waits five seconds for each. Those that the user's own loader keeps are not ours.
        kept = self.keeps_own_state or getattr(self.source, "persistent_workers", False)
        if self.loader is not self.source or not kept:
            getattr(self.reading, "_shutdown_workers", lambda: None)()
        self.reading, self.loader = None, self.source

    def rest(self) -> Generator[Any]:
        at = self.at = self.first
        try:
            for batch in self.begin():
                self.at = at                            # the batch at hand
                yield batch
                at += 1
        except Exception as error:
            epoch = f", epoch {self.run.epoch + 1}" if self.name == "train" else ""
            error.add_note(f"raised by {self.name} in batch {at + 1}{epoch}")
            raise

    def begin(self) -> Iterable[Any]:
        for name in ("sampler", "batch_sampler"):
            sampler: Any = getattr(self.source, name, None)
            if self.name == "train" and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self.run.epoch)
        first, saved, self.saved = self.first, self.saved, {}
        if self.shard is not None:
            self.shard.begin(first, saved.get("consumed", 0))
        here = rng_state(self.source)
        if first:
            set_rng_state(saved["began"], self.source)
        self.began = rng_state(self.source)
        if self.keeps_own_state:
            if saved.get("loader"):
                self.source.load_state_dict(saved["loader"])
            batches = iter(self.source)
            if saved.get("loader"):
                # How many seeds it draws to go on is its own affair; a loader that begins a pass draws one.
                set_rng_state(here, self.source)
                torch.empty((), dtype=torch.int64).random_()
        elif self.indices:
            drew = saved.get("indices")
            if saved.get("workers") and not first:
                drew = here         # new workers draw a seed, which those that persist had not drawn in this pass
            self.indices.prepare(first, drew)
            if self.workers:
                self.workers.prepare(saved)
                with signals_blocked():
                    self.reading = iter(self.loader)
                batches = self.workers.heard(self.reading, self)
            else:
                batches = self.reading = iter(self.loader)
        else:
            batches = self.reading = iter(self.source)
            for _ in islice(batches, first):
                pass
        if first:
            set_rng_state(here, self.source)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on from here."""
        return self.saved or {
            "began": self.began if self.first else None,
            "consumed": self.shard.consumed(self.first) if self.shard is not None and self.first else self.first,
            "seed": self.shard.seed if self.shard is not None else None,
            "indices": self.indices.began if self.indices and self.first else None,
            "workers": self.workers.state_dict(self.first) if self.workers else {},
            "loader": self.source.state_dict() if self.keeps_own_state and self.passing else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = state
        if self.shard is not None and self.shard.seed is not None:
            self.shard.seed = state["seed"]


def samples_by_index(source: Any) -> bool:
    """Whether `source` is a DataLoader that draws batches of indices and has no iteration of its own."""
    return (isinstance(source, DataLoader) and type(source).__iter__ is DataLoader.__iter__
            and source.batch_sampler is not None and not isinstance(source.dataset, IterableDataset))


class ResumableBatchSampler:
    """The batches of indices that a loader's sampler draws, from one of them on."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.loader = loader
        self.sampler: Any = loader.batch_sampler
        self.prepare(0, None)

    def prepare(self, first: int, drew: dict[str, Any] | None) -> None:
        """Pass over `first` batches. `drew` is where the random numbers were when the sampler drew them."""
        self.first, self.drew = first, drew

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        # This runs when the first batch is asked for, which is when a sampler draws.
        here = rng_state(self.loader)
        if self.drew:
            set_rng_state(self.drew, self.loader)
        self.began = rng_state(self.loader)
        batches = iter(self.sampler)
        for _ in islice(batches, self.first):
            pass
        if self.first:
            set_rng_state(here, self.loader)
            # Workers take turns: with empty tasks to begin with, each goes on with the batches that are its own.
            yield from [[]] * (self.first % self.loader.num_workers if self.loader.num_workers else 0)
        yield from batches


class WorkerStates:
    """Where the random numbers of a loader's workers are. They take turns, and the first begins each epoch."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.count, self.persist = loader.num_workers, loader.persistent_workers
        self.known: dict[int, dict[str, Any]] = {}                 # by worker
        self.ahead: deque[tuple[int, dict[str, Any]]] = deque()    # after batches that may not be consumed yet
        self.closing: Any = RawValue("b", 0)                       # in memory that the workers see
        atexit.register(self.close)                                # comes before those that are left are terminated

    def close(self) -> None:
        self.closing.value = 1
        atexit.unregister(self.close)

    def prepare(self, saved: dict[str, Any]) -> None:
        if not self.persist:
            self.known.clear()
        self.known.update(saved.get("workers", {}))

    def heard(self, tasks: Iterable[Any], feed: ResumableLoader) -> Iterator[Any]:
        """The batches, without what the workers say of themselves with each."""
        first = feed.first
        self.ahead.clear()
        for number, (batch, state) in enumerate(tasks, first - first % self.count):
            if number >= first:                                    # those before are empty
                if state:
                    self.ahead.append((number, state))
                self.follow(feed.first if feed.name == "train" else inf)
                yield batch

    def follow(self, consumed: float) -> None:
        while self.ahead and self.ahead[0][0] < consumed:
            number, state = self.ahead.popleft()
            self.known[number % self.count] = state

    def state_dict(self, consumed: int) -> dict[int, dict[str, Any]]:
        self.follow(consumed or inf)                               # 0: a pass is over, and all of it consumed
        return dict(self.known) if consumed or self.persist else {}


@dataclass
class CollateWithState:
    """Collates in a worker, and adds where the worker's random numbers are after the batch, if that has changed."""

    inner: Callable[[Any], Any]
    last: dict[str, Any] | None = None

    def __call__(self, samples: Any) -> Any:
        if isinstance(samples, list) and not samples:
            return None, None
        batch, before = self.inner(samples), self.last
        self.last = host_rng_state()
        return batch, None if self.last == before else self.last


class WorkerInit:
    """Starts a worker with the random numbers that it had."""

    def __init__(self, inner: Callable[[int], None] | None, workers: WorkerStates) -> None:
        self.inner, self.known, self.closing = inner, workers.known, workers.closing

    def __call__(self, worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, self.heed)
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.inner:
            self.inner(worker)
        if worker in self.known:
            set_host_rng_state(self.known[worker])

    def heed(self, number: int, frame: Any) -> None:
        # What a batch system sends to all processes at once is the main one's to heed, and to get to where it can save
        # it needs its workers.
        if self.closing.value:
            os._exit(0)             # as torch's workers do, for the main process takes any other end for an accident
