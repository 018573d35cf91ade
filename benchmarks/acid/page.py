"""Write docs/acid.md from the results of run.py and the notes of each library."""
from __future__ import annotations

import re
import tomllib
from typing import Any

from cell import HERE
from works import WORKS

PAGE = HERE.parents[1] / "docs" / "acid.md"
COLUMNS = 5             # libraries in a table
WORDS = {"rounding": "same, rounded"}

HEAD = """# An acid test for training loops

The same small works in {count} libraries. Each is trained with the library, as its documentation says, and with a loop
by hand in plain PyTorch. A tape records every update of both, and `loopctl why` says what differs first. No library is
wrong because it differs: some do so by design, and say so. But one should know it before two curves are compared.

The model has about 100 parameters and the data 60 to 80 samples, so that every number can be followed by hand. What a
library leaves to code of the user's own, such as an average of the weights in a loop that one writes oneself, is the
same here if its documentation shows how to write it.

{versions}

## The table

{tables}

- **same**: after every update the weights are those of the plain loop, bit for bit, and so are the results that the
  work asks for, to six digits.
- **same, rounded**: the weights agree to five digits. So they do with two processes, where sums have another order.
- **differs**: in brackets is the cause in one word, and [below](#library-by-library) in sentences.
- **not offered**: the library has no such thing or refuses it, and its documentation names no way to do it.
- **needs a GPU**: the library does it, but not on a CPU, where this table was made.

## What is asked for

{works}

## Library by library

What stands first, in quotes, was found from the tapes alone. The last sentences are about what the documentation says.

{sections}

## Make the table yourself

```console
$ python benchmarks/acid/run.py --install --jobs 2
$ python benchmarks/acid/run.py --page
```

The first command makes an environment for each library, with the versions above on top of the torch that is installed,
trains everything, and writes [the results](../benchmarks/acid/results.json). `--environments` says where the
environments are. The second command writes this page from the results. A single work is trained and explained with

```console
$ python benchmarks/acid/run.py lightning last_partial_group
```

The scripts are in [benchmarks/acid](../benchmarks/acid), at most 60 lines each; `works.py` says what one is given and
what it returns. One that does not do what the documentation of its library says is a fault of this page.
"""


def title(work: str) -> str:
    return work.replace("_", " ")


def table(cells: dict[str, dict[str, Any]], names: dict[str, str]) -> str:
    """The works as rows, some libraries as columns."""
    lines = ["| | " + " | ".join(names.values()) + " |", "|---|" + "---|" * len(names)]
    for work in WORKS:
        row = []
        for library in names:
            cell = cells[library][work]
            cause = f" ({cell['cause']})" if cell["cause"] not in ("", "unknown") else ""
            row.append(f"**differs**{cause}" if cell["end"] == "differs" else WORDS.get(cell["end"], cell["end"]))
        lines.append(f"| {title(work)} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def said(cell: dict[str, Any], name: str) -> str:
    """What `why` says first, with the names of the two in place of A and B."""
    text = re.split(r"\n(?:It may mean|Equal until|Before that|The tapes)", cell["text"])[0].replace("\n", " ")
    text = re.sub(r"(^|\. )B\b", r"\1The plain loop", re.sub(r"\bA\b", name, text))
    return re.sub(r"\bB\b", "the plain loop", text).strip().rstrip(".")


def remarks(library: str, name: str, cells: dict[str, Any]) -> str:
    """A line for each work that is not the same, or of which something should be known."""
    file = HERE / library / "notes.toml"
    notes = tomllib.loads(file.read_text()) if file.exists() else {}
    lines = []
    for work in WORKS:
        cell, note = cells.get(work), notes.get(work, {})
        alike = cell and cell["end"] in ("same", "rounding")
        if cell is None or (alike and not note):
            continue
        documented = note.get("documented", "")
        words = [note.get("says", ""), documented and f"*Documentation*: {documented}"]
        if cell["end"] == "differs":
            words.insert(0, f'"{said(cell, name)}."')
        elif not alike and not words[0]:
            words[0] = cell["text"].splitlines()[0]
        end = "" if alike else f", {cell['end']}"
        script = f"../benchmarks/acid/{library}/{work}.py"
        lines.append(f"- [{title(work)}]({script}){end}: " + " ".join(filter(None, words)))
    return "\n".join(lines)


def page(results: dict[str, Any], names: dict[str, str]) -> str:
    """The text of the page. names: of the libraries, by their folders."""
    cells, versions = results["cells"], results["versions"]
    names = {library: name for library, name in names.items() if library in cells}
    groups = [dict(list(names.items())[start:start + COLUMNS]) for start in range(0, len(names), COLUMNS)]
    sections = [f"### {name} {versions[library]}\n\n{text}" for library, name in names.items()
                if library != "loopctl" and (text := remarks(library, name, cells[library]))]
    environment = results["environment"]
    return HEAD.format(
        count=len(names),
        versions=", ".join(f"{name} {versions[library]}" for library, name in names.items())
        + f"; torch {environment['torch']}, Python {environment['python']}, on a CPU ({environment['device_name']}).",
        tables="\n\n".join(table(cells, group) for group in groups),
        works="\n".join(f"- **{title(name)}**: {work.asks}" for name, work in WORKS.items()),
        sections="\n\n".join(sections))
