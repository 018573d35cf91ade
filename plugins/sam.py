"""Sharpness-aware minimization."""
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from loopctl import Run, UsageError, hookimpl


@dataclass(eq=False)
class Sam:
    """Seek flat minima: update with the gradient of the worst point nearby. A step takes two.

    It is SAM, arXiv:2010.01412, and with adaptive=true ASAM, arXiv:2102.11600; both as in github.com/davda54/sam. What
    other plugins do to gradients, such as clipping, counts for the second, which makes the update; the first leads to
    the worst point as it is. The loss reported is of the weights themselves, and so are BatchNorm statistics.

    rho: how far away the worst point is
    adaptive: measure that distance by the size of each weight; rho is then some 10 times as large
    """

    rho: float = 0.05
    adaptive: bool = False

    def __post_init__(self) -> None:
        if not self.rho > 0:
            raise ValueError(f"rho is above 0, not {self.rho}")
        self.offsets: list[tuple[Tensor, Tensor]] = []      # weights, and how far the worst point is from each
        self.kept: list[tuple[Tensor, Tensor]] = []         # what is not itself now, and what it was

    @hookimpl
    def train_start(self, run: Run) -> None:
        if isinstance(run.optimizer, torch.optim.LBFGS):
            raise UsageError("LBFGS looks at several points per step itself, so which one to move away from is open; "
                             "use another optimizer")
        self.statistics = [buffer for module in run.model.modules() if isinstance(module, _BatchNorm)
                           for buffer in module.buffers(recurse=False)]

    @hookimpl(wrapper=True)
    def optimizer_step(self, closure: Callable[[], Tensor]) -> Generator[None, Tensor, Tensor]:
        closure()
        try:
            self.leave()
            return (yield)
        finally:
            self.come_back()            # it has, unless something went wrong away

    # Gradients are complete here and nobody has clipped them yet. The weights are back before anybody does.
    @hookimpl
    def after_backward(self, run: Run) -> None:
        if self.kept:
            self.come_back()
        else:
            self.look_around(run)

    @torch.no_grad()
    def look_around(self, run: Run) -> None:
        weights = [weight for group in run.optimizer.param_groups for weight in group["params"]
                   if weight.grad is not None]
        gradients = [weight.grad for weight in weights]
        measured, steps = gradients, gradients
        if self.adaptive:
            measured = [weight.abs() * gradient for weight, gradient in zip(weights, gradients, strict=True)]
            steps = [weight**2 * gradient for weight, gradient in zip(weights, gradients, strict=True)]
        factor = self.rho / (get_total_norm(measured) + 1e-12)
        self.offsets = [(weight, step * factor.to(step.device)) for weight, step in zip(weights, steps, strict=True)]

    @torch.no_grad()
    def leave(self) -> None:
        # Copies, since adding and subtracting would not give the same bits back.
        away = [*(weight for weight, _ in self.offsets), *self.statistics]
        self.kept = [(tensor, tensor.clone()) for tensor in away]
        for weight, offset in self.offsets:
            weight.add_(offset)
        self.offsets = []

    @torch.no_grad()
    def come_back(self) -> None:
        for tensor, was in self.kept:
            tensor.copy_(was)
        self.kept = []
