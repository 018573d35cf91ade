"""The hook transform_batch: plugins change training batches, as a line before the forward pass in a loop by hand does."""
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.testing import checks
from loopctl.trial_run import trial_run

cross_entropy = nn.CrossEntropyLoss()


def noisy(input, target):
    """A change that draws random numbers, so that its order among other draws shows in the result."""
    return input + 0.1 * torch.randn_like(input), target


class Noise:
    """Adds noise to the inputs."""

    keeps_sample_count = True

    @hookimpl
    def transform_batch(self, batch):
        return noisy(*batch)


class NoiseOfAnyCount(Noise):
    """The same, without the promise that the number of samples stays."""

    keeps_sample_count = False


class Scale:
    """Multiplies the inputs."""

    keeps_sample_count = True

    def __init__(self, factor, offset=0):
        self.factor, self.offset = factor, offset

    @hookimpl
    def transform_batch(self, run: Run, batch):
        input, target = batch
        return input * self.factor + self.offset, target


class Half:
    """Keeps the first half of the samples, as a method does that leaves out easy ones."""

    @hookimpl
    def transform_batch(self, batch):
        return tuple(part[:(len(part) + 1) // 2] for part in batch)


class RandomData(Dataset):
    """Samples that draw random numbers when they are read."""

    def __len__(self):
        return 30

    def __getitem__(self, index):
        return torch.rand(6) + index / 30, index % 3


def by_hand(model, optimizer, data, epochs=2, every=1, change=noisy):
    """Train with accumulation over `every` batches, each changed before its forward pass. Returns the mean losses."""
    sizes = [len(target) for _, target in data] if isinstance(data, list) else [8, 8, 8, 6]
    means = []
    for _ in range(epochs):
        model.train()
        reader, total = iter(data), 0.0
        for start in range(0, len(sizes), every):
            group = sizes[start:start + every]
            optimizer.zero_grad()
            losses = []
            for size in group:
                input, target = change(*next(reader))
                loss = cross_entropy(model(input), target) * (size / sum(group))
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            total += torch.stack(losses).sum().double() * sum(group) if every > 1 else losses[0].double() * group[0]
        next(reader, None)
        means.append((total / sum(sizes)).item())
    return means


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("plugin", [Noise, NoiseOfAnyCount])
def test_equals_a_loop_that_changes_each_batch(net, batches, sgd, clone, same, every, plugin):
    if plugin is NoiseOfAnyCount and every > 1:
        pytest.skip("then all micro-batches of a step are changed before the first forward pass")
    other = clone(net)
    run = fit(net, cross_entropy, sgd, batches, epochs=2, seed=1, plugins=[plugin(), f"accumulate:every={every}"])
    torch.manual_seed(1)
    means = by_hand(other, sgd(other.parameters()), batches, every=every)
    same(net, other)
    assert [row["train_loss"] for row in run.history] == pytest.approx(means, rel=1e-12)


def test_data_change_and_dropout_draw_random_numbers_in_the_order_of_a_loop_by_hand(net, sgd, clone, same):
    other = clone(net)
    fit(net, cross_entropy, sgd, DataLoader(RandomData(), 8, shuffle=True), epochs=2, seed=1, plugins=["accumulate:every=2", Noise()])
    torch.manual_seed(1)
    by_hand(other, sgd(other.parameters()), DataLoader(RandomData(), 8, shuffle=True), every=2)
    same(net, other)


def test_plugins_change_a_batch_in_the_order_given(plain, batches, sgd, clone, same):
    other = clone(plain)
    fit(plain, cross_entropy, sgd, batches, plugins=[Scale(2), Scale(3, offset=1)])
    by_hand(other, sgd(other.parameters()), batches, epochs=1, change=lambda input, target: (input * 2 * 3 + 1, target))
    same(plain, other)


def test_a_batch_is_changed_before_it_is_weighed(plain, batches, sgd, clone, same):
    halves, other, weights = [Half().transform_batch(batch) for batch in batches], clone(plain), []

    class Weights:
        @hookimpl
        def before_step(self, run: Run):
            weights.append(run.weight)

    run = fit(plain, cross_entropy, sgd, batches, plugins=[Half(), "accumulate:every=3", Weights()])
    assert weights == [12, 12, 6]
    expected = fit(other, cross_entropy, sgd, halves, plugins=["accumulate:every=3"])
    same(plain, other)
    assert run.history[-1]["train_loss"] == expected.history[-1]["train_loss"]


def test_of_a_data_loader_a_changed_number_of_samples_is_weighed_too(plain, batches, sgd, clone, same):
    samples = [(input, target) for batch in batches for input, target in zip(*batch, strict=True)]
    other = clone(plain)
    fit(plain, cross_entropy, sgd, DataLoader(samples, 8), plugins=[Half(), "accumulate:every=4"])
    fit(other, cross_entropy, sgd, [Half().transform_batch(batch) for batch in DataLoader(samples, 8)], plugins=["accumulate:every=4"])
    same(plain, other)


def test_a_weight_that_a_plugin_gives_is_that_of_the_changed_batch(plain, batches, sgd):
    """As with sequences that are cut: the weight is the number of tokens that are left."""

    class Cut:
        keeps_sample_count = True

        @hookimpl
        def transform_batch(self, batch):
            return batch[0], batch[1].clamp(max=0)

    class Nonzero:
        @hookimpl
        def batch_weight(self, batch):
            return int((batch[1] != 0).sum()) + 1

    weights = []

    class Weights:
        @hookimpl
        def after_step(self, run: Run):
            weights.append(run.weight)

    fit(plain, cross_entropy, sgd, batches[:4], plugins=[Cut(), Nonzero(), "accumulate:every=2", Weights()])
    assert weights == [2, 2]


def test_split_divides_the_changed_batch(plain, batches, sgd, clone, same):
    data, change = batches[:7], [(input.double(), target) for input, target in batches[:7]]
    whole, parts = plain.double(), clone(plain)
    for model, plugins in ((whole, [Scale(2)]), (parts, ["split:into=4", Scale(2)])):
        fit(model, cross_entropy, sgd, change, epochs=2, plugins=plugins)
    same(whole, parts, 1e-12)           # sums are in another order
    assert len(data) == 7


def test_batches_of_an_evaluation_are_not_changed(plain, batches, valid, sgd):
    class Wrong:
        keeps_sample_count = True

        @hookimpl
        def transform_batch(self, run: Run, batch):
            assert not run.evaluating
            return batch[0] * 100, batch[1]

    run = fit(plain, cross_entropy, sgd, batches, valid, plugins=[Wrong()])
    with torch.no_grad():
        plain.eval()
        expected = sum(cross_entropy(plain(input), target).item() * len(target) for input, target in valid) / 13
    assert run.history[-1]["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_a_closure_that_is_called_again_gets_the_same_batch(plain, batches, clone, same):
    other, counted = clone(plain), []

    class Count(Noise):
        @hookimpl
        def transform_batch(self, batch):
            counted.append(1)
            return super().transform_batch(batch)

    lbfgs = partial(torch.optim.LBFGS, lr=0.5, max_iter=3)
    fit(plain, cross_entropy, lbfgs, batches, seed=1, plugins=[Count()])
    assert len(counted) == len(batches)
    torch.manual_seed(1)
    fit(other, cross_entropy, lbfgs, [noisy(*batch) for batch in batches])
    same(plain, other)


class Shuffled:
    """Exchanges the targets, and has metrics look at the true ones."""

    keeps_sample_count = True

    @hookimpl
    def transform_batch(self, run: Run, batch):
        run.metric_target = batch[1]
        return batch[0], batch[1].roll(1)


@pytest.mark.parametrize("plugins", [[], ["accumulate:every=3"], ["split:into=2"]])
def test_metrics_compare_with_the_targets_that_a_plugin_names(plain, batches, valid, sgd, plugins):
    seen = []

    def true(output, target):
        seen.append(target)
        return torch.zeros(())

    fit(plain, cross_entropy, sgd, batches, plugins=[Shuffled(), *plugins], metrics={"true": true})
    assert all(torch.equal(target, batch[1]) for target, batch in zip(seen, batches, strict=True))


def test_metrics_compare_with_the_changed_targets_if_no_plugin_names_others(plain, batches, sgd):
    seen = []

    class Roll:
        keeps_sample_count = True

        @hookimpl
        def transform_batch(self, batch):
            return batch[0], batch[1].roll(1)

    fit(plain, cross_entropy, sgd, batches, plugins=[Roll()], metrics={"own": lambda output, target: seen.append(target) or torch.zeros(())})
    assert all(torch.equal(target, batch[1].roll(1)) for target, batch in zip(seen, batches, strict=True))


@pytest.mark.parametrize("plugins", [[], ["accumulate:every=2"]])
def test_a_resumed_run_equals_an_uninterrupted_one(net, sgd, clone, same, tmp_path, plugins):
    data, other = DataLoader(RandomData(), 8, shuffle=True), clone(net)
    arguments = {"epochs": 3, "seed": 1}

    class Leave:
        @hookimpl
        def after_step(self, run: Run):
            if run.attempts == 3:
                run.leave = "a test"

    fit(net, cross_entropy, sgd, data, plugins=[Noise(), *plugins], **arguments)
    data = DataLoader(RandomData(), 8, shuffle=True)
    first = clone(other)
    left = fit(first, cross_entropy, sgd, data, plugins=[Noise(), *plugins, "checkpoint", Leave()], out=tmp_path, **arguments)
    assert left.leaving
    fit(other, cross_entropy, sgd, data, plugins=[Noise(), *plugins, "checkpoint"], out=tmp_path, resume=tmp_path, **arguments)
    same(net, other)


def test_a_plugin_that_changes_batches_must_be_there_when_the_run_is_resumed(plain, batches, sgd, tmp_path):
    fit(plain, cross_entropy, sgd, batches, plugins=[Scale(2), "checkpoint"], out=tmp_path)
    with pytest.raises(UsageError, match="scale"):
        fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint"], resume=tmp_path, out=tmp_path)


def test_trial_steps_change_their_batches(plain, batches, sgd):
    losses = []

    class Tries:
        @hookimpl
        def train_start(self, run: Run):
            with trial_run(run) as trial:
                losses.append(trial.step([0.1]).item())

    fit(plain, cross_entropy, sgd, batches, plugins=[Tries(), (record := FirstLoss()), Scale(100)])
    assert losses == [record.loss]


class FirstLoss:
    """Keeps the loss of the first step."""

    @hookimpl
    def after_step(self, run: Run):
        self.loss = self.loss if run.attempts > 1 else run.loss.item()


def train_in_processes(plugin):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(size, 6, generator=generator).double(), torch.randint(0, 3, (size,), generator=generator)) for size in [8] * 7 + [3]]
    distributed = torch.distributed.is_torchelastic_launched()
    run = fit(model, cross_entropy, partial(torch.optim.SGD, lr=0.1), data, epochs=2, seed=1,
              plugins=[plugin(), "ddp" if distributed else "accumulate:every=2"])
    return run.history[-1]["train_loss"], [parameter.detach().tolist() for parameter in model.parameters()]


def train_in_two(plugin):
    loss, weights = train_in_processes({"half": Half, "scale": partial(Scale, 2)}[plugin])
    return loss, weights


@pytest.mark.parametrize("plugin", ["half", "scale"])
def test_two_processes_weigh_the_changed_batches(ranks, plugin):
    """To 1e-12 in float64, because sums are in another order."""
    (one, weights), (other, others) = ranks(2, train_in_two, plugin, TORCHELASTIC_RUN_ID="none")
    expected, whole = train_in_processes({"half": Half, "scale": partial(Scale, 2)}[plugin])
    assert one == other == pytest.approx(expected, rel=1e-12)
    for a, b, c in zip(weights, others, whole, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=0)
        torch.testing.assert_close(torch.tensor(a, dtype=torch.float64), torch.tensor(c, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_plugin_that_returns_no_batch_is_named(plain, batches, sgd):
    class Forgetful:
        @hookimpl
        def transform_batch(self, batch):
            batch[0].mul(2)

    with pytest.raises(UsageError, match="^forgetful: transform_batch returned None; return the batch"):
        fit(plain, cross_entropy, sgd, batches, plugins=[Forgetful(), Scale(2)])


def test_a_plugin_that_breaks_its_promise_of_the_number_of_samples_is_named(plain, batches, sgd):
    class Liar(Half):
        keeps_sample_count = True

    with pytest.raises(UsageError, match="transform_batch of liar changed the number of samples from 8 to 4; leave out keeps_sample_count"):
        fit(plain, cross_entropy, sgd, batches, plugins=[Liar()])


def test_batches_are_not_replaced_when_they_are_weighed(plain, batches, sgd):
    class Late:
        @hookimpl
        def before_step(self, run: Run):
            run.batches = [Half().transform_batch(batch) for batch in run.batches]

    with pytest.raises(UsageError, match="before_step of late replaced run.batches, which are weighed by then; change them in transform_batch"):
        fit(plain, cross_entropy, sgd, batches, plugins=[Late()])


def test_such_a_plugin_passes_the_checks_for_authors():
    results = dict(checks_of(Scale, factor=2))
    assert not [name for name, error in results.items() if isinstance(error, AssertionError)]


def checks_of(cls, **options):
    subject = checks.Subject(cls, options, False, False, (), {"composes": "slow", "options_are_documented": "no dataclass"}, {})
    for check in checks.CHECKS:
        yield check.__name__, checks.check_outcome(subject, check)
