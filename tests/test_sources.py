"""Thirty things people do by hand: each is written here in plain PyTorch and compared with loopctl.

The weights, and the loss and the learning rates of every step, are equal: bit for bit if the operations are the same,
otherwise within a tolerance that a comment explains. The table in docs/sources.md is generated from this file.
"""
import copy
import math
import os
import random
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler, swa_utils

from loopctl import Run, fit, hookimpl
from loopctl.cli import optimizers
from loopctl.plugins.lambda_lr import LambdaLr

ROOT = Path(__file__).parents[1]
cross_entropy = nn.CrossEntropyLoss()


# The data and the network of every row


def digits(start, stop, size=32):
    """Batches of `size` images of scikit-learn's digits."""
    raw = load_digits()
    images = torch.tensor(raw.images[start:stop], dtype=torch.float32).unsqueeze(1) / 16
    targets = torch.tensor(raw.target[start:stop])
    return list(zip(images.split(size), targets.split(size), strict=True))


TRAIN, VALID = digits(0, 200), digits(200, 300)         # the last batch of each is smaller


def as_dtype_of(model, batches):
    """The batches with inputs in the dtype of the model."""
    return [(input.to(next(model.parameters()).dtype), target) for input, target in batches]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(144, 10))


def plain_loop(model, optimizer, epochs=3, per_epoch=None, per_step=None, after_epoch=None):
    """Train with a plain loop. Return the loss and the learning rates of every step."""
    steps, train = [], as_dtype_of(model, TRAIN)
    torch.manual_seed(1)
    for epoch in range(epochs):
        model.train()
        for input, target in train:
            rates = [group["lr"] for group in optimizer.param_groups]
            optimizer.zero_grad()
            loss = cross_entropy(model(input), target)
            loss.backward()
            optimizer.step()
            steps.append((loss.item(), rates))
            if per_step:
                per_step.step()
        if per_epoch:
            per_epoch.step()
        if after_epoch and after_epoch(epoch):
            break
    return steps


class Record:
    """Records the loss and the learning rates of every step."""

    def __init__(self):
        self.steps = []

    @hookimpl
    def after_step(self, run: Run):
        self.steps.append((run.loss.item(), [group["lr"] for group in run.optimizer.param_groups]))


def run_loopctl(model, optimizer, epochs=3, plugins=(), **more):
    """Train with loopctl. Return the run, and the loss and the learning rates of every step."""
    record = Record()
    run = fit(model, cross_entropy, optimizer, as_dtype_of(model, TRAIN), epochs=epochs, plugins=[*plugins, record], seed=1, **more)
    return run, record.steps


def assert_same_weights(one, other, tolerance=0.0):
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_steps(steps, expected, tolerance=0.0):
    assert len(steps) == len(expected)
    for (loss, rates), (expected_loss, expected_rates) in zip(steps, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=tolerance, abs=0)
        assert rates == pytest.approx(expected_rates, rel=1e-12, abs=1e-16)


sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def compare_schedule(plugins, make, per="epoch", epochs=6, factory=sgd):
    """Assert that a run with `plugins` equals a plain loop with the torch schedule `make(optimizer)`.

    In float64, with a tolerance of 1e-12: torch computes each rate from the one before, loopctl in closed form.
    """
    model, plain = network().double(), network().double()
    optimizer = factory(plain.parameters())
    schedule = make(optimizer)
    expected = plain_loop(plain, optimizer, epochs, **{f"per_{per}": schedule})
    _, steps = run_loopctl(model, factory, epochs, plugins)
    assert_same_steps(steps, expected, 1e-12)
    assert_same_weights(model, plain, 1e-12)


# The rows


@pytest.mark.compares(use="--optimizer sgd", technique="optimizers and their options",
                      source="torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.Adam, torch.optim.AdamW", tolerance="to the bit")
@pytest.mark.parametrize(("spec", "cls", "options"), [
    ("sgd:momentum=0.9,weight_decay=1e-4,nesterov=true", torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}),
    ("adagrad:lr_decay=0.01,weight_decay=1e-4,eps=1e-9", torch.optim.Adagrad, {"lr_decay": 0.01, "weight_decay": 1e-4, "eps": 1e-9}),
    ("rmsprop:alpha=0.9,eps=1e-7,momentum=0.5,centered=true", torch.optim.RMSprop,
     {"alpha": 0.9, "eps": 1e-7, "momentum": 0.5, "centered": True}),
    ("adam:betas=0.8,0.99,eps=1e-7,amsgrad=true,weight_decay=1e-4", torch.optim.Adam,
     {"betas": (0.8, 0.99), "eps": 1e-7, "amsgrad": True, "weight_decay": 1e-4}),
    ("adamw:weight_decay=0.05", torch.optim.AdamW, {"weight_decay": 0.05}),
])
def test_row_01_optimizers_and_their_options(spec, cls, options):
    model, plain = network(), network()
    expected = plain_loop(plain, cls(plain.parameters(), lr=0.01, **options))
    _, steps = run_loopctl(model, optimizers.make(spec, 0.01)[0])
    assert_same_weights(model, plain)
    assert_same_steps(steps, expected)


@pytest.mark.compares(use="--optimizer lbfgs", technique="several evaluations per update",
                      source="torch.optim.LBFGS", tolerance="to the bit")
def test_row_02_lbfgs():
    model, plain = network(), network()
    optimizer = torch.optim.LBFGS(plain.parameters(), lr=0.01, max_iter=20)
    torch.manual_seed(1)
    plain.train()
    losses, record = [], Record()
    for input, target in TRAIN[:3]:
        def closure(input=input, target=target):
            optimizer.zero_grad()
            loss = cross_entropy(plain(input), target)
            loss.backward()
            return loss
        losses.append((optimizer.step(closure).item(), [0.01]))
    fit(model, cross_entropy, optimizers.make("lbfgs:max_iter=20", 0.01)[0], TRAIN[:3], seed=1, plugins=[record])
    assert_same_weights(model, plain)
    assert_same_steps(record.steps, losses)


class Lion(torch.optim.Optimizer):
    """An optimizer that torch does not have (arXiv:2302.06675)."""

    def __init__(self, params, lr=1e-3, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["beta"])
                parameter.sub_(average.sign(), alpha=group["lr"])
        return loss


def test_row_03_your_own_optimizer_class():
    model, plain = network(), network()
    expected = plain_loop(plain, Lion(plain.parameters(), lr=0.01, beta=0.8))
    _, steps = run_loopctl(model, optimizers.make(f"{__file__}:Lion:beta=0.8", 0.01)[0])
    assert_same_weights(model, plain)
    assert_same_steps(steps, expected)


@pytest.mark.compares(use="step", technique="a factor at regular intervals",
                      source="torch.optim.lr_scheduler.StepLR", tolerance="1e-12: torch computes each rate from the one before")
@pytest.mark.parametrize("gamma", [0.5, 0.1])
def test_row_04_step_lr_per_epoch(gamma):
    compare_schedule([f"step:step_size=2,gamma={gamma}"], partial(lr_scheduler.StepLR, step_size=2, gamma=gamma))


@pytest.mark.compares(use="multistep", technique="a factor at milestones",
                      source="torch.optim.lr_scheduler.MultiStepLR", tolerance="1e-12: torch computes each rate from the one before")
def test_row_05_multistep_lr():
    compare_schedule(["multistep:milestones=2,3,5,gamma=0.1"], partial(lr_scheduler.MultiStepLR, milestones=[2, 3, 5], gamma=0.1))


@pytest.mark.compares(use="exponential", technique="a factor at every epoch or step",
                      source="torch.optim.lr_scheduler.ExponentialLR", tolerance="1e-12: torch computes each rate from the one before")
def test_row_06_exponential_lr():
    compare_schedule(["exponential:gamma=0.9"], partial(lr_scheduler.ExponentialLR, gamma=0.9))


@pytest.mark.compares(use="cosine", technique="cosine annealing, arXiv:1608.03983",
                      source="torch.optim.lr_scheduler.CosineAnnealingLR", tolerance="1e-12: torch computes each rate from the one before")
@pytest.mark.parametrize("t_max", [2, 6, 50])
def test_row_07_cosine_falls_and_rises_again_after_t_max(t_max):
    compare_schedule([f"cosine:t_max={t_max},eta_min=0.001"],
                     partial(lr_scheduler.CosineAnnealingLR, T_max=t_max, eta_min=0.001))


@pytest.mark.compares(use="cosine_restarts", technique="warm restarts, arXiv:1608.03983",
                      source="torch.optim.lr_scheduler.CosineAnnealingWarmRestarts", tolerance="1e-12")
def test_row_08_cosine_with_warm_restarts():
    compare_schedule(["cosine_restarts:t_0=2,t_mult=2"], partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2, T_mult=2))


@pytest.mark.parametrize(("spec", "options"), [
    ("factor=0.5,patience=1", {"factor": 0.5, "patience": 1}),
    ("mode=max,factor=0.5,patience=0,threshold=0.01,threshold_mode=abs,cooldown=1,min_lr=0.02",
     {"mode": "max", "factor": 0.5, "patience": 0, "threshold": 0.01, "threshold_mode": "abs", "cooldown": 1, "min_lr": 0.02}),
])
def test_row_09_reduce_on_plateau_of_the_validation_loss(spec, options):
    model, plain = network().double(), network().double()
    optimizer, valid = sgd(plain.parameters()), as_dtype_of(plain, VALID)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, **options)

    def validate(epoch):
        plain.eval()
        with torch.no_grad():
            total = sum(cross_entropy(plain(x), y) * len(y) for x, y in valid)
        schedule.step(total.item() / sum(len(y) for _, y in VALID))

    expected = plain_loop(plain, optimizer, 9, after_epoch=validate)
    _, steps = run_loopctl(model, sgd, 9, [f"plateau:monitor=val_loss,{spec}"], valid=valid)
    assert len({rates[0] for _, rates in expected}) > 1          # the schedule did reduce the rate
    assert_same_steps(steps, expected, 1e-12)
    assert_same_weights(model, plain, 1e-12)


def halve(epoch):
    return 0.5**epoch


@pytest.mark.compares(use="lambda", technique="a factor from a function",
                      source="torch.optim.lr_scheduler.LambdaLR", tolerance="1e-12")
def test_row_10_lambda_lr():
    compare_schedule([LambdaLr(halve)], partial(lr_scheduler.LambdaLR, lr_lambda=halve))


@pytest.mark.compares(use="linear, polynomial", technique="a straight line, and a power of the rest of the run",
                      source="torch.optim.lr_scheduler.LinearLR, torch.optim.lr_scheduler.PolynomialLR", tolerance="1e-12: torch computes each rate from the one before")
@pytest.mark.parametrize(("spec", "make"), [
    ("linear:start_factor=0.5,end_factor=0.1,total_iters=4",
     partial(lr_scheduler.LinearLR, start_factor=0.5, end_factor=0.1, total_iters=4)),
    ("polynomial:total_iters=5,power=2", partial(lr_scheduler.PolynomialLR, total_iters=5, power=2)),
])
def test_row_11_linear_and_polynomial_decay(spec, make):
    compare_schedule([spec], make)


class Trapezoid:
    """The rate rises for step_size steps, holds, falls for step_size steps from anneal_start, and stays at the base rate."""

    def __init__(self, optimizer, base, top, step_size, anneal_start):
        self.optimizer, self.settings, self.count = optimizer, (base, top, step_size, anneal_start), -1
        self.step()

    def step(self):
        self.count += 1
        base, top, size, start = self.settings
        if self.count < size:
            lr = base + (top - base) * self.count / size
        elif self.count < start:
            lr = top
        elif self.count < start + size:
            lr = top - (top - base) * (self.count - start) / size
        else:
            lr = base
        self.optimizer.param_groups[0]["lr"] = lr


@pytest.mark.compares(use="trapezoidal", technique="warmup, stable, decay",
                      source="arXiv:1802.08770; the formula by hand", tolerance="1e-12")
def test_row_12_trapezoidal():
    compare_schedule(["trapezoidal:base_lr=0.01,max_lr=0.2,step_size=10,anneal_start=25,by=step"],
                     partial(Trapezoid, base=0.01, top=0.2, step_size=10, anneal_start=25), per="step")


@pytest.mark.compares(use="onecycle", technique="one cycle of rate and momentum, arXiv:1708.07120",
                      source="torch.optim.lr_scheduler.OneCycleLR", tolerance="1e-12")
@pytest.mark.parametrize(("spec", "options"), [
    ("", {}), (",pct_start=0.2,anneal_strategy=linear,div_factor=10,final_div_factor=100",
               {"pct_start": 0.2, "anneal_strategy": "linear", "div_factor": 10, "final_div_factor": 100}),
    (",three_phase=true", {"three_phase": True}),
])
def test_row_13_one_cycle_per_batch_with_momentum(spec, options):
    momenta = []

    class RecordMomentum:
        @hookimpl
        def before_step(self, run: Run):
            momenta.append(run.optimizer.param_groups[0]["momentum"])

    expected = []

    class RecordingOneCycleLR(lr_scheduler.OneCycleLR):
        def step(self, *arguments):
            super().step(*arguments)
            expected.append(self.optimizer.param_groups[0]["momentum"])

    make = partial(RecordingOneCycleLR, max_lr=0.3, total_steps=6 * len(TRAIN) + 1, **options)
    compare_schedule([f"onecycle:max_lr=0.3,total_steps={6 * len(TRAIN) + 1}{spec}", RecordMomentum()], make, per="step")
    assert momenta == pytest.approx(expected[:-1], rel=1e-12)


@pytest.mark.compares(use="cyclic", technique="cycles of rate and momentum, arXiv:1506.01186",
                      source="torch.optim.lr_scheduler.CyclicLR", tolerance="1e-12")
@pytest.mark.parametrize("mode", ["triangular", "triangular2", "exp_range"])
def test_row_14_cyclical_rates(mode):
    compare_schedule(
        [f"cyclic:base_lr=0.01,max_lr=0.1,step_size_up=5,step_size_down=8,mode={mode},gamma=0.99"],
        partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=5, step_size_down=8, mode=mode, gamma=0.99), per="step")


@pytest.mark.compares(use="warmup", technique="a linear rise, times any other schedule",
                      source="torch.optim.lr_scheduler.LinearLR, torch.optim.lr_scheduler.ChainedScheduler", tolerance="1e-12: torch computes each rate from the one before")
def test_row_15_warmup_then_another_schedule():
    def make(optimizer):
        return lr_scheduler.ChainedScheduler([lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10),
                                              lr_scheduler.ExponentialLR(optimizer, 0.95)])

    compare_schedule(["warmup:length=10,start_factor=0.1", "exponential:gamma=0.95,by=step"], make, per="step")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_row_16_mixed_precision(dtype):
    model, plain = network(), network()
    optimizer, scaler = sgd(plain.parameters()), torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    torch.manual_seed(1)
    expected = []
    for _ in range(3):
        plain.train()
        for input, target in TRAIN:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = cross_entropy(plain(input), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            expected.append((loss.item(), [0.1]))
    _, steps = run_loopctl(model, sgd, plugins=[f"amp:dtype={str(dtype).removeprefix('torch.')}"])
    assert_same_weights(model, plain)
    assert_same_steps(steps, expected)


def test_row_17_gradient_accumulation_without_losing_the_last_group():
    model, plain = network(), network()
    optimizer, expected = sgd(plain.parameters()), []
    torch.manual_seed(1)
    for _ in range(3):
        plain.train()
        for start in range(0, len(TRAIN), 4):
            group = TRAIN[start:start + 4]
            count = sum(len(target) for _, target in group)
            optimizer.zero_grad()
            total = 0.0
            for input, target in group:
                loss = cross_entropy(plain(input), target) * (len(target) / count)
                loss.backward()
                total += loss.item()
            optimizer.step()
            expected.append((total, [0.1]))
    run, steps = run_loopctl(model, sgd, plugins=["accumulate:every=4"])
    assert run.step == 6
    assert_same_weights(model, plain)
    assert_same_steps(steps, expected, 1e-6)            # loopctl sums the reported loss in float32, the plain loop in float64


@pytest.mark.parametrize(("spec", "clip"), [
    ("clip:max_norm=20,norm_type=2", partial(nn.utils.clip_grad_norm_, max_norm=20, norm_type=2)),
    ("clip:max_norm=0.5", partial(nn.utils.clip_grad_norm_, max_norm=0.5)),
    ("clip:value=0.01", partial(nn.utils.clip_grad_value_, clip_value=0.01)),
])
def test_row_18_gradient_clipping(spec, clip):
    model, plain = network(), network()
    optimizer, expected = sgd(plain.parameters()), []
    torch.manual_seed(1)
    for _ in range(3):
        plain.train()
        for input, target in TRAIN:
            optimizer.zero_grad()
            loss = cross_entropy(plain(input), target)
            loss.backward()
            clip(plain.parameters())
            optimizer.step()
            expected.append((loss.item(), [0.1]))
    _, steps = run_loopctl(model, sgd, plugins=[spec])
    assert_same_weights(model, plain)
    assert_same_steps(steps, expected)


def test_row_19_freezing_by_name():
    model, plain = network(), network()
    for name, parameter in plain.named_parameters():
        if name.startswith("0."):
            parameter.requires_grad = False
    expected = plain_loop(plain, sgd(parameter for parameter in plain.parameters() if parameter.requires_grad))
    run, steps = run_loopctl(model, sgd, plugins=["freeze:patterns=0.*"])
    assert all(parameter.requires_grad for parameter in run.optimizer.param_groups[0]["params"])
    assert_same_weights(model, plain)
    assert_same_steps(steps, expected)


def test_row_20_different_learning_rates_for_different_layers():
    model, plain = network(), network()
    special = [parameter for name, parameter in plain.named_parameters() if name.startswith("0.")]
    others = [parameter for name, parameter in plain.named_parameters() if not name.startswith("0.")]
    optimizer = torch.optim.Adam([{"params": others}, {"params": special, "lr": 0.01}], lr=0.001, weight_decay=1e-3)
    expected = plain_loop(plain, optimizer)
    _, steps = run_loopctl(model, partial(torch.optim.Adam, lr=0.001, weight_decay=1e-3), plugins=["layerwise_lr:rates=0.*=0.01"])
    assert_same_weights(model, plain)
    assert_same_steps(steps, expected)


def test_row_21_stochastic_weight_averaging():
    model, plain = network().double(), network().double()
    optimizer = sgd(plain.parameters())
    average, anneal = swa_utils.AveragedModel(plain), swa_utils.SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    optimizer.param_groups[0]["lr"] = 0.1                # undo SWALR, which sets its rate at once; it should start at epoch 3

    def after_epoch(epoch):
        if epoch >= 3:
            average.update_parameters(plain)
            anneal.step()

    expected = plain_loop(plain, optimizer, 6, after_epoch=after_epoch)
    swa_utils.update_bn([input for input, _ in as_dtype_of(plain, TRAIN)], average)
    _, steps = run_loopctl(model, sgd, 6, ["swa:start=3ep,swa_lr=0.05,anneal_epochs=2"])
    assert_same_steps(steps, expected, 1e-12)
    # Tolerance 1e-12: SWALR computes each rate from the one before, loopctl in closed form.
    assert_same_weights(model, average.module, 1e-12)


@pytest.mark.compares(use="early_stopping", technique="early stopping, with the best weights restored",
                      source="the loop by hand", tolerance="to the bit")
def test_row_22_early_stopping_restores_the_best_weights():
    model, plain = network(), network()
    best, waited, stopped = [math.inf, None], [0], []

    def validate(epoch):
        plain.eval()
        with torch.no_grad():
            total = sum(cross_entropy(plain(x), y).double() * len(y) for x, y in VALID).item() / sum(len(y) for _, y in VALID)
        if total < best[0]:
            best[:], waited[0] = [total, copy.deepcopy(plain.state_dict())], 0
        else:
            waited[0] += 1
        stopped.append(waited[0] >= 2)
        return stopped[-1]

    plain_loop(plain, sgd(plain.parameters()), 60, after_epoch=validate)
    run, _ = run_loopctl(model, sgd, 60, ["early_stopping:patience=2,restore_best=true"], valid=VALID)
    assert stopped[-1]
    assert run.epoch == len(stopped)
    assert run.stop == f"val_loss has not improved on {best[0]:.4g} for 2 evaluations"
    plain.load_state_dict(best[1])
    assert_same_weights(model, plain)


def test_row_23_a_table_of_the_layers(capsys):
    run_loopctl(network(), sgd, 1, ["summary"])
    text = capsys.readouterr().out
    assert re.search(r"Conv2d +\[32, 4, 6, 6\] +40", text)
    assert re.search(r"Linear +\[32, 10\] +1,450", text)
    assert re.search(r"trainable +1,498", text)


def test_row_25_choosing_a_device():
    run, _ = run_loopctl(network(), sgd, 1, device="cpu")
    assert run.device == torch.device("cpu")
    if torch.cuda.is_available():
        run, _ = run_loopctl(network(), sgd, 1, device="cuda:0")
        assert next(run.model.parameters()).device == torch.device("cuda:0")


def test_row_27_deterministic_algorithms_are_switched_on(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from loopctl.cli import main
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, warn_only: calls.append(mode))
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    files = []
    for name in ("a", "b"):
        command = ["run", "--epochs", "1", "--model", "mlp:dropout=0.2", "--seed", "42", "--deterministic", "--out", name]
        assert CliRunner().invoke(main, command).exit_code == 0
        files.append((tmp_path / name / "weights.safetensors").read_bytes())
    assert files[0] == files[1]
    assert calls == [True, True]
    assert torch.backends.cudnn.benchmark is False
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_row_27_reproducibility():
    numbers = []
    for _ in range(2):
        torch.rand(3), np.random.rand(3), random.random()
        model = network()
        run_loopctl(model, sgd, 1)
        numbers.append((model[0].weight.sum().item(), torch.rand(1).item(), np.random.rand(), random.random()))
    assert numbers[0] == numbers[1]


def replicated_by_hand(train):
    """Train with DistributedDataParallel in a plain loop, in one of several processes. Return the model's state dict."""
    dist.init_process_group("gloo")
    model, rank, size = network(), dist.get_rank(), dist.get_world_size()
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        replica.train()
        torch.manual_seed(rank)                             # each process has its own dropout masks
        for input, target in train[rank::size]:
            optimizer.zero_grad()
            cross_entropy(replica(input), target).backward()
            optimizer.step()
    return model.state_dict()


class SeedByRank:
    """Seeds each process as the plain loop does, for the same dropout masks."""

    @hookimpl
    def epoch_start(self, run: Run):
        torch.manual_seed(run.rank)


def replicated(train):
    run = fit(network(), cross_entropy, partial(torch.optim.SGD, lr=0.1, momentum=0.9), train, epochs=3, plugins=["ddp", SeedByRank()])
    return run.model.state_dict()


@pytest.mark.compares(use="ddp", technique="data-parallel training",
                      source="torch.nn.parallel.DistributedDataParallel", tolerance="to the bit")
def test_row_26_several_processes(ranks):
    expected, states = ranks(2, replicated_by_hand, TRAIN[:6]), ranks(2, replicated, TRAIN[:6])
    for expected_state, state in zip(expected, states, strict=True):
        for name, value in state.items():
            # In the plain loop, rank 1 keeps BatchNorm statistics of its own from the last step.
            if not torch.equal(expected_state[name], value):
                assert "running" in name
                assert expected_state is expected[1]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# The table in docs/sources.md

ROWS = {
    1: ("SGD, Adagrad, RMSprop, Adam, AdamW and their options", "`--optimizer name:options`"),
    2: ("L-BFGS", "`--optimizer lbfgs:max_iter=20`"),
    3: ("your own optimizer class", "`--optimizer package.module:Class`"),
    4: ("StepLR", "`step`"), 5: ("MultiStepLR", "`multistep`"), 6: ("ExponentialLR", "`exponential`"),
    7: ("CosineAnnealingLR", "`cosine`"), 8: ("CosineAnnealingWarmRestarts", "`cosine_restarts`"),
    9: ("ReduceLROnPlateau", "`plateau`"), 10: ("LambdaLR", "`lambda`"),
    11: ("linear and polynomial decay", "`linear`, `polynomial`"), 12: ("a trapezoidal schedule", "`trapezoidal`"),
    13: ("OneCycleLR, with the momentum", "`onecycle`"), 14: ("CyclicLR", "`cyclic`"),
    15: ("warmup, then another schedule", "`warmup` with any other schedule"), 16: ("mixed precision", "`amp`"),
    17: ("gradient accumulation", "`accumulate`"), 18: ("gradient clipping", "`clip`"), 19: ("freezing", "`freeze`"),
    20: ("different learning rates for different layers", "`layerwise_lr`"), 21: ("stochastic weight averaging", "`swa`"),
    22: ("early stopping", "`early_stopping`"), 23: ("a table of the layers", "`summary`, `loopctl summary`"),
    24: ("a plot of the learning rate", "`loopctl lr`"), 25: ("choosing a GPU", "`--device cuda:1`"),
    26: ("several GPUs, with DataParallel or [its replacement](plugins.md#several-processes)", "`--devices 0,1`, `ddp`, `fsdp`"),
    27: ("reproducibility", "`--seed 42 --deterministic`"),
    28: ("ResNet-50 on ImageNet", "[one command](programs.md)"), 29: ("a linear model on MNIST", "[one command](programs.md)"),
    30: ("a ViT on CIFAR-10", "[one command](programs.md)"),
}
PAGE = ROOT / "docs" / "sources.md"


def page():
    """The content of docs/sources.md, generated from the rows above and the names of the tests."""
    tests = {}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        for name, number in re.findall(r"^def (test_row_(\d+)\w*)", file.read_text(), re.MULTILINE):
            tests.setdefault(int(number), []).append(f"`{name}`")
    lines = [f"| {number} | {what} | {how} | {', '.join(tests.get(number, ['none yet']))} |" for number, (what, how) in ROWS.items()]
    return "\n".join([
        "# Training techniques and the option for each", "",
        "For each row there is a test with the same training in plain PyTorch, written by hand. It compares every weight with the result",
        "of loopctl: bit for bit if the operations are the same, else with a tolerance that the test explains.",
        "`python tests/test_sources.py` writes this table.", "",
        "| | by hand | in loopctl | test |", "|---|---|---|---|", *lines, ""])


def test_the_table_in_the_docs_is_up_to_date():
    assert PAGE.read_text() == page()


if __name__ == "__main__":
    PAGE.write_text(page())
