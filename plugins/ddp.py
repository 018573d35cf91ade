"""Data-parallel training in several processes with DistributedDataParallel (DDP)."""
import re
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loopctl import Parallel, Run, UsageError, hookimpl
from loopctl.distributed.process_group import broadcast_tensors, is_single_process
from loopctl.model.forward import unwrapped_network
from loopctl.model.own_names import own_parameters

# The argument that controls the broadcast of buffers. Newer versions of torch have both, and deprecate the second.
BUFFERS = next(name for name in ("forward_sync_buffers", "broadcast_buffers")
               if name in signature(DistributedDataParallel).parameters)


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
    """

    sync_batchnorm: bool = False
    find_unused_parameters: bool = False
    gradient_as_bucket_view: bool = False
    bucket_cap_mb: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bucket_cap_mb < 1:
            raise ValueError(f"bucket_cap_mb is at least 1, not {self.bucket_cap_mb}")
        self.network: Any = None            # the DistributedDataParallel module
        self.inner: Any = None              # the module that it wraps
        self.reduced: list[tuple[str, nn.Parameter]] = []       # what it reduces the gradients of, in its order

    def convert_model(self, run: Run) -> None:
        if self.sync_batchnorm and run.world_size > 1:
            if run.device.type != "cuda":
                raise UsageError(f"sync_batchnorm=true needs GPUs, and this run is on {run.device.type}; leave it out")
            run.model = nn.SyncBatchNorm.convert_sync_batchnorm(run.model)

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
        self.network = run.network = DistributedDataParallel(
            inner, device_ids=[run.device.index] if run.device.type == "cuda" else None, **settings,
            bucket_cap_mb=self.bucket_cap_mb, find_unused_parameters=unused,
            gradient_as_bucket_view=self.gradient_as_bucket_view)
        self.reduced = [item for item in own_parameters(inner).items() if item[1].requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        super().epoch_start(run)
        if self.network is None:
            return
        now = trainable(run.model)
        if now - self.trained:
            raise UsageError("part of the model was frozen when ddp wrapped it and is trained now, so its gradients "
                             "would not be reduced; freeze it in train_start")
        unused = self.find_unused_parameters or now != self.trained or bool(run.turns)
        if unused != self.unused:
            if run.network is not self.network:
                raise UsageError("part of the model is frozen for a while; pass find_unused_parameters=true")
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

    def unwrap_model(self, run: Run) -> None:
        if self.network is not None:
            run.network, self.network, self.inner = unwrapped_network(run), None, None

    def gradient_sync(self, run: Run, last: bool) -> Any:
        return nullcontext() if last or self.network is None else self.network.no_sync()

    def __getstate__(self) -> dict[str, Any]:
        # A copy trains another model.
        return vars(self) | {"network": None, "inner": None, "trained": set(), "reduced": []}


def trainable(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in model.parameters() if parameter.requires_grad}


def unused_parameters(listed: list[str]) -> UsageError:
    more = f" and {len(listed) - 5} more" * (len(listed) > 5)
    which = f" ({', '.join(listed[:5])}{more} got no gradient)" if listed else ""
    return UsageError(f"a step did not use all parameters{which}; pass ddp:find_unused_parameters=true, or freeze what "
                      "is not used")
