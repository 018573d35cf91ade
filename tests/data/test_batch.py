"""Batches of any nesting: moved to a device, counted, grouped."""
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from loopctl.data.batch import batches_to_device, chunked, length_or_none, sample_count, to_device

Pair = namedtuple("Pair", "x y")
meta = torch.device("meta")      # a device that exists on every machine


@dataclass
class Item:
    x: torch.Tensor
    name: str


def tensors(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, Item):
        batch = [batch.x]
    return [tensor for part in batch for tensor in tensors(part)] if isinstance(batch, list | tuple) else []


x = torch.zeros(4, 2)


@pytest.mark.parametrize("batch", [
    x, (x, x), [x, [x]], {"a": x, "b": {"c": x}}, Pair(x, (x,)), OrderedDict(a=x), Item(x, "n"), (x, "text", 3, None), "text"],
    ids=lambda batch: type(batch).__name__)
def test_to_device_moves_every_tensor_and_keeps_the_nesting(batch):
    moved = to_device(batch, meta)
    assert type(moved) is type(batch)
    assert all(tensor.device == meta for tensor in tensors(moved))
    assert len(tensors(moved)) == len(tensors(batch))


def test_an_object_with_a_to_method_is_moved_by_it():
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(2, 3)])
    assert to_device((packed, x), meta)[0].data.device == meta


def test_batches_to_device_returns_them_unchanged_for_the_cpu():
    batches = [(x, x)]
    assert batches_to_device(batches, torch.device("cpu")) is batches
    assert next(iter(batches_to_device(batches, meta)))[0].device == meta


@pytest.mark.parametrize(("batch", "count"), [
    (x, 4), ((x, torch.zeros(9)), 4), ({"id": "a", "x": x}, 4), ([[], {"a": [x]}], 4), (("text", x), 4), (Item(x, "n"), 4),
    (torch.tensor(3.0), 1), ("text", 1), ((), 1), (None, 1), ({"a": Item(x, "n")}, 4),
])
def test_sample_count_is_the_length_of_the_first_tensor(batch, count):
    assert sample_count(batch) == count


def test_chunked_groups_batches_and_keeps_the_rest():
    assert list(chunked(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunked([], 3)) == []


def test_length_or_none_of_a_loader_without_a_length():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([1])

    assert length_or_none(DataLoader(Stream())) is None
    assert length_or_none(iter([])) is None
    assert length_or_none([1, 2]) == 2
