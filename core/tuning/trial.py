"""One trial: train a copy of a run for a few steps with a composition, and measure its speed, memory and losses."""
from __future__ import annotations

import copy
import gc
import logging
import re
import signal
import threading
import warnings
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from loopctl.checkpoint.state import acts_in_training
from loopctl.composition.compose import compose
from loopctl.data.batch import length_or_none, sample_count
from loopctl.data.limits import limited
from loopctl.errors import UsageError, one_line
from loopctl.global_settings import torch_settings
from loopctl.hooks import hookimpl
from loopctl.loop import fit
from loopctl.rng import rng_state, set_rng_state
from loopctl.run import Run
from loopctl.trial_run import copy_function, copy_optimizer, shared_objects
from loopctl.tuning.choices import Composition, optimizer_with, plugins_of, settings_of

LEAST_STEPS = 6             # that are timed, however long they take
MANY_EPOCHS = 10_000        # so that a run with its own data does not end before its trial
SHORT_EPOCH = 50            # steps; of such epochs whole ones are timed
MOST_WAITING = 3            # times the seconds of a trial that it may take for two of them
GRACE, RETRY = 1.1, 5.0     # times its limit after which a trial is interrupted; seconds until that is tried again
IN_FLIGHT = 3               # steps that the host may be ahead of the device


class OutOfTime(BaseException):
    """A trial took longer than it may. Not an Exception, which code that tries to compile a model would catch."""


@dataclass
class Result:
    """What a trial has shown.

    rate: samples per second, in the middle half of the steps; NaN where it could not be measured
    memory: the peak in bytes, on CUDA of torch's tensors, elsewhere of this process; NaN if unknown
    losses: of the steps
    draws: whether the steps drew random numbers of torch
    seconds: how long all of it took, preparation and compilation included
    reason: why there is no rate
    """

    rate: float = nan
    memory: float = nan
    losses: list[float] = field(default_factory=list)
    draws: bool = False
    seconds: float = 0.0
    reason: str = ""


class Repeated:
    """The same few batches again and again, `length` of them in a pass.

    shorter: the second batch of a pass, if not None: smaller, as the last one of an epoch is, for which a compiler
        compiles anew
    """

    num_workers = 1             # as of a loader with workers: reading draws no random numbers, so it may be prefetched

    def __init__(self, batches: list[Any], length: int, shorter: Any = None) -> None:
        self.batches, self.length, self.shorter = batches, length, shorter

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.length):
            yield self.shorter if number == 1 and self.shorter is not None else self.batches[number % len(self.batches)]


@dataclass(eq=False)
class Clock:
    """A plugin that measures the steps of a trial, and leaves the run after enough of them.

    warmup: steps that are not timed
    seconds: how long steps are timed; at least `LEAST_STEPS` are
    slowest: samples per second below which it is known after half of the steps that the trial is of no use
    noise: by how much the weights are changed at first, relatively and at random
    whole_epochs: the first epoch is not timed either, and whole ones are
    deadline: the time at which the run is left in any case
    """

    warmup: int
    seconds: float
    slowest: float = 0.0
    noise: float = 0.0
    whole_epochs: bool = False
    deadline: float = inf
    observer_only = True
    capturable = True

    def __post_init__(self) -> None:
        self.losses: list[Any] = []
        self.samples: list[int] = []            # of each timed step
        self.times: list[float] = []            # at which steps were done, from the last one of the warmup on
        self.ends: list[Any] = []               # CUDA events of these
        self.away = 0.0                         # seconds of evaluations since the last step
        self.epoch_ends: list[tuple[float, int]] = []       # when, and how many samples were timed by then
        self.random: Any = None                 # the state of torch's random numbers after the first step
        self.draws = False

    @hookimpl
    @torch.no_grad()
    def train_start(self, run: Run) -> None:
        if self.noise:
            generator = torch.Generator(run.device).manual_seed(0)
            for weight in run.model.parameters():
                if weight.is_floating_point():
                    signs = torch.randint(-1, 2, weight.shape, generator=generator, device=weight.device)
                    weight.mul_(1 + self.noise * signs)

    @hookimpl
    def after_step(self, run: Run) -> None:
        if run.attempts <= 2:                   # in between no graph is captured and nothing is rehearsed
            state = torch_rng_state(run.device)
            self.draws, self.random = self.random is not None and not torch.equal(state, self.random), state
        if run.loss is not None:
            self.losses.append(run.loss.detach().clone())     # a graph of the step overwrites its own
        if perf_counter() > self.deadline:
            run.leave = "the time is over"
        if run.attempts < self.warmup or (self.whole_epochs and not run.epoch):
            return
        samples = sum(map(sample_count, run.batches))
        self.note_end(run.device)
        if len(self.times) == 1:
            return
        self.samples.append(samples)
        timed, spent = len(self.samples), self.times[-1] - self.times[0]
        if self.whole_epochs and len(self.epoch_ends) < 2 and spent < MOST_WAITING * self.seconds:
            return
        hopeless = timed >= LEAST_STEPS // 2 and sum(self.samples) < self.slowest * spent
        if (timed >= LEAST_STEPS and spent >= self.seconds) or hopeless:
            run.leave = "the trial is over"

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        if self.samples:
            wait_for(run.device)
            self.epoch_ends.append((perf_counter() - self.away, sum(self.samples)))

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Generator[None, dict[str, Any], dict[str, Any]]:
        wait_for(run.device)
        start = perf_counter()
        metrics = yield
        wait_for(run.device)
        self.away += perf_counter() - start
        return metrics

    def note_end(self, device: torch.device) -> None:
        """Note when the device is done with the step, without letting the host run far ahead or wait for it."""
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append(event)
            if len(self.ends) > IN_FLIGHT:
                self.ends[-1 - IN_FLIGHT].synchronize()
        else:
            wait_for(device)
        self.times.append(perf_counter() - self.away)

    def rate(self) -> float:
        """Samples per second: in the middle half of the steps; over whole epochs where some ended in between, because
        what happens at their start then counts, such as starting loader processes."""
        if not self.samples:
            return nan
        if self.epoch_ends:
            several = len(self.epoch_ends) > 1
            (start, before), (end, after) = ((self.epoch_ends[0], self.epoch_ends[-1]) if several else
                                             ((self.times[0], 0), (self.times[-1], sum(self.samples))))
            return (after - before) / (end - start)
        times = self.times
        if self.ends:
            self.ends[-1].synchronize()
            times = [self.ends[0].elapsed_time(end) / 1000 for end in self.ends]
        return middle_half(self.samples, [end - begin for begin, end in pairwise(times)])


def middle_half(samples: list[int], seconds: list[float]) -> float:
    """Samples per second without the fastest and the slowest quarter of the steps."""
    steps = sorted(zip(samples, seconds, strict=True), key=lambda step: step[1] / step[0])
    quarter = len(steps) // 4
    middle = steps[quarter:len(steps) - quarter]
    return sum(number for number, _ in middle) / sum(time for _, time in middle)


def torch_rng_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def wait_for(device: torch.device) -> None:
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


def run_trial(arguments: dict[str, Any], composition: Composition, train: Any, device: torch.device, seconds: float,
              limit: float, slowest: float = 0.0, noise: float = 0.0) -> Result:
    """Train a copy of the run that `arguments`, those of `fit`, describe, with `composition`.

    train: the training data
    seconds: how long steps are timed
    limit: how many seconds the trial may take altogether; what takes longer is given up
    slowest: samples per second below which the trial ends early
    noise: by how much the weights are changed at first, relatively and at random

    Nothing of the run changes: not its model, its random numbers nor torch's settings.
    """
    steps = inf if isinstance(train, Repeated) else length_or_none(train) or inf
    clock = Clock(max((choice.warmup for choice in composition), default=2), seconds, slowest, noise,
                  whole_epochs=steps <= SHORT_EPOCH, deadline=perf_counter() + limit)
    result, began = Result(), perf_counter()
    random = rng_state(arguments["train"], train)
    reset_peak_memory(device)
    with ExitStack() as kept:
        kept.callback(set_rng_state, random, arguments["train"], train)
        kept.callback(forget_compiled, composition)
        kept.enter_context(silence())
        folder = kept.enter_context(TemporaryDirectory(prefix="loopctl-"))
        kept.enter_context(torch_settings(**settings_of(composition)))
        try:
            with time_limit(GRACE * limit + 1):         # the clock leaves a run earlier, if its steps are done
                length = {"steps_per_epoch": None} if isinstance(train, Repeated) else {"epochs": MANY_EPOCHS}
                fit(**copied_arguments(arguments, composition, clock) | length | {"train": train, "out": folder})
                result.rate = clock.rate()
        except OutOfTime:
            pass
        except UsageError as error:
            result.reason = one_line(error)
        except Exception as error:              # one composition that fails is a line in the table
            result.reason = f"{type(error).__name__}: {one_line(error)}"
            del error
        if result.rate != result.rate and not result.reason:
            result.reason = f"gave no result within {limit:.0f} s"
        result.memory = peak_memory(device)
        if result.rate == result.rate:
            result.losses, result.draws = [float(loss) for loss in clock.losses], clock.draws
    result.seconds = perf_counter() - began
    del clock
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return result


def copied_arguments(arguments: dict[str, Any], composition: Composition, clock: Clock) -> dict[str, Any]:
    """The arguments of `fit` for a trial: copies of what training changes, without plugins that only observe."""
    memo: dict[int, Any] = {}
    for loader in (arguments["train"], arguments.get("valid")):
        memo |= shared_objects(loader)
    copied = dict(arguments)
    copied["model"] = copy.deepcopy(arguments["model"], memo)
    for name in ("loss_fn", "forward"):
        copied[name] = copy_function(arguments.get(name), memo)
    optimizer = arguments["optimizer"]
    copied["optimizer"] = (copy_optimizer(optimizer, memo) if isinstance(optimizer, torch.optim.Optimizer)
                           else optimizer_with(optimizer, composition))
    given = [plugin if isinstance(plugin, str) else copy.deepcopy(plugin, memo) for plugin in arguments["plugins"]]
    acting = [plugin for plugin in compose(given).plugins.values() if acts_in_training(plugin)]
    copied["plugins"] = [*acting, *plugins_of(composition), clock]
    valid = arguments.get("valid")
    copied["valid"] = None if valid is None or isinstance(valid, Iterator) else limited(valid, 1)
    return copied | {"max_steps": None, "eval_every": None, "eval_first": False, "resume": None}


@contextmanager
def silence() -> Iterator[None]:
    """Let a trial say nothing: the run that follows says it."""
    log = logging.getLogger("loopctl")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds; where signals are not available, never."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def out_of_time(number: int, frame: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, out_of_time)
    # Again and again, for Python drops an exception that is raised while it collects garbage or forks.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001), RETRY)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def forget_compiled(composition: Composition) -> None:
    """Free what torch.compile keeps of a trial, which a later run of a like model would use."""
    if any(text.startswith("compile") for text in plugins_of(composition)):
        torch._dynamo.reset()


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):                     # Linux only: the peak of this process starts anew
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """The peak since `reset_peak_memory`, in bytes; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        if match := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return 1024 * int(match[1])
    return nan
