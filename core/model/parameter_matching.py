"""Patterns that name parameters: globs, regular expressions, and names of modules."""
from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

from loopctl.errors import UsageError, one_line


def matching_parameters(model: nn.Module, patterns: Iterable[str]) -> dict[str, list[nn.Parameter]]:
    """The parameters of `model` that each pattern matches, in the model's order.

    A pattern is a glob of a parameter's whole name (`conv1.*`), or of a module's, which means everything in it
    (`layer1`), or a regular expression, found anywhere in the parameter's name (`/^layer[12]\\./`).
    Raises UsageError for a pattern that matches nothing.
    """
    # A parameter that two modules share is found by both of its names.
    named = list(model.named_parameters(remove_duplicate=False))
    found = {}
    for pattern in patterns:
        found[pattern] = list(dict.fromkeys(parameter for name, parameter in named if matches(name, pattern)))
        if not found[pattern]:
            starts = list(dict.fromkeys(name.partition(".")[0] for name, _ in named))
            some = ", ".join(starts[:8]) + (" ..." if len(starts) > 8 else "")
            raise UsageError(f"no parameter matches {pattern!r}; the model's parameters start with {some}")
    return found


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` means the parameter called `name`."""
    if len(pattern) > 2 and pattern.startswith("/") and pattern.endswith("/"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")              # of what will mean something else one day
                return re.search(pattern[1:-1], name) is not None
        except (re.error, OverflowError, RecursionError, FutureWarning) as error:
            raise UsageError(f"{pattern!r} is not a regular expression ({one_line(error)})") from error
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
