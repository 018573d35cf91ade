"""Batches of any nesting of tensors: map over them, move them to a device, count their samples, group them."""
from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import torch

TARGETS = ("labels", "label", "targets", "target")      # entries of a dict that are what the model should return


def map_nested(function: Callable[..., Any], *batches: Any, is_leaf: Callable[[Any], bool] | None = None) -> Any:
    """Return the nesting that `batches` share, with each leaf replaced by `function` of the batches' leaves there.

    Mappings, lists, tuples, and instances of dataclasses and attrs classes are descended into; everything else is a
    leaf. They keep their type and their other attributes, and `batches` are not changed. A mapping that can neither be
    copied nor built from its items becomes a dict.
    is_leaf: called with an element of the first batch; true means not to descend into it.
    """
    first = batches[0]
    if is_leaf and is_leaf(first):
        return function(*batches)
    if isinstance(first, list | tuple):
        inner = [map_nested(function, *items, is_leaf=is_leaf) for items in zip(*batches, strict=True)]
        return inner if type(first) is list else tuple(inner) if type(first) is tuple else with_elements(first, inner)
    if isinstance(first, Mapping):
        items = {key: map_nested(function, *(batch[key] for batch in batches), is_leaf=is_leaf) for key in first}
        return items if type(first) is dict else with_items(first, items)
    names = attribute_names(first)
    if names is None:
        return function(*batches)
    result = copy.copy(first)       # not by the constructor, which may change the values again
    for name in names:
        value = map_nested(function, *(getattr(batch, name) for batch in batches), is_leaf=is_leaf)
        object.__setattr__(result, name, value)                 # also if the class is frozen
    return result


def with_elements(sequence: Any, elements: list[Any]) -> Any:
    """Return a list or tuple of the type of `sequence`, with its attributes, and other elements."""
    if isinstance(sequence, list):
        result = copy.copy(sequence)
        list.__setitem__(result, slice(None), elements)
        return result
    try:
        result = tuple.__new__(type(sequence), elements)        # also if the type has a constructor of its own
    except TypeError:               # a struct sequence, such as what torch.max returns
        return type(sequence)(elements)
    if hasattr(sequence, "__dict__"):
        vars(result).update(vars(sequence))
    return result


def with_items(mapping: Any, items: dict[Any, Any]) -> Any:
    """Return a mapping of the type of `mapping`, with its attributes, and other items; a dict if there is no way to."""
    with suppress(Exception):       # a class that was not made for it may raise anything
        if isinstance(mapping, dict | UserDict):        # a copy of another class may share its items with the original
            result: Any = copy.copy(mapping)
            if getattr(mapping, "__dict__", None) is mapping:   # its items are its attributes
                result.__dict__ = result
            for key, value in items.items():
                result[key] = value
            return result
    with suppress(Exception):
        result = type(mapping)(items)
        if all(result[key] is value for key, value in items.items()):
            return result
    return items


def attribute_names(value: Any) -> Iterable[str] | None:
    """Return the names of the fields and other attributes of an instance of a dataclass or attrs class, else None."""
    kind = type(value)
    if dataclasses.is_dataclass(kind):
        fields: Any = dataclasses.fields(kind)
    elif (fields := getattr(kind, "__attrs_attrs__", None)) is None:
        return None
    names = [field.name for field in fields if hasattr(value, field.name)]
    return dict.fromkeys([*names, *getattr(value, "__dict__", ())])


def to_device(batch: Any, device: torch.device) -> Any:
    """Return `batch` with every tensor in it on `device`. The batch itself is not changed.

    An object with a `to` method is moved by that method. A copy from pinned memory to a GPU is asynchronous.
    """
    def move_leaf(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.to(device, non_blocking=device.type == "cuda")
        return moved_copy(leaf, device) if has_to_method(leaf) else leaf

    return map_nested(move_leaf, batch, is_leaf=has_to_method)


def moved_copy(leaf: Any, device: torch.device) -> Any:
    """Return what the `to` method of a copy of `leaf` returns, as such a method may change its object in place."""
    with suppress(Exception):       # it has no copy
        leaf = copy.copy(leaf)
    moved = leaf.to(device)
    return leaf if moved is None else moved


def has_to_method(batch: Any) -> bool:
    return hasattr(batch, "to")


def batches_to_device(batches: Iterable[Any], device: torch.device) -> Iterable[Any]:
    """Move each batch to `device` as it is read. For the CPU, `batches` is returned unchanged."""
    return batches if device.type == "cpu" else OnDevice(batches, device)


class OnDevice:
    """An iterable of the batches of `on_host`, each moved to `device` when it is read."""

    def __init__(self, on_host: Iterable[Any], device: torch.device) -> None:
        self.on_host, self.device = on_host, device

    def __iter__(self) -> Iterator[Any]:
        return (to_device(batch, self.device) for batch in self.on_host)


def sample_count(batch: Any) -> int:
    """Return the number of samples in a batch: the length of its first tensor, or 1 if it has no tensor."""
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch      # fast path for (input, target)
    if not isinstance(first, torch.Tensor):
        first = next(iter_tensors(batch), None)
    return 1 if first is None or first.ndim == 0 else first.shape[0]


def is_image_batch(value: Any) -> bool:
    """Whether a value is a batch of images: a floating-point tensor of shape (N, C, H, W)."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 4


def iter_tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, list | tuple):
        for part in batch:
            yield from iter_tensors(part)
    elif isinstance(batch, Mapping):
        yield from iter_tensors(list(batch.values()))
    else:
        for name in attribute_names(batch) or ():
            yield from iter_tensors(getattr(batch, name))


def target_name(batch: Mapping[str, Any]) -> str | None:
    """The name of the entry of a dict that is the target, or None."""
    return next((name for name in TARGETS if name in batch), None)


def target_of(batch: Any) -> Any:
    """What metrics compare the outputs with: the second of a pair, the target of a dict, otherwise the whole batch."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[1]
    name = target_name(batch) if isinstance(batch, Mapping) else None
    return batch if name is None else batch[name]


def loader_name(name: str) -> str:
    """The name of the loader of the validation set `name`; that of a single one is ""."""
    return f"valid.{name}" if name else "valid"


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
