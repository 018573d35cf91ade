"""Zero is a weight: steps and evaluations in which nothing counts, or a part of them does not, are right."""
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()
adamw = partial(torch.optim.AdamW, lr=0.01)
EMPTY = (torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))


def equal(model, other):
    return all(torch.equal(one, two) for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("plugins", [[], ["accumulate:every=3"], ["split:into=2"], ["nan_guard"], ["clip", "nan_guard:action=skip"],
                                     ["amp:dtype=bfloat16"], ["sam"], ["ema"]], ids=" ".join)
@pytest.mark.fault(row="B1", given="a batch of no samples in train, in an accumulated group and in valid", right="it counts nothing, and the rest is right")
def test_an_empty_batch_counts_nothing(net, clone, batches, valid, plugins):
    """With accumulation the empty batch takes a place in its group; without, it makes a step without an update."""
    batches = batches[:7]           # BatchNorm refuses a part of one sample
    model, other = clone(net), clone(net)
    torch.manual_seed(1)
    with_empty = fit(model, cross_entropy, adamw, [batches[0], EMPTY, *batches[1:]], [EMPTY, *valid, EMPTY], epochs=2, plugins=plugins)
    torch.manual_seed(1)
    if "accumulate:every=3" in plugins:
        assert with_empty.step == 2 * 3         # of 8 batches; the updates themselves are compared below
        return
    without = fit(other, cross_entropy, adamw, batches, valid, epochs=2, plugins=plugins)
    assert equal(model, other)
    assert with_empty.step == without.step
    for row, right in zip(with_empty.history, without.history, strict=True):
        assert row | {"step": 0} == right | {"step": 0}


@pytest.mark.fault(row="B", given="an empty batch within an accumulated group", right="the update over the other batches of the group")
def test_an_empty_batch_in_a_group_leaves_the_group_as_it_is(plain, clone, batches):
    by_hand, model = clone(plain), clone(plain)
    optimizer = adamw(by_hand.parameters())
    for batch, other in ((batches[0], batches[7]), (batches[1], batches[2])):
        optimizer.zero_grad()
        for input, target in (batch, other):
            (cross_entropy(by_hand(input), target) * (len(input) / (len(batch[0]) + len(other[0])))).backward()
        optimizer.step()
    fit(model, cross_entropy, adamw, [batches[0], EMPTY, batches[7], batches[1], batches[2], EMPTY], plugins=["accumulate:every=3"])
    assert equal(model, by_hand)


@dataclass(eq=False)
class TokenWeights:
    """Weighs a batch by the labels that are not ignored, as a number or as a tensor."""

    tensor: bool = False

    @hookimpl
    def batch_weight(self, run: Run, batch):
        count = (batch[1] != -100).sum()
        return count if self.tensor else count.item()


IGNORED = (torch.randn(8, 6), torch.full((8,), -100))


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.fault(row="B2", given="all labels of a step ignored, where batch_weight counts the others", right="a step that changes nothing, and says so")
def test_a_step_in_which_all_labels_are_ignored_changes_nothing(plain, clone, batches, valid, caplog, tensor):
    model, other = clone(plain), clone(plain)
    run = fit(model, cross_entropy, adamw, [*batches[:3], IGNORED, IGNORED, *batches[3:]], [*valid, IGNORED], plugins=[TokenWeights(tensor)])
    expected = fit(other, cross_entropy, adamw, batches, valid, plugins=[TokenWeights(tensor)])
    assert equal(model, other)
    assert (run.step, run.attempts) == (8, 10)
    assert run.history[-1] == expected.history[-1]
    assert [record.message for record in caplog.records] == [
        "nothing counts in step 4, whose weight is 0, so it makes no update; further such steps are not reported"]


# Further inputs


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.fault(row="B", given="a micro-batch whose labels are all ignored, in a group with others", right="weight 0 in the mean, although its own loss is NaN")
def test_a_micro_batch_of_weight_zero_has_no_part_in_its_step(plain, clone, batches, tensor):
    model, by_hand = clone(plain), clone(plain)
    optimizer = adamw(by_hand.parameters())
    cross_entropy(by_hand(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    run = fit(model, cross_entropy, adamw, [batches[0], IGNORED], plugins=["accumulate:every=2", TokenWeights(tensor)])
    assert equal(model, by_hand)
    assert run.history[-1]["train_loss"] == run.history[-1]["train_loss"]       # not NaN


@pytest.mark.fault(row="B", given="a batch of weight 0, split into parts", right="a step that changes nothing")
def test_a_batch_of_weight_zero_can_be_split(plain, clone, batches):
    model, other = clone(plain), clone(plain)
    fit(model, cross_entropy, adamw, [batches[0], IGNORED, batches[1]], plugins=["split:into=2", TokenWeights()])
    fit(other, cross_entropy, adamw, batches[:2], plugins=["split:into=2", TokenWeights()])
    assert equal(model, other)


@pytest.mark.fault(row="B", given="an epoch in which nothing counts", right="no update, and a loss that is NaN and not an error")
def test_an_epoch_in_which_nothing_counts_makes_no_update(plain, clone):
    model = clone(plain)
    run = fit(model, cross_entropy, adamw, [EMPTY, EMPTY], [EMPTY])
    assert equal(model, plain)
    assert (run.step, run.attempts) == (0, 2)
    assert run.history[-1]["train_loss"] != run.history[-1]["train_loss"]


@pytest.mark.fault(row="B", given="a metric in an evaluation whose last batch has weight 0", right="the mean of the others")
def test_a_metric_of_a_batch_of_weight_zero_does_not_count(plain, batches, valid):
    def mean_target(output, target):
        return target.float().mean()

    run = fit(plain, cross_entropy, adamw, batches, [*valid, IGNORED], metrics={"m": mean_target}, plugins=[TokenWeights()])
    assert run.history[-1]["val_m"] == pytest.approx(sum(target.sum().item() for _, target in valid) / 13, rel=1e-6)


@pytest.mark.fault(row="B", given="float16 scaling and a step in which nothing counts", right="the scale and the weights stay")
def test_loss_scaling_ignores_a_step_in_which_nothing_counts(plain, clone, batches):
    model, other = clone(plain), clone(plain)
    plugins = ["amp:dtype=float16,growth_interval=2"]
    run = fit(model, cross_entropy, adamw, [batches[0], EMPTY, batches[1]], plugins=plugins)
    expected = fit(other, cross_entropy, adamw, batches[:2], plugins=plugins)
    assert equal(model, other)
    assert run.hook.plugins["amp"].state_dict() == expected.hook.plugins["amp"].state_dict()


def trained_with(model, train, plugins=()):
    run = fit(model, cross_entropy, adamw, train, train[:2], plugins=["ddp", *plugins], seed=0)
    return model.state_dict(), run.step, run.history[-1]["val_loss"]


@pytest.mark.fault(row="B", given="empty batches with two processes", right="the update of one process over the others")
def test_empty_batches_with_two_processes(ranks, plain, batches):
    full = ranks(2, trained_with, plain, batches)
    with_empty = ranks(2, trained_with, plain, [EMPTY, *batches[:3], EMPTY, EMPTY, *batches[3:]])
    for one, other in zip(full, with_empty, strict=True):
        assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
        assert one[1] == other[1]


@pytest.mark.fault(row="B", given="two processes, and a step in which nothing counts in any", right="no process makes an update")
def test_a_step_of_weight_zero_with_two_processes(ranks, plain, batches):
    full = ranks(2, trained_with, plain, batches[:4], [TokenWeights()])
    zero = ranks(2, trained_with, plain, [*batches[:2], IGNORED, IGNORED, *batches[2:4]], [TokenWeights()])
    for one, other in zip(full, zero, strict=True):
        assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])
        assert (one[1], other[1]) == (2, 2)
