"""What Weights & Biases is given. Most tests have a stand-in for the library, which records calls; the last one has the library."""
import struct
import sys
from types import SimpleNamespace

import pytest
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()


class Session:
    def __init__(self, arguments):
        self.arguments, self.logged, self.axes, self.code = arguments, [], [], None

    def define_metric(self, name, step_metric=None):
        self.axes.append((name, step_metric))

    def log(self, values):                  # not `step`, which wandb refuses where it goes back
        self.logged.append(values)

    def finish(self, exit_code):
        self.code = exit_code


@pytest.fixture
def sessions(monkeypatch):
    """The sessions that a stand-in for wandb is asked to start."""
    found = []

    def init(**arguments):
        found.append(Session(arguments))
        return found[-1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **settings: settings))
    return found


def points(*sessions):
    """The values by name and step. Of a step that is logged twice both values are the same."""
    found = {}
    for values in (values for session in sessions for values in session.logged):
        for name, value in values.items():
            assert found.setdefault(name, {}).setdefault(values["step"], value) == value, (name, values)
    return found


class Watch:
    def __init__(self):
        self.losses, self.rates = {}, {}

    @hookimpl
    def after_step(self, run: Run):
        if run.attempts == 1 or run.attempts % 3 == 0:
            self.losses[run.attempts] = run.loss.item()
            self.rates[run.attempts] = float(run.optimizer.param_groups[1]["lr"])


def test_metrics_losses_and_rates_have_the_steps_of_the_run(net, batches, valid, sgd, tmp_path, sessions):
    watch = Watch()
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=2, out=tmp_path / "first",
              plugins=["wandb:project=mine,every_steps=3", "layerwise_lr:decay=0.5", "cosine:by=step", "clip", watch])
    session, = sessions
    found = points(session)
    for name in ("train_loss", "val_loss", "grad_norm"):
        assert found[name] == {row["step"]: row[name] for row in run.history}
    assert (found["step_loss"], found["lr_layer 1"]) == (watch.losses, watch.rates)
    assert session.axes == [("step", None), ("*", "step")]
    asked = {key: session.arguments[key] for key in ("project", "name", "mode", "resume", "dir", "reinit")}
    assert asked == {"project": "mine", "name": "first", "mode": None, "resume": "allow", "dir": str(tmp_path / "first"), "reinit": "create_new"}
    assert session.arguments["config"]["epochs"] == 2
    assert any(spec.startswith("clip") for spec in session.arguments["config"]["plugin"])
    assert session.code == 0


class Kill:
    def __init__(self, at, error):
        self.at, self.error = at, error

    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == self.at:
            raise self.error


def test_a_resumed_run_continues_the_same_run_and_its_points_fall_on_the_old_ones(net, batches, valid, clone, sgd, tmp_path, sessions):
    """Others' steps go back after a resume, and wandb drops what comes then: "Step must only increase in log calls"."""
    def train(model, out, *more, **settings):
        return fit(model, cross_entropy, sgd, batches, valid, epochs=2, seed=1, out=out,
                   plugins=["checkpoint:every_steps=5", "wandb:every_steps=1", *more], **settings)

    train(clone(net), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(clone(net), tmp_path / "cut", Kill(13, KeyboardInterrupt()))
    train(net, tmp_path / "cut", resume=tmp_path / "cut")
    whole, first, second = sessions
    assert first.arguments["id"] == second.arguments["id"] != whole.arguments["id"]
    assert second.logged[0]["step"] == 11
    assert points(first, second) == points(whole)


@pytest.mark.parametrize(("error", "code"), [(RuntimeError("an accident"), 1), (KeyboardInterrupt(), 1), (SystemExit(143), 143)], ids=str)
def test_after_an_error_the_run_is_finished_and_marked_as_failed(net, batches, sgd, tmp_path, sessions, error, code):
    with pytest.raises(type(error)):
        fit(net, cross_entropy, sgd, batches, plugins=["wandb:every_steps=1", Kill(3, error)], out=tmp_path)
    assert sessions[0].code == code
    assert [values["step"] for values in sessions[0].logged] == [1, 2, 3]


def test_a_service_that_is_away_costs_no_training_and_is_still_finished(net, batches, sgd, tmp_path, sessions, caplog):
    class Away:
        @hookimpl
        def before_step(self, run: Run):
            if run.attempts == 2:
                sessions[0].log = None

    run = fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["wandb:every_steps=1", Away()], out=tmp_path)
    assert run.epoch == 2
    assert sessions[0].code == 0
    assert [" cannot be written ('NoneType' object is not callable); nothing more is" in text for text in caplog.messages] == [True]


def test_a_run_that_wandb_does_not_start_is_refused_before_any_step(net, batches, sgd, tmp_path, monkeypatch):
    def init(**arguments):
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=dict))
    with pytest.raises(UsageError, match=r"^wandb: wandb cannot start a run \(No API key configured.*\); log in with `wandb login`, or use mode=offline$"):
        fit(net, cross_entropy, sgd, batches, plugins=["wandb", Kill(0, AssertionError("a step"))], out=tmp_path)


def test_without_wandb_it_says_how_to_get_it(net, batches, sgd, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"^wandb: wandb is not installed; install it with: pip install 'loopctl\[wandb\]'$"):
        fit(net, cross_entropy, sgd, batches, plugins=["wandb"], out=tmp_path)


def test_a_folder_that_cannot_be_written_is_refused(net, batches, sgd, tmp_path, sessions):
    """wandb itself writes to a temporary folder then, where nobody looks for an offline run."""
    (tmp_path / "wandb").write_text("a file")
    with pytest.raises(UsageError, match=r"wandb: .*wandb cannot be written"):
        fit(net, cross_entropy, sgd, batches, plugins=["wandb"], out=tmp_path)


def records(file):
    """The records of an offline run, which are in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, part = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
        _, length, kind = struct.unpack("<IHB", content[place:place + 7])
        part += content[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):                  # a whole record, or the end of one
            yield Record.FromString(part)
            part = b""


def test_the_library_itself_writes_offline_runs_into_the_folder_of_the_run(net, batches, sgd, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs wandb: pip install 'loopctl[wandb]'")
    for variable, value in (("WANDB_SILENT", "true"), ("WANDB_CACHE_DIR", str(tmp_path)), ("WANDB_CONFIG_DIR", str(tmp_path))):
        monkeypatch.setenv(variable, value)
    out = tmp_path / "out"
    plugins = ["checkpoint:every_steps=5", "wandb:mode=offline,every_steps=4"]
    with pytest.raises(RuntimeError, match="an accident"):
        fit(net, cross_entropy, sgd, batches, plugins=[*plugins, Kill(7, RuntimeError("an accident"))], out=out)
    fit(net, cross_entropy, sgd, batches, plugins=plugins, out=out, resume=out)
    ids, steps, codes = set(), [], set()
    for file in out.glob("wandb/offline-run-*/run-*.wandb"):
        for record in records(file):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            for item in record.history.item if record.HasField("history") else ():
                steps += [int(item.value_json)] if (item.key or item.nested_key[0]) == "step" else []
            if record.HasField("exit"):
                codes.add(record.exit.exit_code)
    assert len(ids) == 1
    assert sorted(steps) == [1, 4, 8, 8]
    assert codes == {0, 1}
