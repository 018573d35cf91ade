"""How the gradients of two updates differ: as the backward passes leave them, and after each plugin."""
from __future__ import annotations

from math import isclose, isfinite, log2, sqrt

from loopctl.tape.reading import Table, Update
from loopctl.why.pair import (
    Finding,
    Pair,
    acting_in_one,
    batch_count,
    final_gradients,
    fraction,
    has_gradients,
    listed,
    other_of,
    ratio_text,
    raw_gradients,
    shown,
    suspects,
    with_suspects,
)
from loopctl.why.start import environment_difference, places
from loopctl.why.tables import ROUNDING, Relation, fit, minus, near, relate


def compare_gradients(pair: Pair) -> Finding | None:
    """How the gradients differ after the backward passes of the same batches at the same weights."""
    tables = pair.gradients()
    if tables is None or not has_gradients(pair):
        return None
    a, b = tables
    relation = pair.related("gradients", tables)
    assert relation
    if relation.same:
        return None
    if relation.kind == "rounding":
        return Finding("rounding", f"the gradients agree to {relation.distance:.1g}, and not to the bit",
                       environment_difference(pair), certain=False, minor=True)
    if relation.kind == "not finite":
        return Finding("not finite", f"the gradients of {listed(relation.rows)} are not finite in {relation.lacking} "
                                     "only",
                       half_precision(pair) or "An overflow, a division by 0, or another formula.",
                       certain=False)
    if relation.kind == "missing":
        return missing(pair, relation)
    if relation.kind == "scaled":
        return scaled(pair, relation)
    if found := added(pair, a, b):
        return found
    if found := weighted(pair):
        return found
    if relation.kind == "rows":
        what = (f"{ratio_text(relation.ratio)} times" if not relation.ratios else
                f"{ratio_text(min(relation.ratios))} to {ratio_text(max(relation.ratios))} times")
        return Finding("scale", f"the gradient of {listed(relation.rows)} is in A {what} that of B, in the same "
                                "direction; " + others(relation),
                       "Some hook on a tensor, or code that changes the gradients of single tensors.",
                       certain=False)
    return other_direction(pair, relation)


def others(relation: Relation) -> str:
    left = relation.count - len(relation.rows)
    return f"the other {left} tensors are equal" if left else "it is a factor of its own in every tensor"


def missing(pair: Pair, relation: Relation) -> Finding:
    """Tensors that have a gradient in one only."""
    lacking = relation.lacking
    tape = pair.a if lacking == "A" else pair.b
    frozen = {name for name, *_, requires_grad in tape.header.get("parameters", []) if not requires_grad}
    fact = f"{lacking} has no gradient for {listed(relation.rows)}"
    if any(name in frozen for row in relation.rows for name in row.split(" to ")):
        found = Finding("missing gradients", fact, "They do not require gradients there: they are frozen.")
        return with_suspects(found, pair, "setup", "param_groups")
    return Finding("missing gradients", fact, "They are not used in that forward pass, or are cut off by detach() or "
                                              "no_grad().", certain=False)


def scaled(pair: Pair, relation: Relation) -> Finding | None:
    """The gradient is the same multiple in every tensor: the way in which the loss is divided, or its scale."""
    ratio = relation.ratio
    fact = (f"the gradient of A is {ratio_text(ratio)} times that of B, in the same direction, in every tensor")
    scale = loss_scale_of(ratio)
    if scale:
        end = pair.related("gradients", pair.final_gradients())
        if end and end.kind in ("equal", "rounding"):
            return Finding("scale", f"the backward pass of {scale[0]} is made with the loss times {shown(scale[1])}, "
                                    "and the gradients are divided by that "
                                    "again", "That is the loss scale of half precision.",
                           minor=True)
        if end and end.kind == "scaled" and isclose(end.ratio, ratio, rel_tol=1e-3):
            return Finding("unscale", f"{fact}, and that is what the update is made from",
                           f"The loss scale of {scale[0]} ({shown(scale[1])}) is not divided out before the update.",
                           certain=False)
        return clipped_while_scaled(pair, scale[0], scale[1], end)
    counts = batch_count(pair.x), batch_count(pair.y)
    usual = usual_batches(pair)
    parts = fraction(abs(ratio))
    meaning, certain = "", True
    if counts[0] == counts[1] and parts and usual and counts[0] != usual and isclose(
            ratio if ratio < 1 else 1 / ratio, counts[0] / usual, rel_tol=1e-4):
        less = "A" if ratio < 1 else "B"
        meaning = (f"The update is made from {counts[0]} batch{'es' * (counts[0] > 1)}, the last of an epoch, and "
                   f"other updates from {usual}: {less} divides its gradient by {usual}, not by {counts[0]}.")
    elif counts[0] == counts[1] > 1 and parts in ((counts[0], 1), (1, counts[0])):
        more = "A" if ratio > 1 else "B"
        meaning = f"{more} adds up the gradients of its {counts[0]} batches, and {other_of(more)} takes their mean."
    elif parts and max(parts) > 1 and min(parts) == 1 and max(parts) in (size := batch_sizes(pair)):
        more = "A" if ratio > 1 else "B"
        meaning = (f"Batches have {max(parts)} samples: the loss is their sum in {more}, and their mean in "
                   f"{other_of(more)}."
                   if size else "")
    elif parts and max(parts) in (pair.a.header.get("world_size"), pair.b.header.get("world_size")):
        meaning = "It is the number of processes: gradients are added up in one of A and B, and averaged in the other."
    if not meaning:
        certain = False
        meaning = ("The loss is multiplied or divided by another number" + (f", such as {max(parts)}" if parts
                   and max(parts) > 1 else "") + ": a mean over another count, a weight of the loss, or gradients "
                                                 "that are clipped inside the backward pass.")
    return Finding("scale", fact, meaning, certain=certain)


def loss_scale_of(ratio: float) -> tuple[str, float] | None:
    """The one whose loss is scaled, and the scale, where a ratio of gradients is a power of two as scalers use."""
    large = ratio if ratio > 1 else 1 / ratio if ratio > 0 else 0
    if large < 64 or not isclose(log2(large), round(log2(large)), abs_tol=1e-4):
        return None
    return ("A" if ratio > 1 else "B"), 2.0 ** round(log2(large))


def clipped_while_scaled(pair: Pair, side: str, scale: float, end: Relation | None) -> Finding:
    """Gradients that are clipped before they are divided by the loss scale: what is left of them is tiny."""
    ratio = (end.ratio if side == "A" else 1 / end.ratio) if end and end.kind == "scaled" and end.ratio else 0.0
    fact = f"the backward pass of {side} is made with the loss times {shown(scale)}"
    if 0 < ratio < 1:
        return Finding("clipping before unscale", f"{fact}; the gradient that it makes the update from is "
                                                  f"{ratio_text(ratio)} times that of {other_of(side)}",
                       unscale_meaning(side, scale), certain=False)
    return Finding("unknown", f"{fact}, and the gradients still differ when the update is made",
                   "What happens to them in between is not on the tapes.", certain=False, fact_too=True)


def unscale_meaning(side: str, scale: float) -> str:
    return (f"{side} clips the gradients while they are multiplied by the loss scale, so that the limit is in effect "
            f"{shown(scale)} times as small (scaler.unscale_(optimizer) belongs before the clipping); or it divides "
            "by the loss scale twice.")


def usual_batches(pair: Pair) -> int:
    """The batches of the largest updates."""
    return max((batch_count(update) for tape in (pair.a, pair.b) for update in tape), default=0)


def batch_sizes(pair: Pair) -> set[int]:
    found = {each["samples"] for each in pair.x.values.get("batches", {}).values()}
    return found | {sum(each["samples"] for each in pair.x.values.get("batches", {}).values())}


def added(pair: Pair, a: Table, b: Table) -> Finding | None:
    """Whether the difference is a multiple of the weights, or of gradients of the update before."""
    noise = 3e-7 * sqrt(len(a.names)) * max(a.norm, b.norm)
    difference = minus(a, b)
    weights = pair.tables("weights", "start")
    if weights and len(weights[0].names) == len(difference):
        own = weights[0].projections
        if (factors := fit(difference, [own], noise)) and abs(factors[0]) < 1:
            side, value = ("A", factors[0]) if factors[0] > 0 else ("B", -factors[0])
            return Finding("weight decay", f"the gradient of {side} is that of {other_of(side)} plus {shown(value)} "
                                           "times the "
                                           "weights", "It is a penalty on the weights in the loss, or weight decay "
                                                      "that is added to the gradient (L2).")
    if pair.consecutive and pair.before:
        for side, update, sign in (("A", pair.before.x, 1), ("B", pair.before.y, -1)):
            for last in (final_gradients(update), raw_gradients(update)):
                if last is None or len(last.names) != len(difference):
                    continue
                factors = fit([sign * value for value in difference], [last.projections], noise)
                if factors and 0.05 < factors[0] < 20:
                    much = "" if isclose(factors[0], 1, rel_tol=1e-2) else f"{shown(factors[0])} times "
                    always = "" if pair.number == 2 else ", as it did before: a branch may leave out zero_grad()"
                    return Finding("stale gradients", f"the gradient of {side} is that of {other_of(side)} plus "
                                                      f"{much}the gradient of {side} in update {pair.before.number}",
                                   f"{side} did not clear its gradients between these two updates{always}.")
    return None


def weighted(pair: Pair) -> Finding | None:
    """Whether the gradients of the micro-batches are added up in another way; of tapes that have each of them."""
    sums = [micro_sums(update) for update in (pair.x, pair.y)]
    if len(sums[0]) != len(sums[1]) or len(sums[0]) < 2:
        return None
    parts = [[minus_one(now, last) for now, last in zip(each, [[0.0] * len(each[0]), *each], strict=False)]
             for each in sums]
    for side, own, others in (("A", sums[0], parts[1]), ("B", sums[1], parts[0])):
        if len(own[-1]) > 2 and multiples(own[-1:], others[-1:]):
            return Finding("cleared gradients",
                           f"the gradient of {side} is that of the last batch of the update alone, and that of "
                           f"{other_of(side)} is the sum of {len(own)} batches",
                           f"{side} clears the gradients before the last backward pass of an update.")
    if not (ratios := multiples(*parts)):
        return None
    fact = ("the batches of the update have other shares in its gradient: in A "
            f"{listed([ratio_text(ratio) for ratio in ratios], 4)} times those in B")
    sizes = [each["samples"] for each in pair.x.values.get("batches", {}).values()]
    if len(sizes) == len(ratios) and len(set(sizes)) > 1:
        for side, shares in (("A", [ratio * size for ratio, size in zip(ratios, sizes, strict=True)]),
                             ("B", [ratio / size for ratio, size in zip(ratios, sizes, strict=True)])):
            if max(shares) - min(shares) < 1e-3 * max(shares):
                return Finding("weighting", fact, f"{side} gives each batch the same share, and {other_of(side)} each "
                                                  f"sample: they have {listed([*map(str, sizes)], 4)} samples.")
    return Finding("weighting", fact, "The losses of the batches are divided by other numbers.", certain=False)


def multiples(one: list[list[float]], other: list[list[float]]) -> list[float]:
    """By which factor each of `one` is a multiple of that of `other`; empty where they are not."""
    factors = []
    for own, others in zip(one, other, strict=True):
        size = sum(value * value for value in others)
        if len(own) != len(others) or not size:
            return []
        factor = sum(x * y for x, y in zip(own, others, strict=True)) / size
        rest = sum((x - factor * y) ** 2 for x, y in zip(own, others, strict=True))
        if not isfinite(factor) or rest > 1e-4 * sum(x * x for x in own):
            return []
        factors.append(factor)
    return factors


def micro_sums(update: Update) -> list[list[float]]:
    """The projections of the gradients after each backward pass, which are added up."""
    tables = [update.table("gradients", point) for point in update.points("gradients") if point.startswith("backward ")]
    return [list(table.projections) for table in tables if table]


def minus_one(one: list[float], other: list[float]) -> list[float]:
    """The difference of two lists of projections."""
    return [x - y for x, y in zip(one, other, strict=True)]


def other_direction(pair: Pair, relation: Relation) -> Finding:
    """The gradients differ in another way."""
    fact = f"the gradient differs {places(relation, 'tensors')}, by {shown(100 * relation.distance)} % of its norm"
    if module := first_module(pair):
        fact += f"; {module}"
    forward = module.startswith("the first module")
    hooks = ("wrap_model", "micro_step", "compute_loss", "backward", "optimizer_step", "setup")
    if (half := half_precision(pair)) and relation.distance < 0.2:
        return with_suspects(Finding("dtype", fact, half, fact_too=True, certain=False), pair, *hooks)
    losses = losses_of(pair)
    if losses and isclose(*losses, rel_tol=1e-6):
        meaning = "The loss is equal, so the backward pass differs: noise, a hook, another form of an operation."
    else:
        values = f" ({shown(losses[0])} in A, {shown(losses[1])} in B)" if losses else ""
        meaning = (f"The forward pass differs there{values}." if forward else
                   f"The forward pass or the loss function differs{values}; the tapes do not tell how.")
    if who := suspects(pair, *hooks):
        return Finding("plugin", fact, who, certain=False, fact_too=True,
                       plugins=tuple(dict.fromkeys(name for name, *_ in acting_in_one(pair, *hooks))))
    if forward:
        return Finding("forward pass", fact, meaning)
    if not module:
        meaning += " tape:modules=true, or record(modules=True), shows the first module."
    return Finding("direction", fact, meaning, certain=False)


def losses_of(pair: Pair) -> tuple[float, float] | None:
    found = []
    for update in (pair.x, pair.y):
        value = update.number_of("loss")
        found.append(value if value is not None else update.number_of("loss of a batch", "1"))
    one, other = found
    return None if one is None or other is None else (one, other)


def half_precision(pair: Pair) -> str:
    """Which of the two computes in half precision, as a sentence; empty where both or none do."""
    kinds = [update.values.get("outputs", "float32") for update in (pair.x, pair.y)]
    if kinds[0] == kinds[1]:
        return ""
    return f"The model's outputs are {kinds[0]} in A and {kinds[1]} in B: autocast, or weights in half precision."


def first_module(pair: Pair) -> str:
    """The first module whose output differs, or whose output's gradient does; of tapes with modules."""
    for what, words, before in (
            ("outputs", "the first module whose output differs is", "called before it"),
            ("output gradients", "all outputs are equal, and the first gradient of an output that differs is that of",
             "after it in the forward pass")):
        tables = pair.tables(what, "")
        tolerance = max(ROUNDING, 30 * pair.grown.get("gradients", 0.0))       # a module that only rounds is none
        rows = [row for row, (one, other) in enumerate(zip(tables[0].checksums, tables[1].checksums, strict=True))
                if one != other and not near(*tables, row, 1.0, tolerance)] if tables else []
        if tables and rows:
            names = tables[0].names
            last = f"; the output of {names[rows[0] - 1]}, {before}, is equal" if rows[0] else ""
            return f"{words} {names[rows[0]]}{last}"
    return ""


def compare_stages(pair: Pair) -> Finding | None:
    """What plugins, or other code between backward pass and update, make of equal gradients."""
    ends = pair.final_gradients()
    if ends is None or not has_gradients(pair):
        return None
    stages = stage_effects(pair.x), stage_effects(pair.y)
    calls = [update.values.get("calls", 1) for update in (pair.x, pair.y)]
    if calls[0] != calls[1]:
        return Finding("plugin" if (who := suspects(pair, "optimizer_step")) else "optimizer",
                       f"the gradients are computed {times(calls[0])} in the update of A and {times(calls[1])} in "
                       "that of B",
                       who or "The optimizer calls its closure another number of "
                              "times.", certain=not who, fact_too=True,
                       plugins=tuple(dict.fromkeys(name for name, *_ in acting_in_one(pair, "optimizer_step"))))
    relation = pair.related("final gradients", ends)
    assert relation
    if relation.same:
        return None
    for name, before, after in stages[0]:
        other = next((each for each in stages[1] if each[0] == name), None)
        if other is None and before.checksums != after.checksums:
            return acted(name, "A", before, after)
        if other is not None:
            changed = [one.checksums != two.checksums for one, two in ((before, after), other[1:])]
            if changed[0] != changed[1]:
                return acted(name, "A", before, after) if changed[0] else acted(name, "B", *other[1:])
        if other is not None and (found := pair.related("final gradients", pair.both(after, other[2]))) \
                and found.kind not in ("equal", "rounding"):
            return acted_otherwise(name, before, after, other[1], other[2])
    for name, before, after in stages[1]:
        if before.checksums != after.checksums and name not in [each[0] for each in stages[0]]:
            return acted(name, "B", before, after)
    if relation.kind == "rounding":
        return Finding("rounding", f"the gradients agree to {relation.distance:.1g} when the update is made",
                       environment_difference(pair), certain=False, minor=True)
    return Finding("unknown", "the gradients differ when the update is made", "What changed them is not on the tapes.",
                   certain=False, fact_too=True)


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def stage_effects(update: Update) -> list[tuple[str, Table, Table]]:
    """Each thing that may have changed the gradients, with them before and after it."""
    points = [point for point in update.points("gradients") if "(call" not in point]
    raw = raw_gradients(update)
    found: list[tuple[str, Table, Table]] = []
    for point in points:
        kind = point.split(": ")[-1]
        after = update.table("gradients", point)
        if after is None or raw is None or kind.startswith("backward"):
            continue
        # The plugin, and of a wrapper that it begins; "" for the step of record().
        name = kind.partition(" ")[2].removesuffix(" (before)")
        found.append((name, found[-1][2] if found else raw, after))
    return found


def effect(before: Table, after: Table) -> tuple[str, str]:
    """What was done to gradients, as a cause and in words."""
    relation = relate(after, before)
    norms = f"norm {shown(before.norm)} → {shown(after.norm)}"
    if relation.kind == "scaled" and 0 < relation.ratio < 1:
        return "clipping", f"{norms}, in the same direction"
    if relation.kind in ("scaled", "rows"):
        return "scale", norms
    if relation.kind == "missing":
        return "missing gradients", f"those of {listed(relation.rows)} are gone"
    return "changed gradients", norms


def acted(name: str, side: str, before: Table, after: Table) -> Finding:
    """A plugin that changed the gradients of one of the two only."""
    cause, what = effect(before, after)
    if name:
        return Finding(cause, f"the plugin {name} acted in {side} only ({what})", plugins=(name,))
    fact = f"between the backward pass and the update something changes the gradients in {side} only ({what})"
    return Finding(cause, fact, "They are clipped by their norm." if cause == "clipping" else
                   "It is done by other code than torch's optimizers, such as clipping by value, or noise.",
                   certain=cause == "clipping")


def acted_otherwise(name: str, before_a: Table, after_a: Table, before_b: Table, after_b: Table) -> Finding:
    """Something that acted in both, in another way."""
    causes = effect(before_a, after_a), effect(before_b, after_b)
    cause = causes[0][0] if causes[0][0] == causes[1][0] else "changed gradients"
    who = f"the plugin {name}" if name else "what happens between the backward pass and the update"
    fact = f"{who} changes the same gradients in another way: {causes[0][1]} in A, {causes[1][1]} in B"
    if causes[0][0] == causes[1][0] == "clipping" and (found := loss_scale_of(after_a.norm / after_b.norm)):
        side = "A" if found[0] == "B" else "B"
        return Finding("clipping before unscale", fact, unscale_meaning(side, found[1]), certain=False,
                       plugins=(name,) * bool(name))
    if causes[0][0] == causes[1][0] == "clipping":
        return Finding("clipping", fact, f"The limit of the norm is {shown(after_a.norm)} in A and "
                                         f"{shown(after_b.norm)} in B.", plugins=(name,) * bool(name))
    return Finding(cause, fact, "Its options or its random numbers differ." if name else "", certain=bool(name),
                   plugins=(name,) * bool(name))
