"""What the loop does with batches, whatever they are made of."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch


def move(batch: Any, device: torch.device) -> Any:
    """`batch` with every tensor in it on `device`; any nesting of mappings, sequences and dataclasses.

    What has a `to` method moves itself. From pinned memory to a GPU the copy does not wait.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return type(batch)({key: move(value, device) for key, value in batch.items()})   # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move(value, device) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **{field.name: move(getattr(batch, field.name), device)
                                             for field in dataclasses.fields(batch) if field.init})
    return batch


def moved(batches: Iterable[Any], device: torch.device) -> Iterable[Any]:
    """`batches` on `device`. On the CPU they are there already."""
    return batches if device.type == "cpu" else (move(batch, device) for batch in batches)


def samples(batch: Any) -> int:
    """How many samples a batch holds: the length of its first tensor. A batch without a tensor counts 1."""
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch      # (input, target) is found at once
    if not isinstance(first, torch.Tensor):
        first = next(tensors(batch), None)
    return 1 if first is None or first.ndim == 0 else first.shape[0]


def tensors(batch: Any) -> Iterator[torch.Tensor]:
    """The tensors of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from tensors(getattr(batch, field.name))
    elif isinstance(batch, Mapping):
        yield from tensors(list(batch.values()))
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from tensors(part)


def known_length(batches: Any) -> int | None:
    """How many batches there are, or None: a DataLoader may have a length and refuse to tell it."""
    try:
        return len(batches)
    except TypeError:
        return None


def grouped(batches: Iterable[Any], every: int) -> Iterator[list[Any]]:
    """Lists of `every` batches; the last holds what is left."""
    batches = iter(batches)
    while group := list(islice(batches, every)):
        yield group
