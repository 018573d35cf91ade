"""Averaged weights: put them in place of a model's own for a while or for good; what plugins that average share."""
from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loopctl.hooks import hookimpl

if TYPE_CHECKING:
    from loopctl.run import Run


class WeightAverage:
    """Base class of plugins that average the weights. Evaluation uses the average, and training ends with it.

    What a plugin judges or saves in `after_evaluate` is the average too, so that the weights that are saved are those
    that were evaluated. Training itself goes on with the raw weights.

    average: the averaged parameters and buffers by name; empty until averaging has started
    """

    average: dict[str, Tensor]

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Generator[None, dict[str, Any], dict[str, Any]]:
        with swapped_weights(run.model, self.average):
            return (yield)

    @hookimpl(wrapper=True)
    def after_evaluate(self, run: Run) -> Generator[None, None, None]:
        with swapped_weights(run.model, self.average):
            return (yield)

    @hookimpl(wrapper=True)             # a wrapper, so that it comes before plugins that use the final weights
    def train_end(self, run: Run) -> Generator[None, None, None]:
        copy_weights(run.model, self.average)
        return (yield)


@contextmanager
def swapped_weights(model: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """Give the parameters and buffers of `model` named in `average` these values, and afterwards their own back.

    Only the contents of the tensors change, so that an optimizer, a compiled or a replicated model keeps the same
    tensors. Their own values come back to the last bit, also after an exception; changes made meanwhile are lost.
    """
    own = {name: tensor.clone() for name, tensor in named_tensors(model).items() if name in average}
    try:
        copy_weights(model, average)
        yield
    finally:
        copy_weights(model, own)


@torch.no_grad()
def copy_weights(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy `values` into the parameters and buffers of `model` that they name."""
    tensors = named_tensors(model)
    for name, value in values.items():
        tensors[name].copy_(value)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of `model` by name, detached: the same memory."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
