"""Features: the outputs of modules inside two models, recorded in their forward passes and compared in pairs."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from loopctl.errors import UsageError, counted
from loopctl.model.own_names import own_modules


class FeaturePairs:
    """Modules of a model, each with a module of a teacher whose output its own should equal.

    features: names or globs of modules of the model, and for each one of modules of the teacher; those that match are
        paired in order. Raises UsageError where they cannot be paired.
    """

    def __init__(self, features: dict[str, str], model: nn.Module, teacher: nn.Module) -> None:
        self.names: list[str] = []                                      # of the modules of the model
        self.modules: list[tuple[nn.Module, nn.Module]] = []
        self.found: tuple[dict[int, Any], dict[int, Any]] = {}, {}      # the last outputs of both models, by pair
        for pattern, other in features.items():
            own, theirs = matching_modules(model, pattern), matching_modules(teacher, other)
            if not own or len(own) != len(theirs):
                raise UsageError(f"features: {pattern!r} matches {counted(len(own), 'module')} of the model, and "
                                 f"{other!r} {counted(len(theirs), 'module')} of the teacher; they are paired in "
                                 "order, so match as many, at least one")
            self.names += own
            self.modules += zip(own.values(), theirs.values(), strict=True)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the outputs of the modules in the block, until `clear`."""
        with ExitStack() as hooks:
            for number, modules in enumerate(self.modules):
                for module, found in zip(modules, self.found, strict=True):
                    hooks.callback(module.register_forward_hook(partial(record, found, number)).remove)
            yield

    def error(self) -> Tensor:
        """The sum of the mean squared errors of all pairs. Raises UsageError where a pair cannot be compared."""
        errors = []
        for number, name in enumerate(self.names):
            own, target = (found.get(number) for found in self.found)
            if not isinstance(own, Tensor) or not isinstance(target, Tensor) or own.shape != target.shape:
                raise UsageError(f"features: {name} gives {described(own)} in the model and {described(target)} in the "
                                 "teacher; name modules that are called, and give tensors of the same shape")
            errors.append(mse_loss(own, target))
        return torch.stack(errors).sum()

    def clear(self) -> None:
        for found in self.found:
            found.clear()


def matching_modules(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    """The modules inside `model` whose names match a glob, in order."""
    return {name: module for name, module in own_modules(model) if name and fnmatchcase(name, pattern)}


def record(found: dict[int, Any], number: int, module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook: remember the output of a module, of several the first."""
    found[number] = output[0] if isinstance(output, tuple) else output


def described(value: Any) -> str:
    """The shape of a tensor, or the type of another value, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "nothing" if value is None else f"a {type(value).__name__}"
