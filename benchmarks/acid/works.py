"""The works of the acid test: what is trained in each, the same for every library.

A script of a library is LIBRARY/WORK.py. It imports torch, the library and this file, and has one function:

    def train(work: Work, model: nn.Module, tape: Recording) -> dict[str, Any] | None

which trains `model` as the documentation of the library says, with what `work` gives. It is called inside of
`loopctl.tape.record(file, model)`, which notes every update. What it returns are results that are compared too, under
the names that the work asks for, numbers and tensors of float32 to a relative 1e-6. `tape` is needed only where no
optimizer of torch makes the updates: `with tape.update(lr=...)` around each.

Where the library cannot do it the script raises NotOffered or NeedsGpu, with a sentence that says so.

The works `resume_in_mid_epoch` and `early_stopping_state` have two parts. `train` is called twice, each time in a new
process with a new model: with `work.part` 1 it trains `work.stop_after` updates or epochs, and saves to `work.folder`;
with `work.part` 2 it goes on from there to the end. With `work.part` 0, which only the plain loop gets, it trains in
one go.

In the work `ddp_uneven_data`, torchrun starts two processes, and each calls `train`; the environment has RANK and so
on. The plain loop makes the same updates in one process.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

INPUTS, CLASSES = 6, 3


class NotOffered(Exception):
    """The library has no such thing or refuses it, and its documentation names no way to do it."""


class NeedsGpu(Exception):
    """The library does this on a GPU only."""


class Model(nn.Module):
    """The network that is trained: two linear layers, with a norm between them where gradients need not overflow."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, 8)
        self.norm = nn.LayerNorm(8) if normed else nn.Identity()
        self.last = nn.Linear(8, CLASSES)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(input))))


@dataclass
class Work:
    """One work: numbers, and what is made of them. `loss` is the mean over the samples of a batch."""

    name: str
    asks: str                           # what is asked for, in a sentence
    samples: int = 64
    batch_size: int = 8                 # the last batch has what is left
    epochs: int = 1
    lr: float = 0.125
    momentum: float = 0.5
    accumulate: int = 1                 # batches per update
    max_norm: float | None = None       # of the whole gradient of an update
    weight_decay: float = 0.0           # of matrices; biases and norms have none
    scheduled: bool = False             # the learning rate is lr x factor(number of steps before)
    fp16: bool = False                  # autocast to float16 with torch.amp.GradScaler("cpu"), as it is by default
    overflow_in: int | None = None      # the batch whose inputs are so large that its gradients overflow in float16
    ema_decay: float | None = None      # average = decay x average + (1 - decay) x weights, after every update
    lbfgs: bool = False
    stop_after: int | None = None       # updates or, of early_stopping_state, epochs in the first part
    patience: int | None = None         # evaluations that are not better, after which the training ends
    processes: int = 1
    valid_samples: int = 20             # so that the last of the batches of 8 is smaller
    opposite: bool = False              # validation wants other classes, so its loss rises from the first epoch on
    results: tuple[str, ...] = ()       # names of what `train` returns
    part: int = 0                       # 0: in one go, 1: until stop_after, 2: the rest
    folder: Path = field(default_factory=Path)      # an empty folder for what the library writes

    def make_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = Model(normed=not self.fp16)
        return model.double() if self.lbfgs else model

    @property
    def loss(self) -> nn.Module:
        return nn.CrossEntropyLoss()

    @property
    def train_data(self) -> TensorDataset:
        """Pairs of float32 inputs (float64 in lbfgs) and int64 classes, always in this order."""
        return self.data(self.samples, 2, False)

    @property
    def valid_data(self) -> TensorDataset:
        return self.data(self.valid_samples, 3, self.opposite)

    def data(self, samples: int, seed: int, opposite: bool) -> TensorDataset:
        generator = torch.Generator().manual_seed(seed)
        input = torch.randn(samples, INPUTS, generator=generator, dtype=torch.float64 if self.lbfgs else torch.float32)
        target = (input[:, :CLASSES] * (-1 if opposite else 1)).argmax(1)
        if self.overflow_in is not None and seed == 2:
            input[self.overflow_in * self.batch_size:(self.overflow_in + 1) * self.batch_size, -1] = 3e4
        return TensorDataset(input, target)

    def train_loader(self) -> DataLoader:
        return DataLoader(self.train_data, self.batch_size)

    def valid_loader(self) -> DataLoader:
        return DataLoader(self.valid_data, self.batch_size)

    def batches(self) -> Sequence[tuple[Tensor, Tensor]]:
        return [(input, target) for input, target in self.train_loader()]

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Matrices with weight decay, and biases and norms without."""
        parameters = list(model.parameters())
        return [{"params": [each for each in parameters if each.ndim > 1], "weight_decay": self.weight_decay},
                {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0}]

    def make_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer, of parameters or groups: SGD, AdamW where there is weight decay, or LBFGS."""
        if self.lbfgs:
            return torch.optim.LBFGS(parameters, lr=0.25, max_iter=4, history_size=5)
        if self.weight_decay:
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, lr=self.lr, momentum=self.momentum)

    @property
    def steps(self) -> int:
        """Updates in all epochs, with one for the batches that are left at the end of an epoch."""
        batches = -(-self.samples // self.batch_size)
        return self.epochs * -(-batches // self.accumulate)

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied by in the step after `step` others: from 1 down to 1 / steps."""
        return 1 - step / self.steps

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """torch's schedule of `factor`, whose `step` is to be called once per step."""
        return LambdaLR(optimizer, self.factor)


WORKS = {work.name: work for work in (
    Work("uneven_accumulation", "Accumulate the gradients of 4 batches, of which the last is smaller: each sample has "
         "the same weight in its update.", samples=60, accumulate=4, epochs=2),
    Work("last_partial_group", "Accumulate the gradients of 4 batches where an epoch has 10: the last update of an "
         "epoch is the mean of its 2 batches.", samples=80, accumulate=4, epochs=2),
    Work("fp16_overflow", "Train in float16 with a loss scale: the gradients are unscaled before their norm is "
         "clipped to 0.5, and a step whose gradients overflow changes no weight.", fp16=True, overflow_in=3,
         max_norm=0.5),
    Work("clip_with_accumulation", "Accumulate 4 batches and clip the norm of the gradient of the whole update to "
         "0.25.", accumulate=4, max_norm=0.25, epochs=2),
    Work("schedule_per_step_with_accumulation", "A learning rate that falls with every update to the end of the "
         "training, with 4 batches per update.", accumulate=4, scheduled=True, epochs=3),
    Work("skipped_step_and_schedule", "A learning rate that falls with every step to the end of the data; one step is "
         "skipped because its float16 gradients overflow, and counts.", fp16=True, overflow_in=3, scheduled=True),
    Work("weight_decay_groups", "AdamW with weight decay for matrices, and none for biases and norms.",
         weight_decay=0.1, lr=0.01, epochs=2),
    Work("ema", "An exponential moving average of the weights, taken after every update of 2 batches, beginning with "
         "the weights after the first. Returns the average, and its validation loss.", accumulate=2, ema_decay=0.75,
         epochs=2, results=("average", "valid_loss")),
    Work("resume_in_mid_epoch", "Stop after 11 updates, 3 into the second epoch, save, and resume in a new process: "
         "the same updates as without the stop.", epochs=3, scheduled=True, stop_after=11),
    Work("lbfgs", "Train with L-BFGS, which computes the loss several times in an update.", lbfgs=True, epochs=2),
    Work("uneven_validation", "The validation loss is the mean over all samples, with a smaller last batch.",
         epochs=2, results=("valid_loss",)),
    Work("early_stopping_state", "Stop when 4 evaluations in a row are not better. The run is resumed in a new process "
         "after 3 epochs, of which the first was the best, and ends after epoch 5.", lr=0.0625, epochs=12, stop_after=3,
         patience=4, opposite=True, results=("epochs",)),
    Work("ddp_uneven_data", "Two processes, and a number of samples that they cannot share evenly: each sample counts "
         "once in an epoch, and has the same weight in its update.", samples=75, epochs=2, processes=2),
)}
