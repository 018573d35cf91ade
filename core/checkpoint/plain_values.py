"""What a checkpoint can hold: tensors, numbers, text, and containers of them; these describe other common values.

torch.save writes any object, but `torch.load(weights_only=True)`, which never runs code, reads only some back. So every
value is looked at before it is written: `describe` returns the value itself, a description that `restore_value` turns
into the same value again, or raises UsageError with the name of its owner.
"""
from __future__ import annotations

import io
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loopctl.errors import UsageError

MARK = "loopctl value"
# What torch reads back as it was, by exact type: a subclass would be another class.
VALUES: set[type] = {type(None), bool, int, float, complex, str, bytes, bytearray,
                     torch.Size, torch.dtype, torch.device, torch.layout}
SEQUENCES = {list, tuple, set}
MAPPINGS = {dict, OrderedDict, Counter}
FACTORIES = {factory.__name__: factory for factory in (int, float, list, dict, set, str)}         # of a defaultdict


def describe(value: Any, owner: str) -> Any:
    """Return `value` as a checkpoint can hold it. Raises UsageError, which starts with `owner`, where it cannot."""
    kind = type(value)
    if kind in (bytes, bytearray) and not value:        # which torch writes as calls of their types
        return {MARK: kind.__name__}
    if kind in VALUES:
        return value
    if isinstance(value, Tensor):
        return value if is_readable(value, owner) else None
    if kind in SEQUENCES:
        return kind(describe(item, owner) for item in value)
    if kind in MAPPINGS:
        items = {describe_key(key, owner): describe(item, owner) for key, item in value.items()}
        return kind(items)
    if isinstance(value, np.ndarray | np.generic) and kind.__module__ == "numpy" and value.dtype.kind in "biufcSUmM":
        array = np.asarray(value)
        return {MARK: "numpy", "dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes() or None,
                "scalar": isinstance(value, np.generic)}
    if kind is deque:
        return {MARK: "deque", "items": [describe(item, owner) for item in value], "maxlen": value.maxlen}
    if kind is defaultdict and getattr(value.default_factory, "__name__", "") in FACTORIES:
        return {MARK: "defaultdict", "factory": value.default_factory.__name__, "items": describe(dict(value), owner)}
    if kind is frozenset:
        return {MARK: "frozenset", "items": [describe(item, owner) for item in value]}
    if isinstance(value, PurePath):
        return {MARK: "path", "text": str(value)}
    if isinstance(value, range):
        return {MARK: "range", "bounds": [value.start, value.stop, value.step]}
    if reads_back(value):
        return value
    raise UsageError(f"{owner}: its state has a {kind.__module__}.{kind.__qualname__}; a checkpoint holds tensors, "
                     "numbers, text, None, and lists, tuples and dicts of them")


def describe_key(key: Any, owner: str) -> Any:
    """A key of a dict: numpy's numbers become Python's, which are equal to them and have the same hash."""
    return key.item() if isinstance(key, np.generic) else describe(key, owner)


def restore_value(content: Any) -> Any:
    """Return the value that `describe` has described. Raises ValueError for a description that it does not make."""
    kind = type(content)
    if kind in SEQUENCES:
        return kind(restore_value(item) for item in content)
    if kind not in MAPPINGS:
        return content
    if MARK not in content:
        return kind({key: restore_value(item) for key, item in content.items()})
    what, items = content[MARK], content.get("items")
    if what == "numpy":
        dtype = np.dtype(content["dtype"])
        if dtype.kind not in "biufcSUmM":
            raise ValueError(f"an array of {dtype}")
        array = np.frombuffer(content["data"] or b"", dtype).reshape(content["shape"]).copy()
        return array[()] if content["scalar"] else array
    if what in ("bytes", "bytearray"):
        return b"" if what == "bytes" else bytearray()
    if what == "deque":
        return deque(map(restore_value, items), content["maxlen"])
    if what == "defaultdict":
        return defaultdict(FACTORIES[content["factory"]], restore_value(items))
    if what == "frozenset":
        return frozenset(map(restore_value, items))
    if what == "path":
        return Path(content["text"])
    if what == "range":
        return range(*content["bounds"])
    raise ValueError(f"a description of {what!r}")


def is_readable(tensor: Tensor, owner: str) -> bool:
    """Whether torch reads a tensor back; known for dense ones, and tried once for every other kind.

    Raises UsageError where it does not.
    """
    if type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided and not tensor.is_quantized:
        return True
    if reads_back(tensor):
        return True
    raise UsageError(f"{owner}: its state has a {type(tensor).__qualname__} with layout {tensor.layout}, which cannot "
                     "be read back from a checkpoint")


def reads_back(value: Any) -> bool:
    """Whether torch can write a value and read it back without running code; tried once per kind of value."""
    kind = (type(value), getattr(value, "layout", None), getattr(value, "dtype", None))
    if kind not in TRIED:
        stream = io.BytesIO()
        try:
            torch.save(value, stream)
            with warnings.catch_warnings(action="ignore"):
                TRIED[kind] = type(torch.load(io.BytesIO(stream.getvalue()), weights_only=True)) is type(value)
        except Exception:               # whatever it is, the value cannot be saved and read
            TRIED[kind] = False
    return TRIED[kind]


TRIED: dict[Any, bool] = {}             # by kind of value, whether torch reads it back
