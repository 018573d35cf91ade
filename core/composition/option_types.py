"""Types of options: parse text to a value of a type, check a value, describe a type, and format a value as text.

As text, a value is as short as a shell likes it: `30,80`, `conv=0.1,fc=1`, `none`. Where that is ambiguous, it is in
quotes and brackets.
"""
from __future__ import annotations

import operator
import re
import types
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from loopctl.composition.importing import import_function, import_path
from loopctl.composition.quoting import (
    BRACKETS,
    is_enclosed,
    opens_something,
    outside,
    quote,
    split,
    split_pair,
    unquote,
)
from loopctl.errors import UsageError
from loopctl.optim.duration import EXAMPLES, Duration, parse_duration

Unbounded = Annotated[float, "or inf"]          # a number that may be inf or nan; a plain float must fit into float32
FLOAT32_MAX = 3.4028234663852886e38
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


# From text to values


def parse_value(text: str, hint: Any, in_brackets: bool = False) -> Any:
    """Convert `text` to the type `hint`, or raise ValueError; ImportError for an import path that leads to nothing.

    in_brackets: the text is a part of a value in brackets, where text is in quotes
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint == Duration:
        number, unit = parse_duration(unquote(text))
        return unquote(text) if unit or is_enclosed(text, '"') else int(number) if number.is_integer() else number
    if hint == Unbounded:
        return float(plain_number(text))
    if origin is Annotated:
        return parse_value(text, args[0], in_brackets)
    if origin in (Union, types.UnionType):
        if type(None) in args and text.lower() == "none":
            return None
        for arg in likeliest_first(text, args):
            try:
                return parse_value(text, arg, in_brackets)
            except ValueError as error:
                if is_explained(error):                  # the text is of this type, but the value is not allowed
                    raise
        raise ValueError
    if origin is Literal:
        return parse_literal(text, args)
    if hint is bool:
        return BOOLEANS[text.lower()] if text.lower() in BOOLEANS else parse_fail()
    if is_list(hint):
        return parse_list(text, hint)
    if is_dict(hint):
        return parse_dict(text, hint)
    if hint in (int, float):
        return parse_int(text) if hint is int else parse_float(text)
    if hint in (str, Path):
        return hint(unquote(text)) if is_enclosed(text, '"') or not in_brackets else parse_fail()
    if is_callable(hint):
        return import_function(unquote(text))
    return guess_value(text, in_brackets)


def is_list(hint: Any) -> bool:
    return hint in (list, tuple) or get_origin(hint) in (list, tuple)


def is_dict(hint: Any) -> bool:
    return dict in (hint, get_origin(hint))


def is_callable(hint: Any) -> bool:
    return hint in (Callable, type) or get_origin(hint) in (Callable, type)


def is_explained(error: ValueError) -> bool:
    """Whether the message of an error says which values are allowed."""
    return str(error).startswith("takes")


def likeliest_first(text: str, hints: tuple[Any, ...]) -> list[Any]:
    """Return the types of a union in the order in which `text` is tried as a value of them."""
    quoted, several = is_enclosed(text, '"'), bool(outside(text, ","))
    bracketed = any(is_enclosed(text, opening) for opening in BRACKETS)

    def rank(hint: Any) -> tuple[int, int]:
        if is_list(hint) or is_dict(hint):
            return (0 if bracketed else 2 if quoted else 1), 0
        if hint in (str, Path):
            return (0 if quoted else 1), 0
        return (2 if several else 1 if quoted else 0), {int: 0, bool: 2}.get(hint, 1)

    return sorted((hint for hint in hints if hint is not type(None)), key=rank)


def parse_literal(text: str, allowed: tuple[Any, ...]) -> Any:
    """Return that of the `allowed` values that `text` is; in quotes, only text is."""
    word = unquote(text)
    values = sorted(allowed, key=lambda value: isinstance(value, str))
    found = [value for value in values if word in (str(value), plain_text(value))
             and (isinstance(value, str) or word == text)]
    return found[0] if found else parse_fail()


def parse_list(text: str, hint: Any) -> Any:
    """Convert `30,80`, `[30, 80]` or `(30, 80)` to a list or a tuple of the type `hint`."""
    kind = get_origin(hint) or hint
    for opening, enclosed_kind in (("[", kind), ("(", tuple)):
        if is_enclosed(text, opening):
            try:
                return enclosed_kind(parse_items(text[1:-1], hint, in_brackets=True))
            except ValueError as error:          # such as a regular expression that begins and ends with a bracket
                if is_explained(error):
                    raise
    return kind(parse_items(text, hint))


def parse_items(text: str, hint: Any, in_brackets: bool = False) -> list[Any]:
    items = [item.strip() for item in split(text)] if text.strip() else []
    if in_brackets and items[1:] and not items[-1]:
        del items[-1]                            # the comma in (1,)
    hints = item_hints(hint)
    return [parse_value(item, next(hints), in_brackets) for item in items]


def item_hints(hint: Any) -> Iterator[Any]:
    """Yield the type of each item of a list or a tuple."""
    args = get_args(hint) or (Any,)
    if get_origin(hint) is tuple and args[-1] is not ...:
        return chain(args, repeat(args[-1]))
    return repeat(args[0])


def parse_dict(text: str, hint: Any) -> dict[Any, Any]:
    """Convert `a=1,b=2` or `{a=1, b=2}` to a dict of the type `hint`."""
    if is_enclosed(text, "{"):
        try:
            return parse_pairs(text[1:-1].strip(), hint, in_brackets=True)
        except ValueError as error:
            if is_explained(error):
                raise
    return parse_pairs(text, hint)


def parse_pairs(text: str, hint: Any, in_brackets: bool = False) -> dict[Any, Any]:
    key_hint, value_hint = get_args(hint) or (str, Any)
    found: dict[Any, Any] = {}
    for item in split(text) if text else []:
        name, value = split_pair(item)
        key = parse_value(name, key_hint)
        if key in found:
            raise ValueError(f"takes each name only once; {key!r} is given twice")
        found[key] = parse_value(value, value_hint, in_brackets)
    return found


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


def parse_fail() -> Any:
    raise ValueError


def guess_value(text: str, in_brackets: bool = False) -> Any:
    """Convert `text` to what it looks like: a number, true, false, none, a tuple of these, or else text.

    In brackets, it is a list, a tuple or a dict. Raises ValueError for a number that is nan, inf or too large.
    """
    if is_enclosed(text, '"'):
        return unquote(text)
    for opening, hint in (("[", list), ("(", tuple), ("{", dict)):
        if is_enclosed(text, opening):
            try:
                if hint is dict:
                    return parse_pairs(text[1:-1].strip(), hint, in_brackets=True)
                return hint(parse_items(text[1:-1], hint, in_brackets=True))
            except ValueError as error:
                if is_explained(error):
                    raise
    if len(items := split(text)) > 1:
        return tuple(guess_value(item.strip()) for item in items)
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (parse_int, parse_float):
        try:
            return kind(text)
        except ValueError as error:
            if is_explained(error):
                raise
    return parse_fail() if in_brackets else text


# Values and their types


def fits_type(value: Any, hint: Any) -> bool:
    """Return whether `value` is of the type `hint`; always True for a type that this function does not know."""
    origin, args = get_origin(hint), get_args(hint)
    if hint == Duration:
        return isinstance(value, int | float | str) and bool(parse_duration(value))
    if origin in (Union, types.UnionType):
        return any(fits_type(value, arg) for arg in args)
    if origin is Literal:
        return value in args
    if is_list(hint):
        return isinstance(value, list | tuple) and all(map(fits_type, value, item_hints(hint)))
    if hint in (float, Unbounded):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and (hint is not float or abs(value) <= FLOAT32_MAX)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if hint is Callable or origin is Callable:
        return callable(value)
    return isinstance(value, hint) if hint in (bool, str, type(None)) else True


def python_numbers(value: Any) -> Any:
    """Return `value` with NumPy's numbers, also those in lists, tuples and dicts, as Python's."""
    kind = type(value)
    if kind.__module__ == "numpy" and hasattr(value, "item") and not getattr(value, "ndim", 1):
        number = value.item()
        return float(number) if type(number) is kind else number         # a longdouble remains one
    if kind not in (list, tuple, dict):
        return value
    items = list(value.values()) if kind is dict else value
    numbers = list(map(python_numbers, items))
    if all(map(operator.is_, items, numbers)):
        return value                        # itself, for others may hold it
    return dict(zip(value, numbers, strict=True)) if kind is dict else kind(numbers)


def takes_mapping(hint: Any) -> bool:
    """Return whether `hint` is a dict or a union with one."""
    return any(map(is_dict, (hint, *get_args(hint))))


def describe_several(hint: Any) -> str:
    """Return several values of a type in words."""
    words = describe_type(hint).removeprefix("an ").removeprefix("a ")
    noun = re.split(r",| \(", words)[0]
    return f"{noun}{'s' * (get_origin(hint) is not Literal)}{words[len(noun):]}"


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
    if is_list(hint):
        item = next(item_hints(hint))
        kinds = get_args(item) if get_origin(item) in (Union, types.UnionType) else [item]
        return f"a list of {' or '.join(map(describe_several, kinds))}"
    if is_dict(hint):
        return "pairs, name=value"
    if is_callable(hint):
        return "an import path, package.module:name or file.py:name"
    plain = {int: "a whole number", float: "a number", bool: "true|false", str: "text", Path: "a path"}
    return plain.get(hint, "a value")


# From values to text


def format_value(value: Any, hint: Any = Any, explicit: bool = False) -> str:
    """Return the text that `parse_value` parses to `value`: without quotes and brackets where they are not needed.

    explicit: with quotes and brackets in any case

    Raises UsageError where there is no such text, as for a function without an import path.
    """
    reason = UsageError(f"{value!r} cannot be written as text, so it cannot be saved; use numbers, text, or lists and "
                        "dicts of them")
    value = as_written(value, hint)
    union = get_origin(hint) in (Union, types.UnionType)
    for full in (True,) if explicit else (False, True):
        for one in get_args(hint) if union else (hint,):
            try:
                text = spell(value, one, full)
                if is_same(parse_value(text, hint), value):
                    return text
            except UsageError as error:
                reason = error
            except (ValueError, ImportError):            # another spelling may be parsed
                pass
    raise reason


def as_written(value: Any, hint: Any) -> Any:
    """Return a tuple as a list where the type says list, and the reverse: without brackets, they are written alike."""
    return (get_origin(hint) or hint)(value) if is_list(hint) and isinstance(value, list | tuple) else value


def spell(value: Any, hint: Any, explicit: bool) -> str:
    """Return a text for `value` as one of the type `hint`, which may be parsed to another value if not `explicit`."""
    if isinstance(value, dict):
        key_hint, item_hint = (get_args(hint) if is_dict(hint) else ()) or (str, Any)
        if not explicit:
            return ",".join(f"{spell_item(key, key_hint)}={spell_item(item, item_hint)}" for key, item in value.items())
        pairs = [f"{format_value(key, key_hint, not str(key).isidentifier())}={format_value(item, item_hint, True)}"
                 for key, item in value.items()]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        hints = item_hints(hint) if is_list(hint) else repeat(Any)
        if not explicit:
            return ",".join(map(spell_item, value, hints))
        items = ", ".join(format_value(item, next(hints), True) for item in value)
        return f"[{items}]" if isinstance(value, list) else f"({items}{',' * (len(value) == 1)})"
    text = import_path(value) if callable(value) else plain_text(value)
    if isinstance(value, str | Path) or callable(value):
        plain = text.isprintable() and text == text.strip() and not opens_something(text)
        return text if plain and not explicit else quote(text)
    return text


def spell_item(value: Any, hint: Any) -> str:
    """Return a text for an item of a list or of a dict without brackets."""
    text = format_value(value, hint)
    return text if text and not outside(text, ",") and not outside(text, "=") else format_value(value, hint, True)


def plain_text(value: Any) -> str:
    """Return the text of a value that is neither a list nor a dict."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def is_same(one: Any, other: Any) -> bool:
    """Whether two values of an option are the same: 1 and 1.0 are, nan and nan, but not 1 and true."""
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(is_same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and list(one) == list(other) and all(map(is_same, one.values(), other.values()))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other or (one != one and other != other))
