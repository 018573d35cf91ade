"""Gradient centralization: each output unit's gradient has the mean zero."""
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch

from loopctl import Run, hookimpl
from loopctl.checkpoint.sharded_tensors import local_rows
from loopctl.model.gradients import parameters_with_gradients, require_dense_gradients


@dataclass(eq=False)
class GradCentralize:
    """Subtract from the gradient of each output unit its mean over the unit's weights.

    Gradient centralization, arXiv:2004.01461. A unit is a row of a matrix or a filter of a convolution; vectors, such
    as biases, are left as they are. It acts before other plugins, such as clip, change the gradients, whatever their
    order. With spike, the one that is given first acts first.

    gc_conv_only: leave out what has fewer than four dimensions, so that only two-dimensional convolutions are changed
    """

    gc_conv_only: bool = False
    capturable: ClassVar[bool] = True
    topic = "gradients"

    @hookimpl
    def train_start(self, run: Run) -> None:
        require_dense_gradients(run)

    # A wrapper, so that clipping, wherever it is in the order, sees these gradients.
    @hookimpl(wrapper=True)
    def grads_ready(self, run: Run) -> Generator[None, None, None]:
        self.centralize(run)
        return (yield)

    @torch.no_grad()
    def centralize(self, run: Run) -> None:
        gradients = [local_rows(parameter.grad) for parameter in parameters_with_gradients(run)
                     if parameter.ndim > (3 if self.gc_conv_only else 1)]
        if gradients:
            torch._foreach_sub_(gradients, [gradient.mean([*range(1, gradient.ndim)], keepdim=True)
                                            for gradient in gradients])
