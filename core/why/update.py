"""How the updates themselves differ: learning rates and other numbers, skipped updates, what the optimizer makes."""
from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import isclose, sqrt
from typing import Any

from loopctl.errors import counted
from loopctl.tape.reading import Table, TapeContent, Update
from loopctl.why.pair import (
    Finding,
    Pair,
    classes_of,
    final_gradients,
    fraction,
    has_gradients,
    listed,
    other_of,
    ratio_text,
    shown,
    with_suspects,
)
from loopctl.why.start import described, environment_difference, modules_in_eval
from loopctl.why.tables import fit, minus

RATES = ("lr",)


def compare_skipped(pair: Pair) -> Finding | None:
    if pair.x.skipped == pair.y.skipped:
        return None
    side = "A" if pair.x.skipped else "B"
    gradients = final_gradients(pair.x if pair.x.skipped else pair.y)
    finite = gradients is None or all(norm == norm and abs(norm) != float("inf") for norm in gradients.norms)
    return Finding("skipped", f"the update was skipped in {side} only",
                   "Its gradients are not finite." if not finite else "Its gradients are finite, so it was skipped "
                                                                      "for another reason.", certain=not finite)


def compare_numbers(pair: Pair) -> Finding | None:
    """The first number of the parameter groups that differs: by group, or by parameter where the groups differ."""
    if pair.before is None and (found := other_optimizer(pair)):
        return found
    groups = numbers_of(pair.x), numbers_of(pair.y)
    if not groups[0] or not groups[1]:
        return None
    if same_groups(pair):
        for index, (one, other) in enumerate(zip(*groups, strict=True)):
            for name in one:
                if name in other and not alike(one[name], other[name]):
                    found = number_differs(pair, index, name, one[name], other[name], len(groups[0]))
                    return with_suspects(found, pair, "lr_scale") if name in RATES else found
        return same_options(pair)
    return compare_by_parameter(pair, groups)


def same_groups(pair: Pair) -> bool:
    """Whether the parameters are in the same groups in both, or have other names, so that only the order tells."""
    groups = [[set(group["parameters"]) for group in tape.header.get("groups", [])] for tape in (pair.a, pair.b)]
    if len(groups[0]) != len(groups[1]):
        return False
    named = set().union(*groups[0]) & set().union(*groups[1])
    return not named or all(one & named == other & named for one, other in zip(*groups, strict=True))


def other_optimizer(pair: Pair) -> Finding | None:
    """Whether the optimizers are of other classes."""
    classes = classes_of(pair)
    decays = any(numbers.get("weight_decay") for numbers in numbers_of(pair.x))
    if not all(classes):                # updates that no optimizer of torch makes
        return None
    if classes[0] == classes[1] or (set(classes[0] + classes[1]) == {"Adam", "AdamW"} and not decays):
        return None
    fact = f"the optimizer is {listed(classes[0])} in A and {listed(classes[1])} in B"
    if set(classes[0] + classes[1]) == {"Adam", "AdamW"}:
        return Finding("weight decay", fact, "AdamW decays the weights apart from the gradient; Adam adds the decay "
                                             "to the gradient (L2), where it is divided by its size.")
    return Finding("optimizer", fact, "The same gradients make another update.", fact_too=True)


def alike(one: float, other: float) -> bool:
    """Whether two numbers are equal but for the rounding of a schedule."""
    return isclose(one, other, rel_tol=1e-6, abs_tol=1e-30)


def numbers_of(update: Update) -> list[dict[str, float]]:
    """The numbers of each parameter group, by name."""
    found = [dict(group["numbers"]) for group in update.values.get("groups", [])]
    for point in update.points("numbers"):
        index, _, name = point.partition(" ")
        value = update.number_of("numbers", point)
        if value is not None and int(index) < len(found):
            found[int(index)][name] = value
    return found


def compare_by_parameter(pair: Pair, groups: tuple[list[dict[str, float]], list[dict[str, float]]]) -> Finding | None:
    """Compare the numbers that each parameter has, where the runs group them in another way."""
    own: list[dict[str, dict[str, float]]] = []
    for tape, numbers in ((pair.a, groups[0]), (pair.b, groups[1])):
        named: dict[str, dict[str, float]] = {}
        for group, values in zip(tape.header.get("groups", []), numbers, strict=False):
            named |= dict.fromkeys(group["parameters"], values)
        own.append(named)
    differing: dict[tuple[str, float, float], list[str]] = {}
    for parameter in own[0].keys() & own[1].keys():
        for name, value in own[0][parameter].items():
            other = own[1][parameter].get(name)
            if other is not None and not alike(value, other):
                differing.setdefault((name, value, other), []).append(parameter)
    if not differing:
        return None
    (name, one, two), parameters = next(iter(differing.items()))
    fact = (f"there are {counted(len(groups[0]), 'parameter group')} in A and {len(groups[1])} in B; {name} of "
            f"{listed(sorted(parameters))} is {shown(one)} in A and {shown(two)} in B")
    found = Finding("groups", fact, "Parameters are divided into groups in another way, such as biases without weight "
                                    "decay.")
    return with_suspects(found, pair, "param_groups")


def number_differs(pair: Pair, index: int, name: str, one: float, other: float, count: int) -> Finding:
    """A number of one group differs."""
    of_group = f" of group {index}" if count > 1 else ""
    if name not in RATES:
        of_betas = name == "momentum" and "betas.1" in numbers_of(pair.x)[index]
        word = "momentum (the first of betas)" if of_betas else name
        cause = "weight decay" if name == "weight_decay" else "option"
        return Finding(cause, f"{word}{of_group} is {shown(one)} in A and {shown(other)} in B", "")
    fact = f"the learning rate{of_group} is {one:.6g} in A and {other:.6g} in B"
    series = [rates(tape, index) for tape in (pair.a, pair.b)]
    later = [number for number in sorted(series[0].keys() & series[1].keys()) if number >= pair.number][:200]
    earlier = [number for number in series[0] if number < pair.number]
    ratios = [series[0][number] / series[1][number] for number in later if series[1][number]]
    constant = [len({float(f"{value:.9g}") for value in found.values()}) == 1 for found in series]
    if constant[0] != constant[1]:
        side = "A" if constant[0] else "B"
        return Finding("schedule", fact, f"The rate of {side} is the same in every update; that of {other_of(side)} "
                                         "has a schedule.", fact_too=True)
    for side, ahead, behind in (("A", 0, 1), ("B", 1, 0)):
        for by in (1, 2):
            if is_ahead(series[ahead], series[behind], later, by):
                return Finding("schedule", f"{fact}, which is that of {other_of(side)} at update {pair.number + by}",
                               skip_meaning(pair, side) or f"From here on {side} is {counted(by, 'update')} ahead: it "
                                                           f"steps its schedule once too often, or {other_of(side)} "
                                                           "leaves out a step.")
    if (found := stretched(series, pair.number)) and earlier:
        return Finding("schedule", fact, found)
    if len(later) > 2 and all(isclose(ratio, ratios[0], rel_tol=1e-4) for ratio in ratios) and ratios:
        parts = fraction(ratios[0], 64)
        meaning = f"It is {ratio_text(ratios[0])} times that of B in every update from here on."
        if parts and 1 < max(parts) in (pair.a.header.get("world_size"), pair.b.header.get("world_size")):
            meaning += " That is the number of processes."
        return Finding("rate", fact, meaning, fact_too=True)
    if len(later) < 3:
        return Finding("rate", fact, "")
    return Finding("schedule", fact, "Both change from update to update, in another way: another schedule, warmup or "
                                     "length.", certain=False)


def rates(tape: TapeContent, index: int) -> dict[int, float]:
    """The learning rate of a group in each update."""
    found = {}
    for update in tape:
        numbers = numbers_of(update)
        if index < len(numbers) and "lr" in numbers[index]:
            found[update.number] = numbers[index]["lr"]
    return found


def is_ahead(one: dict[int, float], other: dict[int, float], numbers: Iterable[int], by: int) -> bool:
    """Whether `one` has at each update the rate that `other` has `by` updates later, and these do change."""
    known = [number for number in numbers if number + by in other and number in one]
    return (len(known) > 1 and all(alike(one[number], other[number + by]) for number in known)
            and any(not alike(other[number], other[number + by]) for number in known))


def skip_meaning(pair: Pair, side: str) -> str:
    """Whether an update that was skipped before explains that one schedule is ahead."""
    skipped = [number for number, update in pair.a.updates.items() if number < pair.number and update.skipped
               and number in pair.b.updates and pair.b.updates[number].skipped]
    if not skipped:
        return ""
    other = "B" if side == "A" else "A"
    return (f"Update {skipped[-1]} was skipped in both: the schedule of {side} counts it, and that of {other} does "
            "not.")


def stretched(series: list[dict[int, float]], number: int) -> str:
    """Whether one schedule changes only every k updates, where the other changes in each."""
    changes = []
    for found in series:
        numbers = sorted(found)
        changes.append([b for a, b in pairwise(numbers) if not alike(found[a], found[b])])
    for side, few, many in (("A", changes[0], changes[1]), ("B", changes[1], changes[0])):
        gaps = [b - a for a, b in pairwise(few)]
        if len(many) > 2 * len(few) and ((gaps and min(gaps) > 1) or (few and not gaps)):
            every = f"every {gaps[0]} updates" if gaps and len(set(gaps)) == 1 else f"at update {few[0]}"
            return (f"The rate of {side} changes {every} only, that of {other_of(side)} in each update: it is stepped "
                    f"once per epoch, or per group of batches, in {side}, and in each update in {other_of(side)}.")
    return ""


def same_options(pair: Pair) -> Finding | None:
    """Options of the groups that are no numbers, such as nesterov. The header has them, so they are asked for once."""
    if pair.before is not None:
        return None
    ignored = {"foreach", "fused", "capturable", "differentiable", "name", "optimizer"}
    for one, other in zip(pair.a.header.get("groups", []), pair.b.header.get("groups", []), strict=False):
        for key, value in one["options"].items():
            if key not in ignored and key in other["options"] and other["options"][key] != value:
                return Finding("option", f"the optimizer's {key} is {value} in A and {other['options'][key]} in B", "")
    return None


def compare_update(pair: Pair) -> Finding | None:
    """How the weights differ after the update from the same weights and gradients, at the same rates."""
    ends = pair.tables("weights", "end")
    relation = pair.related("weights end", ends)
    if ends is None or relation is None or relation.same:
        return None
    if relation.kind == "rounding" and relation.distance < 1e-6 * max(1.0, pair.grown.get("weights end", 0) * 1e6):
        small = update_distance(pair, ends)
        if small is None or small < 1e-3:
            return Finding("rounding", f"the weights agree to {relation.distance:.1g} after the update, and not to "
                                       "the bit",
                           fused_difference(pair) or environment_difference(pair), certain=False, minor=True)
    starts = pair.tables("weights", "start")
    if starts is None:
        return Finding("unknown", "the weights differ after the update, "
                                  f"{described(relation, 'tensors')}", certain=False)
    still = [unchanged(start, end) for start, end in zip(starts, ends, strict=True)]
    for side, own, other in (("A", still[0], still[1]), ("B", still[1], still[0])):
        fixed = [starts[0].names[row] for row in sorted(own - other)]
        if fixed and not other and len(fixed) == len(starts[0].names):
            return Finding("skipped", f"the update changes no weight in {side}",
                           "It is skipped, or its learning rate is 0.", certain=False)
        if fixed:
            return frozen(pair, side, fixed)
    steps = [minus(end, start) for start, end in zip(starts, ends, strict=True)]
    difference = [x - y for x, y in zip(*steps, strict=True)]
    noise = 3e-7 * sqrt(sum(norm * norm for norm in starts[0].norms if norm > 0))
    if (factors := fit(difference, [starts[0].projections], noise)) and abs(factors[0]) < 0.5:
        side, amount = ("A", -factors[0]) if factors[0] < 0 else ("B", factors[0])
        return Finding("weight decay", f"the update of {side} also subtracts {shown(amount)} times the weights",
                       f"It decays the weights apart from the gradient, and that of {other_of(side)} does not.")
    if not has_gradients(pair):
        return Finding("optimizer", f"the weights differ after the update, {described(relation, 'tensors')}",
                       "No optimizer of torch makes the update of one of them, so how it is made is not on the tapes.",
                       certain=False, fact_too=True)
    if factor := same_direction(steps[0], steps[1], noise):
        return Finding("rate", f"the update of A is {ratio_text(factor)} times that of B, from the same gradients",
                       "The learning rate on the tapes is equal, so the optimizer uses another one, or scales its "
                       "update.",
                       certain=False)
    if pair.consecutive and pair.before and (found := by_momentum(pair, difference, noise)):
        return found
    return Finding("optimizer", "the same gradients at the same learning rate make another update, "
                                f"{described(relation, 'tensors')}",
                   fused_difference(pair) or "The optimizer has another option or another state, which the tapes do "
                                             "not show.", certain=False)


def update_distance(pair: Pair, ends: tuple[Table, Table]) -> float | None:
    """How far the updates are apart, relative to them, as far as the precision of the weights shows it."""
    starts = pair.tables("weights", "start")
    if starts is None:
        return None
    steps = [minus(end, start) for start, end in zip(starts, ends, strict=True)]
    size = sqrt(sum(value * value for value in steps[0])) or 1.0
    apart = sqrt(sum((x - y) ** 2 for x, y in zip(*steps, strict=True)))
    noise = 3e-7 * sqrt(sum(norm * norm for norm in starts[0].norms if norm > 0))
    return max(0.0, apart - noise) / size


def fused_difference(pair: Pair) -> str:
    """Implementations of the optimizer that round in another way."""
    for one, other in zip(pair.a.header.get("groups", []), pair.b.header.get("groups", []), strict=False):
        for key in ("fused", "foreach", "capturable"):
            values = [group["options"].get(key) for group in (one, other)]
            if values[0] != values[1]:
                return (f"The optimizer has {key}={values[0]} in A and {key}={values[1]} in B, which rounds in "
                        "another way.")
    return ""


def unchanged(start: Table, end: Table) -> set[int]:
    """The rows that the update leaves as they are."""
    return {row for row in range(len(start.names)) if start.checksums[row] == end.checksums[row]}


def frozen(pair: Pair, side: str, names: list[str]) -> Finding:
    """Tensors that the update of one of the two does not change."""
    tape = pair.a if side == "A" else pair.b
    held = {name for group in tape.header.get("groups", []) for name in group["parameters"]}
    every = {name for name, *_ in tape.header.get("parameters", [])}
    fact = f"the update of {side} does not change {listed(names)}, although the gradients are the same"
    if all(name in every and name not in held for name in names):
        return Finding("frozen", fact, "The optimizer does not hold them.")
    return Finding("frozen", fact, "Their learning rate is 0, or something restores them after the "
                                   "step.", certain=False)


def same_direction(one: list[float], other: list[float], noise: float) -> float | None:
    """The factor by which one update is the other's multiple; None where it is not, or where they are equal."""
    factors = fit(one, [other], noise)
    return factors[0] if factors and abs(factors[0] - 1) > 1e-3 else None


def by_momentum(pair: Pair, difference: list[float], noise: float) -> Finding | None:
    """Whether the updates differ by a multiple of the update before: another momentum."""
    before = pair.before.tables("weights", "start") if pair.before else None
    after = pair.before.tables("weights", "end") if pair.before else None
    if before is None or after is None:
        return None
    last = minus(after[0], before[0])
    if len(last) != len(difference) or not (factors := fit(difference, [last], noise)):
        return None
    side = "A" if factors[0] > 0 else "B"
    return Finding("option", f"the update of {side} has {shown(abs(factors[0]))} times the update before more in it",
                   "The optimizer's momentum differs, or works in another form.", certain=False)


def compare_end(pair: Pair) -> Finding | None:
    """Whether buffers and the optimizer's state differ after equal updates."""
    relation = pair.relation("buffers", "end")
    if relation and not relation.same:
        if relation.kind == "rounding":
            return Finding("rounding", f"the buffers agree to {relation.distance:.1g} after the update",
                           environment_difference(pair), certain=False, minor=True)
        starts = pair.tables("buffers", "start")
        ends = pair.tables("buffers", "end")
        assert starts
        assert ends
        still = [unchanged(start, end) == set(range(len(start.names)))
                 for start, end in zip(starts, ends, strict=True)]
        if still[0] != still[1]:
            side = "A" if still[0] else "B"
            names = modules_in_eval(pair.a if side == "A" else pair.b, pair.x)
            return Finding("buffers", f"the forward pass of {side} does not change the buffers, and that of "
                                      f"{other_of(side)} "
                                      "does", f"BatchNorm of {side} is in evaluation mode, or has no running statistics"
                           + (f": {listed(names)}." if names else "."), certain=False)
        counter = [row for row, name in enumerate(ends[0].names) if name.endswith("num_batches_tracked")]
        equal = bool(counter) and all(ends[0].checksums[row] == ends[1].checksums[row] for row in counter)
        return Finding("buffers", f"the buffers differ after the update, {described(relation, 'buffers')}",
                       "The momentum of BatchNorm differs. Only evaluations are affected." if equal else
                       "The momentum of BatchNorm differs, or the number of forward passes in an "
                       "update.", certain=False)
    if relation := pair.relation("state", "end"):
        if relation.kind == "rounding":
            return Finding("rounding", f"the optimizer's state agrees to {relation.distance:.1g} after the update",
                           environment_difference(pair), certain=False, minor=True)
        if not relation.same:
            return Finding("optimizer state", "the optimizer's state differs after the update: "
                                              f"{listed(relation.rows)}",
                           "The weights are still equal. An option such as beta2, or the form of the update, differs.",
                           certain=False)
    return None


def compare_loss(pair: Pair) -> Finding | None:
    """Whether the losses differ although everything that comes from them is equal."""
    values: list[Any] = [update.number_of("loss") for update in (pair.x, pair.y)]
    if None in values or alike(*values) or relate_nan(*values):
        return None
    return Finding("loss", f"the loss is reported as {shown(values[0])} in A and {shown(values[1])} in B",
                   "The gradients are equal, so only what is reported differs.", minor=True)


def relate_nan(one: float, other: float) -> bool:
    return one != one and other != other
