"""From the settings of the command line to the arguments of `fit`."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopctl import Data, Parallel
from loopctl.checkpoint.finding import checkpoints_in, find_candidates
from loopctl.cli import data, deterministic, launch, losses, metrics, models, optimizers, pretrained
from loopctl.cli.specs import DEFAULT_PLUGINS
from loopctl.composition.compose import compose
from loopctl.composition.discovery import build_plugin, split_spec
from loopctl.composition.options import to_spec
from loopctl.data.batch import length_or_none
from loopctl.distributed.process_group import launched_processes
from loopctl.errors import UsageError
from loopctl.plugins.checkpoint import Checkpoint
from loopctl.plugins.max_time import MaxTime
from loopctl.prepare import find_device
from loopctl.rng import seed_everything

DEFAULT_BATCH_SIZE = 64


def build_arguments(
    settings: dict[str, Any], resume: Path | None = None, trains: bool = True,
) -> tuple[dict[str, Any], dict[str, Any], Data]:
    """Build what the settings name. Return the arguments of `fit`, the settings with all defaults filled in, the data.

    resume: the folder of a run; if it has a checkpoint, the files of weights to begin with are not read again
    trains: false where nothing will be trained, so that a loss may be missing
    """
    chosen_torch_settings(settings)           # raises where they contradict each other
    specs, plugins = build_plugins(settings)
    begins = not has_checkpoint(resume, plugins)
    device = find_device(device_name(settings))
    factory, lr = optimizers.make(settings["optimizer"], settings["lr"], device.type)
    deterministic.switch_on(settings["deterministic"])
    seed_everything(settings["seed"])
    dataset = data.make(settings["data"], settings["data_root"], settings["download"])
    replaced = "compute_loss" in compose(plugins).replaced
    if not trains and dataset.classes is None and settings["loss"] is None and settings["forward"] is None:
        settings = settings | {"loss": "mse"}
    task = task_of(settings, dataset, replaced)
    loss_fn = losses.make(task["loss"]) if task["loss"] is not None else None
    forward = losses.make_forward(task["forward"]) if task["forward"] is not None else None
    of_classes = isinstance(loss_fn, nn.CrossEntropyLoss)
    model = models.make(settings["model"], dataset, of_classes, begins)
    init = settings["init"]
    if begins and init is not None:
        init = pretrained.load_init(model, init)
    batch_size = used_batch_size(settings["batch_size"], dataset)
    train, valid = dataset.loaders(batch_size or DEFAULT_BATCH_SIZE, settings["workers"], device,
                                   of_classes and not replaced)
    train, valid = data.limit(settings, train, valid)
    if length_or_none(train) is None and settings["steps_per_epoch"] is None:
        raise UsageError(f"data {dataset.name} has no length, so the end of an epoch is unknown; pass "
                         "--steps-per-epoch N")
    arguments = {
        "model": model, "loss_fn": loss_fn, "optimizer": factory, "train": train, "valid": valid, "forward": forward,
        "epochs": settings["epochs"], "max_steps": settings["max_steps"], "eval_every": settings["eval_every"],
        "eval_first": settings["eval_first"], "steps_per_epoch": settings["steps_per_epoch"], "reduction": None,
        "plugins": plugins,
        "monitor": settings["monitor"] or "", "metrics": metrics.make(task["metric"], dataset.classes),
        "device": device, "seed": settings["seed"]}
    full_specs = [to_spec(split_spec(text)[0], plugin) for text, plugin in zip(specs, plugins, strict=False)]
    several = launched_processes() > 1 or settings["devices"]               # then each process has a device of its own
    resolved = {"lr": lr, "init": init, "device": device.type if several else str(device), "plugin": full_specs,
                "batch_size": batch_size}
    return arguments, settings | task | resolved, dataset


def has_checkpoint(folder: Path | None, plugins: list[Any]) -> bool:
    """Whether a run with these plugins has written a checkpoint to its folder; False without a folder."""
    dirs = [plugin.dir for plugin in plugins if isinstance(plugin, Checkpoint)]
    return folder is not None and bool(find_candidates(folder) or any(checkpoints_in(folder / name) for name in dirs))


def task_of(settings: dict[str, Any], dataset: Data, replaced: bool) -> dict[str, Any]:
    """Return the settings of loss and metrics with their defaults: cross entropy and accuracy where there are classes.

    replaced: whether a plugin computes the loss. Raises UsageError where nothing does, or two do.
    """
    loss, forward = settings["loss"], settings["forward"]
    if loss is not None and forward is not None:
        raise UsageError(f"--loss {loss} with --forward {forward}: the function computes the loss itself; leave out "
                         "one of the two")
    if loss is None and forward is None:
        if dataset.classes is not None:
            loss = "cross_entropy"
        elif not replaced:
            raise UsageError(f"data {dataset.name} has no `classes`, so its loss is not known; pass --loss mse or "
                             "another name for numbers, --loss cross_entropy for numbers of classes, --loss "
                             "file.py:function, --loss model where the model returns it, or --forward file.py:function")
    default = ["accuracy"] if dataset.classes is not None and forward is None else []
    return {"loss": loss, "forward": forward, "metric": list(settings["metric"]) or default}


def used_batch_size(given: Any, dataset: Data) -> int | None:
    """Return the batch size, as given or the default; None where the data makes its batches itself.

    Raises UsageError where one is given that would not be used.
    """
    if given == "auto":
        raise UsageError("--batch-size auto: `loopctl run` finds it before it trains; pass a number here")
    if dataset.needs_batch_size:
        return given or DEFAULT_BATCH_SIZE
    if given:
        raise UsageError(f"--batch-size {given}: data {dataset.name} makes its batches itself, so it would not be "
                         "used; leave it out")
    return None


def build_plugins(settings: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Return the specs and the instances of the run's plugins. Raises UsageError if they cannot be combined.

    The plugins of other options, such as --max-time, come last and have no spec.
    """
    launch.check_devices(settings["devices"], settings["device"])
    specs = list(settings["plugin"])
    given = {build_plugin(text)[0] for text in specs}
    specs += [name for name in DEFAULT_PLUGINS if name not in given and name not in settings["without"]]
    plugins = [build_plugin(text)[1] for text in specs]
    numbers = launch.device_numbers(settings["devices"])
    if len(numbers) > 1 and not any(isinstance(plugin, Parallel) for plugin in plugins):
        specs, plugins = ["ddp", *specs], [build_plugin("ddp")[1], *plugins]
    if limit := settings.get("max_time"):
        if not any(isinstance(plugin, Checkpoint) for plugin in plugins):
            raise UsageError(f"--max-time {limit} without the plugin checkpoint: nothing would be left of the run; "
                             "leave out --without checkpoint")
        plugins = [*plugins, MaxTime(limit)]
    compose(plugins)                          # refuses a wrong combination before the data is read
    return specs, plugins


def chosen_torch_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `torch_settings` that the settings name. A flag that was not given changes nothing.

    Raises UsageError where one contradicts --deterministic.
    """
    benchmark = settings["cudnn_benchmark"] or None
    if benchmark and settings["deterministic"]:
        raise UsageError("--cudnn-benchmark with --deterministic: cuDNN would choose its algorithms by their time, so "
                         "by chance; leave out one of the two")
    return {"matmul": settings["matmul"], "cudnn_benchmark": benchmark, "threads": settings["threads"]}


def device_name(settings: dict[str, Any]) -> str:
    """The device of this process: the one that --devices lists, if it lists one only, otherwise --device."""
    numbers, device = launch.device_numbers(settings["devices"]), settings["device"]
    if len(numbers) == 1 and torch.cuda.is_available() and device in ("auto", "cuda"):
        return f"cuda:{numbers[0]}"
    return device
