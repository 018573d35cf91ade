"""Gradient noise: Gaussian noise that becomes smaller during the run."""
from collections.abc import Generator
from dataclasses import dataclass
from random import Random
from typing import Any

import torch

from loopctl import Run, hookimpl
from loopctl.checkpoint.sharded_tensors import is_sharded, local_rows
from loopctl.distributed.process_group import broadcast_from_rank0
from loopctl.model.gradients import parameters_with_gradients, require_dense_gradients


@dataclass(eq=False)
class GradNoise:
    """Add Gaussian noise to the gradients, with the variance eta / (1 + step)^gamma.

    From arXiv:1511.06807, which tries eta of 0.01, 0.3 and 1. It is added after other plugins, such as clip,
    have changed the gradients, whatever their order. The noise of a step depends on the seed and on the number of the
    step alone, so the run draws the same other random numbers as without it, and a resumed run the same noise. With ddp
    all processes add the same noise; with fsdp each draws it for its shards.

    eta: the variance in the first step
    gamma: how fast it falls; 0 keeps it
    """

    eta: float = 0.01
    gamma: float = 0.55
    topic = "gradients"

    def __post_init__(self) -> None:
        for name in ("eta", "gamma"):
            if not (number := getattr(self, name)) >= 0:
                raise ValueError(f"{name} is at least 0, not {number}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        require_dense_gradients(run)
        self.seed = broadcast_from_rank0(run, torch.initial_seed() if run.seed is None else run.seed)

    # A wrapper, so that clipping, wherever it is in the order, does not make the noise smaller.
    @hookimpl(wrapper=True)
    def grads_ready(self, run: Run) -> Generator[None, None, None]:
        result = yield
        if gradients := [parameter.grad for parameter in parameters_with_gradients(run)]:
            self.add_noise(run, gradients)
        return result

    @torch.no_grad()
    def add_noise(self, run: Run, gradients: list[Any]) -> None:
        shards = [local_rows(gradient) for gradient in gradients]
        device, rank = shards[0].device, run.rank if is_sharded(gradients[0]) else 0
        generator = torch.Generator("cpu" if device.type == "meta" else device)         # meta has no generators
        generator.manual_seed(Random(f"grad_noise {self.seed} {run.attempts} {run.turn} {rank}").getrandbits(63))
        noise = [torch.empty_like(shard).normal_(generator=generator) for shard in shards]
        torch._foreach_add_(shards, noise, alpha=(self.eta / (1 + run.attempts) ** self.gamma) ** 0.5)

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seed = state["seed"]
