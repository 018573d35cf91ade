"""Prepare a run for training: check the arguments of `fit`, choose the device, call `setup`, build the optimizer."""
from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from math import inf, nan
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from loopctl.composition.compose import blame_plugin, compose
from loopctl.composition.option_types import python_numbers
from loopctl.data.batch import length_or_none
from loopctl.distributed.data_parallel import Parallel
from loopctl.distributed.process_group import launched_processes
from loopctl.errors import UsageError, names, one_line
from loopctl.metrics.meters import check_metrics, is_stateful_metric, metric_prefix, reported_names
from loopctl.model.forward import takes_state, unwrapped_network
from loopctl.model.hidden_matrices import hidden_matrices
from loopctl.model.ownership import describe_untrained, modules_of, named_parameters, owns_any, untrained_parameters
from loopctl.model.parameter_matching import matching_parameters
from loopctl.model.weight_averages import WeightAverage
from loopctl.optim.fast_step import takes_model, without_dynamo_wrappers
from loopctl.optim.group_numbers import initial_key
from loopctl.optim.learning_rate import scheduled_values
from loopctl.optim.optimizer_mode import with_modes
from loopctl.optim.several import OfKind, Optimizers, each_optimizer
from loopctl.rng import seed_everything
from loopctl.run import Run

log = logging.getLogger("loopctl")

NONE_OF_KIND = {"hidden matrices": "the model has no trainable weight of two dimensions besides embeddings and its "
                                   "output layer (those of convolutions have more); use one optimizer for all",
                "others": "only hidden matrices are trained, which the first one has; use that one for all"}

# The learning rates, and other numbers that were scheduled, that an earlier run has left in an optimizer's groups, so
# that a user's change is recognised.
LEFT_NUMBERS: WeakKeyDictionary[torch.optim.Optimizer, list[dict[str, float]]] = WeakKeyDictionary()


def build_run(
    defaults: Iterable[Any], plugins: Iterable[Any], metrics: dict[str, Any] | None, device: Any, seed: int | None,
    **fields: Any,
) -> Run:
    """Return a run that is ready to train: plugins composed and checked, seeded, on its device, with its optimizer.

    defaults: objects that implement the hooks that no plugin replaces. fields: fields of `Run`. The other arguments are
    those of `fit`. Raises UsageError.
    """
    run = Run(**fields, seed=seed)
    if isinstance(plugins, str):
        raise UsageError(f"plugins is text, {plugins!r}; pass a list, such as [{plugins!r}]")
    run.hook = compose(plugins, defaults)
    with blame_plugin(run.hook):
        prepare(run, {} if metrics is None else metrics, device, seed)
    return run


def prepare(run: Run, metrics: dict[str, Any], device: Any, seed: int | None) -> None:
    """Check and seed `run`, move the model, call `setup`, build the optimizer, call `wrap_model`. Raises UsageError."""
    check(run, metrics)
    run.reduction = find_reduction(run)
    seed = python_numbers(seed)
    if seed is not None:
        if not isinstance(seed, int):
            raise UsageError(f"seed is {seed!r}; use a whole number")
        seed_everything(seed)
    run.device = find_device(device, run.model)
    for module in modules_of(run):
        module.to(run.device)
    place_metrics(run, metrics)

    launched = launched_processes()
    if launched > 1 and not any(isinstance(plugin, Parallel) for plugin in run.hook.plugins.values()):
        raise UsageError(f"torchrun has started {launched} processes, but no plugin makes them train together; add ddp "
                         "or fsdp")
    if isinstance(run.forward, Mapping):
        run.turns = tuple(run.forward)
        run.last_turn = run.turns[-1]
    run.hook.setup(run=run)
    check_metrics(run)
    run.optimizer = make_optimizers(run) if isinstance(run.optimizer, Mapping) else make_optimizer(run)
    run.untrained = untrained_parameters(run)
    if "train" not in run.hook.replaced and (left_out := describe_untrained(run)):
        log.warning(left_out)
    warn_of_averages(run)
    run.network = unwrapped_network(run)
    run.hook.wrap_model(run=run)


def warn_of_averages(run: Run) -> None:
    """Log a warning where the optimizer averages the weights itself, and something does not go well with that."""
    if not (switched := with_modes(run.optimizer)):
        return
    optimizer = names([type(one).__name__ for one in switched])
    if plugins := [name for name, plugin in run.hook.plugins.items() if isinstance(plugin, WeightAverage)]:
        log.warning("%s averages the weights that %s trains, whose own average is not used then; leave out %s",
                    names(plugins), optimizer, names(plugins))
    if any(isinstance(module, _BatchNorm) and module.track_running_stats for module in run.model.modules()):
        log.warning("%s evaluates an average of the weights, and the statistics of BatchNorm are those of the weights "
                    "that are trained, so evaluations may be wrong; use another norm, or another optimizer", optimizer)


def check(run: Run, metrics: Any) -> None:
    """Raise UsageError if an argument of `fit` is of the wrong type or out of range."""
    if not isinstance(run.model, nn.Module):
        raise UsageError(f"model is a {type(run.model).__name__}, not a torch.nn.Module")
    for name in ("epochs", "max_steps", "eval_every", "steps_per_epoch"):
        value = python_numbers(getattr(run, name))
        setattr(run, name, value)
        if value not in (None, inf) and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} is {value!r}; use a whole number of at least 1")
    if isinstance(run.valid, Mapping) and not (run.valid and all(isinstance(name, str) and name for name in run.valid)):
        raise UsageError("valid is a dict without names; pass data by name, such as {'clean': a, 'noisy': b}")
    for name, data in run.data_sets().items():
        if data is None and name == "valid":
            continue
        if not hasattr(data, "__iter__") or isinstance(data, Mapping | str | bytes):
            raise UsageError(f"{name} is a {type(data).__name__}, not an iterable of batches; "
                             "pass a DataLoader or a list")
        if isinstance(data, list | tuple) and data and isinstance(data[0], DataLoader):
            raise UsageError(f"{name} is a {type(data).__name__} of DataLoaders; pass one"
                             + ", or several validation sets as a dict by name" * (name != "train"))
        if length_or_none(data) == 0:
            raise UsageError(f"{name} has no batches")
    if length_or_none(run.train) is None and run.steps_per_epoch is None:
        raise UsageError("train has no length, so the end of an epoch is unknown; pass steps_per_epoch=...")
    if isinstance(run.loss_fn, type) and issubclass(run.loss_fn, nn.Module):
        raise UsageError(f"loss_fn is the class {run.loss_fn.__name__}; pass an instance, {run.loss_fn.__name__}()")
    if run.loss_fn is not None and not callable(run.loss_fn):
        raise UsageError(f"loss_fn is {describe(run.loss_fn)}; pass a function of (output, target), such as "
                         "torch.nn.CrossEntropyLoss(), or None where the model returns its loss")
    named = isinstance(run.forward, Mapping)
    functions = list(run.forward.values()) if named else [] if run.forward is None else [run.forward]
    for function in functions:
        if not callable(function):
            raise UsageError(f"forward is {describe(function)}; pass a function (model, batch) that returns loss, "
                             "outputs")
    optimizers = [*run.optimizer] if isinstance(run.optimizer, Mapping) else []
    if named and "train" not in run.hook.replaced and not (run.forward and [*run.forward] == optimizers):
        raise UsageError("forward is a dict, of a loss for each optimizer; pass a dict of optimizers with the same "
                         "names, in the same order")
    run.carries_state = any(takes_state(function) for function in functions)
    if named and run.carries_state:
        raise UsageError("forward is a dict, and one of its functions takes a state; a state is carried from batch to "
                         "batch by one function only")
    if run.forward is not None and run.loss_fn is not None:
        raise UsageError("forward computes the loss itself, so loss_fn would not be used; pass loss_fn=None")
    if run.forward is not None and "compute_loss" in run.hook.replaced:
        raise UsageError(f"{run.hook.replaced['compute_loss']} computes the loss, so forward would not be used; leave "
                         "out one of the two")
    for optimizer in run.optimizer.values() if isinstance(run.optimizer, Mapping) else [run.optimizer]:
        if not (callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer)):
            cls = optimizer_class(optimizer)
            way_out = (f"pass partial(torch.optim.{cls}, lr=...), or an optimizer" if cls else
                       "pass one optimizer, or a factory such as partial(torch.optim.SGD, lr=0.1); or a dict of them by"
                       " the part of the model")
            raise UsageError(f"optimizer is {describe(optimizer)}; {way_out}")
    if not isinstance(metrics, Mapping):
        raise UsageError(f"metrics is {describe(metrics)}; pass a dict of functions by name, such as "
                         '{"accuracy": accuracy}')
    for name in metrics:
        if not isinstance(name, str) or not name or name == "loss":
            raise UsageError(f"a metric is called {name!r}; use another name"
                             + ", for that is what the mean of loss_fn is called" * (name == "loss"))


def optimizer_class(text: Any) -> str:
    """The class of torch.optim that a text means, such as "adam" or "sgd:momentum=0.9"; empty where there is none."""
    classes = {name.lower(): name for name, cls in vars(torch.optim).items()
               if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer}
    return classes.get(text.partition(":")[0].strip().lower(), "") if isinstance(text, str) else ""


def describe(value: Any) -> str:
    """What an argument of a wrong type is, for a message."""
    return repr(value) if isinstance(value, str) else "None" if value is None else f"a {type(value).__name__}"


def find_reduction(run: Run) -> str:
    """Return what the loss of a batch is, "mean" or "sum": as given, or as `loss_fn.reduction` says.

    Raises UsageError for a loss that is neither.
    """
    given, source = run.reduction, "reduction"
    if given is None:
        if run.loss_fn is None or "compute_loss" in run.hook.replaced:
            return "mean"
        keywords = getattr(run.loss_fn, "keywords", None) or {}         # of a functools.partial
        given, source = keywords.get("reduction", getattr(run.loss_fn, "reduction", "mean")), "loss_fn.reduction"
    if given == "sum":
        return "sum"
    if given == "none" or (source == "reduction" and given != "mean"):
        raise UsageError(f"{source} is {given!r}, so the loss of a batch is not one number; use 'mean' or 'sum'")
    return "mean"


def find_device(device: Any, model: nn.Module | None = None) -> torch.device:
    """Return the device to train on. None means the device of `model`; "auto" means cuda, then mps, then cpu.

    With several processes, "cuda" is the GPU of this process's local rank. Raises UsageError if the device is unknown
    or this machine does not have it.
    """
    if device is None:
        tensors = [*model.parameters(), *model.buffers()] if model else []
        return tensors[0].device if tensors else torch.device("cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if str(device) == "cuda" and launched_processes() > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                 # torch warns of outdated device names; refused below
            found = torch.device(device)
    except RuntimeError:
        raise UsageError(f"device {device!r} is unknown; use auto, cpu, mps, cuda or cuda:1") from None
    if found.type == "cpu" and found.index:
        raise UsageError(f"device {str(found)!r} does not exist; use 'cpu'")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        has = f"{torch.cuda.device_count()} CUDA devices" if torch.cuda.is_available() else "no CUDA device"
        raise UsageError(f"device {str(found)!r} does not exist: this machine has {has}; use another, or 'auto'")
    if found.type not in ("cpu", "cuda", "mps"):
        try:
            torch.zeros(1, device=found).item()
        except Exception as error:
            raise UsageError(f"device {str(found)!r} cannot be used ({type(error).__name__}: {one_line(error)}); "
                             "use another, or 'auto'") from error
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device 'mps' does not exist on this machine; use another, or 'auto'")
    return found


def place_metrics(run: Run, metrics: dict[str, Any]) -> None:
    """Set `run.metric_fns`, with separate torchmetrics objects for training and evaluation, all on `run.device`.

    Each metric that the run will report is declared in `run.metrics` as NaN.
    """
    for name, function in metrics.items():
        if not callable(function) and not is_stateful_metric(function):
            raise UsageError(f"metric {name!r} is a {type(function).__name__}, not a function of (output, target)")
    for part in ("train", "val"):
        run.metric_fns[part] = {name: own_copy(function, run.device) for name, function in metrics.items()}
    names = "loss", *reported_names(run.metric_fns["train"])
    for prefix in ("train_", *map(metric_prefix, run.validation_sets())):
        run.metrics |= {f"{prefix}{name}": nan for name in names}


@contextmanager
def rates_remembered(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Remember, at the end of the block, the rates and other numbers that the run leaves in an optimizer."""
    try:
        yield
    finally:
        for one in each_optimizer(optimizer):
            LEFT_NUMBERS[one] = [scheduled_values(group) for group in one.param_groups]


def own_copy(function: Any, device: torch.device) -> Any:
    """A copy of a metric that keeps a state, on `device`; a function itself."""
    if not is_stateful_metric(function):
        return function
    copied = deepcopy(function)
    return copied.to(device) if hasattr(copied, "to") else copied


def make_optimizer(run: Run) -> torch.optim.Optimizer:
    """Return the user's optimizer, or the one that the user's factory builds; set `initial_lr` in each group."""
    if isinstance(run.optimizer, torch.optim.Optimizer):
        if plugins := run.hook.acting["param_groups"]:
            raise UsageError(f"{plugins[0]} sets the parameter groups, but the optimizer has its own; pass a factory, "
                             "such as partial(torch.optim.SGD, lr=0.1), in place of the optimizer")
        optimizer = run.optimizer
        check_ready_made(run, optimizer)
    else:
        whole = takes_model(run.optimizer)
        if whole and (plugins := run.hook.acting["param_groups"]):
            raise UsageError(f"{plugins[0]} sets the parameter groups, but the optimizer makes its own of the model; "
                             f"leave out {plugins[0]}, or use another optimizer")
        groups = run.hook.param_groups(run=run)
        if not any(group["params"] for group in groups):
            raise UsageError("no parameter of the model has requires_grad=True; leave at least one trainable")
        optimizer = call_factory(run.optimizer, run.model if whole else groups)
    note_rates(optimizer)
    return optimizer


def make_optimizers(run: Run) -> Optimizers:
    """Return the user's optimizers as one; each trains the parameters that its name matches and no earlier one has.

    Raises UsageError where one has no parameters, a parameter has no optimizer, or they cannot be stepped together.
    """
    if plugins := run.hook.acting["param_groups"]:
        raise UsageError(f"{plugins[0]} sets the parameter groups of one optimizer, and there are several; leave it "
                         "out, and set groups in the factories")
    matched = matching_parameters(run.model, [name for name, optimizer in run.optimizer.items()
                                              if not isinstance(optimizer, OfKind | torch.optim.Optimizer)])
    held: set[int] = set()
    made = {}
    for name, optimizer in run.optimizer.items():
        if isinstance(optimizer, torch.optim.Optimizer):
            check_ready_made(run, optimizer)
        else:
            candidates = of_kind(run, optimizer) if isinstance(optimizer, OfKind) else matched[name]
            own = [parameter for parameter in candidates if parameter.requires_grad and id(parameter) not in held]
            if not own and isinstance(optimizer, OfKind):
                raise UsageError(f"the optimizer {name!r} has no parameters: {NONE_OF_KIND[optimizer.kind]}")
            if not own:
                raise UsageError(f"the optimizer {name!r} has no parameters: they do not require gradients, or an "
                                 "earlier optimizer has them; put it first")
            if takes_model(getattr(optimizer, "factory", optimizer)):
                raise UsageError(f"the optimizer {name!r} takes the whole model, so it cannot be one of several")
            optimizer = call_factory(optimizer, [{"params": own}])
        if not run.turns and isinstance(optimizer, torch.optim.LBFGS):
            raise UsageError(f"the optimizer {name!r} computes the loss several times in a step, so it cannot be "
                             "stepped together with others; give each a loss, with a dict as forward")
        held |= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        made[name] = optimizer
    left = [name for name, parameter in named_parameters(run).items()
            if parameter.requires_grad and id(parameter) not in held]
    if left:
        few = left[:3] + [f"{len(left) - 3} more"] * (len(left) > 3)
        raise UsageError(f"no optimizer has the parameters {names(few)}; add one under the name '*', which has what no "
                         "earlier one has, or freeze them")
    for optimizer in made.values():
        note_rates(optimizer)
    return Optimizers(made)


def of_kind(run: Run, optimizer: OfKind) -> list[nn.Parameter]:
    """The parameters of the kind that an optimizer trains; `others` are all, of which earlier ones have theirs."""
    hidden = optimizer.kind == "hidden matrices"
    return hidden_matrices(run.model) if hidden else list(named_parameters(run).values())


def check_ready_made(run: Run, optimizer: torch.optim.Optimizer) -> None:
    """Raise UsageError if an optimizer trains nothing of the run. Notice numbers that were set since its last run."""
    if not owns_any(run, optimizer) and "optimizer_step" not in run.hook.replaced:
        raise UsageError("the optimizer holds no parameter of the model, so nothing would be trained; make it from "
                         "model.parameters()")
    for group, left in zip(optimizer.param_groups, LEFT_NUMBERS.pop(optimizer, []), strict=False):
        for name, value in scheduled_values(group).items():
            if value != left.get(name):
                del group[initial_key(name)]        # the user has set another value since


def note_rates(optimizer: torch.optim.Optimizer) -> None:
    """Set `initial_lr` in each parameter group. Raises UsageError where one has no learning rate."""
    for group in optimizer.param_groups:
        if group.get("lr") is None:
            raise UsageError(f"the optimizer {type(optimizer).__name__} has a parameter group without a learning rate; "
                             "pass lr=..., or use another optimizer if it takes none")
        group.setdefault("initial_lr", float(group["lr"]))


def call_factory(factory: Any, argument: Any) -> torch.optim.Optimizer:
    """Return the optimizer that the user's factory makes of parameter groups, or of the model if it `takes_model`.

    Raises UsageError if it makes none.
    """
    with without_dynamo_wrappers():
        optimizer = factory(argument)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optimizer returned a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    return optimizer
