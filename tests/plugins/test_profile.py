"""What profile records, that a run is the same with it, and that nothing stays on."""
import json
import re
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.composition.compose import compose
from loopctl.plugins.profile import PHASES, spent, timeline

cross_entropy = nn.CrossEntropyLoss()


def train(model, sgd, batches, out, *plugins, **options):
    return fit(model, cross_entropy, sgd, batches, plugins=plugins, seed=1, out=out, **options)


def ranges(file):
    """How often the trace has each phase."""
    names = [event["name"] for event in json.loads(file.read_text())["traceEvents"] if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in ("data", "forward", "backward", "update", "evaluation")}


def rows(text):
    """The cells of the table's rows, by the first one."""
    return {cells[0].strip(): cells[1:] for line in text.splitlines() if len(cells := re.split(r"\s{2,}", line.strip())) > 1}


def test_bit_for_bit_by_hand(net, batches, valid, clone, same, sgd, tmp_path):
    other = clone(net)
    train(net, sgd, batches, tmp_path, "profile:start=3,steps=9", valid=valid, epochs=2)
    here = torch.get_rng_state()
    torch.manual_seed(1)
    optimizer = sgd(other.parameters())
    for _ in range(2):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(other(input), target).backward()
            optimizer.step()
    same(net, other)
    assert torch.equal(here, torch.get_rng_state())


def test_the_trace_and_the_table(net, batches, sgd, tmp_path, capsys):
    train(net, sgd, batches, tmp_path, "profile:start=2,steps=2", "accumulate:every=2")
    assert ranges(tmp_path / "trace.json") == {"data": 2, "forward": 4, "backward": 4, "update": 2, "evaluation": 0}
    text = capsys.readouterr().out
    assert text.splitlines()[1].split("  ")[0].strip() == "Steps 3 to 4, mean"
    found = rows(text)
    assert list(found)[1:7] == ["data", "forward", "backward", "update", "other", "all"]
    times = [float(found[name][0]) for name in list(found)[1:7]]
    assert all(time > 0 for time in times[:4])
    assert sum(times[:5]) == pytest.approx(times[5], abs=0.004)             # they are rounded
    assert found["all"][1] == "100.0%"
    assert found["aten::addmm"][0] == "4"                                   # two layers, two micro-batches
    assert text.splitlines()[-1] == f"trace: {tmp_path}/trace.json, for ui.perfetto.dev or chrome://tracing"


class Look:
    """Writes down before which steps the hooks are wrapped."""

    def __init__(self):
        self.wrapped, self.running = [], []

    @hookimpl
    def train_start(self, run: Run):
        self.plain = self.hooks(run)

    @hookimpl
    def before_step(self, run: Run):
        self.wrapped.append(sum(one is not other for one, other in zip(self.hooks(run), self.plain, strict=True)))
        self.running.append(torch.autograd._profiler_enabled())

    def hooks(self, run):
        return [getattr(run.hook, name) for name in (*PHASES, "safe_point")]


@pytest.mark.parametrize(("start", "steps"), [(0, 1), (0, 8), (2, 3), (7, 1), (6, 6), (8, 8), (15, 1)])
def test_other_steps_are_as_without(plain, batches, sgd, tmp_path, start, steps):
    look = Look()
    run = train(plain, sgd, batches, tmp_path, f"profile:start={start},steps={steps}", look, epochs=2)
    assert look.wrapped == [5 * (start <= step < start + steps) for step in range(16)]
    assert look.running == [wrapped > 0 for wrapped in look.wrapped]
    assert look.hooks(run) == look.plain
    found = ranges(tmp_path / "trace.json")
    assert found["update"] == steps
    assert found["data"] == steps + (start <= 8 < start + steps)            # the end of an epoch has a safe_point of its own


def test_evaluation_counts_as_such(plain, batches, valid, sgd, tmp_path, capsys):
    class Slow:
        @hookimpl
        def compute_loss(self, run: Run, batch):
            if not run.model.training:
                time.sleep(0.05)
            return run.loss_fn(run.network(batch[0]), batch[1])

    train(plain, sgd, batches, tmp_path, "profile:start=6,steps=4", Slow(), valid=valid, epochs=2)
    found = rows(capsys.readouterr().out)
    assert ranges(tmp_path / "trace.json")["evaluation"] == 1
    waits = sorted((event["ts"], event["ts"] + event["dur"]) for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
                   if event["name"] == "data")
    assert all(end <= start for (_, end), (start, _) in pairwise(waits))     # one ends before the next begins
    assert float(found["evaluation"][0]) >= 2 * 50 / 4
    assert float(found["forward"][0]) < 2 * 50 / 4


def test_what_plugins_do_after_a_step_is_no_data(plain, batches, sgd, tmp_path, capsys):
    class Slow:
        @hookimpl
        def after_step(self):
            time.sleep(0.02)

        @hookimpl
        def safe_point(self):
            time.sleep(0.02)

    train(plain, sgd, batches, tmp_path, "profile:start=2,steps=4", Slow())
    found = rows(capsys.readouterr().out)
    assert float(found["data"][0]) < 20 <= float(found["other"][0])


def test_what_a_phase_is():
    assert timeline([(0, 10, "data"), (10, 50, "update"), (12, 20, "forward"), (20, 30, "backward"), (60, 90, "evaluation"),
                     (65, 80, "forward"), (90, 91, "data")]) == [
        (0, "data"), (10, "other"), (10, "update"), (12, "forward"), (20, "update"), (20, "backward"), (30, "update"),
        (50, "other"), (60, "evaluation"), (65, "evaluation"), (80, "evaluation"), (90, "other"), (90, "data"), (91, "other")]


def event(name, start, end, *kernels, annotation=False, device=DeviceType.CPU):
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end), is_user_annotation=annotation, device_type=device,
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels])


def test_time_of_host_and_device():
    """As CUDA's events are: kernels by the operator that started them, in the backward pass from another thread."""
    host, device = spent([
        event("data", 0, 10, annotation=True),
        event("aten::copy_", 5, 6, ("copy", 3.0)),
        event("update", 10, 100, annotation=True),
        event("forward", 20, 40, ("forward", 500.0), annotation=True),      # the range's own span on the device
        event("forward", 300, 800, device=DeviceType.CUDA, annotation=True),
        event("aten::mm", 21, 25, ("gemm", 100.0), ("reduce", 1.0)),
        event("backward", 40, 70, annotation=True),
        event("aten::mm", 45, 46, ("gemm", 200.0)),
        event("gemm", 300, 400, device=DeviceType.CUDA),
        event("aten::add_", 90, 91, ("add", 7.0)),
        event("data", 102, 150, annotation=True),                           # after the last step
        event("aten::copy_", 110, 111, ("copy", 3.0)),
    ])
    assert host == {"data": 10, "forward": 20, "backward": 30, "update": 40, "evaluation": 0, "other": 0}
    assert device == {"data": 3, "forward": 101, "backward": 200, "update": 7, "evaluation": 0, "other": 0}


class Fail:
    """An accident where `step` steps are done, in the given hook."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, "compute_loss" if hook == "before_step" else "before_step", None)

    def fail(self, run):
        if run.step == self.step:
            raise RuntimeError("an accident")

    @hookimpl
    def before_step(self, run: Run):
        self.fail(run)

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        self.fail(run)
        return (yield)


@pytest.mark.parametrize("hook", ["before_step", "compute_loss"])
def test_after_an_accident_nothing_is_on(plain, batches, sgd, tmp_path, hook):
    look = Look()
    with pytest.raises(RuntimeError, match="an accident"):
        train(plain, sgd, batches, tmp_path, look, "profile:start=2,steps=3", Fail(hook, 3))
    assert look.wrapped[-2:] == [5, 5]
    assert not torch.autograd._profiler_enabled()
    assert not list(tmp_path.iterdir())


def test_after_an_accident_the_hooks_are_the_runs_own(plain, batches, sgd, tmp_path):
    class Keep:
        @hookimpl(wrapper=True)
        def train(self, run: Run):
            self.run, before = run, vars(run.hook).copy()
            try:
                return (yield)
            finally:
                assert vars(run.hook) == before

    with pytest.raises(RuntimeError, match="an accident"):
        train(plain, sgd, batches, tmp_path, Keep(), "profile:start=2,steps=3", Fail("compute_loss", 3))


class Stop:
    def __init__(self, step):
        self.step = step

    @hookimpl
    def after_step(self, run: Run):
        if run.step == self.step:
            run.stop = "enough"


def test_a_run_that_stops_early_says_what_was_recorded(plain, batches, valid, sgd, tmp_path, capsys):
    train(plain, sgd, batches, tmp_path, "profile:start=2,steps=5", Stop(4), valid=valid)
    text = capsys.readouterr().out
    assert "Steps 3 to 4, mean" in text
    assert "evaluation" not in rows(text)                                   # it comes after the last step
    assert ranges(tmp_path / "trace.json")["update"] == 2


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_stops_before_anything_is_recorded_says_so(plain, batches, sgd, tmp_path, capsys, stop):
    train(plain, sgd, batches, tmp_path, "profile:start=2,steps=5", Stop(stop))
    assert capsys.readouterr().out == f"profile: nothing is recorded, for the run ended after {stop} steps; pass start=0\n"
    assert not list(tmp_path.iterdir())
    assert not torch.autograd._profiler_enabled()


def test_a_run_that_goes_on(net, batches, clone, same, sgd, tmp_path, capsys):
    whole, plugins = clone(net), ["profile:start=2,steps=3", "checkpoint:every_steps=1"]
    train(whole, sgd, batches, tmp_path / "whole", *plugins)
    for at in (1, 6):
        with pytest.raises(RuntimeError, match="an accident"):
            train(clone(net), sgd, batches, tmp_path / str(at), *plugins, Fail("before_step", at))
    capsys.readouterr()

    once = clone(net)
    train(once, sgd, batches, tmp_path / "1", *plugins, resume=tmp_path / "1")
    same(once, whole)
    assert "Steps 4 to 6, mean" in capsys.readouterr().out                   # two steps to warm up, from the second on
    trace = (tmp_path / "6" / "trace.json").read_bytes()
    train(net, sgd, batches, tmp_path / "6", *plugins, resume=tmp_path / "6")
    same(net, whole)
    assert (tmp_path / "6" / "trace.json").read_bytes() == trace
    assert capsys.readouterr().out == ""


def test_it_may_be_added_to_a_run_that_goes_on(plain, batches, sgd, tmp_path):
    with pytest.raises(RuntimeError, match="an accident"):
        train(plain, sgd, batches, tmp_path, "checkpoint:every_steps=1", Fail("before_step", 3))
    train(plain, sgd, batches, tmp_path, "checkpoint:every_steps=1", "profile:start=1,steps=1", resume=tmp_path)
    assert ranges(tmp_path / "trace.json")["update"] == 1


def test_refusals(plain, batches, sgd, tmp_path):
    (tmp_path / "old.json").write_text("mine")
    (tmp_path / "folder.json").mkdir()
    for spec, message in {
        "profile": "profile: steps 6 to 15 are to be recorded, and the run has 8; pass start=0,steps=8, or fewer",
        "profile:start=1,steps=2,path=old.json": f"profile: {tmp_path}/old.json exists and is not overwritten; move it, or choose another path",
        "profile:start=1,steps=2,path=folder.json": f"profile: {tmp_path}/folder.json cannot be written (Is a directory); choose another path",
    }.items():
        with pytest.raises(UsageError) as refused:
            train(plain, sgd, batches, tmp_path, spec)
        assert str(refused.value) == message.replace("Is a directory", refused.value.args[0].partition("(")[2].partition(")")[0])
    assert (tmp_path / "old.json").read_text() == "mine"


def test_two_profilers_are_refused(plain, batches, sgd, tmp_path):
    message = "another profiler is there, and torch has one at a time; leave one of them out"
    with pytest.raises(UsageError, match=f"^profile: {message}"):
        train(plain, sgd, batches, tmp_path, "profile:start=0,steps=1", "profile:start=3,steps=1,path=other.json")
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(UsageError, match=message):
        train(plain, sgd, batches, tmp_path, "profile:start=0,steps=1")


@pytest.mark.parametrize(("spec", "message"), [
    ("start=-1", "start is at least 0, not -1"), ("steps=0", "steps is at least 1, not 0"),
    ("path=trace.gz", "path is a .json file, not 'trace.gz'")])
def test_wrong_options(spec, message):
    with pytest.raises(UsageError) as refused:
        compose([f"profile:{spec}"])
    assert str(refused.value) == f"profile: {message}"


def test_a_trace_that_cannot_be_written_ends_no_run(plain, batches, sgd, tmp_path, caplog, capsys):
    class InTheWay:
        @hookimpl
        def epoch_start(self):
            (tmp_path / "folder").touch()

    run = train(plain, sgd, batches, tmp_path, "profile:start=1,steps=2,path=folder/trace.json", InTheWay())
    assert run.step == 8
    assert re.fullmatch(r"profile: \S+/folder/trace.json cannot be written \(.+\)", caplog.messages[0])
    assert "Steps 2 to 3, mean" in (text := capsys.readouterr().out)
    assert "trace:" not in text


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_device_has_its_column(plain, batches, sgd, tmp_path, capsys):
    train(plain, sgd, batches, tmp_path, "profile:start=3,steps=4", device="cuda")
    found = rows(capsys.readouterr().out)
    for phase in ("data", "forward", "backward", "update"):
        assert float(found[phase][2]) > 0
    assert '"cat": "kernel"' in (tmp_path / "trace.json").read_text()
