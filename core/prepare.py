"""Between `fit(...)` and the first step: check what was asked for, choose the device, build the optimizer."""
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
    **asked: Any,
) -> Run:
    """Return a run that is ready to train: composed and checked, seeded, on its device, with its optimizer.

    defaults: what implements the hooks that no plugin replaces. asked: fields of `Run`. The rest is as for `fit`.
    Raises UsageError.
    """
    run = Run(**asked)
    run.hook = compose(plugins, defaults)
    with blame_plugin(run.hook):
        prepare(run, metrics or {}, device, seed)
    return run


def prepare(run: Run, metrics: dict[str, Any], device: Any, seed: int | None) -> None:
    """Check `run`, seed, place the model, let plugins change it, and build the optimizer. Raises UsageError."""
    check(run)
    if seed is not None:
        seed_everything(seed)
    run.device = find_device(device, run.model)
    run.model.to(run.device)
    place_metrics(run, metrics)

    launched = launched_processes()
    if launched > 1 and not any(isinstance(plugin, Parallel) for plugin in run.hook.plugins.values()):
        raise UsageError(f"torchrun has started {launched} processes, and no plugin has them train together; add ddp")
    run.hook.setup(run=run)
    run.optimizer = make_optimizer(run)
    run.network = run.model
    run.hook.wrap_model(run=run)


def check(run: Run) -> None:
    """Refuse numbers and data that no run can have."""
    if not isinstance(run.model, nn.Module):
        raise UsageError(f"model is a {type(run.model).__name__}, not a torch.nn.Module")
    for name, least in (("epochs", 1), ("max_steps", 1), ("eval_every", 1), ("steps_per_epoch", 1)):
        value = getattr(run, name)
        if value not in (None, inf) and (not isinstance(value, int) or value < least):
            raise UsageError(f"{name} is {value!r}; it is a whole number from {least}")
    for name, data in (("train", run.train), ("valid", run.valid)):
        if data is not None and length_or_none(data) == 0:
            raise UsageError(f"{name} has no batches")
        if data is not None and not hasattr(data, "__iter__"):
            raise UsageError(f"{name} is a {type(data).__name__}, not an iterable of batches")
    if length_or_none(run.train) is None and run.steps_per_epoch is None:
        raise UsageError("train has no length, so where an epoch ends is unknown; pass steps_per_epoch=...")


def find_device(device: Any, model: nn.Module | None = None) -> torch.device:
    """The device to run on. None is where `model` is; "auto" is cuda, then mps, then cpu. Of several
    processes each has a cuda of its own. Raises UsageError."""
    if device is None:
        tensors = [*model.parameters(), *model.buffers()] if model else []
        return tensors[0].device if tensors else torch.device("cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if str(device) == "cuda" and launched_processes() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"      # of each process its own
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # torch's, of old names, which are refused below
            found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is unknown; there are auto, cpu, mps, cuda and cuda:1") from None
    if found.type == "cpu" and found.index:
        raise UsageError(f"device {str(found)!r} is not here: there is one cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        has = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise UsageError(f"device {str(found)!r} is not here: this machine has {has}; 'auto' takes what there is")
    if found.type not in ("cpu", "cuda", "mps"):
        try:
            torch.zeros(1, device=found).item()
        except Exception as error:
            raise UsageError(f"device {str(found)!r} cannot be used ({type(error).__name__}: {one_line(error)}); "
                             "'auto' takes what there is") from error
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' is not here; device 'auto' takes what there is")
    return found


def place_metrics(run: Run, metrics: dict[str, Any]) -> None:
    """Give training and evaluation metrics of their own, and name in `run.metrics` what the run will report."""
    for name, function in metrics.items():
        if not callable(function):
            raise UsageError(f"metric {name!r} is a {type(function).__name__}, not a function of (output, target)")
    for when, data in (("train", run.train), ("val", run.valid)):
        run.metric_fns[when] = {name: deepcopy(function).to(run.device) if is_stateful_metric(function) else function
                                for name, function in metrics.items()}
        if data is not None:
            run.metrics |= {f"{when}_{name}": nan for name in ("loss", *metrics)}


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """The user's optimizer, or what the user's factory makes of the parameter groups; each has its `initial_lr`."""
    if isinstance(run.optimizer, torch.optim.Optimizer):
        if who := run.hook.acting["param_groups"]:
            raise UsageError(f"{who[0]} decides the parameter groups, so pass a factory that takes them, such as "
                             "partial(torch.optim.SGD, lr=0.1), in place of an optimizer that has its own")
        optimizer = run.optimizer
    else:
        groups = run.hook.param_groups(run=run)
        if not any(group["params"] for group in groups):
            raise UsageError("nothing is left to train: the model has no parameter with requires_grad")
        with without_dynamo_wrappers():
            optimizer = run.optimizer(groups)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UsageError(f"optimizer made a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    return optimizer
