"""The plugin torch_scheduler, compared with the scheduler in a plain loop."""
import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.composition.compose import compose
from loopctl.composition.options import parse_options, plugin_options
from loopctl.loop import DEFAULTS
from loopctl.optim.learning_rate import scheduled_rates
from loopctl.plugins.checkpoint import Checkpoint
from loopctl.plugins.clip import Clip
from loopctl.plugins.cosine import Cosine
from loopctl.plugins.torch_scheduler import TorchScheduler

EPOCHS, BATCHES = 6, 8
TOTAL = EPOCHS * BATCHES


class Recorder:
    """Records the learning rates and momenta of every step."""

    def __init__(self):
        self.seen, self.momentum = [], []

    @hookimpl
    def before_step(self, run: Run):
        self.seen.append([group["lr"] for group in run.optimizer.param_groups])
        self.momentum.append([group["momentum"] for group in run.optimizer.param_groups])


class RandomDecay(lr_scheduler.LRScheduler):
    """A custom scheduler with state: each rate depends on the previous one and on pseudo-random numbers."""

    def __init__(self, optimizer, strength=0.1):
        self.strength, self.random = strength, 12345
        super().__init__(optimizer)

    def get_lr(self):
        self.random = self.random * 1103515245 % 2**31
        return [group["lr"] * (1 - self.strength * self.random / 2**31) for group in self.optimizer.param_groups]


def sequential(optimizer, total_iters=2, gamma=0.5):
    """A linear rise, then an exponential decay."""
    first = lr_scheduler.LinearLR(optimizer, total_iters=total_iters)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.ExponentialLR(optimizer, gamma)], [total_iters])


def chained(optimizer):
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.StepLR(optimizer, 3)])


def two_groups(net):
    return torch.optim.SGD([{"params": net[0].parameters(), "lr": 0.1}, {"params": [*net[1:].parameters()], "lr": 0.03}], momentum=0.9)


def by_hand(net, by, cls, **options):
    """The learning rates in a plain loop with the scheduler."""
    optimizer = two_groups(net)
    schedule, seen = cls(optimizer, **options), []
    for _ in range(EPOCHS):
        for _ in range(BATCHES):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            if by == "step":
                schedule.step()
        if by == "epoch":
            schedule.step()
    return seen


CASES = [
    ("epoch", lr_scheduler.StepLR, {"step_size": 2, "gamma": 0.5}),
    ("epoch", lr_scheduler.MultiStepLR, {"milestones": (2, 5)}),
    ("step", lr_scheduler.ExponentialLR, {"gamma": 0.95}),
    ("epoch", lr_scheduler.LinearLR, {}),
    ("step", lr_scheduler.PolynomialLR, {"total_iters": 30, "power": 2}),
    ("step", lr_scheduler.CosineAnnealingLR, {"T_max": 20, "eta_min": 1e-3}),
    ("epoch", lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 2, "T_mult": 2}),
    ("step", lr_scheduler.OneCycleLR, {"max_lr": [0.5, 0.2], "total_steps": TOTAL}),
    ("step", lr_scheduler.CyclicLR, {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 5}),
    ("epoch", lr_scheduler.LambdaLR, {"lr_lambda": [lambda epoch: 0.9**epoch, lambda epoch: 1 / (1 + epoch)]}),
    ("step", lr_scheduler.MultiplicativeLR, {"lr_lambda": lambda step: 0.99}),
    ("epoch", RandomDecay, {}),
    ("step", RandomDecay, {"strength": 0.02}),
]
FACTORIES = [("epoch", sequential, {"gamma": 0.7}), ("step", chained, {})]
IDS = [f"{cls.__name__}-{by}" for by, cls, _ in CASES + FACTORIES]


@pytest.mark.compares(use="torch_scheduler", technique="any scheduler of torch",
                      source="torch.optim.lr_scheduler.LRScheduler", tolerance="1e-12")
@pytest.mark.parametrize(("by", "cls", "given"), CASES + FACTORIES, ids=IDS)
def test_rates_equal_those_of_the_scheduler_in_a_plain_loop(net, batches, clone, by, cls, given):
    recorder, optimizer = Recorder(), two_groups(net)
    plugin = TorchScheduler(cls, given, by)
    fit(net, nn.CrossEntropyLoss(), optimizer, batches, epochs=EPOCHS, plugins=[plugin, recorder])
    rates, expected = (torch.tensor(seen, dtype=torch.float64) for seen in (recorder.seen, by_hand(clone(net), by, cls, **given)))
    torch.testing.assert_close(rates, expected, rtol=1e-12, atol=0)
    assert recorder.momentum == [[0.9, 0.9]] * TOTAL
    assert set(optimizer.param_groups[0]) == {*two_groups(net).param_groups[0], "initial_lr"}


@pytest.mark.parametrize(("by", "cls", "given"), CASES + FACTORIES, ids=IDS)
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(net, batches, clone, tmp_path, by, cls, given):
    other, whole, first, second = clone(net), Recorder(), Recorder(), Recorder()

    def train(net, recorder, epochs, out, **more):
        fit(net, nn.CrossEntropyLoss(), two_groups(net), batches, epochs=epochs, out=tmp_path / out,
            plugins=[TorchScheduler(cls, given, by), recorder, Checkpoint()], **more)

    train(net, whole, EPOCHS, "whole")
    train(other, first, 3, "parts")
    train(other, second, EPOCHS, "parts", resume=tmp_path / "parts")
    assert first.seen + second.seen == whole.seen


def test_the_state_of_the_scheduler_is_restored_and_not_recomputed(net, batches, sgd):
    class TrulyRandom(lr_scheduler.LRScheduler):
        """A scheduler whose values cannot be recomputed."""

        def get_lr(self):
            self.drawn = [*getattr(self, "drawn", []), random.random()]
            return [group["lr"] * self.drawn[-1] for group in self.optimizer.param_groups]

    first, second = TorchScheduler(TrulyRandom), TorchScheduler(TrulyRandom)
    run = fit(net, nn.CrossEntropyLoss(), sgd, batches, epochs=3, plugins=[first])
    expected = scheduled_rates(run)
    state = first.state_dict()
    run.hook = compose([second], DEFAULTS)
    run.hook.train_start(run=run)
    second.load_state_dict(state)
    assert scheduled_rates(run) == expected


def test_rates_can_be_computed_for_later_and_earlier_steps(net, batches, sgd):
    plugin = TorchScheduler(RandomDecay, by="step")
    run = fit(net, nn.CrossEntropyLoss(), sgd, batches, plugins=[plugin])
    seen = {}
    for run.counters.attempts in (0, 5, 17, 3, 17, 5, 0):
        assert scheduled_rates(run) == seen.setdefault(run.attempts, scheduled_rates(run))
    assert len(set(map(tuple, seen.values()))) == 4


def test_it_multiplies_with_other_schedules(net, batches, sgd):
    run = fit(net, nn.CrossEntropyLoss(), sgd, batches, epochs=4, plugins=[TorchScheduler(lr_scheduler.ExponentialLR, {"gamma": 0.5}), Cosine(), Clip()])
    assert [row["lr"] for row in run.history[:3]] == pytest.approx([0.1, 0.1 * 0.5 * 0.85355339, 0.1 * 0.25 * 0.5])


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, partial(torch.optim.SGD, momentum=0)])
def test_a_scheduler_that_cycles_momentum_works_with_any_optimizer(net, batches, kind):
    optimizer = kind(net.parameters(), lr=0.1)
    before = {name: value for name, value in optimizer.param_groups[0].items() if name not in ("params", "lr")}
    fit(net, nn.CrossEntropyLoss(), optimizer, batches, plugins=[TorchScheduler(lr_scheduler.OneCycleLR, {"max_lr": 1, "total_steps": 8}, "step")])
    assert before.items() <= optimizer.param_groups[0].items()


def test_unknown_options_on_the_command_line_are_passed_to_the_class():
    text = "cls=torch.optim.lr_scheduler:MultiStepLR,milestones=2,5,by=step,gamma=0.5"
    plugin = TorchScheduler(**parse_options("torch_scheduler", text, plugin_options(TorchScheduler)))
    assert (plugin.cls, plugin.options, plugin.by) == (lr_scheduler.MultiStepLR, {"milestones": (2, 5), "gamma": 0.5}, "step")


def not_a_scheduler(optimizer):
    return object()


def needs_metric(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize(("cls", "given", "message"), [
    (lr_scheduler.StepLR, {}, "torch_scheduler: cls=StepLR: .*missing 1 required positional argument: 'step_size'"),
    (lr_scheduler.StepLR, {"step_size": 1, "gama": 1}, "torch_scheduler: cls=StepLR: .*unexpected keyword argument 'gama'"),
    (lr_scheduler.OneCycleLR, {"max_lr": [1, 2, 3], "total_steps": 9}, "torch_scheduler: cls=OneCycleLR: .*max_lr"),
    (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": -1}, "torch_scheduler: cls=CosineAnnealingWarmRestarts: Expected positive integer T_0"),
    (torch.optim.SGD, {}, "torch_scheduler: cls=SGD"),
    (not_a_scheduler, {}, "torch_scheduler: cls=not_a_scheduler made a object, not a torch LRScheduler"),
    (needs_metric, {}, "torch_scheduler: cls=needs_metric: its step .*'metrics'; for a metric, use the plugin plateau"),
])
def test_wrong_classes_and_options_are_refused_before_training(net, batches, sgd, cls, given, message):
    recorder = Recorder()
    with pytest.raises(UsageError, match=f"^{message}") as refused:
        fit(net, nn.CrossEntropyLoss(), sgd, batches, plugins=[TorchScheduler(cls, given), recorder])
    assert "\n" not in str(refused.value)
    assert not recorder.seen


def test_reduce_on_plateau_is_refused_in_favour_of_the_plugin_plateau():
    with pytest.raises(ValueError, match="cls=ReduceLROnPlateau needs a metric; use the plugin plateau"):
        TorchScheduler(lr_scheduler.ReduceLROnPlateau)
