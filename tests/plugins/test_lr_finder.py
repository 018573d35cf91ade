"""lr_finder against a range test by hand, and a run that must not know of it."""
import math
import multiprocessing
import random
import sys
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from loopctl import Run, UsageError, fit, hookimpl
from loopctl import trial_run as rehearsal
from loopctl.cli import main
from loopctl.composition.compose import compose
from loopctl.plugins.lr_finder import LrFinder, suggestions
from loopctl.plugins.torch_scheduler import TorchScheduler
from loopctl.trial_run import trial_run

cross_entropy = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Watch:
    """The rates and the losses of every step."""

    def __init__(self):
        self.rates, self.losses = [], []

    @hookimpl
    def after_step(self, run: Run):
        self.rates.append([group["lr"] for group in run.optimizer.param_groups])
        self.losses.append(run.loss.item())


def by_hand(model, optimizer, batches, rates, beta, diverge, every=1, max_norm=None):
    """The range test of a plain loop: the smoothed losses until it diverges."""
    found, mean, best = [], 0.0, math.inf
    groups = [batches[at:at + every] for at in range(0, len(batches), every)]
    for number, rate in enumerate(rates):
        group = groups[number % len(groups)]
        size = sum(len(input) for input, _ in group)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        total = 0.0
        for input, target in group:
            loss = cross_entropy(model(input), target) * (len(input) / size)
            loss.backward()
            total += loss.detach()
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        mean = beta * mean + (1 - beta) * float(total)
        smooth = mean / (1 - beta ** (number + 1))
        if not math.isfinite(smooth) or smooth > diverge * best:
            break
        best = min(best, smooth)
        found.append(smooth)
    return found


@pytest.mark.parametrize(("every", "max_norm", "start", "end", "diverges"), [(1, None, 1e-4, 100, True), (3, 0.1, 1e-5, 1, False)])
def test_the_losses_are_those_of_a_test_by_hand(net, batches, clone, sgd, every, max_norm, start, end, diverges):
    other = clone(net)
    plugin = LrFinder(start_lr=start, end_lr=end, num_steps=60, beta=0.9, diverge=3)
    plugins = [plugin, "cosine", *[f"accumulate:every={every}"] * (every > 1), *[f"clip:max_norm={max_norm}"] * bool(max_norm)]
    fit(net, cross_entropy, sgd, batches, plugins=plugins, seed=1)
    torch.manual_seed(1)
    rates = [start * (end / start) ** (number / 59) for number in range(60)]
    expected = by_hand(other, sgd(other.parameters()), batches, rates, 0.9, 3, every, max_norm)
    assert (len(expected) < 60) == diverges
    assert plugin.losses == pytest.approx(expected, rel=1e-6)           # the rates are powers of a rounded root
    assert plugin.rates == pytest.approx(rates[:len(expected)], rel=1e-12)


def test_groups_keep_their_ratio_while_rates_are_tried(net, batches, monkeypatch):
    tried = []
    monkeypatch.setattr(rehearsal, "set_learning_rates", lambda optimizer, rates: tried.append(rates))
    fit(net, cross_entropy, partial(torch.optim.SGD, lr=0.1), batches, plugins=["lr_finder:num_steps=5,start_lr=0.01,end_lr=100", "layerwise_lr:decay=0.5"])
    assert len(tried) == 5
    for rates, top in zip(tried, (0.01, 0.1, 1, 10, 100), strict=True):
        assert sorted(rates, reverse=True) == pytest.approx([top / 2 ** group for group in range(len(rates))])


def everything(run):
    """All of a run that might have been touched."""
    return [*leaves([
        run.model.state_dict(), [module.training for module in run.model.modules()], run.optimizer.state_dict(),
        {name: plugin.state_dict() for name, plugin in run.hook.plugins.items() if hasattr(plugin, "state_dict")},
        run.counters.state_dict() | {name: getattr(run, name) for name in ("stop", "history", "metrics")},
        [parameter.grad for parameter in run.model.parameters()], run.meters.state_dict()])]


def leaves(value):
    """What is in a nesting, exactly, as text."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield repr(value.tolist() if isinstance(value, torch.Tensor) else value)


def randomness():
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist()


class Looks:
    """What there is when the epoch begins, and after the plugin after it had its turn."""

    def __init__(self):
        self.seen, self.random = [], []

    @hookimpl(wrapper=True)
    def epoch_start(self, run: Run):
        self.seen.append(everything(run))
        self.random.append(randomness())
        return (yield)


@pytest.mark.parametrize("plugins", [
    [], ["amp:dtype=float16", "accumulate:every=2"], ["sam", "ema:decay=0.9", "clip"], ["freeze:patterns=0,until=1ep", "layerwise_lr:decay=0.5"],
    ["nan_guard:action=skip", "onecycle:max_lr=0.1"], ["split:into=auto", "early_stopping", "plateau:patience=0"], ["swa:start=50%", "throughput:peak=1"],
    ["compile:backend=eager", "amp:dtype=bfloat16"], ["prefetch", "csv"], ["channels_last", "tensorboard:every_steps=1", "torch_scheduler:cls=torch.optim.lr_scheduler:StepLR,step_size=1"],
], ids=str)
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_the_run_is_what_it_would_be_without(net, valid, clone, same, tmp_path, plugins):
    data = TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,)))
    other, adam, runs, watches = clone(net), partial(torch.optim.AdamW, lr=1e-2), [], [Watch(), Watch()]
    looks = Looks(), Looks()
    for model, finder, watch, out in ((net, [looks[0], "lr_finder:num_steps=30", looks[1]], watches[0], "a"), (other, [], watches[1], "b")):
        loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
        runs.append(fit(model, cross_entropy, adam, loader, valid, epochs=2, seed=1, out=tmp_path / out, plugins=[*plugins, *finder, watch]))
        runs.append((randomness(), loader.generator.get_state().tolist()))
    same(net, other)
    assert watches[0].losses == watches[1].losses
    assert watches[0].rates == watches[1].rates
    assert repr(runs[1]) == repr(runs[3])
    assert looks[0].seen[0] == looks[1].seen[0]
    assert repr(looks[0].random[0]) == repr(looks[1].random[0])
    if not any("throughput" in plugin for plugin in plugins):
        assert runs[0].history == runs[2].history


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")      # on a machine of one core
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_that_draw_random_numbers(net, clone, same, sgd, persistent):
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            input, target = super().__getitem__(index)
            return input + 0.1 * torch.randn(6), target

    data, other = Noisy(torch.randn(24, 6), torch.randint(0, 3, (24,))), clone(net)
    for model, plugins in ((net, ["lr_finder:num_steps=5"]), (other, [])):
        loader = DataLoader(data, 8, shuffle=True, num_workers=2, persistent_workers=persistent)
        fit(model, cross_entropy, sgd, loader, epochs=2, seed=1, plugins=plugins)
    same(net, other)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_the_copys_workers_end_with_it(net, sgd, monkeypatch):
    """Left to Python, they would end while matplotlib is imported, and hear of it ten seconds later."""
    there = []
    monkeypatch.setattr(LrFinder, "report", lambda self, run: there.append(multiprocessing.active_children()))
    data = TensorDataset(torch.randn(24, 6), torch.randint(0, 3, (24,)))
    fit(net, cross_entropy, sgd, DataLoader(data, 8, num_workers=2), plugins=["lr_finder:num_steps=5"])
    assert there == [[]]


@pytest.mark.parametrize("optimizer", [partial(torch.optim.LBFGS, lr=0.5, max_iter=3), partial(torch.optim.SGD, lr=torch.tensor(0.1))], ids=["lbfgs", "tensor"])
def test_optimizers_that_are_not_simple_to_copy(plain, batches, clone, same, optimizer):
    other = clone(plain)
    run = fit(plain, cross_entropy, optimizer, batches, seed=1, plugins=["lr_finder:num_steps=20"])
    fit(other, cross_entropy, optimizer, batches, seed=1)
    same(plain, other)
    assert len(run.hook.plugins["lr_finder"].rates) > 3


def test_an_optimizer_that_a_scheduler_has_wrapped(plain, batches, clone, same):
    """Its step, as torch's schedulers leave it, is the original's, and would not train the copy."""
    models, losses = (plain, clone(plain)), []
    for model, wrap in zip(models, (True, False), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if wrap:
            lr_scheduler.StepLR(optimizer, 1)
        plugin = LrFinder(num_steps=9, path=f"{wrap}.png")
        fit(model, cross_entropy, optimizer, batches, seed=1, plugins=[plugin])
        losses.append(plugin.losses)
    same(*models)
    assert losses[0] == losses[1]


def test_after_an_accident_the_random_numbers_are_back(net, batches, sgd):
    class Fail:
        @hookimpl
        def grads_ready(self, run: Run):
            raise RuntimeError("an accident")

    class Look:
        @hookimpl
        def train_start(self, run: Run):
            self.random = randomness()

    look = Look()
    with pytest.raises(RuntimeError, match="an accident"):
        fit(net, cross_entropy, sgd, batches, seed=1, plugins=["lr_finder", Fail(), look])
    assert repr(randomness()) == repr(look.random)


def test_it_takes_the_rate_where_it_is_told_to(net, batches, clone, same, capsys):
    """Schedules start from it, whatever they remember, and the groups keep their ratio."""
    watch, plugins = Watch(), ["layerwise_lr:decay=0.5", TorchScheduler(lr_scheduler.ExponentialLR, {"gamma": 0.5})]
    run = fit(net, cross_entropy, partial(torch.optim.SGD, lr=1e-3), batches, epochs=2, plugins=["lr_finder:use=true,start_lr=1e-3,beta=0.5", *plugins, watch])
    steepest = run.hook.plugins["lr_finder"].steepest
    assert 1e-3 < steepest < 10
    for step, factor in ((0, 1), (7, 1), (8, 0.5), (15, 0.5)):
        assert sorted(watch.rates[step], reverse=True) == pytest.approx([steepest * factor / 2 ** group for group in range(len(watch.rates[0]))])
    assert f"most steeply at {steepest:.3g}" in capsys.readouterr().out


def test_without_a_schedule_the_rate_stays(net, batches, sgd):
    watch = Watch()
    run = fit(net, cross_entropy, sgd, batches, plugins=["lr_finder:use=true,start_lr=1e-3,beta=0.5", watch])
    assert watch.rates == [[run.hook.plugins["lr_finder"].steepest]] * 8
    assert run.history[0]["lr"] == watch.rates[0][0]


def test_it_ends_where_it_is_told_to(net, batches, valid, clone, same, sgd):
    other = clone(net)
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=["lr_finder:only=true", "csv", "progress", "checkpoint"])
    same(net, other)
    assert (run.step, run.history, run.stop) == (0, [], "the test of learning rates is done, and only=true asks for no more")


def test_a_run_that_goes_on_has_the_rate_and_no_test(net, batches, clone, same, sgd, tmp_path, capsys):
    class Kill:
        @hookimpl
        def safe_point(self, run: Run):
            if run.attempts == 11 and not run.resume:
                raise KeyboardInterrupt

    plugins, whole = ["lr_finder:use=true,start_lr=1e-3", "cosine:by=step", "checkpoint:every_steps=2"], clone(net)
    fit(whole, cross_entropy, sgd, batches, epochs=2, plugins=plugins, seed=1, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(clone(net), cross_entropy, sgd, batches, epochs=2, plugins=[*plugins, Kill()], seed=1, out=tmp_path / "cut")
    capsys.readouterr()
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=plugins, out=tmp_path / "cut", resume=tmp_path / "cut")
    same(net, whole)
    assert capsys.readouterr().out == ""


def test_suggestions_on_a_curve_that_is_known():
    rates = [10.0 ** (at / 5 - 5) for at in range(30)]
    losses = [2.0] * 15 + [1.9, 1.5, 0.9, 0.6, 0.5, 0.5, 0.6, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert suggestions(rates, losses) == (rates[16], rates[19] / 10)
    assert all(map(math.isnan, suggestions(rates, [2.0 + at for at in range(30)])))
    assert all(map(math.isnan, suggestions(rates[:2], [2.0, 1.0])))
    steep = [9.0, 1.0, 1.0, *losses[3:]]                                # before the mean is one
    assert suggestions(rates, steep) == (rates[16], rates[19] / 10)


def test_the_picture(net, batches, sgd, tmp_path, capsys, monkeypatch):
    fit(net, cross_entropy, sgd, batches, plugins=["lr_finder:path=a/b.svg,num_steps=9"], out=tmp_path)
    text = (tmp_path / "a" / "b.svg").read_text()
    assert "learning rate" in text
    assert "picture: " in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fit(net, cross_entropy, sgd, batches, plugins=["lr_finder:num_steps=9"], out=tmp_path)
    assert "no picture: it needs matplotlib; install it with: pip install 'loopctl[plot]'" in capsys.readouterr().out
    assert not (tmp_path / "lr_finder.png").exists()


class Uncopied(nn.Module):
    """A model that cannot be copied: it keeps a tensor with a history."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.kept = self.layer.weight * 2

    def forward(self, input):
        return self.layer(input)


@pytest.mark.parametrize(("plugins", "message"), [
    (["lr_finder:start_lr=1e3,end_lr=1e4,use=true"], "use=true: there is no rate to use, for the loss falls nowhere"),
    (["lr_finder:path=there.png"], "there.png exists and is not overwritten; move it, or choose another path"),
])
def test_what_it_refuses(net, batches, sgd, tmp_path, plugins, message):
    (tmp_path / "there.png").write_text("precious")
    with pytest.raises(UsageError, match=message):
        fit(net, cross_entropy, sgd, batches, plugins=plugins, out=tmp_path)
    assert (tmp_path / "there.png").read_text() == "precious"


def test_what_cannot_be_tried(net, batches, sgd):
    with pytest.raises(UsageError, match=r"lr_finder: the run cannot be copied to try steps on \(RuntimeError: Only Tensors created explicitly"):
        fit(Uncopied(), cross_entropy, sgd, batches, plugins=["lr_finder"])
    with pytest.raises(UsageError, match="lr_finder: train can be read only once"):
        fit(net, cross_entropy, sgd, iter(batches), steps_per_epoch=8, plugins=["lr_finder"])
    with pytest.raises(UsageError, match="every learning rate is 0"):
        fit(net, cross_entropy, partial(torch.optim.SGD, lr=0.0), batches, plugins=["lr_finder"])
    with pytest.raises(UsageError, match="the loss is no finite number at the first rate, 1e-07"):
        fit(net, lambda output, target: output.mean() * math.nan, sgd, batches, plugins=["lr_finder"])


def test_a_rehearsal_stays_where_the_run_is(net, batches, sgd):
    class Look:
        @hookimpl(wrapper=True)
        def epoch_start(self, run: Run):
            if not run.seen and run.hook.acting["optimizer_step"]:
                with trial_run(run) as copy:
                    positions = []
                    for _ in range(10):
                        assert copy.step([0.1]).item() > 0
                        positions.append((copy.twin.step, copy.twin.attempts, copy.twin.seen))
                assert positions == [(0, 0, 0)] * 10
                assert copy.twin.model is not run.model
                assert copy.twin.hook.plugins["sam"] is not run.hook.plugins["sam"]
                assert copy.twin.train is run.train                     # nothing of a list can be lost by reading it
            return (yield)

    assert fit(net, cross_entropy, sgd, batches, plugins=["sam", Look()]).step == 8


@pytest.mark.parametrize(("spec", "message"), [
    ("start_lr=0", "start_lr is above 0 and below end_lr, not 0.0 with end_lr=10.0"), ("num_steps=2", "num_steps is at least 3, not 2"),
    ("beta=1", "beta is from 0 to below 1, not 1.0"), ("diverge=1", "diverge is above 1, not 1.0"),
    ("use=true,only=true", "only=true ends the run before it could use the rate; leave out use or only"),
    ("path=x", "path is a .png, .svg or .pdf file, not 'x'"),
])
def test_wrong_options(spec, message):
    with pytest.raises(UsageError) as refused:
        compose([f"lr_finder:{spec}"])
    assert str(refused.value) == f"lr_finder: {message}"


def test_from_the_command_line_the_run_is_announced_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["run", "--model", "linear", "--epochs", "1", "--out", "run", "--plugin", "lr_finder:num_steps=5"])
    assert done.exit_code == 0, done.output
    assert done.output.count(" parameters) on digits ") == 1
