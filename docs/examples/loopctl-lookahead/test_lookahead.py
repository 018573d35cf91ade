"""Tests of lookahead: runs with it equal training loops written by hand, bit for bit."""
import copy
from functools import partial
from math import isfinite

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.testing import plugin_checks
from loopctl_lookahead import Lookahead

cross_entropy = nn.CrossEntropyLoss()
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "adamw": partial(torch.optim.AdamW, lr=1e-2)}
sgd = OPTIMIZERS["sgd"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def net():
    """A small network whose BatchNorm statistics and Dropout depend on every forward pass."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


@pytest.fixture
def batches():
    """Seven batches of 8 samples, a number that k=3 does not divide."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(7)]


class ByHand:
    """Algorithm 1 of the paper, written around a torch optimizer."""

    def __init__(self, model, optimizer, k, alpha):
        self.model, self.optimizer, self.k, self.alpha, self.updates = model, optimizer, k, alpha, 0
        self.slow = [weight.detach().clone() for weight in model.parameters()]

    def after_update(self):
        """Move the slow weights if due. Must be called after each update by the optimizer."""
        self.updates += 1
        if self.updates % self.k == 0:
            with torch.no_grad():
                for weight, slow in zip(self.model.parameters(), self.slow, strict=True):
                    slow.lerp_(weight, self.alpha)          # slow + alpha * (fast - slow)
                    weight.copy_(slow)

    def slow_model(self):
        """A copy of the model with the slow weights."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for weight, slow in zip(model.parameters(), self.slow, strict=True):
                weight.copy_(slow)
        return model


def train_by_hand(model, factory, batches, epochs, k=3, alpha=0.5, after_update=lambda: None):
    torch.manual_seed(1)
    optimizer = factory(model.parameters())
    lookahead = ByHand(model, optimizer, k, alpha)
    for _ in range(epochs):
        model.train()
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            optimizer.step()
            lookahead.after_update()
            after_update()
    return lookahead


def train(model, factory, batches, epochs, plugins, valid=None, **more):
    return fit(model, cross_entropy, factory, batches, valid, epochs=epochs, plugins=plugins, seed=1, **more)


def assert_same(one, other):
    for (name, value), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_equals_the_loop_written_by_hand(net, batches, optimizer, alpha):
    raw, valid = copy.deepcopy(net), batches[:1]
    run = train(net, OPTIMIZERS[optimizer], batches, 2, [Lookahead(3, alpha)], valid)
    expected = train_by_hand(raw, OPTIMIZERS[optimizer], batches, 2, 3, alpha).slow_model()
    assert_same(net, expected)
    with torch.no_grad():
        loss = cross_entropy(expected.eval()(valid[0][0]), valid[0][1])
    assert run.history[-1]["val_loss"] == loss.item()


def test_alpha_1_is_the_optimizer_without_lookahead(net, batches):
    without = copy.deepcopy(net)
    train(net, sgd, batches[:6], 2, [Lookahead(3, 1.0)])
    train(without, sgd, batches[:6], 2, [])
    assert_same(net, without)


class AirbenchState:
    """LookaheadState of airbench94 (github.com/KellerJordan/cifar10-airbench), line by line."""

    def __init__(self, net):
        self.net_ema = {name: value.clone() for name, value in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net, decay):
        for ema, value in zip(self.net_ema.values(), net.state_dict().values(), strict=True):
            if value.dtype in (torch.half, torch.float):
                ema.lerp_(value, 1 - decay)
                value.copy_(ema)


def airbench_schedule(total, dtype):
    return 0.95**5 * (torch.arange(total + 1, dtype=dtype) / total) ** 3


def airbench(model, factory, batches, epochs):
    """The loop of airbench94 around its state."""
    total, step = epochs * len(batches), 0
    schedule = airbench_schedule(total, torch.float64)      # as the plugin; airbench94 itself rounds it to float32
    torch.manual_seed(1)
    optimizer, state = factory(model.parameters()), AirbenchState(model)
    for _ in range(epochs):
        model.train()
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            optimizer.step()
            step += 1
            if step % 5 == 0:
                state.update(model, schedule[step].item())
    state.update(model, 1.0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_equals_the_loop_of_airbench_with_its_schedule(net, batches, optimizer):
    raw = copy.deepcopy(net)
    train(net, OPTIMIZERS[optimizer], batches, 3, [Lookahead(5, 1.0, decay=0.95**5, buffers=True)])
    airbench(raw, OPTIMIZERS[optimizer], batches, 3)
    assert_same(net, raw)
    torch.testing.assert_close(airbench_schedule(21, torch.float32).double(), airbench_schedule(21, torch.float64), rtol=3e-7, atol=0)


class CopyAfterEvaluate:
    """Keeps a copy of the model as a plugin sees it in `after_evaluate`."""

    @hookimpl
    def after_evaluate(self, run: Run) -> None:
        self.model = copy.deepcopy(run.model)


@pytest.mark.parametrize("plugins", [["lookahead:k=3"], ["lookahead:k=3", "ema:decay=0.9"], ["ema:decay=0.9", "lookahead:k=3"]])
def test_the_final_weights_are_those_that_after_evaluate_saw(net, batches, plugins):
    copies = CopyAfterEvaluate()
    train(net, sgd, batches, 1, [copies, *plugins], batches[:1])
    assert_same(copies.model, net)


def test_evaluating_more_often_changes_nothing(net, batches):
    other = copy.deepcopy(net)
    train(net, sgd, batches, 2, [Lookahead(3)], batches[:1])
    train(other, sgd, batches, 2, [Lookahead(3)], batches[:1], eval_every=1)
    assert_same(net, other)


class Interrupted(Exception):
    pass


class Interrupt:
    """Raises an exception after a number of attempted updates."""

    observer_only = True

    def __init__(self, attempts):
        self.attempts = attempts

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.attempts == self.attempts:
            raise Interrupted


@pytest.mark.parametrize("attempts", [3, 5, 7])
@pytest.mark.parametrize("lookahead", ["lookahead:k=3", "lookahead:k=3,alpha=1,decay=0.8,buffers=true"])
def test_a_resumed_run_ends_with_the_same_bits(net, batches, tmp_path, lookahead, attempts):
    whole, resumed = copy.deepcopy(net), copy.deepcopy(net)
    plugins = [lookahead, "ema:decay=0.9", "checkpoint:every_steps=1"]
    expected = train(whole, sgd, batches, 3, plugins, batches[:1], out=tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(net, sgd, batches, 3, [*plugins, Interrupt(attempts)], batches[:1], out=tmp_path / "cut")
    run = train(resumed, sgd, batches, 3, plugins, batches[:1], out=tmp_path / "cut", resume=tmp_path / "cut")
    assert_same(resumed, whole)
    assert run.history == expected.history


def test_a_finished_run_resumed_for_more_epochs_continues_with_the_fast_weights(net, batches, tmp_path):
    whole, resumed = copy.deepcopy(net), copy.deepcopy(net)
    train(whole, sgd, batches, 3, ["lookahead:k=3"])
    train(net, sgd, batches, 2, ["lookahead:k=3", "checkpoint"], out=tmp_path)
    train(resumed, sgd, batches, 3, ["lookahead:k=3", "checkpoint"], out=tmp_path, resume=tmp_path)
    assert_same(resumed, whole)


OTHERS = ["accumulate:every=2", "amp:dtype=bfloat16", "amp:dtype=float16", "clip:max_norm=0.1", "ema:decay=0.9",
          "freeze:patterns=0,until=1ep", "nan_guard", "sam", "split:into=2", "swa:start=1ep", "warmup:length=1ep"]


@pytest.mark.parametrize("other", OTHERS)
def test_the_order_with_another_plugin_does_not_matter(net, batches, other):
    reordered = copy.deepcopy(net)
    run = train(reordered, sgd, batches, 2, ["lookahead:k=3", other], batches[:1])
    other_run = train(net, sgd, batches, 2, [other, "lookahead:k=3"], batches[:1])
    assert_same(reordered, net)
    assert run.history == other_run.history


@pytest.mark.parametrize("name", ["ema:decay=0.9,warmup=false", "swa:start=1ep"])
def test_the_run_ends_with_an_average_of_the_fast_weights(batches, name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    raw, steps = copy.deepcopy(net), []
    train(net, sgd, batches, 3, ["lookahead:k=3", name])
    train_by_hand(raw, sgd, batches, 3, 
                  after_update=lambda: steps.append([weight.detach().clone() for weight in raw.parameters()]))
    if name.startswith("ema"):
        expected = steps[0]
        for weights in steps[1:]:
            for average, weight in zip(expected, weights, strict=True):
                average.lerp_(weight, 1 - 0.9)
    else:
        expected = [torch.lerp(epoch_2, epoch_3, 0.5) for epoch_2, epoch_3 in zip(steps[13], steps[20], strict=True)]
    for weight, average in zip(net.parameters(), expected, strict=True):
        assert torch.equal(weight, average)


def test_several_accumulated_batches_count_as_one_update(batches):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    raw = copy.deepcopy(net)
    run = train(net, sgd, batches[:6], 2, ["accumulate:every=2", "lookahead:k=2"])
    optimizer = sgd(raw.parameters())
    lookahead = ByHand(raw, optimizer, 2, 0.5)
    for number, (input, target) in enumerate(batches[:6] * 2, 1):
        (cross_entropy(raw(input), target) * 0.5).backward()
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
            lookahead.after_update()
    assert run.step == lookahead.updates == 6
    assert_same(net, lookahead.slow_model())


def test_a_step_skipped_for_a_float16_overflow_does_not_count(batches):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    raw = copy.deepcopy(net)
    run = train(net, sgd, batches, 2, [f"amp:dtype=float16,init_scale={2.0**20}", "lookahead:k=2"])
    optimizer, scaler = sgd(raw.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    lookahead = ByHand(raw, optimizer, 2, 0.5)
    for input, target in batches * 2:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = cross_entropy(raw(input), target)
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            lookahead.after_update()
    assert 0 < run.step == lookahead.updates < run.attempts
    assert_same(net, lookahead.slow_model())


@pytest.mark.parametrize("plugins", [["lookahead:k=1", "nan_guard:action=skip"], ["nan_guard:action=skip", "lookahead:k=1"]])
def test_a_skipped_step_with_nan_changes_neither_fast_nor_slow_weights(net, batches, plugins):
    batches[3] = (batches[3][0] / 0, batches[3][1])
    run = train(net, sgd, batches, 1, plugins, batches[:1])
    assert run.step == 6
    assert isfinite(run.history[-1]["val_loss"])
    assert all(weight.isfinite().all() for weight in net.parameters())


class CopyAfterEachStep:
    """Keeps a copy of the model after each step."""

    def __init__(self):
        self.models = []

    @hookimpl
    def safe_point(self, run: Run) -> None:
        self.models.append(copy.deepcopy(run.model))


def test_the_slow_weights_do_not_move_in_a_step_that_rolls_back(net, batches, tmp_path):
    """The fourth batch has NaN: the run rolls back to step 2. run.step is still 3, a multiple of k."""
    batches[3] = (batches[3][0] / 0, batches[3][1])
    copies = CopyAfterEachStep()
    train(net, sgd, batches, 1, ["lookahead:k=3", "nan_guard:action=rollback", "checkpoint:every_steps=2", copies], out=tmp_path)
    assert_same(copies.models[3], copies.models[1])


def test_frozen_parameters_have_no_slow_weights(net, batches):
    lookahead = Lookahead(3)
    train(net, sgd, batches, 1, ["freeze:patterns=0", lookahead])
    assert list(lookahead.slow) == ["1.weight", "1.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize(("spec", "message"), [
    ("lookahead:k=0", "lookahead: k is at least 1, not 0"),
    ("lookahead:alpha=0", r"lookahead: alpha is above 0 and up to 1, not 0\.0"),
    ("lookahead:alpha=1.5", r"lookahead: alpha is above 0 and up to 1, not 1\.5"),
    ("lookahead:decay=1.5", r"lookahead: decay is 0 to 1, not 1\.5"),
    ("lookahead:power=0", r"lookahead: power is above 0, not 0\.0"),
    ("lookahead:alfa=1", "lookahead: no option 'alfa'; did you mean 'alpha'?"),
])
def test_a_wrong_option_is_refused(net, batches, spec, message):
    with pytest.raises(UsageError, match=message):
        train(net, sgd, batches, 1, [spec])


@pytest.mark.parametrize("check", plugin_checks(Lookahead, {"k": 3}) + plugin_checks(Lookahead, {"k": 2, "decay": 0.8, "buffers": True}))
def test_it_passes_the_checks_for_all_plugins(check):
    check()
