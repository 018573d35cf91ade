"""What checks of a plugin put into a run beside it: data that fails, and plugins that watch, note or end the run."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
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
from loopctl.rng import host_rng_state
from loopctl.run import Run
from loopctl.testing.comparison import first_difference

# The hooks in which data is read or the model called, which may draw random numbers: not the plugin's doing.
BUSY = ("train", "group_batches", "optimizer_step", "micro_step", "compute_loss", "backward", "evaluate")


class PlantedError(Exception):
    """An error that a check has raised on purpose."""


class Killed(Exception):
    """The run was ended where a check wanted it."""


class Tripwire:
    """Raises an error when it is touched for the `at`-th time."""

    def __init__(self, at: int) -> None:
        self.left, self.sprung = at, False

    def touch(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.sprung = True
            raise PlantedError("planted by a check")

    def around(self, function: Callable[..., Any], model: nn.Module, training: bool) -> Callable[..., Any]:
        """`function` that touches it first, while `model` trains or while it does not."""
        def touching(*arguments: Any) -> Any:
            if model.training == training:
                self.touch()
            return function(*arguments)
        return touching


class FailingLoader:
    """A loader that touches a tripwire before each batch."""

    def __init__(self, batches: Any, wire: Tripwire) -> None:
        self.batches, self.wire = batches, wire

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.wire.touch()
            yield batch


class TrainingModeProbe:
    """A plugin, the first, that notes which parts the loop has put in training mode."""

    def __init__(self) -> None:
        self.training: set[nn.Module] = set()

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.training = {module for module in run.model.modules() if module.training}

    def left(self, model: nn.Module) -> list[str]:
        """The names of parts that are no longer in training mode, but for those that are frozen whole."""
        resting = [part for part in model.modules() if (parameters := [*part.parameters()])
                   and not any(parameter.requires_grad for parameter in parameters)]
        frozen = {inner for part in resting for inner in part.modules()}
        return [name for name, module in model.named_modules()
                if module in self.training and not module.training and module not in frozen]


def changed_generators(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Whose random numbers have moved, if any."""
    return names(kinds) if (kinds := [kind for kind in before if before[kind] != after[kind]]) else ""


class OuterRandomProbe:
    """A plugin, the first, whose wrappers are around everybody's; notes in `drawn` who draws random numbers."""

    def __init__(self, frames: list[list[Any]], drawn: list[str]) -> None:
        self.frames, self.drawn = frames, drawn

    def around(self, hook: str) -> Iterator[None]:
        self.frames.append([host_rng_state()])
        result = yield
        before, inside = self.frames.pop()
        if kind := changed_generators(before if hook not in BUSY else inside, host_rng_state()):
            self.drawn.append(f"{hook} draws random numbers of {kind}")
        return result


class InnerRandomProbe(OuterRandomProbe):
    """A plugin, the last, whose wrappers are within everybody's: what is between the two is the wrapper of another."""

    def around(self, hook: str) -> Iterator[None]:
        if kind := changed_generators(self.frames[-1][0], host_rng_state()):
            self.drawn.append(f"{hook} draws random numbers of {kind}")
        result = yield
        self.frames[-1].append(host_rng_state())
        return result


def watch_hook(hook: str) -> Any:
    def around(self: OuterRandomProbe) -> Iterator[None]:
        return (yield from self.around(hook))
    return hookimpl(wrapper=True)(around)


for hook in SPECS:
    setattr(OuterRandomProbe, hook, watch_hook(hook))


class SaveAndKill:
    """A plugin that saves the run at the `at`-th safe point and kills it; without, it counts them."""

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
    """A plugin, the first, that compares what `plugin` was given back with what was saved, before it is used."""

    def __init__(self, plugin: Any, state: Any) -> None:
        self.plugin, self.state, self.lost = plugin, state, ""
        self.looked = False

    @hookimpl
    def epoch_start(self) -> None:
        if not self.looked:
            self.lost, self.looked = first_difference(self.state, state_copy(self.plugin)), True


def state_copy(plugin: Any) -> Any:
    """A copy of the state of a plugin; None where it keeps none."""
    return deepcopy(plugin.state_dict()) if hasattr(plugin, "state_dict") else None


class StopEarly:
    """A plugin that ends a run before its first evaluation, which may wait."""

    @hookimpl
    def setup(self, run: Run) -> None:
        self.run = run

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.seen_in_epoch >= 16:
            raise Killed


class StepTimer:
    """A plugin that notes the time after each step."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []

    @hookimpl
    def safe_point(self, run: Run) -> None:
        self.times.append((perf_counter(), run.seen))

    def median(self) -> float:
        """Seconds per batch, in the median of the steps."""
        steps = [(time - before, seen - was) for (before, was), (time, seen) in pairwise(self.times)]
        return median(seconds / batches for seconds, batches in steps if batches)       # none at an epoch's end
