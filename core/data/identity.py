"""What identifies the data of a run, so that it is not resumed with other data: lengths, batch size, limit, classes."""
from __future__ import annotations

from typing import Any

from loopctl.data.batch import length_or_none
from loopctl.data.limits import find_limit


def data_identity(source: Any) -> dict[str, Any]:
    """Return the batch size, number of samples, limit and classes of a loader; None for no limit and the unknown."""
    dataset, limit = getattr(source, "dataset", None), find_limit(source)
    return {"batch_size": plain_number(getattr(source, "batch_size", None)), "samples": length_or_none(dataset),
            "limit": str(limit.limit) if limit else None, "classes": class_names(dataset)}


def plain_number(value: Any) -> int | None:
    return value if type(value) is int else None


def class_names(dataset: Any) -> list[str] | None:
    """The names of a data set's classes by their number, also of a data set within another, or None.

    They are in its attribute `classes`, as in torchvision's data sets, or in `class_to_idx`, a dict of numbers by name.
    """
    for _ in range(10):                             # a Subset of a Subset, and so on
        numbers = getattr(dataset, "class_to_idx", None)
        if isinstance(numbers, dict) and all(isinstance(number, int) for number in numbers.values()):
            return [str(name) for name in sorted(numbers, key=numbers.__getitem__)]
        classes = getattr(dataset, "classes", None)
        if isinstance(classes, list | tuple):
            return [str(name) for name in classes]
        inner = getattr(dataset, "dataset", None)
        dataset = inner if inner is not None else next(iter(getattr(dataset, "datasets", [])), None)
        if dataset is None:
            break
    return None
