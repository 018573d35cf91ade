"""What a step of loopctl costs over the same step written by hand: medians of interleaved rounds, one thread.

    python benchmarks/overhead.py [rounds]

Absolute times mean nothing on a shared machine; the ratio, taken in one process and in turns, does.
"""
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import nn

from loopctl import fit, hookimpl

torch.set_num_threads(1)
BATCHES_PER_EPOCH, EPOCHS = 1000, 5      # several epochs, so that what a run costs once does not count as a step's
STEPS = BATCHES_PER_EPOCH * EPOCHS
torch.manual_seed(0)
BATCHES = [(torch.randn(32, 64), torch.randint(0, 10, (32,))) for _ in range(BATCHES_PER_EPOCH)]
sgd = partial(torch.optim.SGD, lr=0.01)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def bare() -> None:
    net, loss_fn = model(), nn.CrossEntropyLoss()
    optimizer = sgd(net.parameters())
    net.train()
    for _ in range(EPOCHS):
        for input, target in BATCHES:
            optimizer.zero_grad()
            loss = loss_fn(net(input), target)
            loss.backward()
            optimizer.step()


def bare_composed() -> None:
    """bfloat16 autocast, accumulation over two, clipping, a cosine per step."""
    net, loss_fn = model(), nn.CrossEntropyLoss()
    optimizer = sgd(net.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS // 2)
    net.train()
    optimizer.zero_grad()
    for _ in range(EPOCHS):
        for i, (input, target) in enumerate(BATCHES):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_fn(net(input), target) / 2
            loss.backward()
            if i % 2:
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()


def ours(*plugins: object) -> None:
    fit(model(), nn.CrossEntropyLoss(), sgd, BATCHES, epochs=EPOCHS, plugins=plugins)


class Observer:
    """Joins every plain hook and does nothing."""


for hook in ("before_step", "after_backward", "grads_ready", "after_step", "safe_point"):
    def observe(self, run):
        pass
    setattr(Observer, hook, hookimpl(observe))


def compare(rounds: int, steps: int, **loops: Callable[[], None]) -> None:
    """Print each loop's median time per step and its ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds + 1):
        for name, loop in loops.items():
            start = time.perf_counter()
            loop()
            times[name].append((time.perf_counter() - start) / steps * 1e6)
    first = next(iter(times.values()))
    for name, each in times.items():
        ratio = median(a / b for a, b in zip(each[1:], first[1:], strict=True))       # the first round warms up
        print(f"{name:28} {median(each[1:]):8.1f} us a step   {ratio:6.3f}")


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    compare(rounds, STEPS, by_hand=bare, loopctl=ours, with_30_observers=lambda: ours(*(Observer() for _ in range(30))))
    compare(rounds, STEPS // 2, composed_by_hand=bare_composed, loopctl_composed=lambda: ours(
        "amp:dtype=bfloat16", "accumulate:every=2", "clip:max_norm=1", "cosine:by=step"))
