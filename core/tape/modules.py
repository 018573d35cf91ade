"""The output of every module in a forward pass, and the gradient of the loss with respect to it."""
from __future__ import annotations

import zlib
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loopctl.data.batch import iter_tensors
from loopctl.model.own_names import own_modules
from loopctl.tape.fingerprint import fingerprint
from loopctl.tape.observations import Observations


class ModuleWatch:
    """Fingerprints of what the modules of a model return in one update, by hooks that `close` removes."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self.outputs: dict[str, Tensor] = {}        # by module, and the number of its call where that is not the first
        self.gradients: dict[str, Tensor] = {}
        self.handles = [module.register_forward_hook(partial(self.returned, name or "model"))
                        for name, module in own_modules(model) if not isinstance(module, torch.jit.ScriptModule)]

    def returned(self, name: str, module: nn.Module, arguments: Any, output: Any) -> None:
        for index, tensor in enumerate(iter_tensors(output)):
            label, number = f"{name} output {index}" if index else name, 2
            while label in self.outputs:
                label, number = f"{name} call {number}", number + 1
            self.outputs[label] = fingerprint([[tensor]], self.device)
            if tensor.requires_grad:
                tensor.register_hook(partial(self.gradient, label))

    def gradient(self, label: str, gradient: Tensor) -> None:
        self.gradients.setdefault(label, fingerprint([[gradient]], self.device))

    def close(self, observed: Observations) -> None:
        """Remove the hooks, and add what was seen."""
        for handle in self.handles:
            handle.remove()
        for what, found in (("outputs", self.outputs), ("output gradients", self.gradients)):
            if found:
                observed.fingerprints(what, "", tuple(found), torch.cat([*found.values()]))


class Modes:
    """Which modules of a model are in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.named = dict(own_modules(model))
        self.modules = list(self.named.values())
        self.last = -1

    def observe(self, observed: Observations) -> None:
        """Add a checksum of the modes, and the names of modules in evaluation mode where that has changed."""
        found = zlib.crc32(bytes(module.training for module in self.modules))
        observed.values["modes"] = found
        if found != self.last:
            observed.values["in_eval_mode"] = [name or "model" for name, module in self.named.items()
                                               if not module.training][:20]
        self.last = found
