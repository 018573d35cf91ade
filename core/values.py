"""Values of options: read from text, checked, described and shown, by the type that a field is annotated with."""
from __future__ import annotations

import importlib
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from loopctl.errors import nearest, one_line
from loopctl.lengths import Length, parse_length

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
        return origin(convert(item.strip(), args[0]) for item in text.split(",") if text)
    if origin is dict:
        pairs = [item.rpartition("=") for item in text.split(",") if text]
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


def suits(value: Any, hint: Any) -> bool:
    """Tell whether `value` is of the type `hint`. What is not understood is let pass."""
    origin, args = get_origin(hint), get_args(hint)
    if hint == Length:
        return isinstance(value, int | float | str) and bool(parse_length(value))
    if origin in (Union, types.UnionType):
        return any(suits(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(suits(item, args[0]) for item in value)
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
        words = described(args[0]).removeprefix("an ").removeprefix("a ")
        noun = re.split(r",| \(", words)[0]
        return f"a list of {noun}s{words[len(noun):]}"
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
