"""Limits: train or validate on the first batches of a pass only, with `limited`, or on the same few with `overfit`."""
from __future__ import annotations

import re
from collections.abc import Iterator
from copy import copy
from itertools import islice
from typing import Any

from loopctl.errors import UsageError

# torch is imported where it is used: the command line reads limits without it.


def limited(data: Any, limit: int | str) -> Any:
    """Return `data` with the first batches of each pass only: so many, or a percentage of them, such as `"10%"`.

    The batches are those that a pass over `data` begins with, in the same order. `data` itself is not changed: a
    DataLoader is copied, with a limited batch sampler. A percentage is rounded down, to at least one batch. Where
    several processes share the data, a number of batches counts for each of them.

    data: a DataLoader, a list, or another iterable of batches that starts anew in each pass; or a dict of such by name

    Raises UsageError for another limit, and for a percentage of data whose length is unknown.
    """
    parse_limit(limit)
    if isinstance(data, dict):
        return {name: limited(part, limit) for name, part in data.items()}
    if isinstance(data, Iterator):
        raise UsageError(f"limited: the data is a {type(data).__name__}, which can be read once only; pass a "
                         "DataLoader or a list")
    if not draws_indices(data):
        return Limited(data, limit)
    return with_batch_sampler(data, Limited(data.batch_sampler, limit))


def overfit(data: Any, number: int) -> Any:
    """Return `data` with its first `number` batches only, the same ones in each epoch: a DataLoader is not shuffled.

    A model that is right and trained well learns these batches by heart. Pass the result as `valid` too. Random
    transforms of the data set stay random.

    Raises UsageError for a DataLoader with a batch sampler of its own.
    """
    from torch.utils.data import BatchSampler, SequentialSampler

    if draws_indices(data):
        if type(data.batch_sampler) is not BatchSampler:
            raise UsageError("overfit: the loader has a batch sampler of its own, "
                             f"{type(data.batch_sampler).__name__}, whose order is unknown; pass a DataLoader with a "
                             "batch_size, or a list of batches")
        in_order = SequentialSampler(data.dataset)
        data = with_batch_sampler(data, BatchSampler(in_order, data.batch_size, data.drop_last), sampler=in_order)
    return limited(data, number)


class Limited:
    """The first batches of a sequence of batches, which hold samples or indices. Its other attributes are those of
    the sequence, but it has no `state_dict`: its state would be that of the whole pass.

    batches: the sequence, which starts anew in each iteration
    limit: a number of batches, or a percentage of them
    world_size: the number of processes that share the batches, each of which has the number of batches that `limit` is
    """

    def __init__(self, batches: Any, limit: int | str, world_size: int = 1) -> None:
        self.batches, self.limit, self.world_size = batches, limit, world_size
        if str(limit).endswith("%"):
            len(self)                   # raises where the length is unknown

    def __len__(self) -> int:
        number, is_percentage = parse_limit(self.limit)
        try:
            length = len(self.batches)
        except TypeError as error:
            if is_percentage:
                raise UsageError(f"limit {self.limit}: the length of the data is unknown; pass a number of batches"
                                 ) from error
            return int(number) * self.world_size
        return min(length, max(1, int(length * number / 100)) if is_percentage else int(number) * self.world_size)

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), len(self))

    def __getattr__(self, name: str) -> Any:
        if name in ("batches", "state_dict", "load_state_dict") or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.batches, name)

    @property
    def cuts(self) -> bool:
        """Whether batches are left out."""
        return len(self) < len(self.batches)


def parse_limit(limit: int | str) -> tuple[float, bool]:
    """Return the number of a limit, and whether it is a percentage. Raises UsageError for what is no limit."""
    found = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+(?=%))?)(%?)", str(limit))
    number, is_percentage = (float(found[1]), bool(found[2])) if found and not isinstance(limit, bool) else (0.0, False)
    if not number > 0 or (is_percentage and number > 100):
        raise UsageError("a limit is a number of batches, at least 1, or a percentage of them, such as 10%, not "
                         f"{limit!r}")
    return number, is_percentage


def limited_per_process(data: Any, world_size: int) -> Any:
    """Return `data`, which `world_size` processes will share; of limited data so many times the batches."""
    part = data if isinstance(data, Limited) else getattr(data, "batch_sampler", None)
    if not isinstance(part, Limited):
        return data
    wider = Limited(part.batches, part.limit, world_size)
    return wider if part is data else with_batch_sampler(data, wider)


def find_limit(data: Any) -> Limited | None:
    """Return what limits `data`, which may be sharded, or None."""
    for part in (data, getattr(data, "batch_sampler", None)):
        while part is not None and not isinstance(part, Limited):
            part = getattr(part, "batches", None)           # of a Shard
        if part is not None:
            return part
    return None


def draws_indices(data: Any) -> bool:
    """Return whether `data` is a DataLoader that draws batches of indices."""
    from torch.utils.data import DataLoader, IterableDataset

    return (isinstance(data, DataLoader) and data.batch_sampler is not None
            and not isinstance(data.dataset, IterableDataset))


def with_batch_sampler(loader: Any, batch_sampler: Any, **changes: Any) -> Any:
    """Return a copy of a DataLoader with another batch sampler, and other attributes."""
    loader = copy(loader)                   # the user's own loader is not changed
    vars(loader).update(batch_sampler=batch_sampler, _iterator=None, **changes)
    return loader
