"""How two tables of fingerprints are related: equal, a multiple, nearly equal, or with tensors that only one has."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import isfinite, sqrt

from loopctl.tape.fingerprint import MISSING
from loopctl.tape.reading import Table

ROUNDING = 1e-5         # the largest relative distance that another order of sums in float32 explains in one update
SCALED = 2e-5           # how exactly a table that is called a multiple of another one is that
NOTHING = 1e-6          # the part of the norm of all tensors below which that of one is rounding
FITTED = 0.02           # the part of a difference that a sum with another table may leave unexplained


@dataclass(frozen=True)
class Relation:
    """How table A is related to table B."""

    kind: str                               # equal, rounding, scaled, rows, missing, not finite, different
    ratio: float = 1.0                      # A is so many times B, in every row that differs
    distance: float = 0.0                   # of A from B, relative to the larger one; estimated
    rows: tuple[str, ...] = ()              # that differ; of "missing", that only one has
    count: int = 0                          # rows in all
    lacking: str = ""                       # of "missing" and "not finite": which one it is, A or B
    ratios: tuple[float, ...] = ()          # of the rows that differ, where each is a multiple of its own

    @property
    def same(self) -> bool:
        return self.kind == "equal"


def relate(a: Table, b: Table, tolerance: float = ROUNDING) -> Relation:
    """How table `a` is related to `b`, which has the same rows. tolerance: the distance that counts as rounding."""
    count = len(a.names)
    differing = [row for row in range(count) if a.checksums[row] != b.checksums[row]
                 or (a.norms[row] == MISSING) != (b.norms[row] == MISSING)]
    if not differing:
        return Relation("equal", count=count)
    rows = tuple(a.names[row] for row in differing)
    for lacking, one in (("A", a), ("B", b)):
        other = b if one is a else a
        bad = tuple(a.names[row] for row in differing if not isfinite(one.norms[row]) and isfinite(other.norms[row]))
        if bad:
            return Relation("not finite", rows=bad, count=count, lacking=lacking, distance=1.0)
    for lacking, one in (("A", a), ("B", b)):
        gone = tuple(a.names[row] for row in differing
                     if one.norms[row] == MISSING and (b if one is a else a).norms[row] > 0)
        if gone:
            return Relation("missing", rows=gone, count=count, lacking=lacking, distance=1.0)
    # A gradient that is 0 but for rounding, such as that of a bias before BatchNorm, tells nothing.
    floor = NOTHING * max(a.norm, b.norm)
    both = [row for row in differing if a.norms[row] != MISSING and b.norms[row] != MISSING
            and max(a.norms[row], b.norms[row]) > floor]
    away = distance(a, b)
    if away <= tolerance and all(near(a, b, row, 1.0, tolerance) for row in both):
        return Relation("rounding", distance=away, rows=rows, count=count)
    if both and all(a.norms[row] > 0 and b.norms[row] > 0 for row in both):
        ratios = [a.norms[row] / b.norms[row] for row in both]
        largest = max(both, key=lambda row: b.norms[row])
        ratio = signed(a, b, largest)
        if all(near(a, b, row, ratio, SCALED) for row in both):
            whole = len(both) == sum(norm > floor for norm in b.norms)
            return Relation("scaled" if whole else "rows", ratio, away, rows, count)
        own = [signed(a, b, row) for row in both]
        if all(near(a, b, row, each, SCALED) for row, each in zip(both, own, strict=True)) and len(both) > 1:
            return Relation("rows", 1.0, away, rows, count, ratios=tuple(ratios))
    return Relation("different", 1.0, away, rows, count)


def signed(a: Table, b: Table, row: int) -> float:
    """The ratio of two rows, negative where the projections have other signs."""
    ratio = a.norms[row] / b.norms[row]
    return -ratio if a.projections[row] * b.projections[row] < 0 else ratio


def near(a: Table, b: Table, row: int, ratio: float, tolerance: float) -> bool:
    """Whether a row of `a` is `ratio` times that of `b`, as far as norm and projection tell."""
    size = max(a.norms[row], abs(ratio) * b.norms[row])
    return (abs(a.norms[row] - abs(ratio) * b.norms[row]) <= tolerance * size
            and abs(a.projections[row] - ratio * b.projections[row]) <= 4 * tolerance * size)


def distance(a: Table, b: Table) -> float:
    """The norm of the difference of two tables, relative to the larger one: estimated by the projections.

    The signs of a projection are random, so the square of its difference is on average the squared norm of that.
    """
    pairs = [*zip(a.norms, b.norms, a.projections, b.projections, strict=True)]
    size = sqrt(max(sum(n * n for n, *_ in pairs if n > 0), sum(m * m for _, m, *_ in pairs if m > 0)) or 1.0)
    by_projection = sum((p - q) ** 2 for _, _, p, q in pairs)
    by_norm = sum((n - m) ** 2 for n, m, *_ in pairs if n > 0 and m > 0)
    return sqrt(max(by_projection, by_norm)) / size


def minus(a: Table, b: Table) -> list[float]:
    """The projections of the difference of two tables."""
    return [p - q for p, q in zip(a.projections, b.projections, strict=True)]


def fit(target: Sequence[float], parts: Sequence[Sequence[float]], noise: float) -> list[float] | None:
    """The factors with which the sum of `parts` is `target`; None where they are not, or the rows are too few.

    noise: how exact the numbers of the target are, as a sum over all rows
    """
    size = sqrt(sum(value * value for value in target))
    if len(target) < 2 * len(parts) + 1 or size <= 10 * noise or not all(map(isfinite, target)):
        return None
    factors = least_squares(target, parts)
    if factors is None:
        return None
    rest = [value - sum(factor * part[row] for factor, part in zip(factors, parts, strict=True))
            for row, value in enumerate(target)]
    return factors if sqrt(sum(value * value for value in rest)) <= FITTED * size + noise else None


def least_squares(target: Sequence[float], parts: Sequence[Sequence[float]]) -> list[float] | None:
    """The factors of `parts`, one or two, whose sum is nearest to `target`."""
    products = [[sum(x * y for x, y in zip(one, other, strict=True)) for other in parts] for one in parts]
    right = [sum(x * y for x, y in zip(part, target, strict=True)) for part in parts]
    if len(parts) == 1:
        return [right[0] / products[0][0]] if products[0][0] > 0 else None
    (a, b), (_, d) = products
    determinant = a * d - b * b
    if determinant <= 1e-6 * a * d:
        return None
    return [(d * right[0] - b * right[1]) / determinant, (a * right[1] - b * right[0]) / determinant]


@cache
def matched_rows(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The rows of two tables that belong together: by name, without a prefix that all names of one have, or by order.
    """
    for names_a, names_b in ((a, b), (without_prefix(a), without_prefix(b))):
        places = {name: row for row, name in enumerate(names_b)}
        shared = [(row, places[name]) for row, name in enumerate(names_a) if name in places]
        if shared and 2 * len(shared) >= min(len(a), len(b)):
            return tuple(row for row, _ in shared), tuple(row for _, row in shared)
    if len(a) == len(b):
        return tuple(range(len(a))), tuple(range(len(b)))
    return (), ()


def without_prefix(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names without the parts, such as `model.`, with which all of them begin."""
    while names and len({name.partition(".")[0] for name in names}) == 1 and all("." in name for name in names):
        names = tuple(name.partition(".")[2] for name in names)
    return names


def chosen(table: Table, rows: tuple[int, ...], names: tuple[str, ...]) -> Table:
    """The given rows of a table, under other names."""
    return Table(names, tuple(table.checksums[row] for row in rows), tuple(table.norms[row] for row in rows),
                 tuple(table.projections[row] for row in rows))


def matched(a: Table, b: Table) -> tuple[Table, Table]:
    """Two tables with the rows that both have, in the order and by the names of the first."""
    if a.names == b.names:
        return a, b
    rows_a, rows_b = matched_rows(a.names, b.names)
    names = tuple(a.names[row] for row in rows_a)
    return chosen(a, rows_a, names), chosen(b, rows_b, names)


def only_in_one(a: Table, b: Table) -> tuple[list[str], list[str]]:
    """The names of rows that only `a` has, and those that only `b` has."""
    rows_a, rows_b = (set(), set()) if a.names == b.names else map(set, matched_rows(a.names, b.names))
    if a.names == b.names:
        return [], []
    return ([name for row, name in enumerate(a.names) if row not in rows_a],
            [name for row, name in enumerate(b.names) if row not in rows_b])
