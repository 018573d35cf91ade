"""The base class of schedules: where a schedule starts and ends, how far it is, and which number it moves."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, inf, prod
from typing import TYPE_CHECKING, Any, Literal

from loopctl.errors import UsageError, nearest
from loopctl.hooks import hookimpl
from loopctl.optim.duration import Duration
from loopctl.optim.group_numbers import Place, initial_key, read_number, scheduled_places, write_number

if TYPE_CHECKING:
    from loopctl.run import Run


@dataclass(eq=False, kw_only=True)
class Schedule:
    """A schedule that acts from `start` to `until`, and leaves the rate alone outside of them.

    A subclass implements `scale`, and has the option `by`: the unit of its positions, and of durations without one. If
    it has a `__post_init__`, that calls this one. It schedules the learning rate, or the number that `option` names.

    start: duration from the start of the run to that of the schedule, which has no effect before; rounded up to whole
        epochs or steps
    until: duration from the start of the run after which the schedule has no effect any more
    count_from: count the schedule's position, and a duration that is left out, from its own start, or from that of the
        run, so that it starts in its middle
    optimizer: of several optimizers, the name of the one whose rate is scheduled; all of them if left out
    option: what is scheduled: lr, or another number of the parameter groups in its place, such as weight_decay, or
        momentum, which is also the first of betas; every value of the schedule is then one of that number
    """

    start: Duration | None = None
    until: Duration | None = None
    count_from: Literal["start", "run"] = "start"
    optimizer: str = ""
    option: str = "lr"
    topic = "learning-rate schedules"           # the heading in `loopctl plugins`

    def __post_init__(self) -> None:
        if self.option != "lr":
            self.lr_scale = None            # type: ignore[assignment, method-assign]
            return
        self.before_step = None             # type: ignore[assignment, method-assign]
        if (self.start is None and self.until is None and not self.optimizer
                and type(self).check is Schedule.check):
            self.train_start = None         # type: ignore[assignment, method-assign]   # there is nothing to check

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.check(run)
        # One schedule sets the numbers of all, because their factors are multiplied.
        self.numbers = scheduled_numbers(run) if next(other_schedules(run), None) is self else []

    def check(self, run: Run) -> None:
        """Raise UsageError where the run has no epoch, step, optimizer or number for which the schedule acts."""
        known = {group.get("optimizer", "") for group in run.optimizer.param_groups}
        if self.optimizer and self.optimizer not in known:
            raise UsageError(f"optimizer={self.optimizer}: the run has no such optimizer; "
                             + (nearest(self.optimizer, known, "it has") if any(known) else "it has only one"))
        first, end = self.window(run)
        if first and first >= run.duration(None, self.unit):
            raise UsageError(f"start={self.start} leaves no {self.unit} of the run to act in; use an earlier start")
        if first >= end:
            raise UsageError(f"until={self.until} leaves no {self.unit} to act in; use a later until")
        if self.option != "lr":
            if self.lr_scale is not None:
                raise UsageError(f"option={self.option} is not supported, for its __post_init__ does not call that of "
                                 "Schedule; call it there")
            for index, place in scheduled_places(run.optimizer, self.option, self.optimizer).items():
                group = run.optimizer.param_groups[index]
                group.setdefault(initial_key(self.option), read_number(group, place))

    @hookimpl
    def lr_scale(self, run: Run, initial_lr: float, group: dict[str, Any]) -> float | None:
        if self.optimizer and group.get("optimizer") != self.optimizer:
            return None
        if self.start is None and self.until is None:           # the usual case, in every step
            return self.scale(run, run.position(self.unit), initial_lr, group)
        position = self.position(run)
        return 1.0 if position is None else self.scale(run, position, initial_lr, group)

    @hookimpl(tryfirst=True)
    def before_step(self, run: Run) -> None:
        for number in self.numbers:
            write_number(run.optimizer.param_groups[number.group], number.place, number.value(run))

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        """Return the factor of the rate of one parameter group, `position` epochs or steps into the schedule.

        initial_lr: the initial rate of the group; with another `option`, the initial value of that number
        """
        raise NotImplementedError

    def position(self, run: Run) -> int | None:
        """Return how many epochs or steps of the schedule are done; None before its start and after its end."""
        first, end = self.window(run)
        position = run.position(self.unit)
        return position - self.origin(first) if first <= position < end else None

    def duration(self, run: Run, duration: Duration | None) -> float:
        """Return `duration` in epochs or steps; None is the time from the schedule's start to its end or the run's."""
        if duration is not None or (self.start is None and self.until is None):
            return run.duration(duration, self.unit)
        first, end = self.window(run)
        return min(end, run.duration(None, self.unit)) - self.origin(first)

    def window(self, run: Run) -> tuple[int, float]:
        """Return the first epoch or step in which the schedule acts, from 0, and that before which it ends."""
        first = 0 if self.start is None else whole(run.duration(self.start, self.unit))
        end = inf if self.until is None else whole(run.duration(self.until, self.unit))
        return first, end

    def origin(self, first: int) -> int:
        """Return the epoch or step from which positions count; in `first`, the schedule begins to act."""
        return first if self.count_from == "start" else 0

    @property
    def unit(self) -> Literal["epoch", "step"]:
        """What positions count: the option `by` of the subclass."""
        return self.by      # type: ignore[attr-defined]


@dataclass
class ScheduledNumber:
    """A number other than the learning rate in a parameter group, and the schedules that it follows."""

    name: str                   # as `option` has it
    group: int                  # the index of the parameter group
    place: Place
    schedules: list[Schedule]

    def value(self, run: Run) -> float:
        """The initial value times all schedules' factors, at the current step."""
        group = run.optimizer.param_groups[self.group]
        initial = group[initial_key(self.name)]
        factors = [Schedule.lr_scale(schedule, run, initial, group) for schedule in self.schedules]
        return initial * prod(factors)          # type: ignore[arg-type]        # none is None: it is of its optimizer


def other_schedules(run: Run) -> Iterator[Schedule]:
    """The schedules of the run that move another number than the learning rate."""
    return (plugin for plugin in run.hook.plugins.values() if isinstance(plugin, Schedule) and plugin.option != "lr")


def scheduled_numbers(run: Run) -> list[ScheduledNumber]:
    """Every number other than a learning rate that schedules of the run move. One that is 0 stays 0."""
    found: dict[tuple[int, Place], ScheduledNumber] = {}
    for schedule in other_schedules(run):
        for index, place in scheduled_places(run.optimizer, schedule.option, schedule.optimizer).items():
            number = ScheduledNumber(schedule.option, index, place, [])
            found.setdefault((index, place), number).schedules.append(schedule)
    return list(found.values())


def whole(number: float) -> int:
    """Return `number` rounded up. The 1e-9 makes up for rounding above a whole number."""
    return ceil(number - 1e-9)
