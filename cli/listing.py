"""What `loopctl plugins` shows."""
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

import loopctl.plugins  # noqa: F401  so that its folder is known; it imports none of them
from loopctl.composition.compose import SPECS
from loopctl.composition.discovery import available, load, load_class, plugin_name, split_spec
from loopctl.composition.option_types import describe_type, format_value
from loopctl.composition.options import parse_options, plugin_options
from loopctl.errors import UsageError


def table(check: bool) -> tuple[str, list[str]]:
    """A line per installed plugin, and the names of those that do not import, where `check` asks for it."""
    found, broken = available(), []
    rows = []
    for name, entry in found.items():
        line = first_line(entry)
        if check:
            try:
                load(name)
            except UsageError as error:
                broken.append(name)
                line = f"BROKEN  {error}"
        rows.append((name, line, "" if origin(entry).startswith("loopctl ") else f"  [{origin(entry)}]"))
    width = max(len(name) for name in found)
    return "\n".join(f"{name:{width}}  {line}{where}" for name, line, where in rows), broken


def page(spec: str) -> str:
    """One plugin: what it does, its options, its hooks, where it comes from."""
    head, rest = split_spec(spec)
    cls = load_class(head)
    known = plugin_options(cls)
    parse_options(plugin_name(cls), rest, known)             # what run would refuse is refused here too
    joined = [hook for hook in SPECS if hasattr(getattr(cls, hook, None), "loopctl_impl")]
    if not joined:
        raise UsageError(f"{head} has no hooks, so it is no plugin; mark its methods with @hookimpl")
    text = re.sub(r"\n +", "\n", cls.__doc__ or "").split("\n")
    names = tuple(f"{name}:" for name in known)
    about = "\n".join(text[:next((i for i, line in enumerate(text) if line.startswith(names)), len(text))]).strip()
    entry = available().get(head)
    lines = [f"{plugin_name(cls)}: {about}", ""]
    if known:
        lines.append("options")
        width = max(map(len, known))
        for option in known.values():
            shown = "" if option.default is MISSING else format_value(option.default)
            default = "required" if option.default is MISSING else f"default {shown or '(empty)'}"
            text = [*wrap(option.help, 96 - width), f"{describe_type(option.type)}; {default}"]
            lines += [f"  {option.name if line is text[0] else '':{width}}  {line}" for line in text]
        lines.append("")
    required = ",".join(f"{option.name}=..." for option in known.values() if option.default is MISSING)
    lines.append(f"use      loopctl run --plugin {head}{':' if required else ''}{required}")
    wraps = {hook for hook in joined if getattr(cls, hook).loopctl_impl["wrapper"]}
    lines.append("hooks    " + ", ".join(f"{hook} (wraps)" if hook in wraps else hook for hook in joined))
    lines.append(f"from     {origin(entry) + ', ' if entry else ''}{cls.__module__}:{cls.__qualname__}")
    return "\n".join(lines)


def origin(entry: EntryPoint) -> str:
    """The package that a plugin comes from, and its version."""
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else ""


def first_line(entry: EntryPoint) -> str:
    """The first line of a plugin's docstring, read from its source without importing it; empty if not found."""
    file = source(entry.module)
    if file is None:
        return ""
    try:
        body = ast.parse(file.read_text()).body
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
    found = [node for node in body if isinstance(node, ast.ClassDef) and node.name == entry.attr]
    return ((ast.get_docstring(found[0]) or "") if found else "").split("\n")[0]


def source(module: str) -> Path | None:
    """The file of a module; of its parent packages only those that are imported already are asked."""
    path: list[str] | None = None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        if name in sys.modules:
            found = sys.modules[name]
            if count == len(parts):
                return Path(found.__file__) if found.__file__ else None
            path = list(getattr(found, "__path__", []))
            continue
        # Of the first part every finder is asked: one of them knows what `pip install -e` has left in its folder.
        spec = find_spec(name) if path is None else PathFinder.find_spec(name, path)
        if spec is None or spec.origin is None:
            return None
        path = list(spec.submodule_search_locations or [])
        if count == len(parts):
            return Path(spec.origin)
    return None
