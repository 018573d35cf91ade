"""What a run must remember to go on exactly as if it had never ended."""
from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopctl.batches import mapped
from loopctl.errors import UsageError, names, one_line
from loopctl.files import Damaged, read
from loopctl.meters import Meters
from loopctl.options import spec
from loopctl.pieces import put_in, taken_out
from loopctl.randomness import generators, random_state, set_random_state
from loopctl.regroup import own_part
from loopctl.run import Run
from loopctl.updates import unlayered
from loopctl.world import gathered, restarts, told

POSITION = {"epoch": int, "step": int, "attempts": int, "seen": int, "began": tuple, "shift": int, "judged": int,
            "stop": str, "metrics": dict, "history": list}
LAYOUT = {"config": dict, "model": dict, "optimizer": dict, "plugins": dict, "composition": list, "parameters": list,
          "samples": list, "plan": list, "max_steps": int | float, "position": dict, "ranks": list}

# A plugin that joins one of these has a say in what is trained, unless it says `looks_on = True`; one that joins none
# of them, and keeps no state, looks on too.
SHAPING = ("setup", "param_groups", "wrap_model", "group_batches", "lr_scale", "batch_weight", "optimizer_step",
           "micro_step", "compute_loss", "backward", "after_backward", "grads_ready")

# What `loopctl run` was told, and may be told otherwise when the run goes on.
FREE = ("epochs", "max_steps", "eval_every", "workers", "device", "devices", "data_root", "download", "plugin",
        "without")

log = logging.getLogger("loopctl")

def state(run: Run) -> dict[str, Any]:
    """Everything that changes while training, in types that `torch.load(weights_only=True)` takes.

    Model, optimizer, plugins and position are the same in all processes. What is each one's own is under "ranks"; to
    collect it, all of them must call this.
    """
    own = {"meters": run.meters.state_dict(), "data": {name: feed.state_dict() for name, feed in run.feeds.items()},
           "random": random_state(run.train, run.valid)}
    if run.world_size > 1:
        own = mapped(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, own)
    with unlayered():
        optimizer = run.optimizer.state_dict()
    return {
        "loopctl": 1,
        "config": run.config or config(run),
        "model": run.model.state_dict(),
        "optimizer": {"class": type(run.optimizer).__name__, "defaults": defaults(run), **optimizer},
        "plugins": {name: plugin.state_dict() for name, plugin in stateful(run).items()},
        "composition": composition(run),
        "parameters": parameters(run),
        "samples": run.feeds["train"].size,
        "plan": list(run.plan()),
        "max_steps": run.max_steps,
        "position": {name: getattr(run, name) for name in POSITION},
        "ranks": gathered(run, own),
    }


def config(run: Run) -> dict[str, Any]:
    """What a run begun in Python was asked for, as the command line would say it."""
    asked = {name: getattr(run, name) for name in ("epochs", "max_steps", "eval_every", "steps_per_epoch")}
    plugins = []
    for name, plugin in run.hook.plugins.items():
        with suppress(UsageError):              # an option that has no text, such as a function within a function
            name = spec(name.partition(".")[0], plugin)
        plugins.append(name)
    return asked | {"plugin": plugins}


def restore(run: Run) -> None:
    """Load the state that `run.resume` names, random numbers last. Raises UsageError where it is another run's."""
    path = run.resume or Path()
    saved_here = run.hook.acting["safe_point"] and path.is_dir() and run.out.is_dir() and path.samefile(run.out)
    if (saved_here or restarts()) and not candidates(path):
        log.warning("%s has no checkpoint yet; beginning at the start", path)
        return
    file, saved = find(path, run.device)
    try:
        saved = put_in(run, saved, file.parent)
        if differences := told(run, compare(run, saved)):           # the first process has all the plugins
            raise UsageError(f"resume: {file} is of another run: {differences[0]}")
        load(run, saved)
        cut = saved["position"]["step"] >= saved["max_steps"] and within(saved)
        own = own_part(run, saved)
        for name in POSITION:
            setattr(run, name, saved["position"][name])
        run.meters = Meters(run.metric_fns["train"], "train_")
        run.meters.load_state_dict(own["meters"])
        for name, feed in run.feeds.items():
            feed.load_state_dict(own["data"][name])
        set_random_state(own["random"], run.train, run.valid)
    except (UsageError, torch.OutOfMemoryError):
        raise
    except Exception as error:                      # a plugin may raise anything over a state that is not its own
        raise UsageError(f"resume: {file} cannot be loaded ({type(error).__name__}: {one_line(error)})") from error
    if cut and not run.batch and not run.over:
        raise UsageError(f"resume: {file} ended within an epoch, at max_steps={saved['max_steps']}, so what it did "
                         "at the epoch's end came too early to go on; begin a new run from its weights")
    run.saved = file


def within(saved: dict[str, Any]) -> bool:
    """Whether the last of its epochs ended before its data did."""
    return saved["position"]["seen"] % saved["plan"][1] != 0


def roll_back(run: Run) -> None:
    """Put the model, the optimizer and the plugins back to the last checkpoint, which is `run.saved` if that is whole.

    Position, history and random numbers stay as they are.
    """
    assert run.saved
    run.saved, saved = find(run.saved.parent, run.device)
    load(run, put_in(run, saved, run.saved.parent))


def load(run: Run, saved: dict[str, Any]) -> None:
    run.model.load_state_dict(saved["model"])
    with unlayered():
        run.optimizer.load_state_dict({key: saved["optimizer"][key] for key in ("state", "param_groups")})
    for name, plugin in stateful(run).items():
        if run.rank == 0 or not getattr(plugin, "on_first_rank", False):
            plugin.load_state_dict(saved["plugins"][name])


def compare(run: Run, saved: dict[str, Any]) -> list[str]:
    """What `saved` differs in from `run`, so that it cannot go on there."""
    found = [f"{key} is {was} there and {run.config[key]} here" for key, was in saved["config"].items()
             if key in run.config and key not in FREE and str(was) != str(run.config[key])]
    there, here = saved["model"], run.model.state_dict()
    found += differ("the model has {}", there, here)
    found += [f"the model's {name} is {shape(there[name])} there and {shape(here[name])} here"
              for name in here if name in there and shape(here[name]) != shape(there[name])]

    kinds = saved["optimizer"]["class"], type(run.optimizer).__name__
    sizes = [[len(group) for group in one] for one in (saved["parameters"], parameters(run))]
    if kinds[0] != kinds[1]:
        found.append("the optimizer is {} there and {} here".format(*kinds))
    else:
        there, here = saved["optimizer"]["defaults"], defaults(run)
        found += [f"the optimizer's {key} is {there.get(key)} there and {here[key]} here"
                  for key in here if str(there.get(key)) != str(here[key])]
    if sizes[0] != sizes[1]:
        found.append("the optimizer has parameter groups of {} parameters there and of {} here".format(*sizes))
    elif saved["parameters"] != parameters(run):
        found.append("the optimizer has other parameters there than here, or in another order")

    orders = saved["composition"], composition(run)
    found += differ("there is the plugin {}", {*orders[0], *saved["plugins"]}, {*orders[1], *stateful(run)})
    if not found and orders[0] != orders[1]:
        found.append("the plugins act in the order {} there and {} here".format(*map(", ".join, orders)))

    first = saved["ranks"][0]
    found += differ("there is the metric {}", first["meters"].keys() - {""}, run.metric_fns["train"])
    judged = saved["position"]["metrics"], run.metrics
    found += differ("there is {}", *({"validation data"} if "val_loss" in one else () for one in judged))
    if saved["plan"] != list(run.plan()) and len(saved["ranks"]) == run.world_size:
        found.append("an epoch has {} steps and {} batches there, ".format(*saved["plan"])
                     + "{} and {} here; keep data, batch size and accumulation".format(*run.plan()))
    if saved["samples"] != run.feeds["train"].size:
        found.append("the training data has {1} samples in batches of {0} there, ".format(*saved["samples"])
                     + "{1} in batches of {0} here".format(*run.feeds["train"].size))
    own = len(first["random"]["generators"]), len(generators((run.train, run.valid)))
    if own[0] != own[1]:
        found.append("the data loaders have {} random generators of their own there and {} here".format(*own))
    return found


def differ(text: str, there: Iterable[str], here: Iterable[str]) -> list[str]:
    """`text` about what is only there, and about what is only here."""
    return [*listed(f"{text} there and not here", {*there} - {*here}),
            *listed(f"{text} here and not there", {*here} - {*there})]


def listed(text: str, items: Iterable[str]) -> list[str]:
    """`text` about the first of `items`, if there are any."""
    items = sorted(items)
    few = items[:3] + ([f"{len(items) - 3} more"] if len(items) > 3 else [])
    return [text.format(names(few))] if items else []


def shape(value: Any) -> str:
    return "x".join(map(str, value.shape)) or "a scalar" if isinstance(value, torch.Tensor) else "no tensor"


def parameters(run: Run) -> list[list[str]]:
    """The names of the parameters in each of the optimizer's groups."""
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    return [[names.get(id(parameter), "") for parameter in group["params"]] for group in run.optimizer.param_groups]


def defaults(run: Run) -> dict[str, Any]:
    """What the optimizer was made with, but for how it computes, which is the device's affair."""
    return {key: value for key, value in run.optimizer.defaults.items()
            if key not in ("foreach", "fused", "capturable", "differentiable")}


def stateful(run: Run) -> dict[str, Any]:
    return {name: plugin for name, plugin in run.hook.plugins.items() if hasattr(plugin, "state_dict")}


def composition(run: Run) -> list[str]:
    """The plugins that have a say in what is trained, in their order."""
    shaping = {name for hook in SHAPING for name in run.hook.acting[hook]}
    return [name for name, plugin in run.hook.plugins.items()
            if name in shaping and not getattr(plugin, "looks_on", False)]


def check(run: Run) -> None:
    """Refuse, with UsageError, state that no checkpoint can hold. Call it when every plugin has had its start."""
    parts = {f"plugin {name}": plugin.state_dict() for name, plugin in stateful(run).items()}
    parts |= {f"metric {name}": one for name, one in run.meters.state_dict().items() if name}
    parts["model"] = {name: one for name, one in run.model.state_dict().items()
                      if type(one) not in (torch.Tensor, nn.Parameter)}
    with unlayered():
        parts["optimizer"] = run.optimizer.state_dict()["param_groups"]
    for who, part in taken_out(parts)[0].items():
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


def find(path: Path, device: Any = "cpu") -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint that `path` means and its content: a file, a folder of checkpoints, or a run's folder.

    One that is damaged is passed over, with a line that says so, for the one before it. Raises UsageError where there
    is none.
    """
    if not (tried := candidates(path)):
        raise UsageError(f"resume={path}: no checkpoint there; a run's folder has them in checkpoints/")
    said: list[str] = []
    for file in tried:
        try:
            saved = read(file, device)
            check_layout(saved)
            if "pieces" in saved and not (file.parent / saved["pieces"] / ".metadata").exists():
                raise Damaged(f"misses its pieces in {saved['pieces']}")
        except Damaged as error:
            said.append(f"{file} {error}")
        else:
            for line in said:
                log.warning("%s; going on from %s", line, file.name)
            return file, saved
    more = f", and neither is any of the {len(said) - 1} before it whole" if len(said) > 1 else ""
    raise UsageError(f"resume={path}: {said[0]}{more}; begin a new run")


def check_layout(saved: dict[str, Any]) -> None:
    """Raise Damaged where a file with a right checksum is not what `state` returns."""
    wrong = [name for name, kind in LAYOUT.items() if not isinstance(saved.get(name), kind)]
    wrong += [name for name, kind in POSITION.items()
              if not wrong and not isinstance(saved["position"].get(name), kind)]
    if wrong:
        raise Damaged(f"has no right {wrong[0]!r}, so it is no checkpoint that this version of loopctl reads")


def candidates(path: Path) -> list[Path]:
    """The checkpoints that `path` means, the furthest first."""
    return [path] if path.is_file() else numbered(path) or numbered(path, "*/")


def numbered(folder: Path, below: str = "") -> list[Path]:
    """The checkpoints in `folder`, the furthest first."""
    found = [file for file in folder.glob(f"{below}step-*.pt") if number(file) >= 0]
    return sorted(found, key=lambda file: (number(file), file), reverse=True)


def number(file: Path) -> int:
    """The N of step-N.pt, which is how many updates were planned until then; -1 for other files."""
    digits = re.match(r"step-(\d+)\.pt", file.name)
    return int(digits[1]) if digits else -1
