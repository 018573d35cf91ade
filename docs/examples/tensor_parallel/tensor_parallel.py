"""Tensor parallelism for torchvision's VisionTransformer: each process has a part of every MLP, by torch's own plan."""
from dataclasses import dataclass
from typing import ClassVar

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torchvision.models.vision_transformer import MLPBlock

from loopctl import Parallel, Run, UsageError
from loopctl.distributed.process_group import broadcast_tensors, is_single_process


@dataclass(eq=False)
class TensorParallel(Parallel):
    """Divide the hidden units of each MLP block among the processes; the rest of the model is in each of them.

    As torch.distributed.tensor.parallel (arXiv:1909.08053): the first layer of a block is divided by its outputs, the
    second by its inputs, and the parts of the result are added up. All processes train on the same batches.

    shard: false, since all processes train on the same batches
    timeout: seconds that a process waits for the others in a collective
    """

    shard: bool = False
    same_data: ClassVar[bool] = True

    def convert_model(self, run: Run) -> None:
        if is_single_process(run):
            return
        if isinstance(run.optimizer, dict):
            raise UsageError("several optimizers are not supported; pass one")
        blocks = {name: module for name, module in run.model.named_modules() if isinstance(module, MLPBlock)}
        if not blocks:
            raise UsageError("the model has no MLPBlock, as torchvision's VisionTransformer has; pass such a model")
        broadcast_tensors(run, [*run.model.parameters(), *run.model.buffers()])      # all divide the same weights
        mesh = init_device_mesh(run.device.type, (run.world_size,))
        for name, block in blocks.items():
            if block[0].out_features % run.world_size:
                raise UsageError(f"{name} has {block[0].out_features} hidden units, which {run.world_size} processes "
                                 "cannot share equally; choose another number")
            parallelize_module(block, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})
