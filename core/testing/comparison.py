"""Compare the results of two runs, or the data of a class at two times, and describe the first difference."""
from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Mapping
from copy import deepcopy
from math import isnan
from pathlib import Path
from typing import Any

from torch import Tensor

from loopctl.errors import one_line
from loopctl.model.own_names import own_state_dict
from loopctl.optim.fast_step import without_dynamo_wrappers
from loopctl.run import Run


def run_result(run: Run, measured: Collection[str]) -> dict[str, Any]:
    """Return history, stop reason, weights and optimizer state of a run, without the metrics named in `measured`."""
    history = [{name: value for name, value in row.items() if name not in measured} for row in run.history]
    with without_dynamo_wrappers():
        optimizer = run.optimizer.state_dict()
    return {"history": history, "stop": run.stop, "model": own_state_dict(run.model), "optimizer": optimizer}


def first_difference(one: Any, other: Any, where: str = "") -> str:
    """Describe where two nested values first differ; empty if they are the same to the last bit.

    where: the path of the values, such as `history[0]`
    """
    items: Any = ()
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if unmatched := [*map(str, one.keys() ^ other.keys())]:
            return f"{where or 'the result'} has {min(unmatched)} in only one of the two cases"
        items = [(f"{where}[{key!r}]" if where else str(key), one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple | deque) and isinstance(other, list | tuple | deque):
        if len(one) != len(other):
            return f"{where} has {len(one)} items and {len(other)} items"
        items = [(f"{where}[{index}]", *both) for index, both in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape == other.shape and one.dtype == other.dtype and bool(((one == other) | (one != one)).all()):
            return ""
        return f"{where} has different values"
    elif type(one) is type(other) and (one == other or (isinstance(one, float) and isnan(one) and isnan(other))):
        return ""
    else:
        return f"{where} is {one_line(one)[:60]} and {one_line(other)[:60]}"
    return next((found for path, a, b in items if (found := first_difference(a, b, path))), "")


def class_data(cls: type) -> dict[str, Any]:
    """Return a copy of the plain data that the instances of a class share: on the class and in its module, by path."""
    kinds = [kind for kind in cls.__mro__ if kind.__module__.partition(".")[0] not in ("builtins", "torch", "typing")]
    places: dict[str, Any] = {kind.__qualname__: vars(kind) for kind in kinds}
    places[cls.__module__] = getattr(sys.modules.get(cls.__module__), "__dict__", {})
    return {f"{place}.{name}": deepcopy(value) for place, values in places.items() for name, value in values.items()
            if not name.startswith("__") and is_data(value)}


def is_data(value: Any) -> bool:
    """Whether `value` is a number, text, path or tensor, or a container of such values."""
    if isinstance(value, Mapping):
        return all(map(is_data, value.values()))
    if isinstance(value, list | tuple | set | frozenset | deque):
        return all(map(is_data, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes | Path | Tensor)
