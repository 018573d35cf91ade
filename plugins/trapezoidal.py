"""Learning-rate schedule: trapezoidal (warmup-stable-decay)."""
from dataclasses import dataclass
from math import cos, pi, sqrt
from typing import Any, Literal

from loopctl import Duration, Run
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Trapezoidal(Schedule):
    """Raise the learning rate linearly, hold it, and lower it.

    Also called warmup-stable-decay (WSD); from A Walk with SGD, arXiv:1802.08770. The cooldown 1-sqrt is from
    arXiv:2405.18392, and the option's name and values are those of transformers' get_wsd_schedule.

    max_lr: learning rate while it is held, above 0
    step_size: duration of the rise, and of the descent
    anneal_start: duration from the schedule's start to the descent; if left out, the descent ends with the run
    base_lr: learning rate at the start and after the descent; the optimizer's own if left out
    by: change the rate every epoch or every step, which is also the unit of durations without one
    step_size_down: duration of the descent; the same as step_size if left out
    decay_type: shape of the descent: linear, half a cosine wave, or 1 minus the square root of its part that is done
    """

    max_lr: float
    step_size: Duration
    anneal_start: Duration | None = None
    base_lr: float | None = None
    by: Literal["epoch", "step"] = "step"
    step_size_down: Duration | None = None
    decay_type: Literal["linear", "cosine", "1-sqrt"] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.max_lr > 0:
            raise ValueError(f"max_lr is above 0, not {self.max_lr}")
        if self.base_lr is not None and not self.base_lr >= 0:
            raise ValueError(f"base_lr is at least 0, not {self.base_lr}")

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        base = initial_lr if self.base_lr is None else self.base_lr
        rise = self.duration(run, self.step_size)
        fall = rise if self.step_size_down is None else self.duration(run, self.step_size_down)
        end = self.duration(run, self.anneal_start) + (0 if self.anneal_start is None else fall)
        left = max(0.0, min(1.0, (end - position) / fall))
        if self.decay_type != "linear":
            done = max(0.0, min(1.0, (position - (end - fall)) / fall))
            left = 1 - sqrt(done) if self.decay_type == "1-sqrt" else (1 + cos(pi * done)) / 2
        return (base + (self.max_lr - base) * min(position / rise, left)) / initial_lr
