"""Each schedule against torch's own class, at every step."""
from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler

from loopctl import Run
from loopctl.compose import compose
from loopctl.rates import curve

BATCHES, EPOCHS = 7, 20
TOTAL = BATCHES * EPOCHS


def ours(*plugins):
    """The rates of two parameter groups at every step."""
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[0], "lr": 0.1}, {"params": weights[1], "lr": 0.03}])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    run = Run(None, None, optimizer, range(BATCHES), epochs=EPOCHS, hook=compose(plugins))
    return [rates for _, rates in curve(run)]


def theirs(by, factory):
    """The rates that torch's schedule sets, stepped by hand."""
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[0], "lr": 0.1}, {"params": weights[1], "lr": 0.03}])
    schedule, rates = factory(optimizer), []
    for _ in range(EPOCHS):
        for _ in range(BATCHES):
            rates.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            if by == "step":
                schedule.step()
        if by == "epoch":
            schedule.step()
    return rates


cosine, linear = lr_scheduler.CosineAnnealingLR, lr_scheduler.LinearLR


@pytest.mark.parametrize(("spec", "by", "factory"), [
    ("cosine", "epoch", partial(cosine, T_max=EPOCHS)),
    ("cosine:t_max=6,eta_min=0.002", "epoch", partial(cosine, T_max=6, eta_min=0.002)),
    ("cosine:by=step", "step", partial(cosine, T_max=TOTAL)),
    ("cosine:t_max=30,by=step,eta_min=1e-5", "step", partial(cosine, T_max=30, eta_min=1e-5)),
    ("cosine:t_max=2ep,by=step", "step", partial(cosine, T_max=14)),
    ("cosine:t_max=10%,by=epoch", "epoch", partial(cosine, T_max=2)),
    ("warmup:length=5,by=epoch", "epoch", partial(linear, total_iters=5)),
    ("warmup:length=35,start_factor=0.1", "step", partial(linear, start_factor=0.1, total_iters=35)),
    ("warmup", "step", partial(linear, total_iters=TOTAL * 0.05)),
])
def test_torch_gives_the_same_rates(spec, by, factory):
    # torch computes each rate from the one before and gathers rounding; ours is the closed form.
    for mine, other in zip(ours(spec), theirs(by, factory), strict=True):
        assert mine == pytest.approx(other, rel=1e-12, abs=1e-17)


def test_warmup_multiplies_and_never_exceeds_the_schedule():
    alone, warmed = ours("cosine:by=step"), ours("warmup:length=30", "cosine:by=step")
    assert all(a <= b for rates, limits in zip(warmed, alone, strict=True) for a, b in zip(rates, limits, strict=True))
    assert warmed[30:] == alone[30:]
    assert warmed == ours("cosine:by=step", "warmup:length=30")


def test_the_curve_leaves_the_run_where_it_was():
    run = Run(None, None, torch.optim.SGD([torch.zeros(1, requires_grad=True)]), range(5), epochs=3, hook=compose(["cosine"]))
    run.optimizer.param_groups[0]["initial_lr"] = 0.1
    run.epoch, run.attempts, run.seen = 1, 6, 6
    assert [step for step, _ in curve(run)] == list(range(15))
    assert (run.epoch, run.attempts, run.seen) == (1, 6, 6)
    run.epochs = 3000
    assert len(list(curve(run, points=100))) <= 102
