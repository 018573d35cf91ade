"""The output of every module in a forward pass, and the gradient of the loss with respect to it."""
from __future__ import annotations

import zlib
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loopctl.data.batch import iter_tensors
from loopctl.model.own_names import own_modules
from loopctl.tape.fingerprint import fingerprint
from loopctl.tape.observations import Observations

MAX_CALLS = 16          # of a module in an update, such as one per micro-batch or per token, that are recorded


class ModuleWatch:
    """Fingerprints of what the modules of a model return in one update, by hooks that `close` removes.

    Only calls count whose call of the whole model computes gradients. A forward pass that activation checkpointing
    repeats within a backward pass is no further call.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.outputs: dict[str, Tensor] = {}        # by module, and the number of its call where that is not the first
        self.gradients: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self.measured: bool | None = None           # whether the call of the model under way counts
        self.handles: list[Any] = [
            module.register_forward_hook(partial(self.returned, name or "model"))
            for name, module in own_modules(model) if not isinstance(module, torch.jit.ScriptModule)]  # it has no hooks
        if not isinstance(model, torch.jit.ScriptModule):
            self.handles += [model.register_forward_pre_hook(self.begins),
                             model.register_forward_hook(self.ended, always_call=True)]

    def begins(self, model: nn.Module, arguments: Any) -> None:
        self.measured = torch.is_grad_enabled()

    def ended(self, model: nn.Module, arguments: Any, output: Any) -> None:
        self.measured = None

    def returned(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        measured = torch.is_grad_enabled() if self.measured is None else self.measured
        if not measured or in_backward() or in_transform():
            return
        self.calls[name] += 1
        number = self.calls[name]
        if number > MAX_CALLS:
            return
        for index, tensor in enumerate(iter_tensors(output)):
            label = name + f" output {index}" * (index > 0) + f" call {number}" * (number > 1)
            self.outputs[label] = fingerprint([[tensor]], self.device)
            if tensor.requires_grad:
                self.handles.append(tensor.register_hook(partial(self.gradient, label)))

    def gradient(self, label: str, gradient: Tensor) -> None:
        self.gradients.setdefault(label, fingerprint([[gradient]], self.device))

    def close(self, observed: Observations) -> None:
        """Remove the hooks, and add what was seen."""
        self.remove()
        for what, found in (("outputs", self.outputs), ("output gradients", self.gradients)):
            if found:
                observed.fingerprints(what, "", tuple(found), torch.cat([*found.values()]))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def in_backward() -> bool:
    """Whether a backward pass is under way."""
    return torch._C._current_graph_task_id() != -1


def in_transform() -> bool:
    """Whether a function transform such as `torch.func.grad` is under way, whose tensors must not be kept."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class Modes:
    """Which modules of a model are in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.named = dict(own_modules(model))
        self.modules = list(self.named.values())
        self.last = -1
        self.in_eval_mode: list[str] = []

    def observe(self, observed: Observations) -> None:
        """Add a checksum of the modes, and the names of modules in evaluation mode, of 20 at most.

        Those whose class is called after dropout or a normalization come first, for their mode matters.
        """
        found = zlib.crc32(bytes(module.training for module in self.modules))
        if found != self.last:
            names = [name for name, module in self.named.items() if not module.training]
            self.in_eval_mode = [name or "model" for name in sorted(names, key=self.has_no_mode)][:20]
        self.last = found
        observed.values |= {"modes": found, "in_eval_mode": self.in_eval_mode}

    def has_no_mode(self, name: str) -> bool:
        kind = type(self.named[name]).__name__
        return "Drop" not in kind and "Norm" not in kind
