"""What a usual composition costs: bfloat16 autocast, accumulation over two batches, clipping at norm 1, a cosine.

    python benchmarks/compose.py [rounds]           the peers: pip install 'loopctl[bench]'

A step here is one batch, hence half an update. Otherwise all is as in benchmarks/overhead.py, whose peers are here
where they have all four or leave them to the user. Prints a table of docs/performance.md.
"""
import sys

import torch
from overhead import ours
from peers import lightning, titled, torchtnt_auto, transformers
from timing import BATCHES, Batches, compare, make, sgd
from torch import nn
from torch.nn.functional import cross_entropy

UPDATES = len(BATCHES) // 2


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)


def by_hand(batches: Batches) -> nn.Module:
    net, loss_fn = make(), nn.CrossEntropyLoss()
    optimizer = sgd(net.parameters())
    cosine = schedule(optimizer)
    net.train()
    for number, (input, target) in enumerate(batches, 1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(net(input), target) / 2
        loss.backward()
        if number % 2 == 0:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            cosine.step()
            optimizer.zero_grad()
    return net


def ignite(batches: Batches) -> nn.Module:
    """Its supervised trainer accumulates, but neither clips nor schedules: the update is by hand."""
    from ignite.engine import Engine

    net, loss_fn = make(), nn.CrossEntropyLoss()
    optimizer = sgd(net.parameters())
    cosine = schedule(optimizer)
    net.train()

    def update(engine, batch):
        input, target = batch
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_fn(net(input), target) / 2
        loss.backward()
        if engine.state.iteration % 2 == 0:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            cosine.step()
            optimizer.zero_grad()

    Engine(update).run(batches, max_epochs=1)
    return net


def accelerate(batches: Batches) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    net = make()
    optimizer = sgd(net.parameters())
    network, optimizer, cosine = accelerator.prepare(net, optimizer, schedule(optimizer))
    for input, target in batches:
        with accelerator.accumulate(network):
            accelerator.backward(cross_entropy(network(input), target))      # prepare put autocast around the network
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            cosine.step()
            optimizer.zero_grad()
    return net


if __name__ == "__main__":
    compare(by_hand, {
        "by hand": by_hand,
        "loopctl": lambda batches: ours(
            batches, "amp:dtype=bfloat16", "accumulate:every=2", "clip:max_norm=1", "cosine:by=step"),
        f"{titled('pytorch-ignite')}, the update by hand": ignite,
        f"{titled('torchtnt')}, its AutoUnit": lambda batches: torchtnt_auto(
            batches, UPDATES, precision="bf16", gradient_accumulation_steps=2, clip_grad_norm=1.0,
            step_lr_interval="step"),
        titled("accelerate"): accelerate,
        titled("lightning"): lambda batches: lightning(
            batches, UPDATES, precision="bf16-mixed", accumulate_grad_batches=2, gradient_clip_val=1.0),
        titled("transformers"): lambda batches: transformers(
            batches, bf16=True, gradient_accumulation_steps=2, max_grad_norm=1.0, lr_scheduler_type="cosine"),
    }, rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 9)
