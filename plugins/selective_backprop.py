"""Selective backpropagation: train on the samples with the largest losses."""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from loopctl import Run, UsageError, hookimpl
from loopctl.data.batch import map_nested, sample_count
from loopctl.model.eval_mode import eval_mode
from loopctl.model.ownership import modules_of


@dataclass(eq=False)
class SelectiveBackprop:
    """Train on the samples of a batch that have large losses, and leave the others out.

    Jiang et al., arXiv:1910.00762, with the option names of MosaicML's Composer. The losses come from a forward pass in
    eval mode, without gradients. Samples are drawn without replacement, with a probability that grows with the rank of
    their loss: rank ** (1 / keep - 1). The loss function must have reduction="none", as torch's have. Schedules and
    steps stay the same; a step weighs the samples that it keeps.

    start: the part of the run after which samples are left out
    end: the part of the run after which all samples are trained on again
    keep: the part of the samples that is kept
    interrupt: every so many steps one is made with all samples; 0 means never
    """

    start: float = 0.5
    end: float = 0.9
    keep: float = 0.5
    interrupt: int = 2
    topic = "data and losses"

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise ValueError(f"start and end are parts of the run, start before end, not {self.start} and {self.end}")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep is between 0 and 1, not {self.keep}")
        if self.interrupt < 0:
            raise ValueError(f"interrupt is at least 0, not {self.interrupt}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        if run.forward is not None or run.loss_fn is None or "compute_loss" in run.hook.replaced:
            raise UsageError("the loss of each sample is computed by loss_fn with reduction='none', and this run "
                             "computes its loss in another way; pass loss_fn, such as torch.nn.CrossEntropyLoss()")
        if run.world_size > 1 and run.parallel is not None and run.parallel.collective_forward:
            raise UsageError("a forward pass of one process would wait for the others; use ddp in place of fsdp")
        with per_sample(run.loss_fn):
            pass                        # raises where that is not possible

    @hookimpl
    def transform_batch(self, run: Run, batch: Any) -> Any:
        skipped = self.interrupt and run.attempts % self.interrupt == 0
        if not self.start <= run.progress < self.end or skipped:
            return batch
        if not (isinstance(batch, tuple | list) and len(batch) == 2):
            raise UsageError("selective_backprop takes batches that are a pair (input, target)")
        samples = sample_count(batch)
        kept = self.selected(self.losses(run, *batch), max(1, int(samples * self.keep)))

        def take(leaf: Any) -> Any:
            return leaf[kept] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == samples else leaf

        if run.metric_target is not None:
            run.metric_target = map_nested(take, run.metric_target)
        return map_nested(take, batch)

    def losses(self, run: Run, input: Any, target: Any) -> Tensor:
        """The loss of each sample; shape (N,)."""
        with torch.no_grad(), eval_mode(*modules_of(run)), per_sample(run.loss_fn) as loss_fn:
            losses: Tensor = loss_fn(run.model(input), target)
        if not losses.ndim:
            raise UsageError("loss_fn returned one number with reduction='none', so a sample's loss is unknown; "
                             "leave out selective_backprop")
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    def selected(self, losses: Tensor, number: int) -> Tensor:
        """The indices of the samples to train on, in increasing order."""
        ranks = losses.argsort().argsort()          # 0 for the smallest loss
        chances = ((ranks + 0.5) / len(losses)) ** (1 / self.keep - 1)
        return torch.multinomial(chances, number, replacement=False).sort().values


@contextmanager
def per_sample(loss_fn: Any) -> Iterator[Any]:
    """Yield the loss function with one loss per sample. Raises UsageError where it has no `reduction`."""
    if isinstance(loss_fn, nn.Module) and hasattr(loss_fn, "reduction"):
        before: Any = loss_fn.reduction
        loss_fn.reduction = "none"      # type: ignore[assignment]
        try:
            yield loss_fn
        finally:
            loss_fn.reduction = before
    elif not isinstance(loss_fn, nn.Module) and "reduction" in signature(loss_fn).parameters:
        yield partial(loss_fn, reduction="none")
    else:
        raise UsageError("loss_fn has no option reduction='none', as torch's losses have, so a sample's loss is "
                         "unknown; give yours an argument `reduction`, or leave out selective_backprop")
