"""Data-parallel training in several processes."""
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loopctl import Parallel, Run, UsageError, hookimpl
from loopctl.distributed.process_group import broadcast_tensors, is_single_process

# Newer versions of torch have both, and no longer want the second.
BUFFERS = next(name for name in ("forward_sync_buffers", "broadcast_buffers")
               if name in signature(DistributedDataParallel).parameters)


@dataclass(eq=False)
class Ddp(Parallel):
    """Train in several processes, each with a copy of the model and its part of the data.

    It is torch.nn.parallel.DistributedDataParallel. torchrun starts the processes, or `loopctl run --devices 0,1`, one
    per GPU; one alone trains as it would without. An update is that of one process with `accumulate` over as many
    batches as there are processes: every sample counts alike, also where the last batches do not come out even. The
    first process prints and writes. Buffers, such as BatchNorm's statistics, are the first process's after every step.

    shard: give each process its part of the data; false where it is in parts already, with as many batches in each
    sync_batchnorm: have BatchNorm see the batches of all processes, as torch.nn.SyncBatchNorm; needs GPUs
    find_unused_parameters: for a model of which a step may leave parts unused; known where parts are frozen for now
    gradient_as_bucket_view: save the memory of one copy of the gradients
    bucket_cap_mb: gradients meet in pieces of about this size, in MB, while others are still computed
    """

    sync_batchnorm: bool = False
    find_unused_parameters: bool = False
    gradient_as_bucket_view: bool = False
    bucket_cap_mb: int = 25

    def __post_init__(self) -> None:
        if self.bucket_cap_mb < 1:
            raise ValueError(f"bucket_cap_mb is at least 1, not {self.bucket_cap_mb}")
        self.network: Any = None            # what wraps the model, and `inner` what it wraps
        self.inner: Any = None

    def spread(self, run: Run) -> None:
        if self.sync_batchnorm and run.world_size > 1:
            if run.device.type != "cuda":
                raise UsageError(f"sync_batchnorm=true needs GPUs, and this is a {run.device.type}")
            run.model = nn.SyncBatchNorm.convert_sync_batchnorm(run.model)

    @hookimpl
    def wrap_model(self, run: Run) -> None:
        if not is_single_process(run):
            if not isinstance(run.network, nn.Module):
                raise UsageError(f"it wraps a module, and run.network is a {type(run.network).__name__}; name ddp "
                                 "before the plugin that changed it")
            self.replicate(run, trainable(run.model), self.find_unused_parameters)
        super().wrap_model(run)

    def replicate(self, run: Run, trained: set[nn.Parameter], unused: bool) -> None:
        """Have the gradients of `trained` meet, also of those among them that are frozen for now."""
        settings: dict[str, Any] = {BUFFERS: False}
        asleep = {parameter for parameter in trained if not parameter.requires_grad}
        for parameter in asleep:
            parameter.requires_grad_(True)
        inner = self.inner if run.network is self.network else run.network
        # It would send buffers before a forward pass. Parallel does so after it, where others see them.
        broadcast_tensors(run, run.model.buffers())
        self.inner, self.trained, self.unused = inner, trained, unused
        self.network = run.network = DistributedDataParallel(
            inner, device_ids=[run.device.index] if run.device.type == "cuda" else None, **settings,
            bucket_cap_mb=self.bucket_cap_mb, find_unused_parameters=unused,
            gradient_as_bucket_view=self.gradient_as_bucket_view)
        for parameter in asleep:
            parameter.requires_grad_(False)

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        super().epoch_start(run)
        if self.network is None:
            return
        now = trainable(run.model)
        if now - self.trained:
            raise UsageError("part of the model is trained that was frozen when the processes were set up, so its "
                             "gradients would not meet; freeze it later, in train_start")
        unused = self.find_unused_parameters or now != self.trained
        if unused != self.unused:
            if run.network is not self.network:
                raise UsageError("part of the model is frozen for now; pass find_unused_parameters=true")
            self.replicate(run, self.trained, unused)

    def release(self, run: Run) -> None:
        if self.network is not None:
            run.network, self.network, self.inner = run.model, None, None

    def meeting(self, run: Run, last: bool) -> Any:
        return nullcontext() if last or self.network is None else self.network.no_sync()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"network": None, "inner": None, "trained": set()}      # a copy is for another model


def trainable(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in model.parameters() if parameter.requires_grad}
