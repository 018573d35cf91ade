"""What plugins have in common that train in several processes, with one device each."""
from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, default_collate

from loopctl.data.batch import length_or_none
from loopctl.data.sharding import Shard, shard_data
from loopctl.distributed.process_group import (
    AgreedStop,
    StopConsensus,
    all_gather,
    all_reduce_mean,
    all_reduce_sum,
    broadcast_from_rank0,
    broadcast_tensors,
    join_process_group,
    leave_process_group,
)
from loopctl.errors import UsageError
from loopctl.hooks import hookimpl
from loopctl.optim.fast_step import SINGLE_CLOSURE_CALL
from loopctl.rng import seed_everything

if TYPE_CHECKING:
    from loopctl.run import Run


@dataclass(eq=False)
class Parallel:
    """Trains in several processes, each with its part of every step; how their gradients meet is the subclass's.

    The loop stays what it is. A step is over the micro-batches of all processes, and each of these weighs its weight
    over that of all, so that the update is the one that a single process would make of them. Metrics are weighted in
    the same way, and are the same in every process; whoever judges them comes to the same result everywhere. What one
    process notices alone, such as the end of its time in `run.stop`, all of them act on at the same step.

    shard: give each process its part of the data; false where the data is in parts already, as many batches in each
    """

    shard: bool = True

    alone: ClassVar[bool] = False           # be a process group also where there is one process

    @hookimpl(wrapper=True)
    def setup(self, run: Run) -> Generator[None, None, None]:
        self.join(run)                      # before the others' setup, so that they know which process they are in
        result = yield
        self.spread(run)                    # after it: they have seen the user's own model
        return result

    def join(self, run: Run) -> None:
        for name, other in run.hook.plugins.items():
            if other is not self and isinstance(other, Parallel):
                raise UsageError(f"{name} has the processes train together already; choose one")
        self.begins = join_process_group(run, self.alone)
        self.stop = ""                      # the reason to end that all processes have agreed on,
        self.wish = ""                      # and the one that this process has noticed
        self.together = StopConsensus()
        self.evaluating, self.uneven, self.depth = False, False, 0
        run.out, run.resume = broadcast_from_rank0(run, (run.out, run.resume))
        # Not torch.seed(): a run that goes on draws the same batches.
        self.seed = broadcast_from_rank0(run, torch.initial_seed())
        self.shards: dict[str, Shard | None] = {"train": None, "valid": None}
        run.parallel = self
        if self.shard:
            run.train, self.shards["train"] = shard_data(run.train, run.rank, run.world_size, self.seed)
        if self.shard and run.valid is not None:
            run.valid, self.shards["valid"] = shard_data(run.valid, run.rank, run.world_size, self.seed)

    def spread(self, run: Run) -> None:
        """Change the model, when all plugins have had their setup and before there is an optimizer."""

    def release(self, run: Run) -> None:
        """Let go, after training, of what only training needs."""

    @hookimpl
    def wrap_model(self, run: Run) -> None:
        # All processes had the same random numbers, to begin with the same model. Their noise is to be their own.
        if run.rank:
            seed_everything((self.seed + run.rank) % 2**63)

    @hookimpl
    def train_start(self, run: Run) -> None:
        # Whether the samples in a step are known to every process without asking.
        others = [name for name in run.hook.acting["batch_weight"] if run.hook.plugins[name] is not self]
        collates = run.train.collate_fn if isinstance(run.train, DataLoader) else None
        counted = not others and (collates in (None, default_collate) or getattr(collates, "keeps_sample_count", False))
        self.known = counted and self.shards["train"] is not None
        # In parts that others made, each of the same length, all have as many without asking.
        length = None
        if counted and isinstance(run.train, DataLoader) and type(run.train.batch_sampler) is BatchSampler:
            length = run.train.batch_size, length_or_none(run.train.sampler), run.train.drop_last
        lengths = all_gather(run, length)
        self.alike = length is not None and all(one == length for one in lengths)
        self.single_closure_call = type(run.optimizer) in SINGLE_CLOSURE_CALL

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.buffers = list(run.model.buffers())        # to look for them takes longer than to send some

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        try:
            try:
                return (yield)
            finally:
                self.release(run)
        except BaseException:
            if self.begins and run.world_size > 1:
                leave_process_group(seconds=2)      # now, so that nobody waits for this process
            raise

    @hookimpl(wrapper=True)
    def batch_weight(self, run: Run, batch: Any) -> Generator[None, float | Tensor, float | Tensor]:
        weight = yield
        return weight if self.counts(run, batch) else weight * 0

    def counts(self, run: Run, batch: Any) -> bool:
        """Whether `batch` is no filler. The last one of a pass may be."""
        if self.evaluating:
            shard, at = self.shards["valid"], run.loaders["valid"].at
        else:
            shard, at = self.shards["train"], run.seen_in_epoch + len(run.batches) - 1
            if not run.batches or batch is not run.batches[-1]:
                return True
        return shard is None or shard.counts(at)

    def mean_weight(self, run: Run, own: Any) -> Any:
        """The mean over the processes of what a step weighs in each; `own` is its weight in this one.

        A process's share of its step is then too large by the number of processes, which the mean of the gradients
        over the processes takes away again. The reported loss comes out the same way.
        """
        if run.world_size == 1 or self.alike:
            return own
        shard = self.shards["train"]
        counts = shard.together(run.seen_in_epoch, len(run.batches)) if shard is not None and self.known else None
        if counts:
            total, even, here = counts
            if own != here:
                raise UsageError(f"train gave {own} samples for {here} indices; return what a batch counts from "
                                 "batch_weight, in a plugin")
        else:
            total, even = all_reduce_sum(run, own), False       # nor is known what the others have
        self.uneven = not even
        return total / run.world_size

    @hookimpl(wrapper=True)
    def micro_step(self, run: Run, last: bool) -> Generator[None, Tensor, Tensor]:
        self.depth += 1
        try:
            with self.meeting(run, last):
                loss = yield
        finally:
            self.depth -= 1
        if self.depth:                  # a part of a micro-batch, see `split`
            return loss
        if last and self.buffers:
            # What looks at the model between two steps, an average or an evaluation, sees the same in every process.
            broadcast_tensors(run, self.buffers)
        # Where all weigh alike, a process's own loss is as good a report, and it costs no message. An optimizer that
        # looks at the loss must see the same everywhere.
        return all_reduce_mean(run, loss) if self.uneven or not self.single_closure_call else loss

    def meeting(self, run: Run, last: bool) -> AbstractContextManager[Any]:
        """Have the processes' gradients meet in the step's last micro-batch, and not before."""
        return nullcontext()

    @hookimpl(wrapper=True)
    def evaluate(self) -> Generator[None, dict[str, Any], dict[str, Any]]:
        self.evaluating = True
        try:
            return (yield)
        finally:
            self.evaluating = False

    # A wrapper, so that it comes after those that judge.
    @hookimpl(wrapper=True)
    def after_evaluate(self, run: Run) -> Generator[None, None, None]:
        result = yield
        self.agree(run, max(all_gather(run, str(run.stop or self.wish))))
        return result

    @hookimpl(wrapper=True)
    def epoch_end(self, run: Run) -> Generator[None, None, None]:
        result = yield
        self.agree(run, max(all_gather(run, str(run.stop or self.wish))))
        return result

    @hookimpl(wrapper=True)
    def safe_point(self, run: Run) -> Generator[None, None, None]:
        self.hold(run)
        result = yield
        self.hold(run)
        self.agree(run, self.together(run, self.wish) or self.stop)
        return result

    def hold(self, run: Run) -> None:
        """What was noticed here, and perhaps nowhere else, waits until all know of it."""
        if isinstance(run.stop, AgreedStop):
            run.stop = self.stop = str(run.stop)
        elif run.stop != self.stop:
            run.stop, self.wish = self.stop, run.stop

    def agree(self, run: Run, stop: str) -> None:
        run.stop = self.stop = stop
        self.wish = self.wish if not stop else ""


def step_weight(run: Run, weights: list[Any]) -> Any:
    """The weight of a step: the sum over its micro-batches; with several processes, the mean of their sums."""
    own = sum(weights)
    return own if run.parallel is None else run.parallel.mean_weight(run, own)
