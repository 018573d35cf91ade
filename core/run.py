"""`Run`, the state of one training run, which every hook is given."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count, islice
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopctl.counters import Counters
from loopctl.data.batch import length_or_none
from loopctl.optim.duration import Duration, convert, parse_duration

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from loopctl.composition.compose import Hooks
    from loopctl.data.resumable_loader import ResumableLoader
    from loopctl.distributed.data_parallel import Parallel
    from loopctl.metrics.meters import Meters


@dataclass(slots=True, eq=False, repr=False)
class Run:
    """One training run: a model, its data, and how far training is. A misspelt attribute raises `AttributeError`."""

    # What was asked for. Written by `fit`; a plugin may replace the model or the data in `setup`.
    model: nn.Module                          # the user's own module; `network` may be a wrapper around it
    loss_fn: Callable[..., Tensor] | None
    optimizer: Any                            # a torch.optim.Optimizer from `train_start` on
    train: Iterable[Any]
    valid: Iterable[Any] | None = None
    epochs: int = 1
    max_steps: float = inf
    eval_every: int | None = None
    steps_per_epoch: int | None = None        # as given; `planned_steps` is known in any case
    out: Path = Path()                        # the folder that plugins write to
    resume: Path | None = None                # the checkpoint to resume from

    # Written before training, by prepare.py unless another writer is named.
    hook: Hooks = None                        # type: ignore[assignment]
    device: torch.device = None               # type: ignore[assignment]
    network: Callable[..., Any] = None        # type: ignore[assignment]   # what forward calls; plugins in `wrap_model`
    metric_fns: dict[str, Any] = field(default_factory=dict)               # by "train" and "val"
    config: dict[str, Any] = field(default_factory=dict)     # how the run was configured; written by the command line
    rank: int = 0                             # written by distributed/process_group.py, as is
    world_size: int = 1                       # the number of processes that train together
    parallel: Parallel | None = None          # the plugin that trains in several processes; written by itself

    # How far the run is. Written by the loop and by a resume.
    counters: Counters = field(default_factory=Counters)
    stop: str = ""                            # why to end early; empty means go on. Written by plugins
    loaders: dict[str, ResumableLoader] = field(default_factory=dict)      # of "train" and "valid"
    meters: Meters = None                     # type: ignore[assignment]   # means over the epoch so far
    metrics: dict[str, Any] = field(default_factory=dict)                  # by name; plugins add their own
    history: list[dict[str, Any]] = field(default_factory=list)            # a row per epoch
    last_checkpoint: Path | None = None       # the one written or resumed from last; written by `checkpoint` too

    # The current step. Written by the loop and the default hooks.
    batches: list[Any] = field(default_factory=list)
    weight: Any = 0                           # of the step; the mean over the processes. See `step_weight`
    loss: Tensor | None = None                # detached, on the device; None until it is known
    outputs: Any = None                       # of the last micro-batch's forward pass
    skipped: bool = False                     # the step made no update; written by plugins

    _plan: tuple[int, int] | None = None

    def __repr__(self) -> str:
        stopped = f", stopped: {self.stop}" if self.stop else ""
        return (f"<Run of {type(self.model).__name__} on {self.device}: epoch {self.epoch} of {self.epochs}, "
                f"{self.step:,} updates{stopped}>")

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.counters.epoch

    @property
    def step(self) -> int:
        """Updates made."""
        return self.counters.step

    @property
    def attempts(self) -> int:
        """Updates made and updates skipped."""
        return self.counters.attempts

    @property
    def seen(self) -> int:
        """Micro-batches consumed, over all epochs."""
        return self.counters.seen

    @property
    def seen_in_epoch(self) -> int:
        """Micro-batches consumed in the current epoch."""
        return self.counters.seen_in_epoch

    @property
    def should_stop(self) -> bool:
        """Whether to end within the current epoch: `stop` has a reason, or `max_steps` updates are made."""
        return bool(self.stop) or self.counters.step >= self.max_steps

    @property
    def finished(self) -> bool:
        """Whether the run is at its end: no epoch is under way, and it should stop or all epochs are completed."""
        return not self.seen_in_epoch and (self.should_stop or self.epoch >= self.epochs)

    @property
    def progress(self) -> float:
        """The part of the run that is done, 0 to 1."""
        return min(1.0, max(self.epochs_done / self.epochs, self.attempts / self.max_steps))

    @property
    def epochs_done(self) -> float:
        """Passes over the training data so far, such as 2.25."""
        return self.seen / self.plan()[1]

    @property
    def planned_steps(self) -> int:
        """How many steps the whole run has unless something stops it."""
        return int(min(self.epochs * self.plan()[0] + self.counters.shift, self.max_steps))

    def position(self, by: str) -> int:
        """Where a schedule is: epochs completed (`by="epoch"`), or updates made and skipped (`by="step"`)."""
        return self.epoch if by == "epoch" else self.attempts

    def duration(self, duration: Duration | None, by: str) -> float:
        """`duration` in epochs or in steps: a plain number is in that unit already, `"5ep"`, `"500st"` and `"10%"` are
        converted, None is the whole run."""
        number, unit = parse_duration(duration)
        return number if unit == by else convert(number, unit, by, self.plan()[0], self.planned_steps)

    def plan(self) -> tuple[int, int]:
        """The steps and the micro-batches of one epoch, counted by grouping numbers in place of batches."""
        if self._plan is None:
            length = length_or_none(self.train)
            numbers = count() if length is None else iter(range(length))
            groups = self.hook.group_batches(run=self, batches=numbers)
            sizes = [len(group) for group in islice(groups, self.steps_per_epoch)]
            self._plan = len(sizes), sum(sizes)
        return self._plan
