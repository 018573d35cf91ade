"""The plugin throughput, tested with a fake clock, FLOPs counted by hand, and a plain loop."""
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
from loopctl.plugins.throughput import Throughput, is_compiled, peak_memory, peak_of
from tests.conftest import sync_debug_mode

cross_entropy = nn.CrossEntropyLoss()
# Of nn.Linear(6, 16) and nn.Linear(16, 3), per sample, two per multiply-add: the forward pass, the gradients of both
# weights, and the gradient of the second layer's input. The first layer's input needs no gradient.
FLOPS = 2 * ((6 * 16 + 16 * 3) + (6 * 16 + 16 * 3) + 16 * 3)


@pytest.fixture
def clock(monkeypatch):
    """The clock of the plugin, which only the test advances."""
    clock = SimpleNamespace(time=100.0)
    monkeypatch.setattr(throughput, "perf_counter", lambda: clock.time)
    return clock


class SlowData(list):
    """Batches that take a second each to load."""

    def __init__(self, batches, clock):
        super().__init__(batches)
        self.clock = clock

    def __iter__(self):
        for batch in super().__iter__():
            self.clock.time += 1
            yield batch


class SlowSteps:
    """A step takes 3 s, the time after it 5 s, and evaluation 1000 s."""

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


def test_equals_a_plain_loop_to_the_bit(net, batches, valid, clone, same, sgd):
    other = clone(net)
    fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=["throughput:peak=1"], seed=1)
    rng_state = torch.get_rng_state()
    torch.manual_seed(1)
    optimizer = sgd(other.parameters())
    for _ in range(2):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(other(input), target).backward()
            optimizer.step()
    same(net, other)
    assert torch.equal(rng_state, torch.get_rng_state())


class ManyLayers(nn.Module):
    """Layers that torch might compute with other kernels while it counts FLOPs."""

    def __init__(self):
        super().__init__()
        self.gru, self.attention = nn.GRU(6, 8, batch_first=True), nn.MultiheadAttention(8, 2, batch_first=True)
        self.convolution, self.drop, self.out = nn.Conv1d(8, 8, 3, padding=1), nn.Dropout(), nn.Linear(8, 3)

    def forward(self, x):
        x = self.gru(x.unsqueeze(1).repeat(1, 4, 1))[0]
        x = self.drop(x + nn.functional.scaled_dot_product_attention(x, x, x) + self.attention(x, x, x)[0])
        return self.out(self.convolution(x.transpose(1, 2)).mean(2))


@pytest.mark.parametrize("plugins", [[], ["amp:dtype=bfloat16"], ["amp:dtype=float16"], ["sam"]], ids=str)
def test_counting_flops_changes_no_bit(batches, clone, same, sgd, plugins):
    torch.manual_seed(0)
    model = ManyLayers()
    other = clone(model)
    run = fit(model, cross_entropy, sgd, batches, plugins=[*plugins, "throughput:peak=1"], seed=1)
    fit(other, cross_entropy, sgd, batches, plugins=plugins, seed=1)
    same(model, other)
    assert run.metrics["mfu"] > 0


@pytest.mark.parametrize(("plugins", "options"), [
    ([], {}), (["accumulate:every=3"], {}), (["split:into=2"], {}), ([], {"eval_every": 3}), ([], {"eval_every": 4})], ids=str)
def test_speed_data_wait_and_mfu(plain, batches, valid, sgd, clock, plugins, options):
    """59 samples in 8 batches. Without evaluation, an epoch takes 8 s for data, and 3 s + 5 s for every step."""
    plugins = [Throughput(peak=2), *plugins, SlowSteps(clock)]
    run = fit(plain, cross_entropy, sgd, SlowData(batches, clock), valid, epochs=2, plugins=plugins, **options)
    seconds = 8 + 8 * run.planned_steps / 2
    for row in [row for row in run.history if row["epoch"] in (1, 2)]:
        assert row["samples_per_s"] == 59 / seconds
        assert row["data_wait"] == 8 / seconds
        assert row["mfu"] == pytest.approx(FLOPS * 59 / seconds / 2e12, rel=1e-12)


def test_data_wait_of_a_data_set_that_sleeps(plain, batches, sgd):
    class SleepingData(list):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.02)
                yield batch

    row, = fit(plain, cross_entropy, sgd, SleepingData(batches), plugins=["throughput"]).history
    waited = row["data_wait"] * 59 / row["samples_per_s"]           # in seconds
    assert waited >= 8 * 0.02
    assert 0 < row["data_wait"] < 1


@pytest.mark.compares(use="throughput:peak", technique="operations of a sample, for the utilization of arXiv:2204.02311",
                      source="the formula by hand", tolerance="to the bit")
def test_flops_of_a_sample_are_counted_in_the_first_step(plain, batches, sgd, clock):
    plain[0].requires_grad_(False)                                  # so only the last weight has a gradient
    plugin = Throughput(peak=1)
    fit(plain, cross_entropy, sgd, batches, plugins=[plugin, "accumulate:every=2", SlowSteps(clock)])
    assert plugin.per_sample == 2 * (6 * 16 + 16 * 3 + 16 * 3)


def test_flops_are_counted_only_in_the_first_step(plain, batches, sgd):
    class Recorder:
        modes = []

        @hookimpl
        def after_backward(self):
            self.modes.append(_get_current_dispatch_mode())

    fit(plain, cross_entropy, sgd, batches, plugins=["throughput:peak=1", Recorder()])
    assert Recorder.modes[0] is not None
    assert Recorder.modes[1:] == [None] * 7


def test_flops_given_as_an_option_are_not_counted(plain, batches, sgd, clock, monkeypatch):
    monkeypatch.setattr(throughput, "FlopCounterMode", None)
    run = fit(plain, cross_entropy, sgd, batches, plugins=["throughput:peak=3,flops=6e12", SlowSteps(clock)])
    assert run.metrics["mfu"] == pytest.approx(2 * run.metrics["samples_per_s"])


def test_without_a_peak_flops_are_not_counted(plain, batches, sgd, monkeypatch):
    monkeypatch.setattr(throughput, "FlopCounterMode", None)
    run = fit(plain, cross_entropy, sgd, batches, plugins=["throughput"])
    assert list(run.history[0]) == ["epoch", "step", "train_loss", "samples_per_s", "data_wait", "memory_gb", "lr"]


def test_tokens_counted_on_the_device(plain, batches, sgd, clock):
    class Tokens:
        @hookimpl
        def batch_weight(self, batch):
            return torch.tensor(10.0) * len(batch[0])

    run = fit(plain, cross_entropy, sgd, batches, plugins=["throughput:unit=tokens,peak=1", Tokens(), SlowSteps(clock)])
    assert run.metrics["tokens_per_s"] == 590 / 64
    assert run.metrics["mfu"] == pytest.approx(FLOPS * 59 / 64 / 1e12, rel=1e-6)
    assert "samples_per_s" not in run.metrics


def test_other_plugins_can_monitor_its_metrics(plain, batches, sgd):
    plugins = ["early_stopping:monitor=mfu,mode=max", "throughput:peak=1"]
    run = fit(plain, cross_entropy, sgd, batches, plugins=plugins)
    assert run.hook.plugins["early_stopping"].watch.best == run.metrics["mfu"]


def fake_compile():
    """A plugin that marks the network as compiled."""
    class FakeCompile:
        @hookimpl
        def wrap_model(self, run: Run):
            def network(input):
                return run.model(input)
            network._orig_mod = run.model
            run.network = network
    return FakeCompile()


def test_flops_of_a_compiled_model_are_not_counted(plain, batches, sgd, caplog, monkeypatch):
    monkeypatch.setattr(throughput, "FlopCounterMode", None)
    run = fit(plain, cross_entropy, sgd, batches, plugins=["throughput:peak=1", fake_compile()])
    assert math.isnan(run.metrics["mfu"])
    assert caplog.messages == ["throughput: mfu is left out, because counting FLOPs would run a step of the compiled model "
                               "uncompiled; pass flops=... of one sample"]
    run = fit(plain, cross_entropy, sgd, batches, plugins=["throughput:peak=1,flops=1", fake_compile()])
    assert run.metrics["mfu"] > 0
    assert len(caplog.messages) == 1


@pytest.mark.filterwarnings("ignore")                   # from the import of torch's compiler
def test_compiled_models_are_recognized(plain):
    def run(network, model):
        return SimpleNamespace(network=network, model=model)

    assert not is_compiled(run(plain, plain))
    assert is_compiled(run(torch.compile(plain, backend="eager"), plain))
    assert is_compiled(run(torch.compile(lambda x: plain(x), backend="eager"), plain))
    plain[0].compile(backend="eager")
    assert is_compiled(run(plain, plain))


class Fail:
    """Raises an error when `when(run)` is true."""

    def __init__(self, when):
        self.when = when

    @hookimpl
    def before_step(self, run: Run):
        if self.when(run):
            raise RuntimeError("simulated failure")

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run):
        if self.when(run):
            raise RuntimeError("simulated failure")
        return (yield)


def test_counting_stops_after_an_error_in_the_counted_step(plain, batches, sgd):
    with pytest.raises(RuntimeError, match="simulated failure"):
        fit(plain, cross_entropy, sgd, batches, plugins=["throughput:peak=1", Fail(lambda run: True)])
    assert _get_current_dispatch_mode() is None


def test_a_resumed_run_measures_the_steps_since_the_resume(net, batches, valid, clone, same, sgd, clock, tmp_path):
    whole, plugins = clone(net), ["throughput:peak=1", "checkpoint:every_steps=1", SlowSteps(clock)]
    fit(whole, cross_entropy, sgd, batches, valid, epochs=2, plugins=plugins, seed=1, out=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        fit(clone(net), cross_entropy, sgd, batches, valid, epochs=2, seed=1, out=tmp_path,
            plugins=[*plugins, Fail(lambda run: run.attempts == 3)])
    run = fit(net, cross_entropy, sgd, SlowData(batches, clock), valid, epochs=2, plugins=plugins,
              resume=tmp_path, out=tmp_path)
    same(net, whole)
    # Reading the list again up to the resume takes 3 s; then there are 35 samples in 5 steps.
    assert [row["samples_per_s"] for row in run.history] == [35 / (3 + 5 * 9), 59 / (8 * 9)]
    assert run.history[0]["data_wait"] == 8 / 48


def test_a_run_resumed_at_the_end_of_an_epoch_reports_nan(plain, batches, sgd, tmp_path):
    plugins = ["throughput", "checkpoint:every_steps=1"]
    with pytest.raises(RuntimeError):
        fit(plain, cross_entropy, sgd, batches, plugins=[*plugins, Fail(lambda run: run.attempts == 8)], out=tmp_path)
    run = fit(plain, cross_entropy, sgd, batches, plugins=plugins, resume=tmp_path, out=tmp_path)
    assert math.isnan(run.history[0]["samples_per_s"])


def test_peak_memory_of_the_process():
    before = peak_memory(torch.device("cpu"))
    large = torch.ones(2**26)                                      # 256 MB, all written to
    assert 2**26 < before < peak_memory(torch.device("cpu")) + 1 < 2**40
    assert peak_memory(torch.device("cpu")) > large.numel() * 4


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA A100-SXM4-80GB", 312), ("A100-SXM4-40GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("Tesla V100-SXM2-16GB", 125), ("Tesla T4", 65), ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("NVIDIA A10G", None),
])
def test_peak_by_the_name_of_the_gpu(name, peak):
    assert peak_of(name) == peak


@pytest.mark.parametrize(("spec", "message"), [
    ("throughput:peak=0", "throughput: peak is above 0, not 0.0"), ("throughput:flops=-1", "throughput: flops is above 0, not -1.0")])
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(UsageError) as refused:
        compose([spec])
    assert str(refused.value) == message


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_no_step_synchronizes(plain, batches, valid, sgd):
    class Tokens:
        @hookimpl
        def batch_weight(self, batch):
            return (batch[1] >= 0).sum()

    class ForbidSync:
        @hookimpl
        def before_step(self):
            set_mode("error")

        @hookimpl
        def after_step(self):
            set_mode("default")

    torch.ones(2**28, device="cuda")                                # allocated before the run, so not part of its memory
    with sync_debug_mode() as set_mode:
        run = fit(plain, cross_entropy, sgd, batches, valid, epochs=2, device="cuda",
                  plugins=[ForbidSync(), "throughput:peak=1,unit=tokens", Tokens()])
    assert run.metrics["memory_gb"] == torch.cuda.max_memory_allocated() / 2**30 < 1
    assert run.metrics["mfu"] > 0
    assert run.metrics["tokens_per_s"] > 0
