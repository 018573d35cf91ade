"""The state of a run in a checkpoint: capture it, compare it with a run, restore it."""
from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from enum import Enum
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loopctl.checkpoint.atomic_files import FORMAT, overlaps
from loopctl.checkpoint.finding import find_checkpoint, resume_candidates, resumes_own_folder
from loopctl.checkpoint.plain_values import describe
from loopctl.checkpoint.resharding import state_of_this_rank
from loopctl.checkpoint.sharded_tensors import extract_sharded, load_sharded
from loopctl.composition.options import to_spec
from loopctl.data.batch import map_nested, to_device
from loopctl.distributed.process_group import all_gather, broadcast_from_rank0, restart_count
from loopctl.errors import UsageError, counted, names, one_line
from loopctl.metrics.meters import Meters, is_stateful_metric, load_metric_state, metric_state
from loopctl.model.own_names import load_own_state_dict, own_parameters, own_state_dict
from loopctl.model.ownership import load_loss_tensors, loss_tensors
from loopctl.optim.fast_step import is_divided, stepped_class, without_dynamo_wrappers
from loopctl.optim.learning_rate import scheduled_rates
from loopctl.optim.optimizer_mode import set_train_mode, used_weights
from loopctl.optim.schedule import Schedule
from loopctl.rng import loader_generators, rng_state, set_rng_state

if TYPE_CHECKING:
    from loopctl.run import Run

# A plugin that implements one of these hooks affects training, unless it has `observer_only = True`. A plugin that
# implements none of them and has no state is an observer too.
TRAINING_HOOKS = ("setup", "param_groups", "wrap_model", "group_batches", "lr_scale", "transform_batch", "batch_weight",
                  "optimizer_step", "micro_step", "compute_loss", "backward", "after_backward", "grads_ready")

# Options of `loopctl run` that may change on resume.
MAY_CHANGE_ON_RESUME = ("epochs", "max_steps", "eval_every", "workers", "device", "devices", "data_root", "download",
                        "plugin", "without", "max_time", "tag", "test", "threads", "cudnn_benchmark")

log = logging.getLogger("loopctl")


def capture_state(run: Run) -> dict[str, Any]:
    """Return everything that changes during training, in types that `torch.load(weights_only=True)` can load.

    The states of model, optimizer, plugins and counters are the same on all ranks. Metrics, data loaders and random
    number generators have one state per rank, under "ranks". They are gathered, so all processes must call this.
    """
    rank_state = {"meters": run.meters.state_dict(), "logged": run.meters.logged_state(),
                  "val_metrics": {name: metric_state(metric) for name, metric in run.metric_fns["val"].items()
                                  if is_stateful_metric(metric)},
                  "data": {name: loader.state_dict() for name, loader in run.loaders.items()},
                  "carried": run.carried, "random": rng_state(*run.data_sets().values())}
    if run.world_size > 1:
        rank_state = map_nested(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, rank_state)
    weights: dict[str, dict[str, Any]] = {
        "model": own_state_dict(run.model),
        "loss_fn": {name: tensor.detach() for name, tensor in loss_tensors(run).items()}}
    trained = exchange_weights(run, weights)
    return {
        "loopctl": FORMAT,
        "config": run.config or run_config(run),
        **weights,
        "trained": trained,
        "optimizer": {"class": stepped_class(run.optimizer).__name__, "defaults": optimizer_defaults(run),
                      **optimizer_state(run)},
        "plugins": {name: plugin.state_dict() for name, plugin in stateful(run).items()},
        "composition": training_plugins(run),
        "parameters": parameter_names(run),
        "data": identities(run),
        "plan": list(run.planned_by_length().epoch(0)),
        "counted_plan": list(run.counted_plan or ()),
        "max_steps": run.max_steps,
        "counters": run.counters.state_dict(),
        "stop": run.stop,
        "metrics": run.metrics,
        "history": run.history,
        "ranks": all_gather(run, rank_state),
    }


def exchange_weights(run: Run, weights: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Put the weights that are used into `weights`, and return those that are trained, which a resumed run goes on
    with. They differ for an optimizer that has modes; for others, the result is empty."""
    used = used_weights(run.optimizer)
    if not used:
        return {}
    parameters: dict[str, dict[str, Any]] = {
        "model": own_parameters(run.model, remove_duplicate=False), "loss_fn": dict(loss_tensors(run))}
    trained: dict[str, dict[str, Any]] = {}
    for part, tensors in weights.items():
        names = [name for name, parameter in parameters[part].items() if id(parameter) in used and name in tensors]
        trained[part] = {name: tensors[name] for name in names}
        tensors.update({name: used[id(parameters[part][name])] for name in names})
    return trained


def run_config(run: Run) -> dict[str, Any]:
    """Return the arguments of a run started from Python, with its plugins as the command line writes them."""
    arguments = {name: getattr(run, name) for name in ("epochs", "max_steps", "eval_every", "steps_per_epoch")}
    plugins = []
    for name, plugin in run.hook.plugins.items():
        with suppress(UsageError):              # an option that cannot be written as text, such as a nested function
            name = to_spec(name.partition(".")[0], plugin)
        plugins.append(name)
    return arguments | {"plugin": plugins}


def restore(run: Run) -> None:
    """Load the state of the run from `run.resume`: a checkpoint, or a folder with checkpoints.

    Raises UsageError where the checkpoint belongs to a run with another setup, or cannot be loaded.
    """
    path = run.resume or Path()
    # A run that was killed before its first checkpoint starts again from the beginning.
    own_folder = run.hook.acting["safe_point"] and resumes_own_folder(run)
    if (own_folder or restart_count()) and not resume_candidates(run):
        log.warning("%s has no checkpoint yet; training from the beginning", path)
        return
    file, saved = find_checkpoint(path, run.device, run)
    try:
        saved = load_sharded(run, saved, file.parent)
        if differences := broadcast_from_rank0(run, compare(run, saved)):      # only rank 0 has all the plugins
            raise UsageError(f"resume: {file} is of another run: {differences[0]}")
        load_state(run, saved, file)
        cut_short = saved["counters"]["step"] >= saved["max_steps"] and ended_within_epoch(saved)
        rank_state = state_of_this_rank(run, saved)
        run.counters.load_state_dict(saved["counters"])
        if saved["counted_plan"]:
            run.plan_by_count(tuple(saved["counted_plan"]))
        run.stop, run.metrics, run.history = saved["stop"], saved["metrics"], saved["history"]
        run.meters = Meters(run.metric_fns["train"], "train_")
        run.meters.load_state_dict(rank_state["meters"])
        run.meters.load_logged_state(rank_state["logged"])
        run.carried = to_device(rank_state["carried"], run.device)
        for name, state in rank_state["val_metrics"].items():
            load_metric_state(run.metric_fns["val"][name], state)
        for name, loader in run.loaders.items():
            loader.load_state_dict(rank_state["data"][name])
        warn_of_jump(run, saved)
        # Last, because loading the other states may draw random numbers.
        set_rng_state(rank_state["random"], *run.data_sets().values())
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:                      # a plugin may raise anything if the state is not its own
        raise UsageError(f"resume: {file} cannot be loaded ({type(error).__name__}: {one_line(error)})") from error
    if cut_short and not run.seen_in_epoch and not run.finished:
        raise UsageError(f"resume: {file} ended within an epoch, at max_steps={saved['max_steps']}, and that epoch was "
                         "evaluated and counted as complete, so it cannot be resumed; begin a new run from its weights")
    run.last_checkpoint = file


def warn_of_jump(run: Run, saved: dict[str, Any]) -> None:
    """Log a warning if the learning rate jumps because the run is now planned to be longer or shorter."""
    if not run.hook.acting["lr_scale"] or run.finished:
        return
    planned = run.epochs, run.max_steps
    before = saved["config"].get("epochs") or run.epochs, saved["max_steps"]
    if before == planned:
        return
    rates = scheduled_rates(run)
    try:
        run.epochs, run.max_steps = before
        jumps = [(old, new) for old, new in zip(scheduled_rates(run), rates, strict=True)
                 if abs(new - old) > 0.01 * max(old, new)]
    finally:
        run.epochs, run.max_steps = planned
    if jumps:
        old, new = max(jumps, key=lambda pair: abs(pair[1] - pair[0]))
        log.warning("resume: the run was planned for %s and is now for %s, so schedules of the whole run go on "
                    "elsewhere: the learning rate is %.3g in place of %.3g",
                    planned_length(*before), planned_length(*planned), new, old)


def ended_within_epoch(saved: dict[str, Any]) -> bool:
    """Return whether the last epoch in the checkpoint ended before all of its batches were consumed."""
    return saved["counters"]["seen"] % saved["plan"][1] != 0


def roll_back(run: Run) -> None:
    """Load model, optimizer and plugins from `run.last_checkpoint`, or from the one before it if it is damaged.

    Counters, history and random-number-generator states stay as they are.
    """
    assert run.last_checkpoint
    run.last_checkpoint, saved = find_checkpoint(run.last_checkpoint.parent, run.device, run)
    load_state(run, load_sharded(run, saved, run.last_checkpoint.parent), run.last_checkpoint)
    set_train_mode(run.optimizer)           # which it is not in where an epoch ended


def load_state(run: Run, saved: dict[str, Any], file: Path) -> None:
    """Load the state dicts of model, loss function, optimizer and plugins from `saved`, the content of `file`."""
    trained = saved.get("trained", {})
    load_model(run.model, saved["model"] | trained.get("model", {}))
    load_loss_tensors(run, saved["loss_fn"] | trained.get("loss_fn", {}))
    names = [group.get("name") for group in run.optimizer.param_groups]
    code = [{key: value for key, value in group.items() if is_code(value)} for group in run.optimizer.param_groups]
    state = {key: value for key, value in saved["optimizer"].items() if key not in ("class", "defaults")}
    if groups := state.get("param_groups"):
        state["param_groups"] = [group | own for group, own in zip(groups, code, strict=False)]
    with without_dynamo_wrappers():
        run.optimizer.load_state_dict(state)
    keep_lengths(run.optimizer, state.get("state", {}))
    for group, name in zip(run.optimizer.param_groups, names, strict=True):
        group |= {"name": name} if name else {}         # the checkpoint may be older than the name
    for name, plugin in stateful(run).items():
        if name not in saved["plugins"]:        # other options, or an older version, without a state
            if plugin.state_dict():
                run.say_once(f"state of {name}", f"resume: {file} has no state of plugin {name}, which begins anew")
        elif run.rank == 0 or not getattr(plugin, "rank_zero_only", False):
            try:
                plugin.load_state_dict(saved["plugins"][name])
            except UsageError:
                raise
            except Exception as error:          # a plugin may raise anything if the state is that of another version
                reason = f"({type(error).__name__}: {one_line(error)})"
                raise UsageError(f"resume: {file} cannot be loaded: plugin {name} cannot load its state {reason}; use "
                                 "the version that has saved it") from error


def keep_lengths(optimizer: Any, saved: dict[Any, Any]) -> None:
    """Give each deque in the state of the optimizer the maximum length that it had: torch loads it without one."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, entries in saved.items():
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, deque):
                own = optimizer.state[parameters[number]]
                own[key] = deque(own[key], value.maxlen)


def load_model(model: nn.Module, state: dict[str, Any]) -> None:
    """Load `state` into the model. A buffer that overlaps itself, as after `expand`, is made whole before."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and overlaps(buffer):
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)
    load_own_state_dict(model, state)


def compare(run: Run, saved: dict[str, Any]) -> list[str]:
    """Return the differences between the checkpoint content `saved` and `run` because of which it cannot be resumed."""
    found = [differs(f"{key} is", value, run.config[key]) for key, value in saved["config"].items()
             if key in run.config and key not in MAY_CHANGE_ON_RESUME and str(value) != str(run.config[key])]
    saved_model, model = saved["model"], own_state_dict(run.model)
    found += missing("the model has {}", saved_model, model)
    shapes = {name: (describe_shape(saved_model[name]), describe_shape(model[name]))
              for name in model if name in saved_model}
    found += [differs(f"the model's {name} is", *both) for name, both in shapes.items() if both[0] != both[1]]

    shapes = {name: (describe_shape(saved["loss_fn"].get(name)), describe_shape(tensor))
              for name, tensor in loss_tensors(run).items()}
    found += missing("loss_fn has {}", saved["loss_fn"], shapes)
    found += [differs(f"loss_fn's {name} is", *both) for name, both in shapes.items()
              if name in saved["loss_fn"] and both[0] != both[1]]

    classes = saved["optimizer"]["class"], stepped_class(run.optimizer).__name__
    sizes = [[len(group) for group in groups] for groups in (saved["parameters"], parameter_names(run))]
    if classes[0] != classes[1]:
        found.append(differs("the optimizer is", *classes))
    else:
        saved_defaults, defaults = saved["optimizer"]["defaults"], optimizer_defaults(run)
        found += [differs(f"the optimizer's {key} is", saved_defaults.get(key), defaults[key])
                  for key in defaults if str(saved_defaults.get(key)) != str(defaults[key])]
    if sizes[0] != sizes[1]:
        found.append(differs("the numbers of parameters in the optimizer's groups are", *sizes))
    elif saved["parameters"] != parameter_names(run):
        found.append("the optimizer has other parameters in the checkpoint than in this run, or in another order")

    orders = saved["composition"], training_plugins(run)
    found += missing("there is the plugin {}", {*orders[0], *saved["plugins"]}, {*orders[1], *stateful(run)})
    if not found and orders[0] != orders[1]:
        found.append(differs("the order of the plugins is", *map(", ".join, orders)))

    rank0 = saved["ranks"][0]
    found += missing("there is the metric {}", rank0["meters"].keys() - {""}, run.metric_fns["train"])
    sets = saved["data"], identities(run)
    found += missing("there is {}", *([" ".join(["validation data", *name.split(".")[1:]]) for name in data
                                       if name != "train"] for data in sets))
    plan = run.planned_by_length().epoch(0)
    if saved["plan"] != list(plan) and len(saved["ranks"]) == run.world_size:
        plans = [f"{counted(steps, 'step')} of {counted(batches, 'batch')}"
                 for steps, batches in (saved["plan"], plan)]
        found.append(f"{differs('an epoch has', *plans)}; keep data, batch size and accumulation")
    found += other_data(*sets)
    generators = len(rank0["random"]["generators"]), len(loader_generators(run.data_sets().values()))
    if generators[0] != generators[1]:
        found.append(differs("the number of random generators of the data loaders is", *generators))
    return found


def identities(run: Run) -> dict[str, Any]:
    """Return what identifies each data set that the run has, by the name of its loader."""
    return {name: loader.identity for name, loader in run.loaders.items() if loader.source is not None}


def other_data(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Say how the data of a run differs from that of the checkpoint: its sizes, limits, and classes by name and order.
    """
    found = []
    for name in saved.keys() & current.keys():
        what = "training" if name == "train" else "validation"
        old, new = saved[name], current[name]
        if any(old[key] != new[key] for key in ("batch_size", "samples") if name == "train" or key == "samples"):
            sizes = ["{samples} samples in batches of {batch_size}".format(**data) for data in (old, new)]
            advice = "; best values of two sets cannot be compared" * (name != "train")
            found.append(differs(f"the {what} data has", *sizes) + advice)
        limits = [f"limited to {data['limit']}" if data.get("limit") else "not limited" for data in (old, new)]
        if limits[0] != limits[1]:
            found.append(differs(f"the {what} data is", *limits))
        if old["classes"] != new["classes"] and old["classes"] and new["classes"]:
            classes = [", ".join(data["classes"]) for data in (old, new)]
            found.append(differs(f"the classes of the {what} data are", *classes))
    return found


def planned_length(epochs: Any, steps: float) -> str:
    return counted(epochs, "epoch") + (f" or {counted(int(steps), 'step')}" if steps != inf else "")


def differs(fact: str, in_checkpoint: Any, in_run: Any) -> str:
    return f"{fact} {in_checkpoint} in the checkpoint and {in_run} in this run"


def missing(fact: str, in_checkpoint: Iterable[str], in_run: Iterable[str]) -> list[str]:
    """State `fact` for the names that only the checkpoint has, and for those that only this run has."""
    return [*describe_items(f"{fact} in the checkpoint but not in this run", {*in_checkpoint} - {*in_run}),
            *describe_items(f"{fact} in this run but not in the checkpoint", {*in_run} - {*in_checkpoint})]


def describe_items(text: str, items: Iterable[str]) -> list[str]:
    """Return `text` with the first three of `items` filled in, as a list; an empty list if there are no items."""
    items = sorted(items)
    few = items[:3] + ([f"{len(items) - 3} more"] if len(items) > 3 else [])
    return [text.format(names(few))] if items else []


def describe_shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "a scalar" if isinstance(value, torch.Tensor) else "no tensor"


def parameter_names(run: Run) -> list[list[str]]:
    """Return the names of the parameters in each of the optimizer's parameter groups."""
    names = {id(parameter): name for name, parameter in own_parameters(run.model).items()}
    return [[names.get(id(parameter), "") for parameter in group["params"]] for group in run.optimizer.param_groups]


def optimizer_defaults(run: Run) -> dict[str, Any]:
    """Return the optimizer's default options, without those that only choose an implementation for the device."""
    return {key: describe_code(value) if is_code(value) else value for key, value in run.optimizer.defaults.items()
            if key.partition(" of ")[0] not in ("foreach", "fused", "capturable", "differentiable")}


def is_code(value: Any) -> bool:
    """Whether an option of a parameter group is a function, a class or a member of an enumeration.

    A checkpoint does not hold these, which the run's own optimizer has.
    """
    return isinstance(value, Enum) or callable(value)


def describe_code(value: Any) -> str:
    return str(value) if isinstance(value, Enum) else getattr(value, "__qualname__", type(value).__qualname__)


def stateful(run: Run) -> dict[str, Any]:
    """Return the plugins that have a `state_dict`, by name."""
    return {name: plugin for name, plugin in run.hook.plugins.items() if hasattr(plugin, "state_dict")}


def training_plugins(run: Run) -> list[str]:
    """Return the names of the plugins that affect training, in the order in which they act."""
    affecting = {name for hook in TRAINING_HOOKS for name in run.hook.acting[hook]}
    affecting |= {name for name, plugin in run.hook.plugins.items() if isinstance(plugin, Schedule)}
    return [name for name, plugin in run.hook.plugins.items()
            if name in affecting and not getattr(plugin, "observer_only", False)]


def acts_in_training(plugin: Any) -> bool:
    """Whether a plugin implements a hook that can change what is trained, or how fast."""
    return any(hasattr(getattr(plugin, hook, None), "loopctl_impl") for hook in TRAINING_HOOKS)


def check_serializable(run: Run) -> None:
    """Raise UsageError if a checkpoint cannot hold the state of a plugin, a metric, the model or the optimizer.

    Call it in `epoch_start` of the first epoch or later, when the plugins have created their state, and again after the
    first step, when the optimizer has.
    """
    content = extract_sharded({
        "plugins": {name: plugin.state_dict() for name, plugin in stateful(run).items()},
        "meters": run.meters.state_dict(), "model": own_state_dict(run.model), "loss_fn": dict(loss_tensors(run)),
        "optimizer": optimizer_state(run, own=True), "history": run.history, "metrics": run.metrics,
        "carried": run.carried,
    })[0]
    plain_content(content)


def plain_content(content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint as values that can be read back: see plain_values.py.

    Raises UsageError, which names the plugin, the metric or the other owner of a value for which that is not possible.
    """
    owners = {"plugins": "plugin {}", "meters": "metric {}"}
    found = {}
    for key, part in content.items():
        if key in owners:
            found[key] = {name: describe(state, owners[key].format(name or "loss")) for name, state in part.items()}
        else:
            found[key] = describe(part, key)
    return found


def optimizer_state(run: Run, own: bool = False) -> dict[str, Any]:
    """Return the state dict of the optimizer, without the options of its parameter groups that are code.

    One that is divided among processes is gathered in rank 0; others get {}.
    own: return the part of this process, without gathering, in which all processes take part
    """
    optimizer = run.optimizer
    with without_dynamo_wrappers():
        if is_divided(optimizer) and not own:
            optimizer.consolidate_state_dict(to=0)
            if run.rank:
                return {}
        state = (optimizer.optim if is_divided(optimizer) and own else optimizer).state_dict()
    groups = [{key: value for key, value in group.items() if not is_code(value)}
              for group in state.get("param_groups", [])]
    return state | ({"param_groups": groups} if groups else {})
