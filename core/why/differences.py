"""Compare two tapes."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loopctl.tape.reading import read_tape


@dataclass(frozen=True)
class Explanation:
    """What `explain_difference` found."""

    same: bool              # whether every update of both tapes has the same bits
    update: int | None      # the first update that differs
    cause: str              # a word from CAUSES; "" where they are the same
    certain: bool
    text: str               # what differs first and what that means, for a reader


def explain_difference(one: str | Path, other: str | Path) -> Explanation:
    """Say what first differs in two tapes."""
    a, b = read_tape(Path(one)), read_tape(Path(other))
    for number in sorted(a.updates.keys() | b.updates.keys()):
        x, y = a.updates.get(number), b.updates.get(number)
        if x is None or y is None:
            return Explanation(False, number, "length", True, f"only one has update {number}")
        if x.table("weights", "end") != y.table("weights", "end"):
            return Explanation(False, number, "unknown", False, f"the weights differ after update {number}")
    return Explanation(True, None, "", True, "the same")
