"""Select parameters of a model by name: globs, regular expressions, and names of modules."""
from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from loopctl.errors import UsageError, one_line
from loopctl.model.own_names import own_parameters


def matching_parameters(model: nn.Module, patterns: Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """Return, by pattern, the parameters of `model` that it matches, in the model's order.

    A pattern is a glob for the whole name of a parameter (`conv1.*`) or of a module, which matches all its parameters
    (`layer1`), or a regular expression that is searched for in the parameter's name (`/^layer[12]\\./`).
    Raises UsageError if a pattern matches no parameter or is not a regular expression.
    """
    # With duplicates, so that a parameter shared by two modules matches under both names.
    named = list(own_parameters(model, remove_duplicate=False).items())
    found = {}
    for pattern in patterns:
        found[pattern] = list(dict.fromkeys(parameter for name, parameter in named if matches(name, pattern)))
        if not found[pattern]:
            starts = list(dict.fromkeys(name.partition(".")[0] for name, _ in named))
            some = ", ".join(starts[:8]) + (" ..." if len(starts) > 8 else "")
            raise UsageError(f"no parameter matches {pattern!r}; the model's parameters start with {some}")
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` matches the parameter called `name`."""
    if len(pattern) > 2 and pattern.startswith("/") and pattern.endswith("/"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")              # refuse syntax whose meaning will change in a later Python
                return re.search(pattern[1:-1], name) is not None
        except (re.error, OverflowError, RecursionError, FutureWarning) as error:
            raise UsageError(f"{pattern!r} is not a regular expression ({one_line(error)})") from error
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
