"""The averaged weights in place of the model's own, for a while or for good."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def swapped(model: nn.Module, average: dict[str, Tensor]) -> Iterator[None]:
    """Give the parameters and buffers of `model` named in `average` these values, and afterwards their own back.

    Only what the tensors hold changes, so that an optimizer, a compiled or a replicated model goes on with the same
    ones. Their own values come back to the last bit, also after an exception; what was changed meanwhile is gone.
    """
    own = {name: tensor.clone() for name, tensor in held(model).items() if name in average}
    try:
        fill(model, average)
        yield
    finally:
        fill(model, own)


@torch.no_grad()
def fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Copy `values` into the parameters and buffers of `model` that they name."""
    mine = held(model)
    for name, value in values.items():
        mine[name].copy_(value)


def held(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of `model` by name, detached: the same memory."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
