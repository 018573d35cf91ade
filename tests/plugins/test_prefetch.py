"""The plugin prefetch. On a CPU, fake streams record the calls on them."""
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from loopctl import Run, fit, hookimpl
from loopctl.plugins import prefetch

cross_entropy = nn.CrossEntropyLoss()
adam = partial(torch.optim.Adam, lr=1e-2)


class Noisy(Dataset):
    """Samples that draw random numbers when they are read."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.randn(6) + index, index % 3


class Stream:
    """A fake stream that records calls. Its events have passed at the second query."""

    calls: list

    def __init__(self, name):
        self.name = name

    def wait_event(self, event):
        self.calls.append(f"{self.name} waits")

    def record_event(self):
        self.calls.append(f"{self.name} records")
        answers = iter([False, True, True, True])
        return type("Event", (), {"query": lambda self: next(answers)})()


@pytest.fixture
def calls(monkeypatch):
    """The calls on streams, in order."""
    Stream.calls = calls = []

    @contextmanager
    def stream(entered):
        calls.append(f"on {entered.name}")
        yield
        calls.append(f"off {entered.name}")

    monkeypatch.setattr(prefetch, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return calls


def loader(workers, **more):
    return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers, **more)


@pytest.mark.compares(use="prefetch", technique="batches copied to the device in advance",
                      source="the run without it", tolerance="to the bit")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("plugins", [["prefetch", "accumulate:every=3"], ["accumulate:every=3", "prefetch", "cosine:by=step"]])
def test_the_run_equals_one_without_the_plugin(net, clone, same, calls, workers, plugins):
    """Dropout and samples draw random numbers, whose order must not change."""
    without = [plugin for plugin in plugins if plugin != "prefetch"]
    one, other = clone(net), clone(net)
    expected = fit(one, cross_entropy, adam, loader(workers), epochs=3, plugins=without, seed=1)
    found = fit(other, cross_entropy, adam, loader(workers), epochs=3, plugins=plugins, seed=1)
    same(one, other)
    assert found.history == expected.history


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_uninterrupted_one(net, clone, same, calls, tmp_path, workers):
    class Kill:
        @hookimpl
        def safe_point(self, run: Run):
            if run.step == 11:
                raise KeyboardInterrupt

    plugins = ["prefetch", "checkpoint:every_steps=1"]
    whole, other = clone(net), clone(net)
    fit(whole, cross_entropy, adam, loader(workers), epochs=3, seed=1)
    with pytest.raises(KeyboardInterrupt):
        fit(clone(net), cross_entropy, adam, loader(workers), epochs=3, plugins=[*plugins, Kill()], seed=1, out=tmp_path)
    torch.rand(5)
    fit(other, cross_entropy, adam, loader(workers), epochs=3, plugins=plugins, seed=1, out=tmp_path, resume=tmp_path)
    same(whole, other)


def calls_and_hooks(calls, data, net, **more):
    """Train, and return the calls on streams together with the hooks, in order."""
    class HookRecorder:
        @hookimpl
        def before_step(self):
            calls.append("before_step")

        @hookimpl
        def after_backward(self):
            calls.append("after_backward")

        @hookimpl
        def after_step(self):
            calls.append("after_step")

    fit(net, cross_entropy, adam, data, plugins=[HookRecorder(), "prefetch"], **more)
    return calls


def test_the_next_batch_is_fetched_before_the_update(net, batches, calls):
    fetch = ["on side", "side records", "off side"]
    assert calls_and_hooks(calls, batches[:2], net) == [
        *fetch, "main waits", "before_step", "after_backward", *fetch, "after_step", "main records",
        "main waits", "before_step", "after_backward", *fetch, "after_step", "main records"]


def test_a_loader_without_workers_is_not_read_ahead(net, calls):
    fetch = ["on side", "side records", "off side"]
    data = DataLoader([(torch.randn(6), 1)] * 4, batch_size=2)
    assert calls_and_hooks(calls, data, net, max_steps=1) == [
        *fetch, "main waits", "before_step", "after_backward", "after_step"]


def test_a_loader_error_is_raised_when_its_batch_is_due(net, batches, calls):
    """A run that ends before that batch does not raise it."""
    class Broken(list):
        def __iter__(self):
            yield from batches[:2]
            raise OSError("simulated failure")

    fit(net, cross_entropy, adam, Broken(batches), plugins=["prefetch"], max_steps=2)
    steps = []

    class Recorder:
        @hookimpl
        def after_step(self, run: Run):
            steps.append(run.step)

    with pytest.raises(OSError, match="simulated failure") as error:
        fit(net, cross_entropy, adam, Broken(batches), plugins=["prefetch", Recorder()])
    assert len(steps) == 2
    assert error.value.__notes__ == ["raised by train in batch 3, epoch 1"]


def test_batches_that_the_gpu_may_still_read_are_kept(net, batches, calls):
    """Until the event after their step has passed, here at the second query."""
    from loopctl.plugins.prefetch import Prefetch

    plugin, in_use = Prefetch(), []

    class Recorder:
        @hookimpl
        def before_step(self):
            in_use.append([group for group, _ in plugin.in_use])

    fit(net, cross_entropy, adam, batches[:4], plugins=[plugin, Recorder()])
    assert [[group[0] is batches[i] for group, i in zip(groups, (step - 1,), strict=True)] if groups else []
            for step, groups in enumerate(in_use)] == [[], [True], [True], [True]]
    assert not plugin.in_use
    assert plugin.groups is None


def test_counting_the_steps_of_an_epoch_during_a_step_changes_nothing(net, clone, same, batches, calls):
    class CountSteps:
        @hookimpl
        def after_backward(self, run: Run):
            run._plan = None
            assert run.plan() == (8, 8)

    one, other = clone(net), clone(net)
    fit(one, cross_entropy, adam, batches, seed=1)
    fit(other, cross_entropy, adam, batches, plugins=["prefetch", CountSteps()], seed=1)
    same(one, other)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_on_cuda_the_run_equals_one_without_the_plugin(net, clone, same, workers):
    one, other = clone(net), clone(net)
    plugins = ["accumulate:every=2", "amp:dtype=float16", "clip"]
    for model, more in ((one, []), (other, ["prefetch"])):
        fit(model, cross_entropy, adam, loader(workers, pin_memory=True), epochs=10, plugins=[*plugins, *more],
            device="cuda", seed=1)
    same(one, other)
