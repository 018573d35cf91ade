"""The table in docs/catalogue.md is generated from marks of tests: each technique, where it is from, and how equal it is.

`@pytest.mark.compares(use="clip:max_norm", technique="...", source="torch.nn.utils.clip_grad_norm_", tolerance="to the bit")`
marks the test that compares a technique with the formula or the library that it is from. A test may have several marks.
"""
import ast
import re
from functools import cache
from pathlib import Path
from pkgutil import resolve_name

import pytest

from loopctl import available
from loopctl.cli.listing import topic
from loopctl.cli.source_reader import SourceReader

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "catalogue.md"
KEYS = ["use", "technique", "source", "tolerance"]
ARGUMENTS = "arguments of fit and of loopctl run"           # the heading of what is no plugin
# What plugins of these topics do, they tell of a run: it has no formula, and most of them say in their tests that the run stays the same.
WITHOUT_FORMULA = {"logging and reports", "checkpoints and stopping"}


@cache
def topics():
    """The topic of each built-in plugin, by its name."""
    reader = SourceReader()
    return {name: topic(entry, reader) for name, entry in available().items() if entry.value.startswith("loopctl.plugins.")}


@cache
def marks():
    """The values of each mark and the test that has it, by file and line."""
    found = []
    for file in sorted(HERE.rglob("test_*.py")):
        text = file.read_text()
        for function in ast.parse(text).body if "\n@pytest.mark.compares(" in text else []:
            for mark in getattr(function, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.compares":
                    assert [keyword.arg for keyword in mark.keywords] == KEYS, f"{file.name}: {function.name}"
                    values = [ast.literal_eval(keyword.value) for keyword in mark.keywords]
                    found.append((*values, f"{file.relative_to(HERE).as_posix()}::{function.name}"))
    return found


def plugins_of(use):
    """The names of the plugins in `clip:max_norm`, `linear, polynomial`, or `--optimizer sgd` or `fit(...)`, which have none."""
    return [] if use.startswith(("--", "fit(")) else [part.partition(":")[0] for part in use.split(", ")]


def page():
    """The content of docs/catalogue.md."""
    lines = [
        "# Where each technique is from", "",
        "For each row there is a test that compares the technique with the formula of the paper, with the library, or with the same training",
        "in plain PyTorch, written by hand. *To the bit* means that all numbers are the same. Where they are not, the operations are made",
        "in another order, and the test says within which tolerance they agree. [Thirty techniques](sources.md) have a table of their own, with",
        "the loop of each written by hand. `python tests/test_catalogue.py` writes this page from the marks of the tests.", ""]
    heading, rows = topics(), {}
    for use, technique, source, tolerance, test in marks():
        names = plugins_of(use)
        technique, source = (re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
                             for text in (technique, source))
        source = re.sub(r"\b((?:torch|torchvision|sklearn)(?:\.\w+)+)", r"`\1`", source)
        row = f"| `{use}` | {technique} | {source} | {tolerance} | `{test}` |"
        rows.setdefault(heading[names[0]] if names else ARGUMENTS, []).append((use, row))
    for title in sorted(rows, key=lambda title: (title == ARGUMENTS, title)):
        lines += [f"## {title[0].upper()}{title[1:]}", "", "| in loopctl | technique | from | equal | test |", "|---|---|---|---|---|"]
        lines += [row for _, row in sorted(rows[title])] + [""]
    return "\n".join(lines)


def test_the_table_in_the_docs_is_up_to_date():
    assert PAGE.read_text() == page(), "run python tests/test_catalogue.py"


def test_a_mark_says_what_is_compared_with_what_and_how_close():
    for use, technique, source, tolerance, test in marks():
        assert set(plugins_of(use)) <= {*available()}, test
        assert all(text.strip() and "|" not in text for text in (use, technique, source, tolerance)), test
        assert tolerance.startswith("to the bit") or re.search(r"\d", tolerance), test


def test_what_a_mark_names_in_a_library_exists():
    for _, _, source, _, test in marks():
        for name in re.findall(r"\b(?:torch|torchvision|sklearn)(?:\.\w+)+", source):
            assert resolve_name(name) is not None, f"{test}: {name}"


@pytest.mark.parametrize("name", sorted(name for name, heading in topics().items() if heading not in WITHOUT_FORMULA))
def test_every_plugin_with_a_technique_has_a_row(name):
    assert name in {name for use, *_ in marks() for name in plugins_of(use)}


if __name__ == "__main__":
    PAGE.write_text(page())
