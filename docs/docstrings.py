"""Docstrings, which here are plain text, as reStructuredText for Sphinx's autodoc."""
from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from contextlib import suppress
from typing import Any

MARKUP = re.compile(r"([\\*`_|])")                          # characters that reStructuredText would read as markup
SECTION = re.compile(r"(\w+(?:, \w+)*): (.+)", re.DOTALL)   # `name: what it is`, or several names


def to_rest(text: str, names: set[str]) -> list[str]:
    """The lines of a docstring: paragraphs, with a list of what is said about each of `names`.

    Text in backticks becomes literal. A paragraph that is indented is shown as it is.
    """
    lines: list[str] = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if paragraph.startswith(" "):
            lines += ["::", "", *textwrap.indent(textwrap.dedent(paragraph), "    ").splitlines(), ""]
            continue
        for item in items(paragraph, names):
            about = SECTION.fullmatch(item)
            if about and names.issuperset(about[1].split(", ")):
                item = f"* {', '.join(f'``{name}``' for name in about[1].split(', '))}: {escape(about[2])}"
            elif item.startswith("- "):
                item = f"* {escape(item[2:])}"
            else:
                item = escape(item)
            lines += [item, ""]
    return lines


def items(paragraph: str, names: set[str]) -> list[str]:
    """A paragraph, cut where a line begins an item of a list, each part on one line."""
    found: list[str] = []
    for line in paragraph.splitlines():
        about = SECTION.fullmatch(line)
        begins = line.startswith("- ") or (about and names.issuperset(about[1].split(", ")))
        if begins or not found:
            found.append(line.strip())
        else:
            found[-1] += f" {line.strip()}"
    return found


def escape(text: str) -> str:
    """Text that Sphinx shows as it is, but for what is in backticks, which becomes literal."""
    parts = re.split(r"`+([^`]+)`+", text)
    for index, part in enumerate(parts):
        # An escaped space is no space: literal text may then stand next to anything.
        parts[index] = f"\\ ``{part.strip()}``\\ " if index % 2 else MARKUP.sub(r"\\\1", part)
    return "".join(parts).strip().removeprefix("\\ ")


def fields_with_comments(cls: type) -> list[str]:
    """A list of a dataclass's public fields, each with its type, its default and the comment after it in the source.

    A comment on lines of its own stands before those that it heads.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    rows = source.splitlines()
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    lines: list[str] = []
    last = 0
    for node in body.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id[0] == "_":
            last = node.end_lineno or last
            continue
        above = [row.strip()[2:] for row in rows[last:node.lineno - 1] if row.strip().startswith("# ")]
        if above:
            lines += ["", escape(" ".join(above)), ""]
        last = node.end_lineno or node.lineno
        comments = [part.strip() for part in rows[last - 1][node.end_col_offset:].split("#")[1:]]
        said = " ".join(part for part in comments if part and not part.startswith("type: ignore"))
        default = f" = {ast.unparse(node.value)}" if node.value and "field(" not in ast.unparse(node.value) else ""
        declared = f"``{node.target.id}: {ast.unparse(node.annotation)}{default}``"
        lines.append(f"* {declared}{': ' if said else ''}{escape(said)}")
    return [*lines, ""]


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Replace the lines of a docstring; the handler of autodoc-process-docstring."""
    names: set[str] = set()
    if callable(obj):
        with suppress(TypeError, ValueError):           # of what has no signature
            names = set(inspect.signature(obj).parameters)
    fields: set[str] = set()
    if what == "class" and dataclasses.is_dataclass(obj):
        fields = {field.name for field in dataclasses.fields(obj)}
    lines[:] = to_rest("\n".join(lines), names | fields)
    if fields and not any(line.startswith(tuple(f"* ``{field}``" for field in fields)) for line in lines):
        lines += fields_with_comments(obj)


def shorten(app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any) -> Any:
    """Leave out the signature of a dataclass whose fields are listed; the handler of autodoc-process-signature."""
    many = what == "class" and dataclasses.is_dataclass(obj) and len(dataclasses.fields(obj)) > 6
    return ("", None) if many else None


def skip(app: Any, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what is neither a function nor a class nor a property; the handler of autodoc-skip-member."""
    kept = inspect.isroutine(obj) or inspect.isclass(obj) or isinstance(obj, property)
    return None if kept else True
