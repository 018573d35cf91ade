"""Pruning: set the smallest weights to zero, more and more of them, and keep them there."""
from collections.abc import Generator
from dataclasses import dataclass, field
from math import ceil, nan
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.prune import L1Unstructured

from loopctl import Duration, Run, UsageError, hookimpl
from loopctl.model.own_names import own_parameters
from loopctl.model.parameter_matching import matching_parameters


@dataclass(eq=False)
class Prune:
    """Set the smallest weights to zero, more and more of them, and train the others.

    The weights are chosen by magnitude, as by torch.nn.utils.prune.l1_unstructured and global_unstructured. From start
    to until, the share of zeros rises from 0 to amount along the cubic schedule of Zhu and Gupta, arXiv:1710.01878; it
    is the metric sparsity. A pruned weight has no gradient and stays 0. Parameters keep their names and shapes, so a
    checkpoint is that of the same model with zeros in it. The averages of ema and swa, and weights that early_stopping
    restores, get the zeros too. The best weights of an evaluation before until have fewer of them.

    amount: the share of the weights that are 0 in the end, above 0 and below 1
    patterns: which parameters: globs, names of modules or regular expressions, as in freeze; the weights of linear and
        convolutional layers if left out
    scope: layer prunes the same share of each parameter, global the smallest weights of all of them together
    start: when pruning begins, in epochs if it has no unit; at once if left out
    until: when amount is reached, in epochs if it has no unit
    every: how often weights are chosen until then, in epochs if it has no unit
    """

    amount: float
    patterns: list[str] = field(default_factory=list)
    scope: Literal["layer", "global"] = "layer"
    start: Duration | None = None
    until: Duration = "75%"
    every: Duration = 1
    capturable: ClassVar[bool] = True       # the masks change in place, before a step
    topic = "weights"

    def __post_init__(self) -> None:
        if not 0 < self.amount < 1:
            raise ValueError(f"amount is above 0 and below 1, not {self.amount}")
        if isinstance(self.patterns, str):
            raise ValueError(f"patterns takes a list, such as ['conv1.*'], not {self.patterns!r}")

    @hookimpl
    def setup(self, run: Run) -> None:
        if sum(isinstance(plugin, Prune) for plugin in run.hook.plugins.values()) > 1:
            raise UsageError("weights are pruned by one schedule; leave out the other prune")
        self.names = chosen_parameters(run.model, self.patterns)
        run.metrics["sparsity"] = nan

    @hookimpl
    def train_start(self, run: Run) -> None:
        # Round up to a whole step, with a tolerance: 7 % of 100 steps are 7.000000000000001.
        self.first, self.last, self.interval = (
            ceil(run.planned.steps(run.duration(length, "epoch")) - 1e-6) if length is not None else 0
            for length in (self.start, self.until, self.every))
        if self.last < self.first:
            raise UsageError(f"until={self.until} is before start={self.start}; choose a later one")
        if self.last >= run.planned_steps:
            raise UsageError(f"until={self.until} is not before the run's end, so the amount would not be reached; "
                             "choose an earlier one, such as 75%")
        parameters = own_parameters(run.model)
        self.weights: list[Tensor] = [parameters[name] for name in self.names]
        if any(hasattr(weight, "full_tensor") for weight in self.weights):
            raise UsageError("the weights are sharded, so the smallest are not known; use ddp in place of fsdp")
        self.masks = [torch.ones_like(weight, requires_grad=False) for weight in self.weights]
        run.metrics["sparsity"] = 0.0

    @hookimpl
    def before_step(self, run: Run) -> None:
        done, length = run.attempts - self.first, self.last - self.first
        if 0 <= done <= length and (done == length or done % self.interval == 0):
            share = self.amount * (1 - (1 - done / length) ** 3) if length else self.amount
            run.metrics["sparsity"] = self.choose(share)
            self.zero_weights()

    @torch.no_grad()
    def choose(self, share: float) -> float:
        """Set the masks of the smallest weights to 0, this share of them; return it, rounded to whole weights."""
        zeros, everything = 0, list(zip(self.weights, self.masks, strict=True))
        for group in [everything] if self.scope == "global" else [[pair] for pair in everything]:
            weights, masks = (torch.cat([tensor.detach().reshape(-1) for tensor in part])
                              for part in zip(*group, strict=True))
            count = round(share * len(weights))
            chosen = L1Unstructured(count).compute_mask(weights, masks)
            for (_, mask), part in zip(group, chosen.split([mask.numel() for _, mask in group]), strict=True):
                mask.copy_(part.view(mask.shape))
            zeros += count
        return zeros / sum(mask.numel() for mask in self.masks)

    # Before anything else sees the gradients of the step: sam and clip measure them.
    @hookimpl(wrapper=True)
    def micro_step(self, last: bool) -> Generator[None, Tensor, Tensor]:
        loss = yield
        pairs = zip(self.weights, self.masks, strict=True)
        if last and (found := [(weight.grad, mask) for weight, mask in pairs if weight.grad is not None]):
            torch._foreach_mul_(*zip(*found, strict=True))
        return loss

    @hookimpl(wrapper=True)
    def optimizer_step(self) -> Generator[None, Tensor, Tensor]:
        loss = yield
        self.zero_weights()             # momentum may have moved a pruned weight
        return loss

    # The innermost wrappers: an average that another plugin puts in place of the weights has values from before.
    @hookimpl(wrapper=True, trylast=True)
    def compute_loss(self) -> Generator[None, Tensor, Tensor]:
        if not torch.is_grad_enabled():         # an evaluation, or BatchNorm statistics of an average
            self.zero_weights()
        return (yield)

    @hookimpl(wrapper=True, trylast=True)
    def after_evaluate(self) -> Generator[None, None, None]:
        self.zero_weights()
        return (yield)

    @hookimpl(trylast=True)
    def train_end(self) -> None:
        self.zero_weights()

    @torch.no_grad()
    def zero_weights(self) -> None:
        torch._foreach_mul_(self.weights, self.masks)

    def state_dict(self) -> dict[str, Any]:
        return {name: mask.bool() for name, mask in zip(self.names, self.masks, strict=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, mask in zip(self.names, self.masks, strict=True):
            mask.copy_(state[name])


def chosen_parameters(model: nn.Module, patterns: list[str]) -> list[str]:
    """The names of the parameters that patterns match, or of the weights of linear and convolutional layers."""
    matched = matching_parameters(model, patterns).values()
    chosen: set[Tensor] = {parameter for parameters in matched for parameter in parameters}
    if not patterns:
        chosen = {module.weight for module in model.modules() if isinstance(module, nn.Linear | _ConvNd)}
    names = [name for name, parameter in own_parameters(model).items() if parameter in chosen]
    if not names:
        raise UsageError("the model has no linear or convolutional layer; name the parameters to prune with patterns")
    return names
