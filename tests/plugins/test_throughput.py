"""throughput against a clock that the test sets, FLOPs counted by hand, and a loop by hand that knows nothing of it."""
import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.composition.compose import compose
from loopctl.plugins import throughput
from loopctl.plugins.throughput import Throughput, compiled, memory, peak_of

cross_entropy = nn.CrossEntropyLoss()
# Of nn.Linear(6, 16) and nn.Linear(16, 3), per sample, two per multiply-add: forward, then the gradients of both weights
# and of the second layer's input; nobody asks for the gradient of the first one's.
FLOPS = 2 * ((6 * 16 + 16 * 3) + (6 * 16 + 16 * 3) + 16 * 3)


@pytest.fixture
def clock(monkeypatch):
    """The clock of the plugin, which only the test moves."""
    clock = SimpleNamespace(time=100.0)
    monkeypatch.setattr(throughput, "perf_counter", lambda: clock.time)
    return clock


class Slow(list):
    """Batches that take a second each."""

    def __init__(self, batches, clock):
        super().__init__(batches)
        self.clock = clock

    def __iter__(self):
        for batch in super().__iter__():
            self.clock.time += 1
            yield batch


class Work:
    """A step takes 3 s, what comes after it 5 s, and evaluation 1000."""

    def __init__(self, clock):
        self.clock = clock

    @hookimpl
    def before_step(self):
        self.clock.time += 3

    @hookimpl
    def safe_point(self, run: Run):
        self.clock.time += 5 if run.seen_in_epoch else 1000

    @hookimpl(wrapper=True)
    def evaluate(self):
        self.clock.time += 1000
        return (yield)


def test_bit_for_bit_by_hand(net, batches, valid, clone, same, sgd):
    other = clone(net)
    fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=["throughput:peak=1"], seed=1)
    here = torch.get_rng_state()
    torch.manual_seed(1)
    optimizer = sgd(other.parameters())
    for _ in range(2):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(other(input), target).backward()
            optimizer.step()
    same(net, other)
    assert torch.equal(here, torch.get_rng_state())


class Everything(nn.Module):
    """Layers that a count might take another way through torch."""

    def __init__(self):
        super().__init__()
        self.gru, self.attention = nn.GRU(6, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.convolution, self.drop, self.out = nn.Conv1d(8, 8, 3, padding=1), nn.Dropout(), nn.Linear(8, 3)

    def forward(self, x):
        x = self.gru(x.unsqueeze(1).repeat(1, 4, 1))[0]
        x = self.drop(x + nn.functional.scaled_dot_product_attention(x, x, x) + self.attention(x, x, x)[0])
        return self.out(self.convolution(x.transpose(1, 2)).mean(2))


@pytest.mark.parametrize("plugins", [[], ["amp:dtype=bfloat16"], ["amp:dtype=float16"], ["sam"]], ids=str)
def test_the_count_changes_no_bit(batches, clone, same, sgd, plugins):
    torch.manual_seed(0)
    model = Everything()
    other = clone(model)
    run = fit(model, cross_entropy, sgd, batches, plugins=[*plugins, "throughput:peak=1"], seed=1)
    fit(other, cross_entropy, sgd, batches, plugins=plugins, seed=1)
    same(model, other)
    assert run.metrics["mfu"] > 0


@pytest.mark.parametrize(("plugins", "options"), [
    ([], {}), (["accumulate:every=3"], {}), (["split:into=2"], {}), ([], {"eval_every": 3}), ([], {"eval_every": 4})], ids=str)
def test_speed_and_the_wait_for_data(plain, batches, valid, sgd, clock, plugins, options):
    """59 samples in 8 batches; what was not evaluation took 8 s for data, and 3 s and 5 s in and after every step."""
    plugins = [Throughput(peak=2), *plugins, Work(clock)]
    run = fit(plain, cross_entropy, sgd, Slow(batches, clock), valid, epochs=2, plugins=plugins, **options)
    seconds = 8 + 8 * run.planned_steps / 2
    for row in run.history:
        assert row["samples_per_s"] == 59 / seconds
        assert row["data_wait"] == 8 / seconds
        assert row["mfu"] == pytest.approx(FLOPS * 59 / seconds / 2e12, rel=1e-12)


def test_the_wait_for_a_data_set_that_sleeps(plain, batches, sgd):
    class Sleeps(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.02)
                yield batch

    row, = fit(plain, cross_entropy, sgd, Sleeps(batches), plugins=["throughput"]).history
    waited = row["data_wait"] * 59 / row["samples_per_s"]           # in seconds
    assert waited >= 8 * 0.02
    assert 0.3 < row["data_wait"] < 1


def test_flops_of_a_sample_are_those_of_the_first_step(plain, batches, sgd, clock):
    plain[0].requires_grad_(False)                                  # then only the last weight has a gradient
    plugin = Throughput(peak=1)
    fit(plain, cross_entropy, sgd, batches, plugins=[plugin, "accumulate:every=2", Work(clock)])
    assert plugin.per_sample == 2 * (6 * 16 + 16 * 3 + 16 * 3)


def test_one_step_is_counted_and_no_other(plain, batches, sgd):
    class Look:
        modes = []

        @hookimpl
        def after_backward(self):
            self.modes.append(_get_current_dispatch_mode())

    fit(plain, cross_entropy, sgd, batches, plugins=["throughput:peak=1", Look()])
    assert Look.modes[0] is not None
    assert Look.modes[1:] == [None] * 7


def test_flops_that_are_given_are_not_counted(plain, batches, sgd, clock, monkeypatch):
    monkeypatch.setattr(throughput, "FlopCounterMode", None)
    run = fit(plain, cross_entropy, sgd, batches, plugins=["throughput:peak=3,flops=6e12", Work(clock)])
    assert run.metrics["mfu"] == pytest.approx(2 * run.metrics["samples_per_s"])


def test_without_a_peak_nothing_is_counted(plain, batches, sgd, monkeypatch):
    monkeypatch.setattr(throughput, "FlopCounterMode", None)
    run = fit(plain, cross_entropy, sgd, batches, plugins=["throughput"])
    assert list(run.history[0]) == ["epoch", "step", "train_loss", "samples_per_s", "data_wait", "memory_gb", "lr"]


def test_tokens_that_are_counted_on_the_device(plain, batches, sgd, clock):
    class Tokens:
        @hookimpl
        def batch_weight(self, batch):
            return torch.tensor(10.0) * len(batch[0])

    run = fit(plain, cross_entropy, sgd, batches, plugins=["throughput:unit=tokens,peak=1", Tokens(), Work(clock)])
    assert run.metrics["tokens_per_s"] == 590 / 64
    assert run.metrics["mfu"] == pytest.approx(FLOPS * 59 / 64 / 1e12, rel=1e-6)
    assert "samples_per_s" not in run.metrics


def test_others_know_the_metrics_before_there_are_any(plain, batches, sgd):
    plugins = ["early_stopping:monitor=mfu,mode=max", "throughput:peak=1"]
    run = fit(plain, cross_entropy, sgd, batches, plugins=plugins)
    assert run.hook.plugins["early_stopping"].watch.best == run.metrics["mfu"]


def compiled_model():
    class Compiled:
        @hookimpl
        def wrap_model(self, run: Run):
            def network(input):
                return run.model(input)
            network._orig_mod = run.model
            run.network = network
    return Compiled()


def test_a_compiled_model_is_not_counted(plain, batches, sgd, caplog, monkeypatch):
    monkeypatch.setattr(throughput, "FlopCounterMode", None)
    run = fit(plain, cross_entropy, sgd, batches, plugins=["throughput:peak=1", compiled_model()])
    assert math.isnan(run.metrics["mfu"])
    assert caplog.messages == ["throughput: mfu is left out, as a count would run a step of the compiled model "
                               "uncompiled; pass flops=... of one sample"]
    run = fit(plain, cross_entropy, sgd, batches, plugins=["throughput:peak=1,flops=1", compiled_model()])
    assert run.metrics["mfu"] > 0
    assert len(caplog.messages) == 1


@pytest.mark.filterwarnings("ignore")                   # torch's own, where it imports its compiler
def test_what_torch_compiles_is_known(plain):
    def run(network, model):
        return SimpleNamespace(network=network, model=model)

    assert not compiled(run(plain, plain))
    assert compiled(run(torch.compile(plain, backend="eager"), plain))
    assert compiled(run(torch.compile(lambda x: plain(x), backend="eager"), plain))
    plain[0].compile(backend="eager")
    assert compiled(run(plain, plain))


class Fail:
    """Ends the run like an accident would, once, where `when(run)` is true."""

    def __init__(self, when):
        self.when = when

    @hookimpl
    def before_step(self, run: Run):
        if self.when(run):
            raise RuntimeError("an accident")

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run):
        if self.when(run):
            raise RuntimeError("an accident")
        return (yield)


def test_an_accident_in_the_step_that_is_counted_leaves_nothing_on(plain, batches, sgd):
    with pytest.raises(RuntimeError, match="an accident"):
        fit(plain, cross_entropy, sgd, batches, plugins=["throughput:peak=1", Fail(lambda run: True)])
    assert _get_current_dispatch_mode() is None


def test_a_run_that_goes_on(net, batches, valid, clone, same, sgd, clock, tmp_path):
    whole, plugins = clone(net), ["throughput:peak=1", "checkpoint:every_steps=1", Work(clock)]
    fit(whole, cross_entropy, sgd, batches, valid, epochs=2, plugins=plugins, seed=1, out=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(clone(net), cross_entropy, sgd, batches, valid, epochs=2, seed=1, out=tmp_path,
            plugins=[*plugins, Fail(lambda run: run.attempts == 3)])
    run = fit(net, cross_entropy, sgd, Slow(batches, clock), valid, epochs=2, plugins=plugins,
              resume=tmp_path, out=tmp_path)
    same(net, whole)
    # The list is read again up to where it goes on, which takes 3 s; then there are 35 samples in 5 steps.
    assert [row["samples_per_s"] for row in run.history] == [35 / (3 + 5 * 9), 59 / (8 * 9)]
    assert run.history[0]["data_wait"] == 8 / 48


def test_a_run_that_goes_on_where_nothing_is_left_of_the_epoch(plain, batches, sgd, tmp_path):
    plugins = ["throughput", "checkpoint:every_steps=1"]
    with pytest.raises(RuntimeError):
        fit(plain, cross_entropy, sgd, batches, plugins=[*plugins, Fail(lambda run: run.attempts == 8)], out=tmp_path)
    run = fit(plain, cross_entropy, sgd, batches, plugins=plugins, resume=tmp_path, out=tmp_path)
    assert math.isnan(run.history[0]["samples_per_s"])


def test_memory():
    before = memory(torch.device("cpu"))
    much = torch.ones(2**26)                                       # 256 MB, all of them touched
    assert 2**26 < before < memory(torch.device("cpu")) + 1 < 2**40
    assert memory(torch.device("cpu")) > much.numel() * 4


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA A100-SXM4-80GB", 312), ("A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("Tesla V100-SXM2-16GB", 125), ("Tesla T4", 65), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA A10G", None),
])
def test_peaks(name, peak):
    assert peak_of(name) == peak


@pytest.mark.parametrize(("spec", "message"), [
    ("throughput:peak=0", "throughput: peak is above 0, not 0.0"), ("throughput:flops=-1", "throughput: flops is above 0, not -1.0")])
def test_wrong_options(spec, message):
    with pytest.raises(UsageError) as refused:
        compose([spec])
    assert str(refused.value) == message


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_no_step_waits_for_it(plain, batches, valid, sgd):
    class Tokens:
        @hookimpl
        def batch_weight(self, batch):
            return (batch[1] >= 0).sum()

    class Watch:
        @hookimpl
        def before_step(self):
            torch.cuda.set_sync_debug_mode("error")

        @hookimpl
        def after_step(self):
            torch.cuda.set_sync_debug_mode("default")

    torch.ones(2**28, device="cuda")                                # before the run, and none of its memory
    try:
        run = fit(plain, cross_entropy, sgd, batches, valid, epochs=2, device="cuda",
                  plugins=[Watch(), "throughput:peak=1,unit=tokens", Tokens()])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.metrics["memory_gb"] == torch.cuda.max_memory_allocated() / 2**30 < 1
    assert run.metrics["mfu"] > 0
    assert run.metrics["tokens_per_s"] > 0
