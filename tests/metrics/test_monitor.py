"""Judging metrics."""
from math import nan
from types import SimpleNamespace

import pytest

from loopctl import Monitor, UsageError


def run(**metrics):
    return SimpleNamespace(metrics=metrics)


@pytest.mark.parametrize(("metric", "mode"), [
    ("val_loss", "min"), ("train_loss", "min"), ("val_accuracy", "max"), ("val_f1", "max"), ("grad_norm", "min"), ("error", "min")])
def test_auto_knows_by_name(metric, mode):
    watch = Monitor(metric)
    watch.start(run(**{metric: nan}))
    assert watch.mode == mode


def test_auto_asks_where_it_does_not_know():
    with pytest.raises(UsageError, match="add mode=min or mode=max"):
        Monitor("val_score").start(run(val_score=nan))
    Monitor("val_score", "max").start(run(val_score=nan))


def test_a_metric_that_the_run_has_not():
    with pytest.raises(UsageError, match="monitor=val_acuracy: the run has no such metric; did you mean 'val_accuracy'"):
        Monitor("val_acuracy").start(run(val_loss=nan, val_accuracy=nan))


def test_the_default_is_val_loss_or_train_loss():
    for metrics, expected in (({"train_loss": nan, "val_loss": nan}, "val_loss"), ({"train_loss": nan}, "train_loss")):
        watch = Monitor()
        watch.start(run(**metrics))
        assert watch.metric == expected


def test_improvement():
    watch = Monitor("val_loss", "min", min_delta=0.1)
    watch.start(run(val_loss=nan))
    assert [watch.improved(run(val_loss=value)) for value in (nan, 1.0, 0.95, 0.9, 0.8, nan, 0.9)] == [
        False, True, False, False, True, False, False]
    assert watch.best == 0.8
    watch = Monitor("val_accuracy", "max")
    assert [watch.improved(run(val_accuracy=value)) for value in (0.5, 0.5, 0.6, 0.4)] == [True, False, True, False]


def test_its_state_goes_on():
    watch, again = Monitor("val_loss", "min"), Monitor("val_loss", "min")
    watch.improved(run(val_loss=0.5))
    again.load_state_dict(watch.state_dict())
    assert not again.improved(run(val_loss=0.6))
