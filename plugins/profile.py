"""Where the time of a step goes."""
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

log = logging.getLogger("loopctl")

# The hooks whose time is told apart.
PHASES = {"compute_loss": "forward", "backward": "backward", "optimizer_step": "update", "evaluate": "evaluation"}
NAMES = ("data", "forward", "backward", "update", "evaluation", "other")


@dataclass(eq=False)
class Profile:
    """Record some steps, print where their time goes, and write a trace to look at in a browser.

    It is torch.profiler. The trace opens at ui.perfetto.dev and in chrome://tracing. The table has the time of each
    phase and of the costliest operators in a step, on the host and, on CUDA, of the kernels that they started; what
    profiling itself takes is in it.

    The phase data is what comes between two steps: loading, collating, moving to the device. update is the optimizer,
    and what is done with gradients before it: clearing, unscaling, clipping. other is what plugins do besides, such as
    saving. In a run that goes on, steps count from there; where its trace is there already, nothing is recorded.

    start: steps to pass before, in which everything warms up
    steps: how many to record
    path: the trace, a .json file relative to the run's folder; it must not exist yet
    """

    start: int = 5
    steps: int = 10
    path: str = "trace.json"
    capturable: ClassVar[bool] = True
    rank_zero_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("start", 0), ("steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is at least {least}, not {getattr(self, name)}")
        if not self.path.endswith(".json"):
            raise ValueError(f"path is a .json file, not {self.path!r}")

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        self.done, self.wanted = 0, True
        self.profiler: Any = None
        with ExitStack() as self.recording, ExitStack() as self.waiting:        # which end here after an exception
            result = yield
            if self.profiler and self.done > self.start:
                self.finish(run)
            elif self.wanted:
                print(f"profile: nothing is recorded, for the run ended after {self.done} steps; pass start=0")
        return result

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.file = run.out / self.path
        claim_output(self.file, resumed=bool(run.resume))
        self.wanted = not self.file.exists()
        if self.wanted and self.start + self.steps > run.planned_steps:
            raise UsageError(f"steps {self.start + 1} to {self.start + self.steps} are to be recorded, and the run has "
                             f"{run.planned_steps}; pass start=0,steps={run.planned_steps}, or fewer")
        if autograd._profiler_enabled() or any(isinstance(other, Profile) and other is not self
                                               for other in run.hook.plugins.values()):
            raise UsageError("another profiler is there, and torch has one at a time; leave one of them out")

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if self.wanted and self.done == self.start and not self.profiler:
            self.begin(run)
            self.waiting.enter_context(record_function("data"))

    @hookimpl
    def before_step(self) -> None:
        if self.profiler:
            self.waiting.close()

    @hookimpl
    def after_step(self, run: Run) -> None:
        self.done += 1
        if self.profiler and self.done == self.start + self.steps:
            self.finish(run)
        elif self.wanted and self.done == self.start:
            self.begin(run)

    def begin(self, run: Any) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")          # else it says on stderr what it does
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (run.device.type == "cuda")]
        self.profiler = self.recording.enter_context(profile(activities=activities))
        # The hooks are wrapped only now, in this run's own object: for good, they would cost every step microseconds.
        wrapped = {name: ranged(phase, getattr(run.hook, name)) for name, phase in PHASES.items()}
        wrapped["safe_point"] = self.before_data(run.hook.safe_point)
        for name, hook in wrapped.items():
            self.recording.callback(setattr, run.hook, name, getattr(run.hook, name))
            setattr(run.hook, name, hook)

    def before_data(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """`hook`, which comes last in a step, and then the range that ends where the next step begins."""
        def call(**arguments: Any) -> None:
            self.waiting.close()
            hook(**arguments)
            self.waiting.enter_context(record_function("data"))
        return call

    def finish(self, run: Any) -> None:
        self.waiting.close()
        self.recording.close()
        profiler, self.profiler, self.wanted = self.profiler, None, False
        first = run.attempts - (self.done - self.start) + 1
        # A live progress bar stays below what is printed.
        print(summary.render(table(profiler, first, run.attempts, run.device.type == "cuda")))
        try:
            with atomic_write(self.file) as aside:
                profiler.export_chrome_trace(str(aside))
        except OSError as error:
            log.warning("profile: %s cannot be written (%s)", self.file, error.strerror)
        else:
            print(f"trace: {self.file}, for ui.perfetto.dev or chrome://tracing")


def ranged(phase: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook`, as a range of that name in the trace."""
    def call(**arguments: Any) -> Any:
        with record_function(phase):
            return hook(**arguments)
    return call


def timeline(ranges: Iterable[tuple[float, float, str]]) -> list[tuple[float, str]]:
    """When which phase begins, from nested ranges of start, end and name: the innermost counts, and all of evaluation.

    ranges: by start, the outer one first.
    """
    marks: list[tuple[float, str]] = []
    around: list[tuple[float, str]] = [(float("inf"), "other")]
    for start, end, name in [*ranges, (float("inf"), 0.0, "")]:
        while len(around) > 1 and around[-1][0] <= start:
            ended, _ = around.pop()
            marks.append((ended, around[-1][1]))
        if name:
            around.append((end, "evaluation" if around[-1][1] == "evaluation" else name))
            marks.append((start, around[-1][1]))
    return marks


def spent(events: Iterable[Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The microseconds of each phase, up to the end of the last step: on the host, and of kernels it had started."""
    here = [event for event in events if event.device_type == DeviceType.CPU]
    ranges = sorted((event.time_range.start, -event.time_range.end, event.name) for event in here
                    if event.is_user_annotation and event.name in NAMES)
    marks = timeline((start, -end, name) for start, end, name in ranges)
    last = max((-end for _, end, name in ranges if name == "update"), default=0.0)
    host, device = dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 0.0)
    for (start, name), (end, _) in pairwise(marks):
        host[name] += max(min(end, last) - start, 0.0)
    for event in here:          # by time, for the backward pass of CUDA starts its kernels from a thread of its own
        at = event.time_range.start
        if event.kernels and marks[0][0] <= at <= last:
            # A range has a kernel of its own name, which is the time from its first real one to its last.
            device[marks[bisect(marks, at, key=lambda mark: mark[0]) - 1][1]] += sum(
                kernel.duration for kernel in event.kernels if kernel.name != event.name)
    return host, device


def table(profiler: profile, first: int, last: int, cuda: bool) -> Any:
    """The report of steps `first` to `last`: an average step's phases, and the operators that cost most."""
    from rich.box import SIMPLE
    from rich.table import Table

    count, times = last - first + 1, spent(profiler.events() or ())
    totals = [sum(time.values()) for time in times]
    headings = ["Calls", "Host, ms", "Share", *["Device, ms", "Share"] * cuda]
    report = Table(f"Steps {first} to {last}, mean", *headings, box=SIMPLE, pad_edge=False)
    for column in report.columns[1:]:
        column.justify = "right"

    def add(name: str, host: float, device: float, calls: float | None = None) -> None:
        cells = [f"{time / count / 1000:,.3f}" for time in (host, device)]
        shares = [f"{time / totals[0]:.1%}" for time in (host, device)]         # both of the time a step takes
        row = [cells[0], shares[0], cells[1], shares[1]][:4 if cuda else 2]
        report.add_row(name, f"{calls / count:.3g}" if calls else "", *row)

    for name in NAMES:
        if name != "evaluation" or times[0][name]:
            add(name, times[0][name], times[1][name])
    report.add_section()
    add("all", *totals)
    report.add_section()
    operators = [one for one in profiler.key_averages() if one.device_type == DeviceType.CPU
                 and "::" in one.key and not one.key.startswith("autograd::")]
    operators.sort(key=lambda one: one.self_device_time_total if cuda else one.self_cpu_time_total, reverse=True)
    for one in operators[:8]:
        add(one.key, one.self_cpu_time_total, one.self_device_time_total, one.count)
    return report
