"""A complete training run that takes milliseconds, for tests of plugins."""
from __future__ import annotations

import atexit
import shutil
from functools import cache, partial
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor, nn

from loopctl.loop import fit
from loopctl.run import Run


def tiny_run(*plugins: Any, **fit_arguments: Any) -> Run:
    """Train a small model with `plugins` and return the run.

    The model has BatchNorm and Dropout, so that a wrong mode or an extra random number changes the result. There are
    five training batches, the last one shorter, and two for validation; SGD with momentum; two epochs; seed 0. Plugins
    write to `run.out`, a new folder that is deleted when Python exits.

    fit_arguments: arguments of `fit` that replace these.

    Raises what `fit` raises.
    """
    plugins = (*plugins, *fit_arguments.pop("plugins", ()))
    return fit(**default_arguments() | fit_arguments, plugins=plugins)


def default_arguments() -> dict[str, Any]:
    """Return the arguments of `fit` for a tiny run, newly created at each call."""
    return {
        "model": tiny_model(),
        "loss_fn": nn.CrossEntropyLoss(),
        "optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "train": tiny_batches(8, 8, 8, 8, 5),
        "valid": tiny_batches(8, 5, seed=1),
        "epochs": 2,
        "seed": 0,
        "out": mkdtemp(dir=scratch_folder()),
    }


def tiny_model() -> nn.Module:
    """Return a model of 6 inputs and 3 classes, always with the same weights; draw nothing from global generators."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def tiny_batches(*sizes: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return batches of `sizes` samples for `tiny_model`: inputs (size, 6) and classes (size,), the same each time."""
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 6, generator=random), torch.randint(0, 3, (size,), generator=random)) for size in sizes]


@cache
def scratch_folder() -> str:
    """Return the folder that holds the folders of this process's tiny runs."""
    folder = mkdtemp(prefix="loopctl-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
