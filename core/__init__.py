"""A training loop made of plugins: the loop says when, plugins say what."""
from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from loopctl.errors import UsageError
from loopctl.find import available, load
from loopctl.hooks import hookimpl

if TYPE_CHECKING:
    from loopctl.average import fill, swapped
    from loopctl.batches import grouped, mapped, moved, tensors, weighed
    from loopctl.explanation import explain
    from loopctl.lengths import Length
    from loopctl.loop import fit
    from loopctl.monitor import Monitor
    from loopctl.parallel import Parallel
    from loopctl.patterns import matching
    from loopctl.rates import claim_momentum, per_group, set_momentum
    from loopctl.run import Run

__all__ = ["Length", "Monitor", "Parallel", "Run", "UsageError", "available", "claim_momentum", "explain", "fill",
           "fit", "grouped", "hookimpl", "load", "mapped", "matching", "moved", "per_group", "set_momentum", "swapped",
           "tensors", "weighed"]

# What needs torch is imported when it is first used, so that `loopctl --help` answers at once.
LATER = {
    "average": ("fill", "swapped"),
    "batches": ("grouped", "mapped", "moved", "tensors", "weighed"),
    "explanation": ("explain",),
    "lengths": ("Length",),
    "loop": ("fit",),
    "monitor": ("Monitor",),
    "parallel": ("Parallel",),
    "patterns": ("matching",),
    "rates": ("claim_momentum", "per_group", "set_momentum"),
    "run": ("Run",),
}


def __getattr__(name: str) -> Any:
    for module, names in LATER.items():
        if name in names:
            return getattr(import_module(f"loopctl.{module}"), name)
    raise AttributeError(f"module 'loopctl' has no attribute {name!r}")
