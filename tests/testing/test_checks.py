"""A plugin with a fault fails the check that is meant for it, and no other; one without passes all."""
import random
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import SkipTest

import numpy as np
import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, available, hookimpl
from loopctl.composition.discovery import build_plugin
from loopctl.testing import check_plugin, plugin_checks, tiny_run
from loopctl.testing import checks as conformance
from loopctl.testing.checks import CHECKS, EXAMPLES
from loopctl.testing.global_state import read_switches
from loopctl.testing.probes import PlantedError
from loopctl.testing.tiny import default_arguments

ROOT = Path(__file__).parents[2]


@dataclass(eq=False)
class Good:
    """Scale gradients down as the run goes on.

    rate: how fast, 0 to 1
    """

    rate: float = 0.01

    def __init_subclass__(cls):
        cls.__doc__ = cls.__doc__ or Good.__doc__

    @hookimpl
    def train_start(self, run: Run):
        self.count = 0

    @hookimpl
    def grads_ready(self, run: Run):
        self.count += 1
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad *= (1 - self.rate) ** self.count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


# One fault each.


class OptionWithoutHelp(Good):
    """Scale gradients down as the run goes on."""


@dataclass(eq=False)
class NoDocstring(Good):
    more: int = 1


NoDocstring.__doc__ = "NoDocstring(rate: float = 0.01, more: int = 1)"          # what dataclass writes where there is none


class OptionWithoutType(Good):
    """Scale gradients.

    rate: how fast
    power: ever faster
    """

    power = 1.0


@dataclass(eq=False)
class OptionOfAnyType(Good):
    """Scale gradients.

    rate: how fast
    power: ever faster
    """

    power: Any = 1.0


@dataclass(eq=False)
class DefaultOfAnotherType(Good):
    """Scale gradients.

    rate: how fast
    power: ever faster
    """

    power: float = None

    def __post_init__(self):
        self.power = self.power or 1.0


@dataclass(eq=False)
class OptionThatDoesNotReadBack(Good):
    """Scale gradients.

    rate: how fast
    word: any
    """

    word: list[str] = field(default_factory=lambda: ["a,b"])


class NoDataclass:
    """Scale gradients."""

    def __init__(self, rate=0.1):
        self.rate = rate

    @hookimpl
    def after_step(self, run: Run): ...


class MisspeltHook(Good):
    @hookimpl
    def after_stpe(self, run): ...


class MisspeltArgument(Good):
    @hookimpl
    def after_step(self, rnu): ...


class Raises(Good):
    @hookimpl
    def after_step(self, run: Run):
        raise ZeroDivisionError("nothing to divide")


class NoUpdate(Good):
    @hookimpl
    def optimizer_step(self, run: Run, closure):
        run.skipped = True
        return closure()


class SeedOfItsOwn(Good):
    @hookimpl
    def before_step(self, run: Run):
        self.count += random.SystemRandom().random()


class ClashesUnclearly(Good):
    @hookimpl
    def setup(self, run: Run):
        if "clip" in run.hook.plugins:
            raise TypeError("clip has no such thing")


class ClashesInTwoLines(Good):
    @hookimpl
    def setup(self, run: Run):
        if "clip" in run.hook.plugins:
            raise UsageError("does not go\nwith clip")


class LeaksAutocast(Good):
    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        cast = torch.autocast("cpu", torch.bfloat16)
        cast.__enter__()
        loss = yield
        cast.__exit__(None, None, None)
        return loss


class LeavesGradModeOff(Good):
    @hookimpl(wrapper=True)
    def evaluate(self):
        torch.set_grad_enabled(False)
        metrics = yield
        torch.set_grad_enabled(True)
        return metrics


class LeavesDefaultDtype(Good):
    @hookimpl
    def train_end(self):
        torch.set_default_dtype(torch.float64)


class LeavesDeterminism(Good):
    @hookimpl(wrapper=True)
    def group_batches(self):
        torch.use_deterministic_algorithms(True)
        groups = yield
        return self.until_done(groups)

    def until_done(self, groups):
        yield from groups
        torch.use_deterministic_algorithms(False)


class LeavesEvaluationMode(Good):
    @hookimpl
    def train_end(self, run: Run):
        run.model.eval()


class LeavesBatchNormInEvaluationMode(Good):
    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        was = run.model[1].training
        run.model[1].eval()
        loss = yield
        run.model[1].train(was)
        return loss


class SwallowsErrors(Good):
    @hookimpl(wrapper=True)
    def train(self):
        with suppress(PlantedError):
            yield


class DrawsInSetup(Good):
    @hookimpl
    def setup(self, run: Run):
        torch.rand(1)


@dataclass(eq=False)
class DrawsWhenMade(Good):
    def __post_init__(self):
        random.random()


class DrawsInWrapper(Good):
    @hookimpl(wrapper=True)
    def compute_loss(self):
        np.random.rand()
        return (yield)


class ForgetsState:
    """Scale gradients down as the run goes on."""

    train_start, grads_ready, rate = Good.train_start, Good.grads_ready, 0.01


class LoadsWrongly(Good):
    def load_state_dict(self, state):
        self.count = 0


class StateThatCannotBeSaved(Good):
    def state_dict(self):
        return {"count": self.count, "self": self}


@dataclass(eq=False)
class BeginsWhereItEnded(Good):
    def __post_init__(self):
        self.count = 0

    @hookimpl
    def train_start(self): ...


class SharesClassState(Good):
    seen: ClassVar[list] = []

    @hookimpl
    def after_step(self, run: Run):
        self.seen.append(run.step)


STEPS = 0


class SharesModuleState(Good):
    @hookimpl
    def after_step(self, run: Run):
        global STEPS
        STEPS += 1


class Hidden:
    latest = None


class SharesHiddenState(Good):
    """Scale gradients.

    rate: how fast
    """

    @hookimpl
    def epoch_start(self):
        Hidden.latest = self

    @hookimpl
    def before_step(self):
        Hidden.latest.count += 1


class ReadsEachStep(Good):
    @hookimpl
    def after_step(self, run: Run):
        self.last = run.loss.item()


FAULTS = {
    OptionWithoutHelp: ("options_are_documented", "rate has no help"),
    NoDocstring: ("options_are_documented", "has no docstring"),
    OptionWithoutType: ("options_are_documented", "power has no type"),
    OptionOfAnyType: ("options_are_documented", "power has the type typing.Any"),
    DefaultOfAnotherType: ("options_are_documented", "power takes a number, and its default is None"),
    OptionThatDoesNotReadBack: ("options_are_documented", "is written as 'rate=0.01,word=a,b'"),
    NoDataclass: ("options_are_documented", "rate cannot be an option"),
    MisspeltHook: ("hooks_exist", "did you mean 'after_step'"),
    MisspeltArgument: ("hooks_exist", "did you mean 'run'"),
    Raises: ("trains", "nothing to divide"),
    NoUpdate: ("trains", "made no update"),
    SeedOfItsOwn: ("repeats", "differ: history[0]['train_loss'] is"),
    ClashesUnclearly: ("composes", "before clip: TypeError: clip has no such thing"),
    ClashesInTwoLines: ("composes", "before clip: UsageError"),
    LeaksAutocast: ("cleans_up", "after an error in forward, the autocast for cpu is True"),
    LeavesGradModeOff: ("cleans_up", "after an error in forward, in validation, the grad mode is False"),
    LeavesDefaultDtype: ("cleans_up", "after the run, the default dtype is torch.float64"),
    LeavesDeterminism: ("cleans_up", "after an error in forward, the debug mode of deterministic algorithms is 2"),
    LeavesEvaluationMode: ("cleans_up", "after the run, the model is left in evaluation mode"),
    LeavesBatchNormInEvaluationMode: ("cleans_up", "after an error in forward, 1 is left in evaluation mode"),
    SwallowsErrors: ("cleans_up", "an error in forward does not come out of the run"),
    DrawsInSetup: ("draws_nothing", "setup draws random numbers of torch"),
    DrawsWhenMade: ("draws_nothing", "making it draws random numbers of python"),
    DrawsInWrapper: ("draws_nothing", "compute_loss draws random numbers of numpy"),
    ForgetsState: ("resumes", "write state_dict and load_state_dict"),
    LoadsWrongly: ("resumes", "load_state_dict does not bring back what state_dict gave: count is 5 and 0"),
    StateThatCannotBeSaved: ("resumes", "its state has a"),
    BeginsWhereItEnded: ("runs_twice", "a second run with the same instance differs"),
    SharesClassState: ("shares_nothing", "SharesClassState.seen has "),
    SharesModuleState: ("shares_nothing", "STEPS is "),
    SharesHiddenState: ("shares_nothing", "a run around another"),
    ReadsEachStep: ("never_waits", "after_step reads a tensor in each step"),
}


@pytest.fixture
def few(monkeypatch):
    """Two built-ins to compose with, in place of all."""
    entries = available()
    monkeypatch.setattr(conformance, "available", lambda: {name: entries[name] for name in ("clip", "cosine")})


def failing(plugin, **arguments):
    """What each failing check says."""
    found = {}
    for check in plugin_checks(plugin, **arguments):
        try:
            check()
        except SkipTest:
            pass
        except Exception as error:
            found[check.__name__] = str(error)
    return found


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("plugin", FAULTS, ids=lambda plugin: plugin.__name__)
def test_a_fault_fails_the_check_that_is_meant_for_it_and_no_other(plugin):
    before = read_switches()
    name, message = FAULTS[plugin]
    found = failing(plugin)
    assert found.keys() == {name}
    assert message in found[name]
    assert read_switches() == before


def test_every_check_has_its_fault():
    assert {name for name, _ in FAULTS.values()} == {check.__name__ for check in CHECKS}


@pytest.mark.parametrize("check", plugin_checks(Good))
def test_a_good_plugin_passes(check):
    check()


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("plugin", [f"{__file__}:Good:rate=0.1", lambda: Good(rate=0.1)], ids=["text", "factory"])
def test_text_and_a_factory_will_do(plugin):
    assert failing(plugin) == {}


@pytest.mark.usefixtures("few")
def test_the_report():
    report = check_plugin(Good, {"rate": 0.1}, skip={"composes": "seen elsewhere"})
    assert re.search(r"^good\noptions_are_documented +ok\n", report)
    assert re.search(r"^composes +left out: seen elsewhere$", report, re.MULTILINE)
    assert re.search(r"^costs +-?[\d.]+ us per batch$", report, re.MULTILINE)


@pytest.mark.usefixtures("few")
def test_a_failing_report_names_the_check_and_what_it_hides():
    with pytest.raises(AssertionError) as failed:
        check_plugin(Raises)
    lines = str(failed.value).splitlines()
    assert lines[0] == "raises: 1 of 11 checks fail"
    assert any(re.match("trains +FAILS: ZeroDivisionError: nothing to divide", line) for line in lines)
    assert any(re.match("resumes +left out: means nothing where trains does not pass", line) for line in lines)


def test_what_a_plugin_must_do_it_may_say():
    assert not failing(DrawsInSetup, draws_random=True, skip={"composes": "takes long"})
    assert not failing(ReadsEachStep, waits=True, skip={"composes": "takes long"})

    class Measures(Good):
        @hookimpl
        def setup(self, run: Run):
            run.metrics["luck"] = 0.0

        @hookimpl
        def after_evaluate(self, run: Run):
            run.metrics["luck"] = random.SystemRandom().random()

    assert failing(Measures, skip={"composes": "takes long"}).keys() == {"repeats"}
    assert not failing(Measures, measured=("luck",), skip={"composes": "takes long"})


def test_a_check_that_does_not_exist_cannot_be_left_out():
    with pytest.raises(UsageError, match="no check is called 'compose'; did you mean 'composes'"):
        plugin_checks(Good, skip={"compose": ""})


@pytest.mark.usefixtures("few")
def test_a_plugin_may_need_a_model_and_data_of_its_own():
    class OfThree(Good):
        @hookimpl
        def compute_loss(self, run: Run, batch):
            run.outputs = run.network(batch["x"])
            return run.outputs.square().mean()

    batches = [{"x": torch.randn(4, 3)} for _ in range(4)]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = model[0].weight.clone()
    assert not failing(OfThree, model=model, loss_fn=None, train=batches, valid=batches[:1])
    assert torch.equal(model[0].weight, before)


def test_collecting_checks_makes_no_plugin():
    class CannotBeMade(Good):
        def __post_init__(self):
            raise AssertionError

    assert len(plugin_checks(CannotBeMade)) == len(CHECKS)
    assert plugin_checks("no_such_plugin")[0].__name__ == "options_are_documented"


def test_every_built_in_has_an_example():
    for name in available():
        build_plugin(f"{name}:{conformance.EXAMPLES[name]}" if name in EXAMPLES else name)
    assert set(EXAMPLES) <= set(available())


def test_what_the_docs_say(tmp_path):
    """Its block runs under pytest, on the README's plugin, and each check is in its list."""
    text = (ROOT / "docs" / "plugins.md").read_text().partition("## Test your plugin")[2].partition("\n## ")[0]
    assert re.findall(r"^- `(\w+)`: ", text, re.MULTILINE) == [check.__name__ for check in CHECKS]
    (tmp_path / "test_noise.py").write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1])
    plugin = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "noise.py").write_text(plugin)
    done = subprocess.run([sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "."], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "11 passed, 1 skipped" in done.stdout
    assert "test_conforms[never_waits] PASSED" in done.stdout


# tiny_run


def test_a_tiny_run_is_whole():
    run = tiny_run("clip")
    kinds = {type(module) for module in run.model}
    assert {nn.BatchNorm1d, nn.Dropout} <= kinds
    assert len({len(target) for _, target in run.train}) == 2
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert {"train_loss", "val_loss", "grad_norm"} <= run.history[0].keys()
    assert run.optimizer.defaults["momentum"]


def test_tiny_runs_are_the_same_and_in_folders_of_their_own(same):
    one, other = tiny_run("csv"), tiny_run("csv")
    same(one.model, other.model)
    assert (one.out / "metrics.csv").read_text() == (other.out / "metrics.csv").read_text()
    assert one.out != other.out


def test_every_argument_of_fit_can_be_given(tmp_path, plain, batches):
    run = tiny_run("clip", plugins=["cosine"], model=plain, train=batches, valid=None, epochs=1, max_steps=3, out=tmp_path)
    assert run.model is plain
    assert run.train is batches
    assert (run.step, run.valid, run.out) == (3, None, tmp_path)
    assert list(run.hook.plugins) == ["clip", "cosine"]


def test_making_the_model_draws_none_of_the_callers_random_numbers():
    before = torch.get_rng_state()
    default_arguments()
    assert torch.equal(torch.get_rng_state(), before)
