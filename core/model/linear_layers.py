"""The linear layers of a model, and layers that take their places for the time of a run, with the same parameters."""
from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from loopctl.errors import UsageError
from loopctl.model.macs import FORMULAS, linear
from loopctl.model.parameter_matching import matches


def linear_layers(model: nn.Module, patterns: Iterable[str] = ()) -> dict[str, nn.Linear]:
    """Return, by name, the linear layers of `model` that a pattern matches, or all of them without patterns.

    Only layers of the class torch.nn.Linear itself: one of a subclass computes something else, or, as the last one of
    attention, its forward is not called. Raises UsageError where a pattern matches none, or nothing is found.
    """
    named = {name: module for name, module in model.named_modules(remove_duplicate=False) if type(module) is nn.Linear}
    if not named:
        raise UsageError("the model has no linear layer (torch.nn.Linear)")
    if "" in named:
        raise UsageError("the model is a linear layer itself, which nothing can take the place of; put it into an "
                         "nn.Sequential")
    for pattern in patterns:
        if not any(matches(name, pattern) for name in named):
            some = ", ".join([*named][:8]) + (" ..." if len(named) > 8 else "")
            raise UsageError(f"no linear layer matches {pattern!r}; the model's linear layers are {some}")
    wanted = list(patterns)
    return {name: module for name, module in named.items()
            if not wanted or any(matches(name, pattern) for pattern in wanted)}


def complete(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Finish what a library did that has replaced `layers`, of which it replaces some only under their first name.

    The new ones get all places, the hooks and the mode of the old ones, and a formula for their multiply-adds.
    """
    found = {name: model.get_submodule(name) for name in layers}
    new = {layer: found[name] for name, layer in reversed(layers.items()) if found[name] is not layer}
    for name, layer in layers.items():
        module = new[layer]
        vars(module).update({key: value for key, value in vars(layer).items() if "_hooks" in key or key == "training"})
        FORMULAS.setdefault(type(module).forward, linear)
        set_module(model, name, module)


def put_back(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Put `layers` in their places again, with the parameters and the mode of what has those now."""
    for name, layer in layers.items():
        module = model.get_submodule(name)
        layer._parameters.update(module._parameters)
        layer.training = module.training
        set_module(model, name, layer)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
