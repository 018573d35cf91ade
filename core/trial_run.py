"""Try training steps on a copy of a run, for a learning-rate range test, without changing the run itself."""
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
    """Yield a copy of `run` to try steps on. The states of random number generators are restored at the end.

    Model, optimizer, loss function, data loaders and the plugins that affect training are copied; observers are left
    out. The run itself is not changed. The copies take as much memory again.

    Raises UsageError where a part of the run cannot be copied.
    """
    if isinstance(run.train, Iterator):
        raise UsageError("train can be read only once, so no steps can be tried on it; pass a list or a DataLoader")
    random = rng_state(run.train)
    try:
        with closing(TrialRun(run)) as trial:
            yield trial
    finally:
        set_rng_state(random, run.train)


class TrialRun:
    """A copy of a run, as `self.run`. Its parameters are trained by `step`, but its counters never advance."""

    def __init__(self, run: Run) -> None:
        self.run = trial = replace(run, counters=replace(run.counters))
        # One memo for all copies, so that references among model, optimizer and plugins lead to the copies.
        memo: dict[int, Any] = {id(run): trial}
        for loader in (run.train, run.valid):
            memo |= shared_objects(loader)
        plugins = {name: run.hook.plugins[name] for name in training_plugins(run)}
        try:
            trial.model, trial.loss_fn, trial.train, trial.valid = copy.deepcopy(
                (run.model, run.loss_fn, run.train, run.valid), memo)
            trial.optimizer = copy_optimizer(run.optimizer, memo)
            plugins = copy.deepcopy(plugins, memo)
        except Exception as error:                  # a class that was not made to be copied may raise anything
            raise UsageError("the run cannot be copied to try steps on "
                             f"({type(error).__name__}: {one_line(error)})") from error
        trial.hook = compose(plugins.values(), DEFAULTS)
        trial.parallel = next((plugin for plugin in plugins.values() if isinstance(plugin, Parallel)), None)
        trial.hook.acting["lr_scale"] = []          # `step` is given the learning rates
        trial.network = trial.model
        trial.hook.wrap_model(run=trial)
        trial.meters, trial.metrics, trial.history, trial.loaders = Meters({}, ""), dict(run.metrics), [], {}
        trial.model.train()
        trial.hook.epoch_start(run=trial)
        self.groups = self.repeated_groups()

    def repeated_groups(self) -> Generator[list[Any]]:
        """Yield the micro-batches of one step after another; the data is read again whenever it ends."""
        trial, found = self.run, True
        while found:
            found = False
            for group in trial.hook.group_batches(run=trial, batches=batches_to_device(trial.train, trial.device)):
                found = True
                yield group
        raise UsageError("train gave no batches")

    def close(self) -> None:
        """Close the iterator over the data, which ends the loader workers.

        Garbage collection might close it during an import, when the workers cannot be told to end.
        """
        self.groups.close()

    def step(self, rates: list[float]) -> torch.Tensor:
        """Train the copy for one step and return its loss. `rates`: one learning rate per parameter group."""
        trial = self.run
        set_learning_rates(trial.optimizer, rates)
        with trial.counters.temporarily():
            run_step(trial, next(self.groups))
        trial.meters = Meters({}, "")
        if trial.loss is None:
            raise UsageError("a plugin replaces optimizer_step and computes no loss; steps can be tried only with one "
                             "that calls closure()")
        return all_reduce_mean(trial, trial.loss)


def shared_objects(loader: Any) -> dict[int, Any]:
    """Return the `copy.deepcopy` memo for what a copy of `loader` shares with it, which is the data.

    The iterator of a DataLoader, with its running workers, is replaced by None.
    """
    if isinstance(loader, DataLoader):
        return {id(loader.dataset): loader.dataset, id(loader._iterator): None}
    return {id(loader): loader}


def copy_optimizer(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """Return a deep copy of `optimizer` with all its attributes; `copy.deepcopy` alone loses those of LBFGS.

    Wrappers around methods, which torch's schedulers set on the instance, are bound to the original and are left out.
    """
    attributes = {name: value for name, value in vars(optimizer).items()
                  if not (callable(value) and hasattr(type(optimizer), name))}
    copied = object.__new__(type(optimizer))
    memo[id(optimizer)] = copied
    vars(copied).update(copy.deepcopy(attributes, memo))
    return copied
