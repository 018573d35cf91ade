"""The checks of loopctl.testing: a plugin with one fault fails exactly one check; a plugin without faults passes all."""
import random
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
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

pytestmark = pytest.mark.usefixtures("undrawn")


@dataclass(eq=False)
class ScaleGradients:
    """Scale gradients down as the run goes on.

    rate: how much per step, 0 to 1
    """

    rate: float = 0.01

    def __init_subclass__(cls):
        cls.__doc__ = cls.__doc__ or ScaleGradients.__doc__

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


# Plugins with one fault each.


@dataclass(eq=False)
class OptionWithoutHelp(ScaleGradients):
    """Scale gradients down as the run goes on."""

    more: float = 1.0


@dataclass(eq=False)
class NoDocstring(ScaleGradients):
    more: int = 1


NoDocstring.__doc__ = "NoDocstring(rate: float = 0.01, more: int = 1)"          # what dataclass generates without a docstring


class OptionWithoutType(ScaleGradients):
    """Scale gradients.

    rate: how fast
    power: ever faster
    """

    power = 1.0


@dataclass(eq=False)
class OptionOfAnyType(ScaleGradients):
    """Scale gradients.

    rate: how fast
    power: ever faster
    """

    power: Any = 1.0


@dataclass(eq=False)
class DefaultOfAnotherType(ScaleGradients):
    """Scale gradients.

    rate: how fast
    power: ever faster
    """

    power: float = None

    def __post_init__(self):
        self.power = self.power or 1.0


@dataclass(eq=False)
class OptionThatDoesNotReadBack(ScaleGradients):
    """Scale gradients.

    rate: how fast
    word: any
    """

    word: list[str] = field(default_factory=lambda: ["a"])

    def __post_init__(self):
        self.word = [*self.word, "b"]


class NotADataclass:
    """Scale gradients."""

    def __init__(self, rate=0.1):
        self.rate = rate

    @hookimpl
    def after_step(self, run: Run): ...


class MisspeltHook(ScaleGradients):
    @hookimpl
    def after_stpe(self, run): ...


class MisspeltArgument(ScaleGradients):
    @hookimpl
    def after_step(self, rnu): ...


class Raises(ScaleGradients):
    @hookimpl
    def after_step(self, run: Run):
        raise ZeroDivisionError("nothing to divide")


class NoUpdate(ScaleGradients):
    @hookimpl
    def optimizer_step(self, run: Run, closure):
        run.skipped = True
        return closure()


class DrawsFromTheSystem(ScaleGradients):
    @hookimpl
    def before_step(self, run: Run):
        self.count += random.SystemRandom().random()


class RefusesByTypeError(ScaleGradients):
    @hookimpl
    def setup(self, run: Run):
        if "clip" in run.hook.plugins:
            raise TypeError("clip has no attribute")


class RefusesInTwoLines(ScaleGradients):
    @hookimpl
    def setup(self, run: Run):
        if "clip" in run.hook.plugins:
            raise UsageError("does not work\nwith clip")


class LeavesAutocastOn(ScaleGradients):
    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        cast = torch.autocast("cpu", torch.bfloat16)
        cast.__enter__()
        loss = yield
        cast.__exit__(None, None, None)
        return loss


class LeavesGradModeOff(ScaleGradients):
    @hookimpl(wrapper=True)
    def evaluate(self):
        torch.set_grad_enabled(False)
        metrics = yield
        torch.set_grad_enabled(True)
        return metrics


class LeavesDefaultDtype(ScaleGradients):
    @hookimpl
    def train_end(self):
        torch.set_default_dtype(torch.float64)


class LeavesDeterministicAlgorithmsOn(ScaleGradients):
    @hookimpl(wrapper=True)
    def group_batches(self):
        torch.use_deterministic_algorithms(True)
        groups = yield
        return self.then_restore(groups)

    def then_restore(self, groups):
        yield from groups
        torch.use_deterministic_algorithms(False)


class LeavesEvalMode(ScaleGradients):
    @hookimpl
    def train_end(self, run: Run):
        run.model.eval()


class LeavesBatchNormInEvalMode(ScaleGradients):
    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        before = run.model[1].training
        run.model[1].eval()
        loss = yield
        run.model[1].train(before)
        return loss


class SwallowsErrors(ScaleGradients):
    @hookimpl(wrapper=True)
    def train(self):
        with suppress(PlantedError):
            yield


class DrawsInSetup(ScaleGradients):
    @hookimpl
    def setup(self, run: Run):
        torch.rand(1)


@dataclass(eq=False)
class DrawsInInit(ScaleGradients):
    def __post_init__(self):
        random.random()


class DrawsInWrapper(ScaleGradients):
    @hookimpl(wrapper=True)
    def compute_loss(self):
        np.random.rand()
        return (yield)


class HasNoStateDict:
    """Scale gradients down as the run goes on."""

    train_start, grads_ready, rate = ScaleGradients.train_start, ScaleGradients.grads_ready, 0.01


class LoadsAnotherState(ScaleGradients):
    def load_state_dict(self, state):
        self.count = 0


class StateThatCannotBeSaved(ScaleGradients):
    def state_dict(self):
        return {"count": self.count, "self": self}


@dataclass(eq=False)
class KeepsStateOfTheFirstRun(ScaleGradients):
    def __post_init__(self):
        self.count = 0

    @hookimpl
    def train_start(self): ...


class SharesClassState(ScaleGradients):
    seen: ClassVar[list] = []

    @hookimpl
    def after_step(self, run: Run):
        self.seen.append(run.step)


STEPS = 0


class SharesModuleState(ScaleGradients):
    @hookimpl
    def after_step(self, run: Run):
        global STEPS
        STEPS += 1


class Registry:
    latest = None


class SharesStateOfAnotherClass(ScaleGradients):
    """Scale gradients.

    rate: how fast
    """

    @hookimpl
    def epoch_start(self):
        Registry.latest = self

    @hookimpl
    def before_step(self):
        Registry.latest.count += 1


class ReadsEachStep(ScaleGradients):
    @hookimpl
    def after_step(self, run: Run):
        self.last = run.loss.item()


FAULTS = {
    OptionWithoutHelp: ("options_are_documented", "more has no help"),
    NoDocstring: ("options_are_documented", "has no docstring"),
    OptionWithoutType: ("options_are_documented", "power has no type"),
    OptionOfAnyType: ("options_are_documented", "power has the type typing.Any"),
    DefaultOfAnotherType: ("options_are_documented", "power takes a number, and its default is None"),
    OptionThatDoesNotReadBack: ("options_are_documented", "is written as 'rate=0.01,word=a,b'"),
    NotADataclass: ("options_are_documented", "rate cannot be an option"),
    MisspeltHook: ("hooks_exist", "did you mean 'after_step'"),
    MisspeltArgument: ("hooks_exist", "did you mean 'run'"),
    Raises: ("trains", "nothing to divide"),
    NoUpdate: ("trains", "made no update"),
    DrawsFromTheSystem: ("repeats", "differ: history[0]['train_loss'] is"),
    RefusesByTypeError: ("composes", "before clip: TypeError: clip has no attribute"),
    RefusesInTwoLines: ("composes", "before clip: UsageError"),
    LeavesAutocastOn: ("cleans_up", "after an error in forward, the autocast for cpu is True"),
    LeavesGradModeOff: ("cleans_up", "after an error in forward, in validation, the grad mode is False"),
    LeavesDefaultDtype: ("cleans_up", "after the run, the default dtype is torch.float64"),
    LeavesDeterministicAlgorithmsOn: ("cleans_up", "after an error in forward, the debug mode of deterministic algorithms is 2"),
    LeavesEvalMode: ("cleans_up", "after the run, the model is left in eval mode"),
    LeavesBatchNormInEvalMode: ("cleans_up", "after an error in forward, 1 is left in eval mode"),
    SwallowsErrors: ("cleans_up", "an error in forward is not raised by fit"),
    DrawsInSetup: ("draws_nothing", "setup draws random numbers from torch"),
    DrawsInInit: ("draws_nothing", "creating it draws random numbers from python"),
    DrawsInWrapper: ("draws_nothing", "compute_loss draws random numbers from numpy"),
    HasNoStateDict: ("resumes", "write state_dict and load_state_dict"),
    LoadsAnotherState: ("resumes", "load_state_dict does not restore what state_dict returned: count is 5 and 0"),
    StateThatCannotBeSaved: ("resumes", "its state has a"),
    KeepsStateOfTheFirstRun: ("runs_twice", "a second run with the same instance differs"),
    SharesClassState: ("shares_nothing", "SharesClassState.seen has "),
    SharesModuleState: ("shares_nothing", "STEPS is "),
    SharesStateOfAnotherClass: ("shares_nothing", "a run around another"),
    ReadsEachStep: ("never_waits", "after_step reads a tensor in each step"),
}


@pytest.fixture
def two_built_ins(monkeypatch):
    """Let the check `composes` use two built-ins only, to save time."""
    entries = available()
    monkeypatch.setattr(conformance, "available", lambda: {name: entries[name] for name in ("clip", "cosine")})


def failing(plugin, **arguments):
    """Return the messages of the checks that fail, by check."""
    messages = {}
    for check in plugin_checks(plugin, **arguments):
        try:
            check()
        except SkipTest:
            pass
        except Exception as error:
            messages[check.__name__] = str(error)
    return messages


@pytest.mark.usefixtures("two_built_ins")
@pytest.mark.parametrize("plugin", FAULTS, ids=lambda plugin: plugin.__name__)
def test_a_fault_fails_its_check_and_no_other(plugin):
    before = read_switches()
    name, message = FAULTS[plugin]
    messages = failing(plugin)
    assert messages.keys() == {name}
    assert message in messages[name]
    assert read_switches() == before


def test_every_check_is_tested_with_a_plugin_that_fails_it():
    assert {name for name, _ in FAULTS.values()} == {check.__name__ for check in CHECKS}


@pytest.mark.parametrize("check", plugin_checks(ScaleGradients))
def test_a_plugin_without_faults_passes_each_check(check):
    check()


@pytest.mark.usefixtures("two_built_ins")
@pytest.mark.parametrize("plugin", [f"{__file__}:ScaleGradients:rate=0.1", lambda: ScaleGradients(rate=0.1)], ids=["text", "factory"])
def test_checks_accept_command_line_text_and_a_factory(plugin):
    assert failing(plugin) == {}


class Armed(torch.optim.SGD):
    """An optimizer that makes no update without a plugin that arms it."""

    def step(self, closure=None):
        if not self.param_groups[0].pop("armed", False):
            raise RuntimeError("not armed")
        return super().step(closure)


@dataclass(eq=False)
class Arms:
    """Arm the optimizer for each step."""

    @hookimpl
    def before_step(self, run: Run):
        run.optimizer.param_groups[0]["armed"] = True


@dataclass(eq=False)
class Loss:
    """Compute a loss of the outputs alone."""

    @hookimpl
    def compute_loss(self, run: Run, batch: Any):
        run.outputs = run.network(batch[0])
        return run.outputs.square().mean()


@pytest.mark.parametrize(("plugin", "arguments", "failure"), [
    (Arms, {"optimizer": partial(Armed, lr=0.1)}, "RuntimeError: not armed"),
    (Loss, {"loss_fn": None}, "UsageError: .*"),
])
def test_the_cost_of_a_plugin_without_which_a_run_fails_is_the_time_with_it(plugin, arguments, failure):
    report = check_plugin(plugin, skip={"composes": "tested elsewhere"}, **arguments)
    assert re.search(rf"^costs +not known, since a run without it fails \({failure}\); with it, [\d.]+ us per batch$",
                     report, re.MULTILINE)
    assert "FAILS" not in report


@pytest.mark.usefixtures("two_built_ins")
def test_check_plugin_reports_each_check_and_the_cost():
    report = check_plugin(ScaleGradients, {"rate": 0.1}, skip={"composes": "tested elsewhere"})
    assert re.search(r"^scale_gradients\noptions_are_documented +ok\n", report)
    assert re.search(r"^composes +left out: tested elsewhere$", report, re.MULTILINE)
    assert re.search(r"^costs +-?[\d.]+ us per batch$", report, re.MULTILINE)


@pytest.mark.usefixtures("two_built_ins")
def test_the_report_names_the_failing_check_and_those_that_were_skipped_because_of_it():
    with pytest.raises(AssertionError) as failed:
        check_plugin(Raises)
    lines = str(failed.value).splitlines()
    assert lines[0] == "raises: 1 of 11 checks fail"
    assert any(re.match("trains +FAILS: ZeroDivisionError: nothing to divide", line) for line in lines)
    assert any(re.match("resumes +left out: needs trains, which does not pass", line) for line in lines)


def test_draws_random_waits_and_measured_allow_what_the_checks_forbid():
    assert not failing(DrawsInSetup, draws_random=True, skip={"composes": "takes long"})
    assert not failing(ReadsEachStep, waits=True, skip={"composes": "takes long"})

    class Measures(ScaleGradients):
        @hookimpl
        def setup(self, run: Run):
            run.metrics["noise"] = 0.0

        @hookimpl
        def after_evaluate(self, run: Run):
            run.metrics["noise"] = random.SystemRandom().random()

    assert failing(Measures, skip={"composes": "takes long"}).keys() == {"repeats"}
    assert not failing(Measures, measured=("noise",), skip={"composes": "takes long"})


def test_skipping_an_unknown_check_is_refused():
    with pytest.raises(UsageError, match="no check is called 'compose'; did you mean 'composes'"):
        plugin_checks(ScaleGradients, skip={"compose": ""})


@pytest.mark.usefixtures("two_built_ins")
def test_checks_accept_another_model_and_other_data_and_leave_the_model_unchanged():
    class OwnInputs(ScaleGradients):
        @hookimpl
        def compute_loss(self, run: Run, batch):
            run.outputs = run.network(batch["x"])
            return run.outputs.square().mean()

    batches = [{"x": torch.randn(4, 3)} for _ in range(4)]
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    before = model[0].weight.clone()
    assert not failing(OwnInputs, model=model, loss_fn=None, train=batches, valid=batches[:1])
    assert torch.equal(model[0].weight, before)


def test_collecting_checks_creates_no_plugin():
    class CannotBeMade(ScaleGradients):
        def __post_init__(self):
            raise AssertionError

    assert len(plugin_checks(CannotBeMade)) == len(CHECKS)
    assert plugin_checks("no_such_plugin")[0].__name__ == "options_are_documented"


def test_every_built_in_can_be_created_from_its_example():
    for name in available():
        build_plugin(f"{name}:{conformance.EXAMPLES[name]}" if name in EXAMPLES else name)
    assert set(EXAMPLES) <= set(available())


def test_docs_plugins_md_lists_each_check_and_its_example_runs(tmp_path):
    """The example runs under pytest, with the plugin of the README."""
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


def test_a_tiny_run_trains_two_epochs_and_validates():
    run = tiny_run("clip")
    kinds = {type(module) for module in run.model}
    assert {nn.BatchNorm1d, nn.Dropout} <= kinds
    assert len({len(target) for _, target in run.train}) == 2
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert {"train_loss", "val_loss", "grad_norm"} <= run.history[0].keys()
    assert run.optimizer.defaults["momentum"]


def test_tiny_runs_are_equal_and_write_to_different_folders(same):
    one, other = tiny_run("csv"), tiny_run("csv")
    same(one.model, other.model)
    assert (one.out / "metrics.csv").read_text() == (other.out / "metrics.csv").read_text()
    assert one.out != other.out


def test_tiny_run_accepts_the_arguments_of_fit(tmp_path, plain, batches):
    run = tiny_run("clip", plugins=["cosine"], model=plain, train=batches, valid=None, epochs=1, max_steps=3, out=tmp_path)
    assert run.model is plain
    assert run.train is batches
    assert (run.step, run.valid, run.out) == (3, None, tmp_path)
    assert list(run.hook.plugins) == ["clip", "cosine"]


def test_creating_the_model_draws_no_random_numbers_from_the_global_generator():
    before = torch.get_rng_state()
    default_arguments()
    assert torch.equal(torch.get_rng_state(), before)
