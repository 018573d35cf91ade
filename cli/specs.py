"""What the command line names, a model, a data set or an optimizer: `name:option=value`, or one's own.

One's own is `package.module:factory:option=value` or `path/to/file.py:factory:option=value`.
"""
from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loopctl.composition.discovery import load
from loopctl.composition.options import Option, parse_options, widened
from loopctl.errors import UsageError, nearest, one_line

DEFAULT_PLUGINS = ("csv", "checkpoint", "progress")        # `run` adds them unless told --without

# What an option is read as where its argument is annotated so; by how it is written, for annotations may be text.
TYPES: dict[str, Any] = {inspect.formatannotation(hint): hint
                         for kind in (int, float, bool, str) for hint in (kind, kind | None)}


def resolve(kind: str, spec: str, known: Callable[[], Iterable[str]], get: Callable[[str], Callable[..., Any]],
            more: dict[str, Option] | None = None) -> tuple[str, Callable[..., Any], dict[str, Any]]:
    """The name, the factory and the options that `spec` says.

    known: the names there are. get: the factory of one of them. more: options that are no arguments of a factory.
    Raises UsageError for a name or an option that is none.
    """
    head, _, text = spec.partition(":")
    names = list(known())
    attr, _, rest = text.partition(":")
    if "." in head or (attr.isidentifier() and head not in names):
        if not attr:
            raise UsageError(f"{kind} {head}: name a class or function of it, as in {head}:name")
        head, text = f"{head}:{attr}", rest
        try:
            factory: Any = load(head)
        except UsageError as error:
            raise UsageError(f"{kind} {error}") from error
    elif head not in names:
        raise UsageError(f"no {kind} is called {head!r}; {choices(head, names)}")
    else:
        factory = get(head)
    if not callable(factory):
        raise UsageError(f"{kind} {head} is a {type(factory).__name__}; name a class or a function")
    return head, factory, arguments(f"{kind} {head}", factory, text, more or {})


def choices(word: str, names: list[str]) -> str:
    """The way out of a wrong name: the nearest right one, or those there are, of many the first."""
    few = names if len(names) <= 20 else [*names[:6], f"{len(names) - 6} more"]
    near = nearest(word, names)
    return near if near.endswith("?") else f"there are {', '.join(few)}, or package.module:name"


def arguments(who: str, factory: Callable[..., Any], text: str, more: dict[str, Option]) -> dict[str, Any]:
    """The options in `text`, each an argument of `factory`, of its annotated type or else of what it looks like, or one
    of `more`."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError as error:                 # some that are written in C
        raise UsageError(f"{who}: {one_line(error)}; name a function of your own that calls it") from error
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    types = {name: TYPES.get(inspect.formatannotation(p.annotation).strip("'"), Any) for name, p in named.items()}
    known = {name: Option(name, widened(types[name], p.default), p.default, "") for name, p in named.items()}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known |= {name: Option(name, Any, None, "") for name in re.findall(r"(?:^|,)\s*(\w+)\s*=", text)}
    known |= more
    values = parse_options(who, text, known)
    for name, value in values.items():
        default = known[name].default
        flag = isinstance(default, bool)
        if isinstance(value, str if flag else str | bool) and isinstance(default, int | float):
            raise UsageError(f"{who}: {name} takes {'true|false' if flag else 'a number'}, not {value!r}")
        if isinstance(default, tuple) and not isinstance(value, tuple):
            as_in = ",".join(map(str, default))
            raise UsageError(f"{who}: {name} takes {len(default)} values, as in {name}={as_in}, not {value!r}")
    return values


def at_least_one(who: str, **values: int) -> None:
    """Raise UsageError where one of the values is below 1."""
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{who}: {name} is at least 1, not {value}")


def at_most(who: str, most: int, **values: int) -> None:
    """Raise UsageError where one of the values is above `most`: there it would take for ever, or all memory."""
    for name, value in values.items():
        if value > most:
            raise UsageError(f"{who}: {name} is at most {most:,}, not {value:,}")


def completed(factory: Callable[..., Any], options: dict[str, Any], offered: dict[str, Any]) -> dict[str, Any]:
    return {name: offered[name] for name in inspect.signature(factory).parameters if name in offered} | options


def call(who: str, factory: Callable[..., Any], options: dict[str, Any], offered: dict[str, Any]) -> Any:
    """`factory(**options)`, with those of `offered` that it names among its arguments and the user did not give."""
    try:
        return factory(**completed(factory, options, offered))
    except UsageError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise UsageError(f"{who}: {one_line(error)}") from error
    except (ArithmeticError, MemoryError) as error:      # of numbers that it cannot work with
        raise UsageError(f"{who}: {type(error).__name__}: {one_line(error)}") from error


def names_in_source(package: str, folder: str, pattern: str) -> list[str]:
    """What `pattern` finds in the files of a package that is not imported, which would take seconds."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    files = Path(spec.submodule_search_locations[0], folder).glob("*.py")
    return sorted({name for file in files for name in re.findall(pattern, file.read_text(), re.MULTILINE)})
