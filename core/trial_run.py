"""Try training steps on a copy of a run, for a learning-rate range test, without changing the run itself."""
from __future__ import annotations

import copy
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, get_worker_info

from loopctl.checkpoint.state import training_plugins
from loopctl.composition.compose import compose
from loopctl.data.batch import batches_to_device
from loopctl.distributed.data_parallel import Parallel
from loopctl.distributed.process_group import all_reduce_mean
from loopctl.errors import UsageError, one_line
from loopctl.loop import DEFAULTS, run_step
from loopctl.metrics.meters import Meters
from loopctl.model.forward import unwrapped_network
from loopctl.model.own_names import own_modules
from loopctl.model.ownership import modules_of
from loopctl.optim.learning_rate import set_learning_rates
from loopctl.optim.optimizer_mode import set_train_mode
from loopctl.optim.several import Optimizers
from loopctl.rng import rng_state, set_rng_state
from loopctl.run import Run

WAY_OUT = "take it from an argument, as of functools.partial, or from run.model in a plugin; or leave this test out"


@contextmanager
def trial_run(run: Run) -> Iterator[TrialRun]:
    """Yield a copy of `run` to try steps on. The states of random number generators are restored at the end.

    Model, optimizer, loss function, data loaders and the plugins that affect training are copied; observers are left
    out. The run itself is not changed. The copies take as much memory again, and the weights are held twice.

    Raises UsageError where a part of the run cannot be copied, or where a function that was not copied, such as a hook
    of the model, uses the run's own model.
    """
    if isinstance(run.train, Iterator):
        raise UsageError("train can be read only once, so no steps can be tried on it; pass a list or a DataLoader")
    random, before, guards = rng_state(run.train), own_state(run), []       # type: Any, Any, list[Any]
    try:
        with closing(TrialRun(run)) as trial:
            parts = [part for module in modules_of(run) for part in module.modules()]
            guards += [part.register_forward_pre_hook(refuse_call) for part in parts
                       if not isinstance(part, torch.jit.ScriptModule)]                 # which has no such hooks
            yield trial
    except CallsOwnModel as error:
        raise UsageError(f"steps cannot be tried on a copy of the run, because a function calls the {error} of the run "
                         f"and not of the copy; {WAY_OUT}") from error
    finally:
        for guard in guards:
            guard.remove()
        changed = restore_own_state(before)
        set_rng_state(random, run.train)
    if changed:
        raise UsageError(f"steps on a copy of the run change the run's own {changed[0]}, so a function uses its model "
                         f"and not the copy; {WAY_OUT}")


class CallsOwnModel(Exception):
    """A function called a module of the run itself while steps were tried on a copy."""


def refuse_call(module: nn.Module, arguments: Any) -> None:
    """A forward hook of the run's own modules, while steps are tried on copies of them."""
    if get_worker_info() is None:               # a loader worker has its own modules
        raise CallsOwnModel(type(module).__name__)


def own_state(run: Run) -> list[tuple[str, Any, str, Any, Any]]:
    """Return the modes, parameters, buffers and gradients of the run's modules: what it is, its owner, the attribute of
    the owner, the value, and for a tensor a copy of it."""
    state: list[tuple[str, Any, str, Any, Any]] = []
    for module in modules_of(run):
        for name, part in own_modules(module):
            state.append((f"mode of {name or type(part).__name__}", part, "training", part.training, None))
            for key, tensor in {**part._parameters, **part._buffers}.items():
                label = f"{name}.{key}".lstrip(".")
                if tensor is not None and is_lazy(tensor):
                    continue
                state.append((label, part, key, tensor, copied_tensor(tensor)))
                if tensor is not None:
                    state.append((f"gradient of {label}", tensor, "grad", tensor.grad, copied_tensor(tensor.grad)))
    return state


def copied_tensor(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


@torch.no_grad()
def restore_own_state(state: list[tuple[str, Any, str, Any, Any]]) -> list[str]:
    """Restore what `own_state` returned; return what had changed."""
    changed = []
    for what, owner, attribute, value, before in state:
        if getattr(owner, attribute) is value and (before is None or equal_bits(value, before)):
            continue
        changed.append(what)
        setattr(owner, attribute, value)
        if before is not None:
            value.detach().copy_(before)
    return changed


def equal_bits(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are equal to the bit, so that NaN equals itself. Waits for the device."""
    if one.layout != torch.strided:
        one, other = one.to_dense(), other.to_dense()
    if one.is_quantized:
        one, other = one.int_repr(), other.int_repr()
    bits = []
    for tensor in (one, other):
        part: Tensor = getattr(tensor, "to_local", tensor.detach)()         # of a sharded tensor
        bits.append(part.resolve_conj().resolve_neg().reshape(-1).contiguous().view(torch.uint8))
    return torch.equal(*bits)


class TrialRun:
    """A copy of a run, as `self.run`. Its parameters are trained by `step`, but its counters never advance."""

    def __init__(self, run: Run) -> None:
        self.run = trial = replace(run, counters=replace(run.counters), _said=set(run._said))
        # One memo for all copies, so that references among model, optimizer and plugins lead to the copies.
        memo: dict[int, Any] = {id(run): trial}
        for loader in run.data_sets().values():
            memo |= shared_objects(loader)
        plugins = {name: run.hook.plugins[name] for name in training_plugins(run)}
        try:
            trial.model, trial.train, trial.valid = copy.deepcopy((run.model, run.train, run.valid), memo)
            trial.loss_fn = copy_function(run.loss_fn, memo)
            trial.forward = copy_function(run.forward, memo)
            trial.optimizer = copy_optimizer(run.optimizer, memo)
            trial.untrained = copy.deepcopy(run.untrained, memo)
            plugins = copy.deepcopy(plugins, memo)
        except Exception as error:                  # a class that was not made to be copied may raise anything
            raise UsageError("the run cannot be copied to try steps on "
                             f"({type(error).__name__}: {one_line(error)})") from error
        trial.hook = compose(plugins.values(), DEFAULTS)
        trial.parallel = next((plugin for plugin in plugins.values() if isinstance(plugin, Parallel)), None)
        trial.hook.acting["lr_scale"] = []          # `step` is given the learning rates
        trial.network = unwrapped_network(trial)
        trial.hook.wrap_model(run=trial)
        trial.meters, trial.metrics, trial.history, trial.loaders = Meters({}, ""), dict(run.metrics), [], {}
        for module in modules_of(trial):
            module.train()
        set_train_mode(trial.optimizer)
        trial.hook.epoch_start(run=trial)
        self.groups = self.repeated_groups()

    def repeated_groups(self) -> Generator[Sequence[Any]]:
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


def copy_function(function: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of `function` that uses the copies in `memo`; `copy.deepcopy` alone copies no function.

    Its closure, its default arguments and the global names that it uses lead to the copies of what has been copied, of
    modules and, in the closure, of functions. Everything else is shared with the function: hooks may fill it.
    """
    if id(function) in memo or not isinstance(function, FunctionType):
        return copy.deepcopy(function, memo)

    def copied(value: Any) -> Any:
        return copy.deepcopy(value, memo) if isinstance(value, nn.Module) else memo.get(id(value), value)

    cells = function.__closure__ or ()
    used = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
    copies = {name: copied(value) for name, value in used.items() if copied(value) is not value}
    defaults = tuple(map(copied, function.__defaults__ or ()))
    keyword_defaults = {name: copied(value) for name, value in (function.__kwdefaults__ or {}).items()}
    if not (cells or copies or defaults or keyword_defaults):
        return function
    code = function.__code__.replace()          # its own, for torch.compile keeps what it has compiled with the code
    twin = FunctionType(code, {**function.__globals__, **copies} if copies else function.__globals__,
                        function.__name__, defaults, tuple(CellType() for _ in cells))
    twin.__kwdefaults__ = keyword_defaults
    vars(twin).update(vars(function))
    memo[id(function)] = twin                   # before its closure, which may lead to the function itself
    for cell, own in zip(twin.__closure__ or (), cells, strict=True):
        with suppress(ValueError):              # the cell is empty
            value = own.cell_contents
            cell.cell_contents = copy_function(value, memo) if isinstance(value, FunctionType) else copied(value)
    return twin


def copy_optimizer(optimizer: torch.optim.Optimizer, memo: dict[int, Any]) -> torch.optim.Optimizer:
    """Return a deep copy of `optimizer` with all its attributes; `copy.deepcopy` alone loses those of LBFGS.

    Wrappers around methods, which torch's schedulers set on the instance, are bound to the original and are left out.
    """
    if isinstance(optimizer, Optimizers):
        return Optimizers({name: copy_optimizer(one, memo) for name, one in optimizer.named.items()})
    attributes = {name: value for name, value in vars(optimizer).items()
                  if not (callable(value) and hasattr(type(optimizer), name))}
    copied = object.__new__(type(optimizer))
    memo[id(optimizer)] = copied
    vars(copied).update(copy.deepcopy(attributes, memo))
    return copied
