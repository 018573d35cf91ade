"""The documentation as a site: python -m sphinx -W docs site. A page for each plugin is written from its docstring."""
from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import loopctl
from loopctl.cli.listing import default_text
from loopctl.composition.compose import SPECS
from loopctl.composition.option_types import describe_type
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
# Options of `loopctl run` with which a plugin is typically used, where that is not without options of the plugin.
EXAMPLES = {
    "accumulate": "--batch-size 16 --plugin accumulate:every=4",
    "amp": "--plugin amp:dtype=bfloat16",
    "checkpoint": "--plugin checkpoint:every_minutes=10,monitor=val_accuracy",
    "clip": "--plugin clip:max_norm=1",
    "compile": "--plugin compile:mode=max-autotune",
    "confusion": "--plugin confusion --plugin report",
    "ddp": "--devices 0,1 --plugin ddp:sync_batchnorm=true",
    "distill": "--model cnn:width=8 --plugin distill:teacher=runs/teacher,temperature=4,alpha=0.9",
    "early_stopping": "--plugin early_stopping:monitor=val_accuracy,patience=5,restore_best=true",
    "max_time": "--plugin max_time:limit=2h",
    "mixup": "--plugin mixup:alpha=0.2 --plugin cutmix:switch_prob=0.5",
    "cutmix": "--plugin cutmix:alpha=1,prob=0.5",
    "progressive_resizing": "--plugin progressive_resizing:initial_scale=0.5",
    "selective_backprop": "--plugin selective_backprop:start=0.5,end=0.9,keep=0.5",
    "ema": "--plugin ema:decay=0.999",
    "float8": "--plugin float8:recipe=rowwise --plugin amp:dtype=bfloat16 --plugin compile",
    "freeze": "--plugin freeze:patterns=0.*,until=2ep",
    "fsdp": "--devices 0,1 --plugin fsdp",
    "label_smoothing": "--plugin label_smoothing:smoothing=0.1",
    "layerwise_lr": "--lr 0.01 --plugin layerwise_lr:decay=0.75,no_decay=true",
    "lora": "--init runs/a --plugin lora:target_modules=1,r=4,modules_to_save=7",
    "lr_finder": "--plugin lr_finder:only=true",
    "csv": "--plugin csv:every_steps=50",
    "mlflow": "--plugin mlflow:experiment=digits",
    "nan_guard": "--plugin nan_guard:action=skip",
    "norms": "--plugin norms:every_steps=20 --plugin report",
    "plateau": "--plugin plateau:factor=0.5,patience=3",
    "profile": "--max-steps 40 --plugin profile:start=10",
    "prune": "--epochs 20 --plugin prune:amount=0.8,start=2ep,until=15ep",
    "qat": "--plugin qat:base_config=IntxWeightOnlyConfig,weight_dtype=int4,group_size=32",
    "sam": "--plugin sam:rho=0.05",
    "spike": "--plugin spike:action=skip,deviations=6",
    "split": "--batch-size 256 --plugin split:into=4",
    "tape": "--plugin tape:every_steps=10",
    "wandb": "--plugin wandb:project=digits",
}
# The arguments of the commands of gallery.md, without those that only draw, by the name of the picture.
DRAWN = {Path(arguments[-1]).stem: arguments[1:-2] for arguments in gallery.commands()}


def page(name: str, cls: type) -> str:
    """What a plugin is for, how it is used, its curve if it is a schedule, its options, and the hooks that it joins."""
    summary, _, rest = inspect.cleandoc(cls.__doc__ or "").partition("\n")
    known = plugin_options(cls)
    prose = without_options(rest.strip(), set(known))
    lines = [f"# {name}", "", markdown(summary), "", markdown(prose), ""]
    lines += ["```console", f"$ {example(name)}", "```", ""]
    if name in DRAWN:
        lines += [f"![The learning rate of {name}](../gallery/{name}.svg)", "",
                  f"The picture is from [the curves of all schedules](../gallery.md#{name}).", ""]
    if known:
        lines += ["| option | default | |", "|---|---|---|"]
        for option in known.values():
            default = "required" if option.default is dataclasses.MISSING else code(default_text(option))
            about = "; ".join(filter(None, [markdown(option.help), markdown(describe_type(option.type))]))
            lines.append(f"| `{option.name}` | {default} | {about} |")
    own = [hook for hook in SPECS if hasattr(getattr(cls, hook, None), "loopctl_impl")]
    lines += ["", "It joins " + ", ".join(f"[`{hook}`](../hooks.md#{hook})" for hook in own) + ".", ""]
    return "\n".join(lines)


def example(name: str) -> str:
    """A command with the plugin: that of the gallery for a schedule, otherwise one with typical options."""
    return " ".join(["loopctl run", *DRAWN.get(name, EXAMPLES.get(name, f"--plugin {name}").split())])


def markdown(text: str) -> str:
    """Text of a docstring as Markdown that shows it as it is, also in a table; what is in backticks is literal."""
    parts = re.split(r"`+([^`]+)`+", text)
    for index, part in enumerate(parts):
        parts[index] = code(part) if index % 2 else re.sub(r"([\\*_\[\]<>|#~])", r"\\\1", part)
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", "".join(parts))


def code(text: str) -> str:
    """Literal text, in a table too; nothing for no text."""
    return f"`{text.replace('|', chr(92) + '|')}`" if text else ""


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


def link_plugins(app: Any, docname: str, source: list[str]) -> None:
    """Link the names in the table of plugins.md to the pages of the plugins, which only the site has."""
    if docname == "plugins":
        source[0] = re.sub(r"^\| `(\w+)` \|", r"| [`\1`](generated/\1.md) |", source[0], flags=re.MULTILINE)


def draw(app: Any) -> None:
    """Draw the pictures of gallery.md that are missing, or older than the page."""
    gallery.draw(outdated_only=True)


def setup(app: Any) -> None:
    app.connect("builder-inited", write)
    app.connect("builder-inited", draw)
    app.connect("source-read", link_plugins)
    app.connect("autodoc-process-docstring", docstrings.process)
    app.connect("autodoc-process-signature", docstrings.shorten)
    app.connect("autodoc-skip-member", docstrings.skip)
