"""What a step costs in loopctl, by hand and in other libraries, where the work of the step itself is next to nothing.

    python benchmarks/overhead.py [rounds]          the peers: pip install 'loopctl[bench]'

The same network of 64-64-10 and SGD for all, batches of 32 made beforehand, one thread. The first row is the loop by
hand beside itself: how far it is from 1 is what the machine's noise leaves. Prints a table of docs/performance.md.
"""
import sys

from peers import PEERS, titled, torchtnt_auto
from timing import Batches, compare, make, sgd
from torch import nn

from loopctl import fit, hookimpl


def bare(batches: Batches) -> nn.Module:
    net, loss_fn = make(), nn.CrossEntropyLoss()
    optimizer = sgd(net.parameters())
    net.train()
    for input, target in batches:
        optimizer.zero_grad()
        loss = loss_fn(net(input), target)
        loss.backward()
        optimizer.step()
    return net


def with_items(batches: Batches) -> nn.Module:
    """The loop of many a script: the loss and the accuracy are read in every step."""
    net, loss_fn = make(), nn.CrossEntropyLoss()
    optimizer = sgd(net.parameters())
    net.train()
    total, right = 0.0, 0
    for input, target in batches:
        optimizer.zero_grad()
        output = net(input)
        loss = loss_fn(output, target)
        loss.backward()
        optimizer.step()
        total += loss.item()
        right += (output.argmax(1) == target).sum().item()
    return net


def ours(batches: Batches, *plugins: object) -> nn.Module:
    return fit(make(), nn.CrossEntropyLoss(), sgd, batches, plugins=plugins).model


class Observer:
    """Joins every plain hook of a step and does nothing."""


for hook in ("before_step", "after_backward", "grads_ready", "after_step", "safe_point"):
    def observe(self, run):
        pass
    setattr(Observer, hook, hookimpl(observe))


if __name__ == "__main__":
    compare(bare, {
        "by hand": bare,
        "by hand, `.item()` of loss and accuracy": with_items,
        "loopctl": ours,
        "loopctl, 30 plugins on five hooks each": lambda batches: ours(batches, *(Observer() for _ in range(30))),
        **{titled(package): loop for package, loop in PEERS.items()},
        f"{titled('torchtnt')}, its AutoUnit": torchtnt_auto,
    }, rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 9)
