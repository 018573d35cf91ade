"""Profiling with torch.profiler: a table of where the time of a step goes, and a trace."""
import logging
import os
from bisect import bisect
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import autograd
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.atomic_files import atomic_write, claim_output
from loopctl.model import summary
from loopctl.report.terminal import counted, say

log = logging.getLogger("loopctl")

# The hooks that are measured, and the names of their phases.
PHASES = {"compute_loss": "forward", "backward": "backward", "optimizer_step": "update", "evaluate": "evaluation"}
NAMES = ("data", "forward", "backward", "update", "evaluation", "other")


@dataclass(eq=False)
class Profile:
    """Profile some steps, print where their time goes, and write a trace to view in a browser.

    Same as torch.profiler. Open the trace at ui.perfetto.dev or in chrome://tracing. The table has the time of each
    phase and of the most expensive operators in a step, on the host and, with CUDA, of the kernels that they launched.
    The overhead of profiling is included.

    The phase data is the time between two steps: loading, collating, moving to the device. update is the optimizer and
    the work on gradients: clearing, unscaling, clipping. other is the work of plugins between steps, such as saving. In
    a resumed run, steps are counted from the resume; if its trace exists already, nothing is recorded.

    start: steps before recording, for warmup
    steps: number of steps to record
    path: trace file, a .json file relative to the run's folder; it must not exist yet
    """

    start: int = 5
    steps: int = 10
    path: str = "trace.json"
    capturable: ClassVar[bool] = True
    rank_zero_only: ClassVar[bool] = True
    topic = "logging and reports"

    def __post_init__(self) -> None:
        for name, minimum in (("start", 0), ("steps", 1)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} is at least {minimum}, not {getattr(self, name)}")
        if not self.path.endswith(".json"):
            raise ValueError(f"path is a .json file, not {self.path!r}")

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        self.done, self.due = 0, True           # steps since the start or the resume; whether to record, still
        self.profiler: Any = None
        # After an exception these stop the profiler, restore the hooks and close the open range.
        with ExitStack() as self.recording, ExitStack() as self.data_range:
            result = yield
            if self.profiler and self.done > self.start:
                self.finish(run)
            elif self.due:
                say(f"profile: nothing was recorded, because the run ended after {counted(self.done, 'step')}; "
                    "pass start=0")
        return result

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.file = run.out / self.path
        claim_output(self.file, resumed=bool(run.resume))
        self.due = not self.file.exists()
        if self.due and self.start + self.steps > run.planned_steps:
            raise UsageError(f"cannot record steps {self.start + 1} to {self.start + self.steps} of a run that has "
                             f"{run.planned_steps}; pass start=0,steps={run.planned_steps}, or fewer")
        if autograd._profiler_enabled() or any(isinstance(other, Profile) and other is not self
                                               for other in run.hook.plugins.values()):
            raise UsageError("another profiler is in use, and torch allows one at a time; leave out one of them")

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if self.due and self.done == self.start and not self.profiler:
            self.begin(run)
            self.data_range.enter_context(record_function("data"))

    @hookimpl
    def before_step(self) -> None:
        if self.profiler:
            self.data_range.close()

    @hookimpl
    def after_step(self, run: Run) -> None:
        self.done += 1
        if self.profiler and self.done == self.start + self.steps:
            self.finish(run)
        elif self.due and self.done == self.start:
            self.begin(run)

    def begin(self, run: Any) -> None:
        """Start the profiler, and record each phase as a range of that name."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")          # no log of the profiler on stderr
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (run.device.type == "cuda")]
        # acc_events changes nothing in a single cycle, of which torch 2.9 to 2.12 would warn that cycles are cleared.
        self.profiler = self.recording.enter_context(profile(activities=activities, acc_events=True))
        # Wrap the hooks of this run only while recording: permanent wrappers would cost microseconds in every step.
        wrapped = {name: in_range(phase, getattr(run.hook, name)) for name, phase in PHASES.items()}
        wrapped["safe_point"] = self.then_data(run.hook.safe_point)
        for name, hook in wrapped.items():
            self.recording.callback(setattr, run.hook, name, getattr(run.hook, name))
            setattr(run.hook, name, hook)

    def then_data(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """`hook`, which is the last of a step, followed by the range "data", which ends when the next step begins."""
        def call(**arguments: Any) -> None:
            self.data_range.close()
            hook(**arguments)
            self.data_range.enter_context(record_function("data"))
        return call

    def finish(self, run: Any) -> None:
        """Stop the profiler, print the table, and write the trace."""
        self.data_range.close()
        self.recording.close()
        profiler, self.profiler, self.due = self.profiler, None, False
        first = run.attempts - (self.done - self.start) + 1
        # print works together with a live progress bar.
        say(summary.render(table(profiler, first, run.attempts, run.device.type == "cuda")))
        try:
            with atomic_write(self.file) as temporary:
                profiler.export_chrome_trace(str(temporary))
        except OSError as error:
            log.warning("profile: %s cannot be written (%s)", self.file, error.strerror)
        else:
            say(f"trace: {self.file}, for ui.perfetto.dev or chrome://tracing")


def in_range(phase: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook`, recorded as a range named `phase` in the trace."""
    def call(**arguments: Any) -> Any:
        with record_function(phase):
            return hook(**arguments)
    return call


def timeline(ranges: Iterable[tuple[float, float, str]]) -> list[tuple[float, str]]:
    """The times at which the phase changes, each with the new phase, from nested ranges (start, end, name).

    The innermost range decides, except that everything in an evaluation is evaluation.

    ranges: sorted by start, outer ranges first
    """
    changes: list[tuple[float, str]] = []
    open_ranges: list[tuple[float, str]] = [(float("inf"), "other")]
    for start, end, name in [*ranges, (float("inf"), 0.0, "")]:
        while len(open_ranges) > 1 and open_ranges[-1][0] <= start:
            closed, _ = open_ranges.pop()
            changes.append((closed, open_ranges[-1][1]))
        if name:
            open_ranges.append((end, "evaluation" if open_ranges[-1][1] == "evaluation" else name))
            changes.append((start, open_ranges[-1][1]))
    return changes


def phase_times(events: Iterable[Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The microseconds of each phase until the end of the last step: on the host, and of the kernels launched in it."""
    host_events = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = sorted((event.time_range.start, -event.time_range.end, event.name) for event in host_events
                    if event.is_user_annotation and event.name in NAMES)
    changes = timeline((start, -end, name) for start, end, name in ranges)
    last = max((-end for _, end, name in ranges if name == "update"), default=0.0)
    host, device = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for (start, name), (end, _) in pairwise(changes):
        host[name] += max(min(end, last) - start, 0.0)
    for event in host_events:   # assigned by time, because autograd launches the kernels of CUDA from another thread
        time = event.time_range.start
        if event.kernels and changes[0][0] <= time <= last:
            # A range has an artificial kernel of the same name, which spans all kernels launched in it.
            device[changes[bisect(changes, time, key=lambda change: change[0]) - 1][1]] += sum(
                kernel.duration for kernel in event.kernels if kernel.name != event.name)
    return host, device


def table(profiler: profile, first: int, last: int, cuda: bool) -> Any:
    """A rich table of steps `first` to `last`: mean times of the phases, and of the most expensive operators."""
    from rich.box import SIMPLE
    from rich.table import Table

    count, times = last - first + 1, phase_times(profiler.events() or ())
    totals = [sum(time.values()) for time in times]
    headings = ["Calls", "Host, ms", "Share", *["Device, ms", "Share"] * cuda]
    report = Table(f"Steps {first} to {last}, mean", *headings, box=SIMPLE, pad_edge=False)
    for column in report.columns[1:]:
        column.justify = "right"

    def add(name: str, host: float, device: float, calls: float | None = None) -> None:
        cells = [f"{time / count / 1000:,.3f}" for time in (host, device)]
        shares = [f"{time / totals[0]:.1%}" for time in (host, device)]         # of the step's time on the host
        row = [cells[0], shares[0], cells[1], shares[1]][:4 if cuda else 2]
        report.add_row(name, f"{calls / count:.3g}" if calls else "", *row)

    for name in NAMES:
        if name != "evaluation" or times[0][name]:
            add(name, times[0][name], times[1][name])
    report.add_section()
    add("all", *totals)
    report.add_section()
    operators = [operator for operator in profiler.key_averages() if operator.device_type == DeviceType.CPU
                 and "::" in operator.key and not operator.key.startswith("autograd::")]
    operators.sort(key=lambda one: one.self_device_time_total if cuda else one.self_cpu_time_total, reverse=True)
    for operator in operators[:8]:
        add(operator.key, operator.self_cpu_time_total, operator.self_device_time_total, operator.count)
    return report
