"""Prepare a run for training: check the arguments of `fit`, choose the device, call `setup`, build the optimizer."""
from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from copy import deepcopy
from math import inf, nan
from typing import Any

import torch
from torch import nn

from loopctl.composition.compose import blame_plugin, compose
from loopctl.data.batch import length_or_none
from loopctl.distributed.data_parallel import Parallel
from loopctl.distributed.process_group import launched_processes
from loopctl.errors import UsageError, one_line
from loopctl.metrics.meters import is_stateful_metric
from loopctl.optim.fast_step import without_dynamo_wrappers
from loopctl.rng import seed_everything
from loopctl.run import Run


def build_run(
    defaults: Iterable[Any], plugins: Iterable[Any], metrics: dict[str, Any] | None, device: Any, seed: int | None,
    **fields: Any,
) -> Run:
    """Return a run that is ready to train: plugins composed and checked, seeded, on its device, with its optimizer.

    defaults: objects that implement the hooks that no plugin replaces. fields: fields of `Run`. The other arguments are
    those of `fit`. Raises UsageError.
    """
    run = Run(**fields)
    run.hook = compose(plugins, defaults)
    with blame_plugin(run.hook):
        prepare(run, metrics or {}, device, seed)
    return run


def prepare(run: Run, metrics: dict[str, Any], device: Any, seed: int | None) -> None:
    """Check and seed `run`, move the model, call `setup`, build the optimizer, call `wrap_model`. Raises UsageError."""
    check(run)
    if seed is not None:
        seed_everything(seed)
    run.device = find_device(device, run.model)
    run.model.to(run.device)
    place_metrics(run, metrics)

    launched = launched_processes()
    if launched > 1 and not any(isinstance(plugin, Parallel) for plugin in run.hook.plugins.values()):
        raise UsageError(f"torchrun has started {launched} processes, but no plugin makes them train together; add ddp "
                         "or fsdp")
    run.hook.setup(run=run)
    run.optimizer = make_optimizer(run)
    run.network = run.model
    run.hook.wrap_model(run=run)


def check(run: Run) -> None:
    """Raise UsageError if the model, the data or a number among the arguments is of the wrong type or out of range."""
    if not isinstance(run.model, nn.Module):
        raise UsageError(f"model is a {type(run.model).__name__}, not a torch.nn.Module")
    for name in ("epochs", "max_steps", "eval_every", "steps_per_epoch"):
        value = getattr(run, name)
        if value not in (None, inf) and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} is {value!r}; use a whole number of at least 1")
    for name, data in (("train", run.train), ("valid", run.valid)):
        if data is not None and length_or_none(data) == 0:
            raise UsageError(f"{name} has no batches")
        if data is not None and not hasattr(data, "__iter__"):
            raise UsageError(f"{name} is a {type(data).__name__}, not an iterable of batches")
    if length_or_none(run.train) is None and run.steps_per_epoch is None:
        raise UsageError("train has no length, so the end of an epoch is unknown; pass steps_per_epoch=...")


def find_device(device: Any, model: nn.Module | None = None) -> torch.device:
    """Return the device to train on. None means the device of `model`; "auto" means cuda, then mps, then cpu.

    With several processes, "cuda" is the GPU of this process's local rank. Raises UsageError if the device is unknown
    or this machine does not have it.
    """
    if device is None:
        tensors = [*model.parameters(), *model.buffers()] if model else []
        return tensors[0].device if tensors else torch.device("cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if str(device) == "cuda" and launched_processes() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # torch warns of outdated device names; refused below
            found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is unknown; use auto, cpu, mps, cuda or cuda:1") from None
    if found.type == "cpu" and found.index:
        raise UsageError(f"device {str(found)!r} does not exist; use 'cpu'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        has = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise UsageError(f"device {str(found)!r} does not exist: this machine has {has}; use another, or 'auto'")
    if found.type not in ("cpu", "cuda", "mps"):
        try:
            torch.zeros(1, device=found).item()
        except Exception as error:
            raise UsageError(f"device {str(found)!r} cannot be used ({type(error).__name__}: {one_line(error)}); "
                             "use another, or 'auto'") from error
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' does not exist on this machine; use another, or 'auto'")
    return found


def place_metrics(run: Run, metrics: dict[str, Any]) -> None:
    """Set `run.metric_fns`, with separate torchmetrics objects for training and evaluation, all on `run.device`.

    Each metric that the run will report is declared in `run.metrics` as NaN.
    """
    for name, function in metrics.items():
        if not callable(function):
            raise UsageError(f"metric {name!r} is a {type(function).__name__}, not a function of (output, target)")
    for part, data in (("train", run.train), ("val", run.valid)):
        run.metric_fns[part] = {name: deepcopy(function).to(run.device) if is_stateful_metric(function) else function
                                for name, function in metrics.items()}
        if data is not None:
            run.metrics |= {f"{part}_{name}": nan for name in ("loss", *metrics)}


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """Return the user's optimizer, or the one that the user's factory builds; set `initial_lr` in each group."""
    if isinstance(run.optimizer, torch.optim.Optimizer):
        if plugins := run.hook.acting["param_groups"]:
            raise UsageError(f"{plugins[0]} sets the parameter groups, but the optimizer has its own; pass a factory, "
                             "such as partial(torch.optim.SGD, lr=0.1), in place of the optimizer")
        optimizer = run.optimizer
    else:
        groups = run.hook.param_groups(run=run)
        if not any(group["params"] for group in groups):
            raise UsageError("no parameter of the model has requires_grad=True; leave at least one trainable")
        with without_dynamo_wrappers():
            optimizer = run.optimizer(groups)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(f"optimizer returned a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    return optimizer
