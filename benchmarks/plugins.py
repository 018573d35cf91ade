"""What each built-in plugin adds to a step, beside what the same adds to the loop by hand, in plain PyTorch.

    python benchmarks/plugins.py [rounds]

The work is that of benchmarks/overhead.py, 300 steps at a time. Schedules move every step. Less than nothing is
possible: a frozen layer saves more than freezing costs, and half the updates are half the updates. Prints a table of
docs/performance.md.
"""
import sys
from collections.abc import Callable, Iterable
from math import cos
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from timing import LR, Batches, make, sgd, timed
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, one_hot
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm
from torch.optim import lr_scheduler, swa_utils

from loopctl import fit

Step = Callable[[torch.Tensor, torch.Tensor], None]


def plain(net: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(input, target):
        optimizer.zero_grad()
        cross_entropy(net(input), target).backward()
        optimizer.step()
    return step


def before_update(action: Callable[[list[nn.Parameter]], object]) -> Callable[..., Step]:
    def begin(net, optimizer):
        parameters = list(net.parameters())

        def step(input, target):
            optimizer.zero_grad()
            cross_entropy(net(input), target).backward()
            action(parameters)
            optimizer.step()
        return step
    return begin


def scheduled(factory: Callable[..., Any], *args: object, **settings: object) -> Callable[..., Step]:
    def begin(net, optimizer):
        schedule = factory(optimizer, *args, **settings)

        def step(input, target):
            optimizer.zero_grad()
            cross_entropy(net(input), target).backward()
            optimizer.step()
            schedule.step()
        return step
    return begin


def autocast(net, optimizer):
    def step(input, target):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(net(input), target)
        loss.backward()
        optimizer.step()
    return step


def scaled(net, optimizer):
    scaler = torch.amp.GradScaler("cpu")

    def step(input, target):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(net(input), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return step


def accumulated(net, optimizer):
    number = 0

    def step(input, target):
        nonlocal number
        number += 1
        (cross_entropy(net(input), target) / 2).backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
    return step


def in_parts(net, optimizer):
    def step(input, target):
        optimizer.zero_grad()
        for part, aim in zip(input.chunk(2), target.chunk(2), strict=True):
            (cross_entropy(net(part), aim) / 2).backward()
        optimizer.step()
    return step


def averaged(net, optimizer):
    average = swa_utils.AveragedModel(net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.999))
    update = plain(net, optimizer)

    def step(input, target):
        update(input, target)
        average.update_parameters(net)
    return step


def averaged_at_once(net, optimizer):
    own, update = [parameter.detach() for parameter in net.parameters()], plain(net, optimizer)
    average = [tensor.clone() for tensor in own]

    def step(input, target):
        update(input, target)
        torch._foreach_lerp_(average, own, 1e-3)
    return step


def sharpness_aware(net, optimizer):
    parameters = list(net.parameters())

    def step(input, target):
        optimizer.zero_grad()
        cross_entropy(net(input), target).backward()
        with torch.no_grad():
            factor = 0.05 / (get_total_norm([parameter.grad for parameter in parameters]) + 1e-12)
            before = [parameter.clone() for parameter in parameters]
            for parameter in parameters:
                parameter.add_(parameter.grad * factor)
        optimizer.zero_grad()
        cross_entropy(net(input), target).backward()
        with torch.no_grad():
            for parameter, was in zip(parameters, before, strict=True):
                parameter.copy_(was)
        optimizer.step()
    return step


def frozen(net, optimizer):
    net[0].requires_grad_(False)
    return plain(net, optimizer)


def two_groups(net, optimizer):
    return plain(net, sgd([{"params": net[2].parameters()}, {"params": net[0].parameters(), "lr": LR / 2}]))


def guarded(net, optimizer):
    parameters = list(net.parameters())

    def step(input, target):
        optimizer.zero_grad()
        loss = cross_entropy(net(input), target)
        loss.backward()
        if torch.isfinite(loss + get_total_norm([parameter.grad for parameter in parameters])):
            optimizer.step()
    return step


def mixed(net, optimizer):
    beta = torch.distributions.Beta(torch.tensor(0.2), torch.tensor(0.2))

    def step(input, target):
        share, aim = beta.sample().item(), one_hot(target, 10).float()
        input = input.roll(1, 0) * (1 - share) + input * share
        aim = aim.roll(1, 0) * (1 - share) + aim * share
        optimizer.zero_grad()
        cross_entropy(net(input), aim).backward()
        optimizer.step()
    return step


def smoothed(net, optimizer):
    def step(input, target):
        optimizer.zero_grad()
        cross_entropy(net(input), target, label_smoothing=0.1).backward()
        optimizer.step()
    return step


def selected(net, optimizer):
    update, number = plain(net, optimizer), 0

    def step(input, target):
        nonlocal number
        if number % 2:
            net.eval()
            with torch.no_grad():
                losses = cross_entropy(net(input), target, reduction="none")
            net.train()
            chances = (losses.argsort().argsort() + 0.5) / len(losses)
            kept = torch.multinomial(chances, len(losses) // 2)
            input, target = input[kept], target[kept]
        number += 1
        update(input, target)
    return step


def taught(net, optimizer):
    teacher = make().eval()

    def step(input, target):
        optimizer.zero_grad()
        output = net(input)
        with torch.no_grad():
            expected = teacher(input)
        divergence = kl_div(log_softmax(output / 4, 1), log_softmax(expected / 4, 1), reduction="batchmean",
                            log_target=True)
        (0.9 * 16 * divergence + 0.1 * cross_entropy(output, target)).backward()
        optimizer.step()
    return step


@torch.no_grad()
def clip_units(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters[:-2]:
        dims = tuple(range(1, parameter.ndim)) or 0
        limit = torch.linalg.vector_norm(parameter, dim=dims, keepdim=True).clamp(min=1e-3) * 0.01
        norm = torch.linalg.vector_norm(parameter.grad, dim=dims, keepdim=True)
        parameter.grad.mul_(torch.where(norm < limit, 1.0, limit / norm.clamp(min=1e-6)))


def clip_by_history(net, optimizer):
    history: list[float] = []

    def clip(parameters):
        history.append(get_total_norm([parameter.grad for parameter in parameters]).item())
        clip_grad_norm_(parameters, np.percentile(history, 10))
    return before_update(clip)(net, optimizer)


@torch.no_grad()
def centralize(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        if parameter.ndim > 1:
            parameter.grad.sub_(parameter.grad.mean(dim=tuple(range(1, parameter.ndim)), keepdim=True))


@torch.no_grad()
def add_noise(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad.add_(torch.randn_like(parameter.grad), alpha=0.1)


def rise_and_fall(number: int) -> float:
    return 1 + 9 * max(0.0, min(1.0, number / 100, (TOTAL - number) / 100))


STEPS = 300
TOTAL = len(Batches(STEPS))
# The plugin, and the step by hand that does the same; where that is nothing in a step, the plain one.
ROWS: list[tuple[str, Callable[..., Step]]] = [
    ("amp:dtype=bfloat16", autocast),
    ("amp:dtype=float16", scaled),
    ("accumulate:every=2", accumulated),
    ("split:into=2", in_parts),
    ("clip:max_norm=1", before_update(lambda parameters: clip_grad_norm_(parameters, 1.0))),
    ("clip:value=0.1", before_update(lambda parameters: clip_grad_value_(parameters, 0.1))),
    ("nan_guard", guarded),
    ("sam", sharpness_aware),
    ("ema", averaged),
    ("ema:warmup=false", averaged_at_once),
    ("swa", plain),
    ("mixup", mixed),
    ("label_smoothing", smoothed),
    ("selective_backprop:start=0,end=1", selected),
    ("distill:teacher=timing:make", taught),
    ("agc", before_update(clip_units)),
    ("clip:auto=10", clip_by_history),
    ("grad_centralize", before_update(centralize)),
    ("grad_noise", before_update(add_noise)),
    ("spike", guarded),
    ("prune:amount=0.5", plain),
    ("accumulate:every=1,2@50st", plain),
    ("bf16", plain),
    ("activation_checkpointing:modules=*", plain),
    ("norms:every_steps=50", plain),
    ("csv:every_steps=50", plain),
    ("inverse_sqrt:timescale=100", plain),
    ("freeze:patterns=0", frozen),
    ("layerwise_lr:decay=0.5", two_groups),
    ("step:step_size=100,by=step", scheduled(lr_scheduler.StepLR, 100)),
    ("multistep:milestones=100,200,by=step", scheduled(lr_scheduler.MultiStepLR, [100, 200])),
    ("exponential:gamma=0.999,by=step", scheduled(lr_scheduler.ExponentialLR, 0.999)),
    ("linear:total_iters=200,by=step", scheduled(lr_scheduler.LinearLR, total_iters=200)),
    ("polynomial:total_iters=200,by=step", scheduled(lr_scheduler.PolynomialLR, 200)),
    ("cosine:by=step", scheduled(lr_scheduler.CosineAnnealingLR, TOTAL)),
    ("cosine_restarts:t_0=100,by=step", scheduled(lr_scheduler.CosineAnnealingWarmRestarts, 100)),
    ("constant:total_iters=200,by=step", scheduled(lr_scheduler.ConstantLR, total_iters=200)),
    ("lambda:lr_lambda=math:cos,by=step", scheduled(lr_scheduler.LambdaLR, cos)),
    ("multiplicative:lr_lambda=math:cos,by=step", scheduled(lr_scheduler.MultiplicativeLR, cos)),
    ("onecycle:max_lr=0.1,cycle_momentum=false",
     scheduled(lr_scheduler.OneCycleLR, 0.1, total_steps=TOTAL + 1, cycle_momentum=False)),
    ("cyclic:base_lr=0.01,max_lr=0.1,cycle_momentum=false",
     scheduled(lr_scheduler.CyclicLR, 0.01, 0.1, cycle_momentum=False)),
    ("trapezoidal:max_lr=0.1,step_size=100", scheduled(lr_scheduler.LambdaLR, rise_and_fall)),
    ("warmup:length=200", scheduled(lr_scheduler.LinearLR, total_iters=200)),
    ("torch_scheduler:cls=torch.optim.lr_scheduler:StepLR,step_size=100,by=step", scheduled(lr_scheduler.StepLR, 100)),
    ("plateau", plain),
    ("early_stopping", plain),
    ("csv", plain),
    ("progress", plain),
    ("summary", plain),
    ("checkpoint", plain),
]


def by_hand(batches: Batches, begin: Callable[..., Step] = plain) -> nn.Module:
    net = make()
    net.train()
    step = begin(net, sgd(net.parameters()))
    for input, target in batches:
        step(input, target)
    return net


def ours(batches: Batches, plugins: Iterable[str] = ()) -> nn.Module:
    with TemporaryDirectory() as folder:
        return fit(make(), nn.CrossEntropyLoss(), sgd, batches, plugins=plugins, out=Path(folder)).model


def main(rounds: int) -> None:
    added: dict[str, list[tuple[float, float]]] = {spec: [] for spec, _ in ROWS}
    for number in range(rounds):
        for spec, begin in ROWS:
            hand = -timed(by_hand, STEPS)[0] + timed(lambda batches, begin=begin: by_hand(batches, begin), STEPS)[0]
            plugin = -timed(ours, STEPS)[0] + timed(lambda batches, spec=spec: ours(batches, [spec]), STEPS)[0]
            added[spec].append((plugin, hand))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    print("| plugin | us added per step | by hand |\n|---|---|---|")
    for spec, begin in ROWS:
        plugin, hand = (median(each) for each in zip(*added[spec], strict=True))
        beside = "" if begin is plain else f"{hand:.0f}"
        print(f"| `{spec}` | {plugin:.0f} | {beside} |")


if __name__ == "__main__":
    main(rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 9)
