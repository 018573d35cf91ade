"""Plain PyTorch: what each hook does when no plugin replaces it.

Each takes all the arguments of its hook, needed or not, and so is called without a detour.
"""
from __future__ import annotations

import torch

from loopctl.batches import moved, samples, weighed
from loopctl.errors import UsageError
from loopctl.hooks import hookimpl
from loopctl.meters import Meters
from loopctl.modes import evaluating
from loopctl.updates import step


@hookimpl(trylast=True)
def param_groups(run):
    return [{"params": [parameter for parameter in run.model.parameters() if parameter.requires_grad]}]


@hookimpl(trylast=True)
def group_batches(run, batches):
    return ([batch] for batch in batches)


@hookimpl(trylast=True)
def batch_weight(run, batch):
    return samples(batch)


@hookimpl(trylast=True)
def optimizer_step(run, closure):
    return step(run.optimizer, closure)


@hookimpl(trylast=True)
def micro_step(run, batch, weight, last):
    loss = run.hook.compute_loss(run=run, batch=batch)
    loss = weighed(loss, weight)
    run.hook.backward(run=run, loss=loss)
    return loss.detach()


@hookimpl(trylast=True)
def compute_loss(run, batch):
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise UsageError(f"loss_fn takes (input, target) batches, and train gave a {type(batch).__name__}; "
                         "for others, replace compute_loss in a plugin")
    input, target = batch
    run.outputs = run.network(input)
    return run.loss_fn(run.outputs, target)


@hookimpl(trylast=True)
def backward(run, loss):
    loss.backward()
    return loss


@hookimpl(trylast=True)
def evaluate(run):
    if run.valid is None:
        return {}
    meters = Meters(run.metric_fns["val"], "val_")
    with evaluating(run.model), torch.no_grad():
        for batch in moved(run.feeds["valid"], run.device):
            weight = run.hook.batch_weight(run=run, batch=batch)
            meters.loss.add(run.hook.compute_loss(run=run, batch=batch), weight)
            if meters.functions:
                meters.observe(run.outputs, batch, weight)
    if not meters.loss.weight and not meters.loss.values:
        raise UsageError("valid has no batches; leave it out, or pass a list or a DataLoader, which can be read again")
    return meters.result(run)
