"""The plugin amp, compared with a plain loop that uses torch.autocast and GradScaler."""
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.amp import Amp

cross_entropy = nn.CrossEntropyLoss()


def by_hand(model, optimizer, batches, epochs, dtype, max_norm=None, init_scale=65536.0):
    """The loop of torch's amp recipe. Returns the number of steps that the scaler skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale, enabled=dtype == torch.float16)
    skipped = 0
    for _ in range(epochs):
        model.train()
        for input, target in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = cross_entropy(model(input), target)
            scaler.scale(loss).backward()
            if max_norm:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            skipped += scaler.get_scale() < scale
    return skipped


@pytest.mark.compares(use="amp", technique="mixed precision with loss scaling, arXiv:1710.03740",
                      source="torch.autocast, torch.amp.GradScaler", tolerance="to the bit")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_equals_the_amp_recipe_to_the_bit(net, batches, clone, same, sgd, dtype, max_norm):
    other = clone(net)
    clip = [f"clip:max_norm={max_norm}"] if max_norm else []
    fit(net, cross_entropy, sgd, batches, epochs=3, plugins=[f"amp:dtype={dtype}", *clip], seed=1)
    torch.manual_seed(1)
    by_hand(other, sgd(other.parameters()), batches, 3, getattr(torch, dtype), max_norm)
    same(net, other)


def test_an_overflow_changes_no_weight_and_no_step_count(plain, batches, clone, same, sgd):
    """An initial scale of 2^40 overflows float16 until it has been halved many times."""
    before, seen = clone(plain), []

    class Recorder:
        @hookimpl
        def after_step(self, run: Run):
            if run.skipped:
                same(run.model, before)
            seen.append((run.skipped, run.step))

    other = clone(plain)
    init_scale = 2.0**40
    run = fit(plain, cross_entropy, sgd, batches, epochs=4, plugins=[Amp("float16", init_scale), Recorder()])
    skipped = by_hand(other, sgd(other.parameters()), batches, 4, torch.float16, init_scale=init_scale)
    assert 5 < skipped < 32
    assert run.step == 32 - skipped
    assert run.attempts == 32
    assert seen[0] == (True, 0)
    assert seen[-1] == (False, run.step)
    same(plain, other)


def test_skipped_steps_do_not_stretch_schedules(plain, batches, sgd):
    run = fit(plain, cross_entropy, sgd, batches, epochs=4, plugins=[Amp("float16", 2.0**40), "cosine:by=step"])
    without_amp = fit(plain, cross_entropy, sgd, batches, epochs=4, plugins=["cosine:by=step"])
    assert [row["lr"] for row in run.history] == [row["lr"] for row in without_amp.history]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_order_of_amp_and_clip_does_not_matter(net, batches, clone, same, sgd, dtype):
    other = clone(net)
    plugins = [f"amp:dtype={dtype}", "clip:max_norm=0.1"]
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=plugins, seed=1)
    fit(other, cross_entropy, sgd, batches, epochs=2, plugins=plugins[::-1], seed=1)
    same(net, other)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_with_accumulation_and_clipping_it_equals_a_plain_loop(plain, batches, clone, same, sgd, dtype):
    """Micro-batches are weighted by their samples, and the unscaled gradient is clipped."""
    other, autocast_dtype = clone(plain), getattr(torch, dtype)
    fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["accumulate:every=3", f"amp:dtype={dtype}", "clip:max_norm=0.1"])
    optimizer, scaler = sgd(other.parameters()), torch.amp.GradScaler("cpu", enabled=dtype == "float16")
    for _ in range(2):
        for start in range(0, len(batches), 3):
            group = batches[start:start + 3]
            total = sum(len(target) for _, target in group)
            optimizer.zero_grad()
            for input, target in group:
                with torch.autocast("cpu", autocast_dtype):
                    loss = cross_entropy(other(input), target)
                scaler.scale(loss * (len(target) / total)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
    same(plain, other)


def test_evaluation_runs_in_half_precision(net, batches, valid, sgd):
    dtypes = []

    class Recorder:
        @hookimpl
        def after_evaluate(self, run: Run):
            dtypes.append(run.outputs.dtype)

    fit(net, cross_entropy, sgd, batches, valid, plugins=["amp:dtype=bfloat16", Recorder()])
    assert dtypes == [torch.bfloat16]


def test_lbfgs_is_refused_with_float16_and_works_with_bfloat16(plain, batches):
    lbfgs = partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    with pytest.raises(UsageError, match=r"^amp: float16 loss scaling does not work with LBFGS.*use dtype=bfloat16"):
        fit(plain, cross_entropy, lbfgs, batches, plugins=["amp:dtype=float16"])
    assert fit(plain, cross_entropy, lbfgs, batches, plugins=["amp:dtype=bfloat16"]).step == 8


def test_float16_refuses_a_second_gradient_computation_in_a_step(plain, batches, sgd):
    class Twice:
        @hookimpl(wrapper=True)
        def optimizer_step(self, closure):
            closure()
            return (yield)

    with pytest.raises(UsageError, match="amp: float16 loss scaling allows one gradient computation per step"):
        fit(plain, cross_entropy, sgd, batches, plugins=["amp:dtype=float16", Twice()])


def test_dtype_auto_chooses_float16_or_bfloat16():
    assert Amp().dtype in ("float16", "bfloat16")
    assert Amp().dtype == "bfloat16" or torch.cuda.is_available()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_on_cuda_it_equals_the_amp_recipe_to_the_bit(plain, batches, clone, same, sgd, dtype):
    other = clone(plain).cuda()
    run = fit(plain, cross_entropy, sgd, batches, epochs=3, plugins=[f"amp:dtype={dtype}", "clip:max_norm=0.1"], device="cuda")
    optimizer, scaler = sgd(other.parameters()), torch.amp.GradScaler("cuda", enabled=dtype == "float16")
    for _ in range(3):
        for input, target in batches:
            optimizer.zero_grad()
            with torch.autocast("cuda", getattr(torch, dtype)):
                loss = cross_entropy(other(input.cuda()), target.cuda())
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(other.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
    same(run.model, other)


def test_an_overflow_in_the_first_step_leaves_no_uninitialized_momentum(plain, batches, clone, same):
    """In a skipped step, torch's fused SGD creates momentum buffers and does not initialize them."""
    models = [clone(plain), clone(plain)]
    for model, fused in zip(models, (True, False), strict=True):
        sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=fused)
        run = fit(model, nn.CrossEntropyLoss(), sgd, batches, plugins=["amp:dtype=float16,init_scale=1e6"], epochs=3)
        assert 0 < run.step < run.attempts
    same(*models, tolerance=1e-6)           # the fused update rounds differently
