"""Which settings may differ from those of the checkpoint when a run is resumed. Others are refused before training."""
import shutil
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint.finding import find_checkpoint
from loopctl.cli import main

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def small(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers or (nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3)))


def loader(samples=50, size=8, generator=None):
    fixed = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(60, 6, generator=fixed)[:samples], torch.randint(0, 3, (60,), generator=fixed)[:samples])
    return DataLoader(data, size, shuffle=True, generator=generator)


def run(out, model=None, optimizer=sgd, train=None, plugins=("checkpoint",), epochs=2, **settings):
    model = small() if model is None else model()
    data = loader() if train is None else train()
    return fit(model, cross_entropy, optimizer, data, epochs=epochs, plugins=plugins, out=out, seed=1, **settings)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def accuracy(output, target):
    return (output.argmax(1) == target).float().mean()


class Kill:
    """Interrupts the run after the given step, and after its checkpoint if it has one."""

    def __init__(self, step):
        self.step = step

    @hookimpl(trylast=True)
    def safe_point(self, run: Run):
        if run.attempts == self.step:
            raise KeyboardInterrupt


def killed(out, step, **settings):
    with pytest.raises(KeyboardInterrupt):
        run(out, **{**settings, "plugins": [*settings.get("plugins", ["checkpoint:every_steps=1"]), Kill(step)]})


class Halve:
    """A plugin without options or state that changes training."""

    @hookimpl
    def grads_ready(self, run: Run):
        for parameter in run.model.parameters():
            parameter.grad *= 0.5


class Observer:
    """A plugin that only observes."""

    def __repr__(self):
        return "Observer()"             # part of a test's name, which must be the same in every process

    @hookimpl
    def after_step(self, run: Run):
        assert run.loss is not None

    @hookimpl
    def epoch_end(self, run: Run):
        assert run.history


def swapped():
    """The model of `in_order`, with its layers registered in the reverse order."""
    model = nn.Module()
    model.register_module("b", nn.Linear(6, 6))
    model.register_module("a", nn.Linear(6, 6))
    model.forward = lambda input: model.b(model.a(input))
    return model


def in_order():
    model = nn.Module()
    model.register_module("a", nn.Linear(6, 6))
    model.register_module("b", nn.Linear(6, 6))
    model.forward = lambda input: model.b(model.a(input))
    return model


def two_groups(groups, first=2):
    (group,) = groups
    return sgd([{"params": group["params"][:first]}, {"params": group["params"][first:]}])


def case(then, *words, first=None):
    """The settings of the first run, those of the resumed run, and words of the error message."""
    return first or {}, then, words


accumulating = ["checkpoint", "accumulate:every=2"]
REFUSED = {
    "one more layer": case({"model": lambda: small(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3), nn.Linear(3, 3))},
                         "the model has 4.bias and 4.weight in this run but not in the checkpoint"),
    "one fewer layer": case({"model": lambda: small(nn.Linear(6, 6), nn.BatchNorm1d(6))}, "the model has 3.bias and 3.weight in the checkpoint but not in this run"),
    "other names": case({"model": lambda: nn.Sequential(small())}, "the model has 0.bias, 0.weight, 1.bias and 6 more in the checkpoint but not in this run"),
    "another width": case({"model": lambda: small(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Dropout(0.2), nn.Linear(7, 3))},
                          "the model's 0.weight is 6x6 in the checkpoint and 7x6 in this run"),
    "another order of layers": case({"model": swapped}, "the optimizer", first={"model": in_order}),
    "another optimizer": case({"optimizer": partial(torch.optim.Adam, lr=0.1)}, "the optimizer is SGD in the checkpoint and Adam in this run"),
    "a similar optimizer": case({"optimizer": partial(torch.optim.AdamW, lr=0.1)}, "the optimizer is Adam in the checkpoint and AdamW in this run",
                         first={"optimizer": partial(torch.optim.Adam, lr=0.1)}),
    "another rate": case({"optimizer": partial(torch.optim.SGD, lr=0.2, momentum=0.9)}, "the optimizer's lr is 0.1 in the checkpoint and 0.2 in this run"),
    "another momentum": case({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "the optimizer's momentum is 0.9 in the checkpoint and 0 in this run"),
    "more parameter groups": case({"optimizer": two_groups}, "the numbers of parameters in the optimizer's groups are [6] in the checkpoint and [2, 4] in this run"),
    "other parameter groups": case({"optimizer": partial(two_groups, first=4)},
                                   "the numbers of parameters in the optimizer's groups are [2, 4] in the checkpoint and [4, 2] in this run",
                                   first={"optimizer": two_groups}),
    "another part frozen": case({"plugins": ["checkpoint", "freeze:patterns=3"]}, "the optimizer",
                                first={"plugins": ["checkpoint", "freeze:patterns=0"]}),
    "one more plugin that changes training": case({"plugins": ["checkpoint", "clip"]}, "there is the plugin clip in this run but not in the checkpoint"),
    "one fewer plugin that changes training": case({}, "there is the plugin clip in the checkpoint but not in this run", first={"plugins": ["checkpoint", "clip"]}),
    "one more custom plugin": case({"plugins": ["checkpoint", Halve()]}, "there is the plugin halve in this run but not in the checkpoint"),
    "a plugin twice": case({"plugins": ["checkpoint", "clip", "clip"]}, "there is the plugin clip.2 in this run but not in the checkpoint",
                           first={"plugins": ["checkpoint", "clip"]}),
    "one more plugin with state": case({"plugins": ["checkpoint", "early_stopping"]}, "there is the plugin early_stopping in this run but not in the checkpoint"),
    "one fewer plugin with state": case({}, "there is the plugin early_stopping in the checkpoint but not in this run",
                                      first={"plugins": ["checkpoint", "early_stopping"]}),
    "another schedule": case({"plugins": ["checkpoint", "linear"]}, "there is the plugin cosine in the checkpoint but not in this run",
                             first={"plugins": ["checkpoint", "cosine"]}),
    "another order of plugins": case({"plugins": ["checkpoint", Halve(), "clip"]}, "clip", "halve",
                                     first={"plugins": ["checkpoint", "clip", Halve()]}),
    "another monitor": case({"plugins": ["checkpoint", "early_stopping:monitor=train_accuracy"], "metrics": {"accuracy": accuracy}},
                                       "monitor=train_loss", "monitor=train_accuracy",
                                       first={"plugins": ["checkpoint", "early_stopping"], "metrics": {"accuracy": accuracy}}),
    "another batch size": case({"train": partial(loader, size=10)},
                               "an epoch has 7 steps of 7 batches in the checkpoint and 5 steps of 5 batches in this run; keep data, batch size and accumulation"),
    "another batch size with the same number of batches": case({"train": partial(loader, samples=56, size=8)}, "49", "56",
                                                first={"train": partial(loader, samples=49, size=7)}),
    "more data": case({"train": partial(loader, samples=60)}, "an epoch has 7 steps of 7 batches in the checkpoint and 8 steps of 8 batches in this run"),
    "one fewer sample": case({"train": partial(loader, samples=49)}, "50", "49"),
    "accumulation": case({"plugins": accumulating}, "there is the plugin accumulate in this run but not in the checkpoint"),
    "other accumulation": case({"plugins": ["checkpoint", "accumulate:every=3"]},
                               "an epoch has 4 steps of 7 batches in the checkpoint and 3 steps of 7 batches in this run", first={"plugins": accumulating}),
    "shorter epochs": case({"steps_per_epoch": 5}, "an epoch has 7 steps of 7 batches in the checkpoint and 5 steps of 5 batches in this run"),
    "one more metric": case({"metrics": {"accuracy": accuracy}}, "accuracy"),
    "one fewer metric": case({}, "accuracy", first={"metrics": {"accuracy": accuracy}}),
    "added validation data": case({"valid": [(torch.zeros(2, 6), torch.zeros(2, dtype=torch.long))]}, "validation data"),
    "no validation data": case({}, "validation data", first={"valid": [(torch.zeros(2, 6), torch.zeros(2, dtype=torch.long))]}),
    "an added generator": case({"train": lambda: loader(generator=torch.Generator())}, "generator"),
    "no generator": case({}, "generator", first={"train": lambda: loader(generator=torch.Generator())}),
}


@pytest.mark.parametrize("when", ["at an epoch's end", "within an epoch"])
@pytest.mark.parametrize("name", REFUSED)
def test_resuming_with_other_settings_is_refused_in_one_line(name, when, tmp_path):
    first, then, words = REFUSED[name]
    steps = []

    class Count:
        @hookimpl
        def before_step(self, run: Run):
            steps.append(run.step)

    if when == "within an epoch":
        first = {**first, "plugins": ["checkpoint:every_steps=1", *list(first.get("plugins", ["checkpoint"]))[1:]]}
        killed(tmp_path, 2, **first)
    else:
        run(tmp_path, epochs=1, **first)
    file, before = find_checkpoint(tmp_path)[0], contents(tmp_path)
    with pytest.raises(UsageError) as error:
        run(tmp_path, resume=tmp_path, **{**then, "plugins": [*then.get("plugins", ["checkpoint"]), Count()], "epochs": 3})
    message = str(error.value)
    assert message.startswith(f"resume: {file} is of another run: ") or name == "another monitor"
    for word in words:
        assert word in message
    assert message.isprintable()
    assert "Error" not in message
    assert contents(tmp_path) == before
    assert not steps


@pytest.mark.parametrize(("first", "then"), [
    ({}, {}),
    ({}, {"plugins": ["checkpoint:every_steps=1", "csv"]}),
    ({"plugins": ["checkpoint:every_steps=1", "csv", "progress"]}, {}),
    ({}, {"plugins": ["checkpoint:every_steps=1", Observer()]}),
    ({}, {"plugins": ["checkpoint:every_steps=1", "throughput", "prefetch"]}),
    ({"plugins": ["throughput", "checkpoint:every_steps=1"]}, {}),
    ({}, {"plugins": ["checkpoint:every_steps=3,every_minutes=60,keep=5"]}),
    ({"epochs": 2}, {}),
    ({"max_steps": 11}, {}),
    ({"max_steps": 11}, {"max_steps": 12}),
    ({"eval_every": 3}, {"eval_every": 5}),
], ids=repr)
@pytest.mark.parametrize("step", [3, 7])
def test_observing_plugins_may_differ_and_a_run_may_get_longer(first, then, step, tmp_path, same, capsys):
    then = {"epochs": 3, "plugins": ["checkpoint:every_steps=1"], **then}
    whole = run(tmp_path / "whole", **{**then, "plugins": ["checkpoint"]})
    killed(tmp_path / "part", step, **{"epochs": 3, **first})
    resumed = run(tmp_path / "part", resume=tmp_path / "part", **then)
    same(resumed.model, whole.model)
    ends = [[row for row in history if row["epoch"] in (1, 2, 3)] for history in (resumed.history, whole.history)]
    for row, expected in zip(*ends, strict=True):
        assert repr({name: row[name] for name in expected}) == repr(expected)
    assert (resumed.epoch, resumed.step, resumed.seen) == (whole.epoch, whole.step, whole.seen)


@pytest.mark.parametrize("step", [3, 7, 11])
def test_a_run_killed_after_its_last_step_is_completed(step, tmp_path, same):
    """The checkpoint of the last step is written before the end of the epoch, which the resumed run completes."""
    whole = run(tmp_path / "whole", max_steps=step)
    killed(tmp_path / "part", step, max_steps=step)
    resumed = run(tmp_path / "part", resume=tmp_path / "part", max_steps=step, plugins=["checkpoint:every_steps=1"])
    same(resumed.model, whole.model)
    assert repr(resumed.history) == repr(whole.history)
    assert resumed.finished


def test_a_run_that_ended_within_an_epoch_cannot_get_longer(tmp_path):
    """A longer run would not have evaluated there, so its plugins would have another state."""
    run(tmp_path, max_steps=11, epochs=3)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"step-00000011\.pt ended within an epoch, at max_steps=11, .*; begin a new run"):
        run(tmp_path, max_steps=12, epochs=3, resume=tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("settings", [{}, {"max_steps": 11}, {"epochs": 1}, {"max_steps": 3}], ids=repr)
def test_resuming_a_finished_run_trains_nothing(settings, tmp_path, same):
    first = run(tmp_path, max_steps=11)
    before = contents(tmp_path)
    again = run(tmp_path, resume=tmp_path, **{"max_steps": 11} | settings)
    same(again.model, first.model)
    assert again.history == first.history
    assert contents(tmp_path) == before


def test_resuming_a_stopped_run_trains_nothing(tmp_path, same):
    plugins = ["checkpoint", "early_stopping:patience=2,min_delta=9"]
    first = run(tmp_path, epochs=9, plugins=plugins)
    assert (first.epoch, bool(first.stop)) == (3, True)
    before = contents(tmp_path)
    again = run(tmp_path, epochs=20, plugins=plugins, resume=tmp_path)
    same(again.model, first.model)
    assert (again.epoch, again.stop, again.history) == (first.epoch, first.stop, first.history)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("path", ["run", "run/checkpoints", "run/checkpoints/step-00000007.pt", "copy"])
def test_resuming_from_a_file_or_folder_into_a_new_folder(path, tmp_path, same):
    whole = run(tmp_path / "whole", epochs=3)
    run(tmp_path / "run", epochs=2)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    before = contents(tmp_path / "run")
    resumed = run(tmp_path / "new", epochs=3, resume=tmp_path / path)
    same(resumed.model, whole.model)
    assert repr(resumed.history) == repr(whole.history)
    assert contents(tmp_path / "run") == before
    assert find_checkpoint(tmp_path / "new")[0].name == "step-00000021.pt"


def test_resuming_in_the_same_folder_under_another_path(tmp_path, monkeypatch, same):
    whole = run(tmp_path / "whole", epochs=3)
    run(tmp_path / "run", epochs=2)
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path / "run")
    same(run(tmp_path / "link", epochs=3, resume=".").model, whole.model)
    same(run(".", epochs=3, resume=tmp_path / "link" / "checkpoints").model, whole.model)


@pytest.mark.parametrize("resume", [None, "step-00000007.pt", "elsewhere"])
def test_checkpoints_are_not_overwritten(resume, tmp_path):
    """Neither by a new run, nor by one that resumes from an older checkpoint or from that of another run."""
    run(tmp_path / "run")
    run(tmp_path / "other")
    paths = {None: None, "elsewhere": tmp_path / "other", "step-00000007.pt": tmp_path / "run" / "checkpoints" / "step-00000007.pt"}
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"checkpoint: .*step-00000014\.pt exists and is not overwritten; move it, or choose another dir"):
        run(tmp_path / "run", epochs=3, resume=paths[resume])
    assert contents(tmp_path) == before


def test_a_run_with_two_checkpoint_plugins_resumes_from_the_latest(tmp_path, same):
    plugins = ["checkpoint:every_steps=2,dir=a", "checkpoint:every_steps=3,dir=b"]
    whole = run(tmp_path / "whole", plugins=plugins)
    for step in (8, 9):
        killed(tmp_path / str(step), step, plugins=plugins)
        resumed = run(tmp_path / str(step), plugins=plugins, resume=tmp_path / str(step))
        same(resumed.model, whole.model)
        for folder in "ab":
            assert find_checkpoint(tmp_path / str(step) / folder)[0].name == "step-00000014.pt"


def test_a_run_killed_before_its_first_checkpoint_begins_at_the_start(tmp_path, same, caplog):
    """best.safetensors may exist already."""
    whole = run(tmp_path / "whole")

    class KillAtEpochEnd:
        @hookimpl(trylast=True)
        def epoch_end(self, run: Run):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", plugins=["checkpoint", KillAtEpochEnd()])
    assert [path.name for path in (tmp_path / "part" / "checkpoints").iterdir()] == ["best.safetensors"]
    same(run(tmp_path / "part", resume=tmp_path / "part").model, whole.model)
    assert caplog.messages == [f"{tmp_path / 'part'} has no checkpoint yet; training from the beginning"]


@pytest.mark.parametrize("exists", [False, True])
def test_resuming_from_a_folder_without_checkpoints_is_refused(exists, tmp_path):
    if exists:
        (tmp_path / "nowhere").mkdir()
    with pytest.raises(UsageError, match=r"resume=.*nowhere: no checkpoint found; pass a checkpoint file, or a run's folder, which has them in checkpoints/"):
        run(tmp_path / "new", resume=tmp_path / "nowhere")


# State that a checkpoint cannot hold


class StatefulPlugin:
    """A plugin with a state."""

    def __init__(self, state):
        self.state = state

    @hookimpl
    def after_step(self, run: Run):
        raise AssertionError("a step")

    def state_dict(self):
        return {"kept": [self.state]}

    def load_state_dict(self, state):
        self.state = state["kept"][0]


class StatefulMetric(nn.Module):
    """A metric with a state."""

    def __init__(self, state):
        super().__init__()
        self.state = state

    def forward(self, output, target): ...

    def update(self, output, target): ...

    def compute(self):
        return 0.0

    def reset(self): ...

    def state_dict(self):
        return {"kept": self.state}

    def load_state_dict(self, state):
        self.state = state["kept"]


class ExtraState(nn.Linear):
    """A layer with extra state that is not a tensor."""

    def __init__(self, state):
        torch.manual_seed(0)
        super().__init__(6, 3)
        self.state = state

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


class ExtraOption(torch.optim.SGD):
    """An optimizer with an additional entry in its parameter groups."""

    def __init__(self, groups, state):
        super().__init__([{**group, "state": state} for group in groups], lr=0.1)


class UserClass:
    """A class that checkpoints cannot hold."""


PARTS = {
    "plugin stateful_plugin": lambda state: {"plugins": ["checkpoint", StatefulPlugin(state)]},
    "metric stateful": lambda state: {"metrics": {"stateful": StatefulMetric(state)}},
    "model": lambda state: {"model": lambda: ExtraState(state)},
    "optimizer": lambda state: {"optimizer": partial(ExtraOption, state=state)},
}


@pytest.mark.parametrize(("owner", "state", "what"), [
    (owner, state, what) for owner in PARTS for state, what in [
        (UserClass(), "has a .*UserClass"), (Fraction(1, 3), "has a fractions.Fraction"), ({"a": [UserClass]}, "has a builtins.type"),
        ([slice(3)], "has a builtins.slice"), (lambda: 0, "has a builtins.function")]
    if not (owner == "optimizer" and callable(state))])         # a function in a parameter group is the run's own, and is not saved
def test_state_that_a_checkpoint_cannot_hold_is_refused_before_training(owner, state, what, tmp_path):
    class FailInStep(Observer):
        @hookimpl
        def before_step(self, run: Run):
            raise AssertionError("a step")

    settings = PARTS[owner](state)
    with pytest.raises(UsageError, match=rf"^checkpoint: {owner}: its state {what}.*; a checkpoint holds tensors, numbers, text, None, "
                                         "and lists, tuples and dicts of them$"):
        run(tmp_path, **{**settings, "plugins": [*settings.get("plugins", ["checkpoint"]), FailInStep()]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("owner", [owner for owner in PARTS if owner != "plugin stateful_plugin"])
def test_without_the_plugin_checkpoint_any_state_is_allowed(owner, tmp_path):
    run(tmp_path, **PARTS[owner](lambda: 0), plugins=[])


@pytest.mark.parametrize("owner", [owner for owner in PARTS if owner != "plugin stateful_plugin"])
def test_state_that_a_checkpoint_can_hold_is_restored(owner, tmp_path):
    state = {"kept": [None, 1, 0.5, True, "text", b"bytes", (2, [3]), {1: {None: "a"}}, torch.arange(3), 2 ** 70, 1 + 2j, {4, 5}]}
    whole = run(tmp_path / "whole", epochs=2, **PARTS[owner](state))
    run(tmp_path / "part", epochs=1, **PARTS[owner](state))
    resumed = run(tmp_path / "part", epochs=2, resume=tmp_path / "part", **PARTS[owner](state if owner == "optimizer" else None))
    assert repr(resumed.history) == repr(whole.history)
    assert repr(resumed.model.state_dict()) == repr(whole.model.state_dict())
    assert repr(resumed.metric_fns) == repr(whole.metric_fns)


# The command line


@pytest.fixture
def loopctl(tmp_path, monkeypatch):
    """Call `loopctl run` in a temporary folder; returns its stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, status=0):
        first = [] if "--resume" in arguments else ["--model", "linear"]
        result = CliRunner().invoke(main, ["run", *first, *[str(argument) for argument in arguments]])
        assert result.exit_code == status, result.output
        return result.stdout, result.stderr
    return call


@pytest.mark.parametrize(("option", "value", "saved", "given"), [
    ("--lr", "0.5", "lr is 0.001", "0.5"), ("--model", "mlp", "model is linear", "mlp"), ("--seed", "1", "seed is 0", "1"),
    ("--optimizer", "sgd", "optimizer is adamw", "sgd"), ("--batch-size", "65", "batch_size is 64", "65"),
    ("--data", "digits:channels=3", "data is digits", "digits:channels=3"),
])
def test_resuming_with_other_options_is_refused_in_one_line(option, value, saved, given, loopctl, tmp_path):
    loopctl("--epochs", 1, "--out", "a")
    before = contents(tmp_path)
    out, errors = loopctl("--resume", "a", "--epochs", 2, option, value, status=2)
    assert errors == f"error: resume: a/checkpoints/step-00000023.pt is of another run: {saved} in the checkpoint and {given} in this run\n"
    assert out == ""
    assert contents(tmp_path) == before


@pytest.mark.parametrize("change", [[], ["--workers", "1"], ["--device", "cpu"], ["--lr", "1e-3"], ["--seed", "0"]], ids=" ".join)
def test_options_that_may_change_on_resume(change, loopctl, tmp_path):
    """Tested with a resume within an epoch."""
    Path("kill.py").write_text(
        "from loopctl import hookimpl\nclass Kill:\n    @hookimpl(trylast=True)\n    def safe_point(self, run):\n"
        "        if run.attempts == 30 and not run.resume: raise KeyboardInterrupt\n")
    plugins = ["--plugin", "kill.py:Kill", "--plugin", "checkpoint:every_steps=10"]
    loopctl("--epochs", 3, "--out", "whole", "--plugin", "checkpoint:every_steps=10", "--without", "progress")
    _, errors = loopctl("--epochs", 2, "--out", "a", *plugins, status=130)
    assert errors == "interrupted; to go on:\nloopctl run --resume a\n"
    loopctl("--resume", "a", "--epochs", 3, *change)
    for file in ("weights.safetensors", "metrics.csv"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_checkpoint_copied_from_another_run_is_refused(loopctl, tmp_path):
    """Model, data and checksum match; only the seed differs."""
    loopctl("--epochs", 1, "--out", "a")
    loopctl("--epochs", 2, "--out", "b", "--seed", 1)
    shutil.copy("b/checkpoints/step-00000046.pt", "a/checkpoints")
    before = contents(tmp_path)
    _, errors = loopctl("--resume", "a", "--epochs", 3, status=2)
    assert errors == "error: resume: a/checkpoints/step-00000046.pt is of another run: seed is 1 in the checkpoint and 0 in this run\n"
    assert contents(tmp_path) == before


def test_a_finished_run_without_checkpoints_cannot_be_resumed(loopctl, tmp_path):
    loopctl("--epochs", 1, "--out", "a")
    shutil.rmtree("a/checkpoints")
    before = contents(tmp_path)
    _, errors = loopctl("--resume", "a", "--epochs", 3, status=2)
    assert errors == "error: --resume a: this run is finished and has no checkpoint to resume from; start a new run\n"
    assert contents(tmp_path) == before
