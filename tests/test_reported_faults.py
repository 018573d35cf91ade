"""Faults that other training loops have shipped. Each docstring describes one and says where it was reported.

Most tests compare a run bit for bit with a loop written by hand in plain PyTorch. Where a run is killed, a plugin raises
an exception, and another call of `fit` resumes from the checkpoint.

Faults that need several processes are tested in tests/distributed/test_processes.py.
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
from loopctl.checkpoint import step_guard
from loopctl.optim.learning_rate import lr_curve
from loopctl.plugins.amp import Amp
from loopctl.plugins.nan_guard import NanGuard
from loopctl.plugins.torch_scheduler import TorchScheduler

cross_entropy = nn.CrossEntropyLoss()
plain_sgd = partial(torch.optim.SGD, lr=0.1)
adam = partial(torch.optim.Adam, lr=1e-2)


class Recorder:
    """Records the loss and the learning rate of every step."""

    def __init__(self):
        self.losses, self.rates = [], []

    @hookimpl
    def after_step(self, run: Run):
        self.losses.append(run.loss.item())
        self.rates.append(float(run.optimizer.param_groups[0]["lr"]))


class FixedLosses:
    """Replaces evaluation: returns the given validation losses, one per epoch; the last one is repeated."""

    def __init__(self, *values):
        self.values = values

    @hookimpl
    def evaluate(self, run: Run):
        return {"val_loss": self.values[min(run.epoch, len(self.values)) - 1]}


class KillWhen:
    """Raises KeyboardInterrupt at the first safe point where `when(run)` is true, in place of a killed process."""

    def __init__(self, when):
        self.when = when

    @hookimpl
    def safe_point(self, run: Run):
        if self.when(run):
            raise KeyboardInterrupt


def killed(when, model, factory, train, out, plugins=(), **settings):
    """Train a copy of `model` until `when(run)` is true; a checkpoint is saved just before the run is killed."""
    plugins = [*copy.deepcopy(plugins), "checkpoint:every_steps=1", KillWhen(when)]
    with pytest.raises(KeyboardInterrupt):
        fit(copy.deepcopy(model), cross_entropy, factory, train, plugins=plugins, out=out, seed=1, **settings)
    torch.rand(7)               # a new process has other random numbers


def killed_and_resumed(when, model, factory, train, out, plugins=(), resumed_plugins=(), **settings):
    """Kill a run when `when(run)` is true and resume it with `model`, with `resumed_plugins` too. Returns the resumed run."""
    killed(when, model, factory, train, out, plugins, **settings)
    plugins = [*copy.deepcopy(plugins), "checkpoint:every_steps=1", *resumed_plugins]
    return fit(model, cross_entropy, factory, train, plugins=plugins, out=out, resume=out, **settings)


def add_gradients(model, group, loss_fn=cross_entropy, scale=lambda loss: loss):
    """Compute by hand the gradient of the mean loss over all samples of a group of batches."""
    total = sum(len(target) for _, target in group)
    for input, target in group:
        scale(loss_fn(model(input), target) * (len(target) / total)).backward()


def groups(batches, every):
    return [batches[start:start + every] for start in range(0, len(batches), every)]


def equal_batches(count, size=8):
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)) for _ in range(count)]


# Accumulation


def test_losses_are_divided_by_the_tokens_of_the_step_not_averaged_over_micro_batches(plain, clone, same, sgd):
    """The means of micro-batches were averaged with equal weights, whatever their numbers of tokens (huggingface/transformers#34191, #24725)."""
    class Tokens:
        @hookimpl
        def batch_weight(self, batch):
            return (batch[1] >= 0).sum().item()

    generator, data = torch.Generator().manual_seed(0), []
    for lengths in ([5, 5, 4], [1, 1, 2], [1, 3, 1], [5, 5, 5]):
        target = torch.randint(0, 3, (3, 5), generator=generator)
        target[torch.arange(5) >= torch.tensor(lengths)[:, None]] = -100         # padding, which cross-entropy ignores
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
    same(model, other, 1e-12)           # by hand one sum over all tokens, so summed in another order
    assert run.history[0]["train_loss"] == pytest.approx(sum(losses).item() / 38, rel=1e-12)


@pytest.mark.parametrize(("plugins", "parts"), [
    (["accumulate:every=4"], 1), (["split:into=4"], 4), (["accumulate:every=2", "split:into=2"], 2),
    (["split:into=2", "accumulate:every=2", "amp:dtype=bfloat16"], 2),
])
def test_losses_are_divided_by_the_samples_of_the_step_exactly_once(plain, clone, same, sgd, plugins, parts):
    """The loss was divided by the number of micro-batches twice, or not at all (huggingface/transformers#35203, #34373)."""
    batches, other, recorder = equal_batches(8), clone(plain), Recorder()
    joined = [tuple(torch.cat(pieces) for pieces in zip(*group, strict=True)) for group in groups(batches, parts)]
    fit(plain, cross_entropy, sgd, joined, plugins=[*plugins, recorder])
    optimizer = sgd(other.parameters())
    for group, reported in zip(groups(batches, 4), recorder.losses, strict=True):
        optimizer.zero_grad()
        losses = []
        for input, target in group:
            with torch.autocast("cpu", torch.bfloat16, enabled=len(plugins) == 3):
                losses.append(cross_entropy(other(input), target))
            (losses[-1] / 4).backward()
        optimizer.step()
        assert reported == pytest.approx(sum(losses).item() / 4, rel=1e-6)       # summed in another order
    same(plain, other)


def test_the_smaller_last_group_is_divided_by_its_own_samples(plain, clone, same, sgd):
    """The smaller last group of an epoch was divided by the full number of micro-batches (Lightning-AI/pytorch-lightning#19987, huggingface/transformers#38872)."""
    batches, other = equal_batches(5), clone(plain)
    fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["accumulate:every=4"])
    optimizer = sgd(other.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        for input, target in batches[:4]:
            (cross_entropy(other(input), target) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        cross_entropy(other(batches[4][0]), batches[4][1]).backward()       # a group of one batch
        optimizer.step()
    same(plain, other)


def test_the_smaller_last_group_makes_an_update_and_counts_in_schedules(plain, batches, clone, same):
    """The last group of an epoch made no update, and schedules were planned without it (NVIDIA-NeMo/Automodel#2257, tracel-ai/burn#5695)."""
    other, recorder = clone(plain), Recorder()
    run = fit(plain, cross_entropy, plain_sgd, batches[3:], epochs=3, plugins=["accumulate:every=2", "cosine:by=step", recorder])
    optimizer, rates = plain_sgd(other.parameters()), [0.1 * (1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    for step, group in enumerate(3 * groups(batches[3:], 2)):               # groups of two batches, two, and one
        optimizer.zero_grad()
        add_gradients(other, group)
        optimizer.param_groups[0]["lr"] = rates[step]
        optimizer.step()
    same(plain, other)
    assert recorder.rates == rates
    assert (run.step, run.seen, run.planned_steps) == (9, 15, 9)


@pytest.mark.parametrize(("every", "at"), [(3, 1), (3, 2), (3, 3), (3, 5), (4, 1)])
def test_a_resume_within_an_epoch_keeps_the_groups_and_losses(plain, batches, clone, same, sgd, tmp_path, every, at):
    """After a resume the size of the last group was computed from the resumed step, so the loss became 0 or NaN (open-mmlab/mmcv#2083)."""
    other, recorder, losses = clone(plain), Recorder(), []
    killed_and_resumed(lambda run: run.attempts == at, plain, sgd, batches, tmp_path, [f"accumulate:every={every}"], [recorder], epochs=2)
    optimizer = sgd(other.parameters())
    for group in 2 * groups(batches, every):
        optimizer.zero_grad()
        add_gradients(other, group, scale=lambda loss: losses.append(loss.item()) or loss)
        optimizer.step()
    same(plain, other)
    losses = [sum(parts) for parts in groups(losses[:8], every) + groups(losses[8:], every)]
    assert recorder.losses == pytest.approx(losses[at:], rel=1e-6)             # the run sums in float32, this sum is in float64


def test_gradients_are_not_cleared_between_the_micro_batches_of_a_step(plain, clone):
    """zero_grad at the start of each micro-batch cleared the gradients accumulated so far (huggingface/accelerate#1299)."""
    batches, other, accumulated = equal_batches(8), clone(plain), []

    class Observer:
        @hookimpl
        def grads_ready(self, run: Run):
            accumulated.append([parameter.grad.clone() for parameter in run.model.parameters()])

    fit(plain, cross_entropy, partial(torch.optim.SGD, lr=0.0), batches, plugins=["accumulate:every=4", Observer()])
    for group, gradients in zip(groups(batches, 4), accumulated, strict=True):
        each = [torch.autograd.grad(cross_entropy(other(input), target) / 4, list(other.parameters())) for input, target in group]
        torch.testing.assert_close(gradients, [sum(parts) for parts in zip(*each, strict=True)], rtol=0, atol=0)


def test_the_gradient_of_the_whole_step_is_clipped(plain, batches, clone, same, sgd):
    """The gradient was clipped after each micro-batch instead of once per step (facebookresearch/lingua#59)."""
    other, norms = clone(plain), []
    run = fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["accumulate:every=3", "clip:max_norm=0.1"])
    optimizer = sgd(other.parameters())
    for group in 2 * groups(batches, 3):
        optimizer.zero_grad()
        add_gradients(other, group)
        norms.append(nn.utils.clip_grad_norm_(other.parameters(), 0.1))
        optimizer.step()
    same(plain, other)
    assert min(norms) > 0.1                                                 # clipping changed the gradient in every step
    assert run.metrics["grad_norm"] == norms[-1].item()


def test_no_sync_covers_forward_and_backward_of_all_micro_batches_but_the_last(plain, batches):
    """no_sync was off by one, left out forward, or was missing (modelscope/FunASR#3472, karpathy/build-nanogpt#30, huggingface/transformers#7742)."""
    log = []

    class Sync:
        """Wraps what `ddp` wraps with no_sync."""

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
def test_gradients_are_unscaled_before_they_are_clipped(plain, batches, clone, same, sgd, order):
    """Gradients were clipped before they were unscaled, and became almost 0 (Lightning-AI/pytorch-lightning#9606, #9599)."""
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


def test_gradients_are_clipped_before_the_update(plain, batches, clone, same, sgd):
    """Gradients were clipped after the update, which had used them unclipped (Lightning-AI/pytorch-lightning#10248)."""
    other = clone(plain)
    fit(plain, cross_entropy, sgd, batches, plugins=["clip:value=0.01"])
    optimizer = sgd(other.parameters())
    for input, target in batches:
        optimizer.zero_grad()
        cross_entropy(other(input), target).backward()
        nn.utils.clip_grad_value_(other.parameters(), 0.01)
        optimizer.step()
    same(plain, other)


def test_skipped_steps_do_not_count_as_updates(plain, batches, clone, same):
    """Counters of updates were incremented in steps that made no update (Lightning-AI/pytorch-lightning#5558, #16228, huggingface/transformers#11106)."""
    # Schedules are not among these counters: they follow the data, also over skipped steps; see docs/architecture.md.
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


def train_in_mixed_precision(model, optimizer, scaler, batches, max_norm=None, dtype=torch.float16):
    """Train with the loop of torch's mixed-precision recipe. Returns the scale after each step."""
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


def test_a_resume_restores_the_loss_scale(plain, batches, clone, same, sgd, tmp_path):
    """After a resume the scale was 65536 again, and gradients overflowed again (huggingface/transformers#34053)."""
    other, skipped = clone(plain), []

    class Observer:
        @hookimpl
        def after_step(self, run: Run):
            skipped.append(run.skipped)

    killed_and_resumed(lambda run: run.attempts == 28, plain, sgd, batches, tmp_path, [Amp("float16", 2.0**40)], [Observer()], epochs=4)
    scales = train_in_mixed_precision(other, sgd(other.parameters()), torch.amp.GradScaler("cpu", 2.0**40), 4 * batches)
    same(plain, other)
    assert scales[27] == scales[31] < 2.0**30
    assert skipped == [False] * 4


def test_state_is_restored_after_everything_that_changes_it(net, batches, clone, same, tmp_path):
    """The state was restored too early, and code that ran afterwards changed it (huggingface/accelerate#4289)."""
    class DrawsWhenLoaded(torch.optim.SGD):
        """Draws random numbers when its state is loaded."""

        def load_state_dict(self, state):
            super().load_state_dict(state)
            torch.rand(3)

    class DrawsAtStart:
        """Draws random numbers when a run starts, before its state is restored."""

        @hookimpl
        def train_start(self, run: Run):
            torch.rand(3)

    sgd, scales = partial(DrawsWhenLoaded, lr=0.1, momentum=0.9), []

    class Observer:
        @hookimpl
        def after_step(self, run: Run):
            scaler = run.hook.plugins["amp"].scalers[""]
            scales.append((scaler.get_scale(), scaler.state_dict()["_growth_tracker"]))

    uninterrupted, plugins = clone(net), ["amp:dtype=float16,init_scale=1024,growth_interval=5", DrawsAtStart()]
    fit(uninterrupted, cross_entropy, sgd, batches, epochs=2, plugins=[*plugins, Observer()], seed=1)
    expected, scales[:] = scales.copy(), []
    killed_and_resumed(lambda run: run.attempts == 7, net, sgd, batches, tmp_path, plugins, [Observer()], epochs=2)
    assert expected[6:8] == [(2048.0, 2), (2048.0, 3)]
    assert scales == expected[7:]
    same(net, uninterrupted)


def test_a_step_repeated_after_out_of_memory_unscales_once(plain, clone, same, sgd):
    """After running out of memory the step was repeated with gradients that were unscaled already (huggingface/transformers#24050)."""
    batches, other, sizes = equal_batches(8), clone(plain), []

    def loss_fn(output, target):
        sizes.append(len(target))
        if len(sizes) == 4:                 # in the second micro-batch of the second step, after the first one's backward
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
def test_a_fused_optimizer_works_with_clipping_and_amp(plain, batches, clone, same, dtype):
    """A fused optimizer with clipping was refused, or unscaled the gradients a second time (Lightning-AI/pytorch-lightning#21435, #15555)."""
    other, fused = clone(plain), partial(torch.optim.AdamW, lr=1e-2, fused=True)
    plugins = ["clip:max_norm=0.1", Amp(str(dtype).removeprefix("torch."), 2.0**30)]
    fit(plain, cross_entropy, fused, batches, epochs=4, plugins=plugins)
    scaler = torch.amp.GradScaler("cpu", 2.0**30, enabled=dtype == torch.float16)
    scales = train_in_mixed_precision(other, fused(other.parameters()), scaler, 4 * batches, 0.1, dtype)
    same(plain, other)
    assert dtype == torch.bfloat16 or scales[0] > scales[-2] == scales[-1]          # the first steps were skipped, the last ones were not


def test_evaluation_with_averaged_weights_uses_no_cached_casts(plain, batches, valid, clone, same, sgd):
    """A single autocast context around everything kept cached casts of weights that were swapped later (X-GenGroup/Flow-Factory#186)."""
    other, average, losses = clone(plain), clone(plain), []
    run = fit(plain, cross_entropy, sgd, batches, valid, epochs=2, plugins=["amp:dtype=bfloat16", "ema:decay=0.5,warmup=false"])
    optimizer = sgd(other.parameters())
    for step, (input, target) in enumerate(2 * batches):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(other(input), target)
        loss.backward()
        optimizer.step()
        for averaged, value in zip(average.parameters(), other.parameters(), strict=True):
            averaged.data = value.data.clone() if step == 0 else averaged.data.lerp(value.data, 0.5)
        if step in (7, 15):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                losses.append([cross_entropy(average(input), target).double() * len(target) for input, target in valid])
    same(plain, average)
    assert [row["val_loss"] for row in run.history] == [(sum(parts) / 13).item() for parts in losses]


# Schedules


def test_schedules_advance_once_per_step_not_per_micro_batch(plain, batches):
    """The schedule moved on at every micro-batch instead of every step (Lightning-AI/pytorch-lightning#1476, huggingface/accelerate#963, open-mmlab/mmengine#1308)."""
    recorder = Recorder()
    fit(plain, cross_entropy, plain_sgd, batches, epochs=2, plugins=["accumulate:every=4", "exponential:gamma=0.5,by=step", recorder])
    assert recorder.rates == [0.1, 0.05, 0.025, 0.0125]


def sequence(optimizer):
    rise = lr_scheduler.LinearLR(optimizer, 0.25, total_iters=4)
    return lr_scheduler.SequentialLR(optimizer, [rise, lr_scheduler.CosineAnnealingLR(optimizer, 12)], [4])


@pytest.mark.parametrize("with_torch_scheduler", [False, True])
@pytest.mark.parametrize("at", [1, 4, 5, 8, 11])
def test_a_sequence_of_schedules_starts_and_resumes_with_the_right_rate(plain, batches, tmp_path, with_torch_scheduler, at):
    """The first learning rate, and the first after a resume, were those of another schedule in the sequence (pytorch/pytorch#185872, #162591)."""
    plugins = [TorchScheduler(sequence, by="step")] if with_torch_scheduler else ["warmup:length=4,start_factor=0.25", "cosine:by=step"]
    uninterrupted, recorder = Recorder(), Recorder()
    fit(copy.deepcopy(plain), cross_entropy, plain_sgd, batches, epochs=2, plugins=[*copy.deepcopy(plugins), uninterrupted])
    killed_and_resumed(lambda run: run.attempts == at, plain, plain_sgd, batches, tmp_path, plugins, [recorder], epochs=2)
    rises = [0.1 * (0.25 + 0.75 * min(1, step / 4)) for step in range(16)]
    falls = [(1 + math.cos(math.pi * (max(0, step - 4) / 12 if with_torch_scheduler else step / 16))) / 2 for step in range(16)]
    expected = [rise * fall for rise, fall in zip(rises, falls, strict=True)]
    assert uninterrupted.rates == pytest.approx(expected, rel=1e-12)        # computed in another order, so rounded differently
    assert recorder.rates == uninterrupted.rates[at:]


@pytest.mark.parametrize("length", [1, 2, 5, 15])
def test_warmup_then_cosine_does_not_exceed_the_peak_rate(plain, batches, length):
    """Between warmup and cosine the learning rate rose above its peak (deepseek-ai/DeepSpec#32)."""
    both, alone = Recorder(), Recorder()
    fit(plain, cross_entropy, plain_sgd, batches, epochs=2, plugins=[f"warmup:length={length}", "cosine:by=step", both])
    fit(plain, cross_entropy, plain_sgd, batches, epochs=2, plugins=["cosine:by=step", alone])
    assert both.rates[length:] == alone.rates[length:]
    assert all(rate < highest <= 0.1 for rate, highest in zip(both.rates[:length], alone.rates, strict=False))


def test_two_schedules_multiply_and_do_not_overwrite_each_other(plain, batches, valid):
    """A schedule that set the learning rate overwrote what another had set (Lightning-AI/pytorch-lightning#4902, keras-team/keras#8829)."""
    recorder, plateau = Recorder(), "plateau:patience=0,factor=0.5"
    for plugins in (["warmup:length=24,start_factor=0.25", plateau], [plateau, "warmup:length=24,start_factor=0.25"]):
        recorder.rates.clear()
        fit(plain, cross_entropy, plain_sgd, batches, valid, epochs=5, plugins=[*plugins, FixedLosses(1.0, 2.0), recorder])
        rises = [0.1 * (0.25 + 0.75 * min(1, step / 24)) for step in range(40)]
        expected = [rise * 0.5 ** max(0, step // 8 - 1) for step, rise in enumerate(rises)]
        assert recorder.rates == pytest.approx(expected, rel=1e-12)        # computed in another order, so rounded differently


def test_a_resume_restores_the_counts_of_plateau(plain, batches, valid, sgd, tmp_path):
    """After a resume, bad epochs and the cooldown were counted from 0 again (huggingface/pytorch-image-models#2756)."""
    optimizer, rates = plain_sgd(plain.parameters()), []
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=2, cooldown=2)
    for _ in range(12):
        rates.append(optimizer.param_groups[0]["lr"])
        schedule.step(1.0)
    assert rates == [0.1] * 4 + [0.05] * 5 + [0.025] * 3
    plugins = ["plateau:factor=0.5,patience=2,cooldown=2", FixedLosses(1.0)]
    for epoch in (2, 3, 5, 6, 8):
        recorder, out = Recorder(), tmp_path / str(epoch)
        killed_and_resumed(lambda run, epoch=epoch: run.epoch == epoch, plain, sgd, batches[:1], out, plugins, [recorder], valid=valid, epochs=12)
        assert recorder.rates == rates[epoch:]


@pytest.mark.parametrize("at", [2, 6])
def test_creating_a_torch_scheduler_does_not_change_the_rate(plain, batches, tmp_path, at):
    """Creating the scheduler multiplied the learning rate by its first factor, before its state was loaded (open-mmlab/mmengine#1542)."""
    initial_rates, recorder = [], Recorder()

    class Observer:
        @hookimpl
        def train_start(self, run: Run):
            initial_rates.append([(group["lr"], group["initial_lr"]) for group in run.optimizer.param_groups])

    plugins = [TorchScheduler(lr_scheduler.LinearLR, {"start_factor": 0.1, "total_iters": 4}, by="step"), "warmup:length=5"]
    killed_and_resumed(lambda run: run.attempts == at, plain, plain_sgd, batches, tmp_path, plugins, [Observer(), recorder])
    assert initial_rates == [[(0.1, 0.1)]]
    expected = [0.1 * (0.1 + 0.9 * min(1, step / 4)) * (1 + 2 * min(1, step / 5)) / 3 for step in range(8)]
    assert recorder.rates == pytest.approx(expected[at:], rel=1e-12)       # torch's scheduler multiplies factors step by step


def test_a_tensor_learning_rate_is_filled_in_place(plain, batches, valid, clone, same):
    """A new Python number as the learning rate made a compiled step recompile (pytorch/pytorch#163093, #107076)."""
    other, rate, seen = clone(plain), torch.tensor(0.1), []

    class Observer:
        @hookimpl
        def before_step(self, run: Run):
            assert run.optimizer.param_groups[0]["lr"] is rate
            seen.append(rate.item())

    plugins = ["warmup:length=8", "cosine:by=step", "plateau:factor=0.5,patience=0", FixedLosses(1.0), Observer()]
    fit(plain, cross_entropy, torch.optim.SGD(plain.parameters(), lr=rate), batches, valid, epochs=3, plugins=plugins)
    factors = [(1 + 2 * min(1, step / 8)) / 3 * (1 + math.cos(math.pi * step / 24)) / 2 * (0.5 if step >= 16 else 1) for step in range(24)]
    assert seen == pytest.approx([0.1 * factor for factor in factors], rel=1e-6)         # the precision of float32
    optimizer = plain_sgd(other.parameters())
    for (input, target), lr in zip(3 * batches, seen, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        cross_entropy(other(input), target).backward()
        optimizer.step()
    same(plain, other)


# Averaging


def test_batch_norm_statistics_of_averaged_weights_are_recomputed(net, batches, clone, same, sgd):
    """Statistics were recomputed with momentum 0 instead of None, so they did not change, and accuracy was near 0 (Lightning-AI/pytorch-lightning#14866)."""
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
        for averaged, value in zip(average.parameters(), other.parameters(), strict=True):
            averaged.lerp_(value, 1 / 2)
        average[1].reset_running_stats()
        average[1].momentum = None
        for input, _ in batches:
            average(input)
    average[1].momentum = 0.1
    same(net, average)
    assert not torch.equal(net[1].running_var, torch.ones(16))


@pytest.mark.parametrize("epoch", [1, 2, 3, 4, 5])
def test_a_resume_keeps_the_states_of_schedule_and_swa_apart(plain, batches, tmp_path, epoch):
    """The state of the averaging's own schedule was loaded into the user's schedule (Lightning-AI/pytorch-lightning#9938, #11665)."""
    uninterrupted, recorder = Recorder(), Recorder()
    plugins = [TorchScheduler(lr_scheduler.ExponentialLR, {"gamma": 0.9}), "swa:start=2ep,swa_lr=0.05,anneal_epochs=3"]
    fit(copy.deepcopy(plain), cross_entropy, plain_sgd, batches[:2], epochs=6, plugins=[*copy.deepcopy(plugins), uninterrupted])
    killed_and_resumed(lambda run: run.epoch == epoch, plain, plain_sgd, batches[:2], tmp_path, plugins, [recorder], epochs=6)
    parts = [(1 - math.cos(math.pi * min(1, max(0, epoch - 2) / 3))) / 2 for epoch in range(6)]
    rates = [0.1 * 0.9 ** min(epoch, 2) * (1 - part) + 0.05 * part for epoch, part in enumerate(parts)]
    assert uninterrupted.rates == pytest.approx([rate for rate in rates for _ in range(2)], rel=1e-12)      # rounded differently
    assert recorder.rates == uninterrupted.rates[2 * epoch:]


@pytest.mark.parametrize("average", ["ema:decay=0.9", "swa:start=1"])
@pytest.mark.parametrize("ended", [False, True])
def test_a_resume_continues_from_the_trained_weights_not_the_averaged_ones(net, batches, valid, clone, same, sgd, tmp_path, ended, average):
    """The averaged weights were saved in place of the trained ones, and training resumed from them (atomistic-machine-learning/schnetpack#785)."""
    uninterrupted, other = clone(net), clone(net)
    fit(uninterrupted, cross_entropy, sgd, batches, valid, epochs=5, plugins=[average], seed=1)
    settings = {"plugins": [average, "checkpoint"], "out": tmp_path}
    if ended:                   # the first run ends with the averaged weights in the model
        fit(other, cross_entropy, sgd, batches, valid, epochs=3, seed=1, **settings)
    else:
        killed(lambda run: run.epoch == 3, other, sgd, batches, tmp_path, [average], valid=valid, epochs=5)
    fit(net, cross_entropy, sgd, batches, valid, epochs=5, resume=tmp_path, **settings)
    same(net, uninterrupted)


def test_weights_are_averaged_once_per_step_not_per_micro_batch(plain, batches, clone, same, sgd):
    """The average was updated after each micro-batch, although the weights change only once per step (SWivid/F5-TTS#631)."""
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


def test_buffers_of_averaged_weights_follow_the_model(net, batches, clone, same, sgd):
    """The buffers of the average kept the values they had when averaging started (pytorch/pytorch#84053)."""
    class Centred(nn.Module):
        """Subtracts a running mean of its inputs, a buffer that each forward replaces with a new tensor."""

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
            averaged = name in average and name not in ("0.mean", "1.1.num_batches_tracked")     # these buffers are copied, not averaged
            average[name] = average[name].lerp(value, 1 - 0.9) if averaged else value.clone()
    other.load_state_dict(average)
    same(model, other)


# State and order


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_resume_restores_the_patience_of_early_stopping(plain, batches, valid, sgd, tmp_path, epoch):
    """After a resume the patience of early stopping started anew (huggingface/transformers#28544, Lightning-AI/pytorch-lightning#1463)."""
    plugins = ["early_stopping:patience=3", FixedLosses(1.0, 2.0)]
    run = killed_and_resumed(lambda run: run.epoch == epoch, plain, sgd, batches[:2], tmp_path, plugins, valid=valid, epochs=20)
    assert (run.epoch, run.stop) == (4, "val_loss has not improved on 1 for 3 evaluations")


def test_a_resumed_run_that_had_stopped_early_trains_no_further(plain, batches, valid, clone, same, sgd, tmp_path):
    """A run that early stopping had ended trained further when it was resumed (huggingface/transformers#10290)."""
    plugins, recorder = ["early_stopping:patience=2", FixedLosses(1.0, 2.0), "checkpoint"], Recorder()
    first = fit(plain, cross_entropy, sgd, batches, valid, epochs=20, plugins=plugins, out=tmp_path)
    other, plugins = clone(plain), ["early_stopping:patience=2", FixedLosses(0.5), "checkpoint", recorder]
    run = fit(other, cross_entropy, sgd, batches, valid, epochs=40, plugins=plugins, out=tmp_path, resume=tmp_path)
    assert recorder.losses == []
    assert (run.epoch, run.step, run.stop, run.history) == (3, 24, first.stop, first.history)
    same(other, plain)


def test_a_checkpoint_holds_the_state_after_evaluation(plain, batches, valid, sgd, tmp_path):
    """A checkpoint at the end of an epoch held state from before that epoch's evaluation (Lightning-AI/pytorch-lightning#1464, huggingface/transformers#32115)."""
    class Count:
        """Counts steps, evaluations and epochs: the events that may change the state of a plugin."""

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

    plugins = ["checkpoint:every_steps=3,keep=9", "early_stopping", Count(), FixedLosses(1.0, 2.0)]      # `checkpoint` comes first, before the others change their state
    fit(plain, cross_entropy, sgd, batches, valid, epochs=2, plugins=plugins, out=tmp_path)
    states = {}
    for file in (tmp_path / "checkpoints").glob("step-*.pt"):
        saved = torch.load(file, weights_only=True)["plugins"]
        states[int(file.stem[5:])] = (*saved["count"]["counts"], saved["early_stopping"]["waited"])
    first = {3: (3, 0, 0, 0), 6: (6, 0, 0, 0), 8: (8, 1, 1, 0)}
    assert states == first | {9: (9, 1, 1, 0), 12: (12, 1, 1, 0), 15: (15, 1, 1, 0), 16: (16, 2, 2, 1)}


@pytest.mark.parametrize("order", [1, -1])
def test_two_instances_of_one_class_load_their_own_states(plain, batches, valid, sgd, tmp_path, order):
    """The states of two callbacks of one class were stored together, and each loaded the wrong one (huggingface/transformers#33875)."""
    class Better:
        """Returns a validation loss that does not improve and an accuracy that does."""

        @hookimpl
        def setup(self, run: Run):
            run.metrics["val_accuracy"] = math.nan

        @hookimpl
        def evaluate(self, run: Run):
            return {"val_loss": 2.0 + run.epoch, "val_accuracy": run.epoch / 10}

    plugins = ["early_stopping:monitor=val_loss,patience=4", "early_stopping:monitor=val_accuracy,patience=4"][::order]
    run = killed_and_resumed(lambda run: run.epoch == 3, plain, sgd, batches[:2], tmp_path, [*plugins, Better()], valid=valid, epochs=20)
    assert (run.epoch, run.stop) == (5, "val_loss has not improved on 3 for 4 evaluations")
    stopping = [run.hook.plugins[name] for name in ("early_stopping", "early_stopping.2")][::order]
    assert [(plugin.watch.best, plugin.num_bad) for plugin in stopping] == [(3.0, 4), (0.5, 0)]


@pytest.mark.parametrize("at", [3, 12])
def test_a_resume_restores_parameter_groups_and_refuses_others(net, batches, clone, same, tmp_path, at):
    """Parameter groups added during training did not exist yet when their state was loaded (Lightning-AI/pytorch-lightning#6891)."""
    uninterrupted, plugins = clone(net), ["freeze:patterns=0,until=1ep", "layerwise_lr:decay=0.5,no_decay=true"]
    fit(uninterrupted, cross_entropy, adam, batches, epochs=2, plugins=plugins, seed=1)
    killed_and_resumed(lambda run: run.attempts == at, net, adam, batches, tmp_path, plugins, epochs=2)       # killed while parameters are frozen, and after that
    same(net, uninterrupted)
    with pytest.raises(UsageError, match="the numbers of parameters in the optimizer's groups are .* in the checkpoint and .* in this run"):
        fit(net, cross_entropy, adam, batches, epochs=3, plugins=plugins[:1], resume=tmp_path)


@pytest.mark.parametrize("plugins", [[], ["amp:dtype=float16", "accumulate:every=2", "clip"], ["nan_guard:action=skip", "sam", "ema"]], ids="+".join)
def test_the_learning_rate_finder_does_not_change_the_run(net, clone, same, tmp_path, plugins):
    """The learning-rate finder changed the weights and learning rates of the run (Lightning-AI/pytorch-lightning#12670, #21068)."""
    def train(model, *finder):
        recorder, data = Recorder(), Samples()
        loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(2))
        run = fit(model, cross_entropy, adam, loader, epochs=2, plugins=[*finder, *plugins, "cosine:by=step", recorder], seed=1, out=tmp_path)
        optimizer = copy.deepcopy(run.optimizer.state_dict())
        return recorder.losses, recorder.rates, optimizer, run.history, data.read[-80:], torch.get_rng_state(), loader.generator.get_state()

    other = clone(net)
    torch.testing.assert_close(train(net, "lr_finder:num_steps=40"), train(other), rtol=0, atol=0)
    same(net, other)


def test_computing_the_learning_rate_curve_does_not_change_the_run(net, batches, clone, same, sgd):
    """The learning-rate finder changed the weights and learning rates of the run (Lightning-AI/pytorch-lightning#12670, #21068)."""
    other, curves = clone(net), []

    class ComputesCurve:
        def state(self, run):
            rates = [(group["lr"], group["initial_lr"]) for group in run.optimizer.param_groups]
            state = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict()["state"], rates])
            return [*state, torch.get_rng_state(), run.epoch, run.step, run.attempts, run.seen, run.seen_in_epoch]

        @hookimpl
        def before_step(self, run: Run):
            before = self.state(run)
            curves.append([rates[0] for _, rates in lr_curve(run)])
            torch.testing.assert_close(self.state(run), before, rtol=0, atol=0)

    plugins, recorder = ["warmup:length=5", "cosine:by=step", TorchScheduler(lr_scheduler.ExponentialLR, {"gamma": 0.9})], Recorder()
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[*plugins, ComputesCurve(), recorder], seed=1)
    fit(other, cross_entropy, sgd, batches, epochs=2, plugins=copy.deepcopy(plugins), seed=1)
    same(net, other)
    assert curves == [recorder.rates] * 16


def test_the_closure_of_lbfgs_clears_gradients_and_calls_backward_as_often_as_by_hand(plain, batches, clone, same):
    """The closure did not clear the gradients, or called backward once too often (Lightning-AI/pytorch-lightning#4188, #6147)."""
    lbfgs, other, backwards = partial(torch.optim.LBFGS, lr=0.5, max_iter=5), clone(plain), {"run": 0, "by hand": 0}
    plain[0].weight.register_post_accumulate_grad_hook(lambda _: backwards.update({"run": backwards["run"] + 1}))
    fit(plain, cross_entropy, lbfgs, batches, plugins=["accumulate:every=2"])
    optimizer = lbfgs(other.parameters())
    for group in groups(batches, 2):
        def closure(group=group):
            backwards["by hand"] += len(group)
            optimizer.zero_grad()
            losses = []
            add_gradients(other, group, scale=lambda loss: losses.append(loss.detach()) or loss)
            return torch.stack(losses).sum()
        optimizer.step(closure)
    same(plain, other)
    assert backwards["run"] == backwards["by hand"] > 4 * len(batches)


# Resume and speed


class Samples(Dataset):
    """Forty samples with random noise, and the list of the indices that were read."""

    def __init__(self):
        self.inputs, self.targets = (torch.cat(parts) for parts in zip(*equal_batches(5), strict=True))
        self.read = []

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.read.append(index)
        return self.inputs[index] + 0.1 * torch.randn(6), self.targets[index]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")      # on a machine with one core
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("at", [1, 7, 10])
def test_a_resume_restores_random_numbers_before_the_first_batch(net, clone, same, sgd, tmp_path, workers, at):
    """The random-number-generator state was restored after the first batch had been read, or never (huggingface/transformers#46628, #17032)."""
    uninterrupted, loader = clone(net), DataLoader(Samples(), 8, shuffle=True, num_workers=workers)
    fit(uninterrupted, cross_entropy, sgd, loader, epochs=3, seed=1)
    killed_and_resumed(lambda run: run.attempts == at, net, sgd, loader, tmp_path, epochs=3)       # after 1 step, in epoch 2, at its end
    same(net, uninterrupted)


@pytest.mark.parametrize("at", [3, 7, 10])
def test_a_resume_keeps_the_epoch_of_the_sampler(plain, sgd, tmp_path, at):
    """Skipping batches on a resume set the sampler's epoch to 0, so the rest of the epoch came from another shuffle (huggingface/accelerate#4071)."""
    data = Samples()
    loader = DataLoader(data, 8, sampler=DistributedSampler(data, num_replicas=1, rank=0, seed=3))
    killed_and_resumed(lambda run: run.attempts == at, plain, sgd, loader, tmp_path, epochs=3)
    shuffles = [torch.randperm(40, generator=torch.Generator().manual_seed(3 + epoch)).tolist() for epoch in range(3)]
    assert data.read == [*chain(*shuffles)]


@pytest.mark.parametrize("at", [3, 7, 10])
def test_a_resumed_run_reads_only_the_rest_of_the_epoch(plain, clone, sgd, tmp_path, at):
    """A run killed within an epoch read the whole epoch again when it was resumed (Lightning-AI/pytorch-lightning#1182)."""
    data = Samples()
    loader = DataLoader(data, 8, shuffle=True)
    fit(clone(plain), cross_entropy, sgd, loader, epochs=3, seed=1)
    order, data.read = data.read, []
    run = killed_and_resumed(lambda run: run.attempts == at, plain, sgd, loader, tmp_path, epochs=3)
    assert data.read == order                           # by the killed and the resumed run together
    assert [sorted(epoch) for epoch in groups(data.read, 40)] == [list(range(40))] * 3
    assert (run.step, run.seen, run.epoch, len(run.history)) == (15, 15, 3, 3)


def test_a_resume_counts_split_batches_right_and_refuses_another_batch_size(plain, clone, same, sgd, tmp_path):
    """After a resume with another batch size, steps were counted as if they had that size (huggingface/transformers#25956, huggingface/sentence-transformers#3145)."""
    def forward(_, arguments):
        sizes.append(len(arguments[0]))
        if sizes[-1] > 4:
            raise torch.OutOfMemoryError

    sizes, uninterrupted, small = [], clone(plain), clone(plain)
    small.register_forward_pre_hook(forward)
    fit(uninterrupted, cross_entropy, sgd, DataLoader(Samples(), 8), epochs=2, plugins=["split:into=2"], seed=1)
    run = killed_and_resumed(lambda run: run.attempts == 3, small, sgd, DataLoader(Samples(), 8), tmp_path / "1", ["split:into=auto"], epochs=2)
    same(small, uninterrupted)
    assert (run.step, run.seen, sizes) == (10, 10, [8, *[4] * 20])

    killed(lambda run: run.attempts == 3, plain, sgd, DataLoader(Samples(), 4), tmp_path / "2", ["accumulate:every=2"], epochs=3)
    for size, every, steps, batches in ((8, 2, 3, 5), (8, 1, 5, 5), (4, 4, 3, 10)):
        plugins, data = [f"accumulate:every={every}", "checkpoint"], Samples()
        with pytest.raises(UsageError, match=f"an epoch has 5 steps of 10 batches in the checkpoint and {steps} steps of {batches} batches in this run"):
            fit(plain, cross_entropy, sgd, DataLoader(data, size), epochs=3, plugins=plugins, out=tmp_path / "2", resume=tmp_path / "2")
        assert data.read == []


def test_the_host_reads_no_tensor_values_within_a_step(net, monkeypatch):
    """A check of each loss for NaN made the host wait for the device, which took 7 % of the time (huggingface/transformers#33693)."""
    monkeypatch.setattr(step_guard, "ASYNCHRONOUS", ("cpu",))                   # treat the CPU as an asynchronous device
    monkeypatch.setattr(NanGuard, "send_verdict", lambda self, run: None)       # as if the result never arrived on the host
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
    assert set(reads) <= {0}                            # only the first step reads a value: it creates the optimizer's state
    assert [step for step in range(1, 12) if torch.equal(weights[step], weights[step - 1])] == [2, 6, 10]     # the steps with the NaN
