"""Metrics by name for `--metric`: a few of loopctl's own, torchmetrics' where it is installed, or `file.py:name`."""
from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from loopctl.cli.specs import names_in_source, resolve, with_options
from loopctl.composition.options import Option
from loopctl.errors import UsageError

OWN = ("accuracy", "mae", "perplexity", "r2", "rmse", "top5")

# The option that every metric has, besides its own: the name under which it is reported.
COMMON_OPTIONS = {"name": Option("name", str, "", "")}


def known_names() -> list[str]:
    """The names of all metrics, found without importing torch."""
    return sorted([*OWN, *torchmetrics_names()])


def torchmetrics_names() -> list[str]:
    """The names of torchmetrics' classes, read from its source; none where it is not installed."""
    return names_in_source("torchmetrics", ".", r'^    "([A-Z]\w+)",$')


def make(specs: Sequence[str], classes: int | None) -> dict[str, Any]:
    """Return the metrics that `specs` name, by the names under which they are reported.

    A class is instantiated with the options, a function gets them as keyword arguments. A class is passed
    `num_classes`, the number of `classes` of the data, if it has an argument of this name. Raises UsageError.
    """
    found: dict[str, Any] = {}
    for spec in specs:
        name, metric = make_one(spec, classes)
        if name in found:
            raise UsageError(f"--metric {spec}: there is another metric called {name}; give this one a name of its "
                             f"own, as in {spec}{',' if '=' in spec else ':'}name=second")
        found[name] = metric
    return found


def make_one(spec: str, classes: int | None) -> tuple[str, Any]:
    theirs = torchmetrics_names()
    numbered = re.match(r"top[1-9]\d{0,3}(?=:|\Z)", spec)
    known = [*OWN, *([numbered[0]] if numbered and numbered[0] not in OWN else []), *theirs]
    try:
        head, found, options = resolve("metric", spec, lambda: known,
                                       lambda name: own(name) or getattr(import_module("torchmetrics"), name),
                                       COMMON_OPTIONS, is_metric_object)
    except UsageError as error:
        missing = spec[:1].isupper() and not theirs and find_spec("torchmetrics") is None
        raise UsageError(f"{error}; after pip install torchmetrics there are its classes too"
                         if missing else str(error)) from error
    name = options.pop("name", "") or reported_name(head)
    label = f"metric {head}"
    if is_metric_object(found):
        return name, found
    metric = with_options(label, found, options, "output, target", {} if classes is None else {"num_classes": classes})
    if not (callable(metric) or is_metric_object(metric)):
        raise UsageError(f"{label}: an instance of it is no metric; define __call__(output, target), or update, "
                         "compute and reset")
    return name, metric


def is_metric_object(found: Any) -> bool:
    """Whether it keeps a state, as an instance of a class of torchmetrics."""
    from loopctl.metrics.meters import is_stateful_metric

    return not isinstance(found, type) and is_stateful_metric(found)


def own(name: str) -> Callable[..., Any] | None:
    """One of loopctl's own metrics; None for another name."""
    from loopctl.metrics import named

    metrics: dict[str, Any] = {"accuracy": named.accuracy, "mae": named.mae, "perplexity": named.Perplexity,
                               "r2": named.R2, "rmse": named.RMSE}
    return partial(named.top, k=int(name[3:])) if re.fullmatch(r"top\d+", name) else metrics.get(name)


def reported_name(head: str) -> str:
    """The name under which a metric is reported: that of the function or class, F1Score as f1_score."""
    name = re.split(r"[:.]", head)[-1]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "_", name).lower()
