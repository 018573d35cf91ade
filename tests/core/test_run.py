"""Where a run is, and what lengths mean in it."""
from types import SimpleNamespace

import pytest

from loopctl import Run
from loopctl.compose import compose
from loopctl.lengths import parse_length


def make(batches=10, every=1, **settings):
    plugins = [f"accumulate:every={every}"] if every > 1 else []
    return Run(None, None, None, range(batches), hook=compose(plugins), **{"epochs": 4, **settings})


def test_it_is_closed():
    with pytest.raises(AttributeError):
        make().epok = 3


def test_progress_follows_data():
    run = make()
    run.seen = 25
    assert (run.epochs_done, run.progress) == (2.5, 0.625)
    run.seen = 99
    assert run.progress == 1.0


@pytest.mark.parametrize(("every", "plan"), [(1, (10, 10)), (2, (5, 10)), (4, (3, 10)), (20, (1, 10))])
def test_the_last_group_is_a_step_too(every, plan):
    run = make(every=every)
    assert run.plan() == plan
    assert run.planned_steps == 4 * plan[0]


def test_accumulation_does_not_stretch_lengths():
    for every in (1, 2, 5):
        run = make(every=every)
        assert run.length(None, "epoch") == 4
        assert run.length("50%", "epoch") == 2
        assert run.length("3ep", "step") == 30 / every


@pytest.mark.parametrize(("length", "by", "expected"), [
    (3, "epoch", 3), (3, "step", 3), ("3", "epoch", 3), ("2ep", "epoch", 2), ("2ep", "step", 20), ("20st", "step", 20),
    ("20st", "epoch", 2), ("25%", "epoch", 1), ("25%", "step", 10), (None, "epoch", 4), (None, "step", 40), (0.5, "epoch", 0.5),
])
def test_lengths(length, by, expected):
    assert make().length(length, by) == expected


def test_max_steps_shortens_the_plan():
    run = make(max_steps=15)
    assert (run.planned_steps, run.length(None, "step"), run.length(None, "epoch")) == (15, 15, 1.5)
    run.attempts, run.seen = 3, 3
    assert run.progress == 0.2


def test_positions():
    run = make()
    run.epoch, run.attempts = 2, 25
    assert (run.position("epoch"), run.position("step")) == (2, 25)


def test_over():
    assert not make().over
    assert SimpleNamespace(over=True).over
    for change in ({"stop": "why"}, {"epoch": 4}, {"step": 7, "max_steps": 7}):
        assert make(**change).over


@pytest.mark.parametrize("text", ["", "x", "5x", "ep", "-3", "0", "nan", "inf", "1e400", "5 6", "--5"])
def test_no_lengths(text):
    with pytest.raises(ValueError, match="takes a length"):
        parse_length(text)
