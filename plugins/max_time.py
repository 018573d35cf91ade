"""A limit of time: leave the run at a safe point when a time is over, to be resumed later."""
import time
from dataclasses import dataclass

from loopctl import Run, hookimpl
from loopctl.optim.duration import parse_time


@dataclass(eq=False)
class MaxTime:
    """Leave the run when a time is over, in the middle of an epoch too, to be resumed later.

    The time counts from the start of training. When it is over, the run ends after the step or the evaluation that is
    under way, and `checkpoint` saves it there. A resumed run has the same bits as one without a limit, and the full
    time again. Without `checkpoint` the run ends all the same, but cannot be resumed.

    limit: the time, with its unit, such as 90s, 30m, 2h, 1h30m or 1d
    """

    limit: str
    topic = "checkpoints and stopping"

    def __post_init__(self) -> None:
        try:
            self.seconds = parse_time(self.limit)
        except ValueError as error:
            raise ValueError(f"limit {error}") from None

    @hookimpl
    def train_start(self) -> None:
        self.end = time.monotonic() + self.seconds

    @hookimpl
    def after_step(self, run: Run) -> None:
        if time.monotonic() >= self.end:
            run.leave = run.leave or f"the time of {self.limit} is over"

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        self.after_step(run)                # the evaluation takes time too
