"""Activation checkpointing: compute activations again in the backward pass instead of storing them."""
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from loopctl import Run, UsageError, hookimpl
from loopctl.model import summary
from loopctl.model.own_names import own_modules

# That results which a policy stores are counted and offloaded as others are; an argument of newer versions of torch.
ROUTED = {name: True for name in signature(checkpoint).parameters if name == "respect_saved_tensors_hooks"}


@dataclass(eq=False)
class ActivationCheckpointing:
    """Store only the inputs of blocks for the backward pass, which computes the blocks again.

    Same as torch.utils.checkpoint with use_reentrant=False; from arXiv:1604.06174. It takes less memory and about a
    third more time. The run is the same, to the bit, also with dropout: the second computation has the random numbers
    and the buffers of the first, so that BatchNorm counts a batch once. The modules stay as they are, with their names,
    and a resumed run may add the plugin or leave it out. On a CPU it saves memory too.

    modules: what to compute again: names of modules, or globs (layers.*); if left out, each repeated block of the
        model, such as the layers of a transformer. Of modules inside of each other, the outer ones
    every: only every so many of these modules; 2 is the second, the fourth and so on
    save: operators of torch.ops.aten whose results are stored all the same, such as mm and
        _scaled_dot_product_flash_attention; all others are computed again
    """

    modules: list[str] = field(default_factory=list)
    every: int = 1
    save: list[str] = field(default_factory=list)
    observer_only: ClassVar[bool] = True
    topic = "precision and speed"

    def __post_init__(self) -> None:
        for name in ("modules", "save"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} takes a list, not {getattr(self, name)!r}")
        if self.every < 1:
            raise ValueError(f"every is at least 1, not {self.every}")
        for name in self.save:
            if not isinstance(getattr(torch.ops.aten, name, None), torch._ops.OpOverloadPacket):
                raise ValueError(f"torch.ops.aten has no operator {name!r}; use one such as mm, addmm or convolution")

    # A hook that a CUDA graph cannot capture, as it cannot restore random numbers within a step.
    @hookimpl
    def wrap_model(self, run: Run) -> None:
        found = self.matching(run.model)
        self.blocks = found[self.every - 1::self.every]
        if not self.blocks:
            raise UsageError(f"every={self.every}, and there are {len(found)} modules; use a smaller number")
        for block in self.blocks:
            if isinstance(block, torch.jit.ScriptModule):
                raise UsageError(f"a {block.original_name} is a ScriptModule, which cannot be computed again; name "
                                 "other modules")
        eager = [name for name, plugin in run.hook.plugins.items() if getattr(plugin, "backend", "") == "eager"]
        if eager and any(copies_of_buffers(block) for block in self.blocks):
            raise UsageError(f"{eager[0]}:backend=eager changes buffers, such as BatchNorm's, twice where a module is "
                             "computed again; use backend=aot_eager")

    def matching(self, model: nn.Module) -> list[nn.Module]:
        """The modules to choose from, in the model's order."""
        if not self.modules:
            if found := summary.repeated_blocks(model):
                return found
            raise UsageError("the model has no repeated blocks; name what to compute again, with modules=...")
        named = {name: module for name, module in own_modules(model) if name}
        for pattern in self.modules:
            if not any(fnmatchcase(name, pattern) for name in named):
                some = ", ".join([*named][:8]) + (" ..." if len(named) > 8 else "")
                raise UsageError(f"no module matches {pattern!r}; the model's modules are {some}")
        chosen = [module for name, module in named.items() if any(fnmatchcase(name, each) for each in self.modules)]
        inner = {part for module in chosen for part in module.modules() if part is not module}
        return [module for module in chosen if module not in inner]         # which the outer one computes again

    @hookimpl(wrapper=True)
    def train(self) -> Generator[None, None, None]:
        before = [block.__dict__.get("forward") for block in self.blocks]
        operators = [getattr(packet, overload) for name in self.save
                     for packet in [getattr(torch.ops.aten, name)] for overload in packet.overloads()]
        policy = partial(create_selective_checkpoint_contexts, operators) if operators else None
        try:
            for block in self.blocks:
                block.forward = Recomputed(block, policy)
            return (yield)
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward


class Recomputed:
    """The forward method of a block whose activations are computed again. A copy of the block has a copy of it."""

    def __init__(self, block: nn.Module, policy: Callable[[], Any] | None) -> None:
        self.block, self.forward = block, block.forward
        self.settings: dict[str, Any] = {"context_fn": policy} | ROUTED if policy else {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        before: list[tuple[dict[str, Any], str, Tensor]] = []
        first = True

        def compute(*args: Any, **kwargs: Any) -> Any:
            nonlocal before, first
            if torch.compiler.is_compiling():           # the code that is compiled changes the buffers once
                return self.forward(*args, **kwargs)
            if first:
                before, first = copies_of_buffers(self.block), False
                return self.forward(*args, **kwargs)
            with buffers_as(before):
                return self.forward(*args, **kwargs)

        return checkpoint(compute, *args, use_reentrant=False, **self.settings, **kwargs)


def copies_of_buffers(block: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Copies of the buffers of `block`, each with the dict and the name under which its module has it."""
    return [(module._buffers, name, buffer.detach().clone()) for module in block.modules()
            for name, buffer in module._buffers.items() if buffer is not None]


@contextmanager
def buffers_as(values: list[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    """Put `values` in place of the buffers inside the block; afterwards the buffers are what they were."""
    own = [(owner, name, owner[name]) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            owner[name] = value.clone()         # there may be a third computation
        yield
    finally:
        for owner, name, buffer in own:
            owner[name] = buffer
