"""Sharpness-aware minimization (SAM)."""
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from loopctl import Run, UsageError, hookimpl


@dataclass(eq=False)
class Sam:
    """Seek flat minima: update with the gradient at a nearby point of high loss.

    Sharpness-aware minimization, arXiv:2010.01412, and with adaptive=true ASAM, arXiv:2102.11600; both as in
    github.com/davda54/sam. A step computes gradients twice. Clipping and other changes to gradients apply to the second
    gradient, which is used for the update; the first gradient, which leads to the nearby point, is used as it is. The
    reported loss and the BatchNorm statistics are those of the weights themselves, not of the nearby point.

    rho: distance to the nearby point
    adaptive: scale the distance by the size of each weight; rho is then about 10 times as large
    """

    rho: float = 0.05
    adaptive: bool = False
    topic = "gradients"

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"rho is above 0, not {self.rho}")
        self.offsets: list[tuple[Tensor, Tensor]] = []      # weights, and their offsets to the nearby point
        self.saved: list[tuple[Tensor, Tensor]] = []        # while at that point: weights and buffers, and their copies

    @hookimpl
    def train_start(self, run: Run) -> None:
        if isinstance(run.optimizer, torch.optim.LBFGS):
            raise UsageError("LBFGS computes gradients at several points per step, which sam does not support; use "
                             "another optimizer")
        self.statistics = [buffer for module in run.model.modules() if isinstance(module, _BatchNorm)
                           for buffer in module.buffers(recurse=False)]

    @hookimpl(wrapper=True)
    def optimizer_step(self, closure: Callable[[], Tensor]) -> Generator[None, Tensor, Tensor]:
        closure()
        try:
            self.move_to_nearby_point()
            return (yield)
        finally:
            self.restore()              # restores something only after an error

    # Here the gradients are complete, and not yet clipped. The weights are restored before plugins clip or measure.
    @hookimpl
    def after_backward(self, run: Run) -> None:
        if self.saved:
            self.restore()
        else:
            self.compute_offsets(run)

    @torch.no_grad()
    def compute_offsets(self, run: Run) -> None:
        weights = [weight for group in run.optimizer.param_groups for weight in group["params"]
                   if weight.grad is not None]
        gradients = [weight.grad for weight in weights]
        scaled, directions = gradients, gradients
        if self.adaptive:
            scaled = [weight.abs() * gradient for weight, gradient in zip(weights, gradients, strict=True)]
            directions = [weight**2 * gradient for weight, gradient in zip(weights, gradients, strict=True)]
        factor = self.rho / (get_total_norm(scaled) + 1e-12)
        self.offsets = [(weight, direction * factor.to(direction.device))
                        for weight, direction in zip(weights, directions, strict=True)]

    @torch.no_grad()
    def move_to_nearby_point(self) -> None:
        # Save copies: subtracting what was added would not restore the same bits.
        changing = [*(weight for weight, _ in self.offsets), *self.statistics]
        self.saved = [(tensor, tensor.clone()) for tensor in changing]
        for weight, offset in self.offsets:
            weight.add_(offset)
        self.offsets = []

    @torch.no_grad()
    def restore(self) -> None:
        for tensor, copy in self.saved:
            tensor.copy_(copy)
        self.saved = []
