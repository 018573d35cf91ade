"""Batches of any nesting of tensors: map over them, move them to a device, count their samples, group them."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch


def map_nested(function: Callable[..., Any], *batches: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return the nesting that `batches` share, with each leaf replaced by `function` of the batches' leaves there.

    Mappings, sequences and dataclasses are descended into; everything else is a leaf.
    is_leaf: called with an element of the first batch; true means not to descend into it.
    """
    first = batches[0]
    if is_leaf and is_leaf(first):
        return function(*batches)
    if isinstance(first, Mapping):
        return type(first)({key: map_nested(function, *(batch[key] for batch in batches), is_leaf=is_leaf)
                            for key in first})   # type: ignore[call-arg]
    if isinstance(first, list | tuple):
        inner = [map_nested(function, *items, is_leaf=is_leaf) for items in zip(*batches, strict=True)]
        return type(first)(*inner) if hasattr(first, "_fields") else type(first)(inner)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        return dataclasses.replace(first, **{
            field.name: map_nested(function, *(getattr(batch, field.name) for batch in batches), is_leaf=is_leaf)
            for field in dataclasses.fields(first) if field.init})
    return function(*batches)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor in it on `device`.

    An object with a `to` method is moved by that method. A copy from pinned memory to a GPU is asynchronous.
    """
    def move_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.to(device, non_blocking=device.type == "cuda")
        return leaf.to(device) if has_to_method(leaf) else leaf

    return map_nested(move_leaf, batch, is_leaf=has_to_method)


def has_to_method(batch: Any) -> bool:
    return hasattr(batch, "to")


def batches_to_device(batches: Iterable[Any], device: torch.device) -> Iterable[Any]:
    """Move each batch to `device` as it is read. For the CPU, `batches` is returned unchanged."""
    return batches if device.type == "cpu" else (to_device(batch, device) for batch in batches)


def sample_count(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its first tensor, or 1 if it has no tensor."""
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch      # fast path for (input, target)
    if not isinstance(first, torch.Tensor):
        first = next(iter_tensors(batch), None)
    return 1 if first is None or first.ndim == 0 else first.shape[0]


def apply_weight(loss: torch.Tensor, weight: Any) -> torch.Tensor:
    """Multiply `loss` by the weight of its micro-batch in the step. A weight of 1.0 returns `loss` itself."""
    return loss if isinstance(weight, float) and weight == 1 else loss * weight


def iter_tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from iter_tensors(getattr(batch, field.name))
    elif isinstance(batch, Mapping):
        yield from iter_tensors(list(batch.values()))
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from iter_tensors(part)


def length_or_none(batches: Any) -> int | None:
    """Return `len(batches)`, or None where it raises TypeError, as for a DataLoader over an IterableDataset."""
    try:
        return len(batches)
    except TypeError:
        return None


def chunked(batches: Iterable[Any], every: int) -> Iterator[list[Any]]:
    """Yield lists of `every` batches; the last list may be shorter."""
    batches = iter(batches)
    while group := list(islice(batches, every)):
        yield group
