"""Averaged weights: put them in place of a model's own for a while or for good; what plugins that average share."""
from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from math import nan
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loopctl.errors import UsageError
from loopctl.hooks import hookimpl
from loopctl.model.own_names import own_buffers, own_parameters
from loopctl.model.ownership import loss_tensors

if TYPE_CHECKING:
    from loopctl.run import Run


class WeightAverage:
    """Base class of plugins that average the weights. Evaluation uses the average, and training ends with it.

    What a plugin judges or saves in `after_evaluate` is the average too, so that the weights that are saved are those
    that were evaluated. Training itself goes on with the raw weights. Averages of half-precision weights are held in
    float32, since a small part of their distance to the weights is often less than half precision can add.

    A subclass has the option `evaluate_raw`: whether the raw weights are evaluated too, which takes as long again.
    Their metrics are called `val_raw_loss` and so on.

    average: the averaged parameters and buffers by name; empty until averaging has started
    """

    average: dict[str, Tensor]
    evaluate_raw: bool

    @hookimpl
    def setup(self, run: Run) -> None:
        self.evaluating_raw = False
        if self.evaluate_raw:
            raw = {raw_name(name): nan for name in run.metrics if name.startswith("val_")}
            if not raw or raw.keys() & run.metrics.keys():
                reason = "another plugin does so already" if raw else "there is no validation data"
                raise UsageError(f"evaluate_raw=true, but {reason}; leave it out")
            run.metrics |= raw

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Generator[None, dict[str, Any], dict[str, Any]]:
        if self.evaluating_raw:
            return (yield)
        with swapped_weights(named_tensors(run), self.average):
            found = yield
        if self.evaluate_raw:
            self.evaluating_raw = True          # and the hook is called again, for the weights as they are
            try:
                found = found | {raw_name(name): value for name, value in run.hook.evaluate(run=run).items()}
            finally:
                self.evaluating_raw = False
        return found

    @hookimpl(wrapper=True)
    def after_evaluate(self, run: Run) -> Generator[None, None, None]:
        with swapped_weights(named_tensors(run), self.average):
            return (yield)

    @hookimpl(wrapper=True)             # a wrapper, so that it comes before plugins that use the final weights
    def train_end(self, run: Run) -> Generator[None, None, None]:
        copy_weights(named_tensors(run), self.average)
        return (yield)


def raw_name(metric: str) -> str:
    """The name of a validation metric where it is that of the raw weights."""
    return f"val_raw_{metric.removeprefix('val_')}"


@contextmanager
def swapped_weights(tensors: dict[str, Tensor], average: dict[str, Tensor]) -> Iterator[None]:
    """Give those of `tensors` that are named in `average` these values, and afterwards their own back.

    Only the contents of the tensors change, so that an optimizer, a compiled or a replicated model keeps the same
    tensors. Their own values come back to the last bit, also after an exception; changes made meanwhile are lost.
    """
    own = {name: tensor.detach().clone() for name, tensor in tensors.items() if name in average}
    try:
        copy_weights(tensors, average)
        yield
    finally:
        copy_weights(tensors, own)


@torch.no_grad()
def copy_weights(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy `values` into those of `tensors` that they name."""
    for name, value in values.items():
        tensors[name].copy_(value)


def is_averaged(tensor: Tensor) -> bool:
    """Whether a mean of such tensors makes sense: they hold real or complex numbers, not integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def new_average(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of `tensors` in the precision in which averages are held."""
    return {name: tensor.detach().to(average_dtype(tensor.dtype), copy=True) for name, tensor in tensors.items()}


def loaded_average(average: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an average from a checkpoint, which may be from a version that held it in half precision."""
    return {name: tensor.to(average_dtype(tensor.dtype)) for name, tensor in average.items()}


def average_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which an average of tensors of `dtype` is held: float32 or complex64 for smaller numbers."""
    if dtype.is_floating_point and dtype.itemsize < 4:
        return torch.float32
    return torch.complex64 if dtype is torch.complex32 else dtype


def alike(tensors: dict[str, Tensor]) -> list[list[str]]:
    """Return the names of `tensors` in groups of the same type and dtype; sharded tensors are a type apart."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault((type(tensor), tensor.dtype), []).append(name)
    return list(groups.values())


@torch.no_grad()
def lerp_average(average: dict[str, Tensor], tensors: dict[str, Tensor], names: list[str], weight: float) -> None:
    """Move the averages `names` towards `tensors` by `weight` of the distance, in place. The tensors are `alike`."""
    averages, targets = [average[name] for name in names], [tensors[name] for name in names]
    if averages[0].dtype == targets[0].dtype:
        torch._foreach_lerp_(averages, targets, weight)
    else:
        for mean, target in zip(averages, targets, strict=True):    # one by one, for the memory of a converted copy
            mean.lerp_(target.to(mean.dtype), weight)


def named_tensors(run: Run) -> dict[str, Tensor]:
    """The parameters and buffers of the model by name, and those of a loss function as `loss_fn.NAME`, detached."""
    of_model = own_parameters(run.model) | own_buffers(run.model)
    own = {f"loss_fn.{name}": tensor for name, tensor in loss_tensors(run).items()}
    return {name: tensor.detach() for name, tensor in (of_model | own).items()}
