"""The plugin max_time, and `run.leave`: the run is left at a safe point and resumes to the same bits."""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint.atomic_files import save_checkpoint
from loopctl.checkpoint.finding import find_checkpoint
from loopctl.optim.duration import parse_time
from loopctl.plugins import checkpoint, max_time

PLUGINS = ["checkpoint", "accumulate:every=2", "ema:decay=0.9", "warmup:length=4", "cosine", "clip:max_norm=0.5"]


@pytest.fixture
def clock(monkeypatch):
    """The clock of max_time: `clock.now` is its time in seconds."""
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(max_time, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


class Tick:
    """Every step takes a minute, and every evaluation ten."""

    observer_only = True

    def __init__(self, clock):
        self.clock, self.ended = clock, 0

    @hookimpl
    def before_step(self):
        self.clock.now += 60

    @hookimpl
    def after_evaluate(self):
        self.clock.now += 600

    @hookimpl
    def train_end(self):
        self.ended += 1


def train(out, clock, *plugins, **settings):
    """Three epochs of five steps of two batches, shuffled, with dropout; evaluated every three steps too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    inputs = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, torch.arange(80) % 3)
    tick = Tick(clock)
    run = fit(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1, momentum=0.9), DataLoader(data, 8, shuffle=True),
              DataLoader(data, 20), epochs=3, eval_every=3, seed=1, out=out, plugins=[*PLUGINS, tick, *plugins], **settings)
    assert tick.ended == (not run.leaving)
    return run


# Minutes, and the step after which that time is over: steps take a minute, the evaluations after 3, 5, 6, 9, 10, 12 and 15 steps ten.
@pytest.mark.parametrize(("minutes", "step"), [(1, 1), (3, 3), (4, 4), (15, 5), (16, 5), (25, 5), (26, 6), (60, 10), (75, 15)])
def test_a_run_that_is_left_resumes_to_the_same_bits(minutes, step, clock, tmp_path, same):
    whole = train(tmp_path / "whole", clock)
    left = train(tmp_path / "a", clock, f"max_time:limit={minutes}m")
    assert (left.attempts, left.leaving, left.leave, left.stop) == (step, True, f"the time of {minutes}m is over", "")
    file, saved = find_checkpoint(tmp_path / "a")
    assert saved["counters"]["attempts"] == step
    assert left.last_checkpoint == file
    done = train(tmp_path / "a", clock, resume=tmp_path / "a")
    assert not done.leaving
    same(done.model, whole.model)
    assert repr(done.history) == repr(whole.history)


def test_a_resumed_run_has_the_full_time_again(clock, tmp_path, same):
    whole, steps = train(tmp_path / "whole", clock), []
    for _ in range(6):
        done = train(tmp_path / "a", clock, "max_time:limit=4m", resume=tmp_path / "a" if steps else None)
        steps.append(done.attempts)
    assert steps == [4, 5, 7, 10, 10, 13]           # twice an evaluation at the end of an epoch takes the rest of the time
    done = train(tmp_path / "a", clock, "max_time:limit=1d", resume=tmp_path / "a")
    assert not done.leaving
    same(done.model, whole.model)


def test_a_time_that_is_over_at_the_end_of_the_run_changes_nothing(clock, tmp_path, same):
    whole = train(tmp_path / "whole", clock)
    done = train(tmp_path / "a", clock, "max_time:limit=90m")      # the last evaluation takes it
    assert (done.epoch, done.leaving) == (3, False)
    same(done.model, whole.model)


def test_without_checkpoint_the_run_ends_all_the_same(plain, batches, sgd, clock):
    run = fit(plain, nn.CrossEntropyLoss(), sgd, batches, plugins=["max_time:limit=5m", Tick(clock)])
    assert (run.attempts, run.epoch, run.history) == (5, 0, [])
    assert "left: the time of 5m is over" in repr(run)


def test_any_plugin_may_leave_the_run_at_any_moment(tmp_path, clock, same):
    class Leave:
        observer_only = True

        @hookimpl
        def grads_ready(self, run: Run):
            if run.attempts == 6:
                run.leave = "enough"

    whole, left = train(tmp_path / "whole", clock), train(tmp_path / "a", clock, Leave())
    assert (left.attempts, left.leave) == (7, "enough")
    same(train(tmp_path / "a", clock, resume=tmp_path / "a").model, whole.model)


def test_a_run_whose_checkpoint_cannot_be_written_is_left_too(clock, tmp_path, monkeypatch, caplog):
    def full(content, file):
        if file.name == "step-00000007.pt":
            raise OSError(28, "No space left on device")
        save_checkpoint(content, file)
    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    run = train(tmp_path, clock, "max_time:limit=37m")
    assert (run.attempts, run.leaving, run.last_checkpoint.name) == (7, True, "step-00000005.pt")
    assert "step-00000007.pt cannot be written (No space left on device)" in caplog.text


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("1.5d", 129600), ("1d2h3m4s", 93784)])
def test_times_are_read(text, seconds):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["2", "", "h", "0s", "-1h", "1m1h", "1 h", "1e3s", "2h 3m", "inf", "9999999d", "\u0662h"])
def test_other_text_is_refused(text, plain, batches, sgd):
    with pytest.raises(UsageError, match=r"^max_time: limit takes a time, not .*: write 90s, 30m, 2h, 1h30m or 1d$"):
        fit(plain, nn.CrossEntropyLoss(), sgd, batches, plugins=[f'max_time:limit="{text}"'])
    with pytest.raises(ValueError, match="limit takes a time"):
        max_time.MaxTime(text)
