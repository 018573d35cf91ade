"""Fully sharded data-parallel training (FSDP2): each process holds a shard of every parameter."""
from collections.abc import Generator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from loopctl import Parallel, Run, UsageError, hookimpl
from loopctl.distributed.process_group import broadcast_tensors, is_only_planned
from loopctl.model import summary
from loopctl.model.own_names import own_parameters
from loopctl.model.ownership import loss_parameters
from loopctl.optim.several import each_optimizer
from loopctl.report.terminal import counted

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(eq=False)
class Fsdp(Parallel):
    """Train in several processes, each of which holds a shard of every parameter.

    Same as torch.distributed.fsdp.fully_shard (FSDP2). Gradients and optimizer state are sharded too. The parameters of
    a block are gathered only while it computes, so a model can be larger than the memory of a device. Each repeated
    block of the model is sharded separately, and the rest together. Everything else is as with `ddp`: torchrun or
    `loopctl run --devices 0,1` starts the processes, and an update is that of one process over the batches of all.
    Checkpoints are written in shards, in the background. Fused SGD and Adagrad do not support sharded tensors, so they
    run unfused.

    shard: give each process its part of the data; false if the data is sharded already, with equally many batches
    timeout: seconds that a process waits for the others in a collective before it ends with an error that names those
        that are missing
    param_dtype: dtype in which forward and backward passes compute; the parameters keep their own
    reduce_dtype: dtype in which gradients are reduced; the dtype of the computation if left out
    offload: keep the shards in host memory and compute the updates there; needs GPUs
    reshard_after_forward: free the gathered parameters after the forward pass and gather them again for the backward
        pass, which saves memory and costs communication
    replicas: copies of the model, each of them sharded over its part of the processes (hybrid sharding): parameters are
        gathered within a copy, such as the GPUs of one machine, and gradients averaged between copies
    """

    param_dtype: Dtype | None = None
    reduce_dtype: Dtype | None = None
    offload: bool = False
    reshard_after_forward: bool = True
    replicas: int = 1
    needs_process_group: ClassVar[bool] = True      # dtypes and offloading are useful on one device too
    collective_forward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replicas < 1:
            raise ValueError(f"replicas is at least 1, not {self.replicas}")

    def convert_model(self, run: Run) -> None:
        if loss_parameters(run):
            raise UsageError("loss_fn has parameters, which would not be sharded as those of the model are; use ddp, "
                             "or make them a part of the model")
        if run.world_size % self.replicas:
            raise UsageError(f"replicas={self.replicas} does not divide the {counted(run.world_size, 'process')} of "
                             "the run; choose a number that does")
        if is_only_planned(run):
            return
        if self.offload and run.device.type == "cpu":
            raise UsageError("offload=true needs GPUs: on a CPU the parameters are in host memory; leave it out")
        dtypes = {name: getattr(torch, value) for name in ("param_dtype", "reduce_dtype")
                  if (value := getattr(self, name))}
        settings: dict[str, Any] = {
            "mesh": self.mesh(run), "mp_policy": MixedPrecisionPolicy(**dtypes),
            "offload_policy": CPUOffloadPolicy() if self.offload else OffloadPolicy()}
        broadcast_tensors(run, [*run.model.parameters(), *run.model.buffers()])      # so that all shard the same values
        for block in summary.repeated_blocks(run.model):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **settings)
        fully_shard(run.model, **settings)
        # The first unshard and reshard moves some shards to other memory: do it before the optimizer refers to them.
        for module in run.model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                module.reshard()

        self.trained = trainable(run.model)

    def mesh(self, run: Run) -> DeviceMesh:
        """The processes over which parameters are sharded, in the last dimension, and before it their replicas."""
        if self.replicas == 1:
            return init_device_mesh(run.device.type, (run.world_size,))
        return init_device_mesh(run.device.type, (self.replicas, run.world_size // self.replicas),
                                mesh_dim_names=("replicate", "shard"))

    @hookimpl
    def train_start(self, run: Run) -> None:
        super().train_start(run)
        for one in each_optimizer(run.optimizer):
            if isinstance(one, torch.optim.SGD | torch.optim.Adagrad):
                for group in one.param_groups:
                    group["fused"] = False
                optimizer: Any = one        # not every version of torch has the attribute in both classes
                optimizer._step_supports_amp_scaling = False            # set by the optimizer if it is fused

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        super().epoch_start(run)
        if trainable(run.model) != self.trained:
            self.check_later_freezing(run)

    def check_later_freezing(self, run: Run) -> None:
        raise UsageError("part of the model is frozen for a while, which fully_shard does not support; freeze it "
                         "for the whole run, or use ddp")

    def set_up_processes(self, run: Run) -> None:
        super().set_up_processes(run)
        if run.turns:
            raise UsageError("several optimizers with a loss each are not supported with sharded parameters; use ddp")
        given = run.optimizer.values() if isinstance(run.optimizer, dict) else [run.optimizer]
        if any(isinstance(optimizer, torch.optim.Optimizer) for optimizer in given):
            raise UsageError("sharding replaces the parameters, so an optimizer cannot exist before; pass a factory, "
                             "such as partial(torch.optim.SGD, lr=0.1), instead of an optimizer")

    # Without a backward pass, the outermost module would stay unsharded, and its parameters would not be those that
    # weight averages refer to.
    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run) -> Generator[None, Tensor, Tensor]:
        loss = yield
        if not torch.is_grad_enabled():
            model: Any = run.model          # fully_shard has added methods to it
            model.reshard()
        return loss

    def gradient_sync(self, run: Run, last: bool) -> Any:
        model: Any = run.model
        model.set_requires_gradient_sync(last)
        return nullcontext()


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in own_parameters(model).items() if parameter.requires_grad}
