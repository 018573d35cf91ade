"""Try steps on a copy of a run, and leave the run as it is."""
from __future__ import annotations

import copy
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from loopctl.checkpoint.state import training_plugins
from loopctl.composition.compose import compose
from loopctl.data.batch import batches_to_device
from loopctl.distributed.data_parallel import Parallel
from loopctl.distributed.process_group import all_reduce_mean
from loopctl.errors import UsageError, one_line
from loopctl.loop import DEFAULTS, run_step
from loopctl.metrics.meters import Meters
from loopctl.optim.learning_rate import set_learning_rates
from loopctl.rng import rng_state, set_rng_state
from loopctl.run import Run


@contextmanager
def trial_run(run: Run) -> Iterator[TrialRun]:
    """Give a copy of `run` to try steps on. Afterwards random numbers are where they were, also after an exception.

    Model, optimizer, loss function and data loader are copies, and so are the plugins that have a say in training;
    those that look on are left out. Nothing of the run itself is touched, so that there is nothing to put back. The
    copies take as much memory again.

    Raises UsageError where something of the run cannot be copied.
    """
    if isinstance(run.train, Iterator):
        raise UsageError("train can be read only once, so nothing can be tried before; pass a list or a DataLoader")
    random = rng_state(run.train)
    try:
        with closing(TrialRun(run)) as copy:
            yield copy
    finally:
        set_rng_state(random, run.train)


class TrialRun:
    """A copy of a run that stays where it is: each of its steps is what the run's next one would be."""

    def __init__(self, run: Run) -> None:
        self.twin = twin = replace(run, counters=replace(run.counters))
        # What a plugin holds on to becomes the copy's, whoever holds it. Data is only read, and stays one.
        memo: dict[int, Any] = {id(run): twin}
        for loader in (run.train, run.valid):
            memo |= shared_objects(loader)
        plugins = {name: run.hook.plugins[name] for name in training_plugins(run)}
        try:
            twin.model, twin.loss_fn, twin.train, twin.valid = copy.deepcopy(
                (run.model, run.loss_fn, run.train, run.valid), memo)
            twin.optimizer = copy_optimizer(run.optimizer, memo)
            plugins = copy.deepcopy(plugins, memo)
        except Exception as error:                  # whatever somebody's class raises that was not made to be copied
            raise UsageError("the run cannot be copied to try steps on "
                             f"({type(error).__name__}: {one_line(error)})") from error
        twin.hook = compose(plugins.values(), DEFAULTS)
        twin.parallel = next((plugin for plugin in plugins.values() if isinstance(plugin, Parallel)), None)
        twin.hook.acting["lr_scale"] = []           # the rates are the caller's
        twin.network = twin.model
        twin.hook.wrap_model(run=twin)
        twin.meters, twin.metrics, twin.history, twin.loaders = Meters({}, ""), dict(run.metrics), [], {}
        twin.model.train()
        twin.hook.epoch_start(run=twin)
        self.groups = self.endless()

    def endless(self) -> Generator[list[Any]]:
        """The micro-batches of one step after another, from the data's beginning as often as it takes."""
        twin, found = self.twin, True
        while found:
            found = False
            for group in twin.hook.group_batches(run=twin, batches=batches_to_device(twin.train, twin.device)):
                found = True
                yield group
        raise UsageError("train gave no batches")

    def close(self) -> None:
        """End the loader's workers now; in the middle of an import, when Python might come to it, they do not hear."""
        self.groups.close()

    def step(self, rates: list[float]) -> torch.Tensor:
        """Train the copy for one step with these learning rates, one per parameter group. Returns the step's loss."""
        twin = self.twin
        set_learning_rates(twin.optimizer, rates)
        with twin.counters.temporarily():
            run_step(twin, next(self.groups))
        twin.meters = Meters({}, "")
        if twin.loss is None:
            raise UsageError("a plugin replaces optimizer_step and computes no loss, so there is nothing to judge by")
        return all_reduce_mean(twin, twin.loss)


def shared_objects(loader: Any) -> dict[int, Any]:
    """What a copy of `loader` shares with it, for `copy.deepcopy`: the data; of a DataLoader no workers that run."""
    if isinstance(loader, DataLoader):
        return {id(loader.dataset): loader.dataset, id(loader._iterator): None}
    return {id(loader): loader}


def copy_optimizer(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """A copy of all that is in `optimizer`; `copy.deepcopy` forgets what LBFGS keeps.

    What somebody put around a method, as torch's schedulers do, belongs to the original and is left out.
    """
    mine = {name: value for name, value in vars(optimizer).items()
            if not (callable(value) and hasattr(type(optimizer), name))}
    twin = object.__new__(type(optimizer))
    memo[id(optimizer)] = twin
    vars(twin).update(copy.deepcopy(mine, memo))
    return twin
