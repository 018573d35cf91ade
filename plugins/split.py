"""Batches cut to fit memory."""
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from loopctl import Run, UsageError, hookimpl
from loopctl.data.batch import apply_weight, iter_tensors, map_nested
from loopctl.rng import rng_state, set_rng_state


@dataclass(eq=False)
class Split:
    """Cut each batch into parts that fit in memory: the same gradient, one part at a time.

    Every tensor of a batch is cut along its first dimension, into nearly equal parts that count by their size. To all
    but compute_loss and backward the batch is whole: run.outputs are joined, and schedules and steps are the same.
    BatchNorm sees the parts. It is gradient accumulation within a batch; GPipe, arXiv:1811.06965, calls them
    micro-batches.

    into: number of parts; auto starts with 1 and doubles it where memory does not suffice for a forward or backward
        pass, then does the step over with the same random numbers
    """

    into: int | Literal["auto"] = 2

    def __post_init__(self) -> None:
        if self.into != "auto" and self.into < 1:
            raise ValueError(f"into is at least 1, or auto, not {self.into}")
        self.parts = 1 if self.into == "auto" else self.into
        self.begun: list[tuple[Any, float | Tensor]] = []        # the step's micro-batches so far, with their weights

    @hookimpl
    def train_start(self, run: Run) -> None:
        if self.into == "auto" and run.world_size > 1:
            raise UsageError("into=auto: a process cannot do a step over while others wait for it; pass a number")
        self.within = False             # what comes is a part
        self.statistics = [buffer for module in run.model.modules() if isinstance(module, _BatchNorm)
                           for buffer in module.buffers(recurse=False)]

    @hookimpl
    def before_step(self) -> None:
        self.begun = []

    # It cannot be done over in a wrapper, which yields once.
    @hookimpl
    def micro_step(self, run: Run, batch: Any, weight: float | Tensor, last: bool) -> Tensor:
        if self.within:
            part = apply_weight(run.hook.compute_loss(run=run, batch=batch), weight)
            run.hook.backward(run=run, loss=part)
            return part.detach()
        if not self.begun and self.into == "auto":
            self.random = rng_state()
            self.kept = [buffer.clone() for buffer in self.statistics]
        self.begun.append((batch, weight))
        todo, loss = self.begun[-1:], None          # type: Any, Tensor | None
        while loss is None:
            try:
                for number, (batch, weight) in enumerate(todo, 1):
                    loss = self.look(run, batch, weight, last and number == len(todo))
            except torch.OutOfMemoryError:
                if self.into != "auto" or self.parts >= size(batch):
                    raise
                loss = None
            if loss is None:            # not in the handler: what was raised still holds the activations there
                self.parts *= 2
                self.start_over(run)
                todo = self.begun       # of a half-done gradient nothing can be kept
        if last:
            self.begun = []
        return loss

    def look(self, run: Run, batch: Any, weight: float | Tensor, last: bool) -> Tensor:
        """Go forward and backward over one batch, part by part; return its share of the loss.

        Each part is a micro-step in this one, for whoever must know which backward pass is the step's last.
        """
        parts = cut(batch, self.parts)
        if len(parts) < self.parts and run.world_size > 1:
            raise UsageError(f"a batch of {len(parts)} samples is not cut into {self.parts} parts while other "
                             "processes wait; use a smaller number, or DataLoader(drop_last=True)")
        counts = [run.hook.batch_weight(run=run, batch=part) for part in parts]
        total, losses, outputs = sum(counts), [], []
        self.within = True
        try:
            for number, (part, count) in enumerate(zip(parts, counts, strict=True), 1):
                share = weight if len(parts) == 1 else weight * count / total
                final = last and number == len(parts)
                losses.append(run.hook.micro_step(run=run, batch=part, weight=share, last=final))
                outputs.append(run.outputs)
        finally:
            self.within = False
        if len(parts) > 1:
            with torch.no_grad():
                run.outputs = join(outputs, [size(part) for part in parts])
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def start_over(self, run: Run) -> None:
        run.outputs = None
        run.optimizer.zero_grad()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        set_rng_state(self.random)
        with torch.no_grad():
            for buffer, was in zip(self.statistics, self.kept, strict=True):
                buffer.copy_(was)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": self.parts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.into == "auto":
            self.parts = state["parts"]


def size(batch: Any) -> int:
    """How many samples a batch has: the length of its first tensor that has one."""
    return next((tensor.shape[0] for tensor in iter_tensors(batch) if tensor.ndim), 1)


def cut(batch: Any, parts: int) -> list[Any]:
    """`batch` in nearly equal parts of at least one sample, views of it. Numbers and the like are in every part."""
    samples = size(batch)
    parts = min(parts, samples)
    ends = [samples * number // parts for number in range(parts + 1)]
    if parts == 1:
        return [batch]

    def one(begin: int, end: int) -> Callable[[Any], Any]:
        def take(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.ndim:
                return value
            if len(value) != samples:
                raise UsageError(f"cannot cut a batch of {samples} samples that has a tensor of length {len(value)}")
            return value[begin:end]
        return take

    return [map_nested(one(begin, end), batch) for begin, end in pairwise(ends)]


def join(outputs: list[Any], sizes: list[int]) -> Any:
    """What a model returned for the parts as if for the whole; what is no tensor of samples is the last part's."""
    def together(*values: Any) -> Any:
        per_sample = all(isinstance(value, Tensor) and value.ndim and len(value) == size
                         for value, size in zip(values, sizes, strict=True))
        return torch.cat(values) if per_sample else values[-1]
    return map_nested(together, *outputs)
