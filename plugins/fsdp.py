"""Training in several processes, each of which has a piece of every weight."""
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from loopctl import Parallel, Run, UsageError, hookimpl
from loopctl.distributed.process_group import broadcast_tensors, is_only_planned
from loopctl.model import summary

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(eq=False)
class Fsdp(Parallel):
    """Train in several processes, each of which keeps a piece of every weight.

    It is torch.distributed.fsdp.fully_shard (FSDP2). So are gradients and the optimizer's state in pieces, and those of
    a layer's weights are put together while it computes: a model trains that fits on no device. Each of its repeated
    blocks is such a layer, and so is the rest. Everything else is as with `ddp`: torchrun starts the processes, or
    `loopctl run --devices 0,1`, and an update is that of one process over the batches of all. A checkpoint is written
    in pieces, in the background. Torch's fused SGD and Adagrad do not know pieces, and are not fused here.

    shard: give each process its part of the data; false where it is in parts already, with as many batches in each
    param_dtype: compute in this type; the weights themselves keep theirs
    reduce_dtype: add up gradients in this type; that in which they are computed if left out
    offload: keep the pieces in the host's memory, and compute the updates there; needs GPUs
    reshard_after_forward: let go of a layer's weights after its forward pass and put them together anew for the
        backward pass, which saves memory and takes more messages
    """

    param_dtype: Dtype | None = None
    reduce_dtype: Dtype | None = None
    offload: bool = False
    reshard_after_forward: bool = True
    alone: ClassVar[bool] = True            # pieces, types and offloading are of use on one device too

    def spread(self, run: Run) -> None:
        if is_only_planned(run):
            return
        if self.offload and run.device.type == "cpu":
            raise UsageError("offload=true is for GPUs: on a CPU the weights are in the host's memory already")
        types = {name: getattr(torch, value) for name in ("param_dtype", "reduce_dtype")
                 if (value := getattr(self, name))}
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(run.device.type, (run.world_size,)), "mp_policy": MixedPrecisionPolicy(**types),
            "offload_policy": CPUOffloadPolicy() if self.offload else OffloadPolicy()}
        broadcast_tensors(run, [*run.model.parameters(), *run.model.buffers()])     # all ranks shard the same weights
        for block in summary.repeated_blocks(run.model):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **settings)
        fully_shard(run.model, **settings)
        # Once, so that the pieces are now where they will be: the first time puts some of them elsewhere.
        for module in run.model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()

        self.trained = trainable(run.model)

    @hookimpl
    def train_start(self, run: Run) -> None:
        super().train_start(run)
        if isinstance(run.optimizer, torch.optim.SGD | torch.optim.Adagrad):
            for group in run.optimizer.param_groups:
                group["fused"] = False
            run.optimizer._step_supports_amp_scaling = False            # which it says of itself where it is fused

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        super().epoch_start(run)
        if trainable(run.model) != self.trained:
            raise UsageError("part of the model is frozen for a while only, which fully_shard does not follow; freeze "
                             "it for the whole run, or use ddp")

    def join(self, run: Run) -> None:
        super().join(run)
        if isinstance(run.optimizer, torch.optim.Optimizer):
            raise UsageError("the weights become others, of which each process has a piece; pass a factory of an "
                             "optimizer, such as partial(torch.optim.SGD, lr=0.1), in place of an optimizer")

    # Without a backward pass the outermost weights would stay together, and so be others than an average knows.
    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run) -> Generator[None, Tensor, Tensor]:
        loss = yield
        if not torch.is_grad_enabled():
            model: Any = run.model          # which fully_shard has given more methods
            model.reshard()
        return loss

    def meeting(self, run: Run, last: bool) -> Any:
        model: Any = run.model
        model.set_requires_gradient_sync(last)
        return nullcontext()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}
