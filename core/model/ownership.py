"""Which modules, parameters and buffers belong to a run: those of the model, and of a loss function that is a module.

What the optimizer holds is trained. What belongs to the run is moved to its device, put into training or evaluation
mode, saved in checkpoints, and kept equal in all processes.
"""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loopctl.errors import names
from loopctl.model.own_names import own_parameters, own_state_dict

if TYPE_CHECKING:
    from loopctl.run import Run


def modules_of(run: Run) -> list[nn.Module]:
    """The model, and the loss function if it is a module."""
    return [run.model, run.loss_fn] if isinstance(run.loss_fn, nn.Module) else [run.model]


def loss_tensors(run: Run) -> dict[str, Tensor]:
    """The parameters and the saved buffers of a loss function, by name, without those that are the model's too."""
    if not isinstance(run.loss_fn, nn.Module):
        return {}
    of_model = {id(tensor) for tensor in (*run.model.parameters(), *run.model.buffers())}
    state = own_state_dict(run.loss_fn, keep_vars=True)
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and id(tensor) not in of_model}


def loss_parameters(run: Run) -> list[nn.Parameter]:
    """The parameters of a loss function that require gradients and are not the model's too."""
    return [tensor for tensor in loss_tensors(run).values()
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad]


@torch.no_grad()
def load_loss_tensors(run: Run, state: dict[str, Tensor]) -> None:
    """Copy the tensors in `state` into those of the loss function."""
    for name, tensor in loss_tensors(run).items():
        tensor.copy_(state[name])


def named_parameters(run: Run) -> dict[str, nn.Parameter]:
    """All parameters that belong to the run, in order; those of a loss function are called `loss_fn.NAME`."""
    own = {f"loss_fn.{name}": tensor for name, tensor in loss_tensors(run).items() if isinstance(tensor, nn.Parameter)}
    return own_parameters(run.model) | own


def trained_parameters(run: Run) -> list[nn.Parameter]:
    """The parameters that the optimizer holds: those of the run in its own order, then any others."""
    held = {id(parameter): parameter for group in run.optimizer.param_groups for parameter in group["params"]}
    own = [parameter for parameter in named_parameters(run).values() if held.pop(id(parameter), None) is not None]
    return [*own, *held.values()]


def untrained_parameters(run: Run) -> list[nn.Parameter]:
    """The parameters of the run that get gradients although the optimizer does not hold them."""
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    return [parameter for parameter in named_parameters(run).values()
            if parameter.requires_grad and id(parameter) not in held]


def describe_untrained(run: Run) -> str:
    """A line that says which parameters of the loss function are not trained; empty if there are none."""
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    left_out = [name for name, tensor in loss_tensors(run).items()
                if isinstance(tensor, nn.Parameter) and tensor.requires_grad and id(tensor) not in held]
    if not left_out:
        return ""
    few = left_out[:3] + [f"{len(left_out) - 3} more"] * (len(left_out) > 3)
    return (f"loss_fn has parameters that the optimizer does not hold, so they are not trained: {names(few)}; give "
            "them to the optimizer, or pass a factory of optimizers")


def owns_any(run: Run, optimizer: Any) -> bool:
    """Whether the optimizer holds a parameter that belongs to the run."""
    own = {id(parameter) for parameter in named_parameters(run).values()}
    return any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"])
