"""What the command line names, a model, a data set or an optimizer: `name:option=value` or `package.module:factory:option=value`."""
from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loopctl.errors import UsageError, nearest
from loopctl.options import Option, import_object, one_line, parse_options


def resolve(kind: str, spec: str, known: Callable[[], Iterable[str]], get: Callable[[str], Callable[..., Any]],
            ) -> tuple[str, Callable[..., Any], dict[str, Any]]:
    """The name, the factory and the options that `spec` says.

    known: the names there are. get: the factory of one of them. Raises UsageError for a name or an option that is none.
    """
    head, _, text = spec.partition(":")
    if "." in head:
        attr, _, text = text.partition(":")
        head = f"{head}:{attr}"
        try:
            factory = import_object(head)
        except ImportError as error:
            raise UsageError(f"{kind} {head}: {error}") from error
    elif head not in (names := sorted(known())):
        near = nearest(head, names, "there are") if len(names) < 20 else nearest(head, names, "see `loopctl run --help`; such as")
        raise UsageError(f"no {kind} is called {head!r}; {near}, or package.module:name")
    else:
        factory = get(head)
    if not callable(factory):
        raise UsageError(f"{kind} {head} is a {type(factory).__name__}; name a class or a function")
    return head, factory, arguments(f"{kind} {head}", factory, text)


def arguments(who: str, factory: Callable[..., Any], text: str) -> dict[str, Any]:
    """The options in `text`, each an argument of `factory`, as numbers, truth values or text."""
    parameters = inspect.signature(factory).parameters.values()
    named = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    known = {name: Option(name, Any, p.default, "") for name, p in named.items()}
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        known |= {name: Option(name, Any, None, "") for name in re.findall(r"(?:^|,)\s*(\w+)\s*=", text)}
    values = parse_options(who, text, known)
    for name, value in values.items():
        if isinstance(value, str) and isinstance(known[name].default, int | float):
            kind = "true or false" if isinstance(known[name].default, bool) else "a number"
            raise UsageError(f"{who}: {name} takes {kind}, not {value!r}")
    return values


def call(who: str, factory: Callable[..., Any], options: dict[str, Any], offered: dict[str, Any]) -> Any:
    """`factory(**options)`, with those of `offered` that it names among its arguments and the user did not give."""
    wanted = {name for name in inspect.signature(factory).parameters if name in offered}
    try:
        return factory(**{name: offered[name] for name in wanted} | options)
    except UsageError:
        raise
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UsageError(f"{who}: {one_line(error)}") from error


def names_in_source(package: str, folder: str, pattern: str) -> list[str]:
    """What `pattern` finds in the files of a package that is not imported, which would take seconds."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    files = Path(spec.submodule_search_locations[0], folder).glob("*.py")
    return sorted({name for file in files for name in re.findall(pattern, file.read_text(), re.MULTILINE)})
