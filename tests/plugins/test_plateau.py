"""The plugin plateau, compared with torch's ReduceLROnPlateau on the same metric values."""
import io
import random
from itertools import product
from math import inf, nan

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.composition.compose import compose
from loopctl.loop import DEFAULTS
from loopctl.optim.learning_rate import scheduled_rates
from loopctl.plugins.checkpoint import Checkpoint
from loopctl.plugins.plateau import Plateau


class FixedLoss:
    """Evaluates to the given losses, and records the learning rate of every step."""

    def __init__(self, *values):
        self.values, self.lrs = list(values), []

    @hookimpl
    def evaluate(self):
        return {"val_loss": self.values.pop(0)}

    @hookimpl
    def before_step(self, run: Run):
        self.lrs.append(run.optimizer.param_groups[0]["lr"])


def two_groups():
    optimizer = torch.optim.SGD([{"params": torch.zeros(1, requires_grad=True), "lr": lr} for lr in (0.1, 0.03)])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def started_run(plugin):
    run = Run(None, None, two_groups(), range(5), epochs=3, hook=compose([plugin], DEFAULTS), metrics={"val_loss": nan})
    run.hook.train_start(run=run)
    return run


def rates_after(run, values):
    """The learning rates after each evaluation."""
    for value in values:
        run.metrics["val_loss"] = value
        run.hook.after_evaluate(run=run)
        yield scheduled_rates(run)


def torch_rates(values, **options):
    """The learning rates that ReduceLROnPlateau sets after each evaluation."""
    optimizer = two_groups()
    schedule = ReduceLROnPlateau(optimizer, **options)
    for value in values:
        schedule.step(value)
        yield [group["lr"] for group in optimizer.param_groups]


def random_metric(seed, count=300):
    """A random walk with large, tiny and zero steps, and some values that are NaN or infinite."""
    generator, value = random.Random(seed), 1.0
    for _ in range(count):
        value += generator.choice([-0.1, -0.02, -1e-5, 0, 1e-5, 0.02, 0.1])
        yield generator.choices([value, nan, inf, -inf], [300, 9, 1, 0])[0]


OPTIONS = [dict(zip(("mode", "threshold_mode", "cooldown", "min_lr", "patience"), values, strict=True))
           for values in product(("min", "max"), ("rel", "abs"), (0, 4), (0.0, [0.002, 1e-4]), (0, 3))]


@pytest.mark.compares(use="plateau", technique="a lower rate when a metric stops improving",
                      source="torch.optim.lr_scheduler.ReduceLROnPlateau", tolerance="1e-12")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rates_equal_those_of_torch(options):
    for seed, more in enumerate([{"factor": 0.5}, {"factor": 0.9, "eps": 1e-3, "threshold": 0.0}, {"threshold": 0.05, "factor": 0.8}]):
        values = list(random_metric(seed))
        rates = list(rates_after(started_run(Plateau(**options, **more)), values))
        expected = list(torch_rates(values, **options, **more))
        assert expected[-1] != expected[0]
        torch.testing.assert_close(torch.tensor(rates, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("at", [1, 7, 20, 150])
def test_a_restored_state_continues_like_the_original(at):
    options = {"mode": "min", "cooldown": 3, "patience": 2, "factor": 0.7, "min_lr": [0.001, 0.0]}
    values, first = list(random_metric(5)), Plateau(**options)
    rates = list(rates_after(started_run(first), values[:at]))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Plateau(**options)
    run = started_run(second)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert rates + list(rates_after(run, values[at:])) == list(rates_after(started_run(Plateau(**options)), values))


@pytest.mark.parametrize("value", ["bad", "cooling", "best", "rates"])
def test_every_part_of_the_state_is_needed(value):
    plugin = Plateau(patience=2, cooldown=2, factor=0.5)
    values = [1.0, 2, 2, 2, 2, 2, 2, 2, 2, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9]

    def resumed(at, forget):
        run = started_run(plugin := Plateau(patience=2, cooldown=2, factor=0.5))
        rates = list(rates_after(run, values[:at]))
        started_run(fresh := Plateau())
        plugin.load_state_dict(plugin.state_dict() | {key: fresh.state_dict()[key] for key in forget})
        return rates + list(rates_after(run, values[at:]))

    whole = list(rates_after(started_run(plugin), values))
    assert all(resumed(at, []) == whole for at in range(len(values)))
    assert any(resumed(at, [value]) != whole for at in range(len(values)))


def test_the_rate_stops_at_min_lr():
    *_, last = rates_after(started_run(Plateau(patience=0, min_lr=[0.02, 0.007])), [1.0] * 9)
    assert last == pytest.approx([0.02, 0.007], rel=1e-15)


def test_a_reduction_applies_from_the_next_epoch(net, batches, valid, sgd):
    seen = FixedLoss(1, 1, 1, 1, 1)
    fit(net, nn.CrossEntropyLoss(), sgd, batches, valid, epochs=5, plugins=[Plateau(patience=1, factor=0.5), seen])
    assert seen.lrs[::8] == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])


def test_a_reduction_within_an_epoch_applies_from_the_next_step(net, batches, valid, sgd):
    seen = FixedLoss(*[1] * 4)
    fit(net, nn.CrossEntropyLoss(), sgd, batches, valid, eval_every=2, plugins=[Plateau(patience=0, factor=0.5), seen])
    assert seen.lrs == pytest.approx([0.1] * 4 + [0.05] * 2 + [0.025] * 2)


@pytest.mark.parametrize("order", [1, -1])
def test_it_multiplies_with_other_schedules(net, batches, valid, sgd, order):
    seen = FixedLoss(*[1] * 3)
    fit(net, nn.CrossEntropyLoss(), sgd, batches, valid, epochs=3,
        plugins=[*[Plateau(patience=0, factor=0.5), "cosine"][::order], seen])
    assert seen.lrs[::8] == pytest.approx([0.1, 0.075, 0.0125])        # cosine: 1, 3/4, 1/4; plateau: 1, 1, 1/2


def test_a_resumed_run_equals_an_uninterrupted_one(net, batches, valid, sgd, clone, same, tmp_path):
    other, values = clone(net), [3, 2, 2, 2, 2, 2, 1, 2, 2, 2]
    plugin = {"patience": 1, "factor": 0.5, "cooldown": 1}
    fit(net, nn.CrossEntropyLoss(), sgd, batches, valid, epochs=10, seed=1, plugins=[Plateau(**plugin), FixedLoss(*values), Checkpoint()], out=tmp_path / "a")
    fit(other, nn.CrossEntropyLoss(), sgd, batches, valid, epochs=4, seed=1, plugins=[Plateau(**plugin), FixedLoss(*values[:4]), Checkpoint()], out=tmp_path / "b")
    run = fit(other, nn.CrossEntropyLoss(), sgd, batches, valid, epochs=10, plugins=[Plateau(**plugin), FixedLoss(*values[4:]), Checkpoint()],
              out=tmp_path / "b", resume=tmp_path / "b")
    same(net, other)
    assert run.history[-1]["lr"] == pytest.approx(0.025)


def test_mode_auto_depends_on_the_name_of_the_metric():
    run = started_run(plugin := Plateau(monitor="val_loss"))
    run.metrics["val_accuracy"] = nan
    assert plugin.watch.mode == "min"
    plugin = Plateau(monitor="val_accuracy", patience=0)
    run.hook = compose([plugin], DEFAULTS)
    run.hook.train_start(run=run)
    for value in (0.5, 0.6, 0.5):
        run.metrics["val_accuracy"] = value
        run.hook.after_evaluate(run=run)
    assert plugin.watch.mode == "max"
    assert scheduled_rates(run) == pytest.approx([0.01, 0.003])


@pytest.mark.parametrize(("options", "message"), [
    ({"monitor": "val_acc"}, "plateau: monitor=val_acc: the run has no such metric; it has: train_loss, val_loss"),
    ({"min_lr": [1e-3, 1e-4]}, "plateau: min_lr has 2 values; parameter groups: 1"),
])
def test_options_that_do_not_fit_the_run_are_refused_before_training(net, batches, valid, sgd, options, message):
    seen = FixedLoss(1)
    with pytest.raises(UsageError, match=f"^{message}"):
        fit(net, nn.CrossEntropyLoss(), sgd, batches, valid, plugins=[Plateau(**options), seen])
    assert not seen.lrs


@pytest.mark.parametrize(("options", "message"), [
    ({"factor": 1.0}, "factor is at least 0 and below 1, not 1.0"), ({"patience": -1}, "patience is at least 0, not -1"),
    ({"threshold": -1}, "threshold is at least 0, not -1"), ({"cooldown": -1}, "cooldown is at least 0, not -1"),
    ({"min_lr": [0, -1]}, "min_lr is at least 0, not -1"), ({"eps": nan}, "eps is at least 0, not nan"),
])
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Plateau(**options)
