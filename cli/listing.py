"""`loopctl plugins`: the list of installed plugins, and the options, hooks and origin of one."""
from __future__ import annotations

import ast
import re
from dataclasses import MISSING
from importlib.metadata import EntryPoint
from textwrap import wrap

import loopctl.plugins  # noqa: F401  so that the source of its modules is found; it imports no plugin
from loopctl.cli.source_reader import SourceReader, Unreadable
from loopctl.composition.compose import SPECS
from loopctl.composition.discovery import (
    available,
    entry_point,
    load,
    load_class,
    package_name,
    plugin_name,
    split_spec,
)
from loopctl.composition.option_types import describe_type, format_value
from loopctl.composition.options import Option, parse_options, plugin_options
from loopctl.errors import UsageError, harmless, one_line

NO_TOPIC = "other"              # the heading of plugins that declare no topic


def table(check: bool, word: str = "") -> tuple[str, list[str]]:
    """A line per installed plugin, by topic, and with `check` the names of those that cannot be imported.

    word: only the plugins that have it in their name, docstring or options. Raises UsageError if there is none.
    """
    broken: list[str] = []
    reader, topics = SourceReader(), dict[str, list[str]]()
    plugins = available()
    if word:
        plugins = {name: entry for name, entry in plugins.items() if plain(word) in searched(name, entry, reader)}
        if not plugins:
            raise UsageError(f"--search {word}: no plugin has this in its name, help or options; loopctl plugins "
                             "lists all of them")
    width = max(map(len, plugins), default=0)
    for name, entry in plugins.items():
        line = first_line(entry, reader)
        if check:
            try:
                load(name)
            except UsageError as error:
                broken.append(name)
                line = f"BROKEN  {error}"
        package = "" if origin(entry).startswith("loopctl ") else f"  [{origin(entry)}]"
        topics.setdefault(topic(entry, reader), []).append(f"  {name:{width}}  {harmless(line)}{package}")
    order = sorted(topics, key=lambda topic: (topic == NO_TOPIC, topic))
    return "\n\n".join("\n".join([topic, *topics[topic]]) for topic in order), broken


def page(spec: str, check: bool = False) -> str:
    """Describe one plugin: its docstring, options, hooks and origin. Raises UsageError if its options are wrong.

    check: import the plugin in any case, so that an error in that is raised too
    """
    head, rest = split_spec(spec)
    cls = load_class(head) if check else plugin_class(head)
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
    lines += option_lines(known)
    required = ",".join(f"{option.name}=..." for option in known.values() if option.default is MISSING)
    lines.append(f"use      loopctl run --plugin {head}{':' if required else ''}{required}")
    wraps = {hook for hook in hooks if getattr(cls, hook).loopctl_impl["wrapper"]}
    lines.append("hooks    " + ", ".join(f"{hook} (wraps)" if hook in wraps else hook for hook in hooks))
    lines.append(f"from     {origin(entry) + ', ' if entry else ''}{cls.__module__}:{cls.__qualname__}")
    return harmless("\n".join(lines))


def option_lines(known: dict[str, Option]) -> list[str]:
    """The options of a page: what each is for, its type and its default, and an empty line after them."""
    width = max(map(len, known), default=0)
    lines = ["options"] if known else []
    for option in known.values():
        default = "required" if option.default is MISSING else f"default {default_text(option) or '(empty)'}"
        text = [*wrap(option.help, 96 - width), f"{describe_type(option.type)}; {default}"]
        lines += [f"  {option.name if line is text[0] else '':{width}}  {line}" for line in text]
    return [*lines, ""] if known else []


def default_text(option: Option) -> str:
    """The default of an option, as it would be written on the command line if it can be."""
    try:
        return format_value(option.default, option.type)
    except UsageError:
        return one_line(repr(option.default))


def origin(entry: EntryPoint) -> str:
    """The name and the version of the package that a plugin comes from."""
    return one_line(package_name(entry.dist)) if entry.dist else ""


def plugin_class(head: str) -> type:
    """The class of a plugin, read from its source if it is an installed one that can be read so, otherwise imported."""
    try:
        if ":" in head:                     # a class of the user's own: importing it shows what is wrong with it
            raise Unreadable
        entry = entry_point(head)
        cls = SourceReader().class_of(entry.module, entry.attr)
        plugin_options(cls)
    except (Unreadable, UsageError):
        return load_class(head)
    return cls


def first_line(entry: EntryPoint, reader: SourceReader) -> str:
    """The first line of a plugin's docstring, read from its source without importing it; empty if not found."""
    try:
        return (ast.get_docstring(reader.definition(entry.module, entry.attr)[1]) or "").split("\n")[0]
    except Unreadable:
        return ""


def searched(name: str, entry: EntryPoint, reader: SourceReader) -> str:
    """What a search looks at: the plugin's name, its docstring and its options, as far as its source says them."""
    texts = [name, topic(entry, reader)]
    try:
        texts.append(ast.get_docstring(reader.definition(entry.module, entry.attr)[1]) or "")
        known = plugin_options(reader.class_of(entry.module, entry.attr))
        texts += [f"{option.name} {option.help}" for option in known.values()]
    except (Unreadable, UsageError):
        pass
    return plain(" ".join(texts))


def plain(text: str) -> str:
    """Text in which words are found however they are written: weight_decays and Weight-decays are `weight decays`."""
    return re.sub(r"[\s_-]+", " ", text).casefold().strip()


def topic(entry: EntryPoint, reader: SourceReader) -> str:
    """What a plugin is listed under: its class attribute `topic`, or that of its base class."""
    try:
        return one_line(reader.attribute(entry.module, entry.attr, "topic")).strip() or NO_TOPIC
    except Unreadable:
        return NO_TOPIC
