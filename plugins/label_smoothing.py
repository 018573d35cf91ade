"""Label smoothing of the cross entropy, in training only."""
from collections.abc import Generator
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from loopctl import Run, UsageError, hookimpl


@dataclass(eq=False)
class LabelSmoothing:
    """Smooth the labels of the cross entropy in training, and not in validation.

    Same as torch.nn.CrossEntropyLoss(label_smoothing=...), from arXiv:1512.00567, section 7. Each target is mixed with
    the uniform distribution over the classes, also one that is a distribution itself, as from mixup. Weights of classes
    and ignore_index act as in torch. train_loss is that of the smoothed labels, so it does not fall to 0, and is larger
    than val_loss for the same outputs.

    smoothing: the part of each target that is the uniform distribution, above 0 and at most 1
    """

    smoothing: float = 0.1
    capturable: ClassVar[bool] = True
    topic = "data and losses"

    def __post_init__(self) -> None:
        if not 0 < self.smoothing <= 1:
            raise ValueError(f"smoothing is above 0 and at most 1, not {self.smoothing}")

    @hookimpl
    def setup(self, run: Run) -> None:
        if replacing := run.hook.replaced.get("compute_loss"):
            raise UsageError(f"{replacing} computes the loss, so labels cannot be smoothed; leave out one of the two")
        if [isinstance(plugin, LabelSmoothing) for plugin in run.hook.plugins.values()].count(True) > 1:
            raise UsageError("labels are smoothed once; leave out the other label_smoothing")
        self.smoothed = smoothed(run.loss_fn, self.smoothing)

    # The loss function is replaced only while the hook runs, so that everybody else sees the user's own.
    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run) -> Generator[None, Tensor, Tensor]:
        if not torch.is_grad_enabled():         # an evaluation
            return (yield)
        plain, run.loss_fn = run.loss_fn, self.smoothed
        try:
            return (yield)
        finally:
            run.loss_fn = plain


def smoothed(loss_fn: Any, smoothing: float) -> Any:
    """A cross entropy with smoothed labels, which shares its tensors with `loss_fn`. Raises UsageError for others."""
    of_module = isinstance(loss_fn, nn.CrossEntropyLoss) and type(loss_fn).forward is nn.CrossEntropyLoss.forward
    keywords = loss_fn.keywords if isinstance(loss_fn, partial) else {}
    if not of_module and cross_entropy not in (loss_fn, getattr(loss_fn, "func", None)):
        given = "there is no loss_fn" if loss_fn is None else f"loss_fn is {name_of(loss_fn)}"
        raise UsageError(f"{given}, and labels are smoothed in torch's cross entropy; use torch.nn.CrossEntropyLoss() "
                         "as loss_fn (on the command line --loss cross_entropy), or leave it out")
    if own := loss_fn.label_smoothing if of_module else keywords.get("label_smoothing"):
        raise UsageError(f"loss_fn has label_smoothing={own:g} already, in validation too; leave it out there or here")
    if not of_module:
        return partial(loss_fn, label_smoothing=smoothing)
    found = copy(loss_fn)
    found.label_smoothing = smoothing
    return found


def name_of(loss_fn: Any) -> str:
    """What a loss function is, for a message: the name of a function, or the class of an object."""
    return getattr(loss_fn, "__name__", None) or f"a {type(loss_fn).__name__}"
