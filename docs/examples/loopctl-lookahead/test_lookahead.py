"""lookahead against loops written by hand, bit for bit."""
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
    """A small network with BatchNorm and Dropout, whose state and random numbers a wrong loop disturbs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


@pytest.fixture
def batches():
    """Seven batches of 8 samples: k=3 does not divide an epoch."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(7)]


class ByHand:
    """The paper's algorithm 1 around a torch optimizer; both sets of weights can be looked at."""

    def __init__(self, model, optimizer, k, alpha):
        self.model, self.optimizer, self.k, self.alpha, self.updates = model, optimizer, k, alpha, 0
        self.slow = [weight.detach().clone() for weight in model.parameters()]

    def updated(self):
        """To be called after each update by the optimizer."""
        self.updates += 1
        if self.updates % self.k == 0:
            with torch.no_grad():
                for weight, slow in zip(self.model.parameters(), self.slow, strict=True):
                    slow.lerp_(weight, self.alpha)          # slow + alpha * (fast - slow)
                    weight.copy_(slow)

    def result(self):
        """A copy of the model with the slow weights."""
        model = copy.deepcopy(self.model)
        with torch.no_grad():
            for weight, slow in zip(model.parameters(), self.slow, strict=True):
                weight.copy_(slow)
        return model


def train_by_hand(model, factory, batches, epochs, k=3, alpha=0.5, after=lambda: None):
    torch.manual_seed(1)
    optimizer = factory(model.parameters())
    lookahead = ByHand(model, optimizer, k, alpha)
    for _ in range(epochs):
        model.train()
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            optimizer.step()
            lookahead.updated()
            after()
    return lookahead


def train(model, factory, batches, epochs, plugins, valid=None, **more):
    return fit(model, cross_entropy, factory, batches, valid, epochs=epochs, plugins=plugins, seed=1, **more)


def assert_same(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bit_for_bit_the_loop_written_by_hand(net, batches, optimizer, alpha):
    raw, valid = copy.deepcopy(net), batches[:1]
    run = train(net, OPTIMIZERS[optimizer], batches, 2, [Lookahead(3, alpha)], valid)
    expected = train_by_hand(raw, OPTIMIZERS[optimizer], batches, 2, 3, alpha).result()
    assert_same(net, expected)
    with torch.no_grad():
        loss = cross_entropy(expected.eval()(valid[0][0]), valid[0][1])
    assert run.history[-1]["val_loss"] == loss.item()


def test_all_the_way_is_the_optimizer_alone(net, batches):
    alone = copy.deepcopy(net)
    train(net, sgd, batches[:6], 2, [Lookahead(3, 1.0)])
    train(alone, sgd, batches[:6], 2, [])
    assert_same(net, alone)


class Judge:
    @hookimpl
    def after_evaluate(self, run: Run) -> None:
        self.seen = copy.deepcopy(run.model)


@pytest.mark.parametrize("plugins", [["lookahead:k=3"], ["lookahead:k=3", "ema:decay=0.9"], ["ema:decay=0.9", "lookahead:k=3"]])
def test_what_is_judged_is_what_is_kept(net, batches, plugins):
    judge = Judge()
    train(net, sgd, batches, 1, [judge, *plugins], batches[:1])
    assert_same(judge.seen, net)


def test_looking_more_often_changes_nothing(net, batches):
    other = copy.deepcopy(net)
    train(net, sgd, batches, 2, [Lookahead(3)], batches[:1])
    train(other, sgd, batches, 2, [Lookahead(3)], batches[:1], eval_every=1)
    assert_same(net, other)


class Cut(Exception):
    """The power fails."""


class Fail:
    observer_only = True

    def __init__(self, attempts):
        self.attempts = attempts

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.attempts == self.attempts:
            raise Cut


@pytest.mark.parametrize("cut", [3, 5, 7])
def test_a_resumed_run_ends_with_the_same_bits(net, batches, tmp_path, cut):
    whole, again = copy.deepcopy(net), copy.deepcopy(net)
    plugins = ["lookahead:k=3", "ema:decay=0.9", "checkpoint:every_steps=1"]
    expected = train(whole, sgd, batches, 3, plugins, batches[:1], out=tmp_path / "whole")
    with pytest.raises(Cut):
        train(net, sgd, batches, 3, [*plugins, Fail(cut)], batches[:1], out=tmp_path / "cut")
    run = train(again, sgd, batches, 3, plugins, batches[:1], out=tmp_path / "cut", resume=tmp_path / "cut")
    assert_same(again, whole)
    assert run.history == expected.history


def test_a_run_that_is_made_longer_goes_on_with_the_fast_weights(net, batches, tmp_path):
    whole, again = copy.deepcopy(net), copy.deepcopy(net)
    train(whole, sgd, batches, 3, ["lookahead:k=3"])
    train(net, sgd, batches, 2, ["lookahead:k=3", "checkpoint"], out=tmp_path)
    train(again, sgd, batches, 3, ["lookahead:k=3", "checkpoint"], out=tmp_path, resume=tmp_path)
    assert_same(again, whole)


OTHERS = ["accumulate:every=2", "amp:dtype=bfloat16", "amp:dtype=float16", "clip:max_norm=0.1", "ema:decay=0.9",
          "freeze:patterns=0,until=1ep", "nan_guard", "sam", "split:into=2", "swa:start=1ep", "warmup:length=1ep"]


@pytest.mark.parametrize("other", OTHERS)
def test_before_or_after_another_plugin_is_the_same(net, batches, other):
    first = copy.deepcopy(net)
    ahead = train(first, sgd, batches, 2, ["lookahead:k=3", other], batches[:1])
    after = train(net, sgd, batches, 2, [other, "lookahead:k=3"], batches[:1])
    assert_same(first, net)
    assert ahead.history == after.history


@pytest.mark.parametrize("name", ["ema:decay=0.9,warmup=false", "swa:start=1ep"])
def test_an_average_is_of_the_fast_weights_and_stands(batches, name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    raw, steps = copy.deepcopy(net), []
    train(net, sgd, batches, 3, ["lookahead:k=3", name])
    train_by_hand(raw, sgd, batches, 3, after=lambda: steps.append([one.detach().clone() for one in raw.parameters()]))
    if name.startswith("ema"):
        expected = steps[0]
        for weights in steps[1:]:
            for average, weight in zip(expected, weights, strict=True):
                average.lerp_(weight, 1 - 0.9)
    else:
        expected = [torch.lerp(one, other, 0.5) for one, other in zip(steps[13], steps[20], strict=True)]
    for weight, average in zip(net.parameters(), expected, strict=True):
        assert torch.equal(weight, average)


def test_a_batch_that_accumulates_is_no_update(batches):
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
            lookahead.updated()
    assert run.step == lookahead.updates == 6
    assert_same(net, lookahead.result())


def test_an_update_that_float16_skips_does_not_count(batches):
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
            lookahead.updated()
    assert 0 < run.step == lookahead.updates < run.attempts
    assert_same(net, lookahead.result())


@pytest.mark.parametrize("plugins", [["lookahead:k=1", "nan_guard:action=skip"], ["nan_guard:action=skip", "lookahead:k=1"]])
def test_a_step_that_is_not_finite_reaches_neither_set_of_weights(net, batches, plugins):
    batches[3] = (batches[3][0] / 0, batches[3][1])
    run = train(net, sgd, batches, 1, plugins, batches[:1])
    assert run.step == 6
    assert isfinite(run.history[-1]["val_loss"])
    assert all(weight.isfinite().all() for weight in net.parameters())


class Watch:
    def __init__(self):
        self.seen = []

    @hookimpl
    def safe_point(self, run: Run) -> None:
        self.seen.append(copy.deepcopy(run.model))


def test_a_step_that_rolls_back_moves_nothing(net, batches, tmp_path):
    """From the bad fourth batch to the state of step 2, though run.step is still 3, where the slow weights move."""
    batches[3] = (batches[3][0] / 0, batches[3][1])
    watch = Watch()
    train(net, sgd, batches, 1, ["lookahead:k=3", "nan_guard:action=rollback", "checkpoint:every_steps=2", watch], out=tmp_path)
    assert_same(watch.seen[3], watch.seen[1])


def test_what_is_not_trained_is_not_copied(net, batches):
    lookahead = Lookahead(3)
    train(net, sgd, batches, 1, ["freeze:patterns=0", lookahead])
    assert list(lookahead.slow) == ["1.weight", "1.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize(("spec", "message"), [
    ("lookahead:k=0", "lookahead: k is at least 1, not 0"),
    ("lookahead:alpha=0", r"lookahead: alpha is above 0 and up to 1, not 0\.0"),
    ("lookahead:alpha=1.5", r"lookahead: alpha is above 0 and up to 1, not 1\.5"),
    ("lookahead:alfa=1", "lookahead: no option 'alfa'; did you mean 'alpha'?"),
])
def test_a_wrong_option_is_refused(net, batches, spec, message):
    with pytest.raises(UsageError, match=message):
        train(net, sgd, batches, 1, [spec])


@pytest.mark.parametrize("check", plugin_checks(Lookahead, {"k": 3}))
def test_it_is_as_can_be_expected_of_any_plugin(check):
    check()
