"""Types of options: parse text to a value of a type, check a value, describe a type, and format a value as text."""
from __future__ import annotations

import importlib
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from loopctl.errors import UsageError, nearest, one_line
from loopctl.optim.duration import EXAMPLES, Duration, parse_duration

Unbounded = Annotated[float, "or inf"]          # a number that may be inf or nan; a plain float must fit into float32
FLOAT32_MAX = 3.4028234663852886e38
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def parse_value(text: str, hint: Any) -> Any:
    """Convert `text` to the type `hint`, or raise ValueError."""
    origin, args = get_origin(hint), get_args(hint)
    if hint == Duration:
        number, unit = parse_duration(text)
        return text if unit else int(number) if number.is_integer() else number
    if hint == Unbounded:
        return float(plain_number(text))
    if origin is Annotated:
        return parse_value(text, args[0])
    if origin in (Union, types.UnionType):
        if type(None) in args and text.lower() == "none":
            return None
        for arg in (arg for arg in args if arg is not type(None)):
            try:
                return parse_value(text, arg)
            except ValueError as error:
                if str(error).startswith("takes"):       # the text is of this type, but the value is not allowed
                    raise
        raise ValueError
    if origin is Literal:
        return {str(arg): arg for arg in args}[text] if text in map(str, args) else parse_fail()
    if hint is bool:
        return BOOLEANS[text.lower()] if text.lower() in BOOLEANS else parse_fail()
    if origin in (list, tuple):
        return origin(parse_value(item.strip(), args[0]) for item in text.split(",") if text)
    if dict in (hint, origin):
        found: dict[str, Any] = {}
        for item in text.split(",") if text else []:
            key, _, value = (part.strip() for part in item.rpartition("="))
            if key in found:
                raise ValueError(f"takes each name only once; {key!r} is given twice")
            found[key] = parse_value(value, args[1] if args else Any)
        return found
    if hint in (int, float):
        return parse_int(text) if hint is int else parse_float(text)
    if hint in (str, Path):
        return hint(text)
    if hint is Callable or origin is Callable or origin is type:
        return import_function(text)
    return guess_value(text)


def plain_number(text: str) -> str:
    """Return `text`, or raise ValueError for digits with underscores or other than ASCII, which `float` accepts."""
    if "_" in text or not text.isascii():
        raise ValueError
    return text


def parse_int(text: str) -> int:
    number = int(plain_number(text))
    if abs(number) >= 2**63:
        raise ValueError(f"takes a whole number below 2**63, not {text!r}")
    return number


def parse_float(text: str) -> float:
    number = float(plain_number(text))
    if not abs(number) <= FLOAT32_MAX:
        raise ValueError(f"takes a number of at most 3.4e38, not {text!r}")
    return number


def import_function(path: str) -> Any:
    """Import the function or class `package.module:name`."""
    module, _, name = path.partition(":")
    if not (module and name):
        raise ValueError
    found = import_object(path)
    if not callable(found):
        raise ValueError(f"takes a function as package.module:name; {path} is a {type(found).__name__}")
    return found


def parse_fail() -> Any:
    raise ValueError


def guess_value(text: str) -> Any:
    """Convert `text` to what it looks like: a number, true, false, none, a tuple of these, or else text.

    Raises ValueError for a number that is nan, inf or too large.
    """
    if "," in text:
        return tuple(guess_value(item.strip()) for item in text.split(","))
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (parse_int, parse_float):
        try:
            return kind(text)
        except ValueError as error:
            if str(error).startswith("takes"):
                raise
    return text


def fits_type(value: Any, hint: Any) -> bool:
    """Return whether `value` is of the type `hint`; always True for a type that this function does not know."""
    origin, args = get_origin(hint), get_args(hint)
    if hint == Duration:
        return isinstance(value, int | float | str) and bool(parse_duration(value))
    if origin in (Union, types.UnionType):
        return any(fits_type(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits_type(item, args[0]) for item in value)
    if hint in (float, Unbounded):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (hint is not float or abs(value) <= FLOAT32_MAX)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if hint is Callable or origin is Callable:
        return callable(value)
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


def takes_mapping(hint: Any) -> bool:
    """Return whether `hint` is a dict or a union with one."""
    return dict in (hint, get_origin(hint), *map(get_origin, get_args(hint)))


def describe_type(hint: Any) -> str:
    """Return a type in words, for help and messages."""
    origin, args = get_origin(hint), get_args(hint)
    if hint == Duration:
        return f"a duration ({', '.join(EXAMPLES)})"
    if hint == Unbounded:
        return "a number"
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return "|".join(map(str, args))
    if origin in (list, tuple):
        words = describe_type(args[0]).removeprefix("an ").removeprefix("a ")
        noun = re.split(r",| \(", words)[0]
        return f"a list of {noun}s{words[len(noun):]}"
    if dict in (hint, origin):
        return "pairs, name=value"
    if hint is Callable or origin is Callable or origin is type:
        return "an import path, package.module:name"
    plain = {int: "a whole number", float: "a number", bool: "true|false", str: "text", Path: "a path"}
    return plain.get(hint, "a value")


def format_value(value: Any) -> str:
    """Return the text that `parse_value` parses to `value`. Raises UsageError for a function without a name."""
    if isinstance(value, dict):
        return ",".join(f"{key}={format_value(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(format_value, value))
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if callable(value):
        if not (getattr(value, "__module__", "") and hasattr(value, "__qualname__")):
            raise UsageError(f"{value!r} has no import path, so it cannot be saved; use a function of a module")
        return f"{value.__module__}:{value.__qualname__}"
    return str(value)


def import_object(path: str) -> Any:
    """Import and return `package.module:name`. Raises ImportError with a message of one line if that fails."""
    module, _, name = path.partition(":")
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:      # importing a module may raise any error
        raise ImportError(f"{module} cannot be imported ({type(error).__name__}: {one_line(error)})") from error
    return get_attribute(found, name, path)


def get_attribute(module: types.ModuleType, name: str, path: str) -> Any:
    """Return `module.name`; `name` may have dots. Raises ImportError with the nearest name if it does not exist."""
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            public = [known for known in vars(value) if not known.startswith("_")]
            raise ImportError(f"{path.partition(':')[0]} has no {name!r}; {nearest(name, public, 'it has')}")
        value = getattr(value, part)
    return value
