"""Time per step of data-parallel training, written by hand and in loopctl, and the memory of fsdp compared with ddp.

    python benchmarks/processes.py [rounds]

It starts two processes itself: each with a GPU of its own if there are two, otherwise both on the CPU with one thread
each. The loop by hand uses DistributedDataParallel as in torch's documentation; each process takes every second batch,
and the losses are not averaged over the processes. With several GPUs, a last table shows images per second on 1, 2, 4
... of them. Prints tables of docs/performance.md.
"""
from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from functools import partial
from itertools import islice
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timing import BATCHES, HEADER, make, rows, sgd
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from loopctl import Run, fit, hookimpl

SEVERAL = torch.cuda.device_count() > 1
AFTER = 2                       # more steps after the timed ones, so that every loop reads the batch that ends them


def now() -> float:
    """Return the wall-clock time. Processor time would mislead: waiting for another process may use none, or much."""
    if SEVERAL:
        torch.cuda.synchronize()
    return perf_counter()


class Batches:
    """Iterates over the batches of all processes. `us`: microseconds per step, of the `steps` after `warmup` steps."""

    def __init__(self, pool: list[Any], warmup: int, steps: int) -> None:
        self.pool, self.warmup, self.steps, self.world_size = pool, warmup, steps, dist.get_world_size()

    def __len__(self) -> int:
        return (self.warmup + self.steps + AFTER) * self.world_size

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            if number == self.warmup * self.world_size:
                started = now()
            elif number == (self.warmup + self.steps) * self.world_size:
                self.us = 1e6 * (now() - started) / self.steps
            yield self.pool[number % len(self.pool)]


Make = Callable[[], nn.Module]
Loop = Callable[[Make, Batches], nn.Module]


def device() -> torch.device:
    return torch.device("cuda", dist.get_rank()) if SEVERAL else torch.device("cpu")


def wrapped(make: Make) -> nn.Module:
    net = make().to(device()).train()
    if dist.get_world_size() == 1:
        return net
    return DistributedDataParallel(net, device_ids=[dist.get_rank()] if SEVERAL else None)


def by_hand(make: Make, batches: Batches) -> nn.Module:
    net, loss_fn = wrapped(make), nn.CrossEntropyLoss()
    optimizer = sgd(net.parameters())
    for input, target in islice(batches, dist.get_rank(), None, dist.get_world_size()):
        optimizer.zero_grad()
        loss = loss_fn(net(input), target)
        loss.backward()
        optimizer.step()
    return net


def accumulated(make: Make, batches: Batches) -> nn.Module:
    """Gradient accumulation over two batches, with one reduction of the gradients for both."""
    net, loss_fn = wrapped(make), nn.CrossEntropyLoss()
    optimizer = sgd(net.parameters())
    for number, (input, target) in enumerate(islice(batches, dist.get_rank(), None, dist.get_world_size())):
        last = number % 2 == 1
        with nullcontext() if last else net.no_sync():
            loss = loss_fn(net(input), target) / 2
            loss.backward()
        if last:
            optimizer.step()
            optimizer.zero_grad()
    return net


def with_loopctl(make: Make, batches: Batches, *plugins: str) -> nn.Module:
    return fit(make(), nn.CrossEntropyLoss(), sgd, batches, plugins=["ddp", *plugins], device=device()).model


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def normed() -> nn.Module:
    """A network with buffers, which rank 0 broadcasts in every step."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 1024),
                         nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 10))


class Work(NamedTuple):
    make: Make
    warmup: int             # even, as `steps` is, so that with accumulation the clock is read between two updates
    steps: int


# Short, so that the load of the machine is the same for both loops of a pair.
NETWORKS = {"64-64-10": Work(make, 20, 100), "64-1024-1024-10": Work(wide, 4, 20),
            "the same with BatchNorm": Work(normed, 4, 20)}


def timed(loop: Loop, work: Work, pool: list[Any]) -> tuple[float, nn.Module]:
    """Return the microseconds per step of this process, and the trained model."""
    gc.collect()
    gc.freeze()
    dist.barrier()
    batches = Batches(pool, work.warmup, work.steps)
    model = loop(work.make, batches)
    return batches.us, model


def steps(rounds: int) -> None:
    pool = [tuple(part.to(device()) for part in batch) for batch in BATCHES]
    print(HEADER)
    for name, work in NETWORKS.items():
        time, start = partial(timed, work=work, pool=pool), lambda work=work: work.make().to(device())
        rows(by_hand, {f"{name}: by hand": by_hand, f"{name}: loopctl `ddp`": with_loopctl}, rounds, time, start)
        rows(accumulated, {
            f"{name}: by hand with `no_sync`, an update for every two batches": accumulated,
            f"{name}: loopctl `ddp`, `accumulate:every=2`": partial(with_plugin, "accumulate:every=2"),
        }, rounds, time, start)


def with_plugin(plugin: str, make: Make, batches: Batches) -> nn.Module:
    return with_loopctl(make, batches, plugin)


class Losses:
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.all: list[torch.Tensor] = []

    @hookimpl
    def after_step(self, run: Run) -> None:
        self.all.append(run.loss)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input + self.inner(input)


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), *(Block() for _ in range(4)), nn.Linear(256, 10))


def memory() -> None:
    """Print the memory per process with ddp and fsdp, and the largest difference between their losses."""
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    sizes, losses = {}, {}
    for plugin in ("ddp", "fsdp"):
        recorder = Losses()
        run = fit(blocks(), nn.CrossEntropyLoss(), adamw, BATCHES[:20 * dist.get_world_size()],
                  plugins=[plugin, recorder], device=device())
        state = [part for each in run.optimizer.state.values() for part in each.values()]
        sizes[plugin] = size(run.model.parameters()), size(state)
        losses[plugin] = torch.stack(recorder.all)
    distance = (losses["fsdp"] - losses["ddp"]).abs().max()
    dist.all_reduce(distance, dist.ReduceOp.MAX)
    print("\n| plugin | parameters, MiB per process | AdamW's state, MiB | largest difference of losses in 20 steps |\n"
          "|---|---|---|---|")
    for plugin, (parameters, state) in sizes.items():
        difference = "" if plugin == "ddp" else f"{distance.item():.0e}" if distance else "none"
        print(f"| `{plugin}` | {parameters:.2f} | {state:.2f} | {difference} |")


def size(tensors: Any) -> float:
    """Return the megabytes of the parts of `tensors` that this process stores."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local) / 2**20


def resnet50() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50()


def rates(rounds: int, make: Make = resnet50, batch: int = 64, side: int = 224) -> None:
    """Print a table row: images per second of all processes together, by hand and with loopctl."""
    torch.manual_seed(0)
    pool = [(torch.randn(batch, 3, side, side, device=device()), torch.randint(1000, (batch,), device=device()))
            for _ in range(2 * dist.get_world_size())]
    work, us = Work(make, 10, 30), {by_hand: [], with_loopctl: []}
    for _ in range(rounds):
        for loop, each in us.items():
            each.append(timed(loop, work, pool)[0])
    if dist.get_rank() == 0:
        images = (f"{1e6 * batch * dist.get_world_size() / median(each):,.0f}" for each in us.values())
        print(f"| {dist.get_world_size()} | {' | '.join(images)} |", flush=True)


def both(rounds: int) -> None:
    steps(rounds)
    memory()


def worker(rank: int, world_size: int, folder: str, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work` in one of the processes. Only rank 0 prints."""
    if SEVERAL:
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if SEVERAL else "gloo", f"file://{folder}/store", rank=rank,
                            world_size=world_size)
    with open(os.devnull, "w") as null, redirect_stdout(null if rank else sys.stdout), \
            redirect_stderr(null if rank else sys.stderr):
        work(*arguments)
    dist.destroy_process_group()


def processes(world_size: int, work: Callable[..., None], *arguments: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        spawn(worker, (world_size, folder, work, *arguments), nprocs=world_size)


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    processes(2, both, rounds)
    if not SEVERAL:
        print("\nThere are fewer than two GPUs here: images per second on 1, 2, 4 ... of them are left out.")
    else:
        print("\n| GPUs | by hand, images/s | loopctl `ddp` |\n|---|---|---|", flush=True)
        world_size = 1
        while world_size <= torch.cuda.device_count():
            processes(world_size, rates, min(rounds, 3))
            world_size *= 2
