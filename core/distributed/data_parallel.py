"""`Parallel`: the base class of data-parallel plugins such as ddp and fsdp; one process per device."""
from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, default_collate

from loopctl.data.batch import length_or_none, loader_name
from loopctl.data.micro_batches import weighing_plugins
from loopctl.data.sharding import Shard, shard_data
from loopctl.distributed.agreement import (
    describe_data,
    describe_model,
    describe_optimizer,
    describe_run,
    groups_in_step,
    length_is_certain,
    require_distinct_samplers,
    require_same,
)
from loopctl.distributed.process_group import (
    AgreedStop,
    StopConsensus,
    all_gather,
    all_reduce_mean,
    all_reduce_sum,
    broadcast_from_rank0,
    broadcast_tensors,
    is_single_process,
    join_process_group,
    leave_process_group,
    missing_processes_named,
)
from loopctl.errors import UsageError
from loopctl.hooks import hookimpl
from loopctl.model.ownership import loss_parameters, loss_tensors
from loopctl.optim.fast_step import SINGLE_CLOSURE_CALL, stepped_class
from loopctl.optim.several import each_optimizer
from loopctl.rng import seed_everything

if TYPE_CHECKING:
    from loopctl.run import Run


@dataclass(eq=False)
class Parallel:
    """Train in several processes, each with its part of every step. Subclasses synchronize the gradients.

    The loop itself does not change. A step is over the micro-batches of all processes, and each of them is weighted by
    its share of the whole step, so that the update is the one that a single process would make. Metrics are weighted in
    the same way and are equal in all processes, so that plugins make the same decisions in each of them. A reason to
    stop or to leave that only one process has, such as a time limit, takes effect in all processes at the same step.

    It is assumed that each process has a sample of its own, that gradients are averaged over the processes, and that
    random numbers such as those of dropout differ. A subclass that divides layers among the processes, as tensor
    parallelism does, has `same_data = True` and `shard = False`: then all have the same data and random numbers, and a
    step is that of one process.

    All processes must be started alike: what differs is refused before training, with the values and their ranks.

    shard: give each process its part of the data; false if the data is sharded already, with equally many batches
    timeout: seconds that a process waits for the others in a collective before it ends with an error that names those
        that are missing
    """

    shard: bool = True
    timeout: float = 1800.0

    needs_process_group: ClassVar[bool] = False         # create a process group even for a single process
    collective_forward: ClassVar[bool] = False          # the forward pass has collectives, in evaluation too
    same_data: ClassVar[bool] = False                   # all processes compute the same step, each a part of each layer
    topic = "several processes"

    def __post_init__(self) -> None:
        if not 0.001 <= self.timeout <= 1e9:        # torch counts milliseconds, in 64 bits
            raise ValueError(f"timeout is from 0.001 to 1e9 seconds, not {self.timeout}")

    @hookimpl(wrapper=True)
    def setup(self, run: Run) -> Generator[None, None, None]:
        with missing_processes_named(self.timeout):
            self.set_up_processes(run)      # before the setup of the other plugins, which may need run.rank
            result = yield
            require_same(run, describe_model)      # other plugins may have changed it
            self.convert_model(run)         # after it: in their setup, plugins are given the user's own model
        return result

    def set_up_processes(self, run: Run) -> None:
        """Join the process group, agree on folders and seed, and shard the data. Raises UsageError if it cannot."""
        for name, other in run.hook.plugins.items():
            if other is not self and isinstance(other, Parallel):
                raise UsageError(f"{name} trains in several processes already; choose one")
        if self.same_data and self.shard:
            raise UsageError("shard=true, but all processes compute the same step; use shard=false")
        self.created_group = join_process_group(run, self.needs_process_group, self.timeout)
        self.certain_length = length_is_certain(run.train)
        self.agreed_stop = ""               # the reason to stop that all processes have agreed on
        self.local_stop = ""                # one that this process has found, until they agree
        self.consensus, self.leave_consensus = StopConsensus(), StopConsensus()
        self.evaluating, self.uneven, self.depth = False, False, 0
        require_same(run, self.describe_request)
        if not self.same_data:
            require_distinct_samplers(run)
        run.out, run.resume = broadcast_from_rank0(run, (run.out, run.resume))
        # The initial seed and not a new one, so that a resumed run draws the same batches.
        self.seed = broadcast_from_rank0(run, torch.initial_seed())
        if self.shard and run.world_size > 1 and run.carries_state:
            raise UsageError("forward carries a state from each batch to the next, which would be another process's; "
                             "give each process a sequence of its own, with shard=false")
        self.shards: dict[str, Shard | None] = {"train": None, "valid": None}
        run.parallel = self
        if self.shard:
            run.train, self.shards["train"] = shard_data(run.train, run.rank, run.world_size, self.seed)
        if self.shard and run.valid is not None:
            divided = {name: shard_data(data, run.rank, run.world_size, self.seed)
                       for name, data in run.validation_sets().items()}
            self.shards |= {loader_name(name): shard for name, (_, shard) in divided.items()}
            sets = {name: data for name, (data, _) in divided.items()}
            run.valid = sets if isinstance(run.valid, Mapping) else sets[""]

    def describe_request(self, run: Run) -> dict[str, str | None]:
        found = describe_run(run) | describe_data("train", run.train, self.shard)
        for name, data in run.data_sets().items() if self.shard or self.collective_forward else ():
            found |= describe_data(name, data, self.shard)
        return found

    def convert_model(self, run: Run) -> None:
        """Convert the model's layers or parameters: after the setup of all plugins, before the optimizer is made."""

    def unwrap_model(self, run: Run) -> None:
        """Undo `wrap_model` after training."""

    def check_later_freezing(self, run: Run) -> None:
        """Raise UsageError if parameters that are trained at first cannot be frozen within the run."""

    def follow_freezing(self, run: Run) -> None:
        """Adapt to parameters that have been frozen within an epoch."""

    @hookimpl
    def wrap_model(self, run: Run) -> None:
        require_same(run, describe_optimizer)
        broadcast_tensors(run, loss_tensors(run).values())
        if not self.certain_length:
            run.plan()          # which is agreed on in collectives; later one process alone may ask for it
        # All processes had the same random numbers until here, for the same initial weights. From here on dropout and
        # augmentation draw different ones in each.
        if run.rank and not self.same_data:
            seed_everything((self.seed + run.rank) % 2**63)

    @hookimpl
    def train_start(self, run: Run) -> None:
        # Whether every process knows how many samples all of them have in a step, without a collective: the Shard
        # counts them, if a batch weighs as many samples as it has indices.
        collate = run.train.collate_fn if isinstance(run.train, DataLoader) else None
        countable = not weighing_plugins(run) and (
            collate in (None, default_collate) or getattr(collate, "keeps_sample_count", False))
        self.counts_known = countable and self.shards["train"] is not None
        # Data that the user sharded: with the same batch size and length everywhere, the counts are equal in each step.
        layout = None
        if countable and isinstance(run.train, DataLoader) and type(run.train.batch_sampler) is BatchSampler:
            layout = run.train.batch_size, length_or_none(run.train.sampler), run.train.drop_last
        layouts = all_gather(run, layout)
        self.equal_counts = self.same_data or (layout is not None and all(each == layout for each in layouts))
        classes = {stepped_class(one) for one in each_optimizer(run.optimizer)}
        self.single_closure_call = classes <= SINGLE_CLOSURE_CALL

    @hookimpl(wrapper=True)
    def group_batches(
        self, run: Run, batches: Iterable[Any],
    ) -> Generator[None, Iterator[list[Any]], Iterator[list[Any]]]:
        groups = yield
        return groups if self.certain_length or is_single_process(run) else groups_in_step(run, batches, groups)

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        # Once, because finding them takes longer than broadcasting a few.
        self.buffers = [*run.model.buffers(), *(tensor for tensor in loss_tensors(run).values()
                                                if not isinstance(tensor, nn.Parameter))]
        self.loss_parameters = loss_parameters(run)

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        try:
            try:
                with missing_processes_named(self.timeout):
                    return (yield)
            finally:
                self.unwrap_model(run)
        except BaseException:
            if self.created_group and run.world_size > 1:
                leave_process_group(seconds=2)      # now, so that no other process waits for this one
            raise

    @hookimpl(wrapper=True)
    def batch_weight(self, run: Run, batch: Any) -> Generator[None, float | Tensor, float | Tensor]:
        weight = yield
        return weight * 0 if self.is_filler(run, batch) else weight

    def is_filler(self, run: Run, batch: Any) -> bool:
        """Return whether `batch` is a filler, see `Shard`. Only the last batch of a pass can be one."""
        if self.evaluating or run.evaluating:
            loader = run.evaluating or "valid"
            shard, index = self.shards[loader], run.loaders[loader].batch_index
        else:
            shard, index = self.shards["train"], run.seen_in_epoch + len(run.batches) - 1
            if not run.batches or batch is not run.batches[-1]:
                return False
        return shard is not None and shard.is_filler(index)

    def mean_weight(self, run: Run, weight: Any) -> Any:
        """Return the mean over all processes of the weight of the current step; `weight` is this process's.

        Dividing by the mean and not by the sum makes the gradients of each process too large by a factor of the world
        size. Averaging gradients over the processes removes that factor. The same holds for the reported loss.

        Raises UsageError where a batch has more or fewer samples than indices.
        """
        if run.world_size == 1 or self.equal_counts:
            return weight
        shard = self.shards["train"]
        counts = None
        if shard is not None and self.counts_known:
            counts = shard.sample_counts(run.seen_in_epoch, len(run.batches))
        if counts:
            total, even, indices = counts
            if weight != indices:
                raise UsageError(f"train gave {weight} samples for {indices} indices; add a plugin whose batch_weight "
                                 "returns the weight of a batch")
        else:
            total, even = all_reduce_sum(run, weight), False    # whether the weights are equal is not known
        self.uneven = not even
        return total / run.world_size

    @hookimpl(wrapper=True)
    def micro_step(self, run: Run, last: bool) -> Generator[None, Tensor, Tensor]:
        self.depth += 1
        try:
            with self.gradient_sync(run, last):
                loss = yield
        finally:
            self.depth -= 1
        if self.depth:                  # this was a part of a micro-batch, cut by the plugin `split`
            return loss
        if last and self.loss_parameters:
            self.reduce_gradients(run)
        if last and self.buffers:
            # Weight averages and evaluation read the buffers between steps: they must be equal in all processes.
            broadcast_tensors(run, self.buffers)
        # With equal weights, the process's own loss is as good an estimate, and needs no collective. An optimizer that
        # reads the loss, and calls the closure several times, needs the same loss in all processes.
        return all_reduce_mean(run, loss) if self.uneven or not self.single_closure_call else loss

    def reduce_gradients(self, run: Run) -> None:
        """Average the gradients of a loss function's own parameters, which no wrapper of the model does."""
        for parameter in self.loss_parameters:
            own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = all_reduce_mean(run, own)

    def gradient_sync(self, run: Run, last: bool) -> AbstractContextManager[Any]:
        """Return the context of one micro-batch. It reduces gradients over the processes only if it is the `last`."""
        return nullcontext()

    @hookimpl(wrapper=True)
    def evaluate(self) -> Generator[None, dict[str, Any], dict[str, Any]]:
        self.evaluating = True
        try:
            return (yield)
        finally:
            self.evaluating = False

    # A wrapper, so that it runs after the plugins that set run.stop.
    @hookimpl(wrapper=True)
    def after_evaluate(self, run: Run) -> Generator[None, None, None]:
        result = yield
        self.set_agreed_stop(run, max(all_gather(run, str(run.stop or self.local_stop))))
        return result

    @hookimpl(wrapper=True)
    def epoch_end(self, run: Run) -> Generator[None, None, None]:
        result = yield
        self.set_agreed_stop(run, max(all_gather(run, str(run.stop or self.local_stop))))
        return result

    @hookimpl(wrapper=True)
    def safe_point(self, run: Run) -> Generator[None, None, None]:
        self.defer_stop(run)
        if leave := self.leave_consensus(run, run.leave):       # assigned only then: a signal may set it at any moment
            run.leave = leave
        run.leaving = bool(leave) and not run.finished
        result = yield
        self.defer_stop(run)
        self.set_agreed_stop(run, self.consensus(run, self.local_stop) or self.agreed_stop)
        return result

    def defer_stop(self, run: Run) -> None:
        """Take back a `run.stop` that other processes may not have, and keep it until all processes agree on it."""
        if isinstance(run.stop, AgreedStop):
            run.stop = self.agreed_stop = str(run.stop)
        elif run.stop != self.agreed_stop:
            run.stop, self.local_stop = self.agreed_stop, run.stop

    def set_agreed_stop(self, run: Run, stop: str) -> None:
        run.stop = self.agreed_stop = stop
        self.local_stop = self.local_stop if not stop else ""


def step_weight(run: Run, weights: list[Any]) -> Any:
    """Return the weight of a step: the sum over its micro-batches, or with several processes the mean of their sums."""
    weight = sum(weights)
    return weight if run.parallel is None else run.parallel.mean_weight(run, weight)
