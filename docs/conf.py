"""The documentation as a site: python -m sphinx -W docs site. A page for each plugin is written from its docstring."""
from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path
from typing import Any

import loopctl
from loopctl.composition.compose import SPECS
from loopctl.composition.options import plugin_options

sys.path.insert(0, str(Path(__file__).parent))
import docstrings
import gallery

project = "loopctl"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
smartquotes = False                    # quotes in docstrings are those of Python
html_theme = "furo"
html_title = "loopctl"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
myst_heading_anchors = 3
exclude_patterns = ["examples"]        # packages of their own
suppress_warnings = ["myst.xref_missing"]       # links to files of the repository, which the site does not have
PLUGINS = Path(__file__).parent / "generated"


def page(name: str, cls: type) -> str:
    """What a plugin is for, its options, and the hooks that it joins."""
    summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
    known = plugin_options(cls)
    prose = without_options(rest.strip(), set(known))
    lines = [f"# {name}", "", summary, "", prose, ""]
    if known:
        lines += ["| option | default | |", "|---|---|---|"]
        for option in known.values():
            default = f"`{option.default}`"
            if option.default is None or option.default is dataclasses.MISSING:
                default = "" if option.default is None else "must be said"
            lines.append(f"| `{option.name}` | {default} | {option.help.replace('|', chr(92) + '|')} |")
    own = [hook for hook in SPECS if hasattr(getattr(cls, hook, None), "loopctl_impl")]
    lines += ["", "It joins " + ", ".join(f"[`{hook}`](../hooks.md#{hook})" for hook in own) + ".", ""]
    return "\n".join(lines)


def without_options(text: str, names: set[str]) -> str:
    """A docstring without what it says of each option, which `plugin_options` reads."""
    prose, name = [], ""
    for line in text.splitlines():
        head, colon, _ = line.partition(":")
        name = head if colon and head in names else name if line.startswith("    ") else ""
        if not name:
            prose.append(line)
    return "\n".join(prose)


def write(app: Any) -> None:
    PLUGINS.mkdir(exist_ok=True)
    for name in loopctl.available():
        text = page(name, loopctl.load(name))
        file = PLUGINS / f"{name}.md"
        if not file.exists() or file.read_text() != text:           # else all of them are read anew
            file.write_text(text)


def draw(app: Any) -> None:
    """Draw the pictures of gallery.md that are missing, or older than the page."""
    gallery.draw(outdated_only=True)


def setup(app: Any) -> None:
    app.connect("builder-inited", write)
    app.connect("builder-inited", draw)
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("autodoc-process-signature", docstrings.shorten)
    app.connect("autodoc-skip-member", docstrings.skip)
