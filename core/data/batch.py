"""What the loop does with batches, whatever they are made of."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch


def map_nested(function: Callable[..., Any], *batches: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """The nesting of mappings, sequences and dataclasses that `batches` share, with `function` of their leaves in it.

    is_leaf: whether to go no deeper; what is no such nesting is a leaf in any case.
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
    """`batch` with every tensor in it on `device`.

    What has a `to` method moves itself. From pinned memory to a GPU the copy does not wait.
    """
    def move_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.to(device, non_blocking=device.type == "cuda")
        return leaf.to(device) if has_to_method(leaf) else leaf

    return map_nested(move_leaf, batch, is_leaf=has_to_method)


def has_to_method(batch: Any) -> bool:
    return hasattr(batch, "to")


def batches_to_device(batches: Iterable[Any], device: torch.device) -> Iterable[Any]:
    """`batches` on `device`. On the CPU they are there already."""
    return batches if device.type == "cpu" else (to_device(batch, device) for batch in batches)


def sample_count(batch: Any) -> int:
    """How many samples a batch holds: the length of its first tensor. A batch without a tensor counts 1."""
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch      # (input, target) is found at once
    if not isinstance(first, torch.Tensor):
        first = next(iter_tensors(batch), None)
    return 1 if first is None or first.ndim == 0 else first.shape[0]


def apply_weight(loss: torch.Tensor, weight: Any) -> torch.Tensor:
    """`loss` times the weight of its micro-batch in the step, unless that is all of it: then there is nothing to do."""
    return loss if isinstance(weight, float) and weight == 1 else loss * weight


def iter_tensors(batch: Any) -> Iterator[torch.Tensor]:
    """The tensors of a batch, in order."""
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
    """How many batches there are, or None: a DataLoader may have a length and refuse to tell it."""
    try:
        return len(batches)
    except TypeError:
        return None


def chunked(batches: Iterable[Any], every: int) -> Iterator[list[Any]]:
    """Lists of `every` batches; the last holds what is left."""
    batches = iter(batches)
    while group := list(islice(batches, every)):
        yield group
