"""`loopctl models`, `loopctl data` and `loopctl optimizers`: lists of what has a name, and the options of one.

All of it is read from source files, where they say it: importing torch or torchvision would take seconds.
"""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, replace
from importlib.metadata import version
from inspect import Parameter, getdoc, signature
from textwrap import shorten
from typing import Any, Literal

from loopctl.cli import models, optimizers
from loopctl.cli.listing import default_text, option_lines
from loopctl.cli.source_reader import SourceReader, Unreadable, bound_names
from loopctl.cli.specs import DATA, TYPES, argument_options, resolve
from loopctl.composition.discovery import load
from loopctl.composition.options import Option
from loopctl.errors import harmless

# Arguments that are not options of a name: they come from elsewhere, as a part of the run.
FROM_DATA = {"num_classes", "in_channels", "image_size"}
NOT_OPTIONS = {"model": FROM_DATA, "data": {"root", "download"}, "optimizer": {"params"}}


def places(kind: str) -> dict[str, tuple[str, str]]:
    """The names of a kind of thing (model, data, optimizer), and the module and the definition that each stands for."""
    if kind == "data":
        return {name: ("loopctl.cli.data", name) for name in DATA}
    if kind == "optimizer":
        return {name.lower(): (module, name) for name, module in optimizers.class_modules().items()}
    small = {name: ("loopctl.cli.models", name) for name in models.SMALL}
    return small | {name: (module, name) for name, module in models.torchvision_names().items()}


def more_options(kind: str, reader: SourceReader) -> dict[str, Option]:
    """The options that all things of a kind have."""
    found: dict[str, Option] = reader.value("loopctl.cli.data", "COMMON_OPTIONS") if kind == "data" else {}
    return found


def stand_in(place: tuple[str, str], reader: SourceReader) -> Callable[..., None]:
    """A function with the signature and the docstring of a definition, which does nothing."""
    found, text = reader.signature(*place)

    def function(*args: Any, **kwargs: Any) -> None: ...
    function.__dict__["__signature__"] = found
    function.__doc__ = text
    return function


def definition(place: tuple[str, str], reader: SourceReader) -> Callable[..., Any]:
    """The stand-in for a definition; where its source does not say enough, the definition itself, imported."""
    try:
        return stand_in(place, reader)
    except Unreadable:
        found: Callable[..., Any] = load(":".join(place))
        return found


def table(kind: str) -> str:
    """A line for each name: what it is. Names of several packages are listed by package."""
    found, reader = places(kind), SourceReader()
    width = max(map(len, found), default=0)
    packages: dict[str, list[str]] = {}
    for name, place in sorted(found.items()):
        line = first_line(getdoc(definition(place, reader)) or "")
        packages.setdefault(place[0].split(".")[0], []).append(f"{name:{width}}  {line}".rstrip())
    if len(packages) == 1:
        return "\n".join(*packages.values())
    return "\n\n".join("\n  ".join([package, *lines]) for package, lines in sorted(packages.items()))


def page(kind: str, spec: str) -> str:
    """Describe what a spec names: its docstring and its options. Raises UsageError where the spec is wrong."""
    found, reader = places(kind), SourceReader()
    more = more_options(kind, reader)
    name, factory, _ = resolve(kind, spec, lambda: found, lambda name: definition(found[name], reader), more)
    known = options_of(kind, name, factory, more, reader)
    text = getdoc(factory) or ""
    lines = [f"{name}: {plain(prose(text))}", "", *option_lines(known)]
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in signature(factory).parameters.values()):
        lines[-1:] = ["  Other options are passed on as keyword arguments.", ""]
    example = next((f":{key}={default_text(option)}" for key, option in known.items()
                    if option.default not in (None, MISSING) and not isinstance(option.default, bool)), "")
    lines.append(f"use      loopctl run --{kind} {name}{example}")
    if name in found:
        module, attribute = found[name]
        lines.append(f"from     {module.split('.')[0]} {version(module.split('.')[0])}, {module}:{attribute}")
    return harmless("\n".join(lines))


def options_of(kind: str, name: str, factory: Callable[..., Any], more: dict[str, Option],
               reader: SourceReader) -> dict[str, Option]:
    """The options of a factory, each with what its docstring says of it."""
    parameters, known = signature(factory).parameters, {}
    for key, option in (argument_options(parameters.values()) | more).items():
        if key not in NOT_OPTIONS[kind]:
            annotation = str(parameters[key].annotation) if key in parameters else ""
            known[key] = replace(
                option, type=enum_members(annotation, places(kind).get(name), reader) or shown_type(option),
                default=MISSING if option.default is Parameter.empty else option.default,
                help=option.help or plain(argument_help(getdoc(factory) or "", key)))
    return known


def shown_type(option: Option) -> Any:
    """The type of an option; where its annotation says none that is known, that of its default."""
    kind = {int: float}.get(type(option.default), type(option.default))         # 0 as a default may stand for 0.0
    return option.type if option.type in TYPES.values() or kind not in (bool, float, str) else kind


def enum_members(annotation: str, place: tuple[str, str] | None, reader: SourceReader) -> Any:
    """A type of the members of an enumeration that `annotation` names, such as torchvision's weights, or None."""
    found = re.search(r"\w+_Weights", annotation)
    if place is None or not found:
        return None
    body = reader.definition(place[0], found[0])[1].body
    return Literal[tuple(name for line in body for name in sorted(bound_names(line)))] | None


def argument_help(docstring: str, name: str) -> str:
    """What a docstring says of an argument, as `name: text` or `name (type, optional): text`, with indented lines."""
    found = re.search(rf"^( *){name}(?: ?\(.*?\))?:(?: +|\n\1 +)(\S.*(?:\n\1 +\S.*)*)", docstring, re.MULTILINE)
    return " ".join(found[2].split()) if found else ""


def prose(docstring: str) -> str:
    """The first paragraphs of a docstring: what stands before its options, a formula or a list."""
    paragraphs = []
    for paragraph in docstring.split("\n\n"):
        if paragraph.startswith((" ", "..", "Args:", "Example", ">>>")) or re.match(r"\w+: \S", paragraph):
            break
        paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def first_line(docstring: str) -> str:
    """The first paragraph of a docstring; its first sentence, shortened, where that is longer than a line."""
    paragraph = " ".join(plain(docstring.split("\n\n")[0]).split())
    return paragraph if len(paragraph) <= 116 else shorten(re.split(r"(?<=\.) ", paragraph)[0], 100, placeholder=" ...")


def plain(text: str) -> str:
    """Text without the marks of reStructuredText, as the docstrings of torch and torchvision have them."""
    text = re.sub(r"(?::[\w:]+:)?`~?\.?([^`<]+?)\s*(?:<[^`>]*>)?`_*", r"\1", text)         # links and roles
    text = re.sub(r"\s*\(default: [^()]*(?:\([^()]*\))?[^()]*\)", "", text)              # shown with the type
    return re.sub(r"[`*]{2}", "", text)
