"""Any optimizer with torch's contract, the parameters that it holds, and its learning rates."""
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from tests.conftest import ScheduleFree

cross_entropy = nn.CrossEntropyLoss()


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def by_hand(model, optimizer, batches, step=lambda optimizer: optimizer.step()):
    for input, target in batches:
        optimizer.zero_grad()
        cross_entropy(model(input), target).backward()
        step(optimizer)
    return model


class Own(torch.optim.Optimizer):
    """Plain gradient descent, as somebody else writes it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def descend(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad


class IgnoresClosure(Own):
    def step(self, closure=None):
        self.descend()


class TakesNone(Own):
    def step(self):
        self.descend()


class CallsOnce(Own):
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.descend()
        return loss


class ClearsFirst(Own):
    """Clears the gradients itself before it calls the closure."""

    def step(self, closure):
        self.zero_grad()
        loss = closure()
        self.descend()
        return loss


class TwoPoints(Own):
    """Moves first, and asks for the gradients at the new point, as sharpness-aware optimizers do."""

    @torch.no_grad()
    def step(self, closure):
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        before = [parameter.clone() for parameter in parameters]
        for parameter in parameters:
            parameter += 0.1
        with torch.enable_grad():
            loss = closure()
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
        self.descend()
        return loss


@pytest.mark.parametrize("kind", [IgnoresClosure, TakesNone, CallsOnce, ClearsFirst])
@pytest.mark.parametrize("plugins", [[], ["clip:max_norm=0.1"]], ids=["alone", "clip"])
@pytest.mark.fault(row="G1", given="optimizers whose step ignores the closure, takes none, or clears the gradients first", right="the loop by hand")
def test_an_optimizer_need_not_call_the_closure(plain, clone, batches, kind, plugins):
    def step(optimizer):
        if plugins:
            nn.utils.clip_grad_norm_(expected.parameters(), 0.1)
        optimizer.descend()

    expected, model = clone(plain), clone(plain)
    by_hand(expected, kind(expected.parameters()), batches, step)
    run = fit(model, cross_entropy, kind, batches, plugins=plugins)
    assert equal(model, expected)
    assert run.history[-1]["train_loss"] == run.history[-1]["train_loss"]


@pytest.mark.fault(row="G", given="an optimizer that moves before it calls the closure", right="the gradients at the point where it asks for them")
def test_an_optimizer_gets_the_gradients_at_the_point_where_it_asks(plain, clone, batches):
    def step(optimizer):
        optimizer.step(closure)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(expected(current[0]), current[1])
        loss.backward()
        return loss

    expected, model = clone(plain), clone(plain)
    optimizer = TwoPoints(expected.parameters())
    for current in batches:     # noqa: B007   # the closure reads it
        optimizer.step(closure)
    fit(model, cross_entropy, TwoPoints, batches)
    assert equal(model, expected)


@pytest.mark.fault(row="G2", given="an optimizer over the head only, with clip, four times the same batch at rate 0", right="four times the same norm, that of the head")
def test_the_clipped_norm_is_that_of_the_trained_parameters(plain, batches):
    norms = []

    class Norms:
        @hookimpl
        def after_step(self, run: Run):
            norms.append(run.metrics["grad_norm"].item())

    head = plain[2]
    cross_entropy(plain(batches[0][0]), batches[0][1]).backward()
    expected = nn.utils.get_total_norm([parameter.grad for parameter in head.parameters()]).item()
    fit(plain, cross_entropy, torch.optim.SGD(head.parameters(), lr=0.0), [batches[0]] * 4, plugins=["clip", Norms()])
    assert norms == [expected] * 4
    assert plain[0].weight.grad is None or nn.utils.get_total_norm([plain[0].weight.grad]) < 10 * expected      # of one step


@pytest.mark.parametrize("plugins", [[], ["cosine:by=step"]], ids=["constant", "cosine"])
@pytest.mark.fault(row="G3", given="fit, group[\"lr\"] = 0.01, fit again with the same optimizer", right="the second run starts at 0.01")
def test_a_rate_that_is_set_between_two_runs_counts(plain, batches, plugins):
    rates = []

    class Rates:
        @hookimpl
        def before_step(self, run: Run):
            rates.append(run.optimizer.param_groups[0]["lr"])

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for start in (0.1, 0.1, 0.01):
        rates.clear()
        if start != 0.1:
            optimizer.param_groups[0]["lr"] = start
        fit(plain, cross_entropy, optimizer, batches, plugins=[*plugins, Rates()])
        assert rates[0] == start        # a second run starts where the first did, unless the rate was set


@pytest.mark.fault(row="G5", given="an optimizer with train() and eval()", right="called beside those of the model, and eval() at the end")
def test_an_optimizer_with_modes_is_switched_with_the_model(plain, clone, batches, valid):
    expected, model = clone(plain), clone(plain)
    optimizer, losses = ScheduleFree(expected.parameters()), []
    for _ in range(2):
        optimizer.train()
        by_hand(expected, optimizer, batches)
        optimizer.eval()
        with torch.no_grad():
            losses.append(sum(nn.functional.cross_entropy(expected(input), target, reduction="sum").item() for input, target in valid) / 13)
    run = fit(model, cross_entropy, ScheduleFree, batches, valid, epochs=2)
    assert equal(model, expected)
    assert [row["val_loss"] for row in run.history] == pytest.approx(losses, rel=1e-6)


@pytest.mark.fault(row="G", given="an optimizer with train() and eval(), killed and resumed; its best weights", right="the weights of the whole run; best.safetensors are those that were evaluated")
def test_an_optimizer_with_modes_is_resumed(plain, clone, batches, valid, tmp_path):
    class Kill:
        @hookimpl
        def before_step(self, run: Run):
            if run.step == 11:
                raise KeyboardInterrupt

    from loopctl import load_weights

    whole, model = clone(plain), clone(plain)
    expected = fit(whole, cross_entropy, ScheduleFree, batches, valid, epochs=3)
    arguments = {"plugins": ["checkpoint:every_steps=1"], "epochs": 3, "out": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fit(clone(plain), cross_entropy, ScheduleFree, batches, valid, **arguments | {"plugins": ["checkpoint:every_steps=1", Kill()]})
    run = fit(model, cross_entropy, ScheduleFree, batches, valid, **arguments, resume=tmp_path)
    assert equal(model, whole)
    assert run.history == expected.history
    best = clone(plain)
    load_weights(best, tmp_path / "checkpoints" / "best.safetensors")
    with torch.no_grad():
        loss = sum(nn.functional.cross_entropy(best(input), target, reduction="sum").item() for input, target in valid) / 13
    assert loss == pytest.approx(min(row["val_loss"] for row in run.history), rel=1e-6)


@pytest.mark.fault(row="G6", given="an optimizer of another model's parameters", right="refused before training")
def test_an_optimizer_of_another_model_is_refused(plain, clone, batches):
    with pytest.raises(UsageError, match="the optimizer holds no parameter of the model"):
        fit(plain, cross_entropy, torch.optim.SGD(clone(plain).parameters(), lr=0.1), batches)


@pytest.mark.fault(row="G", given="an optimizer of a part of the model on which the loss does not depend", right="refused after the first backward pass, before an update")
def test_an_optimizer_of_an_unused_part_is_refused(plain, batches):
    model = nn.ModuleDict({"used": plain, "unused": nn.Linear(2, 2)})
    model.forward = model["used"].forward
    with pytest.raises(UsageError, match="gave no gradient to any parameter that the optimizer holds"):
        fit(model, cross_entropy, torch.optim.SGD(model["unused"].parameters(), lr=0.1), batches)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")           # of torch 2.11
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.fault(row="G8", given="Optimizer.zero_grad and step under torch's profiler", right="in its trace, once per step")
def test_the_profiler_shows_each_step_and_zero_grad(plain, batches, momentum):
    with torch.profiler.profile() as profiler:
        fit(plain, cross_entropy, partial(torch.optim.SGD, lr=0.1, momentum=momentum), batches)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["Optimizer.step#SGD.step"] == 8
    assert counts["Optimizer.zero_grad#SGD.zero_grad"] == 8


SCRIPT = """
import json, sys, torch
from loopctl import fit
from loopctl.optim import fast_step
torch.manual_seed(0)
model = torch.nn.Linear(4, 2)
observer = torch.profiler.ExecutionTraceObserver().register_callback(sys.argv[1])
observer.start()
fit(model, torch.nn.CrossEntropyLoss(), lambda groups: torch.optim.SGD(groups, lr=0.1), [(torch.ones(3, 4), torch.tensor([0, 1, 1]))] * 2)
observer.stop()
observer.unregister_callback()
print(json.dumps([fast_step.AVAILABLE, model.weight.tolist()]))
"""


@pytest.mark.fault(row="G", given="LOOPCTL_FAST_STEP=0, with an ExecutionTraceObserver", right="torch's own step and zero_grad, in the trace, and the same weights")
def test_fast_steps_can_be_switched_off(tmp_path):
    results = []
    for value in ("0", "1"):
        trace = tmp_path / f"{value}.json"
        done = subprocess.run([sys.executable, "-c", SCRIPT, trace], env=os.environ | {"LOOPCTL_FAST_STEP": value},
                              capture_output=True, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        names = [node["name"] for node in json.loads(trace.read_text())["nodes"]]
        assert (names.count("Optimizer.step#SGD.step"), names.count("Optimizer.zero_grad#SGD.zero_grad")) == ((2, 2) if value == "0" else (0, 0))
    assert [available for available, _ in results] == [False, True]
    assert results[0][1] == results[1][1]


@pytest.mark.fault(row="G", given="a version of torch without one of the private names", right="torch's own step")
def test_without_a_private_name_the_step_is_torch_s_own(plain, batches, monkeypatch):
    from loopctl.optim import fast_step

    called = []
    monkeypatch.setattr(fast_step, "AVAILABLE", False)
    monkeypatch.setattr(fast_step, "unwrapped", called.append)
    fit(plain, cross_entropy, partial(torch.optim.SGD, lr=0.1), batches[:2])
    assert not called
