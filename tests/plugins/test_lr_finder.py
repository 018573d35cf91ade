"""The plugin lr_finder, compared with a range test in a plain loop; the run itself must not change."""
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
from loopctl import trial_run as trial_run_module
from loopctl.cli import main
from loopctl.composition.compose import compose
from loopctl.plugins.lr_finder import LrFinder, suggestions
from loopctl.plugins.torch_scheduler import TorchScheduler
from loopctl.trial_run import trial_run

cross_entropy = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Recorder:
    """Records the learning rates and the loss of every step."""

    def __init__(self):
        self.rates, self.losses = [], []

    @hookimpl
    def after_step(self, run: Run):
        self.rates.append([group["lr"] for group in run.optimizer.param_groups])
        self.losses.append(run.loss.item())


def by_hand(model, optimizer, batches, rates, beta, diverge, every=1, max_norm=None):
    """The range test in a plain loop: the smoothed losses until it diverges."""
    losses, mean, best = [], 0.0, math.inf
    groups = [batches[start:start + every] for start in range(0, len(batches), every)]
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
        smoothed = mean / (1 - beta ** (number + 1))
        if not math.isfinite(smoothed) or smoothed > diverge * best:
            break
        best = min(best, smoothed)
        losses.append(smoothed)
    return losses


@pytest.mark.compares(use="lr_finder", technique="learning-rate range test",
                      source="arXiv:1506.01186, section 3.3", tolerance="1e-6: rates are powers of a rounded number")
@pytest.mark.parametrize(("every", "max_norm", "start", "end", "diverges"), [(1, None, 1e-4, 100, True), (3, 0.1, 1e-5, 1, False)])
def test_rates_and_losses_equal_those_of_a_plain_range_test(net, batches, clone, sgd, every, max_norm, start, end, diverges):
    other = clone(net)
    plugin = LrFinder(start_lr=start, end_lr=end, num_steps=60, beta=0.9, diverge=3)
    plugins = [plugin, "cosine", *[f"accumulate:every={every}"] * (every > 1), *[f"clip:max_norm={max_norm}"] * bool(max_norm)]
    fit(net, cross_entropy, sgd, batches, plugins=plugins, seed=1)
    torch.manual_seed(1)
    rates = [start * (end / start) ** (number / 59) for number in range(60)]
    expected = by_hand(other, sgd(other.parameters()), batches, rates, 0.9, 3, every, max_norm)
    assert (len(expected) < 60) == diverges
    assert plugin.losses == pytest.approx(expected, rel=1e-6)           # the rates are powers of a rounded number
    assert plugin.rates == pytest.approx(rates[:len(expected)], rel=1e-12)


def test_parameter_groups_keep_their_ratio_during_the_test(net, batches, monkeypatch):
    tried = []
    monkeypatch.setattr(trial_run_module, "set_learning_rates", lambda optimizer, rates: tried.append(rates))
    fit(net, cross_entropy, partial(torch.optim.SGD, lr=0.1), batches, plugins=["lr_finder:num_steps=5,start_lr=0.01,end_lr=100", "layerwise_lr:decay=0.5"])
    assert len(tried) == 5
    for rates, top in zip(tried, (0.01, 0.1, 1, 10, 100), strict=True):
        assert sorted(rates, reverse=True) == pytest.approx([top / 2 ** group for group in range(len(rates))])


def run_state(run):
    """All state of a run that the test could change, as text."""
    return [*leaves([
        run.model.state_dict(), [module.training for module in run.model.modules()], run.optimizer.state_dict(),
        {name: plugin.state_dict() for name, plugin in run.hook.plugins.items() if hasattr(plugin, "state_dict")},
        run.counters.state_dict() | {name: getattr(run, name) for name in ("stop", "history", "metrics")},
        [parameter.grad for parameter in run.model.parameters()], run.meters.state_dict()])]


def leaves(value):
    """The values in nested containers, as exact text."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield repr(value.tolist() if isinstance(value, torch.Tensor) else value)


def rng_states():
    return random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().tolist()


class StateRecorder:
    """Records the state of the run and of the random-number generators in epoch_start, between two plugins."""

    def __init__(self):
        self.states, self.rng_states = [], []

    @hookimpl(wrapper=True)
    def epoch_start(self, run: Run):
        self.states.append(run_state(run))
        self.rng_states.append(rng_states())
        return (yield)


@pytest.mark.parametrize("plugins", [
    [], ["amp:dtype=float16", "accumulate:every=2"], ["sam", "ema:decay=0.9", "clip"], ["freeze:patterns=0,until=1ep", "layerwise_lr:decay=0.5"],
    ["nan_guard:action=skip", "onecycle:max_lr=0.1"], ["split:into=auto", "early_stopping", "plateau:patience=0"], ["swa:start=50%", "throughput:peak=1"],
    ["compile:backend=eager", "amp:dtype=bfloat16"], ["prefetch", "csv"], ["channels_last", "tensorboard:every_steps=1", "torch_scheduler:cls=torch.optim.lr_scheduler:StepLR,step_size=1"],
], ids=str)
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_the_run_equals_one_without_the_plugin(net, valid, clone, same, tmp_path, plugins):
    data = TensorDataset(torch.randn(40, 6), torch.randint(0, 3, (40,)))
    other, adam, runs, recorders = clone(net), partial(torch.optim.AdamW, lr=1e-2), [], [Recorder(), Recorder()]
    before, after = StateRecorder(), StateRecorder()
    for model, finder, recorder, out in ((net, [before, "lr_finder:num_steps=30", after], recorders[0], "a"), (other, [], recorders[1], "b")):
        loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(3))
        runs.append(fit(model, cross_entropy, adam, loader, valid, epochs=2, seed=1, out=tmp_path / out, plugins=[*plugins, *finder, recorder]))
        runs.append((rng_states(), loader.generator.get_state().tolist()))
    same(net, other)
    assert recorders[0].losses == recorders[1].losses
    assert recorders[0].rates == recorders[1].rates
    assert repr(runs[1]) == repr(runs[3])
    assert before.states[0] == after.states[0]
    assert repr(before.rng_states[0]) == repr(after.rng_states[0])
    if not any("throughput" in plugin for plugin in plugins):
        assert runs[0].history == runs[2].history


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")      # on a machine with one core
@pytest.mark.parametrize("persistent", [False, True])
def test_loader_workers_draw_the_same_random_numbers(net, clone, same, sgd, persistent):
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
def test_loader_workers_of_the_copy_end_with_the_test(net, sgd, monkeypatch):
    """Otherwise garbage collection would stop them during the import of matplotlib, where they take ten seconds to end."""
    workers = []
    monkeypatch.setattr(LrFinder, "report", lambda self, run: workers.append(multiprocessing.active_children()))
    data = TensorDataset(torch.randn(24, 6), torch.randint(0, 3, (24,)))
    fit(net, cross_entropy, sgd, DataLoader(data, 8, num_workers=2), plugins=["lr_finder:num_steps=5"])
    assert workers == [[]]


@pytest.mark.parametrize("optimizer", [partial(torch.optim.LBFGS, lr=0.5, max_iter=3), partial(torch.optim.SGD, lr=torch.tensor(0.1))], ids=["lbfgs", "tensor"])
def test_the_optimizer_is_copied_with_its_whole_state(plain, batches, clone, same, optimizer):
    other = clone(plain)
    run = fit(plain, cross_entropy, optimizer, batches, seed=1, plugins=["lr_finder:num_steps=20"])
    fit(other, cross_entropy, optimizer, batches, seed=1)
    same(plain, other)
    assert len(run.hook.plugins["lr_finder"].rates) > 3


def test_an_optimizer_with_a_torch_scheduler_is_copied(plain, batches, clone, same):
    """torch's schedulers replace the method step of the optimizer, which must not be copied with it."""
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


def test_random_number_generators_are_restored_after_an_error(net, batches, sgd):
    class Fail:
        @hookimpl
        def grads_ready(self, run: Run):
            raise RuntimeError("simulated failure")

    class RngRecorder:
        @hookimpl
        def train_start(self, run: Run):
            self.rng_states = rng_states()

    recorder = RngRecorder()
    with pytest.raises(RuntimeError, match="simulated failure"):
        fit(net, cross_entropy, sgd, batches, seed=1, plugins=["lr_finder", Fail(), recorder])
    assert repr(rng_states()) == repr(recorder.rng_states)


def test_use_trains_with_the_steepest_rate(net, batches, clone, same, capsys):
    """Schedules start from it, including those with a state, and parameter groups keep their ratio."""
    recorder, plugins = Recorder(), ["layerwise_lr:decay=0.5", TorchScheduler(lr_scheduler.ExponentialLR, {"gamma": 0.5})]
    run = fit(net, cross_entropy, partial(torch.optim.SGD, lr=1e-3), batches, epochs=2, plugins=["lr_finder:use=true,start_lr=1e-3,beta=0.5", *plugins, recorder])
    steepest = run.hook.plugins["lr_finder"].steepest
    assert 1e-3 < steepest < 10
    for step, factor in ((0, 1), (7, 1), (8, 0.5), (15, 0.5)):
        assert sorted(recorder.rates[step], reverse=True) == pytest.approx([steepest * factor / 2 ** group for group in range(len(recorder.rates[0]))])
    assert f"most steeply at {steepest:.3g}" in capsys.readouterr().out


def test_without_a_schedule_use_keeps_the_rate_constant(net, batches, sgd):
    recorder = Recorder()
    run = fit(net, cross_entropy, sgd, batches, plugins=["lr_finder:use=true,start_lr=1e-3,beta=0.5", recorder])
    assert recorder.rates == [[run.hook.plugins["lr_finder"].steepest]] * 8
    assert run.history[0]["lr"] == recorder.rates[0][0]


def test_only_ends_the_run_after_the_test(net, batches, valid, clone, same, sgd):
    other = clone(net)
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=["lr_finder:only=true", "csv", "progress", "checkpoint"])
    same(net, other)
    assert (run.step, run.history, run.stop) == (0, [], "the learning-rate test is done, and only=true ends the run after it")


def test_a_resumed_run_keeps_the_rate_and_does_not_repeat_the_test(net, batches, clone, same, sgd, tmp_path, capsys):
    class Kill:
        @hookimpl
        def safe_point(self, run: Run):
            if run.attempts == 11 and not run.resume:
                raise KeyboardInterrupt

    plugins, whole = ["lr_finder:use=true,start_lr=1e-3", "cosine:by=step", "checkpoint:every_steps=2"], clone(net)
    fit(whole, cross_entropy, sgd, batches, epochs=2, plugins=plugins, seed=1, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(clone(net), cross_entropy, sgd, batches, epochs=2, plugins=[*plugins, Kill()], seed=1, out=tmp_path / "killed")
    capsys.readouterr()
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=plugins, out=tmp_path / "killed", resume=tmp_path / "killed")
    same(net, whole)
    assert capsys.readouterr().out == ""


def test_suggestions_for_known_curves():
    rates = [10.0 ** (index / 5 - 5) for index in range(30)]
    losses = [2.0] * 15 + [1.9, 1.5, 0.9, 0.6, 0.5, 0.5, 0.6, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]
    assert suggestions(rates, losses) == (rates[16], rates[19] / 10)
    assert all(map(math.isnan, suggestions(rates, [2.0 + index for index in range(30)])))
    assert all(map(math.isnan, suggestions(rates[:2], [2.0, 1.0])))
    steep = [9.0, 1.0, 1.0, *losses[3:]]                                # in the first tenth, which is left out
    assert suggestions(rates, steep) == (rates[16], rates[19] / 10)


def test_the_plot_is_written_if_matplotlib_is_installed(net, batches, sgd, tmp_path, capsys, monkeypatch):
    fit(net, cross_entropy, sgd, batches, plugins=["lr_finder:path=a/b.svg,num_steps=9"], out=tmp_path)
    text = (tmp_path / "a" / "b.svg").read_text()
    assert "learning rate" in text
    assert "plot: " in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    fit(net, cross_entropy, sgd, batches, plugins=["lr_finder:num_steps=9"], out=tmp_path)
    assert "no plot: it needs matplotlib; install it with: pip install 'loopctl[plot]'" in capsys.readouterr().out
    assert not (tmp_path / "lr_finder.png").exists()


class NotCopyable(nn.Module):
    """A model that deepcopy cannot copy, because it has a tensor that is not a leaf of the autograd graph."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.non_leaf = self.layer.weight * 2

    def forward(self, input):
        return self.layer(input)


@pytest.mark.parametrize(("plugins", "message"), [
    (["lr_finder:start_lr=1e3,end_lr=1e4,use=true"], "use=true: there is no rate to use, because the loss does not fall"),
    (["lr_finder:path=existing.png"], "existing.png exists and is not overwritten; move it, or choose another path"),
])
def test_a_test_without_a_result_and_an_existing_file_are_refused(net, batches, sgd, tmp_path, plugins, message):
    (tmp_path / "existing.png").write_text("precious")
    with pytest.raises(UsageError, match=message):
        fit(net, cross_entropy, sgd, batches, plugins=plugins, out=tmp_path)
    assert (tmp_path / "existing.png").read_text() == "precious"


def test_runs_that_cannot_be_tested_are_refused(net, batches, sgd):
    with pytest.raises(UsageError, match=r"lr_finder: the run cannot be copied to try steps on \(RuntimeError: Only Tensors created explicitly"):
        fit(NotCopyable(), cross_entropy, sgd, batches, plugins=["lr_finder"])
    with pytest.raises(UsageError, match="lr_finder: train can be read only once"):
        fit(net, cross_entropy, sgd, iter(batches), steps_per_epoch=8, plugins=["lr_finder"])
    with pytest.raises(UsageError, match="every learning rate is 0"):
        fit(net, cross_entropy, partial(torch.optim.SGD, lr=0.0), batches, plugins=["lr_finder"])
    with pytest.raises(UsageError, match="the loss is not finite at the first rate, 1e-07; lower start_lr"):
        fit(net, lambda output, target: output.mean() * math.nan, sgd, batches, plugins=["lr_finder"])


def test_steps_of_a_trial_run_do_not_advance_its_counters(net, batches, sgd):
    class TryTenSteps:
        @hookimpl(wrapper=True)
        def epoch_start(self, run: Run):
            if not run.seen and run.hook.acting["optimizer_step"]:
                with trial_run(run) as copy:
                    positions = []
                    for _ in range(10):
                        assert copy.step([0.1]).item() > 0
                        positions.append((copy.run.step, copy.run.attempts, copy.run.seen))
                assert positions == [(0, 0, 0)] * 10
                assert copy.run.model is not run.model
                assert copy.run.hook.plugins["sam"] is not run.hook.plugins["sam"]
                assert copy.run.train is run.train                     # reading a list does not change it
            return (yield)

    assert fit(net, cross_entropy, sgd, batches, plugins=["sam", TryTenSteps()]).step == 8


@pytest.mark.parametrize(("spec", "message"), [
    ("start_lr=0", "start_lr is above 0 and below end_lr, not 0.0 with end_lr=10.0"), ("num_steps=2", "num_steps is at least 3, not 2"),
    ("beta=1", "beta is from 0 to below 1, not 1.0"), ("diverge=1", "diverge is above 1, not 1.0"),
    ("use=true,only=true", "only=true ends the run before the rate can be used; leave out use or only"),
    ("path=x", "path is a .png, .svg or .pdf file, not 'x'"),
])
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(UsageError) as refused:
        compose([f"lr_finder:{spec}"])
    assert str(refused.value) == f"lr_finder: {message}"


def test_the_command_line_prints_the_summary_of_the_run_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["run", "--model", "linear", "--epochs", "1", "--out", "run", "--plugin", "lr_finder:num_steps=5"])
    assert done.exit_code == 0, done.output
    assert done.output.count(" parameters) on digits ") == 1
