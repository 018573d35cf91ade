"""Helpers of the checks: loss functions and loaders that raise, and plugins that record or end a run."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import wraps
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from torch import nn

from loopctl.checkpoint.atomic_files import save_checkpoint
from loopctl.checkpoint.state import capture_state, check_serializable
from loopctl.composition.compose import SPECS
from loopctl.errors import names
from loopctl.hooks import hookimpl
from loopctl.model.own_names import own_modules
from loopctl.rng import host_rng_state
from loopctl.run import Run
from loopctl.testing.comparison import first_difference

# At these hooks data is read or the model is called, which may draw random numbers without the plugin's doing.
BUSY = ("train", "group_batches", "optimizer_step", "micro_step", "compute_loss", "backward", "evaluate")


class PlantedError(Exception):
    """An error that a check raises on purpose."""


class Killed(Exception):
    """Raised to end a run at the point that a check has chosen."""


class Tripwire:
    """Raises PlantedError at the `at`-th call of `touch`; `raised` tells whether it has."""

    def __init__(self, at: int) -> None:
        self.remaining, self.raised = at, False

    def touch(self) -> None:
        self.remaining -= 1
        if self.remaining == 0:
            self.raised = True
            raise PlantedError("planted by a check")

    def guard(self, function: Callable[..., Any], model: nn.Module, training: bool) -> Callable[..., Any]:
        """Return `function`, which first calls `touch` if `model.training` equals `training`. A module stays itself."""
        def touch_if_due(*_: Any) -> None:
            if model.training == training:
                self.touch()

        @wraps(function)
        def guarded(*arguments: Any, **options: Any) -> Any:
            touch_if_due()
            return function(*arguments, **options)

        if isinstance(function, nn.Module):         # a plugin may look at its attributes, such as `reduction`
            function.register_forward_pre_hook(touch_if_due)
            return function
        return guarded


class FailingLoader:
    """A loader that calls `touch` of a tripwire before each batch."""

    def __init__(self, batches: Any, wire: Tripwire) -> None:
        self.batches, self.wire = batches, wire

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.wire.touch()
            yield batch


class TrainingModeProbe:
    """Records which modules are in training mode when an epoch starts. Add it first, before plugins change the mode."""

    def __init__(self) -> None:
        self.training: set[nn.Module] = set()

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.training = {module for module in run.model.modules() if module.training}

    def in_eval(self, model: nn.Module) -> list[str]:
        """Return the names of the modules that are no longer in training mode, except those that are wholly frozen."""
        without_grad = [module for module in model.modules() if (parameters := [*module.parameters()])
                        and not any(parameter.requires_grad for parameter in parameters)]
        frozen = {inner for module in without_grad for inner in module.modules()}
        return [name for name, module in own_modules(model)
                if module in self.training and not module.training and module not in frozen]


def changed_generators(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Return the names of the generators whose state has changed; empty if none has."""
    return names(kinds) if (kinds := [kind for kind in before if before[kind] != after[kind]]) else ""


class OuterRandomProbe:
    """Records in `drawn` at which hooks random numbers are drawn. Add it first, so that its wrappers are the outermost.

    At a hook in BUSY it records only what other wrappers draw after their `yield`.
    """

    def __init__(self, frames: list[list[Any]], drawn: list[str]) -> None:
        self.frames, self.drawn = frames, drawn

    def compare(self, hook: str) -> Iterator[None]:
        self.frames.append([host_rng_state()])
        result = yield
        before, inside = self.frames.pop()
        if kind := changed_generators(before if hook not in BUSY else inside, host_rng_state()):
            self.drawn.append(f"{hook} draws random numbers from {kind}")
        return result


class InnerRandomProbe(OuterRandomProbe):
    """Records what other wrappers draw before their `yield`. Add it last, so that its wrappers are the innermost."""

    def compare(self, hook: str) -> Iterator[None]:
        if kind := changed_generators(self.frames[-1][0], host_rng_state()):
            self.drawn.append(f"{hook} draws random numbers from {kind}")
        result = yield
        self.frames[-1].append(host_rng_state())
        return result


def probe_hook(hook: str) -> Any:
    """Return a wrapper hook that calls `compare` of the probe."""
    def wrapper(self: OuterRandomProbe) -> Iterator[None]:
        return (yield from self.compare(hook))
    return hookimpl(wrapper=True)(wrapper)


for hook in SPECS:
    setattr(OuterRandomProbe, hook, probe_hook(hook))


class SaveAndKill:
    """Saves a checkpoint at the `at`-th safe point and raises Killed; with `at=0` it only counts the safe points."""

    def __init__(self, at: int, plugin: Any = None, file: Path = Path()) -> None:
        self.at, self.plugin, self.file, self.passed = at, plugin, file, 0

    @hookimpl
    def safe_point(self, run: Run) -> None:
        self.passed += 1
        if self.passed == self.at:
            check_serializable(run)
            save_checkpoint(capture_state(run), self.file)
            self.state, self.step = state_copy(self.plugin), run.attempts
            raise Killed


class RestoredStateProbe:
    """Compares the restored state of `plugin` with the saved one before training resumes. Add it first."""

    def __init__(self, plugin: Any, state: Any) -> None:
        self.plugin, self.state, self.difference = plugin, state, ""
        self.compared = False

    @hookimpl
    def epoch_start(self) -> None:
        if not self.compared:
            self.difference, self.compared = first_difference(self.state, state_copy(self.plugin)), True


def state_copy(plugin: Any) -> Any:
    """Return a copy of the state dict of a plugin; None if it has none."""
    return deepcopy(plugin.state_dict()) if hasattr(plugin, "state_dict") else None


class StopEarly:
    """Ends a run after a few steps, before the first evaluation, in which the host may wait for the device."""

    @hookimpl
    def setup(self, run: Run) -> None:
        self.run = run

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.seen_in_epoch >= 16:
            raise Killed


class StepTimer:
    """Records the time after each step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []

    @hookimpl
    def safe_point(self, run: Run) -> None:
        self.times.append((perf_counter(), run.seen))

    def median(self) -> float:
        """Return the median over the steps of the seconds per batch."""
        steps = [(after - before, seen - seen_before) for (before, seen_before), (after, seen) in pairwise(self.times)]
        # The second safe point of an epoch's end follows no batch.
        return median(seconds / batches for seconds, batches in steps if batches)
