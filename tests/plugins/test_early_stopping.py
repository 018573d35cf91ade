"""early_stopping against the bookkeeping done by hand."""
import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()


class Scores:
    """Evaluates to given numbers."""

    def __init__(self, *values):
        self.values = list(values)

    @hookimpl
    def evaluate(self):
        return {"val_loss": self.values.pop(0)}


def test_it_stops_after_patience_and_says_why(net, batches, valid, sgd):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=9, plugins=["early_stopping:patience=2", Scores(3, 2, 2.5, 1, 1, 2, 0)])
    assert (run.epoch, run.stop) == (6, "val_loss has not improved on 1 for 2 evaluations")


def test_min_delta_and_mode(net, batches, valid, sgd):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=9,
              plugins=["early_stopping:patience=2,min_delta=0.5,mode=max", Scores(1, 1.6, 2, 2.05, 3, 3, 3, 3, 3)])
    assert run.epoch == 4


def test_patience_counts_evaluations(net, batches, valid, sgd):
    run = fit(net, cross_entropy, sgd, batches, valid, eval_every=2, epochs=9,
              plugins=["early_stopping:patience=3", Scores(1, 2, 2, 2)])
    assert (run.step, run.epoch) == (8, 1)


def test_never_a_number(net, batches, valid, sgd):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=9, plugins=["early_stopping:patience=2", Scores(*[float("nan")] * 9)])
    assert run.stop == "val_loss has never been a number for 2 evaluations"


@pytest.mark.parametrize("restore", ["true", "false"])
def test_the_best_weights_come_back_if_asked(net, batches, valid, sgd, same, clone, restore):
    kept = []

    class Keep:
        @hookimpl
        def after_evaluate(self, run: Run):
            kept.append(clone(run.model))

    fit(net, cross_entropy, sgd, batches, valid, epochs=9,
        plugins=[f"early_stopping:patience=2,restore_best={restore}", Scores(3, 1, 2, 2), Keep()])
    same(net, kept[1 if restore == "true" else 3])
    assert not torch.equal(kept[1][0].weight, kept[3][0].weight)


def test_a_metric_that_does_not_exist_is_refused_before_training(net, batches, valid, sgd):
    with pytest.raises(UsageError, match="^early_stopping: monitor=val_acc: the run has no such metric; did you mean 'val_accuracy'"):
        fit(net, cross_entropy, sgd, batches, valid, metrics={"accuracy": lambda output, target: 0.0},
            plugins=["early_stopping:monitor=val_acc"])
    # A metric of another plugin exists, whatever the order.
    fit(net, cross_entropy, sgd, batches, valid, plugins=["early_stopping:monitor=grad_norm", "clip"])
