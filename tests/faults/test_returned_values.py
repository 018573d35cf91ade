"""What a user's function or object returns is looked at before it is used."""
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy, F1Score, MeanMetric, MetricCollection

from loopctl import Run, UsageError, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()


class Steps:
    """Counts the updates that were made."""

    made = 0

    @hookimpl
    def after_step(self, run: Run):
        self.made = run.step


@pytest.fixture
def refused(net, batches, valid, sgd):
    """Return the message with which `fit` refuses these arguments, before any update."""
    def refused(**changed):
        steps = Steps()
        arguments = {"model": net, "loss_fn": cross_entropy, "optimizer": sgd, "train": batches, "valid": valid} | changed
        with pytest.raises(UsageError) as error:
            fit(**{"plugins": [steps]} | arguments)
        assert steps.made == 0
        assert "\n" not in str(error.value)
        return str(error.value)
    return refused


@pytest.mark.fault(row="A1", given="a metric function that gives one value per class", right="refused by name at the first batch")
def test_a_metric_of_several_values_is_refused_by_name(refused):
    assert "metric 'pc' returned a tensor of shape (3,)" in refused(metrics={"pc": lambda output, target: output.mean(0)})


@pytest.mark.fault(row="A2", given="a loss and a metric of shape (1,)", right="one element is a scalar")
def test_one_element_is_a_scalar(plain, clone, batches, sgd):
    def of_one_element(output, target):
        return cross_entropy(output, target).view(1)

    histories = [fit(clone(plain), loss, sgd, batches, batches, epochs=2, metrics={"m": metric}).history for loss, metric in (
        (cross_entropy, lambda output, target: output.mean()), (of_one_element, lambda output, target: output.mean().view(1, 1)))]
    assert histories[0] == histories[1]


@pytest.mark.fault(row="A3", given="a metric called loss", right="refused before training")
def test_a_metric_cannot_be_called_loss(refused):
    assert "a metric is called 'loss'; use another name" in refused(metrics={"loss": lambda output, target: 0.0})


@pytest.mark.fault(row="A4", given="a MetricCollection, of which one is monitored", right="a column for each, such as val_m_acc")
def test_a_metric_collection_has_a_column_for_each_metric(net, batches, valid, sgd):
    collection = MetricCollection({"acc": Accuracy(task="multiclass", num_classes=3), "f1": F1Score(task="multiclass", num_classes=3)})
    run = fit(net, cross_entropy, sgd, batches, valid, metrics={"m": collection}, plugins=["early_stopping:monitor=val_m_acc,mode=max"])
    with torch.no_grad():
        right = sum((net.eval()(input).argmax(1) == target).sum().item() for input, target in valid)
    assert run.history[-1]["val_m_acc"] == pytest.approx(right / 13)
    assert {"train_m_acc", "train_m_f1", "val_m_f1"} <= run.history[-1].keys()
    assert all(isinstance(value, int | float) for value in run.history[-1].values())


@pytest.mark.fault(row="A5", given="a metric that is a tensor in one batch and a float in the next", right="their mean")
def test_a_metric_may_be_a_tensor_and_a_float_in_turn(plain, sgd):
    batches = [(torch.randn(4, 6), torch.zeros(4, dtype=torch.long)) for _ in range(4)]
    values = [torch.tensor(1.0), 0.5, torch.tensor(2), 0.25]
    run = fit(plain, cross_entropy, sgd, batches, metrics={"m": lambda output, target: values.pop(0)})
    assert run.history[-1]["train_m"] == (1.0 + 0.5 + 2 + 0.25) / 4


@pytest.mark.parametrize(("changed", "message"), [
    ({"loss_fn": None}, "takes one argument; pass a function of (output, target)"),
    ({"loss_fn": "cross_entropy"}, "loss_fn is 'cross_entropy'; pass a function of (output, target)"),
    ({"loss_fn": lambda output, target: (cross_entropy(output, target), 1)}, "the loss is a tuple"),
    ({"loss_fn": lambda output, target: cross_entropy(output, target).item()}, "the loss is a float"),
    ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, "loss_fn.reduction is 'none'"),
    ({"loss_fn": partial(nn.functional.cross_entropy, reduction="none")}, "loss_fn.reduction is 'none'"),
    ({"loss_fn": lambda output, target: nn.functional.cross_entropy(output, target, reduction="none")}, "a tensor of shape (8,)"),
    ({"optimizer": [partial(torch.optim.SGD, lr=0.1)] * 2}, "optimizer is a list; pass one optimizer"),
    ({"optimizer": "adam"}, "optimizer is 'adam'; pass partial(torch.optim.Adam, lr=...), or an optimizer"),
    ({"optimizer": "sgd:momentum=0.9"}, "optimizer is 'sgd:momentum=0.9'; pass partial(torch.optim.SGD, lr=...), or an optimizer"),
    ({"optimizer": "optimizer"}, "optimizer is 'optimizer'; pass one optimizer"),
    ({"metrics": [lambda output, target: 0.0]}, "metrics is a list; pass a dict"),
    ({"valid": {"a": []}}, "valid.a has no batches"),
])
@pytest.mark.fault(row="A6", given="arguments of fit of a wrong kind, and losses that are no scalar", right="refused, naming the argument")
def test_arguments_of_a_wrong_kind_are_refused_by_name(refused, changed, message):
    assert message in refused(**changed)


def plain_sums(model, batches, every, epochs=2):
    """A plain loop with a loss that is a sum. Returns the loss per sample of each epoch."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), []
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    for _ in range(epochs):
        total = samples = 0
        for start in range(0, len(batches), every):
            optimizer.zero_grad()
            for input, target in batches[start:start + every]:
                loss = loss_fn(model(input), target)
                loss.backward()
                total, samples = total + loss.item(), samples + len(input)
            optimizer.step()
        losses.append(total / samples)
    return losses


@pytest.mark.parametrize(("every", "plugins"), [(1, []), (3, ["accumulate:every=3"]), (1, ["split:into=2"])])
@pytest.mark.parametrize("loss_fn", [nn.CrossEntropyLoss(reduction="sum"), partial(nn.functional.cross_entropy, reduction="sum")])
@pytest.mark.fault(row="A7", given="reduction=sum with accumulate, split and uneven batches", right="the update of the loop by hand, and the loss per sample")
def test_a_loss_that_is_a_sum_is_added_up(plain, clone, batches, every, plugins, loss_fn):
    by_hand, model = clone(plain), clone(plain)
    expected = plain_sums(by_hand, batches, every)
    run = fit(model, loss_fn, partial(torch.optim.SGD, lr=0.01, momentum=0.9), batches, batches, epochs=2, plugins=plugins)
    for one, other in zip(model.parameters(), by_hand.parameters(), strict=True):
        # A batch in two parts has its gradients added in another order.
        torch.testing.assert_close(one, other, rtol=1e-5 if plugins == ["split:into=2"] else 0, atol=1e-7 if plugins == ["split:into=2"] else 0)
    assert [row["train_loss"] for row in run.history] == pytest.approx(expected, rel=1e-6)
    with torch.no_grad():
        total = sum(nn.functional.cross_entropy(by_hand(input), target, reduction="sum").item() for input, target in batches)
    assert run.history[-1]["val_loss"] == pytest.approx(total / 59, rel=1e-6)


@pytest.mark.fault(row="A8", given="batches of three in valid only", right="valid is named, before the first update")
def test_a_batch_of_another_form_in_valid_is_found_before_training(refused, batches):
    message = refused(valid=[(input, target, torch.arange(len(input))) for input, target in batches])
    assert "valid gave a tuple of 3" in message


# Further inputs


@pytest.mark.fault(row="A", given="a function of one's own that returns sums, with reduction=\"sum\"", right="added up")
def test_a_function_that_returns_sums_is_declared(plain, clone, batches):
    by_hand, model = clone(plain), clone(plain)
    plain_sums(by_hand, batches, 2)
    fit(model, lambda output, target: nn.functional.cross_entropy(output, target, reduction="sum"),
        partial(torch.optim.SGD, lr=0.01, momentum=0.9), batches, epochs=2, plugins=["accumulate:every=2"], reduction="sum")
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), by_hand.parameters(), strict=True))


@pytest.mark.fault(row="A", given="reduction=\"total\"", right="refused with the two words that are known")
def test_an_unknown_reduction_is_refused(refused):
    assert "use 'mean' or 'sum'" in refused(reduction="total")


@pytest.mark.fault(row="A", given="a metric that returns text or None", right="refused by name at the first batch")
@pytest.mark.parametrize("value", [None, "good", [1.0, 2.0]])
def test_a_metric_that_is_no_number_is_refused_by_name(refused, value):
    assert f"metric 'm' returned a {type(value).__name__}" in refused(metrics={"m": lambda output, target: value})


@pytest.mark.fault(row="A", given="metrics whose names are not text", right="refused before training")
def test_the_name_of_a_metric_is_text(refused):
    assert "a metric is called 1" in refused(metrics={1: lambda output, target: 0.0})


@pytest.mark.fault(row="A", given="a metric object that computes a vector", right="a column per element")
def test_a_metric_object_that_computes_a_vector_has_a_column_per_element(net, batches, valid, sgd):
    run = fit(net, cross_entropy, sgd, batches, valid, metrics={"acc": Accuracy(task="multiclass", num_classes=3, average="none")})
    assert {"val_acc_0", "val_acc_1", "val_acc_2"} <= run.history[-1].keys()
    assert "val_acc" not in run.history[-1]


@pytest.mark.fault(row="A", given="plugins as text", right="refused, with the list to write")
def test_plugins_as_text_are_refused(refused):
    assert "plugins is text, 'amp'; pass a list" in refused(plugins="amp")


@pytest.mark.fault(row="A", given="train that is a map-style data set, or text", right="refused before training")
@pytest.mark.parametrize("train", [TensorDataset(torch.ones(3, 6)), "digits", {"a": 1}])
def test_train_that_has_no_batches_is_refused(refused, train):
    assert "train is a " in refused(train=train)


@pytest.mark.fault(row="A", given="a loss that depends on no parameter", right="refused at the first batch")
def test_a_detached_loss_is_refused(refused):
    assert "depends on no parameter" in refused(loss_fn=lambda output, target: cross_entropy(output.detach(), target))


@pytest.mark.fault(row="A", given="a metric that fails on a batch of valid", right="raised before the first update, with a note")
def test_a_metric_that_fails_on_valid_is_found_before_training(net, batches, sgd):
    steps, metric = Steps(), MeanMetric()
    metric.update = lambda output, target: 1 / 0
    valid = DataLoader(TensorDataset(torch.randn(5, 6), torch.zeros(5, dtype=torch.long)), 2)

    def fails_in_evaluation(output, target):
        if not torch.is_grad_enabled() and len(target) == 2:
            raise ZeroDivisionError
        return 0.0

    with pytest.raises(ZeroDivisionError) as error:
        fit(net, cross_entropy, sgd, batches, valid, metrics={"m": fails_in_evaluation}, plugins=[steps])
    assert steps.made == 0
    assert "raised by the first batch of valid, before the first update" in error.value.__notes__


@pytest.mark.fault(row="A", given="classes beyond the outputs of the model, in train or in valid", right="refused at once, with the index and the range")
@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_class_that_the_model_does_not_have_is_named(refused, batches, part):
    input, target = batches[0]
    target = target.clone()
    target[5] = 3
    message = refused(**{part: [(input, target)]})
    assert message == f"{part} gave the class 3, at index 5 of a batch, and the model has 3 outputs, for classes 0 to 2"


class Stateful(nn.Module):
    """A model with everything that a trial could leave traces in: buffers, attributes, dropout in evaluation."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls, self.hidden = nn.Linear(6, 3), 0, None
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input):
        self.calls += 1
        self.seen += len(input)
        self.hidden = input.mean(0)
        return self.layer(nn.functional.dropout(input, 0.5, training=True))


@pytest.mark.fault(row="A", given="a model that counts, remembers and draws random numbers in every forward pass", right="the trial before training leaves no trace")
def test_the_trial_of_the_first_validation_batch_leaves_no_trace(batches, valid, sgd):
    by_hand, model = Stateful(), Stateful()
    model.load_state_dict(by_hand.state_dict())
    optimizer = sgd(by_hand.parameters())
    torch.manual_seed(1)
    for input, target in batches:
        optimizer.zero_grad()
        cross_entropy(by_hand(input), target).backward()
        optimizer.step()
    with torch.no_grad():
        for input, _ in valid:
            by_hand(input)
    torch.manual_seed(1)
    fit(model, cross_entropy, sgd, batches, valid)
    assert (model.calls, model.seen) == (by_hand.calls, by_hand.seen)
    assert torch.equal(model.hidden, by_hand.hidden)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), by_hand.parameters(), strict=True))
