"""Run: progress, planned steps, and durations converted to epochs and steps."""
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, fit, hookimpl
from loopctl.composition.compose import compose
from loopctl.data.batch import chunked
from loopctl.loop import DEFAULTS
from loopctl.optim.duration import parse_duration


def make(batches=10, every=1, **settings):
    plugins = [f"accumulate:every={every}"] if every > 1 else []
    return Run(None, None, None, range(batches), hook=compose(plugins, DEFAULTS), **{"epochs": 4, **settings})


def test_setting_an_unknown_attribute_raises():
    with pytest.raises(AttributeError):
        make().epok = 3


def test_progress_and_epochs_done_follow_the_micro_batches_consumed():
    run = make()
    run.counters.seen = 25
    assert (run.epochs_done, run.progress) == (2.5, 0.625)
    run.counters.seen = 99
    assert run.progress == 1.0


@pytest.mark.parametrize(("every", "plan"), [(1, (10, 10)), (2, (5, 10)), (4, (3, 10)), (20, (1, 10))])
def test_the_smaller_last_group_is_planned_as_a_step(every, plan):
    run = make(every=every)
    assert run.plan() == plan
    assert run.planned_steps == 4 * plan[0]


def test_a_duration_covers_the_same_data_with_gradient_accumulation():
    for every in (1, 2, 5):
        run = make(every=every)
        assert run.duration(None, "epoch") == 4
        assert run.duration("50%", "epoch") == 2
        assert run.duration("3ep", "step") == 30 / every


@pytest.mark.parametrize(("duration", "by", "expected"), [
    (3, "epoch", 3), (3, "step", 3), ("3", "epoch", 3), ("2ep", "epoch", 2), ("2ep", "step", 20), ("20st", "step", 20),
    ("20st", "epoch", 2), ("25%", "epoch", 1), ("25%", "step", 10), (None, "epoch", 4), (None, "step", 40), (0.5, "epoch", 0.5),
])
def test_a_duration_is_converted_to_epochs_or_steps(duration, by, expected):
    assert make().duration(duration, by) == expected


def test_max_steps_limits_planned_steps_and_durations():
    run = make(max_steps=15)
    assert (run.planned_steps, run.duration(None, "step"), run.duration(None, "epoch")) == (15, 15, 1.5)
    run.counters.attempts = run.counters.seen = 3
    assert run.progress == 0.2


def test_position_counts_epochs_or_attempted_steps():
    run = make()
    run.counters.epoch, run.counters.attempts = 2, 25
    assert (run.position("epoch"), run.position("step")) == (2, 25)


@pytest.mark.parametrize(("asked", "counted"), [({"stop": "why"}, {}), ({}, {"epoch": 4}), ({"max_steps": 7}, {"step": 7})])
def test_a_run_is_finished_when_stopped_or_when_all_epochs_or_steps_are_done(asked, counted):
    run = make(**asked)
    assert run.finished == ("stop" in asked)
    with run.counters.temporarily(**counted):
        assert run.finished
    with run.counters.temporarily(**counted, seen=1):           # in the middle of an epoch
        assert not run.finished
        assert run.should_stop == ("epoch" not in counted)


def test_the_repr_is_one_short_line():
    run = fit(nn.Linear(6, 3), nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), [(torch.randn(4, 6), torch.randint(3, (4,)))] * 3)
    assert repr(run) == "<Run of Linear on cpu: epoch 1 of 1, 3 updates>"
    run.stop = "enough"
    assert repr(run) == "<Run of Linear on cpu: epoch 1 of 1, 3 updates, stopped: enough>"


def test_counters_cannot_be_set_through_the_run():
    run = make()
    for name in ("epoch", "step", "seen", "attempts"):
        with pytest.raises(AttributeError):
            setattr(run, name, 1)


@pytest.mark.parametrize("text", ["", "x", "5x", "ep", "-3", "0", "nan", "inf", "1e400", "5 6", "--5"])
def test_text_that_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="takes a duration"):
        parse_duration(text)


def test_a_plugin_that_groups_otherwise_later_without_saying_so_is_named(plain, batches, sgd, caplog):
    class Grouping:
        @hookimpl
        def group_batches(self, run: Run, batches):
            return chunked(batches, 4 if run.epoch < 1 else 1)

    run = fit(plain, nn.CrossEntropyLoss(), sgd, batches, epochs=3, plugins=[Grouping(), "cosine:by=step"])
    assert run.step == 2 + 8 + 8
    assert caplog.messages == ["grouping made 8 steps of epoch 2, and 2 were planned, so schedules end elsewhere; it needs grouping_changes = True"]
