"""Try steps on a copy of a run, and leave the run as it is."""
from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from loopctl.batches import moved
from loopctl.checkpoint import composition
from loopctl.compose import compose
from loopctl.errors import UsageError, one_line
from loopctl.loop import step
from loopctl.meters import Meters
from loopctl.randomness import random_state, set_random_state
from loopctl.rates import put_rates
from loopctl.run import Run
from loopctl.world import mean


@contextmanager
def rehearsal(run: Run) -> Iterator[Rehearsal]:
    """Give a copy of `run` to try steps on. Afterwards random numbers are where they were, also after an exception.

    Model, optimizer, loss function and data loader are copies, and so are the plugins that have a say in training;
    those that look on are left out. Nothing of the run itself is touched, so that there is nothing to put back. The
    copies take as much memory again.

    Raises UsageError where something of the run cannot be copied.
    """
    if isinstance(run.train, Iterator):
        raise UsageError("train can be read only once, so nothing can be tried before; pass a list or a DataLoader")
    random = random_state(run.train)
    try:
        with closing(Rehearsal(run)) as copy:
            yield copy
    finally:
        set_random_state(random, run.train)


class Rehearsal:
    """A copy of a run that stays where it is: each of its steps is what the run's next one would be."""

    def __init__(self, run: Run) -> None:
        self.twin = twin = replace(run)
        # What a plugin holds on to becomes the copy's, whoever holds it. Data is only read, and stays one.
        memo: dict[int, Any] = {id(run): twin}
        for loader in (run.train, run.valid):
            memo |= kept(loader)
        plugins = {name: run.hook.plugins[name] for name in composition(run)}
        try:
            twin.model, twin.loss_fn, twin.train, twin.valid = copy.deepcopy(
                (run.model, run.loss_fn, run.train, run.valid), memo)
            twin.optimizer = copied(run.optimizer, memo)
            plugins = copy.deepcopy(plugins, memo)
        except Exception as error:                  # whatever somebody's class raises that was not made to be copied
            raise UsageError("the run cannot be copied to try steps on "
                             f"({type(error).__name__}: {one_line(error)})") from error
        twin.hook = compose(plugins.values())
        twin.hook.acting["lr_scale"] = []           # the rates are the caller's
        twin.network = twin.model
        twin.hook.wrap_model(run=twin)
        twin.meters, twin.metrics, twin.history, twin.feeds = Meters({}, ""), dict(run.metrics), [], {}
        twin.model.train()
        twin.hook.epoch_start(run=twin)
        self.groups = self.endless()

    def endless(self) -> Generator[list[Any]]:
        """The micro-batches of one step after another, from the data's beginning as often as it takes."""
        twin, found = self.twin, True
        while found:
            found = False
            for group in twin.hook.group_batches(run=twin, batches=moved(twin.train, twin.device)):
                found = True
                yield group
        raise UsageError("train gave no batches")

    def close(self) -> None:
        """End the loader's workers now; in the middle of an import, when Python might come to it, they do not hear."""
        self.groups.close()

    def step(self, rates: list[float]) -> torch.Tensor:
        """Train the copy for one step with these learning rates, one per parameter group. Returns the step's loss."""
        twin = self.twin
        here = twin.step, twin.attempts, twin.seen
        put_rates(twin.optimizer, rates)
        step(twin, next(self.groups))
        twin.step, twin.attempts, twin.seen = here
        twin.meters = Meters({}, "")
        if twin.loss is None:
            raise UsageError("a plugin replaces optimizer_step and computes no loss, so there is nothing to judge by")
        return mean(twin, twin.loss)


def kept(loader: Any) -> dict[int, Any]:
    """What a copy of `loader` shares with it, for `copy.deepcopy`: the data; of a DataLoader no workers that run."""
    if isinstance(loader, DataLoader):
        return {id(loader.dataset): loader.dataset, id(loader._iterator): None}
    return {id(loader): loader}


def copied(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """A copy of all that is in `optimizer`; `copy.deepcopy` forgets what LBFGS keeps.

    What somebody put around a method, as torch's schedulers do, belongs to the original and is left out.
    """
    mine = {name: value for name, value in vars(optimizer).items()
            if not (callable(value) and hasattr(type(optimizer), name))}
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    vars(twin).update(copy.deepcopy(mine, memo))
    return twin
