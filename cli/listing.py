"""`loopctl plugins`: the list of installed plugins, and the options, hooks and origin of one."""
from __future__ import annotations

import ast
import re
import sys
from dataclasses import MISSING
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from textwrap import wrap

import loopctl.plugins  # noqa: F401  so that `source_file` finds its folder; it imports no plugin
from loopctl.composition.compose import SPECS
from loopctl.composition.discovery import available, load, load_class, package_name, plugin_name, split_spec
from loopctl.composition.option_types import describe_type, format_value
from loopctl.composition.options import Option, parse_options, plugin_options
from loopctl.errors import UsageError, harmless, one_line


def table(check: bool) -> tuple[str, list[str]]:
    """A line per installed plugin and, with `check`, the names of those that cannot be imported."""
    plugins, broken = available(), []
    rows = []
    for name, entry in plugins.items():
        line = first_line(entry)
        if check:
            try:
                load(name)
            except UsageError as error:
                broken.append(name)
                line = f"BROKEN  {error}"
        rows.append((name, harmless(line), "" if origin(entry).startswith("loopctl ") else f"  [{origin(entry)}]"))
    width = max(len(name) for name in plugins)
    return "\n".join(f"{name:{width}}  {line}{package}" for name, line, package in rows), broken


def page(spec: str) -> str:
    """Describe one plugin: its docstring, options, hooks and origin. Raises UsageError if `run` would."""
    head, rest = split_spec(spec)
    cls = load_class(head)
    known = plugin_options(cls)
    parse_options(plugin_name(cls), rest, known)             # raises UsageError for a wrong option
    hooks = [hook for hook in SPECS if hasattr(getattr(cls, hook, None), "loopctl_impl")]
    if not hooks:
        raise UsageError(f"{head} has no hooks, so it is not a plugin; mark its methods with @hookimpl")
    text = re.sub(r"\n +", "\n", cls.__doc__ or "").split("\n")
    names = tuple(f"{name}:" for name in known)
    about = "\n".join(text[:next((i for i, line in enumerate(text) if line.startswith(names)), len(text))]).strip()
    entry = available().get(head)
    lines = [f"{plugin_name(cls)}: {about}", ""]
    if known:
        lines.append("options")
        width = max(map(len, known))
        for option in known.values():
            default = "required" if option.default is MISSING else f"default {default_text(option) or '(empty)'}"
            text = [*wrap(option.help, 96 - width), f"{describe_type(option.type)}; {default}"]
            lines += [f"  {option.name if line is text[0] else '':{width}}  {line}" for line in text]
        lines.append("")
    required = ",".join(f"{option.name}=..." for option in known.values() if option.default is MISSING)
    lines.append(f"use      loopctl run --plugin {head}{':' if required else ''}{required}")
    wraps = {hook for hook in hooks if getattr(cls, hook).loopctl_impl["wrapper"]}
    lines.append("hooks    " + ", ".join(f"{hook} (wraps)" if hook in wraps else hook for hook in hooks))
    lines.append(f"from     {origin(entry) + ', ' if entry else ''}{cls.__module__}:{cls.__qualname__}")
    return harmless("\n".join(lines))


def default_text(option: Option) -> str:
    """The default of an option, as it would be written on the command line if it can be."""
    try:
        return format_value(option.default, option.type)
    except UsageError:
        return one_line(repr(option.default))


def origin(entry: EntryPoint) -> str:
    """The name and the version of the package that a plugin comes from."""
    return one_line(package_name(entry.dist)) if entry.dist else ""


def first_line(entry: EntryPoint) -> str:
    """The first line of a plugin's docstring, read from its source without importing it; empty if not found."""
    file = source_file(entry.module)
    if file is None:
        return ""
    try:
        body = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    classes = [node for node in body if isinstance(node, ast.ClassDef) and node.name == entry.attr]
    return ((ast.get_docstring(classes[0]) or "") if classes else "").split("\n")[0]


def source_file(module: str) -> Path | None:
    """The source file of a module, or None. Neither the module nor its parent packages are imported."""
    path: list[str] | None = None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        if name in sys.modules:
            imported = sys.modules[name]
            if count == len(parts):
                return Path(imported.__file__) if imported.__file__ else None
            path = list(getattr(imported, "__path__", []))
            continue
        # For a top-level package, find_spec tries all finders: `pip install -e` may have installed one of its own.
        spec = find_spec(name) if path is None else PathFinder.find_spec(name, path)
        if spec is None or spec.origin is None:
            return None
        path = list(spec.submodule_search_locations or [])
        if count == len(parts):
            return Path(spec.origin)
    return None
