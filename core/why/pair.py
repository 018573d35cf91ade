"""One update of two tapes, side by side, and what is found in it."""
from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isclose, isfinite
from typing import Any

from loopctl.tape.reading import Table, TapeContent, Update
from loopctl.why.tables import ROUNDING, Relation, matched, relate


@dataclass(frozen=True)
class Finding:
    """Something in which two updates differ."""

    cause: str                          # one of the words in causes.CAUSES
    fact: str                           # what the tapes show, as a clause about A and B
    meaning: str = ""                   # what it means, as a sentence
    certain: bool = True                # whether the numbers prove the meaning, and do not only suggest it
    fact_too: bool = False              # the meaning is a fact that the tapes show, though perhaps not the reason
    minor: bool = False                 # it changes nothing by itself, or no more than rounding does
    plugins: tuple[str, ...] = ()       # that are named as the reason


@dataclass
class Pair:
    """The same update of two tapes, A and B, with the one before where both have it."""

    a: TapeContent
    b: TapeContent
    x: Update
    y: Update
    before: Pair | None = None
    grown: dict[str, float] = field(default_factory=dict)      # how far apart they were by rounding before, by what

    @property
    def number(self) -> int:
        return self.x.number

    @property
    def consecutive(self) -> bool:
        """Whether the update before is the one just before."""
        return self.before is not None and self.before.number == self.number - 1

    def tables(self, what: str, point: str) -> tuple[Table, Table] | None:
        """The tables of both, with the rows that both have; None where one has none."""
        one, other = self.x.table(what, point), self.y.table(what, point)
        if one is None or other is None:
            return None
        pair = matched(one, other)
        return pair if pair[0].names else None

    def relation(self, what: str, point: str) -> Relation | None:
        return self.related(what, self.tables(what, point))

    def related(self, what: str, tables: tuple[Table, Table] | None) -> Relation | None:
        """How two tables are related. A distance that rounding has grown to before is rounding still."""
        if tables is None:
            return None
        return relate(*tables, tolerance=max(ROUNDING, min(30 * self.grown.get(what, 0.0), 0.1)))

    def gradients(self) -> tuple[Table, Table] | None:
        """The gradients as the backward passes left them."""
        return self.both(raw_gradients(self.x), raw_gradients(self.y))

    def final_gradients(self) -> tuple[Table, Table] | None:
        """The gradients that the update was made from."""
        return self.both(final_gradients(self.x), final_gradients(self.y))

    def both(self, one: Table | None, other: Table | None) -> tuple[Table, Table] | None:
        if one is None or other is None:
            return None
        pair = matched(one, other)
        return pair if pair[0].names else None


def acting_in_one(pair: Pair, *hooks: str) -> list[tuple[str, str, str]]:
    """The plugins that act at one of these hooks in one of the two only: plugin, hook, A or B."""
    headers = [tape.header["acting"] for tape in (pair.a, pair.b) if "acting" in tape.header]
    if len(headers) < 2:
        return []
    found = []
    for hook in hooks:
        names = [[name for name in header.get(hook, []) if hook != "setup" or not acts_later(header, name)]
                 for header in headers]
        found += [(name, hook, "A") for name in names[0] if name not in names[1]]
        found += [(name, hook, "B") for name in names[1] if name not in names[0]]
    return found


def acts_later(header: dict[str, Any], name: str) -> bool:
    """Whether a plugin prepares something in `setup` for what it does at a later point of an update."""
    return any(name in header.get(hook, []) for hook in ("after_backward", "grads_ready", "lr_scale", "group_batches"))


def with_suspects(found: Finding, pair: Pair, *hooks: str) -> Finding:
    """A finding with the plugins added that act at one of these hooks in one of the two only."""
    if not (who := suspects(pair, *hooks)):
        return found
    return replace(found, meaning=f"{found.meaning} {who}".strip(),
                   plugins=tuple(dict.fromkeys(name for name, *_ in acting_in_one(pair, *hooks))))


def suspects(pair: Pair, *hooks: str) -> str:
    """A sentence that names those plugins; empty where there are none."""
    found = {name: (hook, side) for name, hook, side in acting_in_one(pair, *hooks)}
    only = "; ".join(f"{name} acts at {hook} in {side} only" for name, (hook, side) in found.items())
    return f"The plugin {only}, which may be the reason." if len(found) == 1 else f"Plugins: {only}." if found else ""


def classes_of(pair: Pair) -> tuple[list[str], list[str]]:
    """The classes of the optimizers of both."""
    one, other = (sorted({group["optimizer"] for group in tape.header.get("groups", [])}) for tape in (pair.a, pair.b))
    return one, other


def has_gradients(pair: Pair) -> bool:
    """Whether optimizers of torch make the updates of both, so that these are made from the gradients on the tapes."""
    return all(classes_of(pair))


def other_of(side: str) -> str:
    """The name of the other one."""
    return "B" if side == "A" else "A"


def raw_gradients(update: Update) -> Table | None:
    """The gradients after the last backward pass of the first closure call."""
    points = [point for point in update.points("gradients")
              if point.split(": ")[-1].startswith("backward") and "(call" not in point]
    return update.table("gradients", points[-1]) if points else None


def final_gradients(update: Update) -> Table | None:
    points = update.points("gradients")
    return update.table("gradients", points[-1]) if points else None


def batch_count(update: Update) -> int:
    """The micro-batches of an update."""
    return int(update.values.get("micro_batches") or len(update.values.get("batches", {})))


def shown(number: float) -> str:
    """A number as it is read: three digits, without an exponent where it can do without."""
    if not isfinite(number):
        return "not finite"
    if isclose(number, round(number), rel_tol=1e-4) and abs(number) < 1e6:
        return f"{round(number):,}"
    return f"{number:.3g}"


def ratio_text(ratio: float) -> str:
    return f"{ratio:.3f}" if 0.01 <= abs(ratio) < 1000 else f"{ratio:,.0f}" if abs(ratio) >= 1000 else f"{ratio:.3g}"


def listed(items: list[str] | tuple[str, ...], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    few = list(items[:most]) + [f"{len(items) - most} more"] * (len(items) > most)
    return few[0] if len(few) == 1 else ", ".join(few[:-1]) + " and " + few[-1]


def fraction(ratio: float, largest: int = 512) -> tuple[int, int] | None:
    """Whole numbers whose quotient is `ratio`, the smallest there are; None where there are none up to `largest`."""
    for below in range(1, largest + 1):
        above = round(ratio * below)
        if 0 < above <= largest and isclose(above / below, ratio, rel_tol=2e-5):
            return above, below
    return None
