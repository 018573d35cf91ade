"""Optimizers as other packages write them: what they keep, what they ask for, and that runs with them resume exactly."""
from collections import deque
from enum import IntEnum
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import UsageError, fit, hookimpl
from loopctl.cli import optimizers
from loopctl.optim.several import by_kind
from loopctl.testing.comparison import first_difference, run_result
from loopctl.testing.tiny import tiny_batches

TRAIN, VALID = tiny_batches(8, 8, 8, 8, 5), tiny_batches(8, 5, seed=1)
cross_entropy = nn.CrossEntropyLoss()


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


class Kill:
    observer_only = True

    @hookimpl
    def before_step(self, run):
        if run.attempts == 7:
            raise KeyboardInterrupt


def assert_resumes(optimizer, tmp_path):
    """Check that a run which is killed within an epoch ends as one that was not. Return that one."""
    arguments = {"loss_fn": cross_entropy, "optimizer": optimizer, "train": TRAIN, "valid": VALID, "epochs": 2, "seed": 0}
    plugins = ["checkpoint:every_steps=1"]
    whole = fit(new_model(), **arguments, plugins=plugins, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(new_model(), **arguments, plugins=[*plugins, Kill()], out=tmp_path / "cut")
    resumed = fit(new_model(), **arguments, plugins=plugins, out=tmp_path / "cut", resume=tmp_path / "cut")
    assert first_difference(run_result(whole, ()), run_result(resumed, ())) == ""
    assert whole.step == 10
    return whole


class Norm(IntEnum):
    ONE, MAX = 1, 2


def halve(gradient):
    return gradient / 2


class Odd(torch.optim.Optimizer):
    """Keeps functions, an enumeration and other values in its groups, and the last gradients in a deque."""

    def __init__(self, params, lr=0.1, norm=Norm.ONE, change=halve):
        super().__init__(params, {"lr": lr, "norm": norm, "change": change, "kind": Odd, "seen": 0, "more": {"a": (1, None)}})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["seen"] += 1
            for parameter in group["params"]:
                last = self.state[parameter].setdefault("last", deque(maxlen=3))
                last.append(group["change"](parameter.grad) / group["norm"])
                parameter.sub_(sum(last), alpha=group["lr"])


class OfModel(torch.optim.SGD):
    """Makes its parameter groups itself, of the model."""

    def __init__(self, model, lr=0.1):
        super().__init__([{"params": [parameter], "lr": lr / (index + 1)} for index, parameter in enumerate(model.parameters())],
                         lr=lr, momentum=0.9)


class Wrapper(torch.optim.Optimizer):
    """Wraps an optimizer, whose state dict is in an entry of its own."""

    def __init__(self, params, lr=0.1):
        self.inner = torch.optim.SGD(params, lr=lr, momentum=0.9)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups

    def step(self, closure=None):
        return self.inner.step(closure)

    def state_dict(self):
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state_dict):
        self.inner.load_state_dict(state_dict["inner"])
        self.param_groups = self.inner.param_groups


@pytest.mark.parametrize("optimizer", [
    Odd, OfModel, partial(OfModel, lr=0.05), Wrapper, by_kind(a=Odd, b=Wrapper),
], ids=["odd values", "of the model", "of the model, partial", "wrapper", "two"])
def test_a_run_with_an_unusual_optimizer_is_resumed_exactly(optimizer, tmp_path):
    assert_resumes(optimizer, tmp_path)


def test_an_optimizer_of_the_model_equals_the_loop_by_hand():
    expected = new_model()
    optimizer = OfModel(expected)
    for x, y in TRAIN:
        optimizer.zero_grad()
        cross_entropy(expected(x), y).backward()
        optimizer.step()
    run = fit(new_model(), cross_entropy, OfModel, TRAIN)
    assert first_difference(dict(expected.state_dict()), dict(run.model.state_dict())) == ""
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.1 / (index + 1) for index in range(6)]


def test_an_option_that_is_code_must_be_the_same_on_resume(tmp_path):
    arguments = {"loss_fn": cross_entropy, "train": TRAIN, "plugins": ["checkpoint"], "out": tmp_path}
    fit(new_model(), optimizer=Odd, **arguments)
    for changed, words in [(partial(Odd, norm=Norm.MAX), "the optimizer's norm is 1 in the checkpoint and 2 in this run"),
                           (partial(Odd, change=abs), "the optimizer's change is halve in the checkpoint and abs in this run")]:
        with pytest.raises(UsageError, match=words):
            fit(new_model(), optimizer=changed, **arguments, epochs=2, resume=tmp_path)


class NoRate(torch.optim.SGD):
    def __init__(self, params):
        super().__init__(params)
        for group in self.param_groups:
            del group["lr"]


@pytest.mark.parametrize(("optimizer", "plugins", "words"), [
    (NoRate, [], "the optimizer NoRate has a parameter group without a learning rate; pass lr="),
    (OfModel, ["layerwise_lr:decay=0.5"], "layerwise_lr sets the parameter groups, but the optimizer makes its own of the model"),
    ({"0": torch.optim.SGD, "*": OfModel}, [], r"the optimizer '\*' takes the whole model, so it cannot be one of several"),
    (by_kind(a=OfModel, b=torch.optim.SGD), [], "the optimizer 'a' takes the whole model"),
])
def test_optimizers_that_cannot_be_used_are_refused(optimizer, plugins, words):
    with pytest.raises(UsageError, match=words):
        fit(new_model(), cross_entropy, optimizer, TRAIN, plugins=plugins)


FILE = """
import torch

class OfModel(torch.optim.SGD):
    def __init__(self, model, lr=0.5):
        super().__init__(model.parameters(), lr=lr)

class Asks(torch.optim.SGD):
    def __init__(self, params):
        super().__init__(params)
        if "use_muon" not in self.param_groups[0]:
            raise ValueError("use_muon must be set")

class Lacks(torch.optim.SGD):
    def __init__(self, params):
        import a_package_that_is_not_installed
"""


def test_an_optimizer_of_the_model_by_path(tmp_path):
    (tmp_path / "own.py").write_text(FILE)
    factory, lr = optimizers.make(f"{tmp_path / 'own.py'}:OfModel", None)
    assert lr == 0.5
    run = fit(new_model(), cross_entropy, factory, TRAIN)
    assert len(run.optimizer.param_groups[0]["params"]) == 6


@pytest.mark.parametrize(("name", "words"), [
    ("Asks", "optimizer .*Asks: use_muon must be set"),
    ("Lacks", "optimizer .*Lacks: ModuleNotFoundError: No module named 'a_package_that_is_not_installed'"),
])
def test_an_optimizer_by_path_that_cannot_be_made_is_refused_immediately(name, words, tmp_path):
    (tmp_path / "own.py").write_text(FILE)
    with pytest.raises(UsageError, match=words):
        optimizers.make(f"{tmp_path / 'own.py'}:{name}", None)


@pytest.mark.parametrize("spec", [
    "timm.optim:Lion", "timm.optim:Lamb", "timm.optim:Adan", "timm.optim:MADGRAD", "timm.optim:Muon", "timm.optim:Adafactor:lr=0.01",
    "schedulefree:AdamWScheduleFree", "schedulefree:SGDScheduleFreeClosure",
    "pytorch_optimizer:SOAP", "pytorch_optimizer:Prodigy", "pytorch_optimizer:Ranger21:num_iterations=10", "pytorch_optimizer:SCION",
    "pytorch_optimizer:AdamMini:lr=0.01", "pytorch_optimizer:BSAM:num_data=37", "pytorch_optimizer:ScheduleFreeAdamW",
    "pytorch_optimizer:Lion,pytorch_optimizer:SPlus",
])
@pytest.mark.filterwarnings("ignore")           # of those packages
def test_an_optimizer_of_a_package_is_resumed_exactly(spec, tmp_path):
    pytest.importorskip(spec.partition(":")[0].partition(".")[0])
    assert_resumes(optimizers.make(spec, None)[0], tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_that_needs_the_graph_of_the_gradients_trains_with_a_plugin():
    timm = pytest.importorskip("timm.optim")

    class KeepGraph:
        @hookimpl
        def backward(self, run, loss):
            loss.backward(create_graph=True)
            return loss

    expected = new_model()
    optimizer = timm.Adahessian(expected.parameters())
    for x, y in TRAIN:
        optimizer.zero_grad()
        cross_entropy(expected(x), y).backward(create_graph=True)
        optimizer.step()
    run = fit(new_model(), cross_entropy, timm.Adahessian, TRAIN, plugins=[KeepGraph()])
    assert first_difference(dict(expected.state_dict()), dict(run.model.state_dict())) == ""
