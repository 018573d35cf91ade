"""The plugin accumulate: k micro-batches give the gradient of one big batch."""
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from loopctl import Run, fit, hookimpl
from loopctl.plugins.accumulate import Accumulate

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


# A number of batches per update that changes during the run


class Sizes:
    """Records of each step how many batches it has, and its learning rate."""

    def __init__(self):
        self.seen, self.rates = [], []

    @hookimpl
    def after_step(self, run: Run):
        self.seen.append(len(run.batches))
        self.rates.append(run.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(("every", "sizes"), [
    ([1, "4@2ep"], [1] * 16 + [4] * 4), ([1, "3@10st"], [1] * 10 + [3, 3] + [3, 3, 2] * 2), ([2, "3@1ep", "8@2ep"], [2] * 4 + [3, 3, 2] + [8, 8]),
    ([1, "2@1ep", "4@11st"], [1] * 8 + [2, 2, 2, 2] + [4] * 4), ([4, "1@3ep"], [4] * 6 + [1] * 8), ([1, "4@1.5ep"], [1] * 16 + [4] * 4),
])
def test_a_changing_number_is_planned_and_done(plain, batches, sgd, every, sizes):
    """The plan is right from the start: schedules end at the last step."""
    seen = Sizes()
    run = fit(plain, cross_entropy, sgd, batches, epochs=4, plugins=[Accumulate(every), "linear:start_factor=1,end_factor=0,total_iters=100%,by=step", seen])
    planned = run.planned_steps
    assert seen.seen == sizes
    assert run.step == planned == len(sizes)
    assert run.progress == 1
    assert seen.rates == pytest.approx([0.1 * (1 - step / planned) for step in range(planned)])


@pytest.mark.parametrize("every", [[1, "4@1ep"], [1, "3@10st"]])
def test_a_changing_number_equals_a_plain_loop_to_the_bit(net, batches, clone, same, sgd, every):
    other = clone(net)
    fit(net, cross_entropy, sgd, batches, epochs=3, plugins=[Accumulate(every)], seed=1)
    torch.manual_seed(1)
    optimizer, step = sgd(other.parameters()), 0
    other.train()
    for epoch in range(3):
        start = 0
        while start < len(batches):
            number = every[0] if (epoch < 1 if every[1] == "4@1ep" else step < 10) else int(every[1][0])
            group = batches[start:start + number]
            total = sum(len(target) for _, target in group)
            optimizer.zero_grad()
            for input, target in group:
                (cross_entropy(other(input), target) * (len(target) / total)).backward()
            optimizer.step()
            start, step = start + number, step + 1
    same(net, other)


def test_durations_in_epochs_are_counted_in_the_steps_that_these_epochs_have(plain, batches, sgd):
    """Eight steps in each of two epochs, then two in each of four; 3ep are 18 steps."""
    seen = Sizes()
    run = fit(plain, cross_entropy, sgd, batches, epochs=6, plugins=[Accumulate([1, "4@2ep"]), "linear:start_factor=1,end_factor=0,total_iters=3ep,by=step", seen])
    assert run.planned_steps == 24
    assert seen.rates[:18] == pytest.approx([0.1 * (1 - step / 18) for step in range(18)])
    assert seen.rates[18:] == [0] * 6
    assert [run.planned.epochs(steps) for steps in (0, 4, 8, 16, 17, 18, 24)] == [0, 0.5, 1, 2, 2.5, 3, 6]
    assert [run.planned.position(step) for step in (0, 4, 8, 16, 17, 18, 23)] == [(0, 0), (0, 4), (1, 8), (2, 16), (2, 20), (3, 24), (5, 44)]


@pytest.mark.parametrize("at", [3, 11, 17])
def test_a_run_whose_number_changes_resumes_exactly(net, batches, sgd, clone, same, tmp_path, at):
    class Leave:
        @hookimpl
        def after_step(self, run: Run):
            if run.attempts == at:
                run.leave = "a test"

    other, third = clone(net), clone(net)
    plugins = ["accumulate:every=1,3@10st,4@2ep", "cosine:by=step", "checkpoint"]
    data = lambda: DataLoader([(input, target) for batch in batches for input, target in zip(*batch, strict=True)], 8, shuffle=True)      # noqa: E731
    arguments = {"epochs": 4, "seed": 1}
    whole = fit(net, cross_entropy, sgd, data(), plugins=plugins, out=tmp_path / "whole", **arguments)
    fit(third, cross_entropy, sgd, data(), plugins=[*plugins, Leave()], out=tmp_path / "left", **arguments)
    resumed = fit(other, cross_entropy, sgd, data(), plugins=plugins, out=tmp_path / "left", resume=tmp_path / "left", **arguments)
    same(net, other)
    assert resumed.history == whole.history


def test_with_max_steps_the_plan_ends_there(plain, batches, sgd):
    run = fit(plain, cross_entropy, sgd, batches, epochs=10**9, max_steps=20, plugins=["accumulate:every=1,4@2ep"])
    assert run.step == run.planned_steps == 20


def test_an_epoch_of_another_length_than_promised_changes_the_plan_of_all(plain, batches, sgd, caplog):
    class Estimated(list):
        def __len__(self):
            return 12

    class Planned:
        @hookimpl
        def epoch_end(self, run: Run):
            planned.append(run.planned_steps)

    seen, planned = Sizes(), []
    data = Estimated(batches)
    run = fit(plain, cross_entropy, sgd, data, epochs=4, plugins=["accumulate:every=1,4@2ep", seen, Planned()])
    assert planned == [20] * 4
    assert seen.seen == [1] * 16 + [4] * 4
    assert run.planned_steps == run.step == 20
    assert "its length is 12" in caplog.text


@pytest.mark.parametrize(("every", "message"), [
    (0, "every takes a whole number of at least 1, not 0"), ([1, 4], "'?4'?; write from which epoch or step on"), (["2@1ep"], "the first number holds from the start and has no position"), ([1, "4@50%"], "write from which"),
    ([1, "x@2ep"], "not 'x'"), ([1, "2@2ep", "4@1ep"], "do not increase"), ([], "every has no number")])
def test_a_wrong_number_of_batches_is_refused(every, message):
    with pytest.raises(ValueError, match=message):
        Accumulate(every)


def test_a_change_that_is_never_reached_is_said(plain, batches, sgd, caplog):
    fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["accumulate:every=1,4@5ep"])
    assert caplog.messages == ["accumulate: every=4 from epoch 5 on is never reached, as the run has 2"]
