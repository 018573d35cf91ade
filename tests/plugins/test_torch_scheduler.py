"""torch_scheduler against the class that it runs, used by hand."""
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


class Lrs:
    """Notes the rates of every step, and of the momentum."""

    def __init__(self):
        self.seen, self.momentum = [], []

    @hookimpl
    def before_step(self, run: Run):
        self.seen.append([group["lr"] for group in run.optimizer.param_groups])
        self.momentum.append([group["momentum"] for group in run.optimizer.param_groups])


class Shaken(lr_scheduler.LRScheduler):
    """A schedule of one's own, which remembers: each rate follows from the one before and from random numbers."""

    def __init__(self, optimizer, strength=0.1):
        self.strength, self.random = strength, 12345
        super().__init__(optimizer)

    def get_lr(self):
        self.random = self.random * 1103515245 % 2**31
        return [group["lr"] * (1 - self.strength * self.random / 2**31) for group in self.optimizer.param_groups]


def chain(optimizer, total_iters=2, gamma=0.5):
    """A rise, then a descent."""
    first = lr_scheduler.LinearLR(optimizer, total_iters=total_iters)
    return lr_scheduler.SequentialLR(optimizer, [first, lr_scheduler.ExponentialLR(optimizer, gamma)], [total_iters])


def together(optimizer):
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(optimizer, 0.1, 2), lr_scheduler.StepLR(optimizer, 3)])


def two_groups(net):
    return torch.optim.SGD([{"params": net[0].parameters(), "lr": 0.1}, {"params": [*net[1:].parameters()], "lr": 0.03}], momentum=0.9)


def by_hand(net, by, cls, **plugin_options):
    """The loop that one writes without loopctl; only the rates are of interest."""
    optimizer = two_groups(net)
    schedule, seen = cls(optimizer, **plugin_options), []
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
    ("epoch", Shaken, {}),
    ("step", Shaken, {"strength": 0.02}),
]
FACTORIES = [("epoch", chain, {"gamma": 0.7}), ("step", together, {})]
IDS = [f"{cls.__name__}-{by}" for by, cls, _ in CASES + FACTORIES]


@pytest.mark.parametrize(("by", "cls", "given"), CASES + FACTORIES, ids=IDS)
def test_the_class_used_by_hand_gives_the_same_rates(net, batches, clone, by, cls, given):
    lrs, optimizer = Lrs(), two_groups(net)
    plugin = TorchScheduler(cls, given, by)
    fit(net, nn.CrossEntropyLoss(), optimizer, batches, epochs=EPOCHS, plugins=[plugin, lrs])
    mine, other = (torch.tensor(seen, dtype=torch.float64) for seen in (lrs.seen, by_hand(clone(net), by, cls, **given)))
    torch.testing.assert_close(mine, other, rtol=1e-12, atol=0)
    assert lrs.momentum == [[0.9, 0.9]] * TOTAL
    assert set(optimizer.param_groups[0]) == {*two_groups(net).param_groups[0], "initial_lr"}


@pytest.mark.parametrize(("by", "cls", "given"), CASES + FACTORIES, ids=IDS)
def test_a_run_that_goes_on_has_the_rates_of_one_that_never_ended(net, batches, clone, tmp_path, by, cls, given):
    other, whole, first, second = clone(net), Lrs(), Lrs(), Lrs()

    def train(net, lrs, epochs, out, **more):
        fit(net, nn.CrossEntropyLoss(), two_groups(net), batches, epochs=epochs, out=tmp_path / out,
            plugins=[TorchScheduler(cls, given, by), lrs, Checkpoint()], **more)

    train(net, whole, EPOCHS, "whole")
    train(other, first, 3, "parts")
    train(other, second, EPOCHS, "parts", resume=tmp_path / "parts")
    assert first.seen + second.seen == whole.seen


def test_its_state_is_restored_and_not_computed_again(net, batches, sgd):
    class Drawn(lr_scheduler.LRScheduler):
        """A schedule whose past cannot be repeated."""

        def get_lr(self):
            self.drawn = [*getattr(self, "drawn", []), random.random()]
            return [group["lr"] * self.drawn[-1] for group in self.optimizer.param_groups]

    first, second = TorchScheduler(Drawn), TorchScheduler(Drawn)
    run = fit(net, nn.CrossEntropyLoss(), sgd, batches, epochs=3, plugins=[first])
    expected = scheduled_rates(run)
    state = first.state_dict()
    run.hook = compose([second], DEFAULTS)
    run.hook.train_start(run=run)
    second.load_state_dict(state)
    assert scheduled_rates(run) == expected


def test_it_catches_up_and_can_look_back(net, batches, sgd):
    plugin = TorchScheduler(Shaken, by="step")
    run = fit(net, nn.CrossEntropyLoss(), sgd, batches, plugins=[plugin])
    seen = {}
    for run.counters.attempts in (0, 5, 17, 3, 17, 5, 0):
        assert scheduled_rates(run) == seen.setdefault(run.attempts, scheduled_rates(run))
    assert len(set(map(tuple, seen.values()))) == 4


def test_it_multiplies_with_other_schedules(net, batches, sgd):
    run = fit(net, nn.CrossEntropyLoss(), sgd, batches, epochs=4, plugins=[TorchScheduler(lr_scheduler.ExponentialLR, {"gamma": 0.5}), Cosine(), Clip()])
    assert [row["lr"] for row in run.history[:3]] == pytest.approx([0.1, 0.1 * 0.5 * 0.85355339, 0.1 * 0.25 * 0.5])


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, partial(torch.optim.SGD, momentum=0)])
def test_a_class_that_cycles_momentum_runs_with_any_optimizer(net, batches, kind):
    optimizer = kind(net.parameters(), lr=0.1)
    before = {name: value for name, value in optimizer.param_groups[0].items() if name not in ("params", "lr")}
    fit(net, nn.CrossEntropyLoss(), optimizer, batches, plugins=[TorchScheduler(lr_scheduler.OneCycleLR, {"max_lr": 1, "total_steps": 8}, "step")])
    assert before.items() <= optimizer.param_groups[0].items()


def test_the_command_line_collects_the_options_of_the_class():
    text = "cls=torch.optim.lr_scheduler:MultiStepLR,milestones=2,5,by=step,gamma=0.5"
    plugin = TorchScheduler(**parse_options("torch_scheduler", text, plugin_options(TorchScheduler)))
    assert (plugin.cls, plugin.options, plugin.by) == (lr_scheduler.MultiStepLR, {"milestones": (2, 5), "gamma": 0.5}, "step")


def plain(optimizer):
    return object()


def metric(optimizer):
    return lr_scheduler.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize(("cls", "given", "message"), [
    (lr_scheduler.StepLR, {}, "torch_scheduler: cls=StepLR: .*missing 1 required positional argument: 'step_size'"),
    (lr_scheduler.StepLR, {"step_size": 1, "gama": 1}, "torch_scheduler: cls=StepLR: .*unexpected keyword argument 'gama'"),
    (lr_scheduler.OneCycleLR, {"max_lr": [1, 2, 3], "total_steps": 9}, "torch_scheduler: cls=OneCycleLR: .*max_lr"),
    (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": -1}, "torch_scheduler: cls=CosineAnnealingWarmRestarts: Expected positive integer T_0"),
    (torch.optim.SGD, {}, "torch_scheduler: cls=SGD"),
    (plain, {}, "torch_scheduler: cls=plain made a object, not a torch LRScheduler"),
    (metric, {}, "torch_scheduler: cls=metric: its step .*'metrics'; for a metric, use the plugin plateau"),
])
def test_what_cannot_work_is_refused_before_training(net, batches, sgd, cls, given, message):
    lrs = Lrs()
    with pytest.raises(UsageError, match=f"^{message}") as refused:
        fit(net, nn.CrossEntropyLoss(), sgd, batches, plugins=[TorchScheduler(cls, given), lrs])
    assert "\n" not in str(refused.value)
    assert not lrs.seen


def test_a_class_that_needs_a_metric_points_to_plateau():
    with pytest.raises(ValueError, match="cls=ReduceLROnPlateau judges a metric; use the plugin plateau"):
        TorchScheduler(lr_scheduler.ReduceLROnPlateau)
