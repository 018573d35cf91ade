"""The plugin accumulate: k micro-batches give the gradient of one big batch."""
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()
FACTORIES = [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.Adam, lr=1e-2),
             partial(torch.optim.LBFGS, lr=0.5, max_iter=4)]


def concatenated(batches, every):
    """Each group of `every` batches, concatenated into one big batch."""
    groups = [batches[start:start + every] for start in range(0, len(batches), every)]
    return [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups]


@pytest.mark.compares(use="accumulate", technique="the update of one large batch, also of an uneven last group",
                      source="the loop by hand", tolerance="1e-12: sums are in another order")
@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.func.__name__)
@pytest.mark.parametrize("every", [2, 3, 8, 50])
def test_uneven_micro_batches_give_the_update_of_one_big_batch(plain, batches, clone, same, factory, every):
    """To 1e-12 in float64, because sums are in another order. The last batch is smaller, the last group shorter."""
    accumulated, reference = plain.double(), clone(plain)
    data = [(input.double(), target) for input, target in batches]
    run = fit(accumulated, cross_entropy, factory, data, epochs=2, plugins=[f"accumulate:every={every}"])
    reference_run = fit(reference, cross_entropy, factory, concatenated(data, every), epochs=2)
    same(accumulated, reference, 1e-12)
    assert run.step == reference_run.step == 2 * -(-len(batches) // every)
    assert run.history[-1]["train_loss"] == pytest.approx(reference_run.history[-1]["train_loss"], rel=1e-12)


@pytest.mark.compares(use="accumulate", technique="gradient accumulation, each micro-batch weighted by its samples",
                      source="the loop by hand", tolerance="to the bit")
def test_equals_a_plain_loop_to_the_bit(net, batches, clone, same, sgd):
    other = clone(net)
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["accumulate:every=3"], seed=1)
    torch.manual_seed(1)
    optimizer = sgd(other.parameters())
    other.train()
    for _ in range(2):
        for start in range(0, len(batches), 3):
            group = batches[start:start + 3]
            total = sum(len(target) for _, target in group)
            optimizer.zero_grad()
            for input, target in group:
                (cross_entropy(other(input), target) * (len(target) / total)).backward()
            optimizer.step()
    same(net, other)


def test_micro_batches_are_weighted_by_batch_weight(plain, batches, clone, same, sgd):
    """A plugin weights micro-batches by their tokens instead of samples, here with a tensor on the device."""

    class Tokens:
        @hookimpl
        def batch_weight(self, batch):
            return (batch[1] == 0).sum()

    other = clone(plain)
    run = fit(plain, cross_entropy, sgd, batches, plugins=["accumulate:every=4", Tokens()])
    optimizer, losses, weights = sgd(other.parameters()), [], []
    for start in (0, 4):
        group = batches[start:start + 4]
        counts = [(target == 0).sum() for _, target in group]
        optimizer.zero_grad()
        for (input, target), count in zip(group, counts, strict=True):
            loss = cross_entropy(other(input), target) * (count / sum(counts))
            loss.backward()
            losses.append(loss.item())
        weights += [sum(counts).item()] * 4
        optimizer.step()
    same(plain, other)
    mean = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / (weights[0] + weights[4])
    assert run.history[0]["train_loss"] == pytest.approx(mean, rel=1e-6)     # the weights were rounded to float32


def test_hooks_see_all_micro_batches_of_a_step_and_their_weights(plain, batches, sgd):
    sizes = []

    class Recorder:
        @hookimpl
        def before_step(self, run: Run):
            sizes.append((len(run.batches), run.weight, run.seen))

        @hookimpl
        def micro_step(self, run: Run, batch, weight, last):
            sizes.append((round(weight, 3), last))
            loss = run.hook.compute_loss(run=run, batch=batch) * weight
            return run.hook.backward(run=run, loss=loss).detach()

    fit(plain, cross_entropy, sgd, batches, plugins=["accumulate:every=5", Recorder()])
    assert sizes == [(5, 40, 0), *[(0.2, False)] * 4, (0.2, True),
                     (3, 19, 5), (round(8 / 19, 3), False), (round(8 / 19, 3), False), (round(3 / 19, 3), True)]
