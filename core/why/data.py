"""Whether two updates are made from the same batches, and how their data differs where they are not."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from loopctl.errors import counted
from loopctl.tape.reading import Table, TapeContent, Update
from loopctl.why.pair import (
    Finding,
    Pair,
    acting_in_one,
    batch_count,
    fraction,
    listed,
    other_of,
    ratio_text,
    shown,
    with_suspects,
)
from loopctl.why.tables import matched, relate

MOST_SHIFTED = 1000         # updates by which the data of one is looked for in that of the other
Samples = tuple[int, ...]


def compare_batches(pair: Pair) -> Finding | None:
    """The first difference between the batches of two updates."""
    points = [update.points("batch") for update in (pair.x, pair.y)]
    if not (points[0] and points[1]):
        return None
    if processes(pair.a) != processes(pair.b):
        return divided_batches(pair)
    for point in points[0]:
        if point in points[1] and (found := compare_batch(pair, point)):
            found = regrouped(pair) or found
            if acting_in_one(pair, "transform_batch"):          # which changes what a batch contains
                found = replace(found, meaning="", certain=False, fact_too=True)
            return with_suspects(found, pair, "transform_batch", "group_batches")
    if len(points[0]) != len(points[1]):
        found = regrouped(pair) or Finding(
            "grouping", f"the update is made from {batches(pair.x)} in A and from {batches(pair.y)} in B",
            "The first ones are the same.")
        return with_suspects(found, pair, "group_batches")
    return None


def compare_backward(pair: Pair) -> Finding | None:
    """A step of an optimizer for which nothing was computed, in one of the two only."""
    counts = batch_count(pair.x), batch_count(pair.y)
    if 0 not in counts or counts[0] == counts[1]:
        return None
    side = "A" if counts[0] == 0 else "B"
    return Finding("extra update", f"{side} steps its optimizer without a backward pass before it",
                   "Some libraries do so once, to create the optimizer's state before they load it; from here on its "
                   "updates may be those of the other run, one number later.")


def processes(tape: TapeContent) -> int:
    return int(tape.header.get("world_size") or 1)


def divided_batches(pair: Pair) -> Finding | None:
    """Compare the numbers of samples where the runs have another number of processes, each with a tape of its own."""
    counts = [sum(each["samples"] for each in update.values.get("batches", {}).values()) * processes(tape)
              for tape, update in ((pair.a, pair.x), (pair.b, pair.y))]
    several = max(processes(pair.a), processes(pair.b))
    if counts[0] == counts[1]:
        return Finding("processes", f"A trains in {counted(processes(pair.a), 'process')}, B in {processes(pair.b)}",
                       "The batches are divided among them, so they are not compared.", minor=True)
    more = "A" if counts[0] > counts[1] else "B"
    return Finding("data repeated" if more == ("A" if processes(pair.a) == several else "B") else "data missing",
                   f"the update is made from {counts[0]} samples in A and from {counts[1]} in B, as far as one of "
                   f"{several} processes tells", "The sampler of several processes repeats samples or leaves some "
                                                 "out, so that all have as many.", certain=False)


def batches(update: Update) -> str:
    count = batch_count(update)
    return f"{count} batch" + "es" * (count != 1)


def regrouped(pair: Pair) -> Finding | None:
    """Whether both read the same batches one after the other, and put another number of them together."""
    sizes = len(pair.x.points("batch")), len(pair.y.points("batch"))
    if sizes[0] == sizes[1]:
        return None
    ahead = [batch_keys(tape, pair.number) for tape in (pair.a, pair.b)]
    shared = min(len(ahead[0]), len(ahead[1]), 8)
    least = min(sizes)
    if shared <= least or ahead[0][:shared] != ahead[1][:shared]:
        if ahead[0][:least] != ahead[1][:least]:
            return None
        more = "A" if sizes[0] > sizes[1] else "B"
        return Finding("grouping", f"the update is made from {batches(pair.x)} in A and from {batches(pair.y)} in B; "
                                   f"the first {least} are the same, and {more} goes on with others",
                       "The last group of an epoch is filled from the next epoch in one, and is smaller in the other, "
                       "or batches are left out after it.", certain=False)
    more, fewer = ("A", "B") if sizes[0] > sizes[1] else ("B", "A")
    meaning = "Both read the same batches in the same order. "
    if crosses_epoch(pair.a if fewer == "A" else pair.b, pair.number, max(sizes)):
        meaning += (f"{more} fills the last group of an epoch with batches of the next epoch; {fewer} makes an update "
                    "from the smaller group.")
    else:
        meaning += f"{more} accumulates more of them."
    return Finding("grouping", f"the update is made from {batches(pair.x)} in A and from {batches(pair.y)} in "
                               "B", meaning)


def crosses_epoch(tape: TapeContent, number: int, count: int) -> bool:
    """Whether the next `count` batches of a tape, from an update on, are of more than one epoch.

    Where epochs are not on the tape, one ends with an update of fewer batches than the others.
    """
    first = tape.updates[number]
    if first.epoch is None:
        return len(first.points("batch")) < max(len(update.points("batch")) for update in tape)
    epochs: list[int | None] = []
    while len(epochs) < count and number in tape.updates:
        epochs += [tape.updates[number].epoch] * len(tape.updates[number].points("batch"))
        number += 1
    return len({*epochs[:count]}) > 1


def batch_keys(tape: TapeContent, first: int, most: int = 3) -> list[Any]:
    """What identifies each micro-batch of the next updates: its samples in order, or its checksums."""
    keys: list[Any] = []
    for number in range(first, first + most):
        if update := tape.updates.get(number):
            keys += [identity(update, point) for point in update.points("batch")]
    return keys


def identity(update: Update, point: str) -> Any:
    table = update.table("batch", point)
    return samples_of(update, point) or (table.checksums[:1] if table else None)


def samples_of(update: Update, point: str) -> Samples:
    return update.observed.get(("samples", point), ())


def compare_batch(pair: Pair, point: str) -> Finding | None:
    """How one micro-batch differs; None where it has the same bits, as far as both tapes have them."""
    tables = pair.tables("batch", point)
    if tables is None:
        return None
    a, b = tables
    leaves = [{name: (shape, dtype) for name, shape, dtype in update.values["batches"][point]["leaves"]}
              for update in (pair.x, pair.y)]
    which = f"batch {point} of the update" if batch_count(pair.x) > 1 else "the batch"
    sizes = [update.values["batches"][point]["samples"] for update in (pair.x, pair.y)]
    differing = [row for row, name in enumerate(a.names) if a.checksums[row] != b.checksums[row]]
    if not differing:
        return None
    samples = samples_of(pair.x, point), samples_of(pair.y, point)
    if sizes[0] != sizes[1]:
        return other_size(pair, which, sizes, samples)
    for row in differing:
        name = a.names[row]
        kinds = [found.get(name, list(found.values())[min(row, len(found) - 1)])[1] for found in leaves]
        if kinds[0] != kinds[1]:
            return Finding("dtype", f"{name} of {which} is {kinds[0]} in A and {kinds[1]} in B",
                           "It is converted on the way to the model.")
    names = [a.names[row] for row in differing]
    if 0 not in differing:              # the first is the input, of which the samples are known
        return Finding("targets", f"{which} has the same {a.names[0]} and another {listed(names)}",
                       "Labels that are numbered in another way, smoothed or mixed; or other targets for the samples.",
                       certain=True)
    same_targets = len(differing) < len(a.names)
    if samples[0] and samples[1]:
        if Counter(samples[0]) == Counter(samples[1]):
            return Finding("order", f"{which} has the same samples in another order within it",
                           "The batch is put together in another order: the sampler's seed, or several readers.")
        some_alike = bool(Counter(samples[0]) & Counter(samples[1]))      # with these targets, others were transformed
        if not (same_targets and some_alike) and (found := position_in_data(pair, f"{which} has other samples")):
            return found
    if same_targets:
        return other_inputs(pair, which, a, b, names)
    return other_data(pair, point, which, a, b, samples)


def other_size(pair: Pair, which: str, sizes: list[int], samples: tuple[Samples, Samples]) -> Finding:
    fact = f"{which} has {sizes[0]} samples in A and {sizes[1]} in B"
    few, many = sorted(samples, key=len)
    usual = [Counter(len(samples_of(update, point)) for update in tape for point in update.points("samples"))
             for tape in (pair.a, pair.b)]
    if few and not Counter(few) - Counter(many) and pair.before is not None:
        less = "A" if sizes[0] < sizes[1] else "B"
        return Finding("data missing", fact, f"Those of {less} are all in {other_of(less)}: {less} has no more, or "
                                             "cuts the batch.", certain=False)
    if pair.before is not None and usual[0].most_common(1)[0][0] == usual[1].most_common(1)[0][0]:
        return position_in_data(pair, fact) or Finding(
            "data missing", fact, "Other batches have the same size in both: an epoch ends elsewhere, as with "
                                  "drop_last.",
            certain=False)
    return Finding("batch size", fact)


def position_in_data(pair: Pair, fact: str) -> Finding | None:
    """Where in the other's data the batches of one are: later, before, or nowhere in the same order."""
    sides = [("A", "B", pair.a, pair.b), ("B", "A", pair.b, pair.a)]
    for by in range(1, MOST_SHIFTED + 1):
        for side, other, own, others in sides:
            if is_shifted(pair, own, others, -by) and batch_key(own, pair.number) == batch_key(own, pair.number - by):
                first = pair.number - by
                if whole_epoch(pair, own, others, first):
                    return same_epoch(pair, fact)
                return Finding("data repeated", f"{fact}: {side} gets the batch of its update {first} again, and "
                                                f"{other} a new one",
                               f"{side} trains on the same data again within the epoch. Most often a resume begins the "
                               "epoch at its start, or some batches before where it was left.")
        for side, other, own, others in sides:
            if is_shifted(pair, own, others, by):
                return Finding("data missing", f"{fact}: {side} gets the batch that {other} gets at update "
                                               f"{pair.number + by}",
                               f"{side} leaves out the data of {counted(by, 'update')} that {other} trains on.")
    return same_epoch(pair, fact)


def is_shifted(pair: Pair, own: TapeContent, other: TapeContent, by: int) -> bool:
    """Whether the next batches of one are those of the other `by` updates later."""
    known = [number for number in range(pair.number, pair.number + 3)
             if number in own.updates and number + by in other.updates]
    return bool(known) and all(batch_key(own, number) == batch_key(other, number + by) for number in known)


def batch_key(tape: TapeContent, number: int) -> Any:
    """What identifies the first batch of an update; None where it is not known."""
    return identity(tape.updates[number], "1") if number in tape.updates else None


def whole_epoch(pair: Pair, own: TapeContent, other: TapeContent, first: int) -> bool:
    """Whether the updates of a tape from `first` to the one before this have all samples of the other's data."""
    earlier = own.updates[first]
    if earlier.epoch is not None:
        return earlier.epoch != own.updates[pair.number].epoch
    seen = set(all_samples(update for update in own if first <= update.number < pair.number))
    return seen >= set(all_samples(other))


def same_epoch(pair: Pair, fact: str) -> Finding | None:
    """Compare the samples of the whole epochs that the two updates are in."""
    sets = [Counter(all_samples(epoch_of(tape, update, pair))) for tape, update in ((pair.a, pair.x), (pair.b, pair.y))]
    shared = sum((sets[0] & sets[1]).values())
    least = min(sum(found.values()) for found in sets)
    if not shared:
        return None
    epoch = "the tape" if pair.x.epoch is None else f"epoch {pair.x.epoch + 1}"
    if shared < 0.5 * least:
        return Finding("order", f"{fact}: {shared:,} of the {least:,} samples of {epoch} are in both",
                       f"{order_meaning(pair)} An epoch reads a part of the data only, or these are other parts.",
                       certain=False)
    for side, own, other in (("A", sets[0], sets[1]), ("B", sets[1], sets[0])):
        again = {sample for sample, count in own.items() if count > other[sample] > 0}
        if again and not {sample for sample, count in other.items() if count > own[sample] > 0}:
            return Finding("data repeated", f"{fact}: {len(again)} samples are in {epoch} of {side} more often than "
                                            f"in that of {other_of(side)}",
                           "Samples are repeated, such as by a sampler that fills up the last batch, or that draws "
                           "with replacement.")
    if sets[0] == sets[1]:
        return Finding("order", f"{fact}; all in all {epoch} has the same {sum(sets[0].values()):,} samples in A and "
                                "B, in another order", order_meaning(pair))
    if ended(pair):
        return Finding("order", f"{fact}: {shared:,} of the samples are in {epoch} of both",
                       order_meaning(pair), certain=False)
    fewer = "A" if sum(sets[0].values()) < sum(sets[1].values()) else "B"
    if sum(sets[0].values()) != sum(sets[1].values()):
        return Finding("data missing", f"{fact}: {epoch} has {sum(sets[0].values()):,} samples in A and "
                                       f"{sum(sets[1].values()):,} in B, of which {shared:,} are the same",
                       f"{fewer} leaves samples out, such as a last batch that is dropped, or reads another part of "
                       "the data.", certain=False)
    return Finding("order", f"{fact}: {shared:,} of {least:,} samples are in {epoch} of both", order_meaning(pair),
                   certain=False)


def ended(pair: Pair) -> bool:
    """Whether a tape ends within the epoch of the update."""
    return any(max(tape.updates) - pair.number < 2 for tape in (pair.a, pair.b))


def order_meaning(pair: Pair) -> str:
    """What another order means, by whether an earlier epoch had the same order in both."""
    for side, tape, update in (("A", pair.a, pair.x), ("B", pair.b, pair.y)):
        first = next((each for each in tape if each.number < pair.number
                      and identity(each, "1") == identity(update, "1")), None)
        if first is not None:
            return (f"{side} repeats the order that began with its update {first.number}, and {other_of(side)} has a "
                    "new one: in it the data is not shuffled anew, because the sampler's set_epoch is not called, or "
                    "a generator is seeded again in each epoch.")
    if pair.before is None:
        return "The order of the data is drawn from another seed, or it is shuffled in only one of A and B."
    return "The sampler's random numbers differ from this epoch on."


def epoch_of(tape: TapeContent, update: Update, pair: Pair) -> Iterable[Update]:
    """The updates of the epoch of an update; where it is not on the tape, as many as both have."""
    if pair.x.epoch is None or pair.y.epoch is None:
        last = min(max(pair.a.updates), max(pair.b.updates))
        return [each for each in tape if each.number <= last]
    return [each for each in tape if each.epoch == update.epoch]


def all_samples(updates: Iterable[Update]) -> list[int]:
    return [sample for update in updates for point in update.points("samples") for sample in samples_of(update, point)]


def other_inputs(pair: Pair, which: str, a: Table, b: Table, names: list[str]) -> Finding:
    relation = relate(*matched(a, b))
    same = [name for name in a.names if name not in names]
    if relation.kind in ("scaled", "rows") and not relation.ratios:
        parts = fraction(relation.ratio)
        exact = f" ({parts[0]}/{parts[1]})" if parts and min(parts) == 1 else ""
        return Finding("inputs", f"{which} has the same {listed(same)}, and {names[0]} in A is "
                                 f"{ratio_text(relation.ratio)}{exact} times that in B",
                       "Inputs are scaled in only one of A and B, such as to 0..1.")
    if relation.kind == "rounding":
        return Finding("rounding", f"{names[0]} of {which} agrees to {relation.distance:.1g}, and not to the bit",
                       "It is decoded, resized or normalized by other code.", certain=False, minor=True)
    row = a.names.index(names[0])
    return Finding("inputs", f"{which} has the same {listed(same)} and other values of {names[0]} (norm "
                             f"{shown(a.norms[row])} in A, {shown(b.norms[row])} in B)",
                   "They are the same samples after another transform: a random augmentation with other random "
                   "numbers, or another normalization.", certain=False)


def other_data(pair: Pair, point: str, which: str, a: Table, b: Table,
               samples: tuple[Samples, Samples]) -> Finding:
    relation = relate(a, b)
    if relation.kind == "rounding":
        return Finding("rounding", f"{which} agrees to {relation.distance:.1g}, and not to the bit",
                       "It is decoded, resized or normalized by other code.", certain=False, minor=True)
    norms = f"(norm of {a.names[0]}: {shown(a.norms[0])} in A, {shown(b.norms[0])} in B)"
    if samples[0] and samples[1]:
        return Finding("data", f"{which} has no sample that the other has in this epoch {norms}",
                       "Other data, another part of it, or samples changed by random transforms; or its order differs "
                       "and the tapes are too short to show it.", certain=False)
    return Finding("data", f"{which} has other content {norms}", "The tapes do not have single samples of such a "
                                                                 "batch, so whether its order or its data differs is "
                                                                 "not known.", certain=False)
