"""Offloading of activations: keep what the backward pass needs in the memory of the host."""
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks

from loopctl import Run, hookimpl


@dataclass(eq=False)
class OffloadActivations:
    """Keep what forward passes store for the backward pass in the memory of the host.

    Same as torch.autograd.graph.save_on_cpu, with pinned memory on CUDA. The run is the same, to the bit. It takes less
    memory of the device, and time to copy. What is in memory anyway, parameters and buffers, is not copied. With
    activation_checkpointing, the inputs of the blocks are offloaded. On a CPU nothing is copied.
    """

    observer_only: ClassVar[bool] = True
    topic = "precision and speed"

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.own = {address(tensor) for tensor in (*run.model.parameters(), *run.model.buffers())}

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run) -> Generator[None, Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return (yield)
        copies: Any = save_on_cpu(pin_memory=run.device.type == "cuda")
        own = self.own

        def pack(tensor: Tensor) -> Any:
            return tensor if address(tensor) in own else copies.pack_hook(tensor)

        def unpack(packed: Any) -> Tensor:
            return packed if isinstance(packed, Tensor) else copies.unpack_hook(packed)

        with saved_tensors_hooks(pack, unpack):
            return (yield)


def address(tensor: Tensor) -> int:
    """Where the memory of a tensor, or of what it is a view of, begins; 0 for one that has none, or a sharded one."""
    dense = tensor.layout is torch.strided and not hasattr(tensor, "full_tensor")
    return tensor.untyped_storage().data_ptr() if dense else 0
