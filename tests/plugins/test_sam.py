"""The plugin sam, compared with the two steps of github.com/davda54/sam in a plain loop."""
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.sam import Sam

cross_entropy = nn.CrossEntropyLoss()
adam = partial(torch.optim.Adam, lr=1e-2)


def by_hand(model, optimizer, groups, epochs, rho=0.05, adaptive=False, max_norm=None, dtype=None):
    """Train, and return the mean loss of each epoch at the weights themselves.

    In the second pass BatchNorm statistics do not change.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    means = []
    torch.manual_seed(1)
    for _ in range(epochs):
        model.train()
        total = count = 0
        for group in groups:
            size = sum(len(target) for _, target in group)

            def compute_gradients(group=group, size=size):
                optimizer.zero_grad()
                summed = 0
                for input, target in group:
                    with torch.autocast("cpu", dtype, enabled=dtype is not None):
                        loss = cross_entropy(model(input), target)
                    if len(group) > 1:
                        loss = loss * (len(target) / size)
                    loss.backward()
                    summed += loss.item()
                return summed

            total, count = total + compute_gradients() * size, count + size
            weights = [weight for weight in model.parameters() if weight.grad is not None]
            with torch.no_grad():
                parts = [((weight.abs() if adaptive else 1.0) * weight.grad).norm(p=2) for weight in weights]
                scale = rho / (torch.norm(torch.stack(parts), p=2) + 1e-12)
                old = [weight.clone() for weight in weights]
                for weight in weights:
                    weight.add_((torch.pow(weight, 2) if adaptive else 1.0) * weight.grad * scale)
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = 0
            compute_gradients()
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            for weight, saved in zip(weights, old, strict=True):
                weight.data.copy_(saved)
            if max_norm:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
        means.append(total / count)
    for norm in norms:
        norm.num_batches_tracked //= 2          # davda54's counts the second pass too
    return means


def single(batches):
    """Groups of one batch each."""
    return [[batch] for batch in batches]


@pytest.mark.compares(use="sam", technique="sharpness-aware minimization, ASAM",
                      source="arXiv:2010.01412, arXiv:2102.11600; github.com/davda54/sam", tolerance="to the bit")
@pytest.mark.parametrize("factory", [partial(torch.optim.SGD, lr=0.1, momentum=0.9), adam], ids=["sgd", "adam"])
@pytest.mark.parametrize("options", [{}, {"rho": 0.5}, {"rho": 0.5, "adaptive": True}], ids=str)
def test_equals_davda54_sam_to_the_bit(net, batches, clone, same, factory, options):
    other = clone(net)
    run = fit(net, cross_entropy, factory, batches, epochs=3, plugins=[Sam(**options)], seed=1)
    losses = by_hand(other, factory(other.parameters()), single(batches), 3, **options)
    same(net, other)
    assert [row["train_loss"] for row in run.history] == pytest.approx(losses, rel=1e-6)
    assert run.step == 24


@pytest.mark.parametrize("order", [1, -1])
def test_with_accumulation_clipping_and_bfloat16(net, batches, clone, same, sgd, order):
    other = clone(net)
    plugins = ["accumulate:every=3", "clip:max_norm=0.2", "amp:dtype=bfloat16", "loopctl.plugins.sam:Sam:rho=0.1"][::order]
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=plugins, seed=1)
    groups = [batches[start:start + 3] for start in (0, 3, 6)]
    by_hand(other, sgd(other.parameters()), groups, 2, rho=0.1, max_norm=0.2, dtype=torch.bfloat16)
    same(net, other)


@pytest.mark.parametrize("order", [1, -1])
def test_clipping_changes_only_the_second_gradient(plain, batches, clone, same, sgd, order):
    """Tested with clipping by value: clipping by norm would not change the direction of the first gradient."""
    other, seen = clone(plain), []

    class Recorder:
        @hookimpl
        def grads_ready(self, run: Run):
            seen.append([weight.detach().clone() for weight in run.model.parameters()])

    plugins = ["clip:value=0.01", Sam(0.1)][::order]
    fit(plain, cross_entropy, sgd, batches[:1], plugins=[*plugins, Recorder()])
    before = [weight.detach().clone() for weight in other.parameters()]
    cross_entropy(other(batches[0][0]), batches[0][1]).backward()
    norm = torch.stack([weight.grad.norm() for weight in other.parameters()]).norm() + 1e-12
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(weight.grad * (0.1 / norm))
    optimizer = sgd(other.parameters())
    optimizer.zero_grad()
    cross_entropy(other(batches[0][0]), batches[0][1]).backward()
    nn.utils.clip_grad_value_(other.parameters(), 0.01)
    with torch.no_grad():
        for weight, saved in zip(other.parameters(), before, strict=True):
            weight.copy_(saved)
    optimizer.step()
    same(plain, other)
    assert len(seen) == 2               # both times with the original weights
    assert all(torch.equal(weight, saved) for weights in seen for weight, saved in zip(weights, before, strict=True))


def test_weights_and_statistics_are_restored_to_the_bit(net, batches, sgd, clone, same):
    """With a learning rate of 0 only BatchNorm statistics change, in the same way as without sam."""
    other = clone(net)
    no_update = partial(sgd, lr=0.0)
    net[3].p = other[3].p = 0.0
    fit(net, cross_entropy, no_update, batches, epochs=2, plugins=[Sam(3.0)])
    fit(other, cross_entropy, no_update, batches, epochs=2)
    same(net, other)


def test_an_error_in_the_second_pass_restores_the_weights(net, batches, sgd, clone):
    before, calls = clone(net).state_dict(), []

    class Fail:
        @hookimpl(wrapper=True)
        def compute_loss(self):
            calls.append(1)
            loss = yield
            if len(calls) == 2:
                raise KeyboardInterrupt
            return loss

    sam = Sam(3.0)
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, sgd, batches, plugins=[sam, Fail()])
    for name, weight in net.named_parameters():
        assert torch.equal(weight, before[name])
    assert net[1].num_batches_tracked == 1
    assert sam.saved == []


def test_frozen_parameters_do_not_change(plain, batches, sgd, clone):
    plain[0].requires_grad_(False)
    before = clone(plain)
    fit(plain, cross_entropy, sgd, batches, plugins=[Sam()])
    assert torch.equal(plain[0].weight, before[0].weight)
    assert not torch.equal(plain[2].weight, before[2].weight)


def test_lbfgs_float16_and_a_wrong_rho_are_refused(plain, batches, sgd):
    with pytest.raises(UsageError, match="sam: LBFGS computes gradients at several points"):
        fit(plain, cross_entropy, torch.optim.LBFGS, batches, plugins=[Sam()])
    for plugins in (["amp:dtype=float16", Sam()], [Sam(), "amp:dtype=float16"]):
        with pytest.raises(UsageError, match="amp: float16 loss scaling allows one gradient computation per step; use dtype=bfloat16"):
            fit(plain, cross_entropy, sgd, batches, plugins=plugins)
    with pytest.raises(ValueError, match="rho is above 0, not 0"):
        Sam(0)
