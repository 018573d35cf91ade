"""The plugin profile: what it records, that the run does not change, and that profiling always stops."""
import json
import re
import time
import warnings
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.composition.compose import compose
from loopctl.plugins import profile as profile_plugin
from loopctl.plugins.profile import PHASES, phase_times, timeline

cross_entropy = nn.CrossEntropyLoss()


def train(model, sgd, batches, out, *plugins, **options):
    return fit(model, cross_entropy, sgd, batches, plugins=plugins, seed=1, out=out, **options)


def ranges(file):
    """The number of ranges of each phase in the trace."""
    names = [event["name"] for event in json.loads(file.read_text())["traceEvents"] if event.get("cat") == "user_annotation"]
    return {name: names.count(name) for name in ("data", "forward", "backward", "update", "evaluation")}


def rows(text):
    """The rows of the printed table: the first cell, and the list of the others."""
    return {cells[0].strip(): cells[1:] for line in text.splitlines() if len(cells := re.split(r"\s{2,}", line.strip())) > 1}


def test_equals_a_plain_loop_to_the_bit(net, batches, valid, clone, same, sgd, tmp_path):
    other = clone(net)
    train(net, sgd, batches, tmp_path, "profile:start=3,steps=9", valid=valid, epochs=2)
    rng_state = torch.get_rng_state()
    torch.manual_seed(1)
    optimizer = sgd(other.parameters())
    for _ in range(2):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(other(input), target).backward()
            optimizer.step()
    same(net, other)
    assert torch.equal(rng_state, torch.get_rng_state())


def test_the_trace_and_the_table_have_all_phases(net, batches, sgd, tmp_path, capsys):
    train(net, sgd, batches, tmp_path, "profile:start=2,steps=2", "accumulate:every=2")
    assert ranges(tmp_path / "trace.json") == {"data": 2, "forward": 4, "backward": 4, "update": 2, "evaluation": 0}
    text = capsys.readouterr().out
    assert text.splitlines()[1].split("  ")[0].strip() == "Steps 3 to 4, mean"
    found = rows(text)
    assert list(found)[1:7] == ["data", "forward", "backward", "update", "other", "all"]
    times = [float(found[name][0]) for name in list(found)[1:7]]
    assert all(time > 0 for time in times[:4])
    assert sum(times[:5]) == pytest.approx(times[5], abs=0.004)             # times are rounded
    assert found["all"][1] == "100.0%"
    assert found["aten::addmm"][0] == "4"                                   # two layers, two micro-batches
    assert text.splitlines()[-1] == f"trace: {tmp_path}/trace.json, for ui.perfetto.dev or chrome://tracing"


class Recorder:
    """Records before each step how many hooks are wrapped, and whether a profiler runs."""

    def __init__(self):
        self.wrapped, self.running = [], []

    @hookimpl
    def train_start(self, run: Run):
        self.plain = self.hooks(run)

    @hookimpl
    def before_step(self, run: Run):
        self.wrapped.append(sum(hook is not plain for hook, plain in zip(self.hooks(run), self.plain, strict=True)))
        self.running.append(torch.autograd._profiler_enabled())

    def hooks(self, run):
        return [getattr(run.hook, name) for name in (*PHASES, "safe_point")]


@pytest.mark.parametrize(("start", "steps"), [(0, 1), (0, 8), (2, 3), (7, 1), (6, 6), (8, 8), (15, 1)])
def test_hooks_are_wrapped_only_in_recorded_steps(plain, batches, sgd, tmp_path, start, steps):
    recorder = Recorder()
    run = train(plain, sgd, batches, tmp_path, f"profile:start={start},steps={steps}", recorder, epochs=2)
    assert recorder.wrapped == [5 * (start <= step < start + steps) for step in range(16)]
    assert recorder.running == [wrapped > 0 for wrapped in recorder.wrapped]
    assert recorder.hooks(run) == recorder.plain
    found = ranges(tmp_path / "trace.json")
    assert found["update"] == steps
    assert found["data"] == steps + (start <= 8 < start + steps)            # the end of an epoch has one more safe_point


def test_forward_passes_of_evaluation_count_as_evaluation(plain, batches, valid, sgd, tmp_path, capsys):
    class SlowEvaluation:
        @hookimpl
        def compute_loss(self, run: Run, batch):
            if not run.model.training:
                time.sleep(0.05)
            return run.loss_fn(run.network(batch[0]), batch[1])

    train(plain, sgd, batches, tmp_path, "profile:start=6,steps=4", SlowEvaluation(), valid=valid, epochs=2)
    found = rows(capsys.readouterr().out)
    assert ranges(tmp_path / "trace.json")["evaluation"] == 1
    waits = sorted((event["ts"], event["ts"] + event["dur"]) for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
                   if event["name"] == "data")
    assert all(end <= start for (_, end), (start, _) in pairwise(waits))     # they do not overlap
    assert float(found["evaluation"][0]) >= 2 * 50 / 4
    assert float(found["forward"][0]) < 2 * 50 / 4


def test_the_work_of_plugins_after_a_step_is_not_data(plain, batches, sgd, tmp_path, capsys):
    class SlowPlugin:
        @hookimpl
        def after_step(self):
            time.sleep(0.02)

        @hookimpl
        def safe_point(self):
            time.sleep(0.02)

    train(plain, sgd, batches, tmp_path, "profile:start=2,steps=4", SlowPlugin())
    found = rows(capsys.readouterr().out)
    assert float(found["data"][0]) < 20 <= float(found["other"][0])


def test_the_innermost_range_decides_the_phase():
    assert timeline([(0, 10, "data"), (10, 50, "update"), (12, 20, "forward"), (20, 30, "backward"), (60, 90, "evaluation"),
                     (65, 80, "forward"), (90, 91, "data")]) == [
        (0, "data"), (10, "other"), (10, "update"), (12, "forward"), (20, "update"), (20, "backward"), (30, "update"),
        (50, "other"), (60, "evaluation"), (65, "evaluation"), (80, "evaluation"), (90, "other"), (90, "data"), (91, "other")]


def event(name, start, end, *kernels, annotation=False, device=DeviceType.CPU):
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end), is_user_annotation=annotation, device_type=device,
        kernels=[SimpleNamespace(name=kernel, duration=duration) for kernel, duration in kernels])


def test_kernel_times_are_assigned_to_the_phase_that_launched_them():
    """With events as CUDA has them: kernels belong to operators, which run in another thread in the backward pass."""
    host, device = phase_times([
        event("data", 0, 10, annotation=True),
        event("aten::copy_", 5, 6, ("copy", 3.0)),
        event("update", 10, 100, annotation=True),
        event("forward", 20, 40, ("forward", 500.0), annotation=True),      # the artificial kernel of a range
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
    """Raises an error in the given hook, when `step` steps are done."""

    def __init__(self, hook, step):
        self.step = step
        setattr(self, "compute_loss" if hook == "before_step" else "before_step", None)

    def fail(self, run):
        if run.step == self.step:
            raise RuntimeError("simulated failure")

    @hookimpl
    def before_step(self, run: Run):
        self.fail(run)

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        self.fail(run)
        return (yield)


@pytest.mark.parametrize("hook", ["before_step", "compute_loss"])
def test_profiling_stops_after_an_error(plain, batches, sgd, tmp_path, hook):
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="simulated failure"):
        train(plain, sgd, batches, tmp_path, recorder, "profile:start=2,steps=3", Fail(hook, 3))
    assert recorder.wrapped[-2:] == [5, 5]
    assert not torch.autograd._profiler_enabled()
    assert not list(tmp_path.iterdir())


def test_hooks_are_restored_after_an_error(plain, batches, sgd, tmp_path):
    class AssertRestored:
        @hookimpl(wrapper=True)
        def train(self, run: Run):
            self.run, before = run, vars(run.hook).copy()
            try:
                return (yield)
            finally:
                assert vars(run.hook) == before

    with pytest.raises(RuntimeError, match="simulated failure"):
        train(plain, sgd, batches, tmp_path, AssertRestored(), "profile:start=2,steps=3", Fail("compute_loss", 3))


class Stop:
    def __init__(self, step):
        self.step = step

    @hookimpl
    def after_step(self, run: Run):
        if run.step == self.step:
            run.stop = "stopped by the test"


def test_a_run_that_stops_early_reports_the_recorded_steps(plain, batches, valid, sgd, tmp_path, capsys):
    train(plain, sgd, batches, tmp_path, "profile:start=2,steps=5", Stop(4), valid=valid)
    text = capsys.readouterr().out
    assert "Steps 3 to 4, mean" in text
    assert "evaluation" not in rows(text)                                   # evaluation comes after the last step
    assert ranges(tmp_path / "trace.json")["update"] == 2


@pytest.mark.parametrize("stop", [1, 2])
def test_a_run_that_stops_before_recording_prints_a_hint(plain, batches, sgd, tmp_path, capsys, stop):
    train(plain, sgd, batches, tmp_path, "profile:start=2,steps=5", Stop(stop))
    assert capsys.readouterr().out == f"profile: nothing was recorded, because the run ended after {stop} step{'s' * (stop > 1)}; pass start=0\n"
    assert not list(tmp_path.iterdir())
    assert not torch.autograd._profiler_enabled()


def test_a_resumed_run_counts_steps_from_the_resume_and_keeps_an_existing_trace(net, batches, clone, same, sgd, tmp_path, capsys):
    whole, plugins = clone(net), ["profile:start=2,steps=3", "checkpoint:every_steps=1"]
    train(whole, sgd, batches, tmp_path / "whole", *plugins)
    for step in (1, 6):
        with pytest.raises(RuntimeError, match="simulated failure"):
            train(clone(net), sgd, batches, tmp_path / str(step), *plugins, Fail("before_step", step))
    capsys.readouterr()

    resumed = clone(net)
    train(resumed, sgd, batches, tmp_path / "1", *plugins, resume=tmp_path / "1")
    same(resumed, whole)
    assert "Steps 4 to 6, mean" in capsys.readouterr().out                   # two steps of warmup after the resume
    trace = (tmp_path / "6" / "trace.json").read_bytes()
    train(net, sgd, batches, tmp_path / "6", *plugins, resume=tmp_path / "6")
    same(net, whole)
    assert (tmp_path / "6" / "trace.json").read_bytes() == trace
    assert capsys.readouterr().out == ""


def test_it_can_be_added_to_a_resumed_run(plain, batches, sgd, tmp_path):
    with pytest.raises(RuntimeError, match="simulated failure"):
        train(plain, sgd, batches, tmp_path, "checkpoint:every_steps=1", Fail("before_step", 3))
    train(plain, sgd, batches, tmp_path, "checkpoint:every_steps=1", "profile:start=1,steps=1", resume=tmp_path)
    assert ranges(tmp_path / "trace.json")["update"] == 1


def test_too_many_steps_and_existing_files_are_refused(plain, batches, sgd, tmp_path):
    (tmp_path / "old.json").write_text("precious")
    (tmp_path / "folder.json").mkdir()
    for spec, message in {
        "profile": "profile: cannot record steps 6 to 15 of a run that has 8; pass start=0,steps=8, or fewer",
        "profile:start=1,steps=2,path=old.json": f"profile: {tmp_path}/old.json exists and is not overwritten; move it, or choose another path",
        "profile:start=1,steps=2,path=folder.json": f"profile: {tmp_path}/folder.json cannot be written (Is a directory); choose another path",
    }.items():
        with pytest.raises(UsageError) as refused:
            train(plain, sgd, batches, tmp_path, spec)
        assert str(refused.value) == message.replace("Is a directory", refused.value.args[0].partition("(")[2].partition(")")[0])
    assert (tmp_path / "old.json").read_text() == "precious"


def test_two_profilers_are_refused(plain, batches, sgd, tmp_path):
    message = "another profiler is in use, and torch allows one at a time; leave out one of them"
    with pytest.raises(UsageError, match=f"^profile: {message}"):
        train(plain, sgd, batches, tmp_path, "profile:start=0,steps=1", "profile:start=3,steps=1,path=other.json")
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(UsageError, match=message):
        train(plain, sgd, batches, tmp_path, "profile:start=0,steps=1")


@pytest.mark.parametrize(("spec", "message"), [
    ("start=-1", "start is at least 0, not -1"), ("steps=0", "steps is at least 1, not 0"),
    ("path=trace.gz", "path is a .json file, not 'trace.gz'")])
def test_wrong_options_are_refused(spec, message):
    with pytest.raises(UsageError) as refused:
        compose([f"profile:{spec}"])
    assert str(refused.value) == f"profile: {message}"


def test_a_trace_that_cannot_be_written_is_a_warning(plain, batches, sgd, tmp_path, caplog, capsys):
    class CreateFile:
        @hookimpl
        def epoch_start(self):
            (tmp_path / "folder").touch()

    run = train(plain, sgd, batches, tmp_path, "profile:start=1,steps=2,path=folder/trace.json", CreateFile())
    assert run.step == 8
    assert re.fullmatch(r"profile: \S+/folder/trace.json cannot be written \(.+\)", caplog.messages[0])
    assert "Steps 2 to 3, mean" in (text := capsys.readouterr().out)
    assert "trace:" not in text


def test_torch_does_not_warn_of_cycles_in_a_recording_of_one(plain, batches, sgd, tmp_path, monkeypatch):
    """torch 2.9 to 2.12 warn whenever recording begins, unless events are accumulated over cycles."""
    class WarnsOfCycles(profile):
        def prepare_trace(self):
            if not self.acc_events:
                warnings.warn("Warning: Profiler clears events at the end of each cycle.", stacklevel=2)
            super().prepare_trace()

    monkeypatch.setattr(profile_plugin, "profile", WarnsOfCycles)
    train(plain, sgd, batches, tmp_path, "profile:start=1,steps=2")
    assert ranges(tmp_path / "trace.json")["update"] == 2


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_table_has_device_times(plain, batches, sgd, tmp_path, capsys):
    train(plain, sgd, batches, tmp_path, "profile:start=3,steps=4", device="cuda")
    found = rows(capsys.readouterr().out)
    for phase in ("data", "forward", "backward", "update"):
        assert float(found[phase][2]) > 0
    assert '"cat": "kernel"' in (tmp_path / "trace.json").read_text()
