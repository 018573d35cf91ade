"""What a step costs in several processes, by hand and in loopctl, and what fsdp saves of the memory that ddp takes.

    python benchmarks/processes.py [rounds]

It starts its processes itself: two, each with a GPU of its own where there are two, else both on the CPU with a thread
each. The loop by hand is DistributedDataParallel as its manual has it, where each process takes every other batch; it
does not bring the losses together. Where there are several GPUs, a last table is of images per second on 1, 2, 4 ...
Prints tables of docs/performance.md.
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
AFTER = 2                       # so that every loop comes to ask for the last batch that counts


def now() -> float:
    """Wall clock, since the time of the processor misleads here: waiting for another process may take none, or much."""
    if SEVERAL:
        torch.cuda.synchronize()
    return perf_counter()


class Batches:
    """The batches of all processes, of which each takes every so many-th, and how long `steps` of its own took."""

    def __init__(self, pool: list[Any], warmup: int, steps: int) -> None:
        self.pool, self.warmup, self.steps, self.ranks = pool, warmup, steps, dist.get_world_size()

    def __len__(self) -> int:
        return (self.warmup + self.steps + AFTER) * self.ranks

    def __iter__(self) -> Iterator[Any]:
        for number in range(len(self)):
            if number == self.warmup * self.ranks:
                began = now()
            elif number == (self.warmup + self.steps) * self.ranks:
                self.us = 1e6 * (now() - began) / self.steps
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
    """An update for every two batches, whose gradients meet once."""
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


def ours(make: Make, batches: Batches, *plugins: str) -> nn.Module:
    return fit(make(), nn.CrossEntropyLoss(), sgd, batches, plugins=["ddp", *plugins], device=device()).model


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


def normed() -> nn.Module:
    """With buffers, which the first process sends to the others in every step."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 1024),
                         nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 10))


class Work(NamedTuple):
    make: Make
    warmup: int             # even, as the steps are: the clock is read between two updates also where they take two
    steps: int


# Short, so that both loops of a pair find the machine doing the same else.
NETWORKS = {"64-64-10": Work(make, 20, 100), "64-1024-1024-10": Work(wide, 4, 20),
            "the same with BatchNorm": Work(normed, 4, 20)}


def timed(loop: Loop, work: Work, pool: list[Any]) -> tuple[float, nn.Module]:
    """Microseconds per step of a process, and the trained model."""
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
        rows(by_hand, {f"{name}: by hand": by_hand, f"{name}: loopctl `ddp`": ours}, rounds, time, start)
        rows(accumulated, {
            f"{name}: by hand with `no_sync`, an update for every two batches": accumulated,
            f"{name}: loopctl `ddp`, `accumulate:every=2`": partial(plugged, "accumulate:every=2"),
        }, rounds, time, start)


def plugged(plugin: str, make: Make, batches: Batches) -> nn.Module:
    return ours(make, batches, plugin)


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
    """ddp beside fsdp: what a process holds, and how far their losses are from each other."""
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    held, losses = {}, {}
    for plugin in ("ddp", "fsdp"):
        watch = Losses()
        run = fit(blocks(), nn.CrossEntropyLoss(), adamw, BATCHES[:20 * dist.get_world_size()],
                  plugins=[plugin, watch], device=device())
        state = [part for each in run.optimizer.state.values() for part in each.values()]
        held[plugin] = size(run.model.parameters()), size(state)
        losses[plugin] = torch.stack(watch.all)
    apart = (losses["fsdp"] - losses["ddp"]).abs().max()
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    print("\n| plugin | parameters, MB per process | AdamW's state, MB | largest difference of losses in 20 steps |\n"
          "|---|---|---|---|")
    for plugin, (parameters, state) in held.items():
        difference = "" if plugin == "ddp" else f"{apart.item():.0e}" if apart else "none"
        print(f"| `{plugin}` | {parameters:.2f} | {state:.2f} | {difference} |")


def size(tensors: Any) -> float:
    """Megabytes of what this process has of `tensors`."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local) / 2**20


def resnet50() -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet50()


def rates(rounds: int, make: Make = resnet50, batch: int = 64, side: int = 224) -> None:
    """Print a row: images per second of all processes together."""
    torch.manual_seed(0)
    pool = [(torch.randn(batch, 3, side, side, device=device()), torch.randint(1000, (batch,), device=device()))
            for _ in range(2 * dist.get_world_size())]
    work, us = Work(make, 10, 30), {by_hand: [], ours: []}
    for _ in range(rounds):
        for loop, each in us.items():
            each.append(timed(loop, work, pool)[0])
    if dist.get_rank() == 0:
        images = (f"{1e6 * batch * dist.get_world_size() / median(each):,.0f}" for each in us.values())
        print(f"| {dist.get_world_size()} | {' | '.join(images)} |", flush=True)


def both(rounds: int) -> None:
    steps(rounds)
    memory()


def joined(rank: int, ranks: int, place: str, work: Callable[..., None], *arguments: Any) -> None:
    """One of the processes. The first prints."""
    if SEVERAL:
        torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if SEVERAL else "gloo", f"file://{place}/meeting", rank=rank,
                            world_size=ranks)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout), \
            redirect_stderr(nowhere if rank else sys.stderr):
        work(*arguments)
    dist.destroy_process_group()


def processes(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        spawn(joined, (ranks, place, work, *arguments), nprocs=ranks)


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    processes(2, both, rounds)
    if not SEVERAL:
        print("\nThere are fewer than two GPUs here: images per second on 1, 2, 4 ... of them are left out.")
    else:
        print("\n| GPUs | by hand, images/s | loopctl `ddp` |\n|---|---|---|", flush=True)
        ranks = 1
        while ranks <= torch.cuda.device_count():
            processes(ranks, rates, min(rounds, 3))
            ranks *= 2
