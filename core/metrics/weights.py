"""How micro-batches are weighted in their step and in reported means, also where nothing counts."""
from __future__ import annotations

from collections.abc import Sequence
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
    loss = as_loss(loss)
    if isinstance(weight, Tensor):
        return torch.where(weight == 0, 0.0, loss) * weight
    if weight == 1:
        return loss
    return loss * weight if weight else torch.nan_to_num(loss, 0.0, 0.0, 0.0) * 0.0


def loss_weight(run: Run, weight: Any) -> Any:
    """Return what the loss of a micro-batch of this weight is multiplied by: its share of the step.

    Where `loss_fn` returns the sum over a batch, losses are added up as they are. With several processes, whose
    gradients are averaged, that is a factor of the world size.
    """
    return weight / nonzero(run.weight) if run.reduction == "mean" else float(run.world_size)


def reported_loss(run: Run, loss: Tensor, weight: Any, processes: int = 1) -> Tensor:
    """Return a loss as a mean per sample, where `weight`, times the number of processes, is that of its samples."""
    return loss if run.reduction == "mean" else loss / (nonzero(weight) * processes)


def those_that_count(run: Run, weights: list[Any]) -> tuple[Sequence[Any], list[Any]]:
    """The micro-batches of a step and their weights, without the batches that have no samples.

    With several processes they stay, because every process takes part in the collectives of each micro-batch.
    """
    if run.world_size > 1 or not any(map(counts_nothing, weights)):
        return run.batches, weights
    kept = [number for number, weight in enumerate(weights)
            if not counts_nothing(weight) or sample_count(run.batches[number])]
    return [run.batches[number] for number in kept], [weights[number] for number in kept]


def counts_nothing(weight: Any) -> bool:
    """Whether `weight` is known to be 0. The host does not wait for a tensor on another device, so False for that."""
    return not weight if not isinstance(weight, Tensor) else weight.is_cpu and not weight


def nonzero(weight: Any) -> Any:
    """Return `weight` to divide by: where it is a tensor that is 0, 1."""
    return torch.where(weight == 0, 1.0, weight) if isinstance(weight, Tensor) else weight
