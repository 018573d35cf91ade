"""The plugin early_stopping."""
import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()


class FixedLoss:
    """Evaluates to the given losses."""

    def __init__(self, *values):
        self.values = list(values)

    @hookimpl
    def evaluate(self):
        return {"val_loss": self.values.pop(0)}


def test_it_stops_after_patience_with_a_reason(net, batches, valid, sgd):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=9, plugins=["early_stopping:patience=2", FixedLoss(3, 2, 2.5, 1, 1, 2, 0)])
    assert (run.epoch, run.stop) == (6, "val_loss has not improved on 1 for 2 evaluations")


def test_improvements_below_min_delta_do_not_count(net, batches, valid, sgd):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=9,
              plugins=["early_stopping:patience=2,min_delta=0.5,mode=max", FixedLoss(1, 1.6, 2, 2.05, 3, 3, 3, 3, 3)])
    assert run.epoch == 4


def test_patience_counts_evaluations(net, batches, valid, sgd):
    run = fit(net, cross_entropy, sgd, batches, valid, eval_every=2, epochs=9,
              plugins=["early_stopping:patience=3", FixedLoss(1, 2, 2, 2)])
    assert (run.step, run.epoch) == (8, 1)


def test_a_metric_that_is_always_nan_stops_the_run(net, batches, valid, sgd):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=9, plugins=["early_stopping:patience=2", FixedLoss(*[float("nan")] * 9)])
    assert run.stop == "val_loss has been NaN for 2 evaluations"


@pytest.mark.parametrize("restore", ["true", "false"])
def test_restore_best_restores_the_best_weights(net, batches, valid, sgd, same, clone, restore):
    evaluated = []

    class Recorder:
        @hookimpl
        def after_evaluate(self, run: Run):
            evaluated.append(clone(run.model))

    fit(net, cross_entropy, sgd, batches, valid, epochs=9,
        plugins=[f"early_stopping:patience=2,restore_best={restore}", FixedLoss(3, 1, 2, 2), Recorder()])
    same(net, evaluated[1 if restore == "true" else 3])
    assert not torch.equal(evaluated[1][0].weight, evaluated[3][0].weight)


def test_a_metric_that_does_not_exist_is_refused_before_training(net, batches, valid, sgd):
    with pytest.raises(UsageError, match="^early_stopping: monitor=val_acc: the run has no such metric; did you mean 'val_accuracy'"):
        fit(net, cross_entropy, sgd, batches, valid, metrics={"accuracy": lambda output, target: 0.0},
            plugins=["early_stopping:monitor=val_acc"])
    # Metrics of other plugins exist, in any order of plugins.
    fit(net, cross_entropy, sgd, batches, valid, plugins=["early_stopping:monitor=grad_norm", "clip"])
