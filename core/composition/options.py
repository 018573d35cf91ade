"""Options of plugins: the fields of a dataclass, written on the command line as `name:option=value,option=value`."""
from __future__ import annotations

import dataclasses
import re
from math import isfinite
from typing import Any, get_type_hints

from loopctl.composition.option_types import (
    Unbounded,
    as_written,
    describe_type,
    fits_type,
    format_value,
    is_same,
    parse_value,
    python_numbers,
    takes_mapping,
)
from loopctl.composition.quoting import is_enclosed, outside, split
from loopctl.errors import UsageError, nearest, one_line


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a plugin: a field of its dataclass."""

    name: str
    type: Any
    default: Any      # dataclasses.MISSING if the option is required
    help: str


UNKNOWN = Option("", Any, None, "")


def plugin_options(cls: type) -> dict[str, Option]:
    """Return the options of a plugin class by name. The help of each is the line `name: help` of the docstring.

    Lines that are indented further continue the help. Raises UsageError if the type of an option cannot be resolved.
    """
    if not dataclasses.is_dataclass(cls):
        return {}
    try:
        hints = get_type_hints(cls, include_extras=True)
    except Exception as error:                # such as a name that is imported under TYPE_CHECKING only
        raise UsageError(f"{cls.__name__}: the types of its options cannot be read ({type(error).__name__}: "
                         f"{one_line(error)}); import what they name") from error
    found = {}
    docs = "\n".join(kind.__doc__ or "" for kind in cls.__mro__[:-1])      # a base class documents its own options
    for field in sorted(dataclasses.fields(cls), key=lambda field: bool(field.kw_only)):
        if field.init:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            line = re.search(rf"^ *{field.name}: (.+(?:\n {{6,}}.+)*)", docs, re.MULTILINE)
            text = " ".join(line[1].split()) if line else ""
            found[field.name] = Option(field.name, option_type(hints[field.name], default), default, text)
    return found


def option_type(hint: Any, default: Any) -> Any:
    """Return the type `hint`, or `Unbounded` if the default is inf or nan."""
    return Unbounded if isinstance(default, float) and not isfinite(default) else hint


def parse_options(name: str, text: str, known: dict[str, Option]) -> dict[str, Any]:
    """Parse `option=value,option=value` to values by name. An item without an option continues the list before it.

    A comma in quotes or brackets is a part of the value, as in `option="a,b"`. If there is an option called `options`,
    a dict, it collects the items whose names are not in `known`.

    Raises UsageError, which starts with `name`, for an unknown option or a value of the wrong type.
    """
    values: dict[str, str] = {}
    last = ""
    for item in split(text) if text else []:
        equals = outside(item, "=")[:1]
        key, value = (item[:equals[0]].strip(), item[equals[0] + 1:].strip()) if equals else (item.strip(), "")
        goes_on = takes_mapping(known.get(last, UNKNOWN).type) and not is_enclosed(values.get(last, ""), "{")
        if last and key not in known and (not equals or goes_on):
            values[last] += f",{item}"
        elif not equals and key in known:
            raise UsageError(f"{name}: {key} has no value; pass {key}=...")
        elif not equals or (key not in known and "options" not in known):
            has = f"; {nearest(key, known, 'it has')}" if known else "; it has no options"
            raise UsageError(f"{name}: no option {key!r}{has}" if equals else
                             f"{name}: {item!r} is not option=value{has}")
        elif key in values:
            raise UsageError(f"{name}: option {key} is given twice")
        else:
            values[key], last = value, key
    own = {key: read_option(f"{name}: {key}", value, known[key].type) for key, value in values.items() if key in known}
    others = {key: read_option(f"{name}: {key}", value, Any) for key, value in values.items() if key not in known}
    if twice := sorted(set(others) & set(own.get("options", {}))):
        raise UsageError(f"{name}: option {twice[0]} is given twice")
    return own | ({"options": own.get("options", {}) | others} if others else {})


def read_option(prefix: str, text: str, hint: Any) -> Any:
    """Convert `text` to the type `hint`. Raises UsageError, which starts with `prefix`, if that fails."""
    try:
        return parse_value(text, hint)
    except ImportError as error:
        raise UsageError(f"{prefix}: {error}") from error
    except (ValueError, AttributeError) as error:
        reason = str(error) if str(error).startswith("takes") else f"takes {describe_type(hint)}, not {text!r}"
        raise UsageError(f"{prefix} {reason}") from error


def check_options(plugin: Any) -> None:
    """Raise ValueError if an option of `plugin` is not of its type; Python code may have set it to anything.

    NumPy's numbers are replaced by Python's, which files of options and checkpoints can hold.
    """
    for option in plugin_options(type(plugin)).values():
        value = python_numbers(given := getattr(plugin, option.name))
        if value is not given:
            object.__setattr__(plugin, option.name, value)          # also of a frozen dataclass
        try:
            fits = fits_type(value, option.type)
        except ValueError as error:
            raise ValueError(f"{option.name} {error}") from None
        if not fits:
            raise ValueError(f"{option.name} takes {describe_type(option.type)}, not {value!r}")


def to_spec(name: str, plugin: Any) -> str:
    """Return the text from which `build_plugin` builds `plugin` again: its name and every option.

    A value that cannot be written is left out if it is the default. Raises UsageError for any other.
    """
    known = plugin_options(type(plugin))
    values = {key: as_written(getattr(plugin, key), option.type) for key, option in known.items()}
    others: dict[str, Any] = {}
    if isinstance(values.get("options"), dict):
        collected = values.pop("options")
        others = {key: value for key, value in collected.items() if str(key).isidentifier() and key not in known}
        rest = {key: value for key, value in collected.items() if key not in others}
        if rest or (not collected and known["options"].default):
            values["options"] = rest
    last = [key for key in values if others and takes_mapping(known[key].type)]    # it would take what follows
    keys = [*(key for key in values if key not in last), *others, *last]
    texts = [option_text(name, key, (values | others)[key], known) for key in keys]
    return f"{name}:{','.join(filter(None, texts))}" if any(texts) else name


def option_text(name: str, key: str, value: Any, known: dict[str, Option]) -> str:
    """Return `key=text` for a value; empty if it is the default and cannot be written. Raises UsageError."""
    option = known.get(key, UNKNOWN)
    try:
        for explicit in (False, True):
            text = f"{key}={format_value(value, option.type, explicit)}"
            try:
                read = parse_options(name, text, known)
            except UsageError:                  # such as a list with the name of an option among its items
                continue
            if is_same(read[key] if key in known else read["options"][key], value):
                return text
    except UsageError as error:
        if value is option.default or is_same(value, option.default):
            return ""
        raise UsageError(f"{name}: {key}: {error}") from error
    raise UsageError(f"{name}: {key} is {value!r}, which cannot be written as text")
