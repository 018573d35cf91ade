"""Agreement of the processes of a run: a run whose processes were started differently is refused before it trains.

What only one process needs, or what may differ, is left out: the rank, the index of the device, the run's folder,
plugins with `rank_zero_only`, and the options of plugins with `observer_only`.
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from itertools import count
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset

from loopctl.data.batch import length_or_none
from loopctl.data.limits import Limited
from loopctl.distributed.process_group import all_gather, all_reduce_sum, is_single_process
from loopctl.errors import UsageError, counted, names
from loopctl.model.own_names import own_buffers, own_modules, own_parameters
from loopctl.optim.several import each_optimizer

if TYPE_CHECKING:
    from loopctl.run import Run

# Keys of run.config that may differ between hosts, or that are compared as plugins.
MAY_DIFFER = ("data_root", "devices", "download", "plugin", "without", "workers")


def require_same(run: Run, describe: Callable[[Run], dict[str, str | None]]) -> None:
    """Raise UsageError in all processes unless `describe(run)` is equal in all of them. All processes must call it.

    describe: returns values as text, by name; the first name that differs is reported with the values and their ranks
    """
    if is_single_process(run):
        return
    items = {name: value for name, value in describe(run).items() if value is not None}
    digest = sha256(repr(sorted(items.items())).encode()).hexdigest()       # usually all that is exchanged
    if len(set(all_gather(run, digest))) == 1:
        return
    by_rank = all_gather(run, items)
    differing = [name for name in dict.fromkeys(name for found in by_rank for name in found)
                 if len({found.get(name) for found in by_rank}) > 1]
    name, *more = differing
    ranks: dict[str | None, list[str]] = {}
    for rank, found in enumerate(by_rank):
        ranks.setdefault(found.get(name), []).append(str(rank))
    told = [f"process{'es' * (len(group) > 1)} {names(group)} ha{'ve' if len(group) > 1 else 's'} "
            + (f"no {name}" if value is None else f"{name} {value}") for value, group in reversed(ranks.items())]
    also = f" (other differences: {names(more[:3] + [f'{len(more) - 3} more'] * (len(more) > 3))})" if more else ""
    raise UsageError(f"{names(told)}{also}; start all processes with the same options")


def describe_run(run: Run) -> dict[str, str | None]:
    """Describe what is asked for: the versions, the fields of the run, the plugins with their options, the data."""
    found: dict[str, str | None] = {
        "torch": torch.__version__, "loopctl": version("loopctl"), "device": run.device.type,
        "plugins": ", ".join(name for name, plugin in run.hook.plugins.items() if not needed_once(plugin))}
    for name, plugin in run.hook.plugins.items():
        if dataclasses.is_dataclass(plugin) and not (needed_once(plugin) or getattr(plugin, "observer_only", False)):
            found |= {f"{name}:{field.name}": describe_value(getattr(plugin, field.name))
                      for field in dataclasses.fields(plugin) if field.init}
    for name in ("epochs", "max_steps", "eval_every", "steps_per_epoch", "reduction"):
        value = getattr(run, name)
        found[name] = None if value in (None, inf) else str(value)
    return found | {
        "seed": None if run.seed is None else str(run.seed), "metrics": ", ".join(run.metric_fns.get("train", ())),
        "valid": None if run.valid is None else type(run.valid).__name__,
        "default dtype": str(torch.get_default_dtype()), "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled())}


def needed_once(plugin: Any) -> bool:
    return getattr(plugin, "rank_zero_only", False)


def describe_data(name: str, data: Any, shard: bool) -> dict[str, str | None]:
    """Describe `data`, which the run shards if `shard` is true; if not, only the number of batches must be equal."""
    found: dict[str, Any] = {f"{name} batches": length_or_none(data)}
    if shard and not isinstance(getattr(data, "sampler", None), DistributedSampler):
        found |= {f"{name} batch size": getattr(data, "batch_size", None),
                  f"{name} samples": length_or_none(getattr(data, "dataset", None)),
                  f"{name} drop_last": getattr(data, "drop_last", None),
                  f"{name} sampler": type(data.sampler).__name__ if hasattr(data, "sampler") else None}
    return {key: None if value is None else str(value) for key, value in found.items()}


def require_distinct_samplers(run: Run) -> None:
    """Raise UsageError in all processes if two of them have a DistributedSampler for the same part of train."""
    sampler = getattr(run.train, "sampler", None)
    part = (sampler.rank, sampler.num_replicas) if isinstance(sampler, DistributedSampler) else None
    parts = [found for found in all_gather(run, part) if found]
    if len(set(parts)) < len(parts) or any(replicas != run.world_size for _, replicas in parts):
        given = [f"rank {rank} of {replicas}" for rank, replicas in parts]
        raise UsageError(f"train has a DistributedSampler for {names(given)} in the processes of the run, by rank; "
                         "pass it each process's own rank, or leave it out, as the run shards the data")


def describe_model(run: Run) -> dict[str, str | None]:
    """Describe the configuration, the loss function, and the modules, parameters and buffers of the model."""
    found: dict[str, str | None] = {key: str(value) for key, value in run.config.items() if key not in MAY_DIFFER}
    found |= {"loss_fn": describe_value(run.loss_fn), "forward": describe_value(run.forward),
              "model": type(run.model).__name__}
    if isinstance(run.loss_fn, nn.Module):      # such as its label smoothing, which its extra_repr does not show
        found |= {f"loss_fn {key}": str(value) for key, value in vars(run.loss_fn).items()
                  if isinstance(value, bool | int | float | str) and key != "training"}
    for prefix, root in (("", run.model), ("loss_fn.", run.loss_fn)):
        if isinstance(root, nn.Module):
            found |= {f"module {prefix}{name}": describe_module(part) for name, part in own_modules(root) if name}
            for kind, tensors in (("parameter", own_parameters(root)), ("buffer", own_buffers(root))):
                found |= {f"{kind} {prefix}{name}": describe_tensor(tensor) for name, tensor in tensors.items()}
    return found


def describe_module(module: nn.Module) -> str:
    text = ""
    with suppress(Exception):           # a user's own extra_repr may raise anything
        text = re.sub(r" at 0x\w+|(?<=cuda):\d+", "", module.extra_repr())      # addresses and indices of devices
    return f"{type(module).__name__}({text})"


def describe_tensor(tensor: Tensor) -> str:
    shape = "of unknown shape" if is_lazy(tensor) else tuple(tensor.shape)
    frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    return f"{shape} {str(tensor.dtype).removeprefix('torch.')}{' frozen' * frozen}"


def describe_optimizer(run: Run) -> dict[str, str | None]:
    """Describe the class of the optimizer and its parameter groups."""
    found: dict[str, str | None] = {"optimizer": names([type(one).__name__ for one in each_optimizer(run.optimizer)])}
    groups = run.optimizer.param_groups
    for number, group in enumerate(groups):
        of_group = f" of parameter group {number}" if len(groups) > 1 else ""
        found |= {f"{key}{of_group}": describe_value(value) for key, value in group.items()
                  if key not in ("params", "initial_lr")}
        found[f"number of parameters{of_group}"] = str(len(group["params"]))
    return found


def describe_value(value: Any) -> str:
    """Return a text that is equal in two processes for equal plain values and functions; else the name of the type."""
    if value is None or isinstance(value, bool | int | float | complex | str | Path | torch.dtype):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        texts = [describe_value(item) for item in value]
        return f"({', '.join(sorted(texts) if isinstance(value, set | frozenset) else texts)})"
    if isinstance(value, dict):
        return f"({', '.join(f'{key}={describe_value(item)}' for key, item in value.items())})"
    if isinstance(value, partial):
        return f"{describe_value(value.func)}{describe_value([*value.args, value.keywords])}"
    if hasattr(value, "tolist") and getattr(value, "size", None) is not None:          # a tensor or an array
        small = (value.numel() if isinstance(value, Tensor) else value.size) <= 8
        return str(value.tolist()) if small else f"{type(value).__name__} of shape {tuple(value.shape)}"
    return getattr(value, "__qualname__", type(value).__qualname__)


def length_is_certain(data: Any) -> bool:
    """Return whether a pass over `data` has as many batches as its length says, so that no process can run out of them
    before the others. The length of a stream or of a user's own sampler may be unknown, or an estimate."""
    if isinstance(data, Limited):
        return length_is_certain(data.batches)
    if isinstance(data, list | tuple):
        return True
    sampler = getattr(data, "batch_sampler", None)
    sampler = sampler.batches if isinstance(sampler, Limited) else sampler
    return (isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset)
            and type(sampler) is BatchSampler and type(data.sampler).__module__.startswith("torch.utils."))


def groups_in_step(run: Run, batches: Iterable[Any], groups: Iterator[list[Any]]) -> Iterator[list[Any]]:
    """Yield the `groups` of batches, one per step, while all processes have one.

    Raises UsageError in all processes when some have no more and others do: these would wait for the first for ever.
    Numbers in place of batches, with which a run is planned, are not exchanged.
    """
    if isinstance(batches, count | type(iter(range(0)))):
        yield from groups
        return
    for step in count(1):
        group = next(groups, None)
        having = all_reduce_sum(run, float(group is not None))
        if 0 < having < run.world_size:
            ended = [str(rank) for rank, has in enumerate(all_gather(run, group is not None)) if not has]
            several = len(ended) > 1
            raise UsageError(f"process{'es' * several} {names(ended)} ha{'ve' if several else 's'} no batches left "
                             f"after {counted(step - 1, 'step')} of a pass over train, and the others have; give "
                             "every process equally many, or pass steps_per_epoch=... that all of them reach")
        if group is None:
            return
        yield group
