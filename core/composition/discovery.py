"""Find plugins by name without importing them, and make the chosen ones."""
from __future__ import annotations

import dataclasses
import importlib.util
import re
import sys
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from loopctl.composition.option_types import get_attribute, import_object
from loopctl.composition.options import parse_options, plugin_options
from loopctl.errors import UsageError, names, nearest, one_line


def available() -> dict[str, EntryPoint]:
    """The installed plugins by name, from the entry points of group `loopctl`. None is imported."""
    return {entry.name: entry for entry in installed_entry_points(tuple(sys.path))}


@cache
def installed_entry_points(path: tuple[str, ...]) -> list[EntryPoint]:
    """The entry points in `path`, read once: that takes milliseconds, and a run asks several times per plugin."""
    return sorted(entry_points(group="loopctl"), key=lambda entry: entry.name)


def load(name: str) -> type:
    """Import a plugin class: an installed plugin's name, `package.module:Class` or `path/to/file.py:Class`.

    Raises UsageError where there is none, or where its module does not import.
    """
    try:
        if ".py:" in name:
            return from_file(name)
        if ":" in name:
            return import_object(name)
        return import_object(entry_point(name).value)
    except ImportError as error:
        raise UsageError(f"{name}: {error}") from error


def load_class(name: str) -> type:
    """What `load` finds, if it is a class. Raises UsageError."""
    cls = load(name)
    if not isinstance(cls, type):
        raise UsageError(f"{name} is a {type(cls).__name__}; name a plugin's class")
    return cls


def entry_point(name: str) -> EntryPoint:
    """The entry point of the plugin called `name`."""
    for _ in range(2):
        found = {entry.value: entry for entry in installed_entry_points(tuple(sys.path)) if entry.name == name}
        if found:
            break
        installed_entry_points.cache_clear()                   # it may have been installed meanwhile
    else:
        raise UsageError(f"no plugin is called {name!r}; {nearest(name, available(), 'there are')}")
    if len(found) > 1:
        raise UsageError(f"{name}: more than one package has a plugin of this name; choose one: {names(sorted(found))}")
    return next(iter(found.values()))


def from_file(path: str) -> type:
    """Import `path/to/file.py:Class`."""
    file, _, name = path.rpartition(":")
    try:
        there = Path(file).is_file()
    except OSError as error:                      # a name that no file can have
        raise ImportError(f"{file} cannot be read: {error.strerror}") from error
    if not there:
        raise ImportError(f"there is no file {file}")
    # Its path is its name: a second file of this name, or a file called random.py, is another module.
    spec = importlib.util.spec_from_file_location(str(Path(file).resolve()), file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module               # where dataclasses and typing look up a class's module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:      # a file may raise anything while it is imported
        raise ImportError(f"{file} cannot be imported ({type(error).__name__}: {one_line(error)})") from error
    return get_attribute(module, name, file)


def build_plugin(spec: str) -> tuple[str, Any]:
    """Make the plugin that `name:option=value,...` describes; return its name and the plugin.

    `name` may also be `package.module:Class` or `path/to/file.py:Class`. Raises UsageError.
    """
    head, rest = split_spec(spec)
    cls = load_class(head)
    name = plugin_name(cls)
    known = plugin_options(cls)
    values = parse_options(name, rest, known)
    for option in known.values():
        if option.default is dataclasses.MISSING and option.name not in values:
            raise UsageError(f"{name}: {option.name} is required, as in {name}:{option.name}=...")
    try:
        return name, cls(**values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {one_line(error)}") from error
    except Exception as error:
        error.add_note(f"raised by plugin {name!r} when it was made")
        raise


def split_spec(spec: str) -> tuple[str, str]:
    """A spec's class, as `load` takes it, and its options."""
    head, _, rest = spec.partition(":")
    attr, _, more = rest.partition(":")
    if "." in head or "/" in head or (attr.isidentifier() and head not in available()):
        if not attr:
            raise UsageError(f"{head}: name a class of it, as in {head}:Class")
        head, rest = f"{head}:{attr}", more
    return head, rest


def plugin_name(cls: type) -> str:
    """The name a plugin class is installed under; if it is not, its own name in snake case."""
    for name, entry in available().items():
        if entry.value == f"{cls.__module__}:{cls.__qualname__}":
            return name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
