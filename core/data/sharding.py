"""What one of several processes reads of the data."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from copy import copy
from itertools import islice
from math import inf
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from loopctl.data.batch import chunked, length_or_none, sample_count
from loopctl.rng import host_rng_state, loader_generators, set_host_rng_state


def shard_data(data: Any, rank: int, ranks: int, seed: int) -> tuple[Any, Shard | None]:
    """`data` as one of `ranks` processes reads it, and the Shard in it; as it is where it was sharded already."""
    if isinstance(getattr(data, "sampler", None), DistributedSampler):
        return data, None
    if not isinstance(data, DataLoader) or data.batch_sampler is None or isinstance(data.dataset, IterableDataset):
        shard = Shard(data, rank, ranks, sample_count)
        return shard, shard
    shard = Shard(data.batch_sampler, rank, ranks, len, seed, data)
    loader = copy(data)                     # the user's stays as it is
    vars(loader).update(batch_sampler=shard, _iterator=None)
    return loader, shard


def find_shard(data: Any) -> Shard | None:
    """What divides `data` among processes, if anything does."""
    return next((part for part in (data, getattr(data, "batch_sampler", None)) if isinstance(part, Shard)), None)


class Shard:
    """Every so many-th of a sequence of batches, of data or of indices.

    The batches go round: each group of as many as there are processes makes one batch for each. All of them are given
    out, and each once. Where the last group is short, those who would have nothing get its last batch too, as a filler
    that counts nothing: nobody may be missing where all of them meet.

    batches: what a pass goes through; every process goes through all of it, and keeps its own
    count: how many samples a batch has
    seed: of the random numbers with which all processes draw batches alike; None for batches that nobody draws
    loader: whose generators are seeded as well
    """

    def __init__(self, batches: Iterable[Any], rank: int, ranks: int, count: Callable[[Any], int],
                 seed: int | None = None, loader: Any = None) -> None:
        self.batches, self.rank, self.ranks, self.count = batches, rank, ranks, count
        self.seed, self.loader, self.epoch = seed, loader, 0
        self.groups: list[tuple[int, bool, int]] = []       # of the run's own pass, see `__iter__`
        self.began = (0, 0)                                 # where it went on, for this process and for all
        self.next: tuple[int, int] | None = None

    def __len__(self) -> int:
        """The batches of each process in a pass. Raises TypeError where that is not known."""
        return -(-len(self.batches) // self.ranks)      # type: ignore[arg-type]

    @property
    def own(self) -> float:
        """How many batches of this process are no fillers; infinite where that is not known."""
        length = length_or_none(self.batches)
        return inf if length is None else len(range(self.rank, length, self.ranks))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def begin(self, first: int, consumed: int) -> None:
        """The next pass is the run's own. It goes on with this process's batch `first`, `consumed` of all before it."""
        self.next = first, consumed

    def consumed(self, first: int) -> int:
        """How many of all batches come before this process's batch `first`."""
        return self.began[1] + (first - self.began[0]) * self.ranks

    def left(self, consumed: int) -> int:
        """How many batches each process has yet in a pass. Raises TypeError where that is not known."""
        return max(0, -(-(len(self.batches) - consumed) // self.ranks))     # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        groups: list[tuple[int, bool, int]] = []        # the samples of all, whether evenly, and of this process
        first = consumed = 0
        if self.next:
            (first, consumed), self.began, self.groups, self.next = self.next, self.next, groups, None
        for _ in range(first):                  # passed over by whoever goes on in the middle
            groups.append((0, True, 0))
            yield []
        for group in chunked(islice(self.drawn(), consumed, None), self.ranks):
            sizes = [self.count(batch) for batch in group]
            even = len(group) == self.ranks and len(set(sizes)) == 1
            groups.append((sum(sizes), even, sizes[self.rank] if self.rank < len(group) else 0))
            yield group[min(self.rank, len(group) - 1)]

    def together(self, first: int, number: int) -> tuple[int, bool, int] | None:
        """Of this process's batches from `first` on: the samples that all processes have in them, whether each has as
        many, and those of this process. None where they are of no pass of the run."""
        groups = self.groups[first:first + number]
        if len(groups) < number:
            return None
        if number == 1:                 # in every step, mostly
            return groups[0]
        return sum(every for every, _, _ in groups), all(even for _, even, _ in groups), sum(own for *_, own in groups)

    def counts(self, at: int) -> bool:
        """Whether this process's batch `at` is no filler."""
        return at >= len(self.groups) or self.groups[at][2] > 0

    def drawn(self) -> Iterator[Any]:
        """The batches, drawn with random numbers that depend on seed and epoch alone, and none of the run's own."""
        if self.seed is None:
            yield from self.batches
            return
        theirs, batches = None, None
        while True:
            mine = self.state()
            if theirs is None:
                self.sow(self.seed + self.epoch)
            else:
                self.put(theirs)
            try:
                batches = batches or iter(self.batches)
                some = list(islice(batches, 1024))          # there and back takes time, so not for each
                theirs = self.state()
            finally:
                self.put(mine)
            if not some:
                return
            yield from some

    def state(self) -> tuple[Any, list[Any]]:
        return host_rng_state(), [one.get_state() for one in loader_generators([self.loader])]

    def put(self, state: tuple[Any, list[Any]]) -> None:
        set_host_rng_state(state[0])
        for generator, one in zip(loader_generators([self.loader]), state[1], strict=True):
            generator.set_state(one)

    def sow(self, seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for generator in (torch.default_generator, *loader_generators([self.loader])):
            generator.manual_seed(seed % 2**63)
