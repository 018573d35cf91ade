"""A training loop made of plugins: the loop says when, plugins say what."""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loopctl.errors import UsageError
from loopctl.find import available, load
from loopctl.hooks import hookimpl

if TYPE_CHECKING:
    from loopctl.batches import grouped, tensors
    from loopctl.explanation import explain
    from loopctl.lengths import Length
    from loopctl.loop import fit
    from loopctl.monitor import Monitor
    from loopctl.run import Run

__all__ = ["Length", "Monitor", "Run", "UsageError", "available", "explain", "fit", "grouped", "hookimpl", "load",
           "tensors"]

# What needs torch is imported when it is first used, so that `loopctl --help` answers at once.
LATER = {"Length": "lengths", "Monitor": "monitor", "Run": "run", "explain": "explanation", "fit": "loop",
         "grouped": "batches", "tensors": "batches"}


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(import_module(f"loopctl.{LATER[name]}"), name)
    raise AttributeError(f"module 'loopctl' has no attribute {name!r}")
