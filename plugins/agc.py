"""Adaptive gradient clipping (AGC): each unit's gradient is clipped by the norm of its weights."""
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.sharded_tensors import is_sharded, local_rows, sum_over_shards
from loopctl.model.gradients import parameters_with_gradients, require_dense_gradients
from loopctl.model.layers import last_layer
from loopctl.model.ownership import trained_parameters
from loopctl.model.parameter_matching import matching_parameters


@dataclass(eq=False)
class Agc:
    """Clip the gradient of each output unit to a part of the norm of the unit's weights.

    Adaptive gradient clipping, arXiv:2102.06171, as in timm.utils.agc. A unit is a row of a matrix, a filter of a
    convolution, or a whole vector, such as a bias. With clip, the one that is given first acts first.

    clip_factor: the largest ratio of the gradient's norm to the norm of the weights
    eps: weights whose norm is smaller count as having this one, so that those at zero can change
    exclude_head: leave out the last linear layer, or else the last convolution, as the paper does
    exclude: what to leave out besides: globs (layer1.*), names of modules (layer1), or regular expressions
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    exclude_head: bool = True
    exclude: list[str] = field(default_factory=list)
    capturable: ClassVar[bool] = True
    topic = "gradients"

    def __post_init__(self) -> None:
        for name in ("clip_factor", "eps"):
            if not (number := getattr(self, name)) > 0:
                raise ValueError(f"{name} is above 0, not {number}")
        if isinstance(self.exclude, str):
            raise ValueError(f"exclude takes a list, such as ['layer1.*'], not {self.exclude!r}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        require_dense_gradients(run)
        matched = matching_parameters(run.model, self.exclude)
        self.excluded = {parameter for parameters in matched.values() for parameter in parameters}
        if self.exclude_head and (head := last_layer(run.model)):
            self.excluded |= set(head[1].parameters())
        if not set(trained_parameters(run)) - self.excluded:
            raise UsageError("every trained parameter is left out, so nothing would be clipped; use exclude_head=false "
                             "or fewer patterns in exclude")

    @hookimpl
    def grads_ready(self, run: Run) -> None:
        self.clip_units(run)

    @torch.no_grad()
    def clip_units(self, run: Run) -> None:
        parameters = [parameter for parameter in parameters_with_gradients(run) if parameter not in self.excluded]
        if not parameters:
            return
        parameters.sort(key=lambda parameter: parameter.ndim > 1)      # vectors first, as `unit_norms` has them
        gradients = [local_rows(parameter.grad) for parameter in parameters]
        norms = unit_norms(parameters, gradients)
        limits = unit_norms(parameters, [local_rows(parameter) for parameter in parameters])
        limits = limits.clamp_(min=self.eps).mul_(self.clip_factor)
        factors = torch.where(norms < limits, 1.0, limits / norms.clamp(min=1e-6))
        sizes = [len(gradient) if gradient.ndim > 1 else 1 for gradient in gradients]
        torch._foreach_mul_(gradients, [factor.view([size, *[1] * (gradient.ndim - 1)][:gradient.ndim])
                                        for factor, size, gradient
                                        in zip(factors.split(sizes), sizes, gradients, strict=True)])


def unit_norms(parameters: list[nn.Parameter], tensors: list[Tensor]) -> Tensor:
    """The norms of the units of all `tensors` as one vector: those of whole vectors, then those of rows.

    parameters: of which the tensors are the weights or the gradients, or the shards of them that this process holds
    """
    vectors = [torch.linalg.vector_norm(tensor).view(1) for tensor in tensors if tensor.ndim <= 1]
    rows = [torch.linalg.vector_norm(tensor, dim=[*range(1, tensor.ndim)]) for tensor in tensors if tensor.ndim > 1]
    if vectors and is_sharded(parameters[0]):
        vectors = [sum_over_shards(parameters[0], torch.cat(vectors).square()).sqrt()]
    return torch.cat([*vectors, *rows])
