"""Monitor: whether a metric is the best so far."""
from math import nan
from types import SimpleNamespace

import pytest

from loopctl import Monitor, UsageError


def run(**metrics):
    return SimpleNamespace(metrics=metrics, metric_fns={}, monitor="", forward=None)


@pytest.mark.parametrize(("metric", "mode"), [
    ("val_loss", "min"), ("train_loss", "min"), ("val_accuracy", "max"), ("val_f1", "max"), ("grad_norm", "min"), ("error", "min"), ("val_top5", "max")])
def test_mode_auto_follows_from_the_name_of_the_metric(metric, mode):
    monitor = Monitor(metric)
    monitor.start(run(**{metric: nan}))
    assert monitor.mode == mode


def test_mode_auto_refuses_an_unclear_name():
    with pytest.raises(UsageError, match="monitor=val_score: whether higher is better is unclear; pass mode=min or mode=max"):
        Monitor("val_score").start(run(val_score=nan))
    Monitor("val_score", "max").start(run(val_score=nan))


def test_mode_auto_follows_from_the_object_of_the_metric_where_its_name_does_not_tell():
    for larger, mode in ((True, "max"), (False, "min")):
        prepared = run(val_score=nan)
        prepared.metric_fns = {"val": {"score": SimpleNamespace(higher_is_better=larger)}}
        monitor = Monitor("val_score")
        monitor.start(prepared)
        assert monitor.mode == mode


def test_the_monitor_of_the_run_is_used_by_a_plugin_that_has_none_of_its_own():
    prepared = run(val_loss=nan, val_accuracy=nan)
    prepared.monitor = "val_accuracy"
    for given, used in (("", "val_accuracy"), ("val_loss", "val_loss")):
        monitor = Monitor(given)
        monitor.start(prepared)
        assert monitor.metric == used


def test_an_unknown_metric_is_refused_with_the_nearest_name():
    with pytest.raises(UsageError, match="monitor=val_acuracy: the run has no such metric; did you mean 'val_accuracy'"):
        Monitor("val_acuracy").start(run(val_loss=nan, val_accuracy=nan))


def test_the_default_metric_is_val_loss_or_without_validation_train_loss():
    for metrics, expected in (({"train_loss": nan, "val_loss": nan}, "val_loss"), ({"train_loss": nan}, "train_loss")):
        monitor = Monitor()
        monitor.start(run(**metrics))
        assert monitor.metric == expected


def test_improved_compares_with_the_best_by_mode_and_min_delta_and_never_for_nan():
    monitor = Monitor("val_loss", "min", min_delta=0.1)
    monitor.start(run(val_loss=nan))
    assert [monitor.improved(run(val_loss=value)) for value in (nan, 1.0, 0.95, 0.9, 0.8, nan, 0.9)] == [
        False, True, False, False, True, False, False]
    assert monitor.best == 0.8
    monitor = Monitor("val_accuracy", "max")
    assert [monitor.improved(run(val_accuracy=value)) for value in (0.5, 0.5, 0.6, 0.4)] == [True, False, True, False]


def test_the_state_dict_restores_the_best_value():
    saved, restored = Monitor("val_loss", "min"), Monitor("val_loss", "min")
    saved.improved(run(val_loss=0.5))
    restored.load_state_dict(saved.state_dict())
    assert not restored.improved(run(val_loss=0.6))
