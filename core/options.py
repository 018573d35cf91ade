"""Options: the fields of a plugin's dataclass, typed on the command line as `name:option=value,option=value`."""
from __future__ import annotations

import dataclasses
import importlib
import re
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from loopctl.errors import UsageError, nearest
from loopctl.lengths import Length, parse_length


@dataclasses.dataclass(frozen=True)
class Option:
    """One field of a plugin."""

    name: str
    type: Any
    default: Any      # dataclasses.MISSING where the user must say
    help: str


def options(cls: type) -> dict[str, Option]:
    """The options of a plugin class by name; its help is the docstring's line `name: help`, and its continuation."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = get_type_hints(cls, include_extras=True)
    found = {}
    for field in dataclasses.fields(cls):
        if field.init:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            line = re.search(rf"^ *{field.name}: (.+(?:\n {{6,}}.+)*)", cls.__doc__ or "", re.MULTILINE)
            text = " ".join(line[1].split()) if line else ""
            found[field.name] = Option(field.name, hints[field.name], default, text)
    return found


def parse_options(name: str, text: str, known: dict[str, Option]) -> dict[str, Any]:
    """Read `option=value,option=value`. An item that names no option continues the list or mapping before it.

    Raises UsageError, which starts with `name`, for an unknown option or a value of the wrong type.
    """
    values: dict[str, str] = {}
    last = ""
    for item in filter(None, text.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if last and key not in known and (not equals or takes_mapping(known[last].type)):
            values[last] += f",{item}"
        elif not equals and key in known:
            raise UsageError(f"{name}: {key} has no value; say {key}=...")
        elif not equals or key not in known:
            has = f"; {nearest(key, known, 'it has')}" if known else "; it has no options"
            raise UsageError(f"{name}: no option {key!r}{has}" if equals else
                             f"{name}: {item!r} is not option=value{has}")
        elif key in values:
            raise UsageError(f"{name}: option {key} is given twice")
        else:
            values[key], last = value, key
    return {key: read(f"{name}: {key}", value, known[key].type) for key, value in values.items()}


def read(who: str, text: str, hint: Any) -> Any:
    """Convert `text` to the type `hint`; `who` begins the message of the UsageError where that cannot be done."""
    try:
        return convert(text, hint)
    except ImportError as error:
        raise UsageError(f"{who}: {error}") from error
    except (ValueError, AttributeError) as error:
        said = str(error) if str(error).startswith("takes") else f"takes {described(hint)}, not {text!r}"
        raise UsageError(f"{who} {said}") from error


WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def convert(text: str, hint: Any) -> Any:
    """Convert `text` to the type `hint`, or raise ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    if hint == Length:
        number, unit = parse_length(text)
        return text if unit else int(number) if number.is_integer() else number
    if origin is Annotated:
        return convert(text, args[0])
    if origin in (Union, types.UnionType):
        if type(None) in args and text.lower() == "none":
            return None
        for arg in (arg for arg in args if arg is not type(None)):
            try:
                return convert(text, arg)
            except ValueError:
                if arg == Length:
                    raise
        raise ValueError
    if origin is Literal:
        return {str(arg): arg for arg in args}[text] if text in map(str, args) else parse_fail()
    if hint is bool:
        return WORDS[text.lower()] if text.lower() in WORDS else parse_fail()
    if origin in (list, tuple):
        return origin(convert(item.strip(), args[0]) for item in text.split(","))
    if origin is dict:
        pairs = [item.rpartition("=") for item in text.split(",")]
        return {key.strip(): convert(value.strip(), args[1]) for key, _, value in pairs}
    if hint in (int, float, str, Path):
        return hint(text)
    if hint is Callable or origin is Callable or origin is type:
        return import_object(text)
    return guess(text)


def parse_fail() -> Any:
    raise ValueError


def guess(text: str) -> Any:
    """Convert `text` to what it looks like: a number, true, false, none, several of them, or else text."""
    if "," in text:
        return tuple(guess(item.strip()) for item in text.split(","))
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def check(plugin: Any) -> None:
    """Raise ValueError where a field of `plugin`, which Python code may have set to anything, is not of its type."""
    for option in options(type(plugin)).values():
        value = getattr(plugin, option.name)
        try:
            fits = suits(value, option.type)
        except ValueError as error:
            raise ValueError(f"{option.name} {error}") from None
        if not fits:
            raise ValueError(f"{option.name} takes {described(option.type)}, not {value!r}")


def suits(value: Any, hint: Any) -> bool:
    """Tell whether `value` is of the type `hint`. What is not understood is let pass."""
    origin, args = get_origin(hint), get_args(hint)
    if hint == Length:
        return isinstance(value, int | float | str) and bool(parse_length(value))
    if origin in (Union, types.UnionType):
        return any(suits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


def takes_mapping(hint: Any) -> bool:
    return dict in (get_origin(hint), *map(get_origin, get_args(hint)))


def described(hint: Any) -> str:
    """A type in words."""
    origin, args = get_origin(hint), get_args(hint)
    if hint == Length:
        return "a length (30, 5ep, 500st, 10%)"
    if origin in (Union, types.UnionType):
        return " or ".join(described(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (list, tuple):
        return f"a list of {described(args[0])}s".replace("a a ", "a ").replace("of a ", "of ")
    if origin is dict:
        return "pairs, name=value"
    if hint is Callable or origin is Callable or origin is type:
        return "an import path, package.module:name"
    plain = {int: "a whole number", float: "a number", bool: "true|false", str: "text", Path: "a path"}
    return plain.get(hint, "a value")


def shown(value: Any) -> str:
    """The text that reads back as `value`."""
    if isinstance(value, dict):
        return ",".join(f"{key}={shown(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(shown, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if callable(value):
        return f"{value.__module__}:{value.__qualname__}"
    return str(value)


def spec(name: str, plugin: Any) -> str:
    """The text that builds `plugin` again: its name and every option."""
    said = {key: shown(getattr(plugin, key)) for key in options(type(plugin))}
    return f"{name}:{','.join(f'{key}={value}' for key, value in said.items())}" if said else name


def import_object(path: str) -> Any:
    """Import `package.module:name`. Raises ImportError, in one line, where that fails for whatever reason."""
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:      # a module may raise anything while it is imported
        raise ImportError(f"{module} cannot be imported ({type(error).__name__}: {one_line(error)})") from error
    return attribute(found, name, path)


def attribute(module: types.ModuleType, name: str, path: str) -> Any:
    """`module.name`, or ImportError with the nearest name."""
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            public = [known for known in vars(value) if not known.startswith("_")]
            raise ImportError(f"{path.partition(':')[0]} has no {name!r}; {nearest(name, public, 'it has')}")
        value = getattr(value, part)
    return value


def one_line(error: object) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split())


def names(items: Iterable[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
