"""A run goes on in another number of processes than it was saved by."""
from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from loopctl.errors import UsageError
from loopctl.metrics.meters import Meters, is_stateful_metric
from loopctl.rng import rng_state

if TYPE_CHECKING:
    from loopctl.run import Run

log = logging.getLogger("loopctl")


def state_of_this_rank(run: Run, saved: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint has for this process: means, place in the data, random numbers.

    Where there were more or fewer processes, the epoch at hand goes on with the first batch that none of them had, and
    `saved["position"]` becomes the one that this number of processes would be at. Raises UsageError where that is not
    known.
    """
    ranks = saved["ranks"]
    if len(ranks) == run.world_size:
        return ranks[run.rank]
    if run.rank == 0:
        log.warning("resume: %d processes in the checkpoint and %d in this run, with the same batch size each: a step "
                    "has %s samples", len(ranks), run.world_size, "more" if run.world_size > len(ranks) else "fewer")
    counters, first = saved["counters"], ranks[0]
    consumed = first["data"]["train"]["consumed"]
    if consumed:
        stuck = [name for name, function in run.metric_fns["train"].items() if is_stateful_metric(function)]
        if run.loaders["train"].shard is None or stuck:
            why = f"metric {stuck[0]} cannot be divided among them" if stuck else "the data is in parts of its own"
            raise UsageError(f"it was saved within an epoch by {len(ranks)} processes and here are {run.world_size}: "
                             f"{why}; go on from an epoch's end, or with as many processes")
    counters.update(rebased_counters(run, counters, consumed))
    mine = ranks[run.rank] if run.rank < len(ranks) else {"random": rng_state(run.train, run.valid)}
    data = {name: feed | {"workers": {}, "indices": None} for name, feed in first["data"].items()}
    if run.rank:
        meters = Meters(run.metric_fns["train"], "train_").state_dict()
    else:
        meters = {name: merge_means([one["meters"][name] for one in ranks]) for name in first["meters"]}
    return {"meters": meters, "data": data, "random": mine["random"]}


def rebased_counters(run: Run, counters: dict[str, Any], consumed: int) -> dict[str, Any]:
    """Where a run is that has done `counters["epoch"]` epochs, and `consumed` batches of all processes of the next."""
    steps, batches = run.plan()
    done = counters["attempts"] - counters["began"][1]              # steps of the epoch at hand
    batch = 0
    if consumed and run.steps_per_epoch:
        batch = done * (batches // steps)
    elif consumed:
        shard = run.loaders["train"].shard
        assert shard is not None
        left = shard.left(consumed)
        batch, done = batches - left, steps - -(-left * steps // batches)
    began = counters["epoch"] * batches, counters["attempts"] - done
    return {"seen": began[0] + batch, "began": began, "shift": began[1] - counters["epoch"] * steps}


def merge_means(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The states of the means in all processes, as of one."""
    if not all("values" in state for state in states):
        return states[0]
    return {"values": [one for state in states for one in state["values"]],
            "weights": [one for state in states for one in state["weights"]],
            "total": sum(state["total"] for state in states), "weight": sum(state["weight"] for state in states)}
