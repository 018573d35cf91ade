"""The base class of schedules: where a schedule starts and ends, and how far it is."""
from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf
from typing import TYPE_CHECKING, Any, Literal

from loopctl.errors import UsageError, nearest
from loopctl.hooks import hookimpl
from loopctl.optim.duration import Duration

if TYPE_CHECKING:
    from loopctl.run import Run


@dataclass(eq=False, kw_only=True)
class Schedule:
    """A learning-rate schedule that acts from `start` to `until`, and leaves the rate alone outside of them.

    A subclass implements `scale`, and has the option `by`: the unit of its positions, and of durations without one.

    start: duration from the start of the run to that of the schedule, which has no effect before; rounded up to whole
        epochs or steps
    until: duration from the start of the run after which the schedule has no effect any more
    count_from: count the schedule's position, and a duration that is left out, from its own start, or from that of the
        run, so that it starts in its middle
    optimizer: of several optimizers, the name of the one whose rate is scheduled; all of them if left out
    """

    start: Duration | None = None
    until: Duration | None = None
    count_from: Literal["start", "run"] = "start"
    optimizer: str = ""

    def __post_init__(self) -> None:
        if self.start is None and self.until is None and not self.optimizer:
            self.train_start = None         # type: ignore[assignment, method-assign]   # there is nothing to check

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.check(run)

    def check(self, run: Run) -> None:
        """Raise UsageError where the run has no epoch, step or optimizer for which the schedule acts."""
        known = {group.get("optimizer", "") for group in run.optimizer.param_groups}
        if self.optimizer and self.optimizer not in known:
            raise UsageError(f"optimizer={self.optimizer}: the run has no such optimizer; "
                             + (nearest(self.optimizer, known, "it has") if any(known) else "it has only one"))
        first, end = self.window(run)
        if first and first >= run.duration(None, self.unit):
            raise UsageError(f"start={self.start} leaves no {self.unit} of the run to act in; use an earlier start")
        if first >= end:
            raise UsageError(f"until={self.until} leaves no {self.unit} to act in; use a later until")

    @hookimpl
    def lr_scale(self, run: Run, initial_lr: float, group: dict[str, Any]) -> float | None:
        if self.optimizer and group.get("optimizer") != self.optimizer:
            return None
        if self.start is None and self.until is None:           # the usual case, in every step
            return self.scale(run, run.position(self.unit), initial_lr, group)
        position = self.position(run)
        return 1.0 if position is None else self.scale(run, position, initial_lr, group)

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        """Return the factor of the rate of one parameter group, `position` epochs or steps into the schedule."""
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


def whole(number: float) -> int:
    """Return `number` rounded up. The 1e-9 makes up for rounding above a whole number."""
    return ceil(number - 1e-9)
