"""What a run must remember to go on exactly as if it had never ended."""
from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loopctl.checkpoint.atomic_files import FORMAT, DamagedCheckpoint, read_checkpoint
from loopctl.checkpoint.resharding import state_of_this_rank
from loopctl.checkpoint.sharded_tensors import extract_sharded, load_sharded
from loopctl.composition.options import to_spec
from loopctl.counters import Counters
from loopctl.data.batch import map_nested
from loopctl.distributed.process_group import all_gather, broadcast_from_rank0, restart_count
from loopctl.errors import UsageError, names, one_line
from loopctl.metrics.meters import Meters
from loopctl.optim.fast_step import without_dynamo_wrappers
from loopctl.rng import loader_generators, rng_state, set_rng_state

if TYPE_CHECKING:
    from loopctl.run import Run

COUNTERS = {field.name: tuple if field.name == "began" else int for field in fields(Counters)}
LAYOUT = {"config": dict, "model": dict, "optimizer": dict, "plugins": dict, "composition": list, "parameters": list,
          "samples": list, "plan": list, "max_steps": int | float, "counters": dict, "stop": str, "metrics": dict,
          "history": list, "ranks": list}

# A plugin that joins one of these changes what is trained, unless it has `observer_only = True`. A plugin that joins
# none of them and keeps no state is an observer too.
TRAINING_HOOKS = ("setup", "param_groups", "wrap_model", "group_batches", "lr_scale", "batch_weight", "optimizer_step",
           "micro_step", "compute_loss", "backward", "after_backward", "grads_ready")

# Options of `loopctl run` that may change on resume.
MAY_CHANGE_ON_RESUME = ("epochs", "max_steps", "eval_every", "workers", "device", "devices", "data_root", "download",
                        "plugin", "without")

log = logging.getLogger("loopctl")

def capture_state(run: Run) -> dict[str, Any]:
    """Everything that changes while training, in types that `torch.load(weights_only=True)` takes.

    Model, optimizer, plugins and position are the same in all processes. What is each one's own is under "ranks"; to
    collect it, all of them must call this.
    """
    own = {"meters": run.meters.state_dict(), "data": {name: feed.state_dict() for name, feed in run.loaders.items()},
           "random": rng_state(run.train, run.valid)}
    if run.world_size > 1:
        own = map_nested(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, own)
    with without_dynamo_wrappers():
        optimizer = run.optimizer.state_dict()
    return {
        "loopctl": FORMAT,
        "config": run.config or run_config(run),
        "model": run.model.state_dict(),
        "optimizer": {"class": type(run.optimizer).__name__, "defaults": optimizer_defaults(run), **optimizer},
        "plugins": {name: plugin.state_dict() for name, plugin in stateful(run).items()},
        "composition": training_plugins(run),
        "parameters": parameter_names(run),
        "samples": run.loaders["train"].size,
        "plan": list(run.plan()),
        "max_steps": run.max_steps,
        "counters": run.counters.state_dict(),
        "stop": run.stop,
        "metrics": run.metrics,
        "history": run.history,
        "ranks": all_gather(run, own),
    }


def run_config(run: Run) -> dict[str, Any]:
    """What a run begun in Python was asked for, as the command line would say it."""
    asked = {name: getattr(run, name) for name in ("epochs", "max_steps", "eval_every", "steps_per_epoch")}
    plugins = []
    for name, plugin in run.hook.plugins.items():
        with suppress(UsageError):              # an option that has no text, such as a function within a function
            name = to_spec(name.partition(".")[0], plugin)
        plugins.append(name)
    return asked | {"plugin": plugins}


def restore(run: Run) -> None:
    """Load the state that `run.resume` names, random numbers last. Raises UsageError where it is another run's."""
    path = run.resume or Path()
    saved_here = run.hook.acting["safe_point"] and path.is_dir() and run.out.is_dir() and path.samefile(run.out)
    if (saved_here or restart_count()) and not find_candidates(path):
        log.warning("%s has no checkpoint yet; beginning at the start", path)
        return
    file, saved = find_checkpoint(path, run.device)
    try:
        saved = load_sharded(run, saved, file.parent)
        if differences := broadcast_from_rank0(run, compare(run, saved)):      # only rank 0 has all the plugins
            raise UsageError(f"resume: {file} is of another run: {differences[0]}")
        load_state(run, saved)
        cut = saved["counters"]["step"] >= saved["max_steps"] and ended_within_epoch(saved)
        own = state_of_this_rank(run, saved)
        run.counters.load_state_dict(saved["counters"])
        run.stop, run.metrics, run.history = saved["stop"], saved["metrics"], saved["history"]
        run.meters = Meters(run.metric_fns["train"], "train_")
        run.meters.load_state_dict(own["meters"])
        for name, feed in run.loaders.items():
            feed.load_state_dict(own["data"][name])
        set_rng_state(own["random"], run.train, run.valid)
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:                      # a plugin may raise anything over a state that is not its own
        raise UsageError(f"resume: {file} cannot be loaded ({type(error).__name__}: {one_line(error)})") from error
    if cut and not run.seen_in_epoch and not run.finished:
        raise UsageError(f"resume: {file} ended within an epoch, at max_steps={saved['max_steps']}, so what it did "
                         "at the epoch's end came too early to go on; begin a new run from its weights")
    run.last_checkpoint = file


def ended_within_epoch(saved: dict[str, Any]) -> bool:
    """Whether the last of its epochs ended before its data did."""
    return saved["counters"]["seen"] % saved["plan"][1] != 0


def roll_back(run: Run) -> None:
    """Load the model, the optimizer and the plugins from `run.last_checkpoint`, or the one before it if it is damaged.

    Position, history and random numbers stay as they are.
    """
    assert run.last_checkpoint
    run.last_checkpoint, saved = find_checkpoint(run.last_checkpoint.parent, run.device)
    load_state(run, load_sharded(run, saved, run.last_checkpoint.parent))


def load_state(run: Run, saved: dict[str, Any]) -> None:
    run.model.load_state_dict(saved["model"])
    with without_dynamo_wrappers():
        run.optimizer.load_state_dict({key: saved["optimizer"][key] for key in ("state", "param_groups")})
    for name, plugin in stateful(run).items():
        if run.rank == 0 or not getattr(plugin, "rank_zero_only", False):
            plugin.load_state_dict(saved["plugins"][name])


def compare(run: Run, saved: dict[str, Any]) -> list[str]:
    """How the checkpoint `saved` differs from `run`, so that it cannot be resumed there."""
    found = [differs(f"{key} is", was, run.config[key]) for key, was in saved["config"].items()
             if key in run.config and key not in MAY_CHANGE_ON_RESUME and str(was) != str(run.config[key])]
    theirs, own = saved["model"], run.model.state_dict()
    found += missing("the model has {}", theirs, own)
    shapes = {name: (describe_shape(theirs[name]), describe_shape(own[name])) for name in own if name in theirs}
    found += [differs(f"the model's {name} is", *both) for name, both in shapes.items() if both[0] != both[1]]

    kinds = saved["optimizer"]["class"], type(run.optimizer).__name__
    sizes = [[len(group) for group in one] for one in (saved["parameters"], parameter_names(run))]
    if kinds[0] != kinds[1]:
        found.append(differs("the optimizer is", *kinds))
    else:
        theirs, own = saved["optimizer"]["defaults"], optimizer_defaults(run)
        found += [differs(f"the optimizer's {key} is", theirs.get(key), own[key])
                  for key in own if str(theirs.get(key)) != str(own[key])]
    if sizes[0] != sizes[1]:
        found.append(differs("the numbers of parameters in the optimizer's groups are", *sizes))
    elif saved["parameters"] != parameter_names(run):
        found.append("the optimizer has other parameters in the checkpoint than in this run, or in another order")

    orders = saved["composition"], training_plugins(run)
    found += missing("there is the plugin {}", {*orders[0], *saved["plugins"]}, {*orders[1], *stateful(run)})
    if not found and orders[0] != orders[1]:
        found.append(differs("the order of the plugins is", *map(", ".join, orders)))

    first = saved["ranks"][0]
    found += missing("there is the metric {}", first["meters"].keys() - {""}, run.metric_fns["train"])
    metrics = saved["metrics"], run.metrics
    found += missing("there is {}", *({"validation data"} if "val_loss" in one else () for one in metrics))
    if saved["plan"] != list(run.plan()) and len(saved["ranks"]) == run.world_size:
        plans = ["{} steps of {} batches".format(*plan) for plan in (saved["plan"], run.plan())]
        found.append(f"{differs('an epoch has', *plans)}; keep data, batch size and accumulation")
    if saved["samples"] != run.loaders["train"].size:
        sizes_of_data = ["{1} samples in batches of {0}".format(*size)
                         for size in (saved["samples"], run.loaders["train"].size)]
        found.append(differs("the training data has", *sizes_of_data))
    generators = len(first["random"]["generators"]), len(loader_generators((run.train, run.valid)))
    if generators[0] != generators[1]:
        found.append(differs("the number of random generators of the data loaders is", *generators))
    return found


def differs(fact: str, was: Any, now: Any) -> str:
    return f"{fact} {was} in the checkpoint and {now} in this run"


def missing(fact: str, theirs: Iterable[str], own: Iterable[str]) -> list[str]:
    """`fact` about what only the checkpoint has, and about what only this run has."""
    return [*describe_items(f"{fact} in the checkpoint but not in this run", {*theirs} - {*own}),
            *describe_items(f"{fact} in this run but not in the checkpoint", {*own} - {*theirs})]


def describe_items(text: str, items: Iterable[str]) -> list[str]:
    """`text` about the first of `items`, if there are any."""
    items = sorted(items)
    few = items[:3] + ([f"{len(items) - 3} more"] if len(items) > 3 else [])
    return [text.format(names(few))] if items else []


def describe_shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "a scalar" if isinstance(value, torch.Tensor) else "no tensor"


def parameter_names(run: Run) -> list[list[str]]:
    """The names of the parameters in each of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    return [[names.get(id(parameter), "") for parameter in group["params"]] for group in run.optimizer.param_groups]


def optimizer_defaults(run: Run) -> dict[str, Any]:
    """What the optimizer was made with, but for how it computes, which is the device's affair."""
    return {key: value for key, value in run.optimizer.defaults.items()
            if key not in ("foreach", "fused", "capturable", "differentiable")}


def stateful(run: Run) -> dict[str, Any]:
    return {name: plugin for name, plugin in run.hook.plugins.items() if hasattr(plugin, "state_dict")}


def training_plugins(run: Run) -> list[str]:
    """The plugins that have a say in what is trained, in their order."""
    shaping = {name for hook in TRAINING_HOOKS for name in run.hook.acting[hook]}
    return [name for name, plugin in run.hook.plugins.items()
            if name in shaping and not getattr(plugin, "observer_only", False)]


def check_serializable(run: Run) -> None:
    """Refuse, with UsageError, state that no checkpoint can hold. Call it when every plugin has had its start."""
    parts = {f"plugin {name}": plugin.state_dict() for name, plugin in stateful(run).items()}
    parts |= {f"metric {name}": one for name, one in run.meters.state_dict().items() if name}
    parts["model"] = {name: one for name, one in run.model.state_dict().items()
                      if type(one) not in (torch.Tensor, nn.Parameter)}
    with without_dynamo_wrappers():
        parts["optimizer"] = run.optimizer.state_dict()["param_groups"]
    for who, part in extract_sharded(parts)[0].items():
        stream = io.BytesIO()
        try:
            torch.save(part, stream)
            torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
        except Exception as error:
            kind = re.search(r"GLOBAL (\S+)", str(error))
            what = f"a {kind[1]}" if kind else f"something that cannot be written ({one_line(error)})"
            raise UsageError(f"{who}: its state has {what}; a checkpoint holds tensors, numbers, text, None, "
                             "and lists, tuples and dicts of them") from error


# Where it is kept


def find_checkpoint(path: Path, device: Any = "cpu") -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that `path` means and its content: a file, a folder of checkpoints, or a run's folder.

    One that is damaged is passed over, with a line that says so, for the one before it. Raises UsageError where there
    is none.
    """
    if not (tried := find_candidates(path)):
        raise UsageError(f"resume={path}: no checkpoint there; a run's folder has them in checkpoints/")
    said: list[str] = []
    for file in tried:
        try:
            saved = read_checkpoint(file, device)
            check_layout(saved)
            if "sharded" in saved and not (file.parent / saved["sharded"] / ".metadata").exists():
                raise DamagedCheckpoint(f"misses its sharded tensors in {saved['sharded']}")
        except DamagedCheckpoint as error:
            said.append(f"{file} {error}")
        else:
            for line in said:
                log.warning("%s; resuming from %s", line, file.name)
            return file, saved
    more = f", and neither is any of the {len(said) - 1} before it whole" if len(said) > 1 else ""
    raise UsageError(f"resume={path}: {said[0]}{more}; begin a new run")


def check_layout(saved: dict[str, Any]) -> None:
    """Raise Damaged where a file with a right checksum is not what `state` returns."""
    wrong = [name for name, kind in LAYOUT.items() if not isinstance(saved.get(name), kind)]
    wrong += [name for name, kind in COUNTERS.items()
              if not wrong and not isinstance(saved["counters"].get(name), kind)]
    if wrong:
        raise DamagedCheckpoint(f"has no right {wrong[0]!r}, so it is no checkpoint that this version of loopctl reads")


def find_candidates(path: Path) -> list[Path]:
    """The checkpoints that `path` means, the furthest first."""
    return [path] if path.is_file() else checkpoints_in(path) or checkpoints_in(path, "*/")


def checkpoints_in(folder: Path, below: str = "") -> list[Path]:
    """The checkpoints in `folder`, the furthest first."""
    found = [file for file in folder.glob(f"{below}step-*.pt") if step_number(file) >= 0]
    return sorted(found, key=lambda file: (step_number(file), file), reverse=True)


def step_number(file: Path) -> int:
    """The N of step-N.pt, which is how many updates were planned until then; -1 for other files."""
    digits = re.match(r"step-(\d+)\.pt", file.name)
    return int(digits[1]) if digits else -1
