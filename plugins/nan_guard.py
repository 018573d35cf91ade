"""Guard against NaN and infinite losses and gradients."""
from cmath import isfinite
from dataclasses import dataclass
from math import inf
from typing import Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from loopctl import Run
from loopctl.checkpoint.sharded_tensors import full_tensor
from loopctl.checkpoint.step_guard import StepGuard, finite
from loopctl.distributed.process_group import all_reduce_max


@dataclass(eq=False)
class NanGuard(StepGuard):
    """Undo every step whose loss or gradient is NaN or infinite.

    Weights, optimizer and BatchNorm statistics are to the last bit what they were before the step. Gradients are
    checked before clipping, and each time they are computed; for LBFGS, whose line search may well try points where
    nothing is finite, the first gradients of a step are checked and the weights at its end. Overflows that float16
    scaling skips do not count. The metric skipped_steps counts the steps; train_loss, the mean over the epoch, is NaN
    if one of its losses is.

    On CUDA a step is undone on the device, and the host learns of it some steps later, too late for run.skipped: ema
    then counts the weights before that step twice. Fused optimizers make it cheapest. For optimizers that count steps
    on the host, such as Adam with neither fused nor capturable, every step waits for the device.

    action: stop ends the run; skip continues with the next batches; rollback does too, but from the last checkpoint,
        as PaLM did, arXiv:2204.02311
    limit: with skip and rollback, the number of such steps in a row that ends the run
    """

    action: Literal["stop", "skip", "rollback"] = "stop"
    limit: int = 20
    topic = "gradients"

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit is at least 1, not {self.limit}")

    def examine(self, run: Run, gradients: list[Tensor]) -> Tensor:
        assert run.loss is not None
        largest = full_tensor(get_total_norm(gradients, inf))   # no sum, which may overflow where no term is infinite
        found = torch.stack((run.loss, largest.to(run.loss.device))).isfinite().logical_not()
        return all_reduce_max(run, found.int()).bool()          # each process has its own loss

    def examine_at_once(self, run: Run, gradients: list[Tensor]) -> str:
        assert run.loss is not None
        what = ("", "gradient", "loss")
        worst = 2 if not isfinite(run.loss.item()) else 0 if finite(gradients) else 1
        return what[int(all_reduce_max(run, worst))]            # each process has its own loss
