"""Default implementations of the hooks, in plain PyTorch: what a hook does if no plugin replaces it.

Each takes all arguments of its hook, used or not, because such a function is called directly, without a generated one.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from loopctl.data.batch import batches_to_device, loader_name, sample_count, target_of
from loopctl.errors import UsageError
from loopctl.hooks import hookimpl
from loopctl.metrics.meters import Meters, metric_prefix
from loopctl.metrics.scalars import as_loss
from loopctl.metrics.weights import counts_nothing, reported_loss, weighted_loss
from loopctl.model.eval_mode import eval_mode
from loopctl.model.forward import loss_by_forward, loss_of_batch, new_pass
from loopctl.model.ownership import modules_of, named_parameters
from loopctl.optim.fast_step import fast_step
from loopctl.optim.several import losses_in_turn
from loopctl.run import Run


@hookimpl(trylast=True)
def param_groups(run: Run) -> list[dict[str, Any]]:
    return [{"params": [parameter for parameter in named_parameters(run).values() if parameter.requires_grad]}]


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
    loss = weighted_loss(loss, weight)
    run.hook.backward(run=run, loss=loss)
    return loss.detach()


@hookimpl(trylast=True)
def compute_loss(run: Run, batch: Any) -> Tensor:
    if run.forward is not None:
        return loss_by_forward(run, batch)
    if run.loss_fn is None or not isinstance(batch, tuple | list) or len(batch) != 2:
        return loss_of_batch(run, batch)
    input, target = batch               # the usual case
    run.outputs = run.network(input)
    try:
        return run.loss_fn(run.outputs, target)
    except Exception as error:
        explain_loss_error(run.outputs, target, error)
        raise


@hookimpl(trylast=True)
def backward(run: Run, loss: Tensor) -> Tensor:
    try:
        loss.backward()
    except RuntimeError as error:
        if not loss.requires_grad:
            raise UsageError("the loss depends on no parameter that requires gradients, so nothing can be trained; "
                             "leave out detach() and no_grad() on the way from the model to the loss") from error
        raise
    return loss


@hookimpl(trylast=True)
def evaluate(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in run.validation_sets():
        found |= evaluate_set(run, loader_name(name), Meters(run.metric_fns["val"], metric_prefix(name)))
    return found


def evaluate_set(run: Run, loader: str, meters: Meters) -> dict[str, Any]:
    """Return the means of loss and metrics over one validation set."""
    run.evaluating = loader
    try:
        with eval_mode(*modules_of(run)), torch.no_grad(), new_pass(run):
            for batch in batches_to_device(run.loaders[loader], run.device):
                evaluate_batch(run, meters, batch)
    finally:
        run.evaluating = ""
    if not meters.loss.weight and not meters.loss.values:
        raise UsageError(f"{loader} has no batches left; leave it out, or pass a list or a DataLoader, not an iterator")
    return meters.result(run)


def evaluate_batch(run: Run, meters: Meters, batch: Any) -> None:
    """Compute the loss and the metrics of one batch. A batch of no samples counts nothing."""
    weight = run.hook.batch_weight(run=run, batch=batch)
    if run.world_size == 1 and counts_nothing(weight) and not sample_count(batch):
        meters.loss.add(0.0, 0)
        return
    run.log_target = meters, weight
    loss = as_loss(losses_in_turn(run, batch) if run.turns else run.hook.compute_loss(run=run, batch=batch))
    run.log_target = None
    meters.loss.add(reported_loss(run, loss, weight), weight)
    if meters.functions:
        meters.observe(run.outputs, target_of(batch), weight)


def explain_loss_error(outputs: Any, target: Any, error: Exception) -> None:
    """Add to an error of the loss function what it was given. Raises UsageError for a class that does not exist."""
    if not (isinstance(outputs, Tensor) and isinstance(target, Tensor)) or isinstance(error, torch.OutOfMemoryError):
        return
    if isinstance(error, IndexError) and outputs.ndim > 1 and not target.is_floating_point():
        wrong = ((target < 0) | (target >= outputs.shape[1])).nonzero()[0].tolist()
        part = "train" if torch.is_grad_enabled() else "valid"
        where = wrong[0] if len(wrong) == 1 else tuple(wrong)
        raise UsageError(f"{part} gave the class {target[tuple(wrong)].item()}, at index {where} of a batch, and the "
                         f"model has {outputs.shape[1]} outputs, for classes 0 to {outputs.shape[1] - 1}") from error
    last = outputs.ndim == target.ndim + 1 > 2 and outputs.shape[:-1] == target.shape
    error.add_note(f"the loss function was given outputs of shape {tuple(outputs.shape)} and targets of shape "
                   f"{tuple(target.shape)}"
                   + "; if the last dimension is that of the classes, use output.transpose(1, -1)" * last)
