"""A rehearsal before training, so that a mistake that one batch shows is found before the first update, not after it.

One batch of the validation data goes through model, loss and metrics, without a trace. The training data is not read
ahead: its first batch is checked as it passes.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy, deepcopy
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _python_dispatch
from torch.utils.data import DataLoader

from loopctl.data.batch import loader_name, target_of, to_device
from loopctl.data.device_loader import DeviceLoader
from loopctl.data.resumable_loader import samples_by_index
from loopctl.data.sharding import Shard
from loopctl.defaults import evaluate_batch
from loopctl.errors import UsageError, nearest
from loopctl.metrics.meters import Meters, is_stateful_metric, metric_prefix
from loopctl.model.eval_mode import eval_mode
from loopctl.model.forward import new_pass, unwrapped_network
from loopctl.model.ownership import modules_of
from loopctl.rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from loopctl.run import Run

# Losses that compare outputs and targets element by element, and broadcast them where their shapes differ.
ELEMENTWISE = (functional.mse_loss, functional.l1_loss, functional.smooth_l1_loss, functional.huber_loss)
ELEMENTWISE_CLASSES = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)


def rehearse(run: Run) -> None:
    """Have the first call of `grads_ready` check the gradients, and try the first batch of `run.valid`.

    At that point every hook of a step was called and no update was made. There is no trace of the trial: random-number
    states, and the buffers and attributes of the modules, are as before. Raises what model, loss or metrics raise, and
    UsageError where what they return cannot be used.
    """
    grads_ready = run.hook.grads_ready

    def rehearse_then_call(run: Run) -> None:
        run.hook.grads_ready = grads_ready          # the hooks of a run are attributes
        check_gradients(run)
        check_target(run)
        logged = {f"train_{name}" for name in run.meters.logged}
        if run.valid is not None and "evaluate" not in run.hook.replaced:
            logged |= try_validation(run)
        if run.turns:                               # the other turns are to come
            logged |= {f"train_{name.removeprefix('val_')}" for name in logged}
        check_expected(run, logged)
        grads_ready(run=run)

    run.hook.grads_ready = rehearse_then_call


def check_gradients(run: Run) -> None:
    """Raise UsageError if no parameter that the optimizer holds has a gradient."""
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    if not any(parameter.grad is not None for parameter in parameters if parameter.requires_grad):
        raise UsageError("the first backward pass gave no gradient to any parameter that the optimizer holds, so "
                         "nothing would be trained; make the optimizer from the parameters that the loss depends on")


def check_target(run: Run) -> None:
    """Raise UsageError where outputs and target have shapes with which the loss function computes something else.

    torch computes it without an error: broadcasting pairs every output with every target, and cross entropy over a
    single class is 0.
    """
    output, target, loss_fn = run.outputs, target_of(run.batches[-1]), run.loss_fn
    if not (isinstance(output, Tensor) and isinstance(target, Tensor)) or "compute_loss" in run.hook.replaced:
        return
    shapes = f"the outputs have shape {tuple(output.shape)} and the targets {tuple(target.shape)}"
    elementwise = loss_fn in ELEMENTWISE or isinstance(loss_fn, ELEMENTWISE_CLASSES)
    if elementwise and output.shape != target.shape:
        raise UsageError(f"loss_fn compares outputs with targets one by one, but {shapes}; make the two alike, for "
                         "example with output.squeeze(1) in the model, or target.unsqueeze(1) in the data")
    cross_entropy = loss_fn is functional.cross_entropy or isinstance(loss_fn, nn.CrossEntropyLoss)
    if cross_entropy and output.ndim > 1 and output.shape[1] == 1:
        raise UsageError(f"loss_fn is a cross entropy over a single class, which is 0 for every output: {shapes}; for "
                         "numbers use torch.nn.MSELoss(), for two classes torch.nn.BCEWithLogitsLoss()")


def check_expected(run: Run, logged: set[str]) -> None:
    """Raise UsageError if a metric that a plugin monitors is neither declared nor logged in the first step."""
    for name in run.expected:
        if name not in run.metrics and name not in logged:
            raise UsageError(f"monitor={name}: the run has no such metric; "
                             f"{nearest(name, {*run.metrics, *logged}, 'it has')}")


def try_validation(run: Run) -> set[str]:
    """Compute loss and metrics of the first batch of each validation set, and undo what that has changed.

    Return the names of what is logged in an evaluation; where no batch can be tried, those of the training step.
    """
    logged = {metric_prefix(name) + value for name in run.validation_sets() for value in run.meters.logged}
    part = "valid"
    random, outputs, network, logging = rng_state(*run.data_sets().values()), run.outputs, run.network, run.log_target
    run.network = unwrapped_network(run)    # what wraps it, a compiler for example, need not know of the trial
    try:
        with no_dispatch_modes(), unchanged(modules_of(run)), eval_mode(*modules_of(run)), torch.no_grad():
            for name, data in run.validation_sets().items():
                part = loader_name(name)
                for batch in first_batch(data):
                    metrics = {metric: deepcopy(function) if is_stateful_metric(function) else function
                               for metric, function in run.metric_fns["val"].items()}
                    meters = Meters(metrics, metric_prefix(name))
                    with new_pass(run):
                        evaluate_batch(run, meters, to_device(batch, run.device))
                    logged |= {meters.prefix + value for value in meters.logged}
    except Exception as error:
        error.add_note(f"raised by the first batch of {part}, before the first update")
        raise
    finally:
        run.outputs, run.network, run.log_target = outputs, network, logging
        set_rng_state(random, *run.data_sets().values())
    return logged


def no_dispatch_modes() -> AbstractContextManager[Any]:
    """Switch off what observes every operation, such as torch's counter of FLOPs, where this version of torch can."""
    switch_off = getattr(_python_dispatch, "_disable_current_modes", nullcontext)
    return switch_off()


def first_batch(data: Any) -> list[Any]:
    """The first batch of `data` in a list, which is empty where reading it could have consequences.

    That is so for anything but lists and loaders that draw indices, such as an iterator that can be read only once. A
    loader with workers reads in a worker, for its data set may not be used in this process.
    """
    if isinstance(data, list | tuple) or (isinstance(data, Shard) and isinstance(data.batches, list | tuple)):
        return list(islice(data, 1))
    if not samples_by_index(data) or hasattr(data, "state_dict") or hasattr(data.sampler, "state_dict"):
        return []
    reader: DataLoader[Any] = copy(data)
    indices = list(islice(data.batch_sampler, 1))
    workers: dict[str, Any] = {"num_workers": 1, "persistent_workers": False} if data.num_workers else {}
    vars(reader).update(batch_sampler=indices, _iterator=None, pin_memory=False, **workers)
    batches: Any = DataLoader.__iter__(reader)
    try:
        found = list(batches)
    finally:
        # An error keeps the iterator alive. What collects it later would wait five seconds for its workers.
        getattr(batches, "_shutdown_workers", lambda: None)()
    return [reader.finish(batch) for batch in found] if isinstance(reader, DeviceLoader) else found


@contextmanager
def unchanged(modules: list[nn.Module]) -> Iterator[None]:
    """Give all modules in `modules` their buffers and attributes back at the end of the block."""
    parts = list({id(part): part for module in modules for part in module.modules()}.values())
    attributes = [(part, dict(vars(part)), dict(part._buffers)) for part in parts]
    buffers = [(buffer, buffer.clone(), buffer._version) for module in modules for buffer in module.buffers()]
    try:
        yield
    finally:
        for part, values, named in attributes:
            vars(part).clear()
            vars(part).update(values)
            part._buffers.clear()
            part._buffers.update(named)
        with torch.no_grad():
            for buffer, value, version in buffers:
                if buffer._version != version:
                    buffer.copy_(value)
