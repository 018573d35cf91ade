"""Sharding of the training data: `Shard` gives each process of a data-parallel run its part of every epoch."""
from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from math import inf
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler

from loopctl.data.batch import chunked, length_or_none, sample_count
from loopctl.data.limits import draws_indices, limited_per_process, with_batch_sampler
from loopctl.rng import host_rng_state, loader_generators, set_host_rng_state


def shard_data(data: Any, rank: int, world_size: int, seed: int) -> tuple[Any, Shard | None]:
    """Return `data` as the process `rank` of `world_size` reads it, and the Shard in it.

    A DataLoader that draws indices is copied, with a Shard of its batch sampler. Any other iterable is wrapped in a
    Shard. Data with a DistributedSampler is sharded already: it is returned unchanged, with None.
    """
    if isinstance(getattr(data, "sampler", None), DistributedSampler):
        return data, None
    data = limited_per_process(data, world_size)
    if not draws_indices(data):
        shard = Shard(data, rank, world_size, sample_count)
        return shard, shard
    shard = Shard(data.batch_sampler, rank, world_size, len, seed, data)
    return with_batch_sampler(data, shard), shard


def find_shard(data: Any) -> Shard | None:
    """Return the Shard that divides `data` among processes, or None."""
    return next((part for part in (data, getattr(data, "batch_sampler", None)) if isinstance(part, Shard)), None)


class Shard:
    """Every `world_size`-th batch of a sequence of batches, which hold samples or indices.

    Each group of `world_size` consecutive batches gives one batch to each process, so every batch is used exactly once
    in an epoch. Where the last group is too short, the remaining processes get its last batch again, as a filler whose
    weight is 0: every process has to take part in the collectives of every step.

    batches: the batches of all processes; each process iterates over all of them and keeps its own
    count: returns the number of samples in a batch
    seed: seed for drawing the batches, equal in all processes; None if reading them draws no random numbers
    loader: the DataLoader whose generators are seeded as well
    """

    def __init__(self, batches: Iterable[Any], rank: int, world_size: int, count: Callable[[Any], int],
                 seed: int | None = None, loader: Any = None) -> None:
        self.batches, self.rank, self.world_size, self.count = batches, rank, world_size, count
        self.seed, self.loader, self.epoch = seed, loader, 0
        # Of the training run's current pass, per batch of this process: the samples in the group, whether all
        # processes have equally many, and the samples of this process.
        self.groups: list[tuple[int, bool, int]] = []
        self.start = (0, 0)                                 # where that pass started: see `start_pass`
        self.next_start: tuple[int, int] | None = None

    def __len__(self) -> int:
        """The number of batches of each process in a pass, fillers included. Raises TypeError where it is unknown."""
        return -(-len(self.batches) // self.world_size)      # type: ignore[arg-type]

    @property
    def real_batches(self) -> float:
        """The number of batches of this process in a pass, without a filler; infinity where it is unknown."""
        length = length_or_none(self.batches)
        return inf if length is None else len(range(self.rank, length, self.world_size))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def start_pass(self, first: int, consumed: int) -> None:
        """Make the next iteration the training run's own pass, whose sample counts are recorded.

        It starts at this process's batch `first`. The first `consumed` batches of all processes are skipped.
        """
        self.next_start = first, consumed

    def consumed_by_all(self, first: int) -> int:
        """Return how many batches of all processes come before this process's batch `first`."""
        return self.start[1] + (first - self.start[0]) * self.world_size

    def remaining(self, consumed: int) -> int:
        """Return how many batches each process has left in a pass of which all processes have `consumed` together.

        Raises TypeError where the length is unknown.
        """
        return max(0, -(-(len(self.batches) - consumed) // self.world_size))     # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        groups: list[tuple[int, bool, int]] = []
        first = consumed = 0
        if self.next_start:
            (first, consumed), self.start, self.groups, self.next_start = self.next_start, self.next_start, groups, None
        for _ in range(first):                  # placeholders that a resumed pass skips
            groups.append((0, True, 0))
            yield []
        batches = (batch for batch in self.draw_batches() if self.count(batch))     # one without samples counts nothing
        for group in chunked(islice(batches, consumed, None), self.world_size):
            sizes = [self.count(batch) for batch in group]
            even = len(group) == self.world_size and len(set(sizes)) == 1
            groups.append((sum(sizes), even, sizes[self.rank] if self.rank < len(group) else 0))
            yield group[min(self.rank, len(group) - 1)]

    def sample_counts(self, first: int, number: int) -> tuple[int, bool, int] | None:
        """Count the samples in the `number` batches of each process from batch `first` of the run's current pass on.

        Returns the samples of all processes, whether each has equally many, and the samples of this process. Returns
        None where those batches were not drawn in this pass.
        """
        groups = self.groups[first:first + number]
        if len(groups) < number:
            return None
        if number == 1:                 # the usual case, in every step
            return groups[0]
        return sum(total for total, _, _ in groups), all(even for _, even, _ in groups), sum(own for *_, own in groups)

    def is_filler(self, index: int) -> bool:
        """Return whether this process's batch `index` of the run's current pass is a filler."""
        return index < len(self.groups) and self.groups[index][2] == 0

    def draw_batches(self) -> Iterator[Any]:
        """Yield the batches of all processes, drawn with random numbers that depend only on seed and epoch.

        The state of the global random-number generators, and of the loader's, is the same before and after.
        """
        if self.seed is None:
            yield from self.batches
            return
        sampling_state, batches = None, None
        while True:
            state_before = self.rng_state()
            if sampling_state is None:
                self.seed_generators(self.seed + self.epoch)
            else:
                self.set_rng_state(sampling_state)
            try:
                batches = batches or iter(self.batches)
                drawn = list(islice(batches, 1024))         # many at once, since switching the state takes time
                sampling_state = self.rng_state()
            finally:
                self.set_rng_state(state_before)
            if not drawn:
                return
            yield from drawn

    def rng_state(self) -> tuple[Any, list[Any]]:
        return host_rng_state(), [generator.get_state() for generator in loader_generators([self.loader])]

    def set_rng_state(self, state: tuple[Any, list[Any]]) -> None:
        set_host_rng_state(state[0])
        for generator, generator_state in zip(loader_generators([self.loader]), state[1], strict=True):
            generator.set_state(generator_state)

    def seed_generators(self, seed: int) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        for generator in (torch.default_generator, *loader_generators([self.loader])):
            generator.manual_seed(seed % 2**63)
