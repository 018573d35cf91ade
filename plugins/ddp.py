"""Data-parallel training in several processes with DistributedDataParallel (DDP)."""
import logging
import re
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loopctl import Parallel, Run, UsageError, hookimpl
from loopctl.distributed.communication_hooks import HOOKS, PowerSgd
from loopctl.distributed.process_group import broadcast_tensors, is_single_process
from loopctl.model.forward import unwrapped_network
from loopctl.model.own_names import own_parameters
from loopctl.model.ownership import named_parameters

# The argument that controls the broadcast of buffers. Newer versions of torch have both, and deprecate the second.
BUFFERS = next(name for name in ("forward_sync_buffers", "broadcast_buffers")
               if name in signature(DistributedDataParallel).parameters)


log = logging.getLogger("loopctl")


@dataclass(eq=False)
class Ddp(Parallel):
    """Train in several processes, each with a copy of the model and its part of the data.

    Same as torch.nn.parallel.DistributedDataParallel. torchrun or `loopctl run --devices 0,1` starts the processes, one
    per GPU; with a single process the plugin changes nothing. An update equals that of one process with `accumulate`
    over world_size batches: every sample has the same weight, even if the last batches differ in size. Rank 0 prints
    and writes files. Buffers, such as BatchNorm statistics, are broadcast from rank 0 after every step.

    shard: give each process its part of the data; false if the data is sharded already, with equally many batches
    timeout: seconds that a process waits for the others in a collective before it ends with an error that names those
        that are missing
    sync_batchnorm: compute BatchNorm statistics over all processes, with torch.nn.SyncBatchNorm; needs GPUs
    find_unused_parameters: for a model that does not use all parameters in every step; set automatically while parts
        of the model are frozen, and where several optimizers have a loss each
    gradient_as_bucket_view: keep gradients in the communication buckets, which saves the memory of one copy
    bucket_cap_mb: size in MiB of the buckets in which gradients are reduced during the backward pass
    comm_hook: send gradients in fewer bits, with the hook of torch.distributed.algorithms.ddp_comm_hooks: as float16,
        as bfloat16, or as factors of low rank (PowerSGD, arXiv:1905.13727)
    matrix_approximation_rank: rank of these factors
    start_powerSGD_iter: the step from which powersgd compresses; gradients are sent whole before
    zero: keep the optimizer's state of each parameter in one process, which makes its update and sends the parameter to
        the others (ZeRO, arXiv:1910.02054), as torch.distributed.optim.ZeroRedundancyOptimizer
    """

    sync_batchnorm: bool = False
    find_unused_parameters: bool = False
    gradient_as_bucket_view: bool = False
    bucket_cap_mb: int = 25
    comm_hook: Literal["fp16", "bf16", "powersgd"] | None = None
    matrix_approximation_rank: int = 1
    start_powerSGD_iter: int = 1000
    zero: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bucket_cap_mb < 1:
            raise ValueError(f"bucket_cap_mb is at least 1, not {self.bucket_cap_mb}")
        if self.matrix_approximation_rank < 1:
            raise ValueError(f"matrix_approximation_rank is at least 1, not {self.matrix_approximation_rank}")
        if self.start_powerSGD_iter < 2:        # buckets change after the first step
            raise ValueError(f"start_powerSGD_iter is at least 2, not {self.start_powerSGD_iter}")
        if self.comm_hook != "powersgd" and (self.matrix_approximation_rank, self.start_powerSGD_iter) != (1, 1000):
            raise ValueError("matrix_approximation_rank and start_powerSGD_iter are options of comm_hook=powersgd")
        self.power_sgd: PowerSgd | None = None
        self.parameters: dict[str, nn.Parameter] = {}           # of the model, by name
        self.network: Any = None            # the DistributedDataParallel module
        self.inner: Any = None              # the module that it wraps
        self.reduced: list[tuple[str, nn.Parameter]] = []       # what it reduces the gradients of, in its order

    def convert_model(self, run: Run) -> None:
        if self.zero and not is_single_process(run):
            self.divide_optimizer(run)
        if self.sync_batchnorm and run.world_size > 1:
            if run.device.type != "cuda":
                raise UsageError(f"sync_batchnorm=true needs GPUs, and this run is on {run.device.type}; leave it out")
            run.model = nn.SyncBatchNorm.convert_sync_batchnorm(run.model)

    def divide_optimizer(self, run: Run) -> None:
        if isinstance(run.optimizer, torch.optim.Optimizer | dict):
            raise UsageError("zero=true divides the state of one optimizer that does not exist yet; pass a factory, "
                             "such as partial(torch.optim.SGD, lr=0.1), or leave zero out")
        if len(dtypes := {str(one.dtype) for one in named_parameters(run).values() if one.requires_grad}) > 1:
            raise UsageError(f"zero=true needs parameters of one dtype, and there are {', '.join(sorted(dtypes))}; "
                             "leave it out, or use fsdp")
        from loopctl.distributed.zero import ZeroOptimizer  # here, because its import takes long
        run.optimizer = partial(ZeroOptimizer, factory=run.optimizer)

    @hookimpl
    def wrap_model(self, run: Run) -> None:
        if not is_single_process(run):
            if not isinstance(run.network, nn.Module):
                raise UsageError(f"run.network is a {type(run.network).__name__} and not a module; pass ddp before the "
                                 "plugin that replaced it")
            self.replicate(run, trainable(run.model), self.find_unused_parameters or bool(run.turns))
        super().wrap_model(run)

    def replicate(self, run: Run, trained: set[nn.Parameter], unused: bool) -> None:
        """Wrap `run.network`, so that the gradients of `trained` are reduced, including parameters frozen for now.

        unused: a step may leave some of these parameters without a gradient
        """
        settings: dict[str, Any] = {BUFFERS: False}
        frozen = {parameter for parameter in trained if not parameter.requires_grad}
        for parameter in frozen:            # DistributedDataParallel ignores parameters that do not require gradients
            parameter.requires_grad_(True)
        inner: Any = self.inner if run.network is self.network else run.network
        # DistributedDataParallel would broadcast buffers before each forward pass. Parallel does it after each step, so
        # that weight averages and evaluation see the same buffers in every process.
        broadcast_tensors(run, run.model.buffers())
        self.inner, self.trained, self.unused = inner, trained, unused
        if unused and self.comm_hook == "powersgd":
            raise UsageError("comm_hook=powersgd begins each step from the last gradient, so that a parameter that is "
                             "once without a gradient, frozen or unused, has none ever after; use fp16 or bf16")
        hooks = self.network._comm_hooks if self.network else self.own_hooks(run)
        self.network = run.network = DistributedDataParallel(
            inner, device_ids=[run.device.index] if run.device.type == "cuda" else None, **settings,
            bucket_cap_mb=self.bucket_cap_mb, find_unused_parameters=unused,
            gradient_as_bucket_view=self.gradient_as_bucket_view)
        for hook, state in hooks:           # where the model is wrapped again, also those of other plugins
            self.network.register_comm_hook(state, hook)
        self.reduced = [item for item in own_parameters(inner).items() if item[1].requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)

    def own_hooks(self, run: Run) -> list[tuple[Any, Any]]:
        """The communication hook that the options ask for, and its state."""
        if self.comm_hook == "powersgd":
            if "backward" in run.hook.replaced:
                raise UsageError(f"comm_hook=powersgd adds the errors of one step to the gradients of the next, and "
                                 f"{run.hook.replaced['backward']} scales them by a factor that changes; use bfloat16")
            if scalars := [name for name, one in own_parameters(run.model).items() if not one.ndim]:
                raise UsageError(f"comm_hook=powersgd: {scalars[0]} is a single number; give it the shape (1,)")
            self.power_sgd = PowerSgd(matrix_approximation_rank=self.matrix_approximation_rank,
                                      start_powerSGD_iter=self.start_powerSGD_iter)
        return [(HOOKS[self.comm_hook], self.power_sgd)] if self.comm_hook else []

    @hookimpl
    def train_start(self, run: Run) -> None:
        super().train_start(run)
        self.parameters = own_parameters(run.model)
        if isinstance(getattr(run.optimizer, "optim", None), torch.optim.LBFGS):
            raise UsageError("LBFGS looks along one direction for all parameters, so its state cannot be divided; "
                             "leave zero out, or use another optimizer")
        if self.power_sgd and self.start_powerSGD_iter >= run.planned_steps:
            raise UsageError(f"start_powerSGD_iter={self.start_powerSGD_iter} is not before the run's end, after "
                             f"{run.planned_steps} steps, so nothing would be compressed; choose a smaller one")

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        super().epoch_start(run)
        self.follow_freezing(run)

    def check_later_freezing(self, run: Run) -> None:
        if run.network is not self.network and self.network is not None and not self.find_unused_parameters:
            raise UsageError("part of the model is frozen for a while; pass find_unused_parameters=true")

    def follow_freezing(self, run: Run) -> None:
        if self.network is None:
            return
        now = trainable(run.model)
        if now - self.trained:
            raise UsageError("part of the model was frozen when ddp wrapped it and is trained now, so its gradients "
                             "would not be reduced; freeze it in train_start")
        unused = self.find_unused_parameters or now != self.trained or bool(run.turns)
        if unused != self.unused:
            self.check_later_freezing(run)
            self.replicate(run, self.trained, unused)

    @hookimpl(wrapper=True)
    def compute_loss(self) -> Generator[None, Tensor, Tensor]:
        try:
            return (yield)
        except RuntimeError as error:       # of the forward pass after a step that did not reduce all gradients
            if self.network is None or "find_unused_parameters" not in str(error):
                raise
            listed = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            raise unused_parameters([self.reduced[int(index)][0] for index in listed[1].split()] if listed else []
                                    ) from error

    @hookimpl
    def after_backward(self) -> None:
        # DistributedDataParallel would report it in the next step, after an update with gradients that are not reduced.
        if self.network is not None and not self.unused and any(
                parameter.grad is None for _, parameter in self.reduced):
            raise unused_parameters([name for name, parameter in self.reduced if parameter.grad is None])

    @hookimpl
    def after_step(self, run: Run) -> None:
        if run.skipped and self.power_sgd:
            self.power_sgd.forget()

    def unwrap_model(self, run: Run) -> None:
        if self.network is not None:
            run.network, self.network, self.inner = unwrapped_network(run), None, None

    def gradient_sync(self, run: Run, last: bool) -> Any:
        return nullcontext() if last or self.network is None else self.network.no_sync()

    def state_dict(self) -> dict[str, Any]:
        by_id = {id(parameter): name for name, parameter in self.parameters.items()}
        return self.power_sgd.state_dict(by_id) if self.power_sgd else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.power_sgd and not (state and self.power_sgd.load_state_dict(state, self.parameters)):
            log.warning("resume: the errors that powersgd has left in each process are not those of this run, because "
                        "the number of processes or comm_hook has changed; they begin at zero")

    def __getstate__(self) -> dict[str, Any]:
        # A copy trains another model.
        return vars(self) | {"network": None, "inner": None, "trained": set(), "reduced": [], "parameters": {},
                             "power_sgd": None}


def trainable(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in model.parameters() if parameter.requires_grad}


def unused_parameters(listed: list[str]) -> UsageError:
    more = f" and {len(listed) - 5} more" * (len(listed) > 5)
    which = f" ({', '.join(listed[:5])}{more} got no gradient)" if listed else ""
    return UsageError(f"a step did not use all parameters{which}; pass ddp:find_unused_parameters=true, or freeze what "
                      "is not used")
