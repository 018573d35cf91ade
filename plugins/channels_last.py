"""Images stored pixel by pixel."""
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from loopctl import Run, hookimpl


@dataclass(eq=False)
class ChannelsLast:
    """Store images and the weights of convolutions pixel by pixel, as fast kernels take them.

    It is torch.channels_last, by hand `model.to(memory_format=torch.channels_last)` and the same for every batch. It
    pays on GPUs with half precision, amp, and on most CPUs. Shapes, names and checkpoints are the same; results differ
    by rounding. The model's weights stay so after the run.
    """

    @hookimpl(wrapper=True)
    def setup(self, run: Run) -> Generator[None, None, None]:       # a wrapper: after plugins that put in new layers
        yield
        for tensor in (*run.model.parameters(), *run.model.buffers()):
            tensor.data = channels_last(tensor.data)        # the same parameter, to optimizers and averages alike

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        # A hook of the model itself serves whoever calls it: training, evaluation, a compiled or replicated network.
        handle = run.model.register_forward_pre_hook(converted, with_kwargs=True)
        try:
            return (yield)
        finally:
            handle.remove()


def converted(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map_only(Tensor, channels_last, (args, kwargs))


def channels_last(tensor: Tensor) -> Tensor:
    """`tensor`, if it holds images or filters pixel by pixel."""
    image = tensor.dim() == 4 and tensor.is_floating_point()
    return tensor.contiguous(memory_format=torch.channels_last) if image else tensor
