"""Mixing the samples of a training batch with each other: what `mixup` and `cutmix` share."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Beta
from torch.nn import functional
from torch.nn.functional import one_hot

from loopctl.data.batch import iter_tensors, map_nested, target_name
from loopctl.errors import UsageError
from loopctl.hooks import hookimpl
from loopctl.model.layers import last_layer

if TYPE_CHECKING:
    from loopctl.run import Run

# Losses whose targets are numbers of classes and cannot be probabilities.
ONLY_CLASSES = (nn.NLLLoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss)
ONLY_CLASSES_FUNCTIONS = (functional.nll_loss, functional.multi_margin_loss, functional.multilabel_margin_loss)


@dataclass(eq=False)
class Mixing:
    """Mix each sample of a training batch with the one before it, and their targets alike.

    Classes become their probabilities; targets that are floating-point numbers are mixed as they are. Metrics get the
    true targets. Of two such plugins in a run, the first one chooses for each batch which of them mixes it.

    alpha: of the Beta(alpha, alpha) distribution from which the share of the sample itself is drawn, once per batch
    prob: the probability that a batch is mixed
    num_classes: the number of classes; left out, that of the outputs of the model's last linear layer
    """

    alpha: float = 1.0
    prob: float = 1.0
    num_classes: int | None = None

    keeps_sample_count: ClassVar[bool] = True
    topic = "data and losses"

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"alpha is above 0, not {self.alpha}")
        if not 0 <= self.prob <= 1:
            raise ValueError(f"prob is from 0 to 1, not {self.prob}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes is at least 1, not {self.num_classes}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.plugins = [plugin for plugin in run.hook.plugins.values() if isinstance(plugin, Mixing)]
        if [type(plugin) for plugin in self.plugins].count(type(self)) > 1:
            raise UsageError("is given twice, and a batch is mixed once; give it once")
        if isinstance(run.loss_fn, ONLY_CLASSES) or run.loss_fn in ONLY_CLASSES_FUNCTIONS:
            loss = getattr(run.loss_fn, "__name__", type(run.loss_fn).__name__)
            raise UsageError(f"mixed targets are probabilities of the classes, which {loss} does not take; use "
                             "torch.nn.CrossEntropyLoss(), on the command line --loss cross_entropy")
        self.beta = Beta(torch.tensor(float(self.alpha)), torch.tensor(float(self.alpha)))
        self.classes = self.num_classes or output_classes(run)

    @hookimpl
    def transform_batch(self, run: Run, batch: Any) -> Any:
        if self is not self.plugins[0]:
            return batch                # the first one has chosen which of the two mixes it
        plugin = self if len(self.plugins) == 1 else self.choose()
        mixed, target = plugin.mix(batch)
        if run.metric_target is None:
            run.metric_target = target
        return mixed

    def choose(self) -> Mixing:
        """Return the plugin that mixes this batch: the one with an option `switch_prob`, with that probability."""
        one, other = sorted(self.plugins, key=lambda plugin: not hasattr(plugin, "switch_prob"))
        return one if torch.rand(()).item() < one.switch_prob else other     # type: ignore[attr-defined]

    def mix(self, batch: Any) -> tuple[Any, Any]:
        """Return the batch with mixed inputs and targets, and its own targets. Raises UsageError for other batches."""
        inputs, target = divide(batch, type(self).__name__.lower())
        share = 1.0
        dtype = next(leaf.dtype for leaf in iter_tensors(inputs) if leaf.is_floating_point())
        if self.prob == 1 or torch.rand(()).item() < self.prob:
            inputs, share = self.mix_inputs(inputs, self.beta.sample().item())
        mixed = blend(self.as_probabilities(target, dtype), share)
        if isinstance(batch, Mapping):
            return {name: mixed if name == target_name(batch) else inputs[name] for name in batch}, target
        return (inputs, mixed), target

    def mix_inputs(self, inputs: Any, share: float) -> tuple[Any, float]:
        """Return the mixed inputs, and the share of the sample itself in them, where `share` was drawn."""
        raise NotImplementedError

    def as_probabilities(self, target: Tensor, dtype: torch.dtype) -> Tensor:
        if target.is_floating_point():
            return target
        name = type(self).__name__.lower()
        if target.ndim != 1:
            raise UsageError(f"{name} mixes one class per sample, of shape (N,), or floating-point targets, but the "
                             f"targets have shape {tuple(target.shape)} and type {target.dtype}")
        if self.classes is None:
            raise UsageError(f"the number of classes is not known; pass {name}:num_classes=...")
        try:
            return one_hot(target, self.classes).to(dtype)
        except RuntimeError as error:
            first, last = target.min().item(), target.max().item()
            raise UsageError(f"the targets of a batch are {first} to {last}, and there are {self.classes} classes, "
                             f"from 0 on; pass {name}:num_classes=...") from error


def output_classes(run: Run) -> int | None:
    """The number of outputs of the model's last linear layer or convolution, or None."""
    found = last_layer(run.model)
    return None if found is None else getattr(found[1], "out_features", getattr(found[1], "out_channels", None))


def divide(batch: Any, name: str) -> tuple[Any, Tensor]:
    """Return the inputs and the target of a batch. Raises UsageError where they cannot be mixed."""
    inputs: Any = None
    target: Any = None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, target = batch
    elif isinstance(batch, Mapping) and (key := target_name(batch)):
        inputs, target = {name: value for name, value in batch.items() if name != key}, batch[key]
    if not isinstance(target, Tensor):
        raise UsageError(f"{name} mixes batches that are a pair (input, target) or a dict with a target, a tensor; "
                         f"those of this run are a {type(batch).__name__}")
    if not any(leaf.is_floating_point() for leaf in iter_tensors(inputs)):
        raise UsageError(f"{name} mixes floating-point inputs, and the batches of this run have none")
    return inputs, target


def blend(value: Any, share: float) -> Any:
    """Return `share` of each floating-point tensor plus the rest of the one with its samples moved on by one."""
    def blended(leaf: Any) -> Any:
        if share == 1 or not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.roll(1, 0).mul_(1.0 - share).add_(leaf.mul(share))

    return map_nested(blended, value)
