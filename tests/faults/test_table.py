"""The table in docs/faults.md is generated from the marks of the tests beside this file.

`@pytest.mark.fault(row="A1", given="...", right="...")` marks the test of a reported fault. A mark with the letter alone
is a further input of the same kind, tried because a fault is seldom alone.
"""
import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "faults.md"

KINDS = {
    "A": "What a user's function or object returns is used before it is looked at",
    "B": "A weight of zero, an empty batch",
    "C": "Saved, and not readable or not right again",
    "D": "Two processes, one folder",
    "E": "Code or files from where they do not belong",
    "F": "Losing a run to something beside it",
    "G": "The optimizer and its rates",
    "H": "The data is believed",
    "I": "Words and letters",
    "J": "Averages, trials, and metrics",
    "K": "Texts that come from others",
    "L": "Resuming in another world",
    "M": "Processes that are not alike, or left behind",
}
# Of the further inputs of each kind, how many failed with the version before the table. Those that could only fail there,
# because they call what did not exist, are not counted.
FAILED_AT_FIRST = {"A": 13, "B": 6, "C": 11, "D": 5, "E": 1, "F": 5, "G": 16, "H": 15, "I": 31, "J": 18, "K": 9, "L": 5, "M": 12}


def marks():
    """Yield (row, given, right, test name) of each mark, by file and line."""
    for file in sorted(HERE.glob("test_*.py")):
        for function in ast.parse(file.read_text()).body:
            for mark in getattr(function, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    values = {keyword.arg: ast.literal_eval(keyword.value) for keyword in mark.keywords}
                    yield values["row"], values["given"], values["right"], function.name


def page():
    """The content of docs/faults.md."""
    lines = [
        "# Reported faults", "",
        "Inputs that other training loops, or an earlier version of this one, got wrong. Each row has a test with the right",
        "value, in tests/faults. The further inputs of a kind were tried because a fault is seldom alone.",
        "`python tests/faults/test_table.py` writes this page.", ""]
    found = list(marks())
    for letter, title in KINDS.items():
        rows = sorted((mark for mark in found if mark[0][0] == letter and mark[0] != letter), key=lambda mark: int(mark[0][1:]))
        further = [mark for mark in found if mark[0] == letter]
        lines += [f"## {letter}. {title}", "", "| | given | right | test |", "|---|---|---|---|"]
        lines += [f"| {row} | {given} | {right} | `{test}` |" for row, given, right, test in rows]
        lines += [f"| | {given} | {right} | `{test}` |" for _, given, right, test in further]
        failed = FAILED_AT_FIRST.get(letter)
        lines += ["", f"Further inputs: {len(further)}" + (f", of which {failed} failed at first." if failed is not None else "."), ""]
    return "\n".join(lines).rstrip() + "\n"


def test_the_table_in_the_docs_is_up_to_date():
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("letter", KINDS)
def test_every_kind_has_as_many_further_inputs_as_rows(letter):
    found = [row for row, *_ in marks() if row[0] == letter]
    assert len([row for row in found if row == letter]) >= len({row for row in found if row != letter}) > 0


def test_a_mark_names_a_row():
    for row, given, right, test in marks():
        assert re.fullmatch(r"[A-M]\d*", row)
        assert given
        assert right
        assert test.startswith("test_")


if __name__ == "__main__":
    PAGE.write_text(page())
