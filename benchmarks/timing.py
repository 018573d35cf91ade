"""What the benchmarks of a step share: the work, and a way to time it on a machine that does other things as well.

A step is what happens between two batches, so it is timed inside the iterable that each loop is given: set-up, imports
and the ends of epochs count for nobody. It is the processor's time, of all threads, since no loop has anything to wait
for but its turn among other processes. Each loop is timed right after the one it is compared with, and the medians are
those of such pairs: what else the machine does slows both.
"""
from __future__ import annotations

import gc
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from statistics import median, quantiles
from time import process_time
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

WARMUP, STEPS, AFTER = 100, 1000, 2         # the last two, so that every loop comes to ask for the last that counts
LR = 0.01
HEADER = "| loop | us per step | us added | ratio | middle half | weights |\n|---|---|---|---|---|---|"

torch.set_num_threads(1)
torch.manual_seed(0)
BATCHES = [(torch.randn(32, 64), torch.randint(0, 10, (32,))) for _ in range(WARMUP + STEPS + AFTER)]
sgd = partial(torch.optim.SGD, lr=LR)


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Batches(DataLoader):
    """The batches, made beforehand, and how long `steps` of them took. A DataLoader only by name, since some loops take
    nothing else."""

    def __init__(self, steps: int = STEPS) -> None:
        super().__init__(BATCHES[:WARMUP + steps + AFTER], batch_size=None)
        self.steps = steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, batch in enumerate(self.dataset):
            if number == WARMUP:
                began = process_time()
            elif number == WARMUP + self.steps:
                self.us = 1e6 * (process_time() - began) / self.steps
            yield batch


Loop = Callable[[Batches], nn.Module]       # trains on one pass over the batches, and returns the trained model


def timed(loop: Loop, steps: int = STEPS) -> tuple[float, nn.Module]:
    """Microseconds per step, and the trained model."""
    gc.collect()
    gc.freeze()                             # else every loop pays for what all the others have imported
    batches = Batches(steps)
    with redirect_stdout(sys.stderr):
        model = loop(batches)
    return batches.us, model


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def compare(first: Loop, loops: dict[str, Loop], rounds: int) -> None:
    """Print a table of `loops` beside `first`, each checked to train to the same weights. What fails says why."""
    print(HEADER)
    rows(first, loops, rounds)


def rows(first: Any, loops: dict[str, Any], rounds: int, timed: Callable[[Any], tuple[float, nn.Module]] = timed,
         make: Callable[[], nn.Module] = make) -> None:
    """Print the rows of that table. A loop is what `timed` takes; it trains what `make` makes."""
    start, goal = weights(make()), weights(timed(first)[1])
    ends, failed = {}, {}
    for name, loop in loops.items():
        try:
            ends[name] = weights(timed(loop)[1])
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in ends}
    order = random.Random(0)
    for number in range(rounds):
        for name in order.sample(list(ends), len(ends)):
            pairs[name].append((timed(first)[0], timed(loops[name])[0]))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    for name in loops:
        if name in failed:
            print(f"| {name} | not measured: {failed[name]} | | | | |")
            continue
        ratios = [ours / base for base, ours in pairs[name]]
        low, _, high = quantiles(ratios, n=4)
        print(f"| {name} | {median(ours for _, ours in pairs[name]):.0f} "
              f"| {median(ours - base for base, ours in pairs[name]):.0f} "
              f"| {median(ratios):.2f} | {low:.2f}-{high:.2f} | {agreement(start, goal, ends[name])} |")


def agreement(start: torch.Tensor, goal: torch.Tensor, end: torch.Tensor) -> str:
    """How the weights at the end compare with those of the loop by hand, relative to how far that one moved them."""
    if torch.equal(goal, end):
        return "equal"
    return f"within {((end - goal).norm() / (goal - start).norm()).item():.0e}"
