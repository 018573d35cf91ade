"""label_smoothing against torch's own CrossEntropyLoss(label_smoothing=...) in a plain loop."""
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.label_smoothing import LabelSmoothing
from loopctl.testing import tiny_run


def by_hand(model, optimizer, batches, valid, loss_fn, epochs=2, groups=1, context=torch.enable_grad):
    """Train with `loss_fn` in a plain loop; return the mean of its values, and that of the plain loss in validation."""
    plain, losses = nn.CrossEntropyLoss(weight=getattr(loss_fn, "weight", None)), []
    torch.manual_seed(1)
    for _ in range(epochs):
        model.train()
        for start in range(0, len(batches), groups):
            group = batches[start:start + groups]
            count = sum(len(target) for _, target in group)
            optimizer.zero_grad()
            for input, target in group:
                with context():
                    loss = loss_fn(model(input), target)
                (loss * (len(target) / count)).backward()
                losses.append((loss.item(), len(target)))
            optimizer.step()
    losses = losses[len(losses) // epochs * (epochs - 1):]
    model.eval()
    with torch.no_grad():
        found = [(plain(model(input), target).item(), len(target)) for input, target in valid]
    return [sum(loss * count for loss, count in part) / sum(count for _, count in part) for part in (losses, found)]


@pytest.mark.parametrize(("loss_fn", "same_loss"), [
    (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)),
    (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3])), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]), label_smoothing=0.1)),
    (functional.cross_entropy, nn.CrossEntropyLoss(label_smoothing=0.1)),
    (partial(functional.cross_entropy, ignore_index=2), nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.1)),
], ids=["module", "weighted", "function", "partial"])
@pytest.mark.compares(use="label_smoothing", technique="targets mixed with the uniform distribution", source="torch.nn.CrossEntropyLoss", tolerance="to the bit")
def test_equals_a_plain_loop_to_the_bit_and_validation_stays_plain(net, batches, valid, sgd, clone, same, loss_fn, same_loss):
    plain = clone(net)
    train_loss, val_loss = by_hand(plain, sgd(plain.parameters()), batches, valid, same_loss)
    run = fit(net, loss_fn, sgd, batches, valid, epochs=2, plugins=["label_smoothing:smoothing=0.1"], seed=1)
    same(net, plain)
    # Tolerance 1e-6: the plain loop adds the losses in float64.
    assert run.history[-1]["train_loss"] == pytest.approx(train_loss, rel=1e-6)
    if "ignore_index" not in str(loss_fn):
        assert run.history[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-6)
    assert run.loss_fn is loss_fn
    assert not getattr(loss_fn, "label_smoothing", 0)


def test_targets_that_are_distributions_are_smoothed_too(net, batches, sgd, clone, same):
    generator, plain = torch.Generator().manual_seed(3), clone(net)
    soft = [(input, torch.rand(len(input), 3, generator=generator).softmax(1)) for input, _ in batches]
    optimizer = sgd(plain.parameters())
    torch.manual_seed(1)
    plain.train()
    for input, target in soft:
        optimizer.zero_grad()
        nn.CrossEntropyLoss(label_smoothing=0.2)(plain(input), target).backward()
        optimizer.step()
    fit(net, nn.CrossEntropyLoss(), sgd, soft, plugins=[LabelSmoothing(0.2)], seed=1)
    same(net, plain)


def test_with_accumulation_half_precision_and_parts_of_batches(plain, batches, sgd, clone, same):
    """The plain network has no BatchNorm, so a batch in parts has the gradient of the whole, but for rounding."""
    smoothed, by_parts = nn.CrossEntropyLoss(label_smoothing=0.1), clone(plain)
    other = clone(plain)
    by_hand(other, sgd(other.parameters()), batches, batches, smoothed, groups=2,
            context=partial(torch.autocast, "cpu", torch.bfloat16))
    fit(plain, nn.CrossEntropyLoss(), sgd, batches, epochs=2, plugins=["label_smoothing", "accumulate:every=2", "amp:dtype=bfloat16"], seed=1)
    same(plain, other)
    whole = clone(by_parts)
    by_hand(whole, sgd(whole.parameters()), batches, batches, smoothed)
    fit(by_parts, nn.CrossEntropyLoss(), sgd, batches, epochs=2, plugins=["split:into=2", "label_smoothing"], seed=1)
    same(by_parts, whole, 1e-5)        # the sums over a batch are added in another order


def test_other_plugins_see_the_loss_function_of_the_user(net, batches, valid, sgd):
    seen = set()

    class Watch:
        @hookimpl
        def before_step(self, run: Run):
            seen.add(run.loss_fn)

        @hookimpl
        def grads_ready(self, run: Run):
            seen.add(run.loss_fn)

    loss_fn = nn.CrossEntropyLoss()
    fit(net, loss_fn, sgd, batches, valid, plugins=["label_smoothing", Watch()], seed=1)
    assert seen == {loss_fn}


def test_an_error_of_the_loss_leaves_the_loss_function_of_the_user(net, batches, sgd):
    found = []

    class Keep:
        @hookimpl
        def setup(self, run: Run):
            found.append(run)

    loss_fn = nn.CrossEntropyLoss()
    with pytest.raises(UsageError, match="the class 7"):
        fit(net, loss_fn, sgd, [(batches[0][0], torch.full((8,), 7))], plugins=["label_smoothing", Keep()])
    assert found[0].loss_fn is loss_fn


class Focal(nn.CrossEntropyLoss):
    def forward(self, input, target):
        return ((1 - functional.softmax(input, 1)) ** 2 * functional.one_hot(target, 3)).mean()


@pytest.mark.parametrize(("loss_fn", "message"), [
    (nn.MSELoss(), "label_smoothing: loss_fn is a MSELoss, and labels are smoothed in torch's cross entropy; use"),
    (functional.nll_loss, "loss_fn is nll_loss, and"),
    (Focal(), "loss_fn is a Focal, and"),
    (None, "there is no loss_fn, and"),
    (nn.CrossEntropyLoss(label_smoothing=0.2), "loss_fn has label_smoothing=0.2 already, in validation too; leave it out there or here"),
    (partial(functional.cross_entropy, label_smoothing=0.2), "loss_fn has label_smoothing=0.2 already"),
])
def test_a_loss_that_cannot_be_smoothed_is_refused(loss_fn, message):
    with pytest.raises(UsageError, match=message):
        tiny_run("label_smoothing", loss_fn=loss_fn)


def test_what_cannot_be_smoothed_twice_or_at_all_is_refused():
    class OwnLoss:
        @hookimpl
        def compute_loss(self, run: Run, batch):
            return run.model(batch[0]).mean()

    with pytest.raises(UsageError, match="own_loss computes the loss, so labels cannot be smoothed"):
        tiny_run("label_smoothing", OwnLoss())
    with pytest.raises(UsageError, match="labels are smoothed once"):
        tiny_run("label_smoothing", "label_smoothing:smoothing=0.2")
    for smoothing in (0, -0.1, 1.5):
        with pytest.raises(UsageError, match="smoothing is above 0 and at most 1, not"):
            tiny_run(f"label_smoothing:smoothing={smoothing}")
