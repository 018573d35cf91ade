"""Pairs of training loops that differ in one thing, planted on purpose: the explanation names its update and its cause.

The loops are plain PyTorch, so that each planted cause is a line or two of what people write.
"""
import random
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from loopctl.tape import record
from loopctl.why.differences import explain_difference

SAMPLES, SIZE = 44, 4       # eleven batches in an epoch


class Net(nn.Module):
    """Layers with names, BatchNorm and dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.middle, self.last = nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = self.drop(self.norm(self.first(inputs)).relu())
        return self.last(self.middle(hidden).relu())


@dataclass
class Loop:
    """A training loop. A planted cause is another attribute, or a method that does something else."""

    epochs: int = 2
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    accumulate: int = 1
    max_norm: float | None = 0.5
    order_seed: int = 1
    optimizer_class: Any = None
    stop_after: int = 10**6

    def seed(self):
        torch.manual_seed(0)
        random.seed(0)
        numpy.random.seed(0)

    def make_model(self):
        return Net()

    def make_optimizer(self, model):
        kind = self.optimizer_class or torch.optim.SGD
        options = {"momentum": self.momentum} if kind is torch.optim.SGD else {}
        return kind(model.parameters(), lr=self.lr, weight_decay=self.weight_decay, **options)

    def data(self):
        generator = torch.Generator().manual_seed(5)
        inputs = torch.randn(SAMPLES, 6, generator=generator)
        return inputs, torch.randint(0, 3, (SAMPLES,), generator=generator)

    def indices(self, epoch):
        generator = torch.Generator().manual_seed(self.order_seed + epoch)
        return torch.randperm(SAMPLES, generator=generator).split(SIZE)

    def batch(self, inputs, targets):
        return inputs, targets

    def loss(self, model, inputs, targets, share):
        return self.loss_fn(model(inputs), targets) * share

    def share(self, number, group, batches):
        """What the loss of a micro-batch is multiplied by."""
        return 1 / len(group)

    def groups(self, batches):
        return [batches[start:start + self.accumulate] for start in range(0, len(batches), self.accumulate)]

    def before_backward(self, update): ...
    def after_backward(self, model, update): ...
    def before_update(self, model, update): ...
    def after_update(self, model, update): ...
    def after_epoch(self, model, epoch): ...
    def set_rate(self, optimizer, update, epoch): ...

    def clear(self, optimizer, update):
        optimizer.zero_grad()

    def clip(self, model, update):
        if self.max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), self.max_norm)

    def step(self, optimizer, update):
        optimizer.step()

    def train(self, file):
        self.seed()
        self.loss_fn = nn.CrossEntropyLoss()
        self.model = model = self.make_model()
        self.optimizer = optimizer = self.make_optimizer(model)
        all_inputs, all_targets = self.data()
        update = 0
        self.seed()
        with record(file, model):
            for epoch in range(self.epochs):
                model.train()
                for group in self.groups(self.indices(epoch)):
                    update += 1
                    self.set_rate(optimizer, update, epoch)
                    self.clear(optimizer, update)
                    for number, index in enumerate(group):
                        inputs, targets = self.batch(all_inputs[index], all_targets[index])
                        self.before_backward(update)
                        self.loss(model, inputs, targets, self.share(number, group, index)).backward()
                    self.after_backward(model, update)
                    self.clip(model, update)
                    self.before_update(model, update)
                    self.step(optimizer, update)
                    self.after_update(model, update)
                    if update == self.stop_after:
                        return
                self.after_epoch(model, epoch)


def reached(update, at):
    return update == at


# The planted causes. Each gives the plain loop or another one to compare with, the cause, and the update.


class OtherSeed(Loop):
    def make_model(self):
        torch.manual_seed(3)
        return Net()


class NewHead(Loop):
    def make_model(self):
        model = Net()
        model.last.reset_parameters()
        return model


class NotShuffled(Loop):
    def indices(self, epoch):
        return torch.arange(SAMPLES).split(SIZE)


class SameOrderEachEpoch(Loop):
    def indices(self, epoch):
        return super().indices(0)


class OrderWithinBatch(Loop):
    def indices(self, epoch):
        found = list(super().indices(epoch))
        found[4] = found[4].flip(0)
        return found


class EpochBeginsAgain(Loop):
    def indices(self, epoch):
        found = super().indices(epoch)
        return [*found[:6], *found[:5]] if epoch == 0 else found


class BatchesLeftOut(Loop):
    def indices(self, epoch):
        found = super().indices(epoch)
        return [*found[:3], *found[5:]]


class OrderFromTheGlobalGenerator(Loop):
    def indices(self, epoch):
        return torch.randperm(SAMPLES).split(SIZE)


class OrderAfterAnEvaluation(OrderFromTheGlobalGenerator):
    def after_epoch(self, model, epoch):
        torch.randn(3)


class PartOfTheData(Loop):
    def indices(self, epoch):
        return super().indices(epoch)[:4]


class RepeatedSamples(Loop):
    def indices(self, epoch):
        found = list(super().indices(epoch))
        found[10] = torch.cat([found[10][:2], found[0][:2]])
        return found


class SmallerBatches(Loop):
    def indices(self, epoch):
        return torch.cat(super().indices(epoch)).split(2)


class ScaledInputs(Loop):
    def batch(self, inputs, targets):
        return inputs / 255, targets


class Augmented(Loop):
    def batch(self, inputs, targets):
        return inputs + 0.1 * torch.randn(inputs.shape), targets


class SomeAugmented(Loop):
    def batch(self, inputs, targets):
        return torch.cat([inputs[:2], inputs[2:].flip(1)]), targets


class OtherLabels(Loop):
    def batch(self, inputs, targets):
        return inputs, (targets + 1) % 3


class HalfPrecision(Loop):
    def loss(self, model, inputs, targets, share):
        with torch.autocast("cpu", torch.bfloat16):
            return super().loss(model, inputs, targets, share)


class Double(Loop):
    def make_model(self):
        return Net().double()

    def batch(self, inputs, targets):
        return inputs.double(), targets


class SumOfLosses(Loop):
    def loss(self, model, inputs, targets, share):
        return cross_entropy(model(inputs), targets, reduction="sum")


@dataclass
class Accumulated(Loop):
    accumulate: int = 4
    max_norm: float | None = None


class LastGroupDividedByFour(Accumulated):
    def share(self, number, group, batches):
        return 1 / 4


class GroupsAcrossEpochs(Accumulated):
    def train(self, file):
        once = [*super().indices(0), *super().indices(1)]
        self.indices = lambda epoch: once
        self.epochs = 1
        super().train(file)


class Uneven(Accumulated):
    def indices(self, epoch):
        order = torch.cat(super().indices(epoch))
        return order.split([4, 4, 4, 2, 4, 4, 4, 2, 4, 4, 4, 4])

    def share(self, number, group, batch):
        return len(batch) / sum(map(len, group))


class UnevenCountedByBatch(Uneven):
    def share(self, number, group, batch):
        return 1 / len(group)


class ClearedBeforeEachBatch(Accumulated):
    def before_backward(self, update):
        self.optimizer.zero_grad()


class NotCleared(Loop):
    def clear(self, optimizer, update):
        if update != 7:
            optimizer.zero_grad()


class NotClipped(Loop):
    def clip(self, model, update): ...


class Scaled(Loop):
    """Loss scaling as it should be."""

    def loss(self, model, inputs, targets, share):
        return super().loss(model, inputs, targets, share) * 1024

    def after_backward(self, model, update):
        for parameter in model.parameters():
            parameter.grad /= 1024


class ClippedBeforeUnscale(Scaled):
    def after_backward(self, model, update): ...

    def before_update(self, model, update):
        super().after_backward(model, update)


class NotUnscaled(Scaled):
    def after_backward(self, model, update): ...


class Warmup(Loop):
    def set_rate(self, optimizer, update, epoch):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, update / 15)


class ScheduleAhead(Warmup):
    def set_rate(self, optimizer, update, epoch):
        super().set_rate(optimizer, update + (update > 4), epoch)


class SchedulePerEpoch(Warmup):
    def set_rate(self, optimizer, update, epoch):
        super().set_rate(optimizer, 11 * epoch + 1, epoch)


class NoDecayOfBiases(Loop):
    def make_optimizer(self, model):
        decayed = [each for each in model.parameters() if each.ndim > 1]
        others = [each for each in model.parameters() if each.ndim < 2]
        return torch.optim.SGD([{"params": decayed}, {"params": others, "weight_decay": 0}], lr=0.1, momentum=0.9,
                               weight_decay=0.01)


class GroupsInAnotherOrder(NoDecayOfBiases):
    def make_optimizer(self, model):
        optimizer = super().make_optimizer(model)
        optimizer.param_groups.reverse()
        return optimizer


class PenaltyOnWeights(Loop):
    def loss(self, model, inputs, targets, share):
        penalty = sum(each.square().sum() for each in model.parameters())
        return super().loss(model, inputs, targets, share) + 0.005 * penalty


class Nesterov(Loop):
    def make_optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)


class FrozenLayer(Loop):
    def make_model(self):
        model = Net()
        model.first.requires_grad_(False)
        return model


class NotInTheOptimizer(Loop):
    def make_optimizer(self, model):
        held = [each for name, each in model.named_parameters() if not name.startswith("last")]
        return torch.optim.SGD(held, lr=0.1, momentum=0.9)


class DetachedLayer(Loop):
    def make_model(self):
        model = Net()
        model.norm.register_forward_hook(lambda module, inputs, output: output.detach())
        return model


class NoTrainAfterEvaluation(Loop):
    def after_epoch(self, model, epoch):
        with torch.no_grad():
            model.eval()(self.data()[0])
        model.train = lambda mode=True: model


class StatisticsInEvaluation(Loop):
    def after_epoch(self, model, epoch):
        with torch.no_grad():
            model(self.data()[0])


class RandomNumbersInEvaluation(Loop):
    def after_epoch(self, model, epoch):
        torch.randn(3)


class OtherBatchNormMomentum(Loop):
    def make_model(self):
        model = Net()
        model.norm.momentum = 0.2
        return model


class NoDropout(Loop):
    def make_model(self):
        model = Net()
        model.drop.p = 0.0
        return model


class SkippedUpdate(Loop):
    def make_optimizer(self, model):
        class Skipping(torch.optim.SGD):
            calls = 0

            def step(self, closure=None):
                self.calls += 1
                return None if self.calls == 8 else super().step(closure)

        Skipping.__name__ = "SGD"
        return Skipping(model.parameters(), lr=0.1, momentum=0.9)


class NotFinite(Loop):
    def loss(self, model, inputs, targets, share):
        loss = super().loss(model, inputs, targets, share)
        return loss * float("nan") if (self.optimizer.state and len(self.seen) == 5) else loss

    def before_backward(self, update):
        self.seen = range(update)


class AverageNotPutBack(Loop):
    def after_epoch(self, model, epoch):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)


class MomentumLost(Loop):
    def after_update(self, model, update):
        if update == 5:
            self.optimizer.state.clear()


class NoisyGradients(Loop):
    def after_backward(self, model, update):
        generator = torch.Generator().manual_seed(update)
        if update >= 4:
            for parameter in model.parameters():
                parameter.grad += 0.01 * torch.randn(parameter.shape, generator=generator)


class HookOnALayer(Loop):
    def make_model(self):
        model = Net()
        model.first.weight.register_hook(lambda gradient: gradient * 0.1)
        return model


class OtherOrderOfSums(Loop):
    def loss(self, model, inputs, targets, share):
        return cross_entropy(model(inputs).double(), targets).float() * share


PLANTED = [
    # what is planted, the loop to compare with, the cause, the update
    (OtherSeed(), Loop(), "initial weights", 1),
    (NewHead(), Loop(), "initial weights", 1),
    (Loop(order_seed=50), Loop(), "order", 1),
    (NotShuffled(), Loop(), "order", 1),
    (SameOrderEachEpoch(), Loop(), "order", 12),
    (OrderAfterAnEvaluation(), OrderFromTheGlobalGenerator(), "order", 12),
    (PartOfTheData(order_seed=50), PartOfTheData(), "order", 1),
    (OrderWithinBatch(), Loop(), "order", 5),
    (EpochBeginsAgain(), Loop(), "data repeated", 7),
    (BatchesLeftOut(), Loop(), "data missing", 4),
    (RepeatedSamples(epochs=1), Loop(epochs=1), "data repeated", 11),
    (SmallerBatches(), Loop(), "batch size", 1),
    (ScaledInputs(), Loop(), "inputs", 1),
    (Augmented(), Loop(), "inputs", 1),
    (SomeAugmented(), Loop(), "inputs", 1),
    (OtherLabels(), Loop(), "targets", 1),
    (HalfPrecision(), Loop(), "dtype", 1),
    (Double(), Loop(), "dtype", 1),
    (SumOfLosses(max_norm=None), Loop(max_norm=None), "scale", 1),
    (LastGroupDividedByFour(), Accumulated(), "scale", 3),
    (GroupsAcrossEpochs(), Accumulated(), "grouping", 3),
    (UnevenCountedByBatch(), Uneven(), "weighting", 1),
    (ClearedBeforeEachBatch(), Accumulated(), "cleared gradients", 1),
    (NotCleared(max_norm=None), Loop(max_norm=None), "stale gradients", 7),
    (NotClipped(), Loop(), "clipping", 1),
    (Loop(max_norm=0.25), Loop(), "clipping", 1),
    (ClippedBeforeUnscale(), Scaled(), "clipping before unscale", 1),
    (ClippedBeforeUnscale(), Loop(), "clipping before unscale", 1),
    (NotUnscaled(max_norm=None), Loop(max_norm=None), "unscale", 1),
    (Loop(lr=0.2), Loop(), "rate", 1),
    (Warmup(), Loop(), "schedule", 1),
    (ScheduleAhead(), Warmup(), "schedule", 5),
    (SchedulePerEpoch(), Warmup(), "schedule", 2),
    (Loop(optimizer_class=torch.optim.AdamW, lr=0.01, weight_decay=0.1),
     Loop(optimizer_class=torch.optim.Adam, lr=0.01, weight_decay=0.1), "weight decay", 1),
    (Loop(weight_decay=0.01), Loop(), "weight decay", 1),
    (NoDecayOfBiases(), Loop(weight_decay=0.01), "groups", 1),
    (PenaltyOnWeights(max_norm=None), Loop(max_norm=None), "weight decay", 1),
    (Loop(momentum=0.8), Loop(), "option", 1),
    (Nesterov(), Loop(), "option", 1),
    (Loop(optimizer_class=torch.optim.RMSprop, lr=0.01), Loop(optimizer_class=torch.optim.Adagrad, lr=0.01),
     "optimizer", 1),
    (FrozenLayer(), Loop(), "missing gradients", 1),
    (DetachedLayer(), Loop(), "missing gradients", 1),
    (NotInTheOptimizer(max_norm=None), Loop(max_norm=None), "frozen", 1),
    (NoTrainAfterEvaluation(), Loop(), "mode", 12),
    (StatisticsInEvaluation(), Loop(), "buffers", 12),
    (RandomNumbersInEvaluation(), Loop(), "random numbers", 12),
    (OtherBatchNormMomentum(), Loop(), "buffers", 1),
    (NoDropout(), Loop(), "random numbers", 1),
    (SkippedUpdate(), Loop(), "skipped", 8),
    (NotFinite(), Loop(), "not finite", 5),
    (AverageNotPutBack(), Loop(), "weights changed", 12),
    (MomentumLost(), Loop(), "optimizer state", 6),
    (NoisyGradients(max_norm=None), Loop(max_norm=None), "changed gradients", 4),
    (NoisyGradients(), Loop(), "changed gradients", 4),
    (HookOnALayer(max_norm=None), Loop(max_norm=None), "scale", 1),
    (Loop(stop_after=15), Loop(), "length", 15),
    (OtherOrderOfSums(max_norm=None), Loop(max_norm=None), "rounding", 1),
]


@pytest.fixture(scope="module")
def tape_of(tmp_path_factory):
    """A function that returns the tape of a loop; each is trained once."""
    folder, known = tmp_path_factory.mktemp("tapes"), {}

    def tape(loop):
        key = repr(loop)
        if key not in known:
            known[key] = folder / f"{len(known)}.tape"
            loop.train(known[key])
        return known[key]

    return tape


@pytest.mark.parametrize(("planted", "plain", "cause", "update"), PLANTED,
                         ids=[f"{type(planted).__name__}-{cause}" for planted, _, cause, _ in PLANTED])
def test_the_update_and_the_cause_of_a_planted_difference_are_named(planted, plain, cause, update, tmp_path, tape_of):
    planted.train(tmp_path / "planted")
    files = tmp_path / "planted", tape_of(plain)
    for pair in (files, files[::-1]):
        found = explain_difference(*pair)
        assert (found.cause, found.update) == (cause, update), found.text
        assert not found.plugins


def test_equal_loops_are_the_same(tmp_path):
    Loop().train(tmp_path / "a")
    Loop().train(tmp_path / "b")
    assert explain_difference(tmp_path / "a", tmp_path / "b").same


def test_an_optimizer_state_that_was_loaded_is_not_called_lost(tmp_path):
    model, inputs = nn.Linear(3, 2), torch.randn(4, 3)

    def train(file, updates, state=None, resume=False):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if state:
            optimizer.load_state_dict(state)
        with record(file, model, resume=resume):
            for _ in range(updates):
                optimizer.zero_grad()
                model(inputs).square().mean().backward()
                optimizer.step()
        return optimizer.state_dict()

    start = {name: value.clone() for name, value in model.state_dict().items()}
    train(tmp_path / "whole", 4)
    model.load_state_dict(start)
    train(tmp_path / "resumed", 2, train(tmp_path / "resumed", 2), resume=True)
    assert explain_difference(tmp_path / "whole", tmp_path / "resumed").same
    model.load_state_dict(start)
    train(tmp_path / "lost", 2)
    train(tmp_path / "lost", 2, resume=True)
    assert explain_difference(tmp_path / "whole", tmp_path / "lost").cause == "optimizer state"


def test_a_step_without_a_backward_pass_is_named(tmp_path):
    class CreatesStateFirst(Loop):
        def before_backward(self, update):
            if update == 3:
                self.optimizer.step()

    CreatesStateFirst().train(tmp_path / "a")
    Loop().train(tmp_path / "b")
    found = explain_difference(tmp_path / "a", tmp_path / "b")
    assert (found.cause, found.update) == ("extra update", 3), found.text
    assert "A steps its optimizer without a backward pass before it" in found.text


def test_groups_in_another_order_are_compared_by_their_parameters(tmp_path):
    GroupsInAnotherOrder().train(tmp_path / "a")
    NoDecayOfBiases().train(tmp_path / "b")
    found = explain_difference(tmp_path / "a", tmp_path / "b")
    assert found.cause in ("", "rounding"), found.text          # foreach steps groups one after the other


def test_values_that_are_not_finite_in_both_are_described(tmp_path):
    for name, value in (("a", float("nan")), ("b", float("inf"))):
        model = nn.Linear(3, 2)
        torch.nn.init.zeros_(model.weight)
        torch.nn.init.zeros_(model.bias)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with record(tmp_path / name, model):
            for _ in range(2):
                optimizer.zero_grad()
                (model(torch.ones(1, 3)) * value).sum().backward()
                optimizer.step()
    found = explain_difference(tmp_path / "a", tmp_path / "b")
    assert (found.same, found.update) == (False, 1)


def test_of_updates_that_no_optimizer_of_torch_makes_the_gradients_are_not_compared(tmp_path):
    """As Keras does, which clears the gradients before each batch and adds them up elsewhere."""
    inputs = torch.randn(6, 4, 3)

    def train(file, own):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with record(file, model) as tape:
            for start in (0, 3):
                sums = [torch.zeros_like(each) for each in model.parameters()]
                optimizer.zero_grad()
                for number in range(start, start + 3):
                    if own:
                        optimizer.zero_grad()
                    model(inputs[number]).square().mean().backward()
                    sums = [total + each.grad for total, each in zip(sums, model.parameters(), strict=True)]
                if not own:
                    optimizer.step()
                else:
                    with tape.update(lr=0.1), torch.no_grad():
                        for parameter, total in zip(model.parameters(), sums, strict=True):
                            parameter -= (0.1 if start == 0 else 0.2) * total

    train(tmp_path / "a", own=False)
    train(tmp_path / "b", own=True)
    found = explain_difference(tmp_path / "a", tmp_path / "b")
    assert found.update == 2, found.text
    assert not found.certain
    assert "gradients" not in found.text.partition("Equal before that")[2]
