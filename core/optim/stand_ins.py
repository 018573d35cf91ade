"""Stand-ins of parameters in an optimizer: tensors of another dtype for the time of a step; and stochastic rounding."""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def exchange(optimizer: torch.optim.Optimizer, other: dict[Any, Any]) -> None:
    """Put other tensors in place of those that the optimizer holds, with their states."""
    for group in optimizer.param_groups:
        group["params"][:] = [other.get(tensor, tensor) for tensor in group["params"]]
    for tensor in other.keys() & optimizer.state.keys():
        optimizer.state[other[tensor]] = optimizer.state.pop(tensor)


def round_stochastically(value: Tensor, random: torch.Generator) -> Tensor:
    """Round float32 to one of the two nearest bfloat16 numbers, to each with the probability of the other's distance.

    bfloat16 is the upper half of the bits of float32, so a random lower half is added, and the lower half cut off.
    """
    noise = torch.randint(1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=random)
    rounded = ((value.view(torch.int32) + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(value.isfinite(), rounded, value).to(torch.bfloat16)
