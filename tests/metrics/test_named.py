"""Metrics by name: exact over batches of unequal sizes, over processes, and over a resume; compared with scikit-learn and by hand."""
from functools import partial
from math import exp, isnan

import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error, top_k_accuracy_score
from torch import nn
from torch.nn import functional

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.metrics import named

UNEVEN = [8, 8, 3, 8, 1]
SGD = partial(torch.optim.SGD, lr=0.0)


def batches(outputs=1, sizes=UNEVEN, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 6, generator=random, dtype=torch.float64), 5 + torch.randn(size, outputs, generator=random, dtype=torch.float64))
            for size in sizes]


def network(outputs=1):
    torch.manual_seed(0)
    return nn.Linear(6, outputs).double()


def over_all(model, data):
    """The outputs and the targets of all data."""
    with torch.no_grad():
        return torch.cat([model(input) for input, _ in data]), torch.cat([target for _, target in data])


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(("metric", "expected"), [
    (named.mae, mean_absolute_error), (named.RMSE(), lambda target, output: root_mean_squared_error(target.flatten(), output.flatten())),
    (named.R2(), r2_score)])
def test_errors_of_numbers_are_those_of_scikit_learn_over_the_whole_data(metric, expected, outputs):
    valid = batches(outputs)
    run = fit(network(outputs), nn.MSELoss(), SGD, valid, valid, metrics={"it": metric})
    output, target = over_all(run.model, valid)
    assert run.history[0]["val_it"] == pytest.approx(expected(target.numpy(), output.numpy()), rel=1e-6)
    assert run.history[0]["train_it"] == pytest.approx(run.history[0]["val_it"], rel=1e-12)
    if not callable(metric):
        means = [metric.compute() for input, target in valid if not (metric.reset() or metric.update(run.model(input).detach(), target))]
        assert abs(sum(means[:2]) / 2 - run.history[0]["val_it"]) > 1e-4                # no mean of the batches' values


def labelled(sizes=UNEVEN):
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 6, generator=random, dtype=torch.float64), torch.randint(0, 5, (size,), generator=random)) for size in sizes]


def test_top_is_that_of_scikit_learn_and_top_1_is_the_accuracy():
    valid = labelled()
    metrics = {"top3": partial(named.top, k=3), "top1": partial(named.top, k=1), "accuracy": named.accuracy}
    run = fit(network(5), nn.CrossEntropyLoss(), SGD, valid, valid, metrics=metrics)
    output, target = over_all(run.model, valid)
    assert run.history[0]["val_top3"] == pytest.approx(top_k_accuracy_score(target, output, k=3, labels=range(5)))
    assert run.history[0]["val_top1"] == run.history[0]["val_accuracy"] == pytest.approx(float((output.argmax(1) == target).double().mean()))


@pytest.mark.parametrize("last", [False, True])
def test_perplexity_counts_every_token_once_and_leaves_out_minus_100(last):
    random = torch.Generator().manual_seed(0)
    metric, losses = named.Perplexity(), []
    for length in (9, 4, 7):
        scores = torch.randn(2, 5, length, generator=random)
        classes = torch.randint(0, 5, (2, length), generator=random)
        classes[0, :length // 3] = -100
        metric.update(scores.movedim(1, 2) if last else scores, classes)
        losses += functional.cross_entropy(scores.double(), classes, reduction="none")[classes != -100].tolist()
    assert float(metric.compute()) == pytest.approx(exp(sum(losses) / len(losses)), rel=1e-12)


def test_metrics_of_half_precision_outputs_are_computed_in_full_precision():
    output, target = torch.full((70000, 1), 3.0, dtype=torch.float16), torch.zeros(70000, 1)
    metric = named.RMSE()
    metric.update(output, target)
    assert metric.compute() == 3                                    # the sum of squares, 630000, is no number of float16
    assert named.mae(output, target) == 3


def test_classes_may_be_the_last_dimension_and_dim_says_so_where_both_fit():
    scores = torch.randn(2, 4, 4)
    classes = torch.randint(0, 4, (2, 4))
    assert named.accuracy(scores.movedim(1, 2), classes, dim=-1) == named.accuracy(scores, classes, dim=1)
    assert named.accuracy(scores[:, :, :3].movedim(1, 2), classes[:, :3]) == named.accuracy(scores[:, :, :3], classes[:, :3])
    with pytest.raises(UsageError, match="the classes may be the second dimension or the last; pass accuracy:dim=1 or dim=-1"):
        named.accuracy(scores, classes)


@pytest.mark.parametrize(("metric", "output", "target", "words"), [
    (named.accuracy, torch.zeros(4, 1), torch.zeros(4, 1), "which is one class, so every output would be right; for numbers use mae"),
    (named.accuracy, torch.zeros(4), torch.zeros(4), r"accuracy: the output has shape \(4,\) and the target \(4,\); for C classes use"),
    (named.accuracy, None, torch.zeros(4), "accuracy: the output is a NoneType, not a tensor; use a metric of your own"),
    (named.accuracy, torch.zeros(4, 3), {"a": 1}, "accuracy: the target is a dict, not a tensor"),
    (partial(named.top, k=4), torch.zeros(4, 3), torch.zeros(4).long(), "top4: the model has 3 outputs; use a smaller number"),
    (named.mae, torch.zeros(4, 1), torch.zeros(4), r"mae: the output has shape \(4, 1\) and the target \(4,\); make the two alike"),
    (named.RMSE().update, torch.zeros(4, 1), torch.zeros(4), "rmse: the output has shape"),
    (named.R2().update, torch.zeros(4, 1), torch.zeros(4), "r2: the output has shape"),
    (named.Perplexity().update, torch.zeros(4, 3), torch.zeros(4, 3), "perplexity: the targets are probabilities"),
])
def test_outputs_and_targets_that_do_not_fit_are_refused_in_one_line(metric, output, target, words):
    with pytest.raises(UsageError, match=words) as caught:
        metric(output, target)
    assert "\n" not in str(caught.value)


def test_a_metric_of_no_sample_is_nan():
    assert isnan(named.R2().compute())


def test_an_error_in_a_metric_names_it_and_what_it_was_given():
    with pytest.raises(RuntimeError) as caught:
        fit(network(), nn.MSELoss(), SGD, batches(), metrics={"mine": lambda output, target: output @ target})
    assert caught.value.__notes__[0] == "raised by metric 'mine' for outputs of shape (8, 1) and targets of shape (8, 1)"


# Several processes, and resuming


class Kill:
    def __init__(self, at):
        self.at = at

    @hookimpl
    def safe_point(self, run: Run):
        if run.attempts == self.at:
            raise KeyboardInterrupt


def train(plugins, out=".", resume=None, at=None, valid=None):
    """Train with a learning rate of 0, so that the number of processes does not change the model."""
    metrics = {"r2": named.R2(), "rmse": named.RMSE(), "mae": named.mae}
    killed = ["checkpoint:every_steps=1", Kill(at)] if at else ["checkpoint"] if resume else []
    try:
        return fit(network(2), nn.MSELoss(), SGD, batches(2), batches(2, valid or UNEVEN, seed=1), plugins=[*plugins, *killed], metrics=metrics,
                   seed=0, epochs=2, out=out, resume=resume).history
    except KeyboardInterrupt:
        return None


@pytest.mark.parametrize("valid", [None, [4]], ids=["uneven", "one process has no batch"])
def test_several_processes_report_the_metrics_of_one(ranks, valid):
    expected = train([], valid=valid)
    for history in ranks(2, train, ["ddp"], ".", None, None, valid):
        for row, expected_row in zip(history, expected, strict=True):
            assert row | {"step": 0} == pytest.approx(expected_row | {"step": 0}, rel=1e-9)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (2, 1), (1, 2)])
def test_metrics_of_an_epoch_that_was_resumed_are_those_of_all_its_batches(ranks, tmp_path, before, after):
    expected = train([])
    assert [*ranks(before, train, ["ddp"], tmp_path, None, 2)] == [None] * before
    for history in ranks(after, train, ["ddp"], tmp_path, tmp_path):
        for row, expected_row in zip(history, expected, strict=True):
            assert row | {"step": 0} == pytest.approx(expected_row | {"step": 0}, rel=1e-9)


class Count:
    """A metric object that has no way to put the states of several processes together."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.count = 0

    def update(self, output, target):
        self.count += len(output)

    def compute(self):
        return float(self.count)


def train_with_an_own_object(number):
    try:
        return fit(network(), nn.MSELoss(), SGD, batches(), metrics={"count": Count()}, plugins=["ddp"] * (number > 1), seed=0).history[0]["train_count"]
    except UsageError as error:
        return str(error)


def test_an_object_whose_state_several_processes_cannot_put_together_is_refused(ranks):
    assert train_with_an_own_object(1) == sum(UNEVEN)
    for message in ranks(2, train_with_an_own_object, 2):
        assert message == ("metric 'count' keeps its state in each of 2 processes, and a Count cannot put them together; make it a "
                           "torchmetrics.Metric, or a function that returns the mean of a batch")
