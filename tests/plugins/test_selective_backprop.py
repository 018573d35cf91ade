"""The plugin selective_backprop: samples with large losses are trained on, the others are left out."""
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.selective_backprop import SelectiveBackprop

cross_entropy = nn.CrossEntropyLoss()


@pytest.mark.compares(use="selective_backprop", technique="samples drawn by the rank of their loss", source="arXiv:1910.00762", tolerance="to the bit")
def test_equals_a_loop_by_hand_to_the_bit(net, batches, clone, same, sgd):
    """Three epochs of seven steps: samples are left out in the second half, but not in every second step."""
    other = clone(net)
    run = fit(net, cross_entropy, sgd, batches[:7], epochs=3, seed=1, plugins=["selective_backprop:start=0.5,end=0.9,keep=0.25"])
    torch.manual_seed(1)
    optimizer, means = sgd(other.parameters()), []
    for epoch in range(3):
        other.train()
        losses, counts = [], []
        for number, (input, target) in enumerate(batches[:7]):
            step = epoch * 7 + number
            if 0.5 <= step / 21 < 0.9 and step % 2:
                other.eval()
                with torch.no_grad():
                    each = nn.functional.cross_entropy(other(input), target, reduction="none")
                other.train()
                order = each.argsort().argsort()
                chance = ((order + 0.5) / len(each)) ** 3           # 1 / 0.25 - 1
                kept = torch.multinomial(chance, max(1, len(each) // 4)).sort().values
                input, target = input[kept], target[kept]
            optimizer.zero_grad()
            loss = cross_entropy(other(input), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            counts.append(len(target))
        means.append(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts))
    same(net, other)
    assert [row["train_loss"] for row in run.history] == pytest.approx(means, rel=1e-6)


def test_samples_of_large_losses_are_kept_more_often(plain):
    plugin = SelectiveBackprop(keep=0.5)
    torch.manual_seed(0)
    losses, kept = torch.tensor([0.1, 3.0, 0.2, 2.0]), torch.zeros(4)
    for _ in range(2000):
        kept[plugin.selected(losses, 2)] += 1
    order = kept.argsort().tolist()
    assert order == [0, 2, 3, 1]
    assert kept.sum() == 4000


def test_the_loss_function_is_as_before_after_an_error(plain, batches, sgd):
    loss_fn = nn.CrossEntropyLoss()
    wrong = [(torch.zeros(8, 5), batches[0][1])]
    with pytest.raises(RuntimeError):
        fit(plain, loss_fn, sgd, wrong, plugins=[SelectiveBackprop(start=0, interrupt=0)])
    assert loss_fn.reduction == "mean"
    assert plain.training


def test_a_step_weighs_the_samples_that_it_keeps(plain, batches, sgd):
    weights = []

    class Weights:
        @hookimpl
        def after_step(self, run: Run):
            weights.append(run.weight)

    fit(plain, cross_entropy, sgd, batches, plugins=[SelectiveBackprop(start=0, end=1, interrupt=0), "accumulate:every=4", Weights()])
    assert weights == [16, 13]


def test_metrics_get_the_true_targets_of_the_kept_samples(plain, batches, sgd):
    seen = []
    fit(plain, cross_entropy, sgd, batches[:2], plugins=["mixup", SelectiveBackprop(start=0, end=1, interrupt=0)],
        metrics={"true": lambda output, target: seen.append((len(output), target.shape, target.dtype)) or torch.zeros(())})
    assert seen == [(4, (4,), torch.int64)] * 2


@pytest.mark.parametrize("at", [3, 6])
def test_a_resumed_run_equals_an_uninterrupted_one(plain, batches, sgd, clone, same, tmp_path, at):
    class Leave:
        @hookimpl
        def after_step(self, run: Run):
            if run.attempts == at:
                run.leave = "a test"

    plugins, other, first = ["selective_backprop:start=0.1,interrupt=3"], clone(plain), clone(plain)
    fit(plain, cross_entropy, sgd, batches, epochs=2, seed=1, plugins=plugins)
    fit(first, cross_entropy, sgd, batches, epochs=2, seed=1, plugins=[*plugins, "checkpoint", Leave()], out=tmp_path)
    fit(other, cross_entropy, sgd, batches, epochs=2, seed=1, plugins=[*plugins, "checkpoint"], out=tmp_path, resume=tmp_path)
    same(plain, other)


class Half(nn.Module):
    def forward(self, output, target):
        return (output - target).abs().mean()


@pytest.mark.parametrize(("loss_fn", "message"), [(Half(), "no option reduction='none'"), (lambda output, target: output.mean(), "no option reduction='none'"),
                                                  (None, "computes its loss in another way")])
def test_a_loss_of_one_number_only_is_refused(plain, batches, sgd, loss_fn, message):
    with pytest.raises(UsageError, match=message):
        fit(plain, loss_fn, sgd, batches, plugins=["selective_backprop"])


def test_a_function_of_torch_is_taken(plain, batches, sgd):
    assert fit(plain, partial(nn.functional.cross_entropy, label_smoothing=0.1), sgd, batches, plugins=[SelectiveBackprop(start=0)]).step == 8


@pytest.mark.parametrize(("options", "message"), [({"start": 0.9, "end": 0.5}, "start before end"), ({"keep": 1}, "keep is between"), ({"interrupt": -1}, "interrupt is")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SelectiveBackprop(**options)
