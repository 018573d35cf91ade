"""Losses and metrics are scalars: check what a user's function has returned, and convert it."""
from __future__ import annotations

from typing import Any

from torch import Tensor

from loopctl.errors import UsageError


def as_scalar(value: Any, owner: str, advice: str) -> Tensor | float:
    """Return a number as it is, and a tensor of one element without its dimensions.

    owner, advice: the subject and the end of the message of the UsageError that is raised for anything else.
    """
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value
        if value.numel() == 1:
            return value.reshape(())
        raise UsageError(f"{owner} returned a tensor of shape {tuple(value.shape)}; {advice}")
    try:
        if not isinstance(value, str):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise UsageError(f"{owner} returned a {type(value).__name__}; {advice}")


def as_loss(loss: Any) -> Tensor:
    """Return `loss` as a tensor without dimensions. Raises UsageError where it is none, or has several elements."""
    if type(loss) is Tensor and not loss.ndim:          # the usual case, in every step
        return loss
    if not isinstance(loss, Tensor):
        raise UsageError(f"the loss is a {type(loss).__name__}; loss_fn, or compute_loss of a plugin, must return a "
                         "tensor of one element")
    if loss.numel() != 1:
        raise UsageError(f"the loss is a tensor of shape {tuple(loss.shape)}; loss_fn, or compute_loss of a plugin, "
                         "must return one element, such as loss.mean()")
    return loss.reshape(())
