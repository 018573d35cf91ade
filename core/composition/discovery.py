"""Find the installed plugins through entry points, without importing them, and build the chosen ones from text."""
from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
from collections.abc import Container
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from pathlib import Path
from typing import Any

from loopctl.composition.importing import import_object
from loopctl.composition.options import parse_options, plugin_options
from loopctl.errors import UsageError, names, nearest, one_line

log = logging.getLogger("loopctl")
NAME = re.compile(r"[\w-]+")                   # of a plugin; other characters have a meaning in a spec
TARGET = re.compile(r"[\w.]+\s*:\s*[\w.]+\s*(\[.*\])?")       # of an entry point


def available() -> dict[str, EntryPoint]:
    """Return the installed plugins by name, from the entry points of group `loopctl`, without importing them."""
    return {entry.name: entry for entry in installed_entry_points(tuple(sys.path))}


@cache
def installed_entry_points(path: tuple[str, ...]) -> list[EntryPoint]:
    """Return the entry points found in `path`. Cached, because reading them takes milliseconds.

    A broken package is named in a warning, and left out.
    """
    try:
        found = list(entry_points(group="loopctl"))
    except Exception:                   # any package may have a broken file, which importlib.metadata does not name
        found = entry_points_one_by_one()
    usable = [entry for entry in found if NAME.fullmatch(entry.name) and TARGET.fullmatch(entry.value)]
    for entry in found:
        if entry not in usable:
            warn(f"{package_name(entry.dist)}: its plugin {entry.name!r} is declared as {entry.value!r}, "
                 "not as name = package.module:Class; it is left out")
    return sorted(usable, key=lambda entry: entry.name)


def entry_points_one_by_one() -> list[EntryPoint]:
    """Return the entry points of every package whose file of them can be read. It takes longer than all at once."""
    found: dict[str, list[EntryPoint]] = {}
    for distribution in distributions():
        name = package_name(distribution)
        try:
            own = [entry for entry in distribution.entry_points if entry.group == "loopctl"]
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            warn(f"{name}: its entry_points.txt cannot be read ({reason}); its plugins are left out; reinstall it")
            own = []
        # The first of two packages of one name, such as of another version, is the one that is imported.
        found.setdefault(re.sub(r"[-_.]+", "-", name.split()[0]).lower(), own)
    return [entry for own in found.values() for entry in own]


def package_name(distribution: Distribution | None) -> str:
    """The name and the version of an installed package; of a broken one, the name of its folder."""
    try:
        if distribution and distribution.name:
            return f"{distribution.name} {distribution.version}"
    except Exception:                   # a METADATA that cannot be read
        pass
    return Path(str(getattr(distribution, "_path", "a package without a name"))).name


@cache
def warn(line: str) -> None:
    """Log a warning, once, in one of the processes that train together."""
    if os.environ.get("RANK", "0") == "0":
        log.warning("%s", one_line(line))


def target(entry: EntryPoint) -> str:
    """What an entry point names, as `package.module:Class`."""
    return f"{entry.module}:{entry.attr}"


def load(name: str) -> type:
    """Import and return the class of an installed plugin, `package.module:Class` or `path/to/file.py:Class`.

    Raises UsageError if it does not exist or cannot be imported.
    """
    try:
        return import_object(name if ":" in name else target(entry_point(name)))
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
    head, rest = split_head(spec, available())
    if ("." in head or "/" in head) and ":" not in head:
        raise UsageError(f"{head}: a class is required, as in {head}:Class")
    return head, rest


def split_head(spec: str, known: Container[str]) -> tuple[str, str]:
    """Split `name:option=value,...` at the colon after the name: one of the `known`, an import path, or any word."""
    head, _, rest = spec.partition(":")
    if head not in known and (found := re.match(r"([^=]*?\.py:[\w.]+)(?::|\Z)", spec)):     # a path may have colons
        return found[1], spec[found.end():]
    attr, _, more = rest.partition(":")
    if attr and ("." in head or "/" in head or (attr.isidentifier() and head not in known)):
        return f"{head}:{attr}", more
    return head, rest


def plugin_name(cls: type) -> str:
    """Return the name under which a plugin class is installed; if it is not, the name of the class in snake case."""
    for name, entry in available().items():
        if target(entry) == f"{cls.__module__}:{cls.__qualname__}":
            return name
    return one_line(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower())
