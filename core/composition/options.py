"""Options of plugins: the fields of a dataclass, written on the command line as `name:option=value,option=value`."""
from __future__ import annotations

import dataclasses
import re
from math import isfinite
from typing import Any, get_type_hints

from loopctl.composition.option_types import (
    Unbounded,
    describe_type,
    fits_type,
    format_value,
    parse_value,
    takes_mapping,
)
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
    for field in dataclasses.fields(cls):
        if field.init:
            factory = field.default_factory
            default = field.default if factory is dataclasses.MISSING else factory()
            line = re.search(rf"^ *{field.name}: (.+(?:\n {{6,}}.+)*)", cls.__doc__ or "", re.MULTILINE)
            text = " ".join(line[1].split()) if line else ""
            found[field.name] = Option(field.name, option_type(hints[field.name], default), default, text)
    return found


def option_type(hint: Any, default: Any) -> Any:
    """Return the type `hint`, or `Unbounded` if the default is inf or nan."""
    return Unbounded if isinstance(default, float) and not isfinite(default) else hint


def parse_options(name: str, text: str, known: dict[str, Option]) -> dict[str, Any]:
    """Parse `option=value,option=value` to values by name. An item without an option continues the list before it.

    If there is an option called `options`, a dict, it collects the items whose names are not in `known`.
    Raises UsageError, which starts with `name`, for an unknown option or a value of the wrong type.
    """
    values: dict[str, str] = {}
    last = ""
    for item in text.split(",") if text else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if last and key not in known and (not equals or takes_mapping(known.get(last, UNKNOWN).type)):
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
    """Raise ValueError if an option of `plugin` is not of its type; Python code may have set it to anything."""
    for option in plugin_options(type(plugin)).values():
        value = getattr(plugin, option.name)
        try:
            fits = fits_type(value, option.type)
        except ValueError as error:
            raise ValueError(f"{option.name} {error}") from None
        if not fits:
            raise ValueError(f"{option.name} takes {describe_type(option.type)}, not {value!r}")


def to_spec(name: str, plugin: Any) -> str:
    """Return the text from which `build_plugin` builds `plugin` again: its name and every option."""
    values = {key: getattr(plugin, key) for key in plugin_options(type(plugin))}
    texts = {key: format_value(value) for key, value in (values | values.pop("options", {})).items()}
    return f"{name}:{','.join(f'{key}={text}' for key, text in texts.items())}" if texts else name
