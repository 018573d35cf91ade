"""Split batches into micro-batches that fit in memory."""
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from loopctl import Run, UsageError, hookimpl
from loopctl.data.batch import iter_tensors, map_nested
from loopctl.metrics.weights import counts_nothing, weighted_loss
from loopctl.report.terminal import counted
from loopctl.rng import rng_state, set_rng_state


@dataclass(eq=False)
class Split:
    """Split each batch into parts that fit in memory, and add up their gradients.

    Every tensor of a batch is split along its first dimension into nearly equal parts, weighted by their size. Only
    compute_loss and backward get the parts: run.outputs are concatenated, and schedules and the number of steps do not
    change. BatchNorm computes the statistics of each part. GPipe, arXiv:1811.06965, calls the parts micro-batches.

    into: number of parts, of which part i begins at sample i * N // into of N; auto starts with 1 and doubles it when a
        forward or backward pass runs out of memory, then repeats the step with the same random numbers
    """

    into: int | Literal["auto"] = 2
    topic = "gradients"

    def __post_init__(self) -> None:
        if self.into != "auto" and self.into < 1:
            raise ValueError(f"into is at least 1, or auto, not {self.into}")
        self.parts = 1 if self.into == "auto" else self.into
        self.batches: list[tuple[Any, float | Tensor]] = []      # of the current step so far, with their weights

    @hookimpl
    def train_start(self, run: Run) -> None:
        if run.carries_state:
            raise UsageError("forward carries a state from batch to batch, which has no parts; use smaller batches")
        if self.into == "auto" and run.world_size > 1:
            raise UsageError("into=auto: a process cannot repeat a step while the others wait for it; pass a number")
        self.in_batch = False           # micro_step is called for a part of a batch
        self.statistics = [buffer for module in run.model.modules() if isinstance(module, _BatchNorm)
                           for buffer in module.buffers(recurse=False)]

    @hookimpl
    def before_step(self) -> None:
        self.batches = []

    # Not a wrapper, because a wrapper yields once and cannot repeat the step.
    @hookimpl
    def micro_step(self, run: Run, batch: Any, weight: float | Tensor, last: bool) -> Tensor:
        if self.in_batch:
            part = weighted_loss(run.hook.compute_loss(run=run, batch=batch), weight)
            run.hook.backward(run=run, loss=part)
            return part.detach()
        if not self.batches and self.into == "auto":
            self.rng_state = rng_state()
            self.saved_statistics = [buffer.clone() for buffer in self.statistics]
            self.logged = run.meters.logged_state()
        self.batches.append((batch, weight))
        todo, loss = self.batches[-1:], None        # type: Any, Tensor | None
        while loss is None:
            try:
                for number, (batch, weight) in enumerate(todo, 1):
                    loss = self.forward_backward(run, batch, weight, last and number == len(todo))
            except torch.OutOfMemoryError:
                if self.into != "auto" or self.parts >= size(batch):
                    raise
                loss = None
            if loss is None:            # not in the except block, where the exception keeps the activations in memory
                self.parts *= 2
                self.reset_step(run)
                todo = self.batches     # repeat all batches of the step: their gradients are lost
        if last:
            self.batches = []
        return loss

    def forward_backward(self, run: Run, batch: Any, weight: float | Tensor, last: bool) -> Tensor:
        """Run the forward and backward passes of one batch, part by part; return its share of the loss.

        Each part is a nested micro_step, so that wrappers such as DDP's no_sync see the last backward pass of the step.
        """
        parts = split_batch(batch, self.parts)
        if len(parts) < self.parts and run.world_size > 1:
            raise UsageError(f"cannot split a batch of {counted(len(parts), 'sample')} into {self.parts} parts, which "
                             "the other processes do; use a smaller number, or DataLoader(drop_last=True)")
        counts = [run.hook.batch_weight(run=run, batch=part) for part in parts]
        total, losses, outputs = sum(counts), [], []
        if counts_nothing(total):       # every part has the batch's weight, which is 0
            counts, total = [1] * len(parts), len(parts)
        self.in_batch, logging = True, run.log_target
        try:
            for number, (part, count) in enumerate(zip(parts, counts, strict=True), 1):
                share = weight if len(parts) == 1 or run.reduction == "sum" else weight * count / total
                final = last and number == len(parts)
                if logging is not None:
                    run.log_target = logging[0], logging[1] * count / total
                losses.append(run.hook.micro_step(run=run, batch=part, weight=share, last=final))
                outputs.append(run.outputs)
        finally:
            self.in_batch, run.log_target = False, logging
        if len(parts) > 1:
            with torch.no_grad():
                run.outputs = join_outputs(outputs, [size(part) for part in parts])
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def reset_step(self, run: Run) -> None:
        """Undo the forward and backward passes of the step, and free their memory."""
        run.outputs = None
        run.optimizer.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        set_rng_state(self.rng_state)
        run.meters.logged.clear()
        run.meters.load_logged_state(self.logged)
        self.logged = run.meters.logged_state()         # a copy
        with torch.no_grad():
            for buffer, saved in zip(self.statistics, self.saved_statistics, strict=True):
                buffer.copy_(saved)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.into == "auto":
            self.parts = state["parts"]


def size(batch: Any) -> int:
    """The number of samples in a batch: the length of its first tensor that has a dimension."""
    return next((tensor.shape[0] for tensor in iter_tensors(batch) if tensor.ndim), 1)


def split_batch(batch: Any, parts: int) -> list[Any]:
    """Split `batch` into at most `parts` nearly equal parts of at least one sample, which are views of it.

    Values that are not tensors, and tensors without dimensions, are in every part. Raises UsageError if the tensors
    differ in length.
    """
    samples = size(batch)
    parts = max(1, min(parts, samples))
    ends = [samples * number // parts for number in range(parts + 1)]
    if parts == 1:
        return [batch]

    def part(begin: int, end: int) -> Callable[[Any], Any]:
        def take(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.ndim:
                return value
            if len(value) != samples:
                raise UsageError(f"cannot split a batch of {counted(samples, 'sample')} that has a tensor of length "
                                 f"{len(value)}")
            return value[begin:end]
        return take

    return [map_nested(part(begin, end), batch) for begin, end in pairwise(ends)]


def join_outputs(outputs: list[Any], sizes: list[int]) -> Any:
    """Concatenate the model's outputs for the parts. A value that has not one row per sample is taken from the last."""
    def concatenate(*values: Any) -> Any:
        per_sample = all(isinstance(value, Tensor) and value.ndim and len(value) == size
                         for value, size in zip(values, sizes, strict=True))
        return torch.cat(values) if per_sample else values[-1]
    return map_nested(concatenate, *outputs)
