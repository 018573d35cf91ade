"""Specs of models, data sets and optimizers on the command line: parse `name:option=value,...` and call the factory.

In place of a name, a spec may have a user's factory: `package.module:factory:option=value` or
`path/to/file.py:factory:option=value`.
"""
from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from loopctl.composition.discovery import load, split_head
from loopctl.composition.options import Option, option_type, parse_options
from loopctl.errors import UsageError, nearest, one_line

DATA = ["cifar10", "cifar100", "digits", "fake", "fashionmnist", "imagefolder", "imagenet", "mnist"]
DEFAULT_PLUGINS = ("csv", "checkpoint", "progress")        # `run` adds these, except those in --without

# Types of options by the text of an argument's annotation, because annotations may be strings.
TYPES: dict[str, Any] = {inspect.formatannotation(hint): hint
                         for kind in (int, float, bool, str) for hint in (kind, kind | None)}
Policy = Literal["trivial", "rand", "augmix", "none"]           # of augmentation
Augment = bool | Policy
TYPES |= {"Policy": Policy, "Augment": Augment}


def resolve(kind: str, spec: str, known: Callable[[], Iterable[str]], get: Callable[[str], Callable[..., Any]],
            more: dict[str, Option] | None = None, is_object: Callable[[Any], bool] = lambda found: False,
            ) -> tuple[str, Any, dict[str, Any]]:
    """Return the name, the factory and the parsed options of `spec`.

    known: returns all names. get: returns the factory of a name. more: options that are not arguments of a factory.
    is_object: whether what was found is used as it is, so that it has no other options than those. Raises UsageError
    for an unknown name, an unknown option or a wrong value.
    """
    names = list(known())
    head, text = split_head(spec, names)
    if "." in head or ":" in head:
        if ":" not in head:
            raise UsageError(f"{kind} {head}: name a class or function in it, as in {head}:name")
        try:
            factory: Any = load(head)
        except UsageError as error:
            raise UsageError(f"{kind} {error}") from error
    elif head not in names:
        raise UsageError(f"no {kind} is called {head!r}; {suggestion(head, names)}")
    else:
        factory = get(head)
    if is_object(factory):
        return head, factory, parse_options(f"{kind} {head}", text, more or {})
    if not callable(factory):
        raise UsageError(f"{kind} {head} is a {type(factory).__name__}; name a class or a function")
    return head, factory, parse_arguments(f"{kind} {head}", factory, text, more or {})


def suggestion(word: str, names: list[str]) -> str:
    """What to use in place of an unknown name: the most similar one, or a list of names, shortened if it is long."""
    few = names if len(names) <= 20 else [*names[:6], f"{len(names) - 6} more"]
    near = nearest(word, names)
    return near if near.endswith("?") else f"there are {', '.join(few)}, or package.module:name"


def parse_arguments(label: str, factory: Callable[..., Any], text: str, more: dict[str, Option]) -> dict[str, Any]:
    """Parse the options in `text`. Each is an argument of `factory`, or one of `more`.

    A value has the type of the argument's annotation; without one, the type that it looks like. `label` begins the
    message of a UsageError.
    """
    try:
        parameters = list(inspect.signature(factory).parameters.values())
    except ValueError as error:                 # some callables written in C have no signature
        raise UsageError(f"{label}: {one_line(error)}; name a function of your own that calls it") from error
    known = argument_options(parameters)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known |= {name: Option(name, Any, None, "") for name in re.findall(r"(?:^|,)\s*(\w+)\s*=", text)}
    known |= more
    values = parse_options(label, text, known)
    for name, value in values.items():
        default = known[name].default
        is_flag = isinstance(default, bool)
        untyped = known[name].type is Any
        if untyped and isinstance(value, str if is_flag else str | bool) and isinstance(default, int | float):
            raise UsageError(f"{label}: {name} takes {'true|false' if is_flag else 'a number'}, not {value!r}")
        if isinstance(default, tuple) and not isinstance(value, tuple):
            example = ",".join(map(str, default))
            raise UsageError(f"{label}: {name} takes {len(default)} values, as in {name}={example}, not {value!r}")
    return values


def argument_options(parameters: Iterable[inspect.Parameter]) -> dict[str, Option]:
    """The options that are a factory's arguments, by name. An annotation that is not known allows any value."""
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    types = {name: TYPES.get(inspect.formatannotation(p.annotation).strip("'"), Any) for name, p in named.items()}
    return {name: Option(name, option_type(types[name], p.default), p.default, "") for name, p in named.items()}


def at_least_one(label: str, **values: int) -> None:
    """Raise UsageError where one of the values is below 1; `label` begins the message."""
    for name, value in values.items():
        if value < 1:
            raise UsageError(f"{label}: {name} is at least 1, not {value}")


def at_most(label: str, limit: int, **values: int) -> None:
    """Raise UsageError where one of the values is above `limit`, with which a run would exhaust time or memory."""
    for name, value in values.items():
        if value > limit:
            raise UsageError(f"{label}: {name} is at most {limit:,}, not {value:,}")


def factory_arguments(factory: Callable[..., Any], options: dict[str, Any], offered: dict[str, Any]) -> dict[str, Any]:
    """The `options`, and those of the `offered` values for which `factory` has an argument; options take precedence."""
    return {name: offered[name] for name in inspect.signature(factory).parameters if name in offered} | options


def call_factory(label: str, factory: Callable[..., Any], options: dict[str, Any], offered: dict[str, Any]) -> Any:
    """Call `factory` with its `factory_arguments`. Raises UsageError, which begins with `label`, where it fails."""
    try:
        return factory(**factory_arguments(factory, options, offered))
    except UsageError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as error:
        raise UsageError(f"{label}: {one_line(error)}") from error
    except (ArithmeticError, MemoryError) as error:      # their messages mean little without the type
        raise UsageError(f"{label}: {type(error).__name__}: {one_line(error)}") from error


def with_options(label: str, found: Any, options: dict[str, Any], arguments: str, offered: dict[str, Any]) -> Any:
    """What a spec names: the instance of a class with its options, or the function with them as keyword arguments.

    arguments: those with which it is called, such as "output, target". offered: as in `factory_arguments`, of a class.
    Raises UsageError, which begins with `label`, where a function cannot be called with them.
    """
    if isinstance(found, type):
        return call_factory(label, found, options, offered)
    function = partial(found, **options) if options else found
    try:
        inspect.signature(function).bind(*arguments.split(", "))
    except TypeError as error:
        raise UsageError(f"{label} is called with ({arguments}): {one_line(error)}") from error
    except ValueError:                          # some callables written in C have no signature
        pass
    return function


@cache
def names_in_source(package: str, folder: str, pattern: str) -> dict[str, str]:
    """The names that `pattern` finds in the source files of a package, sorted, and the module that each is in.

    The package is not imported, which would take seconds.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return {}
    files = Path(spec.submodule_search_locations[0], folder).glob("*.py")
    found = {name: f"{package}.{folder}.{file.stem}" for file in files
             for name in re.findall(pattern, file.read_text(encoding="utf-8"), re.MULTILINE)}
    return dict(sorted(found.items()))
