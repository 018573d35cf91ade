"""A PyTorch training loop made of plugins: the loop says when, plugins say what."""
from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from loopctl.composition.discovery import available, load
from loopctl.errors import UsageError
from loopctl.hooks import hookimpl

if TYPE_CHECKING:
    from loopctl.checkpoint.weights_file import load_weights
    from loopctl.cli.saved_run import load_run
    from loopctl.composition.explain import explain
    from loopctl.data.dataset import Data
    from loopctl.distributed.data_parallel import Parallel
    from loopctl.evaluation import evaluate
    from loopctl.global_settings import torch_settings
    from loopctl.loop import fit
    from loopctl.metrics.monitor import Monitor
    from loopctl.optim.duration import Duration
    from loopctl.run import Run
    from loopctl.tuning.search import tune

__all__ = ["Data", "Duration", "Monitor", "Parallel", "Run", "UsageError", "__version__", "available", "evaluate",
           "explain", "fit", "hookimpl", "load", "load_run", "load_weights", "torch_settings", "tune"]

# Imported when first used, for most of it imports torch, and `loopctl --help` is to answer at once.
LAZY = {
    "Data": "data.dataset", "Duration": "optim.duration", "Monitor": "metrics.monitor",
    "Parallel": "distributed.data_parallel", "Run": "run", "evaluate": "evaluation",
    "explain": "composition.explain", "fit": "loop",
    "load_run": "cli.saved_run", "load_weights": "checkpoint.weights_file", "torch_settings": "global_settings",
    "tune": "tuning.search",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("loopctl")
    if name in LAZY:
        return getattr(import_module(f"loopctl.{LAZY[name]}"), name)
    raise AttributeError(f"module 'loopctl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
