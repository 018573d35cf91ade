"""Metrics by name: accuracy, top5, mae, rmse, r2 and perplexity.

Those that are means over samples are functions of a batch. The others keep sums over all batches, with the methods of
torchmetrics' classes, so that they are exact over the whole data, which no mean of batch values is.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loopctl.errors import UsageError


def accuracy(output: Any, target: Any, dim: int | None = None) -> Tensor:
    """The fraction of a batch whose highest logit is that of its class, or of the highest of its probabilities.

    target: classes, or probabilities of the shape of `output`
    dim: the dimension of the classes, if both the second and the last can be it
    """
    scores, classes = with_classes_second("accuracy", output, target, dim)
    return (scores.argmax(1) == classes).float().mean()


def top(output: Any, target: Any, k: int, dim: int | None = None) -> Tensor:
    """The fraction of a batch whose class is among those of the `k` highest logits."""
    name = f"top{k}"
    scores, classes = with_classes_second(name, output, target, dim)
    if scores.shape[1] < k:
        raise UsageError(f"{name}: the model has {scores.shape[1]} outputs; use a smaller number, such as top2")
    return (scores.topk(k, 1).indices == classes.unsqueeze(1)).any(1).float().mean()


def mae(output: Any, target: Any) -> Tensor:
    """The mean absolute error of a batch."""
    check_alike("mae", output, target)
    return (output.float() - target.float()).abs().mean()


class Sums:
    """A metric that is computed from sums over samples.

    A subclass returns the terms of one batch from `terms`, and computes the metric from their sums in `value`. It has
    the methods of torchmetrics' classes. The sums are float64, and float32 on mps, which has no float64.
    """

    higher_is_better = False

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.sums = torch.zeros(())             # takes the shape and the device of the first terms

    def update(self, output: Any, target: Any) -> None:
        terms = self.terms(output, target)
        self.sums = self.sums.to(terms.device) + terms

    def compute(self) -> Tensor:
        return self.computed_with([self.sums])

    def computed_with(self, parts: list[Tensor]) -> Tensor:
        """The metric of the sums of all processes; NaN where they are of no sample."""
        sums = added(parts)
        return self.value(sums) if sums.ndim else torch.tensor(math.nan)

    def terms(self, output: Any, target: Any) -> Tensor:
        raise NotImplementedError

    def value(self, sums: Tensor) -> Tensor:
        raise NotImplementedError


def added(parts: list[Tensor]) -> Tensor:
    """The sum of the `sums` of several processes. Those of a process that has seen no sample have no dimension."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


class RMSE(Sums):
    """The square root of the mean squared error."""

    def terms(self, output: Any, target: Any) -> Tensor:
        check_alike("rmse", output, target)
        squares = (exact(output) - exact(target)).square()
        return torch.stack([squares.sum(), squares.new_full((), squares.numel())])

    def value(self, sums: Tensor) -> Tensor:
        return (sums[0] / sums[1]).sqrt()


class R2(Sums):
    """The coefficient of determination; of several outputs, the mean over them."""

    higher_is_better = True

    def terms(self, output: Any, target: Any) -> Tensor:
        check_alike("r2", output, target)
        found, wanted = (exact(value).reshape(len(value), -1) for value in (output, target))
        rows = [torch.ones_like(wanted), wanted, wanted.square(), (wanted - found).square()]
        return torch.stack([row.sum(0) for row in rows])

    def value(self, sums: Tensor) -> Tensor:
        count, total, squares, residual = sums
        return (1 - residual / (squares - total.square() / count)).mean()


class Perplexity(Sums):
    """The exponential of the mean cross entropy. Targets of -100 are left out.

    dim: the dimension of the classes, if both the second and the last can be it
    """

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim

    def terms(self, output: Any, target: Any) -> Tensor:
        scores, classes = with_classes_second("perplexity", output, target, self.dim)
        if output.shape == target.shape or target.is_floating_point():
            raise UsageError("perplexity: the targets are probabilities; use the numbers of the classes")
        loss = functional.cross_entropy(exact(scores), classes, reduction="sum")
        return torch.stack([loss, (classes != -100).sum().to(loss.dtype)])

    def value(self, sums: Tensor) -> Tensor:
        return (sums[0] / sums[1]).exp()


def exact(value: Tensor) -> Tensor:
    """Return a tensor in the floating-point type that has the most digits on its device."""
    return value.float() if value.device.type == "mps" else value.double()


def shapes(name: str, output: Any, target: Any) -> str:
    """Say what shapes outputs and targets have. Raises UsageError where one of them is no tensor."""
    for what, value in (("output is", output), ("target is", target)):
        if not isinstance(value, Tensor):
            raise UsageError(f"{name}: the {what} a {type(value).__name__}, not a tensor; use a metric of your own, "
                             "a function of (output, target)")
    return f"the output has shape {tuple(output.shape)} and the target {tuple(target.shape)}"


def check_alike(name: str, output: Any, target: Any) -> None:
    """Raise UsageError where outputs and targets have not the same shape."""
    found = shapes(name, output, target)
    if output.shape != target.shape or not output.ndim:
        raise UsageError(f"{name}: {found}; make the two alike, for example with output.squeeze(1) in the model, or "
                         "target.unsqueeze(1) in the data")


def with_classes_second(name: str, output: Any, target: Any, dim: int | None) -> tuple[Tensor, Tensor]:
    """Return the logits with their classes in the second dimension, and the numbers of the classes.

    The classes are in the second dimension, as torch's cross entropy takes them, or in the last one. Raises UsageError
    where neither fits, or where both do and `dim` does not say which.
    """
    found = shapes(name, output, target)
    if output.ndim > 1 and output.shape == target.shape:            # probabilities
        dim = 1 if dim is None else dim
        target = target.argmax(dim)
    fits = [place for place in sorted({1, output.ndim - 1}) if output.ndim > 1
            and output.shape[:place] + output.shape[place + 1:] == target.shape]
    if dim is not None:
        fits = [place for place in fits if place == dim % output.ndim]
    if not fits:
        raise UsageError(f"{name}: {found}; for C classes use outputs of shape (N, C, ...) and targets of shape "
                         "(N, ...)")
    if len(fits) > 1:
        raise UsageError(f"{name}: {found}, so the classes may be the second dimension or the last; pass {name}:dim=1 "
                         "or dim=-1")
    scores = output.movedim(fits[0], 1)
    if scores.shape[1] == 1:
        raise UsageError(f"{name}: {found}, which is one class, so every output would be right; for numbers use mae, "
                         "rmse or r2, for two classes in one output torchmetrics' Accuracy:task=binary")
    return scores, target
