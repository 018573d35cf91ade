"""How micro-batches are weighted in their step and in reported means, also where nothing counts."""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loopctl.data.batch import sample_count
from loopctl.metrics.scalars import as_loss

if TYPE_CHECKING:
    from loopctl.run import Run


def weighted_loss(loss: Any, weight: float | Tensor) -> Tensor:
    """Return `loss`, a scalar, times its weight in the step. A loss of weight 0 is 0, also where it is not finite.

    A weight of 1.0 returns `loss` itself. Raises UsageError where `loss` is no scalar.
    """
    if type(weight) is float and weight == 1 and type(loss) is Tensor and not loss.ndim:        # the usual case
        return loss
    loss = as_loss(loss)
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, loss) * weight
    return loss * weight if weight else torch.nan_to_num(loss, 0.0, 0.0, 0.0) * 0.0


def reported_loss(run: Run, loss: Tensor, weight: Any, processes: int = 1) -> Tensor:
    """Return a loss as a mean per sample, where `weight`, times the number of processes, is that of its samples."""
    return loss if run.reduction == "mean" else loss / (nonzero(weight) * processes)


def weighted_batches(run: Run, weights: list[Any]) -> Iterable[tuple[Any, Any, Any, bool]]:
    """Yield the micro-batches of a step, their weights, what their losses are multiplied by, and which is the last.

    A loss is multiplied by the share of its micro-batch in the step. Where `loss_fn` returns the sum over a batch,
    losses are added up as they are; with several processes, whose gradients are averaged, that is a factor of the world
    size. Micro-batches without samples are left out, except with several processes, where every process takes part in
    each collective.
    """
    total, batches = run.weight, run.batches
    if len(weights) == 1 and type(total) is int and total and run.world_size == 1:        # the usual case
        return ((batches[0], weights[0], 1.0, True),)
    # Of whole numbers it is quickly known whether one is 0; of others each is looked at.
    if run.world_size == 1 and (0 in weights if type(total) is int else any(map(counts_nothing, weights))):
        kept = [number for number, weight in enumerate(weights)
                if not counts_nothing(weight) or sample_count(batches[number])]
        batches, weights = [batches[number] for number in kept], [weights[number] for number in kept]
    if run.reduction == "mean":
        divisor = nonzero(total)
        shares = [weight / divisor for weight in weights]
    else:
        shares = [float(run.world_size)] * len(weights)
    return zip(batches, weights, shares, [False] * (len(weights) - 1) + [True], strict=True)


def counts_nothing(weight: Any) -> bool:
    """Whether `weight` is known to be 0. The host does not wait for a tensor on another device, so False for that."""
    if type(weight) is int:             # the usual case
        return not weight
    return not weight if not isinstance(weight, Tensor) else weight.is_cpu and not weight


def nonzero(weight: Any) -> Any:
    """Return `weight` to divide by: where it is a tensor that is 0, 1."""
    return torch.where(weight == 0, 1.0, weight) if isinstance(weight, Tensor) else weight
