"""`loopctl evaluate`: loss and metrics of a run's model over data. And `--test`, which does so at the end of a run."""
from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from loopctl import Data, Parallel, evaluate
from loopctl.cli import data, losses, metrics
from loopctl.cli.arguments import DEFAULT_BATCH_SIZE
from loopctl.cli.saved_run import load_run
from loopctl.composition.compose import SPECS
from loopctl.composition.discovery import build_plugin
from loopctl.data.batch import length_or_none
from loopctl.distributed.process_group import rank
from loopctl.errors import UsageError, one_line
from loopctl.prepare import find_device
from loopctl.rng import rng_state, set_rng_state

# A plugin that implements one of these hooks changes how the loss of a batch is computed or weighed.
FORWARD_HOOKS = ("compute_loss", "batch_weight")



def evaluate_run(folder: Path, weights: str | None, settings: dict[str, Any], as_json: bool) -> str:
    """Evaluate the model of the run in `folder`, and return the text to print: what was evaluated, and the metrics.

    settings: options of the command that take the place of those of the run, None where they do not
    """
    run = load_run(folder, weights)
    config = run.config | {key: value for key, value in settings.items() if value is not None}
    device = find_device(config.get("device", "auto"))
    dataset = data.make(config["data"], config["data_root"], bool(config.get("download")))
    check_alike(dataset, run.classes, run.shape)
    found = evaluate_with(config, device, dataset)(run.model)
    if rank():
        return ""
    if as_json:
        return json.dumps(found, indent=4)
    sizes = [length_or_none(getattr(part, "dataset", part)) for part in validation_parts(dataset).values()]
    samples = f" ({sum(map(int, sizes)):,} samples)" if all(size is not None for size in sizes) else ""     # type: ignore[arg-type]
    return f"{folder} ({run.weights.name}) on {config['data']}{samples}, {device}\n{described(found)}"


def evaluate_with(config: dict[str, Any], device: Any, dataset: Data) -> Callable[[nn.Module], dict[str, Any]]:
    """Return what evaluates a model on the validation part of `dataset` with the loss and metrics in `config`.

    Where there is no validation part it is the training part, in order. Raises UsageError where that cannot be done.
    """
    loss_fn = losses.make(config["loss"]) if config.get("loss") is not None else None
    forward = losses.make_forward(config["forward"]) if config.get("forward") is not None else None
    plugins = [build_plugin(spec)[1] for spec in config.get("plugin", ())]
    plugins = [plugin for plugin in plugins if not isinstance(plugin, Parallel)
               and any(implements(plugin, hook) for hook in FORWARD_HOOKS)]
    parts = validation_parts(dataset)
    measured = Data(next(iter(parts.values())), parts, classes=dataset.classes, shape=dataset.shape,
                    name=dataset.name, numbers=dataset.numbers, valid_batch_size=dataset.valid_batch_size,
                    batch_transform=dataset.batch_transform)
    of_classes = isinstance(loss_fn, nn.CrossEntropyLoss)
    _, loaders = measured.loaders(config.get("batch_size") or DEFAULT_BATCH_SIZE, config.get("workers", 0), device,
                                  of_classes)
    loaders = loaders.get("", loaders)                  # a single one has no name
    functions = metrics.make(config.get("metric", ()), dataset.classes)

    return partial(evaluate, data=loaders, loss_fn=loss_fn, metrics=functions, forward=forward, plugins=plugins,
                   device=device)


def check_alike(dataset: Data, classes: tuple[str, ...], shape: tuple[int, ...] | None) -> None:
    """Raise UsageError where data to evaluate has other classes, or inputs of another shape, than the training data."""
    if classes and dataset.class_names and classes != dataset.class_names:
        raise UsageError(f"data {dataset.name} has the classes {', '.join(dataset.class_names)}, and the run "
                         f"{', '.join(classes)}; evaluate data of the run's classes")
    if shape and dataset.shape and shape != dataset.shape:
        raise UsageError(f"data {dataset.name} has inputs of shape {dataset.shape}, and the run was trained on "
                         f"{shape}; choose options of the data that give the same")


def validation_parts(dataset: Data) -> dict[str, Any]:
    """The data to evaluate by name: the validation sets, or the training data where there is none."""
    return dataset.validation_sets or {"": dataset.train}


def implements(plugin: Any, hook: str) -> bool:
    """Whether a plugin implements a hook; its options may have switched it off."""
    return hook in SPECS and getattr(plugin, hook, None) is not None


def test_set(
    settings: dict[str, Any], resolved: dict[str, Any], device: Any, trained: Data,
) -> Callable[[nn.Module], dict[str, Any]] | None:
    """What evaluates a model on the data of --test; None without it. It draws no random numbers that the run would.

    trained: the data of the run. Raises UsageError where the two do not fit together.
    """
    if settings["test"] is None:
        return None
    before = rng_state()
    try:
        dataset = data.make(settings["test"], settings["data_root"], settings["download"])
        check_alike(dataset, trained.class_names, trained.shape)
        return evaluate_with(resolved, device, dataset)
    except UsageError as error:
        raise UsageError(f"--test: {error}") from error
    finally:
        set_rng_state(before)


def described(found: dict[str, Any]) -> str:
    """Metrics in a line."""
    return "  ".join(f"{one_line(name)} {value:.6g}" for name, value in found.items())
