"""Schedules of weight decay, momentum and other numbers of parameter groups equal the loop by hand to the bit."""
import re
from dataclasses import dataclass
from functools import partial
from math import cos, pi

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, hookimpl, load
from loopctl.composition.explain import explain
from loopctl.optim.schedule import Schedule, scheduled_numbers
from loopctl.plugins import cudagraph
from loopctl.testing import tiny_run
from loopctl.testing.probes import Killed, SaveAndKill
from loopctl.testing.tiny import tiny_batches, tiny_model

ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.04)
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
BATCHES = tiny_batches(8, 8, 8, 8, 5)
DINO = "cosine:option=weight_decay,by=step,eta_min=0.4"


class Record:
    """Records numbers of the first parameter group in each step."""

    observer_only = True

    def __init__(self, *names, group=0):
        self.names, self.group, self.seen = names, group, []

    @hookimpl
    def before_step(self, run: Run):
        self.seen.append([run.optimizer.param_groups[self.group][name] for name in self.names])


def by_hand(optimizer, set_numbers, epochs=2):
    """A plain loop; `set_numbers(groups, step)` is called before each step."""
    torch.manual_seed(0)
    model, step = tiny_model(), 0
    optimizer = optimizer(model)
    for _ in range(epochs):
        for input, target in BATCHES:
            set_numbers(optimizer.param_groups, step)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(input), target).backward()
            optimizer.step()
            step += 1
    return model


@pytest.mark.compares(use="cosine:option=weight_decay", technique="a schedule of the weight decay beside one of the rate", source="the loop by hand", tolerance="to the bit")
def test_the_weight_decay_schedule_of_dino_beside_a_cosine_of_the_rate_equals_a_plain_loop(same):
    """dino/utils.py (arXiv:2104.14294): final + 0.5 (base - final) (1 + cos), of the first group alone; it is 0 in the second."""
    def groups(model):
        parts = [[p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim <= 1]]
        return torch.optim.AdamW([{"params": parts[0]}, {"params": parts[1], "weight_decay": 0.0}], lr=0.01, weight_decay=0.04)

    def set_numbers(groups, step):
        # in the order of operations of the plugin cosine: minimum + (1 - minimum) (1 + cos) / 2, times the initial value
        groups[0]["weight_decay"] = 0.04 * (0.4 / 0.04 + (1 - 0.4 / 0.04) * (1 + cos(pi * step / 10)) / 2)
        assert groups[0]["weight_decay"] == pytest.approx(0.4 + 0.5 * (0.04 - 0.4) * (1 + cos(pi * step / 10)), rel=1e-14)
        for group in groups:
            group["lr"] = 0.01 * ((1 + cos(pi * step / 10)) / 2)

    run = tiny_run(DINO, "cosine:by=step", "layerwise_lr:no_decay=true", optimizer=ADAMW)
    same(run.model, by_hand(groups, set_numbers))
    assert [row["weight_decay"] for row in run.history] == pytest.approx([0.04 + 0.36 * (1 - cos(pi * step / 10)) / 2 for step in (4, 9)])
    assert run.optimizer.param_groups[1]["weight_decay"] == 0.0


@pytest.mark.parametrize(("optimizer", "set_momentum"), [
    (SGD, lambda group, value: group.update(momentum=value)),
    (ADAMW, lambda group, value: group.update(betas=(value, 0.999)))], ids=["sgd", "adamw"])
def test_a_schedule_of_the_momentum_equals_a_plain_loop(same, optimizer, set_momentum):
    def set_numbers(groups, step):
        set_momentum(groups[0], 0.9 * (0.5 + 0.5 * min(1.0, step / 4)))

    run = tiny_run("warmup:option=momentum,start_factor=0.5,length=4", optimizer=optimizer)
    same(run.model, by_hand(lambda model: optimizer(model.parameters()), set_numbers))


SHAPES = ["constant", "cosine", "cosine_restarts:t_0=1", "exponential:gamma=0.9", "linear", "multistep:milestones=1", "polynomial", "step:step_size=1",
          "cyclic:base_lr=0.01,max_lr=0.2,step_size_up=3,cycle_momentum=false", "onecycle:max_lr=0.3,cycle_momentum=false", "lambda:lr_lambda=math:exp",
          "multiplicative:lr_lambda=math:cos", "trapezoidal:max_lr=0.4,step_size=3", "inverse_sqrt:start=2", "warmup:length=8,start=2st",
          "torch_scheduler:cls=torch.optim.lr_scheduler:CosineAnnealingWarmRestarts,T_0=3"]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_schedule_has_the_shape_that_it_has_for_the_rate(shape):
    name, _, options = shape.partition(":")
    for_rate, for_decay = Record("lr", "weight_decay"), Record("lr", "weight_decay")
    tiny_run(f"{name}:{options}{',' * bool(options)}by=step", for_rate, optimizer=partial(torch.optim.SGD, lr=0.2, weight_decay=0.1))
    tiny_run(f"{name}:{options}{',' * bool(options)}by=step,option=weight_decay", for_decay, optimizer=partial(torch.optim.SGD, lr=0.1, weight_decay=0.2))
    assert [decay for _, decay in for_decay.seen] == [rate for rate, _ in for_rate.seen]
    assert {rate for rate, _ in for_decay.seen} == {decay for _, decay in for_rate.seen} == {0.1}


def test_every_schedule_is_among_the_shapes():
    from loopctl import available
    assert {shape.partition(":")[0] for shape in SHAPES} == {name for name in available() if issubclass(load(name), Schedule)}


def test_factors_of_several_schedules_of_a_number_are_multiplied():
    both, other = Record("weight_decay"), Record("weight_decay")
    schedules = ["warmup:option=weight_decay,length=4,start_factor=0.5", "exponential:option=weight_decay,gamma=0.9,by=step,until=6st"]
    tiny_run(*schedules, both, optimizer=SGD)
    tiny_run(*schedules[::-1], other, optimizer=SGD)
    assert both.seen == other.seen == [[0.01 * ((0.5 + 0.5 * min(1, step / 4)) * (0.9 ** step if step < 6 else 1.0))] for step in range(10)]


@pytest.mark.parametrize("plugins", [
    [DINO, "cosine:by=step"], ["warmup:option=momentum,length=8", "exponential:option=momentum,gamma=0.99"],
    ["torch_scheduler:cls=torch.optim.lr_scheduler:ExponentialLR,gamma=0.9,by=step,option=weight_decay,start=3st"],
    ["multiplicative:lr_lambda=math:cos,by=step,option=weight_decay", "nan_guard"]], ids=" ".join)
def test_a_resumed_run_ends_with_the_same_bits(plugins, same, tmp_path):
    whole = tiny_run(*plugins, optimizer=ADAMW)
    for kill in (1, 4, 7):
        with pytest.raises(Killed):
            tiny_run(*plugins, SaveAndKill(kill, file=tmp_path / f"{kill}.pt"), optimizer=ADAMW)
        resumed = tiny_run(*plugins, optimizer=ADAMW, resume=tmp_path / f"{kill}.pt")
        same(resumed.model, whole.model)
        assert resumed.history == whole.history


def test_a_run_is_not_resumed_without_the_schedule(tmp_path):
    with pytest.raises(Killed):
        tiny_run(DINO, SaveAndKill(3, file=tmp_path / "killed.pt"), optimizer=ADAMW)
    with pytest.raises(UsageError, match="cosine"):
        tiny_run(optimizer=ADAMW, resume=tmp_path / "killed.pt")


def test_a_rate_that_no_schedule_moves_stays_the_users_own():
    class OwnRate:
        @hookimpl
        def epoch_start(self, run: Run):
            run.optimizer.param_groups[0]["lr"] = 0.05

    record = Record("lr")
    tiny_run(OwnRate(), DINO, record, optimizer=ADAMW)
    assert record.seen == [[0.05]] * 10
    assert tiny_run("cosine").hook.acting["before_step"] == []


def test_a_second_run_with_the_same_optimizer_begins_with_the_initial_value_or_the_users_new_one():
    model = tiny_model()
    optimizer, record = ADAMW(model.parameters()), Record("weight_decay")
    for value in (0.04, 0.04, 0.1):
        if value == 0.1:
            optimizer.param_groups[0]["weight_decay"] = value
        record.seen.clear()
        tiny_run("linear:option=weight_decay,start_factor=1,end_factor=0.5,total_iters=4,by=step", record, model=model, optimizer=optimizer)
        assert record.seen[0] == [value]
        assert record.seen[-1] == [value / 2]


def test_tensors_and_items_of_tuples_are_set_in_place():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5, foreach=False)
    (group,), tensors = optimizer.param_groups, {"weight_decay": torch.tensor(0.5), "first": torch.tensor(0.8)}
    group |= {"weight_decay": tensors["weight_decay"], "pair": (tensors["first"], 0.5)}
    run = tiny_run("linear:option=weight_decay,start_factor=0.5", "constant:option=pair.0,factor=0.5,total_iters=9",
                   "constant:option=pair.1,factor=0.5,total_iters=9", model=model, optimizer=optimizer)
    assert group["weight_decay"] is tensors["weight_decay"]
    assert group["pair"][0] is tensors["first"]
    assert (group["weight_decay"], *group["pair"]) == (pytest.approx(0.5 * (0.5 + 0.5 / 5)), pytest.approx(0.4), 0.25)
    assert run.history[-1]["weight_decay"] == pytest.approx(0.5 * (0.5 + 0.5 / 5))


PARTS = {"0": SGD, "*": partial(torch.optim.Adam, lr=0.01, weight_decay=0.2)}


def test_of_several_optimizers_the_named_one_is_scheduled():
    first, second = Record("weight_decay", "momentum"), Record("weight_decay", "betas", group=1)
    run = tiny_run("exponential:option=weight_decay,gamma=0.5,by=step,optimizer=0", "exponential:option=momentum,gamma=0.9,by=step", first, second,
                   optimizer=PARTS)
    assert first.seen == [[0.01 * 0.5 ** step, 0.9 * 0.9 ** step] for step in range(10)]
    assert second.seen == [[0.2, (0.9 * 0.9 ** step, 0.999)] for step in range(10)]
    assert run.history[-1].keys() >= {"weight_decay", "momentum"}


@pytest.mark.parametrize(("plugins", "optimizer", "message"), [
    (["cosine:option=weight_decay"], partial(torch.optim.SGD, lr=0.1), "cosine: option=weight_decay: it is 0 in every parameter group, which a factor does "
     "not change; give the optimizer a weight_decay above 0"),
    (["cosine:option=weigth_decay"], SGD, "cosine: option=weigth_decay: SGD has no such number; did you mean 'weight_decay'?"),
    (["cosine:option=nesterov"], SGD, "cosine: option=nesterov: SGD has no such number; it has: dampening, lr, momentum, weight_decay"),
    (["cosine:option=betas"], ADAMW, "cosine: option=betas: AdamW has no such number; did you mean 'betas.1'?"),
    (["cosine:option="], SGD, "cosine: option=: SGD has no such number; it has: dampening, lr, momentum, weight_decay"),
    (["cosine:option=max_iter"], partial(torch.optim.LBFGS, lr=0.1), "cosine: option=max_iter: LBFGS has no such number; it has: lr, tolerance_change, tolerance_grad"),
    (["cosine:option=betas.1"], PARTS, "cosine: option=betas.1: the optimizer 0 has no such number; it has: dampening, lr, momentum, weight_decay; "
     "name another optimizer with optimizer=..."),
    (["onecycle:option=weight_decay,max_lr=1"], SGD, "onecycle: option=weight_decay: the momentum would be cycled too; pass cycle_momentum=false"),
    (["warmup:option=momentum", "onecycle:max_lr=1"], SGD, "onecycle: warmup schedules the momentum too; leave it out, or pass cycle_momentum=false"),
])
def test_a_number_that_cannot_be_scheduled_is_refused(plugins, optimizer, message):
    with pytest.raises(UsageError) as refused:
        tiny_run(*plugins, optimizer=optimizer)
    assert str(refused.value) == message


def test_a_captured_step_refuses_it(monkeypatch):
    monkeypatch.setattr(cudagraph, "DEVICES", ("cpu",))
    with pytest.raises(UsageError, match="the hook before_step of cosine cannot be captured"):
        tiny_run(DINO, "cudagraph", optimizer=ADAMW)


@dataclass(eq=False)
class Own(Schedule):
    """A schedule that has a `__post_init__` of its own and forgets that of the base class."""

    by: str = "step"

    def __post_init__(self):
        pass

    def scale(self, run, position, initial_lr, group):
        return 0.5


def test_a_schedule_that_forgets_the_base_class_is_refused_for_another_number_only():
    assert tiny_run(Own()).history[-1]["lr"] == 0.05
    with pytest.raises(UsageError, match=re.escape("option=weight_decay is not supported, for its __post_init__ does not call that of Schedule")):
        tiny_run(Own(option="weight_decay"), optimizer=SGD)


def test_explain_says_how_the_number_moves():
    found = []

    class Explain:
        @hookimpl
        def train_start(self, run: Run):
            found.append(explain(run=run))
            found.append([number.name for number in scheduled_numbers(run)])

    tiny_run(DINO, "cosine:by=step", Explain(), optimizer=ADAMW)
    assert found[0].splitlines()[-2:] == [
        "learning rate    0.01 at the start, 0.01 at its peak, 0.000245 at the end",
        "weight_decay     0.04 at the start, 0.391 at its peak, 0.391 at the end"]
    assert found[1] == ["weight_decay"]
