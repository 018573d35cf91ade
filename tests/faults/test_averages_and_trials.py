"""Reported faults of mixed precision, averaged weights, learning-rate tests and batches of unusual types."""
import copy
import math
import os
from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from collections.abc import Mapping, MutableMapping
from dataclasses import InitVar, dataclass, field
from functools import partial
from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint.atomic_files import read_checkpoint
from loopctl.composition.compose import compose
from loopctl.data.batch import iter_tensors, map_nested, sample_count, to_device
from loopctl.plugins.amp import Amp
from loopctl.plugins.ema import Ema
from loopctl.plugins.lr_finder import LrFinder
from loopctl.plugins.swa import Swa

cross_entropy = nn.CrossEntropyLoss()
LIMIT = torch.finfo(torch.float16).tiny


# G7: gradients that float16 scaling skips


class NanGradients:
    """A loss that is finite and, in the steps `bad`, has gradients that are NaN, as those of a root at 0 are."""

    def __init__(self, bad):
        self.bad, self.calls = bad, 0

    def __call__(self, output, target):
        self.calls += 1
        root = (output * 0).sum().sqrt() if self.calls in self.bad else 0.0
        return cross_entropy(output, target) + root


NAN_FOR_EVER = NanGradients(range(10_000))


@pytest.mark.fault(row="G7", given="amp in float16 with gradients that are NaN for ever",
                   right="no update is counted, and the run ends when the loss scale is below the smallest normal float16")
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, partial(torch.optim.SGD, fused=True), torch.optim.Adam])
def test_a_run_whose_gradients_are_never_finite_ends(plain, batches, clone, same, optimizer):
    other = clone(plain)
    run = fit(plain, NAN_FOR_EVER, partial(optimizer, lr=0.1), batches, epochs=40, plugins=["amp:dtype=float16"])
    same(plain, other)
    assert (run.step, run.attempts) == (0, 31)              # from 2**16 to 2**-15
    assert run.stop == ("the gradients of 31 steps in a row are not finite, at loss scales down to 3.05e-05; "
                        "use amp:dtype=bfloat16, and nan_guard to find the step")


@pytest.mark.fault(row="G", given="amp in float16 with gradients that are NaN in every micro-batch, accumulated and guarded",
                   right="the run ends after as many steps")
def test_a_run_with_accumulation_and_a_guard_ends_too(plain, batches):
    plugins = ["accumulate:every=3", "nan_guard:action=skip", "amp:dtype=float16"]
    run = fit(plain, NAN_FOR_EVER, torch.optim.SGD, batches, epochs=40, plugins=plugins)
    assert (run.step, run.attempts) == (0, 31)
    assert run.stop.startswith("the gradients of 31 steps in a row are not finite")


@pytest.mark.fault(row="G", given="amp in float16 with gradients that are NaN for 29 steps, finite once, and NaN again",
                   right="equal to the loop by hand; the run goes on, and the steps in a row are counted anew")
def test_a_finite_step_starts_the_count_anew(plain, batches, clone, same, sgd):
    bad, other = {*range(1, 30), *range(31, 36)}, clone(plain)
    run = fit(plain, NanGradients(bad), sgd, batches, epochs=6, plugins=["amp:dtype=float16"])
    optimizer, scaler, loss_fn = sgd(other.parameters()), torch.amp.GradScaler("cpu"), NanGradients(bad)
    steps = 0
    for input, target in batches * 6:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_fn(other(input), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps += 1
        if scaler.get_scale() < LIMIT:
            break
    same(plain, other)
    assert (steps, run.attempts, run.step) == (32, 32, 1)
    assert run.stop.startswith("the gradients of 2 steps in a row are not finite")


@pytest.mark.fault(row="G", given="a run in float16 killed while its gradients are NaN, and resumed",
                   right="it ends at the same step, with the same count")
def test_a_resumed_run_counts_skipped_steps_from_before(plain, batches, clone, tmp_path):
    class Kill:
        @hookimpl
        def safe_point(self, run: Run):
            if run.attempts == 8 and not run.resume:
                raise KeyboardInterrupt

    plugins = ["amp:dtype=float16", "checkpoint"]
    with pytest.raises(KeyboardInterrupt):
        fit(clone(plain), NAN_FOR_EVER, torch.optim.SGD, batches, epochs=9, plugins=[*plugins, Kill()], out=tmp_path)
    run = fit(plain, NAN_FOR_EVER, torch.optim.SGD, batches, epochs=9, plugins=plugins, out=tmp_path, resume=tmp_path)
    assert (run.step, run.attempts) == (0, 31)
    assert run.stop.startswith("the gradients of 31 steps in a row are not finite")


@pytest.mark.fault(row="G", given="a checkpoint in float16 whose loss scale has fallen to 0",
                   right="refused in one line; no weight becomes NaN")
def test_a_checkpoint_with_a_loss_scale_of_zero_is_refused(plain, batches, tmp_path):
    fit(plain, cross_entropy, torch.optim.SGD, batches, plugins=["amp:dtype=float16", "checkpoint"], out=tmp_path)
    file = next((tmp_path / "checkpoints").glob("step-*.pt"))
    amp = compose(["amp:dtype=float16"]).plugins["amp"]
    amp.train_start(Run(plain, None, torch.optim.SGD(plain.parameters()), [], device=torch.device("cpu")))
    state = read_checkpoint(file, "cpu")["plugins"]["amp"]
    amp.load_state_dict(state)
    with pytest.raises(UsageError, match="^the loss scale in the checkpoint is 0, .*; resume from an earlier checkpoint$"):
        amp.load_state_dict({"": state[""] | {"scale": 0.0}})


@pytest.mark.fault(row="G", given="Amp(init_scale=inf) and init_scale=1e39 from Python, above the largest float32",
                   right="refused: such a scale cannot fall, and skipped steps would be counted")
@pytest.mark.parametrize("scale", [math.inf, 1e39])
def test_a_loss_scale_above_float32_is_refused(scale):
    with pytest.raises(ValueError, match=r"^init_scale takes a number of at most 3\.4e38, not "):
        Amp("float16", scale)


def train_where_one_process_has_nan():
    """Train in a process of several; only rank 1 has gradients that are NaN."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    data = [(torch.randn(4, 6), torch.randint(0, 3, (4,))) for _ in range(80)]
    loss_fn = NanGradients(range(10_000) if os.environ["RANK"] == "1" else ())
    run = fit(model, loss_fn, torch.optim.SGD, data, plugins=["ddp", "amp:dtype=float16"])
    return run.step, run.attempts, run.stop


@pytest.mark.fault(row="G", given="amp in float16 in two processes, one with gradients that are NaN",
                   right="both processes end at the same step")
def test_all_processes_end_at_the_same_step(ranks):
    first, second = ranks(2, train_where_one_process_has_nan)
    assert first == second
    assert first[:2] == (0, 31)


# J1: averages of half-precision weights


class Classifier(nn.Module):
    """A small classifier in one dtype; its input is converted."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)

    def forward(self, input):
        return self.layers(input.to(self.layers[0].weight.dtype)).float()


sgd_slow = partial(torch.optim.SGD, lr=0.01)


def averaged_by_hand(model, batches, epochs, weight_of, every=1, first=0):
    """Train in a plain loop; return a float32 copy of the parameters that moves by `weight_of(n)` after the n-th update."""
    optimizer, average, count, steps = sgd_slow(model.parameters()), {}, 0, 0
    for input, target in batches * epochs:
        optimizer.zero_grad()
        cross_entropy(model(input), target).backward()
        optimizer.step()
        steps += 1
        if steps % every or steps <= first:
            continue
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            value = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
            average[name] = average[name].lerp(value, weight_of(count)) if count else value
        count += 1
    return average


def check_end(model, average):
    for name, value in average.items():
        assert torch.equal(model.get_parameter(name), value.to(model.get_parameter(name).dtype)), name


@pytest.mark.fault(row="J1", given="ema of a model in bfloat16 or float16 with decay 0.9999",
                   right="a float32 copy of the weights that moves by a ten-thousandth, to the bit")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_an_average_of_half_precision_weights_moves(batches, dtype):
    model, other, ema = Classifier(dtype), Classifier(dtype), Ema(0.9999, warmup=False)
    fit(model, cross_entropy, sgd_slow, batches, epochs=3, plugins=[ema])
    average = averaged_by_hand(other, batches, 3, lambda count: 1 - 0.9999)
    for name, value in average.items():
        assert ema.average[name].dtype == value.dtype == (dtype if dtype == torch.float64 else torch.float32)
        assert torch.equal(ema.average[name], value), name
    check_end(model, average)
    assert not torch.equal(average["layers.3.weight"], average["layers.3.weight"].to(torch.bfloat16))


@pytest.mark.fault(row="J", given="swa of a model in bfloat16 or float16 over 12 epochs",
                   right="the mean in float32 of the weights at the end of each epoch from start on, to the bit")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_mean_of_half_precision_weights_is_one_of_float32(plain, batches, dtype, clone):
    model = nn.Sequential(plain.to(dtype), nn.Identity())
    data = [(input.to(dtype), target) for input, target in batches]
    other, swa = clone(model), Swa(start=1)
    fit(model, cross_entropy, sgd_slow, data, epochs=12, plugins=[swa])
    average = averaged_by_hand(other, data, 12, lambda count: 1 / (count + 1), every=len(data), first=len(data))
    assert all(torch.equal(swa.average[name], value) for name, value in average.items())
    check_end(model, average)


@pytest.mark.fault(row="J", given="ema of statistics of a BatchNorm in bfloat16", right="averaged in float32, as the weights are")
def test_statistics_in_half_precision_are_averaged_in_float32(batches):
    model, seen = Classifier(torch.bfloat16), []

    class Recorder:
        @hookimpl
        def after_step(self, run: Run):
            seen.append(run.model.layers[1].running_var.float())

    fit(model, cross_entropy, sgd_slow, batches, epochs=2, plugins=[Ema(0.999, warmup=False), Recorder()])
    mean = seen[0]
    for value in seen[1:]:
        mean = mean.lerp(value, 1 - 0.999)
    assert torch.equal(model.layers[1].running_var, mean.bfloat16())


class Odd(nn.Module):
    """Parameters and buffers of many dtypes: complex, integer, eight bits, and two precisions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.coarse, self.fine = nn.Linear(6, 8).bfloat16(), nn.Linear(8, 3).double()
        self.phase = nn.Parameter(torch.randn(8, dtype=torch.complex64))
        self.table = nn.Parameter(torch.arange(8), requires_grad=False)
        self.eighth = nn.Parameter(torch.ones(8).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("signal", torch.ones(3, dtype=torch.complex64))
        self.register_buffer("mask", torch.tensor([True, False]))

    def forward(self, input):
        self.calls += 1
        hidden = self.coarse(input.bfloat16()).float() * self.phase.abs() * self.eighth.float() + self.table
        return self.fine(hidden.double()).float()


@pytest.mark.fault(row="J", given="ema and swa of a model with complex, integer, eight-bit, bfloat16 and float64 parameters",
                   right="real and complex ones are averaged, complex ones too; integers and other buffers stay the model's")
@pytest.mark.parametrize("swa", [False, True])
def test_parameters_of_many_dtypes_are_averaged(batches, valid, clone, swa):
    model, other = Odd(), Odd()
    fit(model, cross_entropy, sgd_slow, batches, valid, epochs=3, plugins=[Swa(start=1) if swa else Ema(0.9, warmup=False)])
    weight_of, every, first = (lambda count: 1 / (count + 1), 8, 8) if swa else (lambda count: 1 - 0.9, 1, 0)
    average = averaged_by_hand(other, batches, 3, weight_of, every, first)
    check_end(model, average)
    assert not torch.equal(model.phase, other.phase)
    assert model.table.tolist() == [*range(8)]
    assert model.calls == 3 * (len(batches) + len(valid))
    assert model.signal.tolist() == [1] * 3


@pytest.mark.fault(row="J", given="a run in bfloat16 with ema or swa, killed and resumed",
                   right="equal to the uninterrupted run; the checkpoint holds the average in float32")
@pytest.mark.parametrize("plugin", ["ema:decay=0.9999", "swa:start=1"])
def test_a_resumed_average_of_half_precision_weights_is_the_same(batches, same, tmp_path, plugin):
    class Kill:
        @hookimpl
        def safe_point(self, run: Run):
            if run.epoch == 2 and not run.resume:
                raise KeyboardInterrupt

    whole, killed, resumed = (Classifier(torch.bfloat16) for _ in range(3))
    fit(whole, cross_entropy, sgd_slow, batches, epochs=4, plugins=[plugin])
    with pytest.raises(KeyboardInterrupt):
        fit(killed, cross_entropy, sgd_slow, batches, epochs=4, plugins=[plugin, "checkpoint", Kill()], out=tmp_path)
    saved = read_checkpoint(max((tmp_path / "checkpoints").glob("step-*.pt")))["plugins"][plugin.partition(":")[0]]
    assert saved["average"]["layers.0.weight"].dtype == torch.float32
    fit(resumed, cross_entropy, sgd_slow, batches, epochs=4, plugins=[plugin, "checkpoint"], out=tmp_path, resume=tmp_path)
    same(whole, resumed)


@pytest.mark.fault(row="J", given="an average in bfloat16 and a count of batches in int64, from a checkpoint of an older version",
                   right="loaded and averaged further in float32; the count stays an integer")
@pytest.mark.parametrize("plugin", [Ema(0.9999), Swa()])
def test_an_average_held_in_half_precision_is_loaded(plugin):
    old = {"weight": torch.ones(3, dtype=torch.bfloat16), "num_batches_tracked": torch.tensor(7)}
    plugin.load_state_dict({"average": old, "count": 5, "due": False})
    assert plugin.average["weight"].dtype == torch.float32
    assert plugin.average["num_batches_tracked"].dtype == torch.int64


@pytest.mark.fault(row="J", given="evaluation with the average of a model in bfloat16, every two steps",
                   right="training goes on with the raw weights, to the bit")
@pytest.mark.parametrize("plugin", ["ema:decay=0.99", "swa:start=1"])
def test_raw_half_precision_weights_come_back(batches, valid, plugin):
    losses = []
    for plugins in ([plugin], []):
        run = fit(Classifier(torch.bfloat16), cross_entropy, sgd_slow, batches, valid, epochs=3, eval_every=2, plugins=plugins)
        losses.append([row["train_loss"] for row in run.history])
    assert losses[0] == losses[1]


# J2: learning-rate tests of runs whose functions hold the model


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def range_test_by_hand(model, loss_fn, batches, start=1e-4, end=1.0, num_steps=20, beta=0.9):
    """The smoothed losses of a range test in a plain loop."""
    torch.manual_seed(1)
    optimizer, losses, mean = torch.optim.SGD(model.parameters(), lr=1.0), [], 0.0
    for number in range(num_steps):
        optimizer.param_groups[0]["lr"] = start * ((end / start) ** (1 / (num_steps - 1))) ** number
        optimizer.zero_grad()
        input, target = batches[number % len(batches)]
        loss = loss_fn(model(input), target)
        loss.backward()
        optimizer.step()
        mean = beta * mean + (1 - beta) * loss.item()
        losses.append(mean / (1 - beta ** (number + 1)))
    return losses


def state(model):
    """The weights and buffers of a model, copied, and the gradients, which are the same tensors afterwards."""
    return [(name, value.clone()) for name, value in model.state_dict().items()] + [
        (name, parameter.grad) for name, parameter in model.named_parameters()]


def equal_states(one, other):
    return all(a is b or torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def check_trial(make, model, batches):
    """Check a learning-rate test with the loss function `make(model)` against a plain loop, and that it changes nothing."""
    by_hand, without = copy.deepcopy(model), copy.deepcopy(model)
    finder = LrFinder(1e-4, 1.0, num_steps=20, beta=0.9, diverge=1e9)
    run = fit(model, make(model), partial(torch.optim.SGD, lr=0.1), batches, seed=1, plugins=[finder])
    other = fit(without, make(without), partial(torch.optim.SGD, lr=0.1), batches, seed=1)
    assert finder.losses == range_test_by_hand(by_hand, make(by_hand), batches)
    assert equal_states(state(model), state(without))
    assert run.history == other.history


def twice(model):
    """A loss that runs the model a second time, as a consistency loss does."""
    return lambda output, target: cross_entropy(output, target) + model(torch.ones(4, 6)).square().mean()


@pytest.mark.fault(row="J2", given="lr_finder with a loss function whose closure holds the model",
                   right="the losses of a plain range test to the bit; nothing of the run changes")
def test_a_closure_that_holds_the_model_uses_the_copy(net, batches, in_tmp):
    check_trial(twice, net, batches)


def penalty_of_a_parameter(model):
    weight = model[0].weight
    return lambda output, target: cross_entropy(output, target) + weight.square().sum()


def nested_functions(model):
    def norm(depth):
        return model[4](torch.ones(2, 16)).square().mean() if depth == 0 else norm(depth - 1)

    def loss(output, target, *, scale=0.5):
        return cross_entropy(output, target) + scale * norm(3)
    return loss


class Consistency:
    def __init__(self, model):
        self.model = [model]

    def loss(self, output, target):
        return twice(self.model[0])(output, target)

    __call__ = loss


def loss_of(model, output, target):
    return twice(model)(output, target)


MODEL = None


def loss_of_a_global_name(output, target):
    return cross_entropy(output, target) + MODEL(torch.ones(4, 6)).square().mean()


def set_global(model):
    globals()["MODEL"] = model
    return loss_of_a_global_name


def features_of_a_hook(model):
    """A loss on features that a hook of the model stores, and that the loss reads from its closure."""
    features = {}
    model[2].register_forward_hook(lambda module, arguments, output: features.update(hidden=output))
    return lambda output, target: cross_entropy(output, target) + features["hidden"].square().mean()


class Extractor:
    def __init__(self, model):
        model[2].register_forward_hook(self.store)

    def store(self, module, arguments, output):
        self.hidden = output


def features_of_an_object(model):
    extractor = Extractor(model)
    return lambda output, target: cross_entropy(output, target) + extractor.hidden.square().mean()


def model_that_holds_itself(model):
    model.family = [model]
    return lambda output, target: twice(model.family[0])(output, target)


def compiled(model):
    return torch.compile(lambda output, target: cross_entropy(output, target) + model[0].weight.square().sum(), backend="eager")


def default_arguments(model):
    def loss(output, target, first=model[0], *, model=model):
        return cross_entropy(output, target) + first.weight.square().sum() + model(torch.ones(4, 6)).square().mean()
    return loss


MAKERS = [penalty_of_a_parameter, nested_functions, lambda model: Consistency(model).loss, Consistency, lambda model: partial(loss_of, model),
          set_global, features_of_a_hook, features_of_an_object, model_that_holds_itself, compiled, default_arguments]
NAMES = ["a parameter in a closure", "nested functions", "a bound method", "a callable object", "a partial", "a global name", "a hook and a closure",
         "a hook that is a method", "a model that holds itself", "a compiled closure", "default arguments"]


@pytest.mark.fault(row="J", given="lr_finder with the model behind nested or recursive functions, a bound method, a partial, default arguments, a global name, a hook, or torch.compile",
                   right="the losses of a plain range test to the bit; nothing of the run changes")
@pytest.mark.parametrize("make", MAKERS, ids=NAMES)
@pytest.mark.filterwarnings("ignore:The .grad attribute")            # torch.compile looks at it
def test_every_way_to_hold_the_model_leads_to_the_copy(net, batches, in_tmp, make):
    check_trial(make, net, batches)


@pytest.mark.fault(row="J", given="lr_finder with a closure that holds another module, with BatchNorm in train mode",
                   right="the statistics of that module are what they are without the test")
def test_another_module_in_the_closure_is_copied_too(net, batches, in_tmp):
    def teach(teacher):
        return lambda output, target: cross_entropy(teacher(output), target)

    teachers = [nn.BatchNorm1d(3), nn.BatchNorm1d(3)]
    for teacher, plugins in zip(teachers, ([], ["lr_finder:num_steps=9"]), strict=True):
        fit(copy.deepcopy(net), teach(teacher), torch.optim.SGD, batches, seed=1, plugins=plugins)
    assert equal_states(state(teachers[0]), state(teachers[1]))


def hook_that_calls(model):
    model.register_forward_hook(lambda module, arguments, output: output + model[0](arguments[0]).mean())


def hook_that_counts(model):
    def count(*_):
        model[1].running_mean.add_(1)
    model[1].register_forward_hook(count)


def hook_that_replaces_a_buffer(model):
    model[1].register_forward_hook(lambda *_: setattr(model[1], "running_var", model[1].running_var * 2))


def hook_that_clips(model):
    def clip(*_):
        model[0].weight.data.clamp_(-0.01, 0.01)
    model[4].register_forward_hook(clip)


def hook_that_freezes(model):
    model[2].register_forward_hook(lambda *_: model[1].eval() and None)


def hook_with_a_penalty(model):
    model.register_forward_hook(lambda module, arguments, output: output + model[0].weight.sum() * torch.tensor([1.0, 0.0, 0.0]))


CALL = r"steps cannot be tried on a copy of the run, because a function calls the Linear of the run and not of the copy; take it"


@pytest.mark.fault(row="J", given="lr_finder with a hook of the model that calls, changes, freezes or differentiates the original by its closure",
                   right="refused in one line before training; everything is put back to the bit")
@pytest.mark.parametrize(("register", "message"), [
    (hook_that_calls, CALL),
    (hook_that_counts, r"steps on a copy of the run change the run's own 1\.running_mean, so a function uses its model and not the copy; take it"),
    (hook_that_replaces_a_buffer, r"change the run's own 1\.running_var, so"),
    (hook_that_clips, r"change the run's own 0\.weight, so"),
    (hook_that_freezes, r"change the run's own mode of 1, so"),
    (hook_with_a_penalty, r"change the run's own gradient of 0\.weight, so"),
])
def test_a_hook_that_uses_the_original_is_refused(net, batches, in_tmp, register, message):
    register(net)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
        parameter.grad.view(-1)[0] = math.nan
    before, hooks = state(net), [len(part._forward_pre_hooks) for part in net.modules()]
    with pytest.raises(UsageError, match=f"^lr_finder: .*{message}"):
        fit(net, cross_entropy, torch.optim.SGD, batches, plugins=["lr_finder:num_steps=5"])
    assert equal_states(before, state(net))
    for parameter in net.parameters():
        assert parameter.grad.view(-1)[0].isnan()
        assert (parameter.grad.view(-1)[1:] == 0.5).all()
    assert [len(part._forward_pre_hooks) for part in net.modules()] == hooks
    assert all(part.training for part in net.modules())


@pytest.mark.fault(row="J", given="lr_finder with a plugin whose compute_loss calls the model by its closure",
                   right="refused in one line before training")
def test_a_plugin_that_calls_the_original_is_refused(net, batches, in_tmp):
    class Mine:
        @hookimpl
        def compute_loss(self, run: Run, batch):
            return cross_entropy(net(batch[0]), batch[1])

    before = state(net)
    with pytest.raises(UsageError, match="^lr_finder: steps cannot be tried on a copy of the run, because a function calls the Sequential"):
        fit(net, None, torch.optim.SGD, batches, plugins=["lr_finder:num_steps=5", Mine()])
    assert equal_states(before, state(net))


@pytest.mark.fault(row="J", given="lr_finder with an optimizer that holds the head only, whose other parameters get gradients",
                   right="nothing of the run changes; the gradients of the copy are cleared")
def test_untrained_parameters_of_the_run_stay_without_gradients(net, batches, in_tmp):
    other = copy.deepcopy(net)
    for model, plugins in ((net, ["lr_finder:num_steps=9"]), (other, [])):
        fit(model, cross_entropy, torch.optim.SGD(model[4].parameters(), lr=0.1), batches, seed=1, plugins=plugins)
    assert equal_states(state(net), state(other))


# J3: batches of unusual types

x = torch.arange(8.0).view(4, 2)
meta = torch.device("meta")             # a device that exists on every machine


class Tagged(dict):
    """A dict whose constructor takes something else, and that has an attribute."""

    def __init__(self, tag):
        super().__init__()
        self.tag = tag


class Attributes(dict):
    """A dict whose items are its attributes."""

    def __init__(self, *arguments, **items):
        super().__init__(*arguments, **items)
        self.__dict__ = self


class View(MutableMapping):
    """A mapping over a dict that its copies share, so that assigning to a copy would change the original."""

    def __init__(self, items, name="view"):
        self.items_of, self.name = items, name

    def __getitem__(self, key):
        return self.items_of[key]

    def __setitem__(self, key, value):
        self.items_of[key] = value

    def __delitem__(self, key):
        del self.items_of[key]

    def __iter__(self):
        return iter(self.items_of)

    def __len__(self):
        return len(self.items_of)


class ReadOnly(Mapping):
    """A mapping that cannot be built from its items."""

    def __init__(self):
        self.one = x

    def __getitem__(self, key):
        return {"x": self.one}[key]

    def __iter__(self):
        return iter(["x"])

    def __len__(self):
        return 1


class Locked(dict):
    def __setitem__(self, key, value):
        raise TypeError("locked")


class Encoding(UserDict):
    """A mapping that moves itself in place, as those of tokenizers do."""

    def __init__(self, data, lengths):
        super().__init__(data)
        self.lengths = lengths

    def to(self, device):
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class MovesInPlace:
    def __init__(self):
        self.x = x

    def to(self, device):
        self.x = self.x.to(device)


def tagged():
    batch = Tagged("train")
    batch["x"] = x
    return batch


def default():
    batch = defaultdict(list)
    batch["x"] = x
    return batch


def encoding():
    return Encoding({"x": x}, lengths=[4])


def locked():
    batch = Locked()
    dict.__setitem__(batch, "x", x)
    return batch


def check_mapped(batch, kind=None):
    """Double the tensor `x` of a batch and return the result; the batch itself must not change."""
    result = map_nested(lambda leaf: leaf * 2 if isinstance(leaf, torch.Tensor) else leaf, batch)
    assert type(result) is (kind or type(batch))
    assert next(iter_tensors(batch)) is x
    assert torch.equal(next(iter_tensors(result)), x * 2)
    assert sample_count(result) == 4
    return result


@pytest.mark.fault(row="J3", given="a batch that is a defaultdict", right="a defaultdict of the same factory, with the tensors moved or split")
def test_a_defaultdict_is_mapped(batches):
    result = check_mapped(default())
    assert result["missing"] == []
    assert to_device(default(), meta)["x"].device == meta


@pytest.mark.fault(row="J", given="a batch that is an OrderedDict, a Counter, a UserDict, or a dict with its own constructor, attributes, or a lock",
                   right="the same type with its other attributes; the batch itself is not changed")
@pytest.mark.parametrize("make", [lambda: OrderedDict(x=x), lambda: Counter({"x": x}), lambda: UserDict({"x": x}), tagged, encoding, locked, lambda: Attributes(x=x)])
def test_a_mapping_keeps_its_type_and_attributes(make):
    batch = make()
    result = check_mapped(batch)
    assert getattr(result, "tag", "train") == "train"
    assert getattr(result, "lengths", [4]) == [4]
    if isinstance(batch, Attributes):
        assert torch.equal(result.x, x * 2)
        assert batch.x is x


@pytest.mark.fault(row="J", given="a batch that is a read-only mapping, or one whose copy shares its items",
                   right="built anew from the items where that can be, else a dict; the batch itself is not changed")
def test_a_mapping_that_cannot_be_copied_is_built_anew():
    check_mapped(MappingProxyType({"x": x}))
    check_mapped(View({"x": x}))
    check_mapped(ReadOnly(), dict)


@pytest.mark.fault(row="J", given="a batch with a `to` method that moves it in place, and returns itself or nothing",
                   right="a moved copy; the batch itself stays where it is")
def test_a_batch_that_moves_itself_stays_in_its_list():
    batch, other = encoding(), MovesInPlace()
    moved, moved_other = to_device([batch, other], meta)
    assert (moved["x"].device, moved.lengths, batch["x"]) == (meta, [4], batch["x"])
    assert batch["x"] is x
    assert moved_other.x.device == meta
    assert other.x is x


class Named(namedtuple("Named", "x y")):
    def __new__(cls, pair):
        return super().__new__(cls, *pair)


class Two(tuple):
    def __new__(cls, one, other):
        return super().__new__(cls, (one, other))


class Rows(list):
    def __init__(self, name, *rows):
        super().__init__(rows)
        self.name = name


@pytest.mark.fault(row="J", given="a batch that is a list, tuple or namedtuple with its own constructor or attributes, or a result of torch.max",
                   right="the same type with its attributes")
def test_a_sequence_with_its_own_constructor_is_mapped():
    two, rows = Two(x, "text"), Rows("rows", x, 3)
    two.name = "two"
    assert check_mapped(two).name == "two"
    assert check_mapped(rows).name == "rows"
    assert check_mapped(Named((x, 1))).y == 1
    largest = map_nested(lambda leaf: leaf * 2, torch.max(x, 1))
    assert type(largest) is torch.return_types.max
    assert largest.values.tolist() == [2, 6, 10, 14]


@dataclass(frozen=True, slots=True)
class Frozen:
    x: torch.Tensor
    y: int = 3


@dataclass
class Derived:
    """Its constructor changes the values, takes one that it does not keep, and adds a field and an attribute."""

    x: torch.Tensor
    scale: InitVar[float]
    mask: torch.Tensor = field(init=False)

    def __post_init__(self, scale):
        self.x = self.x if scale == 1 else self.x * scale
        self.mask = self.x > 1
        self.target = self.x + 1


class WithFields:
    """What a class of attrs looks like: it lists its fields."""

    __attrs_attrs__ = (SimpleNamespace(name="x"), SimpleNamespace(name="y"))
    __slots__ = ("x", "y")

    def __init__(self, pair):
        self.x, self.y = pair


@pytest.mark.fault(row="J", given="a batch that is a frozen dataclass with slots, one with fields that the constructor sets, or an attrs class",
                   right="a copy with all its tensors mapped; the constructor does not run again")
def test_an_instance_with_fields_is_mapped():
    assert check_mapped(Frozen(x)).y == 3
    derived = Derived(x, 1)
    result = check_mapped(derived)
    assert torch.equal(result.target, derived.target * 2)
    assert {tensor.device for tensor in iter_tensors(to_device(derived, meta))} == {meta}
    assert len(list(iter_tensors(derived))) == 3
    assert check_mapped(WithFields((x, 5))).y == 5


@pytest.mark.fault(row="J", given="training on defaultdict batches with `split`", right="equal to training on dict batches")
def test_defaultdict_batches_are_split(plain, batches, same, clone):
    class Dicts:
        @hookimpl
        def compute_loss(self, run: Run, batch):
            run.outputs = run.network(batch["x"])
            return cross_entropy(run.outputs, batch["y"])

    models = []
    for factory in (dict, partial(defaultdict, list)):
        models.append(clone(plain))
        data = [factory({"x": input, "y": target}) for input, target in batches]
        fit(models[-1], None, torch.optim.SGD, data, plugins=["split:into=2", Dicts()])
    same(*models)
