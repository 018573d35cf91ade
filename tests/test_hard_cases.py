"""Bugs that other training loops shipped, each with a test that fails on them; a docstring says where it was reported.

A test writes by hand what a careful person would write, in plain PyTorch, and compares bit for bit, or it looks at the
fact itself. A run is killed by a plugin that raises, and gone on with by another call of `fit` with `resume`.

Those that take several processes to show, C2, E6, F6 and what A2 and A8 say of them, are in tests/test_processes.py.
"""
import copy
import math
from functools import partial
from itertools import chain

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.optim.learning_rate import lr_curve
from loopctl.plugins import nan_guard
from loopctl.plugins.amp import Amp
from loopctl.plugins.nan_guard import NanGuard
from loopctl.plugins.torch_scheduler import TorchScheduler

cross_entropy = nn.CrossEntropyLoss()
plain_sgd = partial(torch.optim.SGD, lr=0.1)
adam = partial(torch.optim.Adam, lr=1e-2)


class Watch:
    """Writes down the loss and the rate of every step."""

    def __init__(self):
        self.losses, self.rates = [], []

    @hookimpl
    def after_step(self, run: Run):
        self.losses.append(run.loss.item())
        self.rates.append(float(run.optimizer.param_groups[0]["lr"]))


class Scores:
    """The validation loss of each epoch, decided beforehand; the last one stays."""

    def __init__(self, *values):
        self.values = values

    @hookimpl
    def evaluate(self, run: Run):
        return {"val_loss": self.values[min(run.epoch, len(self.values)) - 1]}


class Kill:
    """Ends the process, as far as a test can, at the first safe point where `when(run)`."""

    def __init__(self, when):
        self.when = when

    @hookimpl
    def safe_point(self, run: Run):
        if self.when(run):
            raise KeyboardInterrupt


def killed(when, model, factory, train, out, plugins=(), **settings):
    """Train a copy of `model` up to where it is killed, right after a checkpoint."""
    plugins = [*copy.deepcopy(plugins), "checkpoint:every_steps=1", Kill(when)]
    with pytest.raises(KeyboardInterrupt):
        fit(copy.deepcopy(model), cross_entropy, factory, train, plugins=plugins, out=out, seed=1, **settings)
    torch.rand(7)               # the next process has other random numbers


def gone_on(when, model, factory, train, out, plugins=(), watch=(), **settings):
    """Train `model`, killed in between. Returns the run that went on to the end."""
    killed(when, model, factory, train, out, plugins, **settings)
    plugins = [*copy.deepcopy(plugins), "checkpoint:every_steps=1", *watch]
    return fit(model, cross_entropy, factory, train, plugins=plugins, out=out, resume=out, **settings)


def add_gradients(model, group, loss_fn=cross_entropy, scale=lambda loss: loss):
    """By hand: the gradient of the mean over all samples of a group of batches."""
    total = sum(len(target) for _, target in group)
    for input, target in group:
        scale(loss_fn(model(input), target) * (len(target) / total)).backward()


def groups(batches, every):
    return [batches[start:start + every] for start in range(0, len(batches), every)]


def equal_batches(count, size=8):
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)) for _ in range(count)]


# Accumulation


def test_A1_mean_of_means(plain, clone, same, sgd):
    """Every micro-batch's mean counted alike, however few tokens it had (huggingface/transformers#34191, #24725)."""
    class Tokens:
        @hookimpl
        def batch_weight(self, batch):
            return (batch[1] >= 0).sum().item()

    generator, data = torch.Generator().manual_seed(0), []
    for lengths in ([5, 5, 4], [1, 1, 2], [1, 3, 1], [5, 5, 5]):
        target = torch.randint(0, 3, (3, 5), generator=generator)
        target[torch.arange(5) >= torch.tensor(lengths)[:, None]] = -100         # padding, which cross-entropy leaves out
        data.append((torch.randn(3, 5, 6, generator=generator).double(), target))

    def loss_fn(output, target, reduction="mean"):
        return nn.functional.cross_entropy(output.transpose(1, 2), target, reduction=reduction)

    model, other = plain.double(), clone(plain)
    run = fit(model, loss_fn, sgd, data, plugins=["accumulate:every=2", Tokens()])
    optimizer, losses = sgd(other.parameters()), []
    for group in groups(data, 2):
        optimizer.zero_grad()
        losses.append(sum(loss_fn(other(input), target, "sum") for input, target in group))
        (losses[-1] / sum((target >= 0).sum() for _, target in group)).backward()
        optimizer.step()
    same(model, other, 1e-12)           # one sum over all tokens, and so in another order
    assert run.history[0]["train_loss"] == pytest.approx(sum(losses).item() / 38, rel=1e-12)


@pytest.mark.parametrize(("plugins", "parts"), [
    (["accumulate:every=4"], 1), (["split:into=4"], 4), (["accumulate:every=2", "split:into=2"], 2),
    (["split:into=2", "accumulate:every=2", "amp:dtype=bfloat16"], 2),
])
def test_A2_double_or_missing_division(plain, clone, same, sgd, plugins, parts):
    """Two divided by the number of parts, or nobody did (huggingface/transformers#35203, #34373)."""
    batches, other, watch = equal_batches(8), clone(plain), Watch()
    whole = [tuple(torch.cat(pieces) for pieces in zip(*group, strict=True)) for group in groups(batches, parts)]
    fit(plain, cross_entropy, sgd, whole, plugins=[*plugins, watch])
    optimizer = sgd(other.parameters())
    for group, reported in zip(groups(batches, 4), watch.losses, strict=True):
        optimizer.zero_grad()
        losses = []
        for input, target in group:
            with torch.autocast("cpu", torch.bfloat16, enabled=len(plugins) == 3):
                losses.append(cross_entropy(other(input), target))
            (losses[-1] / 4).backward()
        optimizer.step()
        assert reported == pytest.approx(sum(losses).item() / 4, rel=1e-6)       # summed in another order
    same(plain, other)


def test_A3_last_partial_group(plain, clone, same, sgd):
    """What was left at the end was divided by the full k (Lightning-AI/pytorch-lightning#19987, huggingface/transformers#38872)."""
    batches, other = equal_batches(5), clone(plain)
    fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["accumulate:every=4"])
    optimizer = sgd(other.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        for input, target in batches[:4]:
            (cross_entropy(other(input), target) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        cross_entropy(other(batches[4][0]), batches[4][1]).backward()       # a group of one is a batch like any other
        optimizer.step()
    same(plain, other)


def test_A4_trailing_group_dropped(plain, batches, clone, same):
    """What was left was never stepped, and the schedule made too short (NVIDIA-NeMo/Automodel#2257, tracel-ai/burn#5695)."""
    other, watch = clone(plain), Watch()
    run = fit(plain, cross_entropy, plain_sgd, batches[3:], epochs=3, plugins=["accumulate:every=2", "cosine:by=step", watch])
    optimizer, rates = plain_sgd(other.parameters()), [0.1 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    for step, group in enumerate(3 * groups(batches[3:], 2)):               # of two batches, two, and one
        optimizer.zero_grad()
        add_gradients(other, group)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    same(plain, other)
    assert watch.rates == rates
    assert (run.step, run.seen, run.planned_steps) == (9, 15, 9)


@pytest.mark.parametrize(("every", "at"), [(3, 1), (3, 2), (3, 3), (3, 5), (4, 1)])
def test_A5_resume_in_the_middle_of_an_epoch(plain, batches, clone, same, sgd, tmp_path, every, at):
    """The remainder was counted from where the run went on, and the loss multiplied by 0 or NaN (open-mmlab/mmcv#2083)."""
    other, watch, losses = clone(plain), Watch(), []
    gone_on(lambda run: run.attempts == at, plain, sgd, batches, tmp_path, [f"accumulate:every={every}"], [watch], epochs=2)
    optimizer = sgd(other.parameters())
    for group in 2 * groups(batches, every):
        optimizer.zero_grad()
        add_gradients(other, group, scale=lambda loss: losses.append(loss.item()) or loss)
        optimizer.step()
    same(plain, other)
    losses = [sum(parts) for parts in groups(losses[:8], every) + groups(losses[8:], every)]
    assert watch.losses == pytest.approx(losses[at:], rel=1e-6)             # summed in float32 there, in float64 here


def test_A6_zero_grad_within_a_group(plain, clone):
    """zero_grad at the top of the loop wiped what the group had gathered (huggingface/accelerate#1299)."""
    batches, other, found = equal_batches(8), clone(plain), []

    class Look:
        @hookimpl
        def grads_ready(self, run: Run):
            found.append([parameter.grad.clone() for parameter in run.model.parameters()])

    fit(plain, cross_entropy, partial(torch.optim.SGD, lr=0.0), batches, plugins=["accumulate:every=4", Look()])
    for group, gradients in zip(groups(batches, 4), found, strict=True):
        each = [torch.autograd.grad(cross_entropy(other(input), target) / 4, list(other.parameters())) for input, target in group]
        torch.testing.assert_close(gradients, [sum(parts) for parts in zip(*each, strict=True)], rtol=0, atol=0)


def test_A7_clip_per_micro_batch(plain, batches, clone, same, sgd):
    """Each micro-batch's gradient was clipped, not the step's (facebookresearch/lingua#59)."""
    other, norms = clone(plain), []
    run = fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["accumulate:every=3", "clip:max_norm=0.1"])
    optimizer = sgd(other.parameters())
    for group in 2 * groups(batches, 3):
        optimizer.zero_grad()
        add_gradients(other, group)
        norms.append(nn.utils.clip_grad_norm_(other.parameters(), 0.1))
        optimizer.step()
    same(plain, other)
    assert min(norms) > 0.1                                                 # it did something in every step
    assert run.metrics["grad_norm"] == norms[-1].item()


def test_A8_forward_and_backward_of_all_but_the_last(plain, batches):
    """no_sync off by one, without forward, or absent (modelscope/FunASR#3472, karpathy/build-nanogpt#30, huggingface/transformers#7742)."""
    log = []

    class Sync:
        """Where no_sync would be."""

        @hookimpl(wrapper=True)
        def micro_step(self, last):
            log.append("last" if last else "no_sync")
            loss = yield
            log.append("end")
            return loss

    plain.register_forward_hook(lambda *_: log.append("forward"))
    plain[0].weight.register_post_accumulate_grad_hook(lambda _: log.append("backward"))
    fit(plain, cross_entropy, plain_sgd, batches[3:], plugins=["accumulate:every=3", Sync()])
    each = [[kind, "forward", "backward", "end"] for kind in ("no_sync", "no_sync", "last", "no_sync", "last")]
    assert log == [*chain(*each)]


# Mixed precision and clipping


@pytest.mark.parametrize("order", [1, -1])
def test_B1_clip_before_unscale(plain, batches, clone, same, sgd, order):
    """Scaled gradients were clipped, to almost nothing (Lightning-AI/pytorch-lightning#9606, #9599)."""
    other, norms = clone(plain), []
    run = fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["amp:dtype=float16", "clip:max_norm=0.1"][::order])
    optimizer, scaler = sgd(other.parameters()), torch.amp.GradScaler("cpu")
    for input, target in 2 * batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(other(input), target)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(other.parameters(), 0.1).item())
        scaler.step(optimizer)
        scaler.update()
    same(plain, other)
    assert 0.1 < norms[-1] == run.metrics["grad_norm"] < 10


def test_B2_clip_after_the_step(plain, batches, clone, same, sgd):
    """Clipping came after the update, for which it was too late (Lightning-AI/pytorch-lightning#10248)."""
    other = clone(plain)
    fit(plain, cross_entropy, sgd, batches, plugins=["clip:value=0.01"])
    optimizer = sgd(other.parameters())
    for input, target in batches:
        optimizer.zero_grad()
        cross_entropy(other(input), target).backward()
        nn.utils.clip_grad_value_(other.parameters(), 0.01)
        optimizer.step()
    same(plain, other)


def test_B3_skipped_steps_do_not_count(plain, batches, clone, same):
    """What counts updates moved where there was none (Lightning-AI/pytorch-lightning#5558, #16228, huggingface/transformers#11106)."""
    # Schedules count no updates here: they follow the data, over skipped steps too, as docs/architecture.md says.
    other, average, updates, skipped = clone(plain), {}, 0, 0
    plugins = [Amp("float16", 2.0**40), "ema:decay=0.9,warmup=false"]
    run = fit(plain, cross_entropy, adam, batches, epochs=9, max_steps=12, plugins=plugins)
    optimizer, scaler = adam(other.parameters()), torch.amp.GradScaler("cpu", 2.0**40)
    while updates < 12:
        input, target = batches[(updates + skipped) % 8]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(other(input), target)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            continue
        updates += 1
        for name, value in other.state_dict().items():
            average[name] = average[name].lerp(value, 1 - 0.9) if name in average else value.clone()
    assert skipped > 5
    assert (run.step, run.attempts) == (12, 12 + skipped)
    assert run.optimizer.state[plain[0].weight]["step"] == 12
    other.load_state_dict(average)
    same(plain, other)


def half_by_hand(model, optimizer, scaler, batches, max_norm=None, dtype=torch.float16):
    """The loop of torch's recipe for mixed precision. Returns the scale after each step."""
    scales = []
    for input, target in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(model(input), target)
        scaler.scale(loss).backward()
        if max_norm:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_B4_scaler_state_lost(plain, batches, clone, same, sgd, tmp_path):
    """The scale was back at 65536, and gradients overflowed all over again (huggingface/transformers#34053)."""
    other, skipped = clone(plain), []

    class Look:
        @hookimpl
        def after_step(self, run: Run):
            skipped.append(run.skipped)

    gone_on(lambda run: run.attempts == 28, plain, sgd, batches, tmp_path, [Amp("float16", 2.0**40)], [Look()], epochs=4)
    scales = half_by_hand(other, sgd(other.parameters()), torch.amp.GradScaler("cpu", 2.0**40), 4 * batches)
    same(plain, other)
    assert scales[27] == scales[31] < 2.0**30
    assert skipped == [False] * 4


def test_B5_restored_too_early(net, batches, clone, same, tmp_path):
    """The scale was restored, then moved on by what came after it (huggingface/accelerate#4289)."""
    class Restless(torch.optim.SGD):
        """Draws random numbers when its state is loaded."""

        def load_state_dict(self, state):
            super().load_state_dict(state)
            torch.rand(3)

    class Dice:
        """Draws random numbers, with every plugin's state fresh, where a run begins."""

        @hookimpl
        def train_start(self, run: Run):
            torch.rand(3)

    sgd, scales = partial(Restless, lr=0.1, momentum=0.9), []

    class Look:
        @hookimpl
        def after_step(self, run: Run):
            scaler = run.hook.plugins["amp"].scaler
            scales.append((scaler.get_scale(), scaler.state_dict()["_growth_tracker"]))

    whole, plugins = clone(net), ["amp:dtype=float16,init_scale=1024,growth_interval=5", Dice()]
    fit(whole, cross_entropy, sgd, batches, epochs=2, plugins=[*plugins, Look()], seed=1)
    expected, scales[:] = scales.copy(), []
    gone_on(lambda run: run.attempts == 7, net, sgd, batches, tmp_path, plugins, [Look()], epochs=2)
    assert expected[6:8] == [(2048.0, 2), (2048.0, 3)]
    assert scales == expected[7:]
    same(net, whole)


def test_B6_unscale_twice_after_a_lack_of_memory(plain, clone, same, sgd):
    """The step was done over with gradients that were unscaled already (huggingface/transformers#24050)."""
    batches, other, sizes = equal_batches(8), clone(plain), []

    def loss_fn(output, target):
        sizes.append(len(target))
        if len(sizes) == 4:                 # the second micro-batch of the second step, with the first one's gradient there
            raise torch.OutOfMemoryError
        return cross_entropy(output, target)

    run = fit(plain, loss_fn, sgd, batches, plugins=["accumulate:every=2", "split:into=auto", "amp:dtype=float16", "clip:max_norm=0.1"])
    assert sizes == [8, 8, 8, 8, *[4] * 12]
    optimizer, scaler = sgd(other.parameters()), torch.amp.GradScaler("cpu")
    for number, group in enumerate(groups(batches, 2)):
        parts = group if number == 0 else [(input[half], target[half]) for input, target in group for half in (slice(4), slice(4, 8))]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            losses = [cross_entropy(other(input), target) / len(parts) for input, target in parts]
        for loss in losses:
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    same(plain, other)
    assert (run.step, run.attempts) == (4, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_B7_fused_optimizer_with_clipping(plain, batches, clone, same, dtype):
    """Refused, or unscaled by the optimizer once more (Lightning-AI/pytorch-lightning#21435, #15555)."""
    other, fused = clone(plain), partial(torch.optim.AdamW, lr=1e-2, fused=True)
    plugins = ["clip:max_norm=0.1", Amp(str(dtype).removeprefix("torch."), 2.0**30)]
    fit(plain, cross_entropy, fused, batches, epochs=4, plugins=plugins)
    scaler = torch.amp.GradScaler("cpu", 2.0**30, enabled=dtype == torch.float16)
    scales = half_by_hand(other, fused(other.parameters()), scaler, 4 * batches, 0.1, dtype)
    same(plain, other)
    assert dtype == torch.bfloat16 or scales[0] > scales[-2] == scales[-1]          # some steps were skipped, the last were not


def test_B8_autocast_around_a_swap_of_weights(plain, batches, valid, clone, same, sgd):
    """One autocast around all kept its copies of weights that had changed since (X-GenGroup/Flow-Factory#186)."""
    other, average, losses = clone(plain), clone(plain), []
    run = fit(plain, cross_entropy, sgd, batches, valid, epochs=2, plugins=["amp:dtype=bfloat16", "ema:decay=0.5,warmup=false"])
    optimizer = sgd(other.parameters())
    for step, (input, target) in enumerate(2 * batches):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(other(input), target)
        loss.backward()
        optimizer.step()
        for mine, value in zip(average.parameters(), other.parameters(), strict=True):
            mine.data = value.data.clone() if step == 0 else mine.data.lerp(value.data, 0.5)
        if step in (7, 15):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                losses.append([cross_entropy(average(input), target).double() * len(target) for input, target in valid])
    same(plain, average)
    assert [row["val_loss"] for row in run.history] == [(sum(parts) / 13).item() for parts in losses]


# Schedules


def test_C1_stepped_per_micro_batch(plain, batches):
    """The rate fell k times too fast (Lightning-AI/pytorch-lightning#1476, huggingface/accelerate#963, open-mmlab/mmengine#1308)."""
    watch = Watch()
    fit(plain, cross_entropy, plain_sgd, batches, epochs=2, plugins=["accumulate:every=4", "exponential:gamma=0.5,by=step", watch])
    assert watch.rates == [0.1, 0.05, 0.025, 0.0125]


def sequence(optimizer):
    rise = lr_scheduler.LinearLR(optimizer, 0.25, total_iters=4)
    return lr_scheduler.SequentialLR(optimizer, [rise, lr_scheduler.CosineAnnealingLR(optimizer, 12)], [4])


@pytest.mark.parametrize("torchs", [False, True])
@pytest.mark.parametrize("at", [1, 4, 5, 8, 11])
def test_C3_schedules_in_a_row(plain, batches, tmp_path, torchs, at):
    """The first rate was another schedule's, and so was the one that a run went on with (pytorch/pytorch#185872, #162591)."""
    plugins = [TorchScheduler(sequence, by="step")] if torchs else ["warmup:length=4,start_factor=0.25", "cosine:by=step"]
    whole, watch = Watch(), Watch()
    fit(copy.deepcopy(plain), cross_entropy, plain_sgd, batches, epochs=2, plugins=[*copy.deepcopy(plugins), whole])
    gone_on(lambda run: run.attempts == at, plain, plain_sgd, batches, tmp_path, plugins, [watch], epochs=2)
    rises = [0.1 * (0.25 + 0.75 * min(1, step / 4)) for step in range(16)]
    falls = [(1 + math.cos(math.pi * (max(0, step - 4) / 12 if torchs else step / 16))) / 2 for step in range(16)]
    expected = [rise * fall for rise, fall in zip(rises, falls, strict=True)]
    assert whole.rates == pytest.approx(expected, rel=1e-12)        # not rounded in the same order
    assert watch.rates == whole.rates[at:]


@pytest.mark.parametrize("length", [1, 2, 5, 15])
def test_C4_warmup_into_cosine(plain, batches, length):
    """Where the one handed over to the other, the rate rose above its peak (deepseek-ai/DeepSpec#32)."""
    both, alone = Watch(), Watch()
    fit(plain, cross_entropy, plain_sgd, batches, epochs=2, plugins=[f"warmup:length={length}", "cosine:by=step", both])
    fit(plain, cross_entropy, plain_sgd, batches, epochs=2, plugins=["cosine:by=step", alone])
    assert both.rates[length:] == alone.rates[length:]
    assert all(rate < highest <= 0.1 for rate, highest in zip(both.rates[:length], alone.rates, strict=False))


def test_C5_two_writers_of_the_rate(plain, batches, valid):
    """A schedule that set the rate undid what another had done (Lightning-AI/pytorch-lightning#4902, keras-team/keras#8829)."""
    watch, plateau = Watch(), "plateau:patience=0,factor=0.5"
    for plugins in (["warmup:length=24,start_factor=0.25", plateau], [plateau, "warmup:length=24,start_factor=0.25"]):
        watch.rates.clear()
        fit(plain, cross_entropy, plain_sgd, batches, valid, epochs=5, plugins=[*plugins, Scores(1.0, 2.0), watch])
        rises = [0.1 * (0.25 + 0.75 * min(1, step / 24)) for step in range(40)]
        expected = [rise * 0.5 ** max(0, step // 8 - 1) for step, rise in enumerate(rises)]
        assert watch.rates == pytest.approx(expected, rel=1e-12)        # not rounded in the same order


def test_C6_plateau_forgets_its_count(plain, batches, valid, sgd, tmp_path):
    """Bad epochs and the cooldown were counted anew after every start (huggingface/pytorch-image-models#2756)."""
    optimizer, rates = plain_sgd(plain.parameters()), []
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, cooldown=2)
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(1.0)
    assert rates == [0.1] * 4 + [0.05] * 5 + [0.025] * 3
    plugins = ["plateau:factor=0.5,patience=2,cooldown=2", Scores(1.0)]
    for epoch in (2, 3, 5, 6, 8):
        watch, out = Watch(), tmp_path / str(epoch)
        gone_on(lambda run, epoch=epoch: run.epoch == epoch, plain, sgd, batches[:1], out, plugins, [watch], valid=valid, epochs=12)
        assert watch.rates == rates[epoch:]


@pytest.mark.parametrize("at", [2, 6])
def test_C7_construction_changes_the_rate(plain, batches, tmp_path, at):
    """Making the schedule multiplied the rate by its first factor, before its state was loaded (open-mmlab/mmengine#1542)."""
    made, watch = [], Watch()

    class Look:
        @hookimpl
        def train_start(self, run: Run):
            made.append([(group["lr"], group["initial_lr"]) for group in run.optimizer.param_groups])

    plugins = [TorchScheduler(lr_scheduler.LinearLR, {"start_factor": 0.1, "total_iters": 4}, by="step"), "warmup:length=5"]
    gone_on(lambda run: run.attempts == at, plain, plain_sgd, batches, tmp_path, plugins, [Look(), watch])
    assert made == [[(0.1, 0.1)]]
    expected = [0.1 * (0.1 + 0.9 * min(1, step / 4)) * (1 + 2 * min(1, step / 5)) / 3 for step in range(8)]
    assert watch.rates == pytest.approx(expected[at:], rel=1e-12)       # torch's schedule multiplies step by step


def test_C8_a_float_rate_recompiles(plain, batches, valid, clone, same):
    """A new number as the rate makes a compiled step compile again (pytorch/pytorch#163093, #107076): its tensor is filled."""
    other, rate, seen = clone(plain), torch.tensor(0.1), []

    class Look:
        @hookimpl
        def before_step(self, run: Run):
            assert run.optimizer.param_groups[0]["lr"] is rate
            seen.append(rate.item())

    plugins = ["warmup:length=8", "cosine:by=step", "plateau:factor=0.5,patience=0", Scores(1.0), Look()]
    fit(plain, cross_entropy, torch.optim.SGD(plain.parameters(), lr=rate), batches, valid, epochs=3, plugins=plugins)
    factors = [(1 + 2 * min(1, step / 8)) / 3 * (1 + math.cos(math.pi * step / 24)) / 2 * (0.5 if step >= 16 else 1) for step in range(24)]
    assert seen == pytest.approx([0.1 * factor for factor in factors], rel=1e-6)         # float32 holds no more
    optimizer = plain_sgd(other.parameters())
    for (input, target), lr in zip(3 * batches, seen, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        cross_entropy(other(input), target).backward()
        optimizer.step()
    same(plain, other)


# Averaging


def test_D1_batch_norm_statistics_of_the_average(net, batches, clone, same, sgd):
    """With momentum 0 in place of None they were not recomputed: accuracy near zero (Lightning-AI/pytorch-lightning#14866)."""
    other = clone(net)
    fit(net, cross_entropy, sgd, batches, epochs=3, plugins=["swa:start=1ep"], seed=1)
    torch.manual_seed(1)
    optimizer = sgd(other.parameters())
    for epoch in range(3):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(other(input), target).backward()
            optimizer.step()
        if epoch == 1:
            average = clone(other)
    with torch.no_grad():
        for mine, value in zip(average.parameters(), other.parameters(), strict=True):
            mine.lerp_(value, 1 / 2)
        average[1].reset_running_stats()
        average[1].momentum = None
        for input, _ in batches:
            average(input)
    average[1].momentum = 0.1
    same(net, average)
    assert not torch.equal(net[1].running_var, torch.ones(16))


@pytest.mark.parametrize("epoch", [1, 2, 3, 4, 5])
def test_D2_state_of_another_schedule(plain, batches, tmp_path, epoch):
    """What the averaging's schedule had saved was loaded into the user's (Lightning-AI/pytorch-lightning#9938, #11665)."""
    whole, watch = Watch(), Watch()
    plugins = [TorchScheduler(lr_scheduler.ExponentialLR, {"gamma": 0.9}), "swa:start=2ep,swa_lr=0.05,anneal_epochs=3"]
    fit(copy.deepcopy(plain), cross_entropy, plain_sgd, batches[:2], epochs=6, plugins=[*copy.deepcopy(plugins), whole])
    gone_on(lambda run: run.epoch == epoch, plain, plain_sgd, batches[:2], tmp_path, plugins, [watch], epochs=6)
    parts = [(1 - math.cos(math.pi * min(1, max(0, epoch - 2) / 3))) / 2 for epoch in range(6)]
    rates = [0.1 * 0.9 ** min(epoch, 2) * (1 - part) + 0.05 * part for epoch, part in enumerate(parts)]
    assert whole.rates == pytest.approx([rate for rate in rates for _ in range(2)], rel=1e-12)      # not rounded alike
    assert watch.rates == whole.rates[2 * epoch:]


@pytest.mark.parametrize("average", ["ema:decay=0.9", "swa:start=1"])
@pytest.mark.parametrize("ended", [False, True])
def test_D3_training_goes_on_from_the_average(net, batches, valid, clone, same, sgd, tmp_path, ended, average):
    """The average had been saved as if it were the weights (atomistic-machine-learning/schnetpack#785)."""
    whole, other = clone(net), clone(net)
    fit(whole, cross_entropy, sgd, batches, valid, epochs=5, plugins=[average], seed=1)
    settings = {"plugins": [average, "checkpoint"], "out": tmp_path}
    if ended:                   # it ends with the average in the model
        fit(other, cross_entropy, sgd, batches, valid, epochs=3, seed=1, **settings)
    else:
        killed(lambda run: run.epoch == 3, other, sgd, batches, tmp_path, [average], valid=valid, epochs=5)
    fit(net, cross_entropy, sgd, batches, valid, epochs=5, resume=tmp_path, **settings)
    same(net, whole)


def test_D4_average_per_micro_batch(plain, batches, clone, same, sgd):
    """Weights that had not changed were averaged once for each micro-batch (SWivid/F5-TTS#631)."""
    other, average = clone(plain), {}
    fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["ema:decay=0.9,warmup=false", "accumulate:every=3"])
    optimizer = sgd(other.parameters())
    for group in 2 * groups(batches, 3):
        optimizer.zero_grad()
        add_gradients(other, group)
        optimizer.step()
        for name, value in other.state_dict().items():
            average[name] = average[name].lerp(value, 1 - 0.9) if name in average else value.clone()
    other.load_state_dict(average)
    same(plain, other)


def test_D5_buffers_of_the_average(net, batches, clone, same, sgd):
    """They stayed what they were when averaging began (pytorch/pytorch#84053)."""
    class Centred(nn.Module):
        """Keeps a mean of its inputs, in a new tensor each time."""

        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, input):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * input.mean(0)
            return input - self.mean

    model = nn.Sequential(Centred(), net)
    other, average = clone(model), {}
    fit(model, cross_entropy, sgd, batches, plugins=["ema:decay=0.9,warmup=false"], seed=1)
    torch.manual_seed(1)
    optimizer = sgd(other.parameters())
    for input, target in batches:
        optimizer.zero_grad()
        cross_entropy(other(input), target).backward()
        optimizer.step()
        for name, value in other.state_dict().items():
            averaged = name in average and name not in ("0.mean", "1.1.num_batches_tracked")     # no means of weights: copied
            average[name] = average[name].lerp(value, 1 - 0.9) if averaged else value.clone()
    other.load_state_dict(average)
    same(model, other)


# State and order


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_E1_patience_reset(plain, batches, valid, sgd, tmp_path, epoch):
    """A run that was begun again had all its patience back (huggingface/transformers#28544, Lightning-AI/pytorch-lightning#1463)."""
    plugins = ["early_stopping:patience=3", Scores(1.0, 2.0)]
    run = gone_on(lambda run: run.epoch == epoch, plain, sgd, batches[:2], tmp_path, plugins, valid=valid, epochs=20)
    assert (run.epoch, run.stop) == (4, "val_loss has not improved on 1 for 3 evaluations")


def test_E2_resumed_past_its_stop(plain, batches, valid, clone, same, sgd, tmp_path):
    """A run that had been stopped early trained on when it was begun again (huggingface/transformers#10290)."""
    plugins, watch = ["early_stopping:patience=2", Scores(1.0, 2.0), "checkpoint"], Watch()
    first = fit(plain, cross_entropy, sgd, batches, valid, epochs=20, plugins=plugins, out=tmp_path)
    other, plugins = clone(plain), ["early_stopping:patience=2", Scores(0.5), "checkpoint", watch]
    run = fit(other, cross_entropy, sgd, batches, valid, epochs=40, plugins=plugins, out=tmp_path, resume=tmp_path)
    assert watch.losses == []
    assert (run.epoch, run.step, run.stop, run.history) == (3, 24, first.stop, first.history)
    same(other, plain)


def test_E3_saved_before_it_was_updated(plain, batches, valid, sgd, tmp_path):
    """The state saved with an epoch was the one before (Lightning-AI/pytorch-lightning#1464, huggingface/transformers#32115)."""
    class Count:
        """Counts the moments that may change a plugin's state: steps, evaluations, epochs."""

        def __init__(self):
            self.counts = [0, 0, 0]

        @hookimpl
        def after_step(self):
            self.counts[0] += 1

        @hookimpl
        def after_evaluate(self):
            self.counts[1] += 1

        @hookimpl
        def epoch_end(self):
            self.counts[2] += 1

        def state_dict(self):
            return {"counts": self.counts}

        def load_state_dict(self, state):
            self.counts = state["counts"]

    plugins = ["checkpoint:every_steps=3,keep=9", "early_stopping", Count(), Scores(1.0, 2.0)]      # saves before they act
    fit(plain, cross_entropy, sgd, batches, valid, epochs=2, plugins=plugins, out=tmp_path)
    found = {}
    for file in (tmp_path / "checkpoints").glob("step-*.pt"):
        saved = torch.load(file, weights_only=True)["plugins"]
        found[int(file.stem[5:])] = (*saved["count"]["counts"], saved["early_stopping"]["waited"])
    first = {3: (3, 0, 0, 0), 6: (6, 0, 0, 0), 8: (8, 1, 1, 0)}
    assert found == first | {9: (9, 1, 1, 0), 12: (12, 1, 1, 0), 15: (15, 1, 1, 0), 16: (16, 2, 2, 1)}


@pytest.mark.parametrize("order", [1, -1])
def test_E4_two_instances_of_one_class(plain, batches, valid, sgd, tmp_path, order):
    """Their states went into one list, and the wrong ones were loaded (huggingface/transformers#33875)."""
    class Better:
        """A loss that does not improve, and an accuracy that does."""

        @hookimpl
        def setup(self, run: Run):
            run.metrics["val_accuracy"] = math.nan

        @hookimpl
        def evaluate(self, run: Run):
            return {"val_loss": 2.0 + run.epoch, "val_accuracy": run.epoch / 10}

    plugins = ["early_stopping:monitor=val_loss,patience=4", "early_stopping:monitor=val_accuracy,patience=4"][::order]
    run = gone_on(lambda run: run.epoch == 3, plain, sgd, batches[:2], tmp_path, [*plugins, Better()], valid=valid, epochs=20)
    assert (run.epoch, run.stop) == (5, "val_loss has not improved on 3 for 4 evaluations")
    stopping = [run.hook.plugins[name] for name in ("early_stopping", "early_stopping.2")][::order]
    assert [(one.watch.best, one.waited) for one in stopping] == [(3.0, 4), (0.5, 0)]


@pytest.mark.parametrize("at", [3, 12])
def test_E5_other_parameter_groups(net, batches, clone, same, tmp_path, at):
    """Groups were added while training, and were not there when their state came (Lightning-AI/pytorch-lightning#6891)."""
    whole, plugins = clone(net), ["freeze:patterns=0,until=1ep", "layerwise_lr:decay=0.5,no_decay=true"]
    fit(whole, cross_entropy, adam, batches, epochs=2, plugins=plugins, seed=1)
    gone_on(lambda run: run.attempts == at, net, adam, batches, tmp_path, plugins, epochs=2)       # frozen there, and not
    same(net, whole)
    with pytest.raises(UsageError, match="the numbers of parameters in the optimizer's groups are .* in the checkpoint and .* in this run"):
        fit(net, cross_entropy, adam, batches, epochs=3, plugins=plugins[:1], resume=tmp_path)


@pytest.mark.parametrize("plugins", [[], ["amp:dtype=float16", "accumulate:every=2", "clip"], ["nan_guard:action=skip", "sam", "ema"]], ids="+".join)
def test_E7_the_rate_finder_leaves_nothing_behind(net, clone, same, tmp_path, plugins):
    """Other weights and rates were left behind (Lightning-AI/pytorch-lightning#12670, #21068)."""
    def train(model, *finder):
        watch, data = Watch(), Samples()
        loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(2))
        run = fit(model, cross_entropy, adam, loader, epochs=2, plugins=[*finder, *plugins, "cosine:by=step", watch], seed=1, out=tmp_path)
        optimizer = copy.deepcopy(run.optimizer.state_dict())
        return watch.losses, watch.rates, optimizer, run.history, data.read[-80:], torch.get_rng_state(), loader.generator.get_state()

    other = clone(net)
    torch.testing.assert_close(train(net, "lr_finder:num_steps=40"), train(other), rtol=0, atol=0)
    same(net, other)


def test_E7_drawing_the_rates_changes_nothing(net, batches, clone, same, sgd):
    """Looking for a rate left other weights and rates behind (Lightning-AI/pytorch-lightning#12670, #21068)."""
    other, drawn = clone(net), []

    class Draws:
        def here(self, run):
            rates = [(group["lr"], group["initial_lr"]) for group in run.optimizer.param_groups]
            state = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict()["state"], rates])
            return [*state, torch.get_rng_state(), run.epoch, run.step, run.attempts, run.seen, run.seen_in_epoch]

        @hookimpl
        def before_step(self, run: Run):
            before = self.here(run)
            drawn.append([rates[0] for _, rates in lr_curve(run)])
            torch.testing.assert_close(self.here(run), before, rtol=0, atol=0)

    plugins, watch = ["warmup:length=5", "cosine:by=step", TorchScheduler(lr_scheduler.ExponentialLR, {"gamma": 0.9})], Watch()
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[*plugins, Draws(), watch], seed=1)
    fit(other, cross_entropy, sgd, batches, epochs=2, plugins=copy.deepcopy(plugins), seed=1)
    same(net, other)
    assert drawn == [watch.rates] * 16


def test_E8_closure_of_lbfgs(plain, batches, clone, same):
    """It did not clear the gradients, or went backward once too often (Lightning-AI/pytorch-lightning#4188, #6147)."""
    lbfgs, other, looks = partial(torch.optim.LBFGS, lr=0.5, max_iter=5), clone(plain), {"here": 0, "by hand": 0}
    plain[0].weight.register_post_accumulate_grad_hook(lambda _: looks.update({"here": looks["here"] + 1}))
    fit(plain, cross_entropy, lbfgs, batches, plugins=["accumulate:every=2"])
    optimizer = lbfgs(other.parameters())
    for group in groups(batches, 2):
        def closure(group=group):
            looks["by hand"] += len(group)
            optimizer.zero_grad()
            losses = []
            add_gradients(other, group, scale=lambda loss: losses.append(loss.detach()) or loss)
            return torch.stack(losses).sum()
        optimizer.step(closure)
    same(plain, other)
    assert looks["here"] == looks["by hand"] > 4 * len(batches)


# Resume and speed


class Samples(Dataset):
    """Forty samples, disturbed at random each time, and a list of what was read."""

    def __init__(self):
        self.inputs, self.targets = (torch.cat(parts) for parts in zip(*equal_batches(5), strict=True))
        self.read = []

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.read.append(index)
        return self.inputs[index] + 0.1 * torch.randn(6), self.targets[index]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")      # on a machine of one core
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [1, 7, 10])
def test_F1_random_state_restored_too_late(net, clone, same, sgd, tmp_path, workers, at):
    """It came after the first batch had been read, or not at all (huggingface/transformers#46628, #17032)."""
    whole, loader = clone(net), DataLoader(Samples(), 8, shuffle=True, num_workers=workers)
    fit(whole, cross_entropy, sgd, loader, epochs=3, seed=1)
    gone_on(lambda run: run.attempts == at, net, sgd, loader, tmp_path, epochs=3)       # after 1 step, 2 of epoch 2, the end of it
    same(net, whole)


@pytest.mark.parametrize("at", [3, 7, 10])
def test_F2_the_samplers_epoch(plain, sgd, tmp_path, at):
    """Passing over batches set the sampler back to epoch 0, and another shuffle went on (huggingface/accelerate#4071)."""
    data = Samples()
    loader = DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=3))
    gone_on(lambda run: run.attempts == at, plain, sgd, loader, tmp_path, epochs=3)
    shuffles = [torch.randperm(40, generator=torch.Generator().manual_seed(3 + epoch)).tolist() for epoch in range(3)]
    assert data.read == [*chain(*shuffles)]


@pytest.mark.parametrize("at", [3, 7, 10])
def test_F3_begun_at_the_epochs_start_again(plain, clone, sgd, tmp_path, at):
    """A run killed within an epoch read all of it again (Lightning-AI/pytorch-lightning#1182)."""
    data = Samples()
    loader = DataLoader(data, 8, shuffle=True)
    fit(clone(plain), cross_entropy, sgd, loader, epochs=3, seed=1)
    order, data.read = data.read, []
    run = gone_on(lambda run: run.attempts == at, plain, sgd, loader, tmp_path, epochs=3)
    assert data.read == order                           # by the one that was killed and the one that went on together
    assert [sorted(epoch) for epoch in groups(data.read, 40)] == [list(range(40))] * 3
    assert (run.step, run.seen, run.epoch, len(run.history)) == (15, 15, 3, 3)


def test_F4_an_adapted_batch_size(plain, clone, same, sgd, tmp_path):
    """Steps done of one size were counted as if of another (huggingface/transformers#25956, huggingface/sentence-transformers#3145)."""
    def forward(_, arguments):
        sizes.append(len(arguments[0]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError

    sizes, whole, small = [], clone(plain), clone(plain)
    small.register_forward_pre_hook(forward)
    fit(whole, cross_entropy, sgd, DataLoader(Samples(), 8), epochs=2, plugins=["split:into=2"], seed=1)
    run = gone_on(lambda run: run.attempts == 3, small, sgd, DataLoader(Samples(), 8), tmp_path / "1", ["split:into=auto"], epochs=2)
    same(small, whole)
    assert (run.step, run.seen, sizes) == (10, 10, [8, *[4] * 20])

    killed(lambda run: run.attempts == 3, plain, sgd, DataLoader(Samples(), 4), tmp_path / "2", ["accumulate:every=2"], epochs=3)
    for size, every, steps, batches in ((8, 2, 3, 5), (8, 1, 5, 5), (4, 4, 3, 10)):
        plugins, data = [f"accumulate:every={every}", "checkpoint"], Samples()
        with pytest.raises(UsageError, match=f"an epoch has 5 steps of 10 batches in the checkpoint and {steps} steps of {batches} batches in this run"):
            fit(plain, cross_entropy, sgd, DataLoader(data, size), epochs=3, plugins=plugins, out=tmp_path / "2", resume=tmp_path / "2")
        assert data.read == []


def test_F5_the_host_reads_nothing_in_a_step(net, monkeypatch):
    """A look at each loss for NaN had the host wait for the device, at 7 % of the time (huggingface/transformers#33693)."""
    monkeypatch.setattr(nan_guard, "AHEAD", ("cpu",))                   # treat it as a device that works ahead
    monkeypatch.setattr(NanGuard, "send", lambda self, run: None)       # the verdict is on its way all the time
    batches, reads, weights = equal_batches(8), [], []

    class Reads(TorchDispatchMode):
        inside = False

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if self.inside and func is torch.ops.aten._local_scalar_dense.default:
                reads.append(len(weights))
            return func(*args, **kwargs or {})

    class Begin:
        @hookimpl
        def before_step(self):
            mode.inside = True

    class End:
        @hookimpl
        def after_step(self, run: Run):
            mode.inside = False
            weights.append(run.model[4].weight.detach().clone())

    batches[5][0][1, 2] = math.nan
    plugins = ["accumulate:every=2", "split:into=2", "amp:dtype=bfloat16", NanGuard("skip"), "clip", "sam", "ema", "freeze:patterns=0",
               "layerwise_lr:decay=0.5", "warmup", "onecycle:max_lr=0.1", TorchScheduler(lr_scheduler.ExponentialLR, {"gamma": 0.9})]
    with Reads() as mode:
        fit(net, cross_entropy, partial(torch.optim.SGD, lr=0.1, momentum=0.9), batches, epochs=3, plugins=[Begin(), *plugins, End()])
    assert set(reads) <= {0}                            # the first step waits, for it makes the optimizer's state
    assert [step for step in range(1, 12) if torch.equal(weights[step], weights[step - 1])] == [2, 6, 10]     # with the NaN in it
