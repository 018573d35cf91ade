"""`Run`, the state of one training run, which every hook is given."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopctl.counters import Counters
from loopctl.data.batch import length_or_none, loader_name
from loopctl.errors import counted
from loopctl.optim.duration import Duration, convert, parse_duration
from loopctl.optim.plan import Plan, plan_epochs

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from loopctl.composition.compose import Hooks
    from loopctl.data.resumable_loader import ResumableLoader
    from loopctl.distributed.data_parallel import Parallel
    from loopctl.metrics.meters import Meters

log = logging.getLogger("loopctl")


@dataclass(slots=True, eq=False, repr=False)
class Run:
    """One training run: a model, its data, and how far training is. A misspelt attribute raises `AttributeError`."""

    # What was asked for. Written by `fit`; a plugin may replace the model or the data in `setup`.
    model: nn.Module                          # the user's own module; `network` may be a wrapper around it
    loss_fn: Callable[..., Tensor] | None
    optimizer: Any                            # a torch.optim.Optimizer from `train_start` on
    train: Iterable[Any]
    valid: Iterable[Any] | dict[str, Iterable[Any]] | None = None          # one validation set, or several by name
    epochs: int = 1
    max_steps: float = inf
    eval_every: int | None = None
    eval_first: bool = False                  # evaluate before the first step too
    steps_per_epoch: int | None = None        # as given; `planned_steps` is known in any case
    forward: Any = None                       # `(model, batch) -> loss, outputs` in place of loss_fn, or a dict of such
    monitor: str = ""                         # the metric that a `Monitor` judges by if it has none of its own
    reduction: str | None = "mean"            # what `loss_fn` returns for a batch: the "mean" or "sum" of its losses
    seed: int | None = None                   # None: the random-number generators are left as they were
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
    loaders: dict[str, ResumableLoader] = field(default_factory=dict)      # of `data_sets`, in training
    evaluating: str = ""                      # the loader that an evaluation reads; empty outside of one
    leave: str = ""                           # why to leave at the next safe point, to be resumed. Written by plugins
    leaving: bool = False                     # this safe point is the last one, in all processes: save the run
    meters: Meters = None                     # type: ignore[assignment]   # means over the epoch so far
    log_target: tuple[Meters, Any] | None = None      # where `log` adds to, with which weight; None discards
    metrics: dict[str, Any] = field(default_factory=dict)                  # by name; plugins add their own
    history: list[dict[str, Any]] = field(default_factory=list)            # a row per evaluation
    carries_state: bool = False               # whether `forward` takes a state; written by prepare.py
    carried: Any = None                       # that state, of the batch before in this pass
    last_checkpoint: Path | None = None       # the one written or resumed from last; written by `checkpoint` too
    checkpoint_folders: list[Path] = field(default_factory=list)           # where `checkpoint` writes; written by it

    turns: tuple[str, ...] = ()               # the optimizers that make an update in turn, of their own losses
    turn: str = ""                            # whose turn it is; `optimizer` is that one meanwhile
    last_turn: str = ""                       # in which metrics are given the outputs

    # The current step. Written by the loop and the default hooks.
    batches: Sequence[Any] = ()               # its micro-batches; `accumulate` may read each when its turn comes
    weight: Any = 0                           # of the step; the mean over the processes. See `step_weight`
    loss: Tensor | None = None                # detached, on the device; None until it is known
    outputs: Any = None                       # of the last micro-batch's forward pass
    metric_target: Any = None                 # what metrics compare with in place of a batch's own targets; by plugins
    skipped: bool = False                     # the step made no update; written by plugins

    untrained: list[nn.Parameter] = field(default_factory=list)    # with gradients that the optimizer does not hold
    expected: list[str] = field(default_factory=list)        # metrics that the first step has to log; by Monitor
    counted_plan: tuple[int, int] | None = None      # where an epoch had another length than its data promised
    _plan: Plan | None = None
    _planned_by_length: Plan | None = None
    _said: set[str] = field(default_factory=set)     # what was said already

    def __repr__(self) -> str:
        stopped = f", stopped: {self.stop}" if self.stop else f", left: {self.leave}" if self.leaving else ""
        return (f"<Run of {type(self.model).__name__} on {self.device}: epoch {self.epoch} of {self.epochs}, "
                f"{counted(self.step, 'update')}{stopped}>")

    def validation_sets(self) -> dict[str, Any]:
        """The validation data by name: of several sets, their names; of a single one, ""."""
        if self.valid is None:
            return {}
        return dict(self.valid) if isinstance(self.valid, Mapping) else {"": self.valid}

    def data_sets(self) -> dict[str, Any]:
        """All data, by the name of its loader: "train", and "valid" or, of several validation sets, "valid.NAME"."""
        valid = {loader_name(name): data for name, data in self.validation_sets().items()}
        return {"train": self.train} | (valid or {"valid": None})

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
        return self.epoch + self.seen_in_epoch / self.plan()[1]

    @property
    def planned_steps(self) -> int:
        """How many steps the whole run has unless something stops it."""
        return int(min(self.planned.steps(self.epochs) + self.counters.shift, self.max_steps))

    def position(self, by: str) -> int:
        """Where a schedule is: epochs completed (`by="epoch"`), or updates made and skipped (`by="step"`)."""
        return self.epoch if by == "epoch" else self.attempts

    def duration(self, duration: Duration | None, by: str) -> float:
        """`duration` in epochs or in steps: a plain number is in that unit already, `"5ep"`, `"500st"` and `"10%"` are
        converted, None is the whole run."""
        number, unit = parse_duration(duration)
        return number if unit == by else convert(number, unit, by, self.planned, self.planned_steps)

    def plan(self) -> tuple[int, int]:
        """The steps and the micro-batches of the current epoch, counted by grouping numbers in place of batches."""
        return self.planned.epoch(self.counters.epoch)

    @property
    def planned(self) -> Plan:
        """The steps and the micro-batches of all epochs.

        Where an epoch had another length than its data promised, the numbers are those of that epoch.
        """
        if self._plan is None:
            self._plan = self.planned_by_length()
        return self._plan

    def planned_by_length(self) -> Plan:
        """The steps and the micro-batches of all epochs, as the length of the data promises them."""
        if self._planned_by_length is None:
            self._planned_by_length = plan_epochs(self, length_or_none(self.train))
        return self._planned_by_length

    def plan_by_count(self, counted_plan: tuple[int, int]) -> None:
        """Plan with the steps and the micro-batches that an epoch had, in place of what the data promises."""
        self.counted_plan = counted_plan
        if len(self.planned_by_length().per_epoch) > 1:         # the steps differ from epoch to epoch
            self._plan = plan_epochs(self, counted_plan[1])
        else:
            self._plan = Plan((counted_plan,))

    def note_epoch_length(self) -> None:
        """Compare the epoch that ends with the data's length. If it differs, schedules count by the epoch's own."""
        found = self.counters.attempts_in_epoch, self.seen_in_epoch
        as_long = self.steps_per_epoch is None and length_or_none(self.train) == self.seen_in_epoch
        # Where the number of batches is right, so is that of the steps, unless a plugin groups them in another way now.
        grouping = self.hook.replaced.get("group_batches") if as_long else None
        if (as_long and not grouping) or self.should_stop or found == self.plan():
            return
        if grouping:
            self.say_once("grouping", f"{grouping} made {counted(found[0], 'step')} of epoch {self.epoch + 1}, and "
                                      f"{self.plan()[0]:,} were planned, so schedules end elsewhere; it needs "
                                      "grouping_changes = True")
            return
        self.say_once("length", f"train gave {counted(found[1], 'batch')} in epoch {self.epoch + 1}, but its length is "
                                f"{self.plan()[1]:,}; schedules count {counted(found[0], 'step')} per epoch from here "
                                "on")
        self.plan_by_count(found)
        self.counters.take_back(self.planned.steps(self.epoch + 1))

    def log(self, name: str, value: float | Tensor) -> None:
        """Add `value` to a mean over the epoch, which is reported as `train_NAME`, or as `val_NAME` in an evaluation.

        Call it from any hook within a step, with a number or a tensor of one element; it does not wait for the device.
        A value of a micro-batch (in `compute_loss`) weighs what that does in the mean of the loss, any other what the
        step does. The mean is over all processes. A value of a closure that is called again in a step does not count.

        Raises UsageError for a name that the loss or a metric has.
        """
        if self.log_target is not None:
            meters, weight = self.log_target
            meters.log(name, value, weight)

    def lost_loss(self) -> str:
        """Which loss is not finite at the end of the history, and since which epoch; empty where both are finite."""
        for name in ("train_loss", "val_loss"):
            lost = [*takewhile(lambda row: is_lost(row.get(name)), reversed(self.history))]         # noqa: B023
            if lost:
                return f"{name} is {lost[0][name]} since epoch {lost[-1]['epoch']}"
        return ""

    def say_once(self, key: str, text: str) -> None:
        """Log a warning, unless one with the same `key` was logged in this run."""
        if key not in self._said:
            log.warning(text)
        self._said.add(key)


def is_lost(loss: Any) -> bool:
    """Whether a loss is NaN or infinite."""
    return isinstance(loss, float) and not isfinite(loss)
