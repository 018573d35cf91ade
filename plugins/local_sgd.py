"""Local SGD: the processes train on their own for some steps, and then average their weights."""
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopctl import Parallel, Run, UsageError, hookimpl
from loopctl.data.batch import map_nested
from loopctl.distributed.process_group import OfThisRank, average_tensors, broadcast_tensors, is_single_process
from loopctl.model.own_names import own_parameters
from loopctl.model.weight_averages import WeightAverage, copy_weights, is_averaged, named_tensors, swapped_weights
from loopctl.optim.fast_step import fast_step, without_dynamo_wrappers


@dataclass(eq=False)
class LocalSgd(Parallel):
    """Train in several processes that average weights every few steps, and no gradients.

    Post-local SGD (arXiv:1808.07217), as torch's PeriodicModelAverager; with outer_lr it is DiLoCo (arXiv:2311.08105):
    the mean change of the weights is the gradient of an outer SGD with Nesterov momentum. Evaluation, the best weights
    and the end of the run have the mean of weights and BatchNorm statistics. The optimizer's state stays that of each
    process, and a checkpoint has that of all. Everything else is as with `ddp`.

    shard: give each process its part of the data; false if the data is sharded already, with equally many batches
    timeout: seconds that a process waits for the others in a collective before it ends with an error that names those
        that are missing
    period: steps from one average of the weights to the next
    warmup_steps: steps at the start in which gradients are averaged, as with `ddp`
    outer_lr: learning rate of DiLoCo's outer optimizer, 0.7 in the paper; weights are averaged if left out
    outer_momentum: momentum of the outer optimizer
    """

    period: int = 4
    warmup_steps: int = 0
    outer_lr: float | None = None
    outer_momentum: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("period", 1), ("warmup_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, not {getattr(self, name)}")
        if not (self.outer_lr is None or self.outer_lr > 0) or not 0 <= self.outer_momentum < 1:
            raise ValueError("outer_lr is above 0, and outer_momentum at least 0 and below 1; not "
                             f"{self.outer_lr}, {self.outer_momentum}")
        self.run: Run | None = None             # if there are several processes
        self.outer: dict[str, Tensor] = {}      # the weights from which all processes began this round, for DiLoCo
        self.optimizer: Any = None              # the outer one
        self.mean: dict[str, Tensor] = {}       # of the weights, in an evaluation

    @hookimpl
    def train_start(self, run: Run) -> None:
        super().train_start(run)
        if is_single_process(run):
            return
        for name, plugin in run.hook.plugins.items():
            if isinstance(plugin, WeightAverage):
                raise UsageError(f"{name} would average other weights in each process; leave it out, or use ddp")
        if scaling := run.hook.replaced.get("backward"):
            raise UsageError(f"{scaling} scales the loss by another factor in each process, and skips updates that "
                             "others make; use bfloat16, or ddp")
        broadcast_tensors(run, named_tensors(run).values())
        self.run = run
        if not self.warmup_steps:
            self.begin(run)

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        super().epoch_start(run)
        if self.run:
            self.buffers = []               # otherwise they would be sent in every step

    @contextmanager
    def gradient_sync(self, run: Run, last: bool) -> Iterator[None]:
        yield
        if last and self.run and self.depth == 1 and run.attempts < self.warmup_steps:
            average_tensors(run, [one.grad for one in run.model.parameters() if one.grad is not None])

    @hookimpl
    def after_step(self, run: Run) -> None:
        done = run.attempts - self.warmup_steps         # steps that each process has made on its own
        if self.run and done == 0:
            self.begin(run)
        elif self.run and done > 0 and done % self.period == 0:
            self.end_round(run)

    def begin(self, run: Run) -> None:
        """Note the weights from which all processes begin the first round, for the outer optimizer."""
        if self.outer_lr is not None:
            self.outer = {name: one.detach().clone() for name, one in own_parameters(run.model).items()}
            momentum = self.outer_momentum
            with without_dynamo_wrappers():
                self.optimizer = torch.optim.SGD(self.outer.values(), self.outer_lr, momentum, nesterov=momentum > 0)

    def end_round(self, run: Run) -> None:
        """Give all processes the same weights: their mean, or what the outer optimizer makes of it."""
        weights = self.mean_of_processes(run)
        if self.optimizer is not None:
            for name, start in self.outer.items():
                start.grad = start - weights[name]
            fast_step(self.optimizer, lambda: torch.zeros(()))
            weights |= self.outer
        copy_weights(named_tensors(run), weights)

    def mean_of_processes(self, run: Run) -> dict[str, Tensor]:
        """The mean over the processes of each tensor of the run that holds real or complex numbers."""
        found = {name: one.clone() for name, one in named_tensors(run).items() if is_averaged(one)}
        average_tensors(run, [*found.values()])
        return found

    @hookimpl(wrapper=True)
    def evaluate(self) -> Generator[None, dict[str, Any], dict[str, Any]]:
        self.mean = self.mean_of_processes(self.run) if self.run else {}
        with swapped_weights(named_tensors(self.run) if self.run else {}, self.mean):
            return (yield from super().evaluate())

    @hookimpl(wrapper=True)
    def after_evaluate(self, run: Run) -> Generator[None, None, None]:
        with swapped_weights(named_tensors(run), self.mean):
            return (yield from super().after_evaluate(run))

    @hookimpl(wrapper=True)             # a wrapper, so that it comes before plugins that use the final weights
    def train_end(self, run: Run) -> Generator[None, None, None]:
        if self.run:
            copy_weights(named_tensors(run), self.mean_of_processes(run))
        return (yield)

    def state_dict(self) -> dict[str, Any]:
        if self.run is None:
            return {}
        own = {"weights": named_tensors(self.run), "optimizer": self.run.optimizer.state_dict()["state"]}
        outer = {"outer": self.outer, "momentum": self.optimizer.state_dict()["state"]} if self.optimizer else {}
        return map_nested(lambda leaf: OfThisRank(leaf) if isinstance(leaf, Tensor) else leaf, own) | outer

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.run is None or not state:
            return
        if None in state["weights"].values():
            raise UsageError("each process has weights of its own in the checkpoint, and their number was another one; "
                             "resume with as many processes, or begin a new run from the weights")
        copy_weights(named_tensors(self.run), state["weights"])
        optimizers = [(self.run.optimizer, state["optimizer"])]
        if "outer" in state and self.outer_lr is not None:
            self.begin(self.run)
            copy_weights(self.outer, state["outer"])
            optimizers.append((self.optimizer, state["momentum"]))
        with without_dynamo_wrappers():
            for optimizer, own in optimizers:
                optimizer.load_state_dict({"state": own, "param_groups": optimizer.state_dict()["param_groups"]})

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"run": None, "outer": {}, "optimizer": None, "mean": {}}   # a copy trains another model
