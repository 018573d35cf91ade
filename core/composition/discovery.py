"""Find the installed plugins through entry points, without importing them, and build the chosen ones from text."""
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
    """Return the installed plugins by name, from the entry points of group `loopctl`, without importing them."""
    return {entry.name: entry for entry in installed_entry_points(tuple(sys.path))}


@cache
def installed_entry_points(path: tuple[str, ...]) -> list[EntryPoint]:
    """Return the entry points found in `path`. Cached, because reading them takes milliseconds."""
    return sorted(entry_points(group="loopctl"), key=lambda entry: entry.name)


def load(name: str) -> type:
    """Import and return the class of an installed plugin, `package.module:Class` or `path/to/file.py:Class`.

    Raises UsageError if it does not exist or cannot be imported.
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
    """Return what `load` returns. Raises UsageError if that is not a class."""
    cls = load(name)
    if not isinstance(cls, type):
        raise UsageError(f"{name} is a {type(cls).__name__}, not a class; name the class of a plugin")
    return cls


def entry_point(name: str) -> EntryPoint:
    """Return the entry point of the plugin called `name`. Raises UsageError unless there is exactly one."""
    for _ in range(2):
        found = {entry.value: entry for entry in installed_entry_points(tuple(sys.path)) if entry.name == name}
        if found:
            break
        installed_entry_points.cache_clear()                   # it may have been installed since they were read
    else:
        raise UsageError(f"no plugin is called {name!r}; {nearest(name, available(), 'there are')}")
    if len(found) > 1:
        raise UsageError(f"{name}: more than one package has a plugin of this name; choose one: {names(sorted(found))}")
    return next(iter(found.values()))


def from_file(path: str) -> type:
    """Import and return `path/to/file.py:Class`."""
    file, _, name = path.rpartition(":")
    try:
        exists = Path(file).is_file()
    except OSError as error:                      # such as a file name that is too long
        raise ImportError(f"{file} cannot be read: {error.strerror}") from error
    if not exists:
        raise ImportError(f"there is no file {file}")
    # The module is named by its path, so that it cannot hide a file of the same name or a module such as `random`.
    spec = importlib.util.spec_from_file_location(str(Path(file).resolve()), file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module               # dataclasses and typing look up the module of a class here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:      # importing a file may raise any error
        raise ImportError(f"{file} cannot be imported ({type(error).__name__}: {one_line(error)})") from error
    return get_attribute(module, name, file)


def build_plugin(spec: str) -> tuple[str, Any]:
    """Build the plugin that `name:option=value,...` describes; return its name and the plugin.

    `name` may also be `package.module:Class` or `path/to/file.py:Class`. Raises UsageError for an unknown plugin, an
    unknown or missing option, or a wrong value.
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
        error.add_note(f"raised by plugin {name!r} when it was built")
        raise


def split_spec(spec: str) -> tuple[str, str]:
    """Split `name:option=value,...` into the name of the class, as `load` takes it, and the text of the options."""
    head, _, rest = spec.partition(":")
    attr, _, more = rest.partition(":")
    if "." in head or "/" in head or (attr.isidentifier() and head not in available()):
        if not attr:
            raise UsageError(f"{head}: a class is required, as in {head}:Class")
        head, rest = f"{head}:{attr}", more
    return head, rest


def plugin_name(cls: type) -> str:
    """Return the name under which a plugin class is installed; if it is not, the name of the class in snake case."""
    for name, entry in available().items():
        if entry.value == f"{cls.__module__}:{cls.__qualname__}":
            return name
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()
