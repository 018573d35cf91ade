"""Channels-last memory format (NHWC) for images and convolutions."""
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from loopctl import Run, hookimpl


@dataclass(eq=False)
class ChannelsLast:
    """Store images and convolution weights in the channels-last memory format.

    Same as `model.to(memory_format=torch.channels_last)`, and the same for every batch. It is faster on GPUs with half
    precision (the amp plugin), and on most CPUs. Shapes, names and checkpoints do not change; results differ by
    rounding. The model keeps the format after the run.
    """

    topic = "precision and speed"

    @hookimpl(wrapper=True)
    def setup(self, run: Run) -> Generator[None, None, None]:       # a wrapper: runs after plugins that add layers
        yield
        for tensor in (*run.model.parameters(), *run.model.buffers()):
            tensor.data = to_channels_last(tensor.data)     # in place: optimizers and averages refer to the parameter

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        # A hook on the model itself also runs when a compiled or replicated network calls the model.
        handle = run.model.register_forward_pre_hook(convert_inputs, with_kwargs=True)
        try:
            return (yield)
        finally:
            handle.remove()


def convert_inputs(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The forward pre-hook: convert every image among the inputs, at any nesting."""
    return tree_map_only(Tensor, to_channels_last, (args, kwargs))


def to_channels_last(tensor: Tensor) -> Tensor:
    """Return a 4-D floating-point tensor in the channels-last format, and any other tensor unchanged."""
    if tensor.dim() == 4 and tensor.is_floating_point():
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
