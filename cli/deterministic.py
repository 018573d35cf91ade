"""`--deterministic`: what it switches on, and a form of average pooling that is deterministic on a GPU."""
from __future__ import annotations

import os

import torch
from torch import Tensor, nn


def switch_on(setting: bool | str) -> None:
    """Use deterministic algorithms as `--deterministic` says: false, true, or "warn" of operations that have none."""
    if setting:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=setting == "warn")
        torch.backends.cudnn.benchmark = False


def use_deterministic_pooling(model: nn.Module) -> None:
    """Replace each AdaptiveAvgPool2d in a model, except that to a single pixel, which torch computes as a mean."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.AdaptiveAvgPool2d and child.output_size not in (1, (1, 1)):
                setattr(parent, name, DeterministicAvgPool2d(child.output_size))


class DeterministicAvgPool2d(nn.AdaptiveAvgPool2d):
    """AdaptiveAvgPool2d as means of slices, because torch's own has no deterministic backward pass on a GPU.

    On a CPU it is torch's own, which is deterministic there, to the bit.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type == "cpu":
            return super().forward(input)
        size = self.output_size
        rows, columns = size if isinstance(size, tuple) else (size, size)
        return window_means(window_means(input, -2, rows), -1, columns)


def window_means(input: Tensor, dim: int, count: int | None) -> Tensor:
    """The means of `count` windows along a dimension, which overlap where it is no multiple; None keeps them all."""
    size = input.shape[dim]
    count = size if count is None else count
    bounds = [(size * i // count, -(-size * (i + 1) // count)) for i in range(count)]
    return torch.stack([input.narrow(dim, start, end - start).mean(dim) for start, end in bounds], dim)
