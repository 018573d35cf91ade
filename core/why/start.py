"""What an update starts from: weights, buffers, the optimizer's state, the modes of modules, random numbers."""
from __future__ import annotations

from math import isclose, prod

from loopctl.tape.reading import TapeContent, Update
from loopctl.why.pair import Finding, Pair, classes_of, listed, other_of, ratio_text, shown, with_suspects
from loopctl.why.tables import Relation, relate


def compare_start(pair: Pair) -> Finding | None:
    """The first of these in which the updates differ before they begin."""
    return compare_weights(pair) or compare_buffers(pair) or compare_optimizer_state(pair)


def compare_weights(pair: Pair) -> Finding | None:
    relation = pair.relation("weights", "start")
    if relation is None or relation.same:
        return None
    if pair.before is None:
        dtypes = [{kind for _, _, kind, _ in tape.header.get("parameters", [])} for tape in (pair.a, pair.b)]
        if dtypes[0] != dtypes[1]:
            kinds = [listed(sorted(each)) for each in dtypes]
            found = Finding("dtype", f"the weights are {kinds[0]} in A and {kinds[1]} in B",
                            "The runs compute in another precision from the start.")
            return with_suspects(found, pair, "setup", "wrap_model")
    if relation.kind == "rounding":
        return rounding(pair, "weights", relation, "before the update")
    which = described(relation, "tensors")
    if pair.before is None:
        every = len({*relation.rows, *constant_tensors(pair)}) >= relation.count
        return Finding("initial weights", f"the weights differ before the first update, {which}",
                       SEED if every else PART, certain=every)
    if not pair.consecutive:
        return Finding("unknown", f"the weights differ before the update, {which}",
                       f"They were equal after update {pair.before.number}.", certain=False)
    changed = [name for name, tape, update, last in (("A", pair.a, pair.x, pair.before.x),
                                                     ("B", pair.b, pair.y, pair.before.y))
               if last.table("weights", "end") != update.table("weights", "start")]
    plugins = plugins_that_changed(pair)
    where = f"between the updates {pair.before.number} and {pair.number}"
    who = f" by {' and '.join(each for _, each in plugins)}" if plugins else ""
    evaluated = [name for name, tape in (("A", pair.a), ("B", pair.b)) if evaluated_after(tape, pair.before.number)]
    advice = ("" if plugins else "Weights that were put in place for an evaluation, such as averaged ones, were not "
                                 "put back, or a checkpoint was loaded." if evaluated else
              "Something changes them in place, after the optimizer's step and before the next forward pass: averaged "
              "weights, a limit of their norm, load_state_dict.")
    own = [change_between(pair.before, pair, side) for side in changed]
    return Finding("weights changed", f"the weights of {' and '.join(changed) or 'one'} were changed {where}{who}"
                   + (f", {own[0]}" if len(own) == 1 else f", {which}"), advice,
                   certain=bool(changed) and (bool(plugins) or not evaluated),
                   plugins=tuple(name for name, _ in plugins))


SEED = "Another seed, or a model that draws its weights in another order: all that is drawn at random differs."
PART = ("Something else drew random numbers before these, they are initialized in another way, or were loaded. The "
        "other tensors are equal.")


def change_between(before: Pair, pair: Pair, side: str) -> str:
    """How the weights of one were changed after an update, in words."""
    last, now = (before.x, pair.x) if side == "A" else (before.y, pair.y)
    tables = last.table("weights", "end"), now.table("weights", "start")
    if tables[0] is None or tables[1] is None:
        return "to others"
    relation = relate(tables[1], tables[0])
    if relation.kind in ("scaled", "rows") and not relation.ratios:
        return f"{places(relation, 'tensors')}, to {ratio_text(relation.ratio)} times what they were"
    return f"{places(relation, 'tensors')}, by {shown(100 * min(relation.distance, 2.0))} % of their norm"


def constant_tensors(pair: Pair) -> list[str]:
    """The tensors that are all 0 or all 1, as those of BatchNorm are with any seed."""
    table = pair.x.table("weights", "start")
    sizes = {name: prod(map(int, shape.split("x"))) if shape else 1
             for name, shape, *_ in pair.a.header.get("parameters", [])}
    return [name for name, norm in zip(table.names, table.norms, strict=True)
            if norm == 0 or isclose(norm * norm, sizes.get(name, -1), rel_tol=1e-5)] if table else []


def plugins_that_changed(pair: Pair) -> list[tuple[str, str]]:
    """The plugins after which the weights had changed, in one of the two only: their names, and in words."""
    found = []
    for one, other in ((pair.x, pair.y), (pair.y, pair.x)):
        others = {tuple(each) for each in other.values.get("changed_by", [])}
        side = "A" if one is pair.x else "B"
        found += [(plugin, f"the plugin {plugin} in its hook {hook}, in {side} only")
                  for hook, plugin in one.values.get("changed_by", []) if (hook, plugin) not in others]
    return found


def evaluated_after(tape: TapeContent, number: int) -> bool:
    return any(each["update"] == number for each in tape.evaluations)


def compare_buffers(pair: Pair) -> Finding | None:
    relation = pair.relation("buffers", "start")
    if relation is None or relation.same:
        return None
    if relation.kind == "rounding":
        return rounding(pair, "buffers", relation, "before the update")
    if pair.before is None or not pair.consecutive:
        return Finding("buffers", f"the buffers differ before the update, {described(relation, 'buffers')}",
                       "They are saved and loaded apart from the parameters.", certain=False)
    changed = [name for name, update, last in (("A", pair.x, pair.before.x), ("B", pair.y, pair.before.y))
               if last.table("buffers", "end") != update.table("buffers", "start")]
    return Finding("buffers", f"the buffers of {' and '.join(changed) or 'one'} were changed between the updates "
                              f"{pair.before.number} and {pair.number}, {described(relation, 'buffers')}",
                   "Running statistics change in every forward pass in training mode: an evaluation, or another "
                   "forward pass, was made without model.eval().", certain=bool(changed))


def compare_optimizer_state(pair: Pair) -> Finding | None:
    one, other = pair.x.table("state", "start"), pair.y.table("state", "start")
    classes = classes_of(pair)
    if (one is None and other is None) or classes[0] != classes[1]:
        return None
    if one is None or other is None:
        lacking = "A" if one is None else "B"
        has = one or other
        return Finding("optimizer state", f"the optimizer of {lacking} has no state, and that of {other_of(lacking)} "
                                          f"has {listed(has.names) if has else ''}",
                       "The state was not loaded in a resume, or the optimizer was made anew.")
    relation = pair.relation("state", "start")
    if relation is None:
        return Finding("optimizer", f"the optimizers keep other state: {listed(one.names)} in A, "
                                    f"{listed(other.names)} in B", "They are other optimizers, or have other options.")
    if relation.same:
        return None
    if relation.kind == "rounding":
        return rounding(pair, "state", relation, "before the update")
    lost = [name for name, table in (("A", one), ("B", other)) if not any(norm > 0 for norm in table.norms)]
    fact = (f"the optimizer's state of {lost[0]} is zero" if lost
            else f"the optimizer's state differs: {listed(relation.rows)}")
    return Finding("optimizer state", fact, "It was equal after the update before, so it was reset or loaded in "
                                            "between."
                   if pair.consecutive else "Momentum and the like were lost or loaded.", certain=bool(lost))


def compare_modes(pair: Pair) -> Finding | None:
    one, other = pair.x.values.get("modes"), pair.y.values.get("modes")
    if one is None or other is None or modules_in_eval(pair.a, pair.x) == modules_in_eval(pair.b, pair.y):
        return None
    in_a, in_b = (set(modules_in_eval(pair.a, pair.x)), set(modules_in_eval(pair.b, pair.y)))
    side, extra = ("A", in_a - in_b) if in_a - in_b else ("B", in_b - in_a)
    names = [name for name in modules_in_eval(pair.a if side == "A" else pair.b, pair.x) if name in extra]
    return Finding("mode", f"in {side} the modules {listed(names)} are in evaluation mode, and in {other_of(side)} in "
                           "training mode",
                   "Dropout and BatchNorm work in another way there: model.train() was not called again after an "
                   "evaluation, or parts are kept in evaluation mode on purpose.", minor=True)


def modules_in_eval(tape: TapeContent, update: Update) -> tuple[str, ...]:
    """The modules in evaluation mode in an update; their names are on the tape where they last changed."""
    known: tuple[str, ...] = ()
    for each in tape:
        if each.number > update.number:
            break
        if "in_eval_mode" in each.values:
            known = tuple(each.values["in_eval_mode"])
    return known


def compare_random(pair: Pair, point: str) -> Finding | None:
    """Whether the random-number generators are in another state at a point. That alone changes nothing."""
    one, other = (update.values.get("random", {}).get(point, {}) for update in (pair.x, pair.y))
    differing = [name for name in one if name in other and one[name] != other[name]
                 and (name in drawn_from(pair.a) or name in drawn_from(pair.b))]
    if not differing:
        return None
    generators = f"the random-number generator of {listed(differing)}"
    if point == "forward":
        return Finding("random numbers", f"{generators} is in another state after the forward pass",
                       drawn(pair, differing, "start", "forward"), minor=True)
    if pair.before is None:
        return Finding("random numbers", f"{generators} is in another state before the first update",
                       "The seed differs, or something draws random numbers before training in one of "
                       "them.", minor=True)
    evaluations = [[each for each in tape.evaluations if each["update"] == pair.before.number]
                   for tape in (pair.a, pair.b)]
    if pair.consecutive and random_equal(pair.before, "end") and any(evaluations):
        draws = [name for name, found in zip("AB", evaluations, strict=True)
                 if any(each["random"].get("before") != each["random"].get("after") for each in found)]
        if draws:
            return Finding("random numbers", f"{generators} is in another state after the evaluation that follows "
                                             f"update {pair.before.number}",
                           f"The evaluation of {' and '.join(draws)} draws random numbers.", minor=True)
    where = (f"between the updates {pair.before.number} and {pair.number}" if random_equal(pair.before, "end")
             else f"since update {pair.before.number}")
    return Finding("random numbers", f"{generators} is in another state {where}",
                   "One draws more random numbers there: an augmentation, a sampler, an evaluation.", certain=False,
                   minor=True)


def drawn_from(tape: TapeContent) -> set[str]:
    """The random-number generators from which something is drawn while the tape is recorded."""
    if "drawn_from" not in tape.header:
        states: dict[str, set[int]] = {}
        for update in tape:
            for found in update.values.get("random", {}).values():
                for name, state in found.items():
                    states.setdefault(name, set()).add(state)
        tape.header["drawn_from"] = {name for name, found in states.items() if len(found) > 1}
    return tape.header["drawn_from"]


def draws_in_forward(pair: Pair) -> bool:
    """Whether random numbers are drawn from where an update begins to where its gradients are computed."""
    found = [update.values.get("random", {}) for update in (pair.x, pair.y)]
    return any(each.get("start") != each.get("forward") for each in found)


def drawn(pair: Pair, generators: list[str], start: str, end: str) -> str:
    """Which of the two drew random numbers between two points."""
    draws = [name for name, update in (("A", pair.x), ("B", pair.y))
             if any(update.values["random"][start].get(each) != update.values["random"][end].get(each)
                    for each in generators)]
    if len(draws) == 1:
        return f"Only {draws[0]} draws random numbers in it: dropout, or an augmentation on the way."
    return "Both draw random numbers in it, another number of them or from another state."


def random_equal(pair: Pair, point: str) -> bool:
    one, other = (update.values.get("random", {}).get(point) for update in (pair.x, pair.y))
    return one == other


def rounding(pair: Pair, what: str, relation: Relation, where: str) -> Finding:
    """Two tables that are equal but for rounding."""
    return Finding("rounding", f"the {what} agree to {relation.distance:.1g} {where}, and not to the bit",
                   environment_difference(pair), certain=False, minor=True)


ENVIRONMENT = {"torch": "torch", "device_name": "device", "threads": "number of threads", "matmul": "precision of "
                                                                                                    "matmul",
               "deterministic": "choice of deterministic algorithms", "cudnn_benchmark": "cudnn.benchmark"}


def environment_difference(pair: Pair) -> str:
    """What differs between the environments of two runs, and in plugins that choose other kernels."""
    headers = pair.a.header, pair.b.header
    found = [f"the {what} is {headers[0].get(key)} in A and {headers[1].get(key)} in B" for key, what in
             ENVIRONMENT.items() if headers[0].get(key) != headers[1].get(key)]
    plugins = [{str(spec).partition(":")[0] for spec in header.get("config", {}).get("plugin") or []}
               for header in headers]
    kernels = {"compile", "channels_last", "amp", "bf16", "split", "cudagraph", "activation_checkpointing", "float8"}
    if both := all(header.get("config", {}).get("plugin") is not None for header in headers):
        found += [f"the plugin {name} is in {'A' if name in plugins[0] else 'B'} only"
                  for name in sorted((plugins[0] ^ plugins[1]) & kernels)]
    if found:
        return "Sums are made in another order or by other kernels: " + "; ".join(found) + "."
    return ("Sums are made in another order: compile, another number of threads, a fused or foreach optimizer, "
            "another way to write the same formula." + " The environments on the tapes are the same." * both)


def described(relation: Relation, noun: str) -> str:
    """How far two tables are apart, and where."""
    which = places(relation, noun)
    if relation.kind == "missing":
        return f"and {relation.lacking} lacks {listed(relation.rows)}"
    if relation.kind == "not finite":
        return f"and {relation.lacking} has values that are not finite in {listed(relation.rows)}"
    if relation.kind == "scaled":
        return f"{which}: those of A are {ratio_text(relation.ratio)} times those of B"
    return f"{which}; the difference has {shown(100 * min(relation.distance, 2.0))} % of the norm of all"


def places(relation: Relation, noun: str) -> str:
    """In which of the tensors two tables differ."""
    if len(relation.rows) == relation.count:
        return f"in all {relation.count} {noun}" if relation.count > 1 else f"in {relation.rows[0]}"
    return f"in {len(relation.rows)} of {relation.count} {noun} ({listed(relation.rows)})"
