"""The parameters of a run that have gradients, for plugins that change these."""
from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from loopctl.errors import UsageError
from loopctl.model.own_names import own_modules

if TYPE_CHECKING:
    from loopctl.run import Run


def parameters_with_gradients(run: Run) -> list[nn.Parameter]:
    """The parameters with a gradient that `run.optimizer` holds, in its order; of several optimizers, the current one.
    """
    return [parameter for group in run.optimizer.param_groups for parameter in group["params"]
            if parameter.grad is not None]


def require_dense_gradients(run: Run) -> None:
    """Raise UsageError if a module computes sparse gradients. Call it in `train_start`."""
    for name, module in own_modules(run.model):
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise UsageError(f"the gradient of {name or 'the model'} is sparse, which is not supported; "
                             f"use {type(module).__name__}(..., sparse=False)")
