"""Stochastic weight averaging."""
import sys
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import cos, inf, pi, prod
from typing import Any, Literal

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from loopctl import Duration, Run, UsageError, hookimpl
from loopctl.data.batch import batches_to_device
from loopctl.data.sharding import find_shard
from loopctl.distributed.process_group import all_reduce_sum
from loopctl.model.own_names import own_buffers, own_modules
from loopctl.model.ownership import named_parameters
from loopctl.model.weight_averages import (
    WeightAverage,
    alike,
    is_averaged,
    lerp_average,
    loaded_average,
    named_tensors,
    new_average,
    swapped_weights,
)
from loopctl.rng import rng_state, set_rng_state


@dataclass(eq=False)
class Swa(WeightAverage):
    """Average the weights of the last epochs; evaluate and end with the average.

    It is torch.optim.swa_utils: AveragedModel, SWALR and update_bn; from arXiv:1803.05407. The average is the mean of
    the weights at the end of each epoch from start on; training continues with the raw weights. For a model with
    BatchNorm, each of these epochs reads the training data once more, to recompute the statistics for the average.

    start: where averaging begins, rounded down to whole epochs
    swa_lr: learning rate of every parameter group while averaging, in place of other schedules; theirs if left out
    anneal_epochs: epochs in which the learning rate moves from the schedules' to swa_lr
    anneal_strategy: along half a cosine, or linearly
    evaluate_raw: evaluate the raw weights too, which takes as long again; their metrics are val_raw_loss and so on
    """

    start: Duration = "75%"
    swa_lr: float | None = None
    anneal_epochs: int = 10
    anneal_strategy: Literal["cos", "linear"] = "cos"
    evaluate_raw: bool = False
    topic = "weights"

    def __post_init__(self) -> None:
        if self.anneal_epochs < 0:
            raise ValueError(f"anneal_epochs is at least 0, not {self.anneal_epochs}")
        if self.swa_lr is None:
            self.lr_scale = None        # type: ignore[assignment, method-assign]
        elif not self.swa_lr >= 0:
            raise ValueError(f"swa_lr is at least 0, not {self.swa_lr}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        if run.planned.steps(self.first(run)) >= run.planned_steps:
            raise UsageError(f"start={self.start} is not before the run's end, so nothing would be averaged")
        self.average: dict[str, Any] = {}       # empty until it starts
        self.count = 0
        self.due = False

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if not run.seen_in_epoch:               # else the run resumes here, and the loaded state says whether it is due
            self.due = run.epoch >= self.first(run)

    @hookimpl(wrapper=True)
    def lr_scale(self, run: Run, initial_lr: float) -> Generator[None, list[float], list[float]]:
        start = self.first(run)
        if run.epoch < start or self.swa_lr is None:
            return (yield)
        part = min(1.0, (run.epoch - start) / self.anneal_epochs) if self.anneal_epochs else 1.0
        if self.anneal_strategy == "cos":
            part = (1 - cos(pi * part)) / 2
        with at_epoch(run, start):
            factors = yield
        return [part * self.swa_lr / initial_lr + (1 - part) * prod(factors)]

    # After the epoch's last step, not in its evaluation, where another average may be in place of the raw weights.
    @hookimpl
    def after_step(self, run: Run) -> None:
        if self.due and (run.seen_in_epoch >= run.plan()[1] or run.step >= run.max_steps):
            self.update(run)

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        if self.due and not run.stop:       # the loader gave fewer batches than its length
            self.update(run)

    def update(self, run: Run) -> None:
        weights = {name: weight.detach() for name, weight in named_parameters(run).items() if is_averaged(weight)}
        norms = {name: module for name, module in own_modules(run.model)
                 if isinstance(module, _BatchNorm) and module.training and module.track_running_stats}
        if not self.average:
            self.average = new_average(weights)
        else:
            for names in alike(weights):
                lerp_average(self.average, weights, names, 1 / (self.count + 1))
        self.count += 1
        self.due = False
        if norms:
            with swapped_weights(named_tensors(run), self.average | own_buffers(run.model)):
                recompute(run, norms.values())
                self.average |= {key: buffer.clone() for name, module in norms.items()
                                 for key, buffer in module.named_buffers(name, recurse=False)}

    def first(self, run: Run) -> int:
        """The first epoch that is averaged, from 0. The 1e-9 makes up for rounding below a whole number."""
        return int(run.duration(self.start, "epoch") + 1e-9)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "count": self.count, "due": self.due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.count, self.due = loaded_average(state["average"]), state["count"], state["due"]


@contextmanager
def at_epoch(run: Run, epoch: int) -> Iterator[None]:
    """Set the counters to the start of `epoch` for a while, so that schedules return their factors there."""
    attempts, seen = int(run.planned.steps(epoch)), run.planned.micro_batches(epoch)
    with run.counters.temporarily(epoch=epoch, attempts=attempts, seen=seen):
        yield


@torch.no_grad()
def recompute(run: Run, norms: Iterable[_BatchNorm]) -> None:
    """Recompute BatchNorm's statistics as means over the training data. The random-number states stay as they are.

    It is torch's update_bn, but takes batches of any kind as a step does, and leaves out frozen parts.
    """
    momenta = {norm: norm.momentum for norm in norms}
    part = find_shard(run.train)
    own = inf if part is None else part.real_batches             # a filler may follow, which does not count
    random, outputs, read = rng_state(run.train), run.outputs, 0
    try:
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None        # the mean of all batches; 0 would keep the old statistics
        groups = run.hook.group_batches(run=run, batches=batches_to_device(run.train, run.device))
        compiling = "torch._dynamo" in sys.modules          # BatchNorm without a momentum does not compile
        with torch.compiler.set_stance("force_eager") if compiling else nullcontext():
            for group in islice(groups, run.steps_per_epoch):
                for batch in group:
                    if read == own:
                        for norm in momenta:
                            norm.momentum = 0.0
                    run.hook.compute_loss(run=run, batch=batch)
                    read += 1
        share = min(read, own)
        every = all_reduce_sum(run, share)
        for norm in momenta if run.world_size > 1 else ():
            for mean in (norm.running_mean, norm.running_var):
                if mean is not None:
                    mean.copy_(all_reduce_sum(run, mean * (share / every)))
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        set_rng_state(random, run.train)
        run.outputs = outputs
    if not read:
        raise UsageError("train cannot be read a second time, for the average's BatchNorm statistics; pass a list or "
                         "a DataLoader")
