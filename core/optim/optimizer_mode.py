"""Optimizers that have two sets of weights, one to train and one to use, and switch between them: `train`, `eval`.

Schedule-free optimizers (arXiv:2405.15682) are of this kind. Their authors ask for `optimizer.train()` beside
`model.train()`, and `optimizer.eval()` beside `model.eval()` and before the weights are used.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def has_modes(optimizer: Any) -> bool:
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def set_train_mode(optimizer: Any) -> None:
    """Switch an optimizer that has modes to the weights that are trained. Other optimizers stay as they are."""
    if has_modes(optimizer):
        optimizer.train()


def set_eval_mode(optimizer: Any) -> None:
    """Switch an optimizer that has modes to the weights that are used. Other optimizers stay as they are."""
    if has_modes(optimizer):
        optimizer.eval()


@contextmanager
def optimizer_eval_mode(optimizer: Any) -> Iterator[None]:
    """Have the weights that are used in the model inside the block, and those that are trained after it."""
    set_eval_mode(optimizer)
    try:
        yield
    finally:
        set_train_mode(optimizer)
