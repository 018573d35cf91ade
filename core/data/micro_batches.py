"""The micro-batches of a step: read in advance as a list, or each when it is its turn where their sizes are known.

Where plugins transform training batches, that happens when a micro-batch is read.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    default_collate,
)

from loopctl.data.batch import sample_count, target_of
from loopctl.data.device_loader import DeviceLoader
from loopctl.errors import UsageError, names

if TYPE_CHECKING:
    from loopctl.run import Run

SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler)      # their length is true


class MicroBatches(Sequence[Any]):
    """The micro-batches of one step, of known weights. Each is read from `batches` when it is asked for first.

    So reading one comes after the forward and backward pass of the one before, as in a loop written by hand: random
    numbers that the data draws are in the same order, and the batches to come take no memory.
    """

    def __init__(self, batches: Iterator[Any], weights: list[Any]) -> None:
        self.batches, self.weights = batches, weights
        self.read: list[Any] = []
        self.seconds = 0.0              # spent on reading

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        while len(self.read) <= number:
            self.read.append(self.read_next())
        return self.read[number]

    def read_next(self) -> Any:
        start = perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += perf_counter() - start


class TransformedBatches(MicroBatches):
    """The micro-batches of one step as the plugins at `transform_batch` return them, each when it is asked for first.

    targets: of each that was read, what metrics compare the outputs with; None for the batch's own targets
    """

    def __init__(self, run: Run, source: Sequence[Any], weights: list[Any]) -> None:
        super().__init__(iter(source), weights)
        self.run, self.source = run, source
        self.targets: list[Any] = []

    def __len__(self) -> int:
        return len(self.source)

    def read_next(self) -> Any:
        batch = super().read_next()
        self.run.metric_target = None
        changed = self.run.hook.transform_batch(run=self.run, batch=batch)
        self.targets.append(self.run.metric_target)
        if self.weights and (samples := sample_count(batch)) != (now := sample_count(changed)):
            plugins = names(self.run.hook.acting["transform_batch"])
            raise UsageError(f"transform_batch of {plugins} changed the number of samples from {samples} to {now}; "
                             "leave out keeps_sample_count = True")
        return changed


def transform_batches(run: Run) -> TransformedBatches:
    """Return the micro-batches in `run.batches` as plugins transform them.

    Each is transformed when it is read, as in a loop written by hand, unless its weight is known only then.
    """
    source = run.batches
    if not weighing_plugins(run):
        weights: list[Any] = source.weights if isinstance(source, MicroBatches) else [
            run.hook.batch_weight(run=run, batch=batch) for batch in source]
        return TransformedBatches(run, source, weights)
    run.batches = transformed = TransformedBatches(run, source, [])
    transformed.weights = [run.hook.batch_weight(run=run, batch=batch) for batch in transformed]
    return transformed


def metric_target(run: Run, batch: Any) -> Any:
    """What metrics compare the outputs for one micro-batch of the step with."""
    if type(run.batches) is TransformedBatches:
        for transformed, target in zip(run.batches.read, run.batches.targets, strict=True):
            if transformed is batch and target is not None:
                return target
    return target_of(batch)


def weighing_plugins(run: Run) -> list[str]:
    """The plugins because of which a training batch may weigh something else than the number of samples read."""
    return [*(name for name in run.hook.acting["batch_weight"] if run.hook.plugins[name] is not run.parallel),
            *(name for name in run.hook.acting["transform_batch"]
              if not getattr(run.hook.plugins[name], "keeps_sample_count", False))]


def grouped(run: Run, batches: Iterable[Any], every: Callable[[int], int]) -> Iterator[Sequence[Any]]:
    """Yield the micro-batches of each step; the last step of an epoch may have fewer.

    every: returns their number for a step of the run, which is numbered by updates made and skipped
    """
    sizes, iterator = known_sizes(run, batches), iter(batches)
    steps, start = count(run.attempts), run.seen_in_epoch       # counted here: `prefetch` asks for a step in advance
    if sizes is None:
        while group := list(islice(iterator, every(next(steps)))):
            yield group
        return
    while start < len(sizes):
        end = start + every(next(steps))
        known = MicroBatches(iterator, sizes[start:end])
        yield known
        known[len(known) - 1]           # read, also if the step did not need it
        start = end
    next(iterator, None)                # the end: of a resumed epoch without a batch left, this is its only reading


def known_sizes(run: Run, batches: Iterable[Any]) -> list[int] | None:
    """The number of samples of each batch of the epoch, where it is known without reading and is what a batch weighs.

    None for data other than a plain DataLoader, and where a plugin weighs batches or changes their number of samples.
    """
    loader = run.loaders.get("train")
    if loader is None or weighing_plugins(run) or getattr(batches, "on_host", batches) is not loader:
        return None
    source: Any = loader.source
    collate = getattr(source, "collate_fn", None)
    if (type(source) not in (DataLoader, DeviceLoader) or type(source.batch_sampler) is not BatchSampler
            or type(source.batch_sampler.sampler) not in SAMPLERS
            or not (collate is default_collate or getattr(collate, "keeps_sample_count", False))):
        return None
    sampler: Any = source.batch_sampler.sampler
    samples, size = len(sampler), source.batch_sampler.batch_size
    rest = samples % size
    return [size] * (samples // size) + [rest] * bool(rest and not source.batch_sampler.drop_last)
