"""The state of one training run, passed to every hook."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count, islice
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopctl.batches import known_length
from loopctl.lengths import Length, parse_length

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from loopctl.compose import Hooks
    from loopctl.feed import Feed
    from loopctl.meters import Meters


@dataclass(slots=True, eq=False)
class Run:
    """One run: a model, the data, how far it is. Closed: a misspelt attribute raises `AttributeError`."""

    # What was asked for.
    model: nn.Module                          # always the user's own; `network` may wrap it
    loss_fn: Callable[..., Tensor] | None
    optimizer: Any                            # a torch.optim.Optimizer from `train_start` on
    train: Iterable[Any]
    valid: Iterable[Any] | None = None
    epochs: int = 1
    max_steps: float = inf
    eval_every: int | None = None
    steps_per_epoch: int | None = None        # where given; `planned_steps` knows it in any case
    metric_fns: dict[str, Any] = field(default_factory=dict)
    out: Path = Path()                        # the folder that plugins write to
    resume: Path | None = None                # the checkpoint it goes on from
    rank: int = 0                             # which of the processes this is that train together,
    world_size: int = 1                       # and how many there are

    # Set before training.
    device: torch.device = None               # type: ignore[assignment]
    network: Callable[..., Any] = None        # type: ignore[assignment]
    config: dict[str, Any] = field(default_factory=dict)     # what it was made of, for whoever reads a checkpoint
    hook: Hooks = None                        # type: ignore[assignment]

    # How far it is.
    epoch: int = 0                            # epochs completed
    step: int = 0                             # updates that happened
    attempts: int = 0                         # updates planned so far: those that happened and those skipped
    seen: int = 0                             # micro-batches consumed, over all epochs
    began: tuple[int, int] = (0, 0)           # `seen` and `attempts` where the epoch at hand began
    shift: int = 0                            # steps that were more, or fewer, in another number of processes
    judged: int = 0                           # `attempts` at the last evaluation
    stop: str = ""                            # why to end before the last epoch; empty means go on

    # The step at hand.
    batches: list[Any] = field(default_factory=list)
    weight: Any = 0                           # what they count together: samples, unless batch_weight says otherwise
    loss: Tensor | None = None                # detached, on the device; None until it is known
    outputs: Any = None
    skipped: bool = False                     # this step changed no weight

    feeds: dict[str, Feed] = field(default_factory=dict)     # what gives the batches of `train` and of `valid`
    meters: Meters = None                     # type: ignore[assignment]   # means over the epoch so far
    saved: Path | None = None                 # the last checkpoint that was written or gone on from
    metrics: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    _plan: tuple[int, int] | None = None

    @property
    def over(self) -> bool:
        """Whether the run is at its end: between epochs, and stopped, or all epochs or steps done."""
        return not self.batch and (self.ends or self.epoch >= self.epochs)

    @property
    def ends(self) -> bool:
        """Whether the epoch at hand is the last, and ends here: somebody said stop, or all steps are done."""
        return bool(self.stop) or self.step >= self.max_steps

    @property
    def batch(self) -> int:
        """Micro-batches consumed of the epoch at hand."""
        return self.seen - self.began[0]

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
        """How many steps the whole run has, if nothing stops it."""
        return int(min(self.epochs * self.plan()[0] + self.shift, self.max_steps))

    def position(self, by: str) -> int:
        """Where a schedule stands: epochs done (`by="epoch"`), or steps done, skipped ones included (`by="step"`)."""
        return self.epoch if by == "epoch" else self.attempts

    def length(self, length: Length | None, by: str) -> float:
        """`length` in epochs or in steps: a plain number is in that unit already, `"5ep"`, `"500st"` and `"10%"` are
        converted, None is the whole run."""
        number, unit = parse_length(length)
        if unit == by:
            return number
        per_epoch = self.plan()[0]
        steps = {"": number if by == "step" else number * per_epoch, "step": number, "epoch": number * per_epoch,
                 "%": number * self.planned_steps / 100}[unit]
        return steps if by == "step" else steps / per_epoch

    def plan(self) -> tuple[int, int]:
        """The steps and the micro-batches of one epoch, counted by grouping numbers in place of batches."""
        if self._plan is None:
            length = known_length(self.train)
            numbers = count() if length is None else iter(range(length))
            groups = self.hook.group_batches(run=self, batches=numbers)
            sizes = [len(group) for group in islice(groups, self.steps_per_epoch)]
            self._plan = len(sizes), sum(sizes)
        return self._plan
