"""Resume in another number of processes (world size) than the checkpoint was saved by."""
from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from loopctl.errors import UsageError
from loopctl.metrics.meters import Meters, is_stateful_metric
from loopctl.metrics.named import Sums, added
from loopctl.rng import rng_state

if TYPE_CHECKING:
    from loopctl.run import Run

log = logging.getLogger("loopctl")


def state_of_this_rank(run: Run, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the states that each rank has of its own: metrics, data loaders and random number generators.

    If the world size has changed, the current epoch continues with the first batch that no process has consumed, and
    `saved["counters"]` is changed to what this number of processes would have counted. Raises UsageError where that
    batch is not known, or a metric's state cannot be divided.
    """
    ranks = saved["ranks"]
    if len(ranks) == run.world_size:
        return ranks[run.rank]
    if run.rank == 0:
        log.warning("resume: %d processes in the checkpoint and %d in this run, with the same batch size each: a step "
                    "has %s samples", len(ranks), run.world_size, "more" if run.world_size > len(ranks) else "fewer")
    counters, rank0 = saved["counters"], ranks[0]
    consumed = rank0["data"]["train"]["consumed"]
    if consumed:
        stateful = [name for name, function in run.metric_fns["train"].items()
                    if is_stateful_metric(function) and not isinstance(function, Sums)]
        if run.loaders["train"].shard is None or stateful:
            reason = (f"the state of metric {stateful[0]} cannot be divided among them" if stateful else
                      "the training data is not sharded by loopctl, so which batches remain is not known")
            raise UsageError(f"resume: the checkpoint was saved within an epoch by {len(ranks)} processes and this run "
                             f"has {run.world_size}: {reason}; resume from a checkpoint at an epoch's end, or use "
                             f"{len(ranks)} processes")
    counters.update(rebased_counters(run, counters, consumed))
    # A rank that the checkpoint does not have keeps the random-number-generator state that its seed gave it.
    random = ranks[run.rank]["random"] if run.rank < len(ranks) else rng_state(*run.data_sets().values())
    data = {name: loader | {"workers": {}, "indices": None} for name, loader in rank0["data"].items()}
    # Rank 0 takes over the sums of all ranks; the others begin at zero.
    if run.rank:
        meters, logged = Meters(run.metric_fns["train"], "train_").state_dict(), {}
    else:
        meters = {name: merge_states([rank["meters"][name] for rank in ranks], run.metric_fns["train"].get(name))
                  for name in rank0["meters"]}
        logged = {name: merge_states([rank["logged"][name] for rank in ranks if name in rank["logged"]], None)
                  for name in dict.fromkeys(name for rank in ranks for name in rank["logged"])}
    return {"meters": meters, "logged": logged, "val_metrics": rank0["val_metrics"], "data": data,
            "carried": None, "random": random}


def rebased_counters(run: Run, counters: dict[str, Any], consumed: int) -> dict[str, Any]:
    """Return the counters that depend on the world size, as this run's number of processes would have counted them.

    counters: those of the checkpoint
    consumed: batches of the current epoch that all processes together have consumed
    """
    steps, batches = run.planned.epoch(counters["epoch"])
    done = counters["attempts"] - counters["began"][1]              # steps of the current epoch
    batch = 0                                                       # micro-batches of it, per process
    if consumed and run.steps_per_epoch:
        batch = done * (batches // steps)
    elif consumed:
        shard = run.loaders["train"].shard
        assert shard is not None
        remaining = shard.remaining(consumed)
        batch, done = batches - remaining, steps - -(-remaining * steps // batches)
    began = run.planned.micro_batches(counters["epoch"]), counters["attempts"] - done
    shift = began[1] - int(run.planned.steps(counters["epoch"]))
    return {"seen": began[0] + batch, "began": began, "shift": shift}


def merge_states(states: list[dict[str, Any]], function: Any) -> dict[str, Any]:
    """Merge the states of one mean, or of one metric that is computed from sums, on all ranks into one state.

    Other metrics, which begin anew with each epoch, keep the state of rank 0.
    """
    if isinstance(function, Sums):
        attributes = [state["attributes"][""] for state in states]
        sums = added([own["sums"] for own in attributes])
        return {"attributes": {"": attributes[0] | {"sums": sums}}}
    if not all("values" in state for state in states):
        return states[0]
    return {"values": [value for state in states for value in state["values"]],
            "weights": [weight for state in states for weight in state["weights"]],
            "total": sum(state["total"] for state in states), "weight": sum(state["weight"] for state in states)}
