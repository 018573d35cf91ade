"""Prefetching: the same batches, only sooner. Streams are played by objects that note what is asked of them."""
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
    """Samples that draw random numbers where they are read."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.randn(6) + index, index % 3


class Stream:
    """Notes what happens on it; what is recorded is done at the second look."""

    noted: list

    def __init__(self, name):
        self.name = name

    def wait_event(self, event):
        self.noted.append(f"{self.name} waits")

    def record_event(self):
        self.noted.append(f"{self.name} records")
        looks = iter([False, True, True, True])
        return type("Event", (), {"query": lambda self: next(looks)})()


@pytest.fixture
def noted(monkeypatch):
    """What happens on the streams, in order."""
    Stream.noted = noted = []

    @contextmanager
    def stream(one):
        noted.append(f"on {one.name}")
        yield
        noted.append(f"off {one.name}")

    monkeypatch.setattr(prefetch, "STREAMS", ("cpu",))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return noted


def loader(workers, **more):
    return DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers, **more)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("plugins", [["prefetch", "accumulate:every=3"], ["accumulate:every=3", "prefetch", "cosine:by=step"]])
def test_it_changes_nothing(net, clone, same, noted, workers, plugins):
    """Dropout and samples draw from the same random numbers, whose order stays."""
    without = [plugin for plugin in plugins if plugin != "prefetch"]
    one, other = clone(net), clone(net)
    expected = fit(one, cross_entropy, adam, loader(workers), epochs=3, plugins=without, seed=1)
    found = fit(other, cross_entropy, adam, loader(workers), epochs=3, plugins=plugins, seed=1)
    same(one, other)
    assert found.history == expected.history


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_was_killed_goes_on_exactly(net, clone, same, noted, tmp_path, workers):
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


def steps(noted, data, net, **more):
    class Note:
        @hookimpl
        def before_step(self):
            noted.append("step")

        @hookimpl
        def after_backward(self):
            noted.append("backward")

        @hookimpl
        def after_step(self):
            noted.append("stepped")

    fit(net, cross_entropy, adam, data, plugins=[Note(), "prefetch"], **more)
    return noted


def test_the_next_batch_is_on_its_way_before_the_update(net, batches, noted):
    fetch = ["on side", "side records", "off side"]
    assert steps(noted, batches[:2], net) == [
        *fetch, "main waits", "step", "backward", *fetch, "stepped", "main records",
        "main waits", "step", "backward", *fetch, "stepped", "main records"]


def test_what_draws_random_numbers_is_read_in_its_turn(net, noted):
    fetch = ["on side", "side records", "off side"]
    data = DataLoader([(torch.randn(6), 1)] * 4, batch_size=2)
    assert steps(noted, data, net, max_steps=1) == [
        *fetch, "main waits", "step", "backward", "stepped"]


def test_an_error_comes_when_its_batch_is_due(net, batches, noted):
    """And not at all where the run ends before."""
    class Broken(list):
        def __iter__(self):
            yield from batches[:2]
            raise OSError("the disk is gone")

    fit(net, cross_entropy, adam, Broken(batches), plugins=["prefetch"], max_steps=2)
    done = []

    class Count:
        @hookimpl
        def after_step(self, run: Run):
            done.append(run.step)

    with pytest.raises(OSError, match="the disk is gone") as error:
        fit(net, cross_entropy, adam, Broken(batches), plugins=["prefetch", Count()])
    assert len(done) == 2
    assert error.value.__notes__ == ["raised by train in batch 3, epoch 1"]


def test_what_the_gpu_may_still_read_is_kept(net, batches, noted):
    """Until the event after its step has passed, which here the second look finds."""
    from loopctl.plugins.prefetch import Prefetch

    plugin, kept = Prefetch(), []

    class Look:
        @hookimpl
        def before_step(self):
            kept.append([group for group, _ in plugin.leaving])

    fit(net, cross_entropy, adam, batches[:4], plugins=[plugin, Look()])
    assert [[group[0] is batches[i] for group, i in zip(groups, (step - 1,), strict=True)] if groups else []
            for step, groups in enumerate(kept)] == [[], [True], [True], [True]]
    assert not plugin.leaving
    assert plugin.groups is None


def test_counting_steps_within_an_epoch_disturbs_nothing(net, clone, same, batches, noted):
    class Plans:
        @hookimpl
        def after_backward(self, run: Run):
            run._plan = None
            assert run.plan() == (8, 8)

    one, other = clone(net), clone(net)
    fit(one, cross_entropy, adam, batches, seed=1)
    fit(other, cross_entropy, adam, batches, plugins=["prefetch", Plans()], seed=1)
    same(one, other)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_on_cuda_bit_for_bit(net, clone, same, workers):
    one, other = clone(net), clone(net)
    plugins = ["accumulate:every=2", "amp:dtype=float16", "clip"]
    for model, more in ((one, []), (other, ["prefetch"])):
        fit(model, cross_entropy, adam, loader(workers, pin_memory=True), epochs=10, plugins=[*plugins, *more],
            device="cuda", seed=1)
    same(one, other)
