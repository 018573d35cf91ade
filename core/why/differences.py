"""Say what first differs between two tapes, and what that means."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopctl.composition.quoting import split
from loopctl.errors import counted
from loopctl.tape.reading import TapeContent, Update, read_tape
from loopctl.why.data import compare_backward, compare_batches
from loopctl.why.gradients import compare_gradients, compare_stages
from loopctl.why.pair import Finding, Pair, has_gradients, listed, other_of
from loopctl.why.start import compare_modes, compare_random, compare_start, draws_in_forward
from loopctl.why.tables import distance, only_in_one
from loopctl.why.update import compare_end, compare_loss, compare_numbers, compare_skipped, compare_update

# What is compared of an update, in the order in which one thing follows from another. The first that differs, and is
# not minor, is the explanation.
STEPS: tuple[tuple[str, Callable[[Pair], Finding | None]], ...] = (
    ("", compare_backward),
    ("weights", compare_start),
    ("", compare_modes),
    ("", lambda pair: compare_random(pair, "start")),
    ("batches", compare_batches),
    ("", lambda pair: compare_random(pair, "forward")),
    ("gradients", compare_gradients),
    ("", compare_stages),
    ("", compare_skipped),
    ("learning rates", compare_numbers),
    ("updated weights", compare_update),
    ("", compare_end),
    ("", compare_loss),
)


# By the cause of a minor difference: of which later differences it may be the reason.
EXPLAINED_BY = {"mode": ("direction", "forward pass", "buffers"),
                "random numbers": ("direction", "forward pass", "inputs", "order")}


@dataclass(frozen=True)
class Explanation:
    """What `explain_difference` found."""

    same: bool                  # whether everything that both tapes have of every update has the same bits
    update: int | None          # the first update that differs, or agrees by rounding only
    cause: str                  # a word from causes.CAUSES; "" where they are the same
    certain: bool               # whether the tapes prove the cause, and do not only suggest it
    text: str                   # what differs first and what that means
    plugins: tuple[str, ...] = ()                       # the plugins that the text names as the reason
    notes: tuple[Finding, ...] = field(default=(), repr=False)      # minor differences before it
    last_equal: int = 0         # the last update before it that both tapes have


def explain_difference(one: str | Path, other: str | Path) -> Explanation:
    """Compare two tapes, called A and B, and say what first differs and what that means.

    Raises UsageError where one of them is no tape.
    """
    return explain_tapes(read_tape(Path(one)), read_tape(Path(other)))


def explain_tapes(a: TapeContent, b: TapeContent) -> Explanation:
    """Do what `explain_difference` does, with tapes that were read."""
    notes: list[tuple[int, Finding]] = []
    grown: dict[str, float] = {}
    before: Pair | None = None
    numbers = sorted(a.updates.keys() & b.updates.keys())
    for number in numbers:
        pair = Pair(a, b, a.updates[number], b.updates[number], before, grown)
        equal: list[str] = []
        for what, compare in STEPS:
            found = compare(pair)
            if found is None:
                equal += [what] if what and (what != "gradients" or has_gradients(pair)) else []
            elif found.minor:
                if all(note.cause != found.cause for _, note in notes):         # the first of each kind
                    notes.append((number, found))
            else:
                return explained(pair, found, equal, notes)
        remember_distances(pair, grown)
        before = Pair(a, b, a.updates[number], b.updates[number])
    return at_the_end(a, b, numbers, notes)


def remember_distances(pair: Pair, grown: dict[str, float]) -> None:
    """Note how far apart the two are by now, so that what rounding grows to is told from a new difference."""
    for what, tables in (("weights", pair.tables("weights", "end")), ("weights end", pair.tables("weights", "end")),
                         ("gradients", pair.gradients()), ("final gradients", pair.final_gradients()),
                         ("buffers", pair.tables("buffers", "end")), ("state", pair.tables("state", "end"))):
        relation = pair.related(what, tables)
        if relation and relation.kind == "rounding":
            grown[what] = max(grown.get(what, 0.0), relation.distance)


def explained(pair: Pair, found: Finding, equal: list[str], notes: list[tuple[int, Finding]]) -> Explanation:
    """The explanation by the first difference that matters."""
    for note in [note for _, note in notes if found.cause in EXPLAINED_BY.get(note.cause, ())
                 and (note.cause == "mode" or found.cause in ("inputs", "order") or draws_in_forward(pair))][:1]:
        # Something that alone changes nothing explains what does.
        cause = found.cause if found.cause in ("inputs", "order") else note.cause
        found = Finding(cause, f"{note.fact}; {found.fact}", note.meaning, note.certain and note.cause == "mode",
                        note.certain)
        follows = "random numbers" if note.cause == "mode" else note.cause
        notes = [each for each in notes if each[1].cause not in (note.cause, follows)]
    lines = [f"{place(pair.x, pair.y)}: {found.fact}."]
    if found.meaning:
        prefix = "" if found.fact_too else "Cause: " if found.certain else "Possible cause: "
        lines.append(prefix + (lower(found.meaning) if prefix else found.meaning))
    rounded = any(note.cause == "rounding" for _, note in notes)
    before = [earlier_updates(pair)] if pair.before else []
    if equal:
        before.append(f"of update {pair.number} the {listed(equal, 5)}")
    if before:
        lines.append(f"Equal before that{', but for rounding' * rounded}: {', and '.join(before)}.")
    number = pair.before.number if pair.before else 0
    if number < pair.number - 1:
        lines.append(f"The tapes have nothing between the updates {number} and {pair.number}." if number else
                     f"The tapes begin with update {pair.number}.")
    for at, note in notes:
        lines.append(f"Before that, update {at}: {note.fact}.")
    lines += configuration(pair.a, pair.b)
    return Explanation(False, pair.number, found.cause, found.certain, "\n".join(lines), found.plugins,
                       tuple(note for _, note in notes), number)


def earlier_updates(pair: Pair) -> str:
    """The updates before this one that both tapes have, in words."""
    known = [number for number in pair.a.updates if number < pair.number and number in pair.b.updates]
    if len(known) < pair.number - 1:
        return f"the recorded updates up to {known[-1]}"
    return "update 1" if pair.number == 2 else f"updates 1 to {pair.number - 1}"


def lower(sentence: str) -> str:
    """A sentence to be put after a colon."""
    first = sentence.split()[0]
    name = first in ("A", "B") or any(map(str.isupper, first[1:]))
    return sentence if name else sentence[0].lower() + sentence[1:]


def at_the_end(a: TapeContent, b: TapeContent, numbers: list[int],
               notes: list[tuple[int, Finding]]) -> Explanation:
    """The explanation where no update that both have differs by more than rounding."""
    if not numbers:
        return Explanation(False, None, "length", False, "The tapes have no update in common, so there is nothing to "
                                                         "compare; record both with the same every_steps.")
    last = numbers[-1]
    longest = max(max(a.updates), max(b.updates))
    rounding = [at for at, note in notes if note.cause == "rounding"]
    cause, update = "", None
    lines = [f"Update {at}: {note.fact}. {note.meaning}".strip() for at, note in notes if longest == last or rounding]
    if rounding:
        cause, update = "rounding", rounding[0]
        tables = Pair(a, b, a.updates[last], b.updates[last]).tables("weights", "end")
        end = f"; after update {last} the weights agree to {distance(*tables):.1g}" if tables else ""
        lines.insert(0, f"The same but for rounding in {counted(len(numbers), 'update')}, from update {update} "
                        f"on{end}.")
    elif longest > last:
        cause, update = "length", last
        lines.append(f"The same to the bit up to update {last}.")
    elif notes:
        cause, update = notes[0][1].cause, notes[0][0]
        lines.insert(0, f"All {counted(len(numbers), 'update')} have the same weights, batches and gradients.")
    if longest > last:
        side, tape = ("A", a) if max(a.updates) == last else ("B", b)
        reason = (tape.end or {}).get("why") or ""
        how = f" ({reason})" if reason else "" if tape.end else ": its tape is cut off there"
        lines.append(f"{side} ends after update {last}{how}, and {other_of(side)} goes on until update {longest}.")
    extra = extra_parameters(a, b)
    if not cause and extra:
        cause, update = "unknown", numbers[0]
        lines.append(extra)
    if not cause:
        return Explanation(True, None, "", True, f"The same to the bit: {counted(len(numbers), 'update')}."
                           + damage(a, b), last_equal=last)
    lines += configuration(a, b)
    return Explanation(False, update, cause, cause == "length", "\n".join(lines) + damage(a, b),
                       notes=tuple(note for _, note in notes), last_equal=last)


def extra_parameters(a: TapeContent, b: TapeContent) -> str:
    """The parameters that only one of the two has."""
    tables = [next((update.table("weights", "start") for update in tape), None) for tape in (a, b)]
    if tables[0] is None or tables[1] is None:
        return ""
    for side, names in zip("AB", only_in_one(tables[0], tables[1]), strict=True):
        if names:
            return f"Only {side} has the parameters {listed(names)}; what both have is the same."
    return ""


def damage(a: TapeContent, b: TapeContent) -> str:
    found = [f"{counted(tape.damaged, 'record')} of {name} could not be read" for name, tape in (("A", a), ("B", b))
             if tape.damaged]
    return f"\n{'; '.join(found)}." if found else ""


def place(x: Update, y: Update) -> str:
    """Where an update is, as text."""
    if x.epoch is None:
        return f"update {x.number}"
    return f"update {x.number} (epoch {x.epoch + 1}, update {x.values['in_epoch']} of it)"


def configuration(a: TapeContent, b: TapeContent) -> list[str]:
    """The options on which the runs differ, as a line; they are where a reader looks next."""
    configs = [tape.header.get("config") or {} for tape in (a, b)]
    if not (configs[0] and configs[1]):
        return []
    one, other = (config | {"seed": tape.header.get("seed")} for config, tape in zip(configs, (a, b), strict=True))
    found = configuration_differences(one, other)
    return [f"The configurations differ: {'; '.join(found)}."] if found else []


def configuration_differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The options on which two runs differ, each as a clause; the plugin tape is left out."""
    found = []
    for key in sorted(one.keys() | other.keys()):
        here, there = one.get(key), other.get(key)
        if key == "tag" or here == there:
            continue
        if key == "plugin" and isinstance(here, list) and isinstance(there, list):
            found += plugin_differences(here, there)
        else:
            found.append(f"{key} {shown_option(here)} in A, {shown_option(there)} in B")
    return found


def shown_option(value: Any) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def plugin_differences(one: list[Any], other: list[Any]) -> list[str]:
    """The plugins that one of two runs has, and the options that differ of those that both have."""
    specs = [[str(spec) for spec in specs if str(spec).partition(":")[0] != "tape"] for specs in (one, other)]
    own, others = ({spec.partition(":")[0]: split(spec.partition(":")[2]) for spec in found} for found in specs)
    found = [f"the plugin {name} in {'A' if name in own else 'B'} only"
             for name in [*own, *others] if (name in own) != (name in others)]
    for name in own:
        options = others.get(name)
        if options is not None and options != own[name]:
            here, there = ([each for each in found if each not in rest]
                           for found, rest in ((own[name], options), (options, own[name])))
            found.append(f"{name} with {', '.join(here) or 'no more'} in A, {', '.join(there) or 'no more'} in B")
    order = [[name for name in names if name in own and name in others] for names in (own, others)]
    return found or ["the order of the plugins"] * (order[0] != order[1])
