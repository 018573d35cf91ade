"""The schedule plugins, compared with torch's schedulers at every step."""
import random
from functools import cache, partial
from math import cos, log, pi, sqrt

import pytest
import torch
from torch.optim import lr_scheduler

from loopctl import Run, UsageError, explain, fit, hookimpl, load
from loopctl.composition.compose import compose
from loopctl.composition.discovery import entry_point
from loopctl.loop import DEFAULTS
from loopctl.optim.learning_rate import lr_curve, scheduled_rates

BATCHES, EPOCHS = 25, 200
TOTAL = BATCHES * EPOCHS      # 5,000


def full_spec(plugin):
    """A spec with the import path of the class in place of the plugin's name."""
    name, _, options = plugin.partition(":") if isinstance(plugin, str) else (None, None, None)
    return f"{entry_point(name).value}:{options}" if name else plugin


def cls(name):
    """A plugin's class."""
    return load(name)


def two_groups(kind=torch.optim.SGD):
    """An optimizer with two parameter groups that have different learning rates."""
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    return kind([{"params": weights[0], "lr": 0.1}, {"params": weights[1], "lr": 0.03}])


def make_run(*plugins, optimizer=None, batches=BATCHES, epochs=EPOCHS):
    optimizer = optimizer or two_groups()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return Run(None, None, optimizer, range(batches), epochs=epochs, hook=compose(map(full_spec, plugins), DEFAULTS))


@cache
def plugin_rates(*plugins, **options):
    """The learning rates of two parameter groups at every step."""
    return [rates for _, rates in lr_curve(make_run(*plugins, **options), points=TOTAL)]


def torch_values(by, factory, read=lambda group: group["lr"], kind=torch.optim.SGD):
    """The values that torch's scheduler sets, at every step."""
    optimizer = two_groups(kind)
    schedule, values = factory(optimizer), []
    optimizer.step()            # there are no gradients; torch wants a step before that of the schedule
    for _ in range(EPOCHS):
        for _ in range(BATCHES):
            values.append([read(group) for group in optimizer.param_groups])
            if by == "step":
                schedule.step()
        if by == "epoch":
            schedule.step()
    return values


def assert_close(values, expected):
    # torch computes many rates from the previous one and accumulates rounding errors; the plugins use closed forms.
    torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64),
                               rtol=1e-12, atol=1e-17)


def halving(position):
    return 0.5 ** (position / 9)


def waves(position):
    return 1 + 0.01 * cos(position)


class ClosedCosine(lr_scheduler.CosineAnnealingLR):
    """With torch's closed form: over a hundred cycles its recursion drifts by more than 1e-12."""

    def get_lr(self):
        return self._get_closed_form_lr()


cosine, restarts, linear, constant = (lr_scheduler.CosineAnnealingLR, lr_scheduler.CosineAnnealingWarmRestarts,
                                      lr_scheduler.LinearLR, lr_scheduler.ConstantLR)
step, multistep, exponential, polynomial = (lr_scheduler.StepLR, lr_scheduler.MultiStepLR, lr_scheduler.ExponentialLR,
                                            lr_scheduler.PolynomialLR)
function, ratio = lr_scheduler.LambdaLR, lr_scheduler.MultiplicativeLR
onecycle, cyclic = (partial(kind, cycle_momentum=False) for kind in (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR))

CASES = [
    ("step:step_size=10,gamma=0.5", "epoch", partial(step, step_size=10, gamma=0.5)),
    ("step:step_size=10", "epoch", partial(step, step_size=10)),
    ("step:step_size=30,gamma=0.9,by=step", "step", partial(step, step_size=30, gamma=0.9)),
    ("step:step_size=250st", "epoch", partial(step, step_size=10)),
    ("step:step_size=10%", "epoch", partial(step, step_size=20)),
    ("multistep:milestones=50,80,90", "epoch", partial(multistep, milestones=[50, 80, 90])),
    ("multistep:milestones=120,30,80,gamma=0.1", "epoch", partial(multistep, milestones=[30, 80, 120], gamma=0.1)),
    ("multistep:milestones=25%,80ep,80,80,gamma=0.3", "epoch", partial(multistep, milestones=[50, 80, 80, 80], gamma=0.3)),
    ("multistep:milestones=30,4000,by=step", "step", partial(multistep, milestones=[30, 4000])),
    ("exponential:gamma=0.9", "epoch", partial(exponential, gamma=0.9)),
    ("exponential:gamma=0.999,by=step", "step", partial(exponential, gamma=0.999)),
    ("linear", "epoch", linear),
    ("linear:start_factor=0.1,end_factor=0.5,total_iters=50", "epoch", partial(linear, start_factor=0.1, end_factor=0.5, total_iters=50)),
    ("linear:start_factor=1,end_factor=0.01,total_iters=100%,by=step", "step", partial(linear, start_factor=1, end_factor=0.01, total_iters=TOTAL)),
    ("polynomial", "epoch", lr_scheduler.PolynomialLR),
    ("polynomial:total_iters=100,power=2", "epoch", partial(polynomial, total_iters=100, power=2)),
    ("polynomial:total_iters=4000,power=0.9,by=step", "step", partial(polynomial, total_iters=4000, power=0.9)),
    ("cosine", "epoch", partial(cosine, T_max=EPOCHS)),
    *((f"cosine:t_max={length}", "epoch", partial(cosine, T_max=length)) for length in (10, 50, EPOCHS // 3)),
    ("cosine:t_max=6,eta_min=0.002", "epoch", partial(cosine, T_max=6, eta_min=0.002)),
    ("cosine:by=step", "step", partial(cosine, T_max=TOTAL)),
    ("cosine:t_max=30,by=step,eta_min=1e-5", "step", partial(ClosedCosine, T_max=30, eta_min=1e-5)),
    ("cosine:t_max=2ep,by=step", "step", partial(ClosedCosine, T_max=50)),
    ("cosine:t_max=10%,by=epoch", "epoch", partial(cosine, T_max=20)),
    ("cosine_restarts:t_0=10,t_mult=2", "epoch", partial(restarts, T_0=10, T_mult=2)),
    ("cosine_restarts:t_0=7,eta_min=0.001", "epoch", partial(restarts, T_0=7, eta_min=0.001)),
    ("cosine_restarts:t_0=1ep,t_mult=3,by=step", "step", partial(restarts, T_0=25, T_mult=3)),
    ("constant", "epoch", constant),
    ("constant:factor=0.2,total_iters=40,by=step", "step", partial(constant, factor=0.2, total_iters=40)),
    (cls("lambda")(halving), "epoch", partial(function, lr_lambda=halving)),
    (cls("lambda")([halving, waves], by="step"), "step", partial(function, lr_lambda=[halving, waves])),
    (cls("multiplicative")(waves), "epoch", partial(ratio, lr_lambda=waves)),
    (cls("multiplicative")([waves, lambda position: 0.999], by="step"), "step", partial(ratio, lr_lambda=[waves, lambda position: 0.999])),
    ("onecycle:max_lr=1.0,cycle_momentum=false", "step", partial(onecycle, max_lr=1.0, total_steps=TOTAL)),
    ("onecycle:max_lr=0.5,0.2,anneal_strategy=linear,pct_start=0.2,cycle_momentum=false", "step",
     partial(onecycle, max_lr=[0.5, 0.2], anneal_strategy="linear", pct_start=0.2, epochs=EPOCHS, steps_per_epoch=BATCHES)),
    ("onecycle:max_lr=0.5,three_phase=true,div_factor=10,final_div_factor=100,cycle_momentum=false", "step",
     partial(onecycle, max_lr=0.5, three_phase=True, div_factor=10, final_div_factor=100, total_steps=TOTAL)),
    ("onecycle:max_lr=0.5,by=epoch,three_phase=true,anneal_strategy=linear,cycle_momentum=false", "epoch",
     partial(onecycle, max_lr=0.5, three_phase=True, anneal_strategy="linear", total_steps=EPOCHS)),
    ("cyclic:base_lr=0.001,max_lr=0.1,cycle_momentum=false", "step", partial(cyclic, base_lr=0.001, max_lr=0.1)),
    ("cyclic:base_lr=0.01,0.02,max_lr=0.1,0.2,step_size_up=30,step_size_down=70,mode=triangular2,cycle_momentum=false", "step",
     partial(cyclic, base_lr=[0.01, 0.02], max_lr=[0.1, 0.2], step_size_up=30, step_size_down=70, mode="triangular2")),
    ("cyclic:base_lr=0.01,max_lr=0.1,step_size_up=4ep,mode=exp_range,gamma=0.999,cycle_momentum=false", "step",
     partial(cyclic, base_lr=0.01, max_lr=0.1, step_size_up=100, mode="exp_range", gamma=0.999)),
    ("cyclic:base_lr=0.01,max_lr=0.1,step_size_up=5,by=epoch,cycle_momentum=false", "epoch",
     partial(cyclic, base_lr=0.01, max_lr=0.1, step_size_up=5)),
    ("warmup:length=5,by=epoch", "epoch", partial(linear, total_iters=5)),
    ("warmup:length=35,start_factor=0.1", "step", partial(linear, start_factor=0.1, total_iters=35)),
    ("warmup", "step", partial(linear, total_iters=TOTAL * 0.05)),
    ("inverse_sqrt:timescale=70", "step", partial(function, lr_lambda=lambda step: (1 + step / 70) ** -0.5)),
]
TRAPEZOID = "trapezoidal:max_lr=0.4,step_size=300,anneal_start=3000,base_lr=0.01"
ALL = [plugin for plugin, *_ in CASES] + [TRAPEZOID]


def ident(plugin):
    return plugin if isinstance(plugin, str) else type(plugin).__name__ if hasattr(plugin, "by") else ""


@pytest.mark.compares(use="constant, multiplicative", technique="all schedules, rates of two groups at 5,000 steps",
                      source="torch.optim.lr_scheduler.ConstantLR, torch.optim.lr_scheduler.MultiplicativeLR and so on", tolerance="1e-12: torch computes each rate from the one before")
@pytest.mark.parametrize(("plugin", "by", "factory"), CASES, ids=ident)
def test_rates_equal_those_of_torch(plugin, by, factory):
    assert_close(plugin_rates(plugin), torch_values(by, factory))


def test_cosine_rises_again_after_t_max():
    first = [rates[0] for rates in plugin_rates("cosine:t_max=50")][::BATCHES]
    assert first[50] == pytest.approx(0, abs=1e-17)
    assert first[100] == pytest.approx(0.1)
    assert first[25] == pytest.approx(first[75])


@pytest.mark.parametrize("options", ["", ",by=epoch"])
@pytest.mark.parametrize("base", [0.01, None])
def test_trapezoidal_rises_holds_and_falls(options, base):
    size, anneal = (300, 3000) if not options else (30, 120)
    base_option = f",base_lr={base}" if base else ""

    def expected(position, initial_lr):
        low = initial_lr if base is None else base
        if position < size:
            return low + (0.4 - low) * position / size
        if position < anneal:
            return 0.4
        if position < anneal + size:
            return 0.4 - (0.4 - low) * (position - anneal) / size
        return low

    rates = plugin_rates(f"trapezoidal:max_lr=0.4,step_size={size},anneal_start={anneal}{base_option}{options}")
    assert_close(rates, [[expected(step if not options else step // BATCHES, lr) for lr in (0.1, 0.03)] for step in range(TOTAL)])


def test_trapezoidal_ends_with_the_run_without_anneal_start():
    assert plugin_rates("trapezoidal:max_lr=0.4,step_size=10%") == plugin_rates("trapezoidal:max_lr=0.4,step_size=10%,anneal_start=90%")


@pytest.mark.parametrize(("decay_type", "shape"), [
    ("linear", lambda done: 1.0 - done), ("cosine", lambda done: 0.5 * (1.0 + cos(pi * 0.5 * 2.0 * done))), ("1-sqrt", lambda done: 1.0 - sqrt(done))])
@pytest.mark.parametrize("lowest", [0.0, 0.25])
@pytest.mark.compares(use="trapezoidal:decay_type", technique="1-sqrt and cosine cooldown after a stable rate", source="arXiv:2405.18392", tolerance="1e-14: products are in another order")
def test_trapezoidal_is_the_warmup_stable_decay_of_transformers(decay_type, shape, lowest):
    """get_wsd_schedule(num_warmup_steps=300, num_stable_steps=3700, num_decay_steps=1000); 1-sqrt is eq. 1 of arXiv:2405.18392."""
    def factor(step):
        if step < 300:
            return step / 300 * (1.0 - lowest) + lowest
        return 1.0 if step < 4000 else shape((step - 4000) / 1000) * (1.0 - lowest) + lowest

    options = f"max_lr=0.5,base_lr={0.5 * lowest},step_size=300,step_size_down=1000,decay_type={decay_type}"
    expected = [[0.5 * factor(step)] * 2 for step in range(TOTAL)]
    # To the bit but for the division by the initial rate and the multiplication with it.
    for plugin in (f"trapezoidal:{options}", f"trapezoidal:{options},anneal_start=80%", f"trapezoidal:{options},anneal_start=4000"):
        torch.testing.assert_close(torch.tensor(plugin_rates(plugin)), torch.tensor(expected), rtol=1e-14, atol=1e-16)
    assert plugin_rates(f"trapezoidal:{options},by=epoch,step_size=12,step_size_down=40".replace("step_size=300,step_size_down=1000,", ""))[:25] == [[0.5 * lowest] * 2] * 25


@pytest.mark.compares(use="inverse_sqrt", technique="inverse square root after a warmup", source="arXiv:1706.03762", tolerance="1e-12: products are in another order")
def test_inverse_sqrt_with_a_warmup_is_that_of_fairseq():
    """fairseq/optim/lr_scheduler/inverse_square_root_schedule.py, from arXiv:1706.03762; update 0 has the initial rate, 0."""
    expected = [[lr * (step / 400) if step < 400 else lr * 400**0.5 * step**-0.5 for lr in (0.1, 0.03)] for step in range(TOTAL)]
    assert_close(plugin_rates("warmup:length=400,start_factor=0", "inverse_sqrt:start=400"), expected)
    assert_close(plugin_rates("warmup:length=8%,start_factor=0", "inverse_sqrt:start=8%"), expected)


@pytest.mark.compares(use="inverse_sqrt", technique="inverse square root of the steps", source="transformers.get_inverse_sqrt_schedule", tolerance="to the bit")
def test_inverse_sqrt_with_a_timescale_is_that_of_transformers_to_the_bit():
    """get_inverse_sqrt_schedule(num_warmup_steps=400, timescale=1500)"""
    shift = 1500 - 400
    expected = [[lr * (step / 400 if step < 400 else 1.0 / sqrt((step + shift) / 1500)) for lr in (0.1, 0.03)] for step in range(TOTAL)]
    assert plugin_rates("warmup:length=400,start_factor=0", "inverse_sqrt:start=400,timescale=1500") == expected


def test_inverse_sqrt_without_a_start_falls_at_once_and_by_epoch():
    assert plugin_rates("inverse_sqrt:timescale=1ep,by=epoch") == [[lr * (1 / sqrt(1 + step // BATCHES)) for lr in (0.1, 0.03)] for step in range(TOTAL)]


MOMENTA = [
    ("onecycle:max_lr=1.0", partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=TOTAL)),
    ("onecycle:max_lr=1.0,anneal_strategy=linear,base_momentum=0.7,max_momentum=0.9,three_phase=true,pct_start=0.4",
     partial(lr_scheduler.OneCycleLR, max_lr=1.0, anneal_strategy="linear", base_momentum=0.7, max_momentum=0.9,
             three_phase=True, pct_start=0.4, total_steps=TOTAL)),
    ("cyclic:base_lr=0.01,max_lr=0.1", partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1)),
    ("cyclic:base_lr=0.01,max_lr=0.1,step_size_up=50,step_size_down=20,mode=triangular2,base_momentum=0.5,max_momentum=0.95",
     partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=50, step_size_down=20, mode="triangular2",
             base_momentum=0.5, max_momentum=0.95)),
    ("cyclic:base_lr=0.01,max_lr=0.1,step_size_up=50,mode=exp_range,gamma=0.99",
     partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=50, mode="exp_range", gamma=0.99)),
]


@pytest.mark.parametrize("kind", [torch.optim.SGD, partial(torch.optim.Adam, betas=(0.9, 0.77)), torch.optim.RMSprop],
                         ids=["SGD", "Adam", "RMSprop"])
@pytest.mark.parametrize(("plugin", "factory"), MOMENTA, ids=ident)
def test_momentum_equals_that_of_torch(plugin, factory, kind):
    def read(group):
        return [group["lr"], *group.get("betas", [group.get("momentum")])]

    run, values = make_run(plugin, optimizer=two_groups(kind)), []
    for _, rates in lr_curve(run, points=TOTAL):
        run.hook.before_step(run=run)
        values.append([[lr, *read(group)[1:]] for lr, group in zip(rates, run.optimizer.param_groups, strict=True)])
    assert_close(values, torch_values("step", factory, read, kind))


@pytest.mark.parametrize("plugin", ["onecycle:max_lr=1", "cyclic:base_lr=0.1,max_lr=1"])
def test_an_optimizer_without_momentum_is_refused(net, batches, plugin):
    adagrad = partial(torch.optim.Adagrad, lr=0.1)
    with pytest.raises(UsageError, match="Adagrad has no momentum to cycle; pass cycle_momentum=false"):
        fit(net, torch.nn.CrossEntropyLoss(), adagrad, batches, plugins=[full_spec(plugin)])
    fit(net, torch.nn.CrossEntropyLoss(), adagrad, batches, plugins=[f"{full_spec(plugin)},cycle_momentum=false"])


def test_with_cycle_momentum_false_no_hook_changes_momentum():
    run = make_run("onecycle:max_lr=1,cycle_momentum=false", "cyclic:base_lr=1,max_lr=2,cycle_momentum=false")
    assert run.hook.acting["before_step"] == run.hook.acting["train_start"] == []


def test_after_a_shorter_cycle_the_rate_stays_at_its_lowest():
    short = plugin_rates("onecycle:max_lr=1.0,total_steps=1000,cycle_momentum=false")
    assert short[1000:] == short[999:-1]
    assert short[-1] == pytest.approx([1 / 25 / 1e4] * 2, rel=1e-12)


def test_onecycle_with_a_rise_of_one_step():
    lrs = plugin_rates("onecycle:max_lr=1.0,pct_start=0.1,cycle_momentum=false", epochs=1, batches=10)
    assert lrs[0] == pytest.approx([1 / 25] * 2)
    assert 0.9 < lrs[1][0] < 1
    assert lrs[-1] == pytest.approx([1 / 25 / 1e4] * 2)


@pytest.mark.parametrize("plugin", ALL, ids=ident)
def test_a_schedule_is_a_pure_function_of_the_position(plugin):
    run = make_run(plugin)
    forward = dict(lr_curve(run, points=TOTAL))
    order = list(range(0, TOTAL, 7))
    for steps in (order[::-1], random.Random(0).sample(order, len(order))):
        run = make_run(plugin)
        for run.counters.attempts in steps:
            run.counters.epoch = run.attempts // BATCHES
            assert scheduled_rates(run) == forward[run.attempts]


@pytest.mark.parametrize("plugin", ALL, ids=ident)
def test_warmup_multiplies_and_never_exceeds_the_schedule(plugin):
    without, with_warmup = torch.tensor(plugin_rates(plugin)), torch.tensor(plugin_rates("warmup:length=300", plugin))
    assert (with_warmup <= without).all()
    assert torch.equal(with_warmup[300:], without[300:])
    assert (with_warmup[0] < without[0]).all()
    torch.testing.assert_close(with_warmup, torch.tensor(plugin_rates(plugin, "warmup:length=300")), rtol=1e-12, atol=0)


@pytest.mark.parametrize("plugin", [
    *(plugin for plugin, by, _ in CASES if by == "epoch"), "cosine:by=step", "onecycle:max_lr=1.0", "linear:total_iters=50%,by=step",
    "step:step_size=10%,by=step", "trapezoidal:max_lr=0.4,step_size=10%", "cyclic:base_lr=0.01,max_lr=0.1,step_size_up=4ep"], ids=ident)
def test_accumulation_does_not_stretch_a_schedule(plugin):
    assert plugin_rates("accumulate:every=4", plugin, batches=4 * BATCHES - 3) == plugin_rates(plugin)


def test_a_skipped_step_does_not_delay_a_schedule(net, batches, sgd):
    seen = []

    class Skip:
        @hookimpl
        def optimizer_step(self, run: Run, closure):
            run.skipped = run.attempts % 2 == 0
            return closure()

        @hookimpl
        def after_step(self, run: Run):
            seen.append(run.optimizer.param_groups[0]["lr"])

    fit(net, torch.nn.CrossEntropyLoss(), sgd, batches, epochs=2, plugins=[full_spec("polynomial:total_iters=100%,by=step"), Skip()])
    assert seen == pytest.approx([0.1 * (1 - step / 16) for step in range(16)])


@pytest.mark.parametrize(("plugin", "message"), [
    ("step:step_size=3,gamma=-1", "gamma is above 0, not -1"),
    ("step:step_size=-3", "step_size takes a duration above 0, not '-3'"),
    ("multistep:milestones=3,gamma=0", "gamma is above 0, not 0"),
    ("multistep:milestones=3,x", "milestones takes a duration, not 'x'"),
    ("exponential:gamma=nan", "gamma takes a number of at most 3.4e38, not 'nan'"),
    ("linear:start_factor=-1", "start_factor is 0 to 1, not -1"),
    ("warmup:start_factor=1.5", "start_factor is 0 to 1, not 1.5"),
    ("linear:end_factor=1.5", "end_factor is 0 to 1, not 1.5"),
    ("polynomial:power=0", "power is above 0, not 0"),
    ("constant:factor=2", "factor is 0 to 1, not 2"),
    ("cosine_restarts:t_0=3,t_mult=0", "t_mult is at least 1, not 0"),
    ("cosine_restarts:t_0=3,eta_min=-1", "eta_min is at least 0, not -1"),
    ("lambda:lr_lambda=math:sqr", "lr_lambda: math has no 'sqr'"),
    ("onecycle:max_lr=0", "max_lr is above 0, not 0"),
    ("onecycle:max_lr=0.1,-1", "max_lr is above 0, not -1"),
    ("onecycle:max_lr=1,pct_start=2", "pct_start is 0 to 1, not 2"),
    ("onecycle:max_lr=1,base_momentum=-1", "base_momentum is 0 to 1, not -1"),
    ("onecycle:max_lr=1,div_factor=0", "div_factor is above 0, not 0"),
    ("onecycle:max_lr=1,anneal_strategy=sine", r"anneal_strategy takes cos\|linear, not 'sine'"),
    ("cyclic:base_lr=-1,max_lr=1", "base_lr is at least 0, not -1"),
    ("cyclic:base_lr=1,max_lr=1,gamma=0", "gamma is above 0, not 0"),
    ("cyclic:base_lr=1,max_lr=1,max_momentum=2", "max_momentum is 0 to 1, not 2"),
    ("trapezoidal:max_lr=0,step_size=1", "max_lr is above 0, not 0"),
    ("trapezoidal:max_lr=1,step_size=1,base_lr=-1", "base_lr is at least 0, not -1"),
    ("onecycle", "max_lr is required"),
    ("inverse_sqrt", "one of start and timescale is required; pass start, the length of the warmup"),
    ("inverse_sqrt:timescale=0", "timescale takes a duration above 0, not '0'"),
    ("trapezoidal:max_lr=1,step_size=1,decay_type=sqrt", r"decay_type takes linear\|cosine\|1-sqrt, not 'sqrt'"),
])
def test_options_out_of_range_are_refused(plugin, message):
    with pytest.raises(UsageError, match=f"^{plugin.partition(':')[0]}: {message}"):
        compose([full_spec(plugin)])


@pytest.mark.parametrize("plugin", [
    cls("lambda")([log] * 3), cls("multiplicative")([log] * 3), cls("onecycle")([1.0] * 3), cls("cyclic")(0.1, [1.0] * 3)], ids=ident)
def test_a_list_has_a_value_for_every_group(net, batches, sgd, plugin):
    with pytest.raises(UsageError, match="(lr_lambda|max_lr) has 3 values; parameter groups: 1"):
        fit(net, torch.nn.CrossEntropyLoss(), sgd, batches, plugins=[plugin])


def test_functions_are_given_by_import_path():
    assert plugin_rates("lambda:lr_lambda=math:exp", epochs=2)[-1] == pytest.approx([0.1 * 2.718281828459045, 0.03 * 2.718281828459045])
    assert plugin_rates("lambda:lr_lambda=math:exp,math:cos", epochs=2)[-1] == pytest.approx([0.1 * 2.718281828459045, 0.03 * cos(1)])


def test_multiplicative_calls_its_function_once_per_position():
    positions = []
    run = make_run(cls("multiplicative")(lambda position: positions.append(position) or 0.5, by="step"))
    for run.counters.attempts in (0, 1, 2, 9, 10, 4, 10):
        assert scheduled_rates(run) == pytest.approx([0.1 * 0.5**run.attempts, 0.03 * 0.5**run.attempts])
    assert positions == list(range(1, 11))


def test_lr_curve_does_not_change_the_counters_of_the_run():
    run = Run(None, None, torch.optim.SGD([torch.zeros(1, requires_grad=True)]), range(5), epochs=3, hook=compose(["cosine"], DEFAULTS))
    run.optimizer.param_groups[0]["initial_lr"] = 0.1
    run.counters.epoch, run.counters.attempts, run.counters.seen = 1, 6, 6
    assert [step for step, _ in lr_curve(run)] == list(range(15))
    assert (run.epoch, run.attempts, run.seen) == (1, 6, 6)
    run.epochs = 3000
    assert len(list(lr_curve(run, points=100))) <= 102


@pytest.mark.parametrize(("spec", "percent"), [
    ("length=30ep", "38%"), ("length=32st,start_factor=0", "47%"), ("length=4,by=epoch,start_factor=0", "25%"),
    ("length=8,by=step,start=10,start_factor=0", "62%"), ("length=100%", None), ("length=2ep", None), ("length=6,start=10", None),
    ("length=2,by=epoch", None),
])
def test_a_warmup_that_does_not_end_within_the_run_is_said_once(spec, percent, net, batches, sgd, caplog):
    run = fit(net, torch.nn.CrossEntropyLoss(), sgd, batches, epochs=2, plugins=[f"warmup:{spec}"])
    explain(run=run)
    length = spec.partition(",")[0].removeprefix("length=")
    assert caplog.messages == [f"warmup: length={length} is longer than the run, whose learning rate reaches only {percent} of its full value; "
                               "use a shorter length, such as 5%"][:1 if percent else 0]
    if percent:
        assert f"{run.history[-1]['lr'] / 0.1:.0%}" == percent
