"""`--batch-size auto`: find the largest batch that fits in the device's memory, with steps of the run before it."""
from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from loopctl import fit, hookimpl
from loopctl.checkpoint.state import acts_in_training
from loopctl.cli.arguments import DEFAULT_BATCH_SIZE, build_arguments, build_plugins, device_name
from loopctl.data.batch import length_or_none
from loopctl.distributed.process_group import launched_processes
from loopctl.errors import UsageError
from loopctl.prepare import find_device
from loopctl.run import Run

DEVICES = ("cuda",)         # types of devices that report that their memory is full


def find_batch_size(settings: dict[str, Any]) -> int:
    """Return the largest batch size with which two steps and a batch of validation data fit on the device.

    It is the default one, doubled or halved as often as that is possible, or all samples. Each size is tried in a run
    of its own, with all plugins that can change what is trained. Raises UsageError where it cannot be found.
    """
    device = find_device(device_name(settings))
    if device.type not in DEVICES:
        raise UsageError(f"--batch-size auto needs a GPU, and this run is on {device}, where memory that is full ends "
                         "the process; pass a number")
    if launched_processes() > 1:
        raise UsageError("--batch-size auto with several processes: each could find another one; find it with one "
                         "process, and pass the number")
    if any(getattr(plugin, "into", None) == "auto" for plugin in build_plugins(settings)[1]):
        raise UsageError("--batch-size auto with split:into=auto: every batch fits where it may be split; pass a "
                         "number to one of the two")
    arguments, resolved, dataset = build_arguments(settings | {"batch_size": None})
    if resolved["batch_size"] is None:
        raise UsageError(f"--batch-size auto: data {dataset.name} makes its batches itself, so it would not be used; "
                         "leave it out")
    samples = length_or_none(dataset.train)
    del arguments, dataset
    found = largest_that_fits(lambda size: fits(settings, size), DEFAULT_BATCH_SIZE, samples)
    click.echo(f"--batch-size auto: {found}" + " (all samples)" * (found == samples))
    return found


def largest_that_fits(fits: Callable[[int], bool], start: int, most: int | None) -> int:
    """Return the largest of `start`, doubled or halved any number of times, that fits, or `most` if that fits."""
    def bounded(size: int) -> int:
        return size if most is None else min(size, most)

    size = bounded(start)
    if fits(size):
        while (larger := bounded(2 * size)) > size and fits(larger):
            size = larger
        return size
    while size > 1:
        size //= 2
        if fits(size):
            return size
    raise UsageError("--batch-size auto: not even one sample fits in the memory of the device; use a smaller model, or "
                     "the plugins amp, bf16 or activation_checkpointing")


def fits(settings: dict[str, Any], size: int) -> bool:
    """Whether two steps with batches of this size, and a batch of the validation data, fit in memory."""
    arguments = build_arguments(settings | {"batch_size": size, "limit_valid": "1", "overfit": None})[0]
    changing = [plugin for plugin in arguments["plugins"] if acts_in_training(plugin)]
    log, full = logging.getLogger("loopctl"), False
    level = log.level
    log.setLevel(logging.ERROR)             # what there is to say, the run itself says
    try:
        with TemporaryDirectory(prefix="loopctl-") as folder:
            fit(**arguments | {"plugins": [*changing, TwoSteps()]}, out=folder)
    except torch.OutOfMemoryError:
        full = True
    finally:
        log.setLevel(level)
    if full:                                # not in the except block, where the exception keeps the tensors in memory
        del arguments, changing
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return not full


@dataclass(eq=False)
class TwoSteps:
    """A plugin that ends the run after two steps: the second one has the state of the optimizer too."""

    observer_only = True

    @hookimpl
    def after_step(self, run: Run) -> None:
        if run.attempts == 2:
            run.stop = "two steps are enough to see whether they fit"
