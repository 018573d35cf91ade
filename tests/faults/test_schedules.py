"""Schedules: when they start and end, rates of 0, and docs/coming-from.md against the formulas of other libraries."""
import inspect
import keyword
import re
from functools import partial
from math import cos, inf, pi, sqrt
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler

from loopctl import Run, UsageError, available, fit, hookimpl, load
from loopctl.composition.compose import compose
from loopctl.composition.explain import explain
from loopctl.composition.options import plugin_options
from loopctl.loop import DEFAULTS
from loopctl.optim.learning_rate import lr_curve, scheduled_rates
from loopctl.plugins.cosine import Cosine
from loopctl.plugins.onecycle import Onecycle
from loopctl.testing import tiny_run
from loopctl.testing.probes import Killed, SaveAndKill

PAGE = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text()
STEPS, EPOCHS, LR = 100, 10, 0.1


def make_run(*plugins, steps=STEPS, epochs=EPOCHS, lr=LR, **fields):
    """A run of `steps` steps that trains nothing; `lr` is a rate, or a list with one per parameter group."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in (lr if isinstance(lr, list) else [lr])]
    optimizer = SGD(groups, momentum=0.5)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return Run(nn.Linear(1, 1), None, optimizer, range(steps // epochs), epochs=epochs, hook=compose(plugins, DEFAULTS), **fields)


def curve(*plugins, **options):
    """The learning rate at every step, of the first parameter group."""
    return [rates[0] for _, rates in lr_curve(make_run(*plugins, **options), points=10**6)]


def on_the_page(there):
    """The plugins that docs/coming-from.md names in the row that has the text `there`."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {there}")]
    return [word for word in re.findall(r"`([^`]+)`", row.split(" | ")[1]) if word.split(":")[0] in available()]


def assert_equal(values, expected):
    assert values == pytest.approx(list(expected), rel=1e-12, abs=1e-16)


# I2


@pytest.mark.fault(row="I2", given="the class of the plugin lambda, imported with a statement", right="from loopctl.plugins.lambda_lr import LambdaLr")
def test_the_class_of_the_plugin_lambda_can_be_imported():
    from loopctl.plugins.lambda_lr import LambdaLr
    assert load("lambda") is LambdaLr
    assert curve(LambdaLr(lambda step: 0.5**step, by="step"), steps=10) == [0.1 * 0.5**step for step in range(10)]


@pytest.mark.fault(row="I", given="every built-in plugin, imported with a statement", right="no part of its module's name or its class is a keyword")
def test_no_built_in_plugin_has_a_keyword_in_its_import():
    for entry in available().values():
        scope = {}
        exec(f"from {entry.module} import {entry.attr}", scope)
        assert scope[entry.attr] is load(entry.name)
        assert not any(map(keyword.iskeyword, [*entry.module.split("."), entry.attr]))


# I5: the rows of docs/coming-from.md. `n` counts steps, `e` epochs; the run has 100 steps in 10 epochs and the rate 0.1.


def risen(n, warmup, then):
    """A rise from 0 over `warmup` steps, then what `then` returns for the part of the other steps that is done."""
    return n / warmup if n < warmup else then((n - warmup) / (STEPS - warmup))


HUGGING_FACE = {
    '`lr_scheduler_type="cosine"`': lambda part: 0.5 * (1 + cos(pi * 2 * 0.5 * part)),
    '`lr_scheduler_type="linear"`': lambda part: 1 - part,
    '`lr_scheduler_type="constant_with_warmup"`': lambda part: 1,
    '`lr_scheduler_type="polynomial"`': lambda part: (1 - part) ** 2,
    '`lr_scheduler_type="cosine_with_restarts"`': lambda part: 0.5 * (1 + cos(pi * ((3 * part) % 1))),
    '`lr_scheduler_type="cosine_with_min_lr"`': lambda part: 0.5 * (1 + cos(pi * part)) * (1 - 0.01) + 0.01,
    '`lr_scheduler_type="warmup_stable_decay"`, `num_decay_steps=20`, `decay_type="1-sqrt"`': lambda part: 1 - sqrt(max(0, part * 90 - 70) / 20),
    '`lr_scheduler_type="warmup_stable_decay"`, `num_decay_steps=20`, `warmup_ratio=0.1`': lambda part: 1 if part < 70 / 90 else 0.5 * (1 + cos(pi * (part * 90 - 70) / 20)),
}


@pytest.mark.fault(row="I5", given="lr_scheduler_type=cosine with warmup_ratio=0.1, as the page translates it", right="factors 0, 1 and 0.587 at steps 0, 10 and 50 of 100")
def test_a_warmup_and_a_cosine_are_those_of_the_hugging_face_trainer():
    rates = curve(*on_the_page('`lr_scheduler_type="cosine"`'), lr=1.0)
    assert [round(rates[step], 3) for step in (0, 10, 50)] == [0, 1, 0.587]


@pytest.mark.fault(row="I", given="the other values of lr_scheduler_type with a warmup, as the page translates them", right="the formulas of the Hugging Face Trainer")
@pytest.mark.parametrize("there", HUGGING_FACE)
def test_schedules_of_the_hugging_face_trainer(there):
    assert_equal(curve(*on_the_page(there)), [LR * risen(n, 10, HUGGING_FACE[there]) for n in range(STEPS)])


@pytest.mark.fault(row="I", given="lr_scheduler_type=inverse_sqrt with warmup_steps=10, as the page translates it", right="the square root of 10 over the step")
def test_the_inverse_square_root_of_the_hugging_face_trainer():
    expected = [n / 10 if n < 10 else 1 / sqrt(n / 10) for n in range(STEPS)]
    assert_equal(curve(*on_the_page('`lr_scheduler_type="inverse_sqrt"`')), [LR * factor for factor in expected])


@pytest.mark.fault(row="I", given="CosineAnnealingWithWarmupScheduler and its like, as the page translates them", right="the formulas of Composer")
@pytest.mark.parametrize(("there", "then"), [
    ('`CosineAnnealingWithWarmupScheduler(t_warmup="1ep")`', lambda part: (1 + cos(pi * part)) / 2),
    ('`LinearWithWarmupScheduler(t_warmup="1ep")`', lambda part: 1.0 + part * (0.0 - 1.0)),
    ("`MultiStepWithWarmupScheduler", lambda part: 0.1 ** (part >= 40 / 90) * 0.1 ** (part >= 70 / 90)),
], ids=["cosine", "linear", "multistep"])
def test_schedules_of_composer(there, then):
    assert_equal(curve(*on_the_page(there)), [LR * risen(n, 10, then) for n in range(STEPS)])


def timm_cosine(t, base, t_initial, lr_min=0.0, cycle_mul=1, warmup_t=0, warmup_lr_init=0.0, warmup_prefix=False):
    """The rate of timm's CosineLRScheduler in epoch or step `t`."""
    if t < warmup_t:
        return warmup_lr_init + t * (base - warmup_lr_init) / warmup_t
    t -= warmup_t * warmup_prefix
    while t >= t_initial:
        t, t_initial = t - t_initial, t_initial * cycle_mul
    return lr_min + 0.5 * (base - lr_min) * (1 + cos(pi * t / t_initial))


@pytest.mark.fault(row="I", given="CosineLRScheduler with and without warmup_prefix, and with cycle_mul", right="the formulas of timm")
@pytest.mark.parametrize(("there", "options"), [
    ("`CosineLRScheduler(t_initial=10, warmup_t=3, warmup_lr_init=0.01)`", {"t_initial": 10, "warmup_t": 3, "warmup_lr_init": 0.01}),
    ("`CosineLRScheduler(t_initial=7, warmup_t=3, warmup_prefix=True", {"t_initial": 7, "warmup_t": 3, "warmup_prefix": True, "lr_min": 0.001}),
    ("`CosineLRScheduler(t_initial=2, cycle_mul=2, cycle_limit=3)`", {"t_initial": 2, "cycle_mul": 2}),
], ids=["replaced", "prefix", "cycles"])
def test_schedules_of_timm(there, options):
    assert_equal(curve(*on_the_page(there)), [timm_cosine(n // 10, LR, **options) for n in range(STEPS)])


@pytest.mark.fault(row="I", given="timm's default by step, t_in_epochs=False, with several groups", right="the formula of timm for each group")
def test_a_cosine_that_starts_in_its_middle_by_step():
    plugins = ["warmup:length=20%,start_factor=0", "cosine:by=step,start=20%,count_from=run"]
    rates = [rates for _, rates in lr_curve(make_run(*plugins, lr=[0.1, 0.03]), points=STEPS)]
    for number, base in enumerate((0.1, 0.03)):
        assert_equal([both[number] for both in rates], [timm_cosine(n, base, 100, warmup_t=20) for n in range(STEPS)])


def nanogpt(it, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    coefficient = 0.5 * (1 + cos(pi * (it - warmup_iters) / (lr_decay_iters - warmup_iters)))
    return min_lr + coefficient * (learning_rate - min_lr)


@pytest.mark.fault(row="I", given="get_lr with lr_decay_iters at the end of the run, and before it", right="the formulas of nanoGPT")
@pytest.mark.parametrize(("there", "decay"), [("`get_lr` with `lr_decay_iters` = `max_iters`", 1000), ("`get_lr` with `lr_decay_iters=800`", 800)])
def test_the_schedule_of_nanogpt(there, decay):
    rates = curve(*on_the_page(there), steps=1000)
    assert_equal(rates, [nanogpt(it, LR, 99, decay, 0.01) for it in range(1000)])


@pytest.mark.fault(row="I", given="create_lr_scheduler_with_warmup and the cycles, as the page translates them", right="the formulas of Ignite")
def test_schedules_of_ignite():
    duration, start = 11, 0.0           # of its warmup, whose last event is the first of the other scheduler
    warm = [start + n * (LR - start) / (duration - 1) for n in range(duration - 1)]
    after = [LR + ((0 - LR) / 2) * (1 - cos(pi * event / 90)) for event in range(90)]
    assert_equal(curve(*on_the_page("`create_lr_scheduler_with_warmup(")), warm + after)
    cycles = [LR + ((0 - LR) / 2) * (1 - cos(pi * (event % 25) / 25)) for event in range(STEPS)]
    assert_equal(curve(*on_the_page("`CosineAnnealingScheduler(")), cycles)
    lines = [0.1 + (0.01 - 0.1) * abs(event % 20 / 20 - 0.5) * 2 for event in range(STEPS)]
    assert_equal(curve(*on_the_page("`LinearCyclicalScheduler(")), lines)
    assert_equal(curve(*on_the_page("`LRScheduler(")), [LR * 0.1 ** (n // 10 // 3) for n in range(STEPS)])


def annealed(start, end, part):
    """fastai's SchedCos."""
    return start + (1 + cos(pi * (1 - part))) * (end - start) / 2


def fit_one_cycle(n, lr_max=0.1, div=25.0, div_final=1e5, pct_start=0.25):
    part = n / STEPS
    if part < pct_start:
        return annealed(lr_max / div, lr_max, part / pct_start)
    return annealed(lr_max, lr_max / div_final, (part - pct_start) / (1 - pct_start))


@pytest.mark.fault(row="I", given="fit_one_cycle, as the page translates it, and with a cycle of one step more", right="its rates at most one step earlier, and its very rates")
def test_the_one_cycle_of_fastai():
    there = [fit_one_cycle(n) for n in range(STEPS + 1)]
    here = curve(*on_the_page("`learn.fit_one_cycle("))
    for n, rate in enumerate(here):
        assert min(there[n:n + 2]) * (1 - 1e-9) <= rate <= max(there[n:n + 2]) * (1 + 1e-9)
    assert_equal(here[24:], there[25:])             # one step earlier from the peak on
    exact = Onecycle(0.1, f"{STEPS + 1}st", pct_start=26 / 101, final_div_factor=4000)
    assert_equal(curve(exact), there[:-1])


@pytest.mark.fault(row="I", given="fit_flat_cos and fit_sgdr, as the page translates them", right="the formulas of fastai")
def test_other_schedules_of_fastai():
    flat = [LR if n < 75 else annealed(LR, LR / 1e5, (n / STEPS - 0.75) / 0.25) for n in range(STEPS)]
    assert_equal(curve(*on_the_page("`learn.fit_flat_cos(")), flat)
    cycles = [annealed(LR, 0, n / length) for length in (10, 20, 40) for n in range(length)]
    assert_equal(curve(*on_the_page("`learn.fit_sgdr("), steps=70, epochs=7), cycles)


@pytest.mark.fault(row="I", given="ReduceLROnPlateau(patience=3) of fastai, as the page translates it", right="a tenth after the third evaluation without a better loss")
def test_the_plateau_of_fastai():
    losses, rate, expected, best, wait = [5.0, 4, 4, 4, 4, 3, 3.1, 3, 3, 3, 3, 3], 0.1, [], inf, 0
    for loss in losses:
        expected.append(rate)
        best, wait = (loss, 0) if loss < best else (best, wait + 1)
        if wait >= 3:
            rate, wait = max(rate / 10, 0), 0

    class Losses:
        @hookimpl
        def evaluate(self, run: Run):
            return {"val_loss": losses[run.epoch - 1]}

    run = tiny_run(Losses(), *on_the_page("`ReduceLROnPlateau("), epochs=len(losses))
    assert [row["lr"] for row in run.history] == pytest.approx(expected)
    assert len(set(expected)) == 3


@pytest.mark.fault(row="I", given="lr_scheduler and SequentialLR in configure_optimizers, as the page translates them", right="torch's schedulers, stepped as Lightning does")
@pytest.mark.parametrize(("there", "interval", "make"), [
    ('`configure_optimizers` with `CosineAnnealingLR` and `"interval": "step"`', 1, partial(lr_scheduler.CosineAnnealingLR, T_max=STEPS)),
    ("`configure_optimizers` with `SequentialLR`", 10, lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, total_iters=5), lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)], [5])),
], ids=["step", "epoch"])
@pytest.mark.filterwarnings("ignore:The epoch parameter")             # SequentialLR passes it
def test_schedules_of_lightning(there, interval, make):
    assert_equal(curve(*on_the_page(there)), by_hand(make, interval))


def by_hand(make, interval=1, lr=LR, read=lambda optimizer: optimizer.param_groups[0]["lr"], steps=STEPS):
    """What torch's scheduler sets at each step; it is stepped every `interval` steps."""
    optimizer = make_run(lr=lr).optimizer
    for group in optimizer.param_groups:
        del group["initial_lr"]
    scheduler, values = make(optimizer), []
    for step in range(1, steps + 1):
        values.append(read(optimizer))
        optimizer.step()
        if step % interval == 0 and step < steps:           # OneCycleLR refuses a step beyond its last
            scheduler.step()
    return values


# start and until


@pytest.mark.fault(row="I", given="SequentialLR of two schedulers, as one with until and one with start", right="torch's rates")
@pytest.mark.parametrize(("first", "make_first", "second", "make_second"), [
    ("step:step_size=7,gamma=0.5", partial(lr_scheduler.StepLR, step_size=7, gamma=0.5), "exponential:gamma=0.9", partial(lr_scheduler.ExponentialLR, gamma=0.9)),
    ("linear:total_iters=20", partial(lr_scheduler.LinearLR, total_iters=20), "multistep:milestones=10,30", partial(lr_scheduler.MultiStepLR, milestones=[10, 30])),
    ("constant:total_iters=9", partial(lr_scheduler.ConstantLR, total_iters=9), "polynomial:total_iters=50,power=2", partial(lr_scheduler.PolynomialLR, total_iters=50, power=2)),
    ("exponential:gamma=0.9", partial(lr_scheduler.ExponentialLR, gamma=0.9), "cosine_restarts:t_0=9,t_mult=2", partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=9, T_mult=2)),
    ("lambda:lr_lambda=math:exp", partial(lr_scheduler.LambdaLR, lr_lambda=lambda n: 2.718281828459045**n), "cosine:t_max=70", partial(lr_scheduler.CosineAnnealingLR, T_max=70)),
    ("torch_scheduler:cls=torch.optim.lr_scheduler:StepLR,step_size=4", partial(lr_scheduler.StepLR, step_size=4),
     "torch_scheduler:cls=torch.optim.lr_scheduler:ExponentialLR,gamma=0.8", partial(lr_scheduler.ExponentialLR, gamma=0.8)),
], ids=["step", "linear", "constant", "exponential", "lambda", "torch_scheduler"])
@pytest.mark.filterwarnings("ignore:The epoch parameter")
def test_a_schedule_after_another_one_is_torchs_sequential_lr(first, make_first, second, make_second):
    rates = curve(f"{first},by=step,until=30st", f"{second},by=step,start=30st")
    expected = by_hand(lambda optimizer: lr_scheduler.SequentialLR(optimizer, [make_first(optimizer), make_second(optimizer)], [30]))
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.fault(row="I", given="start and until in epochs, in steps, in % and as plain numbers", right="the same curve")
@pytest.mark.parametrize("options", ["start=2ep,until=7ep", "start=20%,until=70%", "start=20st,until=70st", "start=20,until=70", "start=19.2,until=69.5st"])
def test_start_and_until_are_durations_of_any_unit(options):
    rates = curve(f"cosine:by=step,{options}")
    assert rates[:20] + rates[70:] == [LR] * 50
    assert_equal(rates[20:70], [LR * (1 + cos(pi * n / 50)) / 2 for n in range(50)])


@pytest.mark.fault(row="I", given="a schedule by epoch with start=25st in epochs of 10 steps", right="it starts with the first whole epoch")
def test_a_schedule_by_epoch_starts_with_a_whole_epoch():
    assert curve("exponential:gamma=0.5,start=25st") == [LR * 0.5 ** max(0, n // 10 - 3) for n in range(STEPS)]
    assert curve("exponential:gamma=0.5,start=30%") == curve("exponential:gamma=0.5,start=3")
    positions = []
    curve(load("lambda")(lambda position: positions.append(position) or 1.0, start="25st"))
    assert sorted({*positions}) == list(range(7))
    assert {type(position) for position in positions} == {int}


@pytest.mark.fault(row="I", given="start after the end of the run; until before start", right="refused before training, in one line")
@pytest.mark.parametrize(("plugin", "message"), [
    ("cosine:by=step,start=100st", "cosine: start=100st leaves no step of the run to act in; use an earlier start"),
    ("cosine:start=95st", "cosine: start=95st leaves no epoch of the run to act in; use an earlier start"),
    ("warmup:start=200%", "warmup: start=200% leaves no step of the run to act in; use an earlier start"),
    ("torch_scheduler:cls=torch.optim.lr_scheduler:ExponentialLR,gamma=0.9,start=10", "torch_scheduler: start=10 leaves no epoch of the run to act in; use an earlier start"),
    ("onecycle:max_lr=1,start=200st,cycle_momentum=false", "onecycle: start=200st leaves no step of the run to act in; use an earlier start"),
    ("cyclic:base_lr=1,max_lr=2,start=200st", "cyclic: start=200st leaves no step of the run to act in; use an earlier start"),
    ("step:step_size=1,start=5ep,until=20%", "step: until=20% leaves no epoch to act in; use a later until"),
    ("linear:start=5ep,until=50st", "linear: until=50st leaves no epoch to act in; use a later until"),
])
def test_a_schedule_that_would_never_act_is_refused(plugin, message):
    steps = []

    class Steps:
        @hookimpl
        def before_step(self, run: Run):
            steps.append(run.step)

    batch = torch.randn(2, 1), torch.randn(2, 1)
    with pytest.raises(UsageError) as refused:
        fit(nn.Linear(1, 1), nn.MSELoss(), partial(SGD, lr=0.1, momentum=0.9), [batch] * 10, epochs=EPOCHS, plugins=[plugin, Steps()])
    assert str(refused.value) == message
    assert not steps
    with pytest.raises(UsageError, match=re.escape(message.partition(": ")[2])):
        curve(plugin)                               # what loopctl lr and loopctl explain compute


@pytest.mark.fault(row="I", given="a run with start and until, killed before, within and after the schedule, and resumed", right="the rates and momenta of the whole run, bit for bit")
@pytest.mark.parametrize("plugin", [
    "cosine:by=step,start=20%,until=80%", "onecycle:max_lr=0.3,start=2st,until=8st", "cyclic:base_lr=0.1,max_lr=0.3,step_size_up=2,start=3,until=7",
    "multiplicative:lr_lambda=math:cos,by=step,start=3", "torch_scheduler:cls=torch.optim.lr_scheduler:ExponentialLR,gamma=0.9,by=step,start=3st,until=8st",
    "cosine:by=step,start=3,count_from=run"])
def test_a_resumed_run_has_the_rates_of_the_whole_run(plugin, tmp_path):
    class Recorder:
        """Records rate and momentum of each step."""

        def __init__(self):
            self.seen = []

        @hookimpl
        def before_step(self, run: Run):
            self.seen.append([run.optimizer.param_groups[0][name] for name in ("lr", "momentum")])

    whole = Recorder()
    tiny_run(plugin, whole)
    for kill in (1, 4, 9):
        before, after, file = Recorder(), Recorder(), tmp_path / f"{kill}.pt"
        with pytest.raises(Killed):
            tiny_run(plugin, before, SaveAndKill(kill, file=file))
        tiny_run(plugin, after, resume=file)
        assert before.seen + after.seen == whole.seen


@pytest.mark.fault(row="I", given="a run of 2 epochs, resumed for 4 with its cosine moved to the fourth", right="the rate falls in the fourth epoch")
def test_a_schedule_may_start_after_the_end_of_the_run_that_is_resumed(tmp_path):
    with pytest.raises(Killed):
        tiny_run("cosine:by=step,start=1ep", SaveAndKill(9, file=tmp_path / "killed.pt"))
    run = tiny_run("cosine:by=step,start=3ep", epochs=4, resume=tmp_path / "killed.pt")
    assert [row["lr"] for row in run.history] == pytest.approx([0.1, 0.1, 0.1, 0.1 * (1 + cos(pi * 4 / 5)) / 2])


@pytest.mark.fault(row="I", given="onecycle and cyclic with start and until", right="the optimizer's own rate and momentum outside of them, torch's inside")
@pytest.mark.parametrize(("plugin", "make"), [
    ("onecycle:max_lr=0.3", partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=50)),
    ("cyclic:base_lr=0.1,max_lr=0.3,step_size_up=20", partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=0.3, step_size_up=20))])
def test_momentum_is_cycled_from_start_to_until(plugin, make):
    run = make_run(f"{plugin},start=20%,until=70%")
    run.hook.train_start(run=run)

    def read(optimizer):
        return [optimizer.param_groups[0][name] for name in ("lr", "momentum")]

    values = []
    for _, (rate,) in lr_curve(run):
        run.hook.before_step(run=run)
        values.append([rate, read(run.optimizer)[1]])
    assert values[:20] + values[70:] == [[LR, 0.5]] * 50
    torch.testing.assert_close(torch.tensor(values[20:70]), torch.tensor(by_hand(make, read=read, steps=50)))


@pytest.mark.fault(row="I", given="cosine without t_max where skipped steps make the run longer than planned", right="the rate stays at its minimum")
def test_a_cosine_over_the_whole_run_does_not_rise_again():
    class Skip:
        """Skips every second step, of which max_steps does not count any."""

        @hookimpl
        def optimizer_step(self, run: Run, closure):
            run.skipped = run.attempts % 2 == 0
            return closure()

        @hookimpl
        def after_step(self, run: Run):
            rates.append(run.optimizer.param_groups[0]["lr"])

    rates = []
    tiny_run("cosine:by=step,eta_min=0.01", Skip(), max_steps=5, epochs=3)
    assert_equal(rates, [0.01 + 0.09 * (1 + cos(pi * min(n, 5) / 5)) / 2 for n in range(10)])
    rates.clear()
    tiny_run("cosine:by=step,eta_min=0.01,t_max=5", Skip(), max_steps=5, epochs=3)
    assert_equal(rates, [0.01 + 0.09 * (1 + cos(pi * n / 5)) / 2 for n in range(10)])          # as torch


@pytest.mark.fault(row="I", given="loopctl explain of a schedule with start", right="the rates at the start, at the peak and at the end")
def test_explain_knows_where_a_schedule_starts():
    batch = torch.randn(2, 1), torch.randn(2, 1)
    run = make_run("warmup:length=10%,start_factor=0", "cosine:by=step,start=10%", batches=[batch] * 10)
    assert "learning rate    0 at the start, 0.1 at its peak, 3.05e-05 at the end" in explain(run=run)


@pytest.mark.fault(row="I", given="Cosine(10) and OneCycle(0.1, 50), with options by position", right="the options they always were; start, until, count_from, optimizer and option by name alone")
def test_options_by_position_are_what_they_were():
    assert (Cosine(10).t_max, Onecycle(0.1, 50).total_steps, load("constant")(0.5, 3, "step").by) == (10, 50, "step")
    for name in available():
        if "count_from" in plugin_options(load(name)):
            kinds = {name: parameter.kind for name, parameter in inspect.signature(load(name)).parameters.items()}
            keywords = [name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY]
            assert keywords == [*kinds][-5:] == ["start", "until", "count_from", "optimizer", "option"]


@pytest.mark.fault(row="I", given="the options of every schedule", right="help for start, until, count_from, optimizer and option, and for each of its own")
def test_every_schedule_has_the_options_with_help():
    schedules = [name for name in available() if hasattr(load(name), "lr_scale") and name not in ("plateau", "swa")]
    assert len(schedules) == 16
    for name in schedules:
        options = plugin_options(load(name))
        assert [*options][-5:] == ["start", "until", "count_from", "optimizer", "option"]
        assert all(option.help for option in options.values())
        assert options["until"].help == "duration from the start of the run after which the schedule has no effect any more"


@pytest.mark.fault(row="I", given="start_factor=0 for warmup and linear", right="the first rate is 0")
def test_a_rise_may_begin_at_0():
    assert_equal(curve("warmup:length=10,start_factor=0"), [LR * min(1, n / 10) for n in range(STEPS)])
    assert_equal(curve("linear:by=step,start_factor=0,total_iters=none"), [LR * n / STEPS for n in range(STEPS)])


# G4


def torch_rates(make, lr):
    return by_hand(make, lr=lr, read=lambda optimizer: [group["lr"] for group in optimizer.param_groups])


class ClosedCosine(lr_scheduler.CosineAnnealingLR):
    """With torch's closed form, which accumulates no rounding errors."""

    def get_lr(self):
        return self._get_closed_form_lr()


NO_MOMENTUM = ",cycle_momentum=false"


@pytest.mark.fault(row="G4", given="parameter groups with a rate of 0, and onecycle, cyclic or cosine with eta_min", right="torch's rates, bit for bit")
@pytest.mark.parametrize("lr", [[0.0], [0.0, 0.03], [0.03, 0.0]], ids=str)
@pytest.mark.parametrize(("plugin", "make"), [
    (f"onecycle:max_lr=0.3{NO_MOMENTUM}", partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=STEPS, cycle_momentum=False)),
    (f"cyclic:base_lr=0.01,max_lr=0.25,step_size_up=16{NO_MOMENTUM}", partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.25, step_size_up=16, cycle_momentum=False)),
    ("cosine:t_max=40,eta_min=0.01,by=step", partial(ClosedCosine, T_max=40, eta_min=0.01)),
], ids=["onecycle", "cyclic", "cosine"])
def test_a_group_with_a_rate_of_0_has_the_rates_of_torch(plugin, make, lr):
    values = [rates for _, rates in lr_curve(make_run(plugin, lr=lr))]
    expected = torch_rates(make, lr)
    for number, rate in enumerate(lr):
        column, torchs = ([rates[number] for rates in both] for both in (values, expected))
        assert column == pytest.approx(torchs, rel=1e-12, abs=1e-16)
        if not rate:
            assert any(column)
            assert "cyclic" in plugin or column == torchs        # CyclicLR adds in another order


@pytest.mark.fault(row="G", given="onecycle with a list of rates, of which the first group's own is 0", right="torch's rates of both groups")
def test_a_list_of_rates_with_a_group_of_rate_0():
    values = [rates for _, rates in lr_curve(make_run(f"onecycle:max_lr=0.3,0.7{NO_MOMENTUM}", lr=[0.0, 0.05]))]
    expected = torch_rates(partial(lr_scheduler.OneCycleLR, max_lr=[0.3, 0.7], total_steps=STEPS, cycle_momentum=False), [0.0, 0.05])
    assert [rates[0] for rates in values] == [rates[0] for rates in expected]
    assert [rates[1] for rates in values] == pytest.approx([rates[1] for rates in expected], rel=1e-12)


@pytest.mark.fault(row="G", given="a rate of 0 and trapezoidal, with and without base_lr", right="the line from the base to max_lr, bit for bit")
def test_a_trapezoid_from_a_rate_of_0():
    rates = curve("trapezoidal:max_lr=0.4,step_size=20", lr=0.0)
    assert rates == [0.4 * max(0.0, min(1.0, n / 20, (STEPS - n) / 20)) for n in range(STEPS)]
    rates = curve("trapezoidal:max_lr=0.4,step_size=20,base_lr=0.1", lr=0.0)
    assert rates == [0.1 + (0.4 - 0.1) * max(0.0, min(1.0, n / 20, (STEPS - n) / 20)) for n in range(STEPS)]


@pytest.mark.fault(row="G", given="a rate of 0 and schedules that are factors alone", right="0.0 at every step")
@pytest.mark.parametrize("plugin", ["cosine", "warmup", "exponential:gamma=0.5", "multistep:milestones=3,gamma=1e9", "linear",
                                    "lambda:lr_lambda=math:exp", "torch_scheduler:cls=torch.optim.lr_scheduler:LinearLR", "swa", "plateau"])
def test_a_rate_of_0_stays_0_without_a_schedule_that_sets_another(plugin):
    run = tiny_run(plugin, optimizer=partial(SGD, lr=0.0, momentum=0.9))
    assert [row["lr"] for row in run.history] == [0.0, 0.0]
    assert run.optimizer.param_groups[0]["initial_lr"] == 0.0


@pytest.mark.fault(row="G", given="a rate of 0, onecycle and warmup, over a resume", right="the product of both, and the same after a resume")
def test_a_rate_of_0_with_a_schedule_that_sets_one_and_a_factor():
    plugins = [f"onecycle:max_lr=0.3{NO_MOMENTUM}", "warmup:length=20,start_factor=0"]
    alone = curve(plugins[0], lr=0.0)
    assert curve(*plugins, lr=0.0) == pytest.approx([rate * min(1, n / 20) for n, rate in enumerate(alone)], rel=1e-15)
    run = tiny_run("onecycle:max_lr=0.3", optimizer=partial(SGD, lr=0.0, momentum=0.9))
    assert [row["lr"] for row in run.history] == [row["lr"] for row in tiny_run("onecycle:max_lr=0.3").history]


@pytest.mark.fault(row="G", given="a rate of 0 and swa with swa_lr", right="the line from 0 to swa_lr")
def test_stochastic_weight_averaging_from_a_rate_of_0():
    run = tiny_run("swa:start=2,swa_lr=0.02,anneal_epochs=4,anneal_strategy=linear", epochs=8, optimizer=partial(SGD, lr=0.0))
    assert [row["lr"] for row in run.history] == [0, 0, 0, 0.005, 0.01, 0.015, 0.02, 0.02]


@pytest.mark.fault(row="G", given="a rate of 0 and any torch scheduler that sets a rate", right="torch's rates, bit for bit")
def test_a_torch_scheduler_from_a_rate_of_0():
    plugin = f"torch_scheduler:cls=torch.optim.lr_scheduler:OneCycleLR,max_lr=0.3,total_steps={STEPS},by=step"
    assert curve(plugin, lr=0.0) == by_hand(partial(lr_scheduler.OneCycleLR, max_lr=0.3, total_steps=STEPS), lr=0.0)


@pytest.mark.fault(row="G", given="a rate of 0 and two schedules that both set a rate", right="refused: there is no rate that their factors belong to")
def test_two_schedules_that_set_a_rate_are_refused_with_a_rate_of_0():
    run = make_run(f"onecycle:max_lr=0.3{NO_MOMENTUM}", "cosine:eta_min=1e-9", lr=0.0)
    run.counters.epoch, run.counters.attempts = 5, 50
    with pytest.raises(UsageError, match="onecycle and cosine: two of them set a rate of their own, and the initial learning rate is 0; use one") as refused:
        scheduled_rates(run)
    assert "\n" not in str(refused.value)


@pytest.mark.fault(row="G", given="a learning rate of 0 and lr_finder", right="refused as before: there is no ratio to keep")
def test_the_learning_rate_finder_refuses_a_rate_of_0(tmp_path):
    with pytest.raises(UsageError, match="every learning rate is 0"):
        tiny_run("lr_finder:num_steps=3", "onecycle:max_lr=0.1", optimizer=partial(SGD, lr=0.0, momentum=0.9), out=tmp_path)


@pytest.mark.fault(row="G", given="loopctl lr and loopctl explain with --lr 0 and onecycle", right="the rates of onecycle, and its bar")
def test_the_curve_of_a_rate_of_0_is_drawn(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from loopctl.cli import main
    from loopctl.cli.curve import active_spans, schedule_factors
    monkeypatch.chdir(tmp_path)
    arguments = ["--lr", "0", "--optimizer", "sgd:momentum=0.9", "--epochs", "2", "--plugin", "onecycle:max_lr=0.3"]
    explained = CliRunner().invoke(main, ["explain", *arguments])
    assert "0.012 at the start, 0.3 at its peak, 1.2e-06 at the end" in explained.output, explained.output
    drawn = CliRunner().invoke(main, ["lr", *arguments])
    assert "start 0.012, end 1.2e-06" in drawn.output, drawn.output
    run = make_run("onecycle:max_lr=0.3", "warmup:length=20%", lr=0.0)
    points = [(step, schedule_factors(run)) for step, _ in lr_curve(run)]
    assert active_spans([step for step, _ in points], [factors for _, factors in points]) == {"onecycle": (0, 99), "warmup": (0, 20)}


@pytest.mark.fault(row="G", given="a learning rate that is a tensor of 0, and onecycle", right="filled in place with the rates of onecycle")
def test_a_tensor_of_0_as_learning_rate():
    rate, seen = torch.tensor(0.0), []

    class Recorder:
        @hookimpl
        def before_step(self, run: Run):
            assert run.optimizer.param_groups[0]["lr"] is rate
            seen.append(rate.item())

    tiny_run("onecycle:max_lr=0.3", Recorder(), optimizer=partial(SGD, lr=rate, momentum=0.9, fused=True))
    expected = curve("onecycle:max_lr=0.3", steps=10, epochs=2)
    assert seen == pytest.approx(expected, rel=1e-6)
