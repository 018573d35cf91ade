"""Default implementations of the hooks, in plain PyTorch: what a hook does if no plugin replaces it.

Each takes all arguments of its hook, used or not, because such a function is called directly, without a generated one.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from loopctl.data.batch import apply_weight, batches_to_device, sample_count
from loopctl.errors import UsageError
from loopctl.hooks import hookimpl
from loopctl.metrics.meters import Meters
from loopctl.model.eval_mode import eval_mode
from loopctl.optim.fast_step import fast_step
from loopctl.run import Run


@hookimpl(trylast=True)
def param_groups(run: Run) -> list[dict[str, Any]]:
    return [{"params": [parameter for parameter in run.model.parameters() if parameter.requires_grad]}]


@hookimpl(trylast=True)
def group_batches(run: Run, batches: Iterable[Any]) -> Iterator[list[Any]]:
    return ([batch] for batch in batches)


@hookimpl(trylast=True)
def batch_weight(run: Run, batch: Any) -> float | Tensor:
    return sample_count(batch)


@hookimpl(trylast=True)
def optimizer_step(run: Run, closure: Callable[[], Tensor]) -> Tensor:
    return fast_step(run.optimizer, closure)


@hookimpl(trylast=True)
def micro_step(run: Run, batch: Any, weight: float | Tensor, last: bool) -> Tensor:
    loss = run.hook.compute_loss(run=run, batch=batch)
    loss = apply_weight(loss, weight)
    run.hook.backward(run=run, loss=loss)
    return loss.detach()


@hookimpl(trylast=True)
def compute_loss(run: Run, batch: Any) -> Tensor:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UsageError(f"loss_fn takes (input, target) batches, but train gave a {type(batch).__name__}; "
                         "for other batches, replace compute_loss in a plugin")
    input, target = batch
    run.outputs = run.network(input)
    return run.loss_fn(run.outputs, target)         # type: ignore[misc]   # None only where a plugin replaces this


@hookimpl(trylast=True)
def backward(run: Run, loss: Tensor) -> Tensor:
    loss.backward()
    return loss


@hookimpl(trylast=True)
def evaluate(run: Run) -> dict[str, Any]:
    if run.valid is None:
        return {}
    meters = Meters(run.metric_fns["val"], "val_")
    with eval_mode(run.model), torch.no_grad():
        for batch in batches_to_device(run.loaders["valid"], run.device):
            weight = run.hook.batch_weight(run=run, batch=batch)
            meters.loss.add(run.hook.compute_loss(run=run, batch=batch), weight)
            if meters.functions:
                meters.observe(run.outputs, batch, weight)
    if not meters.loss.weight and not meters.loss.values:
        raise UsageError("valid has no batches left; leave it out, or pass a list or a DataLoader, not an iterator")
    return meters.result(run)
