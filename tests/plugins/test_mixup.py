"""The plugins mixup and cutmix: the numbers of torchvision.transforms.v2, in the loop of someone who writes it by hand."""
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.cutmix import Cutmix
from loopctl.plugins.mixup import Mixup

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def images(sizes=(8, 8, 5), seed=0, classes=4):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 10, 12, generator=generator), torch.randint(0, classes, (size,), generator=generator)) for size in sizes]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def by_hand(model, mix, every=1, epochs=2):
    optimizer, data, means = sgd(model.parameters()), images(), []
    torch.manual_seed(1)
    model.train()
    for _ in range(epochs):
        total = 0.0
        for start in range(0, len(data), every):
            group = data[start:start + every]
            number = sum(len(target) for _, target in group)
            optimizer.zero_grad()
            for input, target in group:
                mixed, soft = mix(input, target)
                loss = cross_entropy(model(mixed), soft)
                (loss * (len(target) / number)).backward()
                total += loss.item() * len(target)
            optimizer.step()
        means.append(total / 21)
    return means


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.compares(use="mixup", technique="mixed samples and targets, share from Beta(alpha, alpha)", source="torchvision.transforms.v2.MixUp", tolerance="to the bit")
def test_mixup_equals_a_loop_with_torchvision_to_the_bit(model, clone, same, every):
    other = clone(model)
    run = fit(model, cross_entropy, sgd, images(), epochs=2, seed=1, plugins=["mixup:alpha=0.4", f"accumulate:every={every}"])
    means = by_hand(other, v2.MixUp(alpha=0.4, num_classes=4), every)
    same(model, other)
    assert [row["train_loss"] for row in run.history] == pytest.approx(means, rel=1e-6)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.compares(use="cutmix", technique="a rectangle of another sample, targets mixed by its area", source="torchvision.transforms.v2.CutMix", tolerance="to the bit")
def test_cutmix_equals_a_loop_with_torchvision_to_the_bit(model, clone, same, every):
    other = clone(model)
    fit(model, cross_entropy, sgd, images(), epochs=2, seed=1, plugins=["cutmix", f"accumulate:every={every}"])
    by_hand(other, v2.CutMix(alpha=1.0, num_classes=4), every)
    same(model, other)


@pytest.mark.parametrize("plugins", [["mixup:alpha=0.4", "cutmix:switch_prob=0.6"], ["cutmix:switch_prob=0.6", "mixup:alpha=0.4"]], ids=str)
@pytest.mark.compares(use="mixup, cutmix", technique="one of the two for each batch, by switch_prob", source="the loop by hand", tolerance="to the bit")
def test_together_one_of_the_two_changes_each_batch(model, clone, same, plugins):
    """As timm chooses: cutmix with the probability switch_prob. In either order."""
    other, chosen = clone(model), []
    mixup, cutmix = v2.MixUp(alpha=0.4, num_classes=4), v2.CutMix(alpha=1.0, num_classes=4)

    def mix(input, target):
        chosen.append(torch.rand(()).item() < 0.6)
        return (cutmix if chosen[-1] else mixup)(input, target)

    fit(model, cross_entropy, sgd, images(), epochs=2, seed=1, plugins=plugins)
    by_hand(other, mix)
    same(model, other)
    assert {*chosen} == {True, False}


def test_prob_leaves_batches_as_they_are_with_targets_of_the_same_kind(model, clone, same):
    other, mixed = clone(model), []
    mixup = v2.MixUp(alpha=0.4, num_classes=4)

    def mix(input, target):
        mixed.append(torch.rand(()).item() < 0.5)
        return mixup(input, target) if mixed[-1] else (input, nn.functional.one_hot(target, 4).float())

    fit(model, cross_entropy, sgd, images(), epochs=3, seed=1, plugins=["mixup:alpha=0.4,prob=0.5"])
    by_hand(other, mix, epochs=3)
    same(model, other)
    assert {*mixed} == {True, False}


class Batches:
    """Records the batches of each step."""

    def __init__(self):
        self.seen = []

    @hookimpl
    def after_step(self, run: Run):
        self.seen.append(run.batches[0])


def test_metrics_compare_with_the_true_labels(model):
    """A batch of mixed images has no accuracy of its own that anybody could read."""
    seen, data = [], images()

    def true(output, target):
        seen.append(target)
        return torch.zeros(())

    fit(model, cross_entropy, sgd, data, data, plugins=["mixup", "split:into=2"], metrics={"true": true})
    assert all(torch.equal(target, batch[1]) for target, batch in zip([*seen[:1], *seen[-5:-3]], data, strict=True))
    assert all(target.dtype == torch.int64 for target in seen)


def test_evaluation_is_of_whole_samples(model):
    run = fit(model, cross_entropy, sgd, images(), images(seed=1), seed=1, plugins=["mixup", "cutmix"])
    model.eval()
    with torch.no_grad():
        expected = sum(cross_entropy(model(input), target).item() * len(target) for input, target in images(seed=1)) / 21
    assert run.history[-1]["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_the_user_s_own_batches_are_not_changed(model):
    data, before = images(), images()
    fit(model, cross_entropy, sgd, data, epochs=2, plugins=["mixup", "cutmix"])
    for (input, target), (other, label) in zip(data, before, strict=True):
        assert torch.equal(input, other)
        assert torch.equal(target, label)


def test_a_batch_is_mixed_as_a_whole_before_it_is_split(model, clone, same):
    """To 1e-12 in float64, because sums are in another order. The model has neither dropout nor batch statistics."""
    whole = nn.Sequential(nn.Flatten(), nn.Linear(360, 4)).double()
    parts, data = clone(whole), [(input.double(), target) for input, target in images()]
    for net, plugins in ((whole, ["mixup"]), (parts, ["split:into=4", "mixup"])):
        fit(net, cross_entropy, sgd, data, seed=1, plugins=plugins)
    same(whole, parts, 1e-12)


def test_numbers_are_mixed_as_they_are(clone, same):
    """Regression: targets of shape (N, 1), inputs that are a table."""
    torch.manual_seed(0)
    net, data = nn.Linear(6, 1), [(torch.randn(8, 6), torch.randn(8, 1)) for _ in range(3)]
    other = clone(net)
    fit(net, nn.MSELoss(), sgd, data, seed=1, plugins=["mixup:alpha=1"])
    torch.manual_seed(1)
    optimizer, beta = sgd(other.parameters()), torch.distributions.Beta(torch.tensor(1.0), torch.tensor(1.0))
    for input, target in data:
        share = beta.sample().item()
        mixed, between = (part.roll(1, 0) * (1 - share) + part * share for part in (input, target))
        optimizer.zero_grad()
        nn.functional.mse_loss(other(mixed), between).backward()
        optimizer.step()
    same(net, other, 1e-7)              # multiplied in another order


def test_a_dict_is_mixed_without_its_whole_numbers(model):
    record = Batches()

    class Net(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, pixel_values, length):
            return self.body(pixel_values)

    data = [{"pixel_values": input, "length": torch.arange(len(target)), "labels": target} for input, target in images()]
    fit(Net(model), cross_entropy, sgd, data, seed=1, plugins=["mixup", record])
    torch.manual_seed(1)
    assert [*record.seen[0]] == ["pixel_values", "length", "labels"]
    assert torch.equal(record.seen[0]["length"], torch.arange(8))
    assert record.seen[0]["labels"].shape == (8, 4)
    assert not torch.equal(record.seen[0]["pixel_values"], data[0]["pixel_values"])


def test_a_batch_of_one_sample_and_an_odd_one_are_mixed(model):
    """timm asks for an even number of samples."""
    model[1] = nn.Identity()
    assert fit(model, cross_entropy, sgd, images((1, 7)), plugins=["mixup", "cutmix"]).step == 2


def test_soft_targets_have_the_type_of_the_inputs(clone):
    net = nn.Sequential(nn.Flatten(), nn.Linear(360, 4)).double()
    record = Batches()
    fit(net, cross_entropy, sgd, [(input.double(), target) for input, target in images()], plugins=["mixup", record])
    assert record.seen[0][1].dtype == torch.float64


@pytest.mark.parametrize("plugins", [["mixup", "amp:dtype=bfloat16"], ["cutmix", "amp:dtype=float16"]])
def test_amp_takes_mixed_targets(model, plugins):
    run = fit(model, cross_entropy, sgd, images(), epochs=2, plugins=plugins)
    assert 0.5 < run.history[-1]["train_loss"] < 3


@pytest.mark.parametrize("plugins", [["mixup"], ["mixup:prob=0.5", "cutmix", "accumulate:every=2"]])
def test_a_resumed_run_equals_an_uninterrupted_one(model, clone, same, tmp_path, plugins):
    class Leave:
        @hookimpl
        def after_step(self, run: Run):
            if run.attempts == 4:
                run.leave = "a test"

    other, first = clone(model), clone(model)
    whole = fit(model, cross_entropy, sgd, images(), epochs=4, seed=1, plugins=plugins)
    fit(first, cross_entropy, sgd, images(), epochs=4, seed=1, plugins=[*plugins, "checkpoint", Leave()], out=tmp_path)
    resumed = fit(other, cross_entropy, sgd, images(), epochs=4, seed=1, plugins=[*plugins, "checkpoint"], out=tmp_path, resume=tmp_path)
    same(model, other)
    assert resumed.history == whole.history


@pytest.mark.parametrize(("plugins", "batch", "message"), [
    ([Mixup()], (torch.zeros(8, 3), torch.zeros(8, 2, dtype=torch.long)), r"mixup mixes one class per sample, of shape \(N,\).*\(8, 2\)"),
    ([Mixup()], (torch.zeros(8, 3), torch.zeros(8), torch.zeros(8)), "a pair .* a tuple"),
    ([Mixup()], (torch.zeros(8, 3, dtype=torch.long), torch.zeros(8, dtype=torch.long)), "floating-point inputs"),
    ([Cutmix()], (torch.zeros(8, 3), torch.zeros(8, dtype=torch.long)), "cutmix cuts images of one size"),
    ([Mixup(), Mixup()], (torch.zeros(8, 3), torch.zeros(8, dtype=torch.long)), "is given twice"),
])
def test_what_cannot_be_mixed_is_refused(plugins, batch, message):
    forward = None if len(batch) == 2 else lambda model, batch: (model(batch[0]).mean(), None)
    with pytest.raises(UsageError, match=message):
        fit(nn.Linear(3, 4), None if forward else cross_entropy, sgd, [batch], plugins=plugins, forward=forward)


@pytest.mark.parametrize("loss_fn", [nn.MultiMarginLoss(), nn.functional.nll_loss])
def test_a_loss_that_takes_no_probabilities_is_refused_before_training(loss_fn):
    with pytest.raises(UsageError, match="which (MultiMarginLoss|nll_loss) does not take; use torch.nn.CrossEntropyLoss"):
        fit(nn.Linear(3, 4), loss_fn, sgd, [(torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))], plugins=["mixup"])


def test_a_class_beyond_the_number_of_classes_is_named():
    with pytest.raises(UsageError, match="the targets of a batch are 2 to 2, and there are 2 classes, from 0 on; pass mixup:num_classes="):
        fit(nn.Linear(3, 4), cross_entropy, sgd, [(torch.zeros(8, 3), torch.full((8,), 2))], plugins=["mixup:num_classes=2"])


def test_an_unknown_number_of_classes_is_asked_for():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3, 4))

        def forward(self, input):
            return input @ self.weight

    with pytest.raises(UsageError, match="the number of classes is not known; pass mixup:num_classes="):
        fit(Table(), cross_entropy, sgd, [(torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))], plugins=["mixup"])
    fit(Table(), cross_entropy, sgd, [(torch.zeros(8, 3), torch.zeros(8, dtype=torch.long))], plugins=["mixup:num_classes=4"])


@pytest.mark.parametrize(("cls", "options", "message"), [
    (Mixup, {"alpha": 0}, "alpha is above 0"), (Mixup, {"prob": 1.5}, "prob is from 0 to 1"), (Cutmix, {"switch_prob": -1}, "switch_prob is from 0 to 1"),
    (Cutmix, {"num_classes": 0}, "num_classes is at least 1")])
def test_wrong_options_are_refused(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(**options)
