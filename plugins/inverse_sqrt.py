"""Learning-rate schedule: inverse square root."""
from dataclasses import dataclass
from math import sqrt
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class InverseSqrt(Schedule):
    """Lower the learning rate with the inverse square root of the steps that are done.

    From Attention Is All You Need, arXiv:1706.03762. The rise at the start is the plugin warmup: with
    warmup:length=4000,start_factor=0 and inverse_sqrt:start=4000 the rate is that of fairseq's inverse_sqrt, which
    counts from 0; the paper counts from 1. With timescale it is that of transformers' get_inverse_sqrt_schedule.

    timescale: duration from the schedule's start in which the rate falls to 0.71, the square root of a half; the
        schedule's start if left out, so that the rate is that at the start times the square root of start / steps
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    timescale: Duration | None = None
    by: Literal["epoch", "step"] = "step"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timescale is None and self.start is None:
            raise ValueError("one of start and timescale is required; pass start, the length of the warmup")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        timescale = self.window(run)[0] if self.timescale is None else self.duration(run, self.timescale)
        return 1.0 / sqrt((position + timescale) / timescale)
