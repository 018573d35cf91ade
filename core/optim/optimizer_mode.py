"""Optimizers that have two sets of weights, one to train and one to use, and switch between them: `train`, `eval`.

Schedule-free optimizers (arXiv:2405.15682) are of this kind. Their authors ask for `optimizer.train()` beside
`model.train()`, and `optimizer.eval()` beside `model.eval()` and before the weights are used or saved.
"""
from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from loopctl.optim.several import each_optimizer

# The optimizers that were switched to the weights that are trained: they cannot be asked.
TRAINING: WeakSet[Any] = WeakSet()


def with_modes(optimizer: Any) -> list[Any]:
    """The optimizer, or of several those, that have modes."""
    return [one for one in each_optimizer(optimizer)
            if callable(getattr(one, "train", None)) and callable(getattr(one, "eval", None))]


def set_train_mode(optimizer: Any) -> None:
    """Switch an optimizer that has modes to the weights that are trained. Other optimizers stay as they are."""
    for one in with_modes(optimizer):
        one.train()
        TRAINING.add(one)


def set_eval_mode(optimizer: Any) -> None:
    """Switch an optimizer that has modes to the weights that are used. Other optimizers stay as they are."""
    for one in with_modes(optimizer):
        one.eval()
        TRAINING.discard(one)


@torch.no_grad()
def used_weights(optimizer: Any) -> dict[int, Tensor]:
    """Return copies of the weights that are used, by the id of each parameter; empty where they are in the model.

    The weights that are trained stay in the model, and are the same to the bit: switching twice would round them.
    """
    switched = [one for one in with_modes(optimizer) if one in TRAINING]
    parameters = [parameter for one in switched for group in one.param_groups for parameter in group["params"]]
    trained = [parameter.detach().clone() for parameter in parameters]
    for one in switched:
        one.eval()
    used = {id(parameter): parameter.detach().clone() for parameter in parameters}
    for one in switched:
        one.train()
    for parameter, value in zip(parameters, trained, strict=True):
        parameter.copy_(value)
    return used
