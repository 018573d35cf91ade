"""The user's own names of parameters, buffers and modules, where a plugin has wrapped submodules of the model.

torch's wrappers for activation checkpointing, compilation and sharding hold the module that they wrap as a submodule,
whose name then occurs in the names of everything in it: `layer1._checkpoint_wrapped_module.weight`. Everything that has
names (checkpoints, files of weights, patterns, averages, summaries) takes them from here, so that it can be written
with the wrappers and read without them.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

# The attribute in which each of torch's wrappers holds what it wraps: CheckpointWrapper and OffloadWrapper,
# OptimizedModule (torch.compile), FullyShardedDataParallel.
WRAPPED = frozenset({"_checkpoint_wrapped_module", "_orig_mod", "_fsdp_wrapped_module"})


def own_name(name: str) -> str:
    """A name without the parts that wrappers have added."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def own_names(names: Iterable[str]) -> dict[str, str]:
    """The own name of each of `names`; all as they are where two would be the same, so that nothing is lost."""
    found = {name: own_name(name) for name in names}
    return found if len({*found.values()}) == len(found) else {name: name for name in found}


def by_own_names(named: dict[str, Any]) -> dict[str, Any]:
    """The values of `named` under their own names; `named` itself where nothing is wrapped."""
    names = own_names(named)
    return named if all(name == own for name, own in names.items()) else {names[name]: named[name] for name in named}


def own_parameters(module: nn.Module, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """What `named_parameters()` yields, by own names."""
    return by_own_names(dict(module.named_parameters(remove_duplicate=remove_duplicate)))


def own_buffers(module: nn.Module) -> dict[str, Tensor]:
    """What `named_buffers()` yields, by own names."""
    return by_own_names(dict(module.named_buffers()))


def own_modules(module: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `named_modules()` does, by own names and without the wrappers themselves."""
    for name, part in module.named_modules(remove_duplicate=remove_duplicate):
        if WRAPPED.isdisjoint(part._modules.keys()):
            yield own_name(name), part


def own_children(module: nn.Module) -> list[nn.Module]:
    """What `children()` yields, each without the wrappers around it."""
    return [unwrapped(child) for child in module.children()]


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of the wrappers around it; itself where there are none."""
    while inner := next((part for name, part in module._modules.items() if name in WRAPPED), None):
        module = inner
    return module


def own_state_dict(module: nn.Module, keep_vars: bool = False) -> dict[str, Any]:
    """What `state_dict()` returns, by own names."""
    return by_own_names(module.state_dict(keep_vars=keep_vars))


def load_own_state_dict(module: nn.Module, state: dict[str, Any], strict: bool = True) -> None:
    """Do what `load_state_dict()` does, with values by own names."""
    names = {own: name for name, own in own_names(module.state_dict()).items()}
    if any(own != name for own, name in names.items()):
        state = {names.get(name, name): value for name, value in state.items()}
    module.load_state_dict(state, strict=strict)
