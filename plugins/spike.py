"""Loss spikes: undo steps whose loss or gradient norm is far above its running mean."""
import csv
import logging
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from loopctl import Run, hookimpl
from loopctl.checkpoint.atomic_files import atomic_write, claim_output
from loopctl.checkpoint.sharded_tensors import full_tensor
from loopctl.checkpoint.step_guard import StepGuard
from loopctl.distributed.process_group import all_reduce_mean

log = logging.getLogger("loopctl")
FLOOR = 0.01        # of the mean: a loss that hardly changes any more has no spikes smaller than that


@dataclass(eq=False)
class Spike(StepGuard):
    """Undo every step whose loss or gradient norm is far above its running mean.

    The limit is the mean plus a number of standard deviations, both running as in ZClip, arXiv:2504.02507, for the loss
    of the step over all processes and for the norm before clipping. Steps that are undone do not change them. Losses
    and norms that are not finite are spikes too, at any time, so nan_guard is not needed besides. What happens on CUDA
    is as with nan_guard: the host learns of a spike some steps later. A file lists step, epoch, batches of the epoch
    and statistics of every spike. The metric skipped_steps counts them. `loopctl rewind RUN --to STEP` makes the step
    of a spike again, with other plugins, to look at it.

    action: skip continues with the next batches; stop ends the run; rollback continues too, but from the last
        checkpoint, as PaLM did, arXiv:2204.02311
    deviations: how many standard deviations above the mean the limit is
    decay: the part of the running mean that each step keeps, 0 to 1; 0.99 is a window of about 100 steps
    warmup: steps at the start that are averaged and not judged, at least 2
    monitor: what is judged; both are where it is not finite
    limit: the number of spikes in a row that ends the run, which is no spike then but another level
    path: CSV file with a row for each spike, relative to the run's folder; it must not exist yet
    """

    action: Literal["skip", "stop", "rollback"] = "skip"
    deviations: float = 6.0
    decay: float = 0.99
    warmup: int = 50
    monitor: Literal["both", "loss", "norm"] = "both"
    limit: int = 20
    path: str = "spikes.csv"
    topic = "gradients"

    def __post_init__(self) -> None:
        if not self.deviations > 0:
            raise ValueError(f"deviations is above 0, not {self.deviations}")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay is at least 0 and below 1, not {self.decay}")
        for name, least in (("warmup", 2), ("limit", 1)):
            if (number := getattr(self, name)) < least:
                raise ValueError(f"{name} is at least {least}, not {number}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        super().train_start(run)
        self.running: Any = None        # rows: the count of steps, mean and variance; columns: loss and norm
        self.rows: list[dict[str, Any]] = []
        self.file = run.out / self.path
        if run.rank == 0:
            claim_output(self.file, resumed=bool(run.resume))

    @hookimpl
    def before_step(self, run: Run) -> None:
        super().before_step(run)
        self.before = self.running

    def examine(self, run: Run, gradients: list[Tensor]) -> Tensor:
        assert run.loss is not None
        norm = full_tensor(get_total_norm(gradients))
        values = torch.stack((all_reduce_mean(run, run.loss), norm.to(run.loss)))
        values = values.to(torch.promote_types(values.dtype, torch.float32))        # in half precision 256 + 1 is 256
        if self.before is None:
            self.before = values.new_zeros(3, 2)
        count, mean, variance = self.before
        deviation = torch.maximum(variance.sqrt(), FLOOR * mean.abs())
        bad = (values > mean + self.deviations * deviation) & (count >= self.warmup)
        if self.monitor != "both":
            bad[1 if self.monitor == "loss" else 0] = False
        bad |= values.isfinite().logical_not()
        # A running mean and variance, which are those of all steps at first.
        share, change = (1 / (count + 1)).clamp(min=1 - self.decay), values - mean
        after = torch.stack((count + 1, mean + share * change, (1 - share) * (variance + share * change**2)))
        any_bad = bad.any() if self.bad is None else (self.bad | bad).any()     # of all gradients of this step
        self.running = torch.where(any_bad, self.before, after)
        self.evidence = torch.cat((values, mean, deviation))
        return bad

    def describe_step(self, run: Run) -> dict[str, Any]:
        first = run.seen_in_epoch + 1
        return super().describe_step(run) | {"epoch": run.epoch + 1, "first_batch": first,
                                             "last_batch": first + len(run.batches) - 1}

    def report(self, run: Run, step: dict[str, Any], what: str, evidence: list[float]) -> str:
        columns = ("loss", "norm", "loss_mean", "norm_mean", "loss_deviation", "norm_deviation")
        numbers = dict(zip(columns, evidence, strict=False))
        identity = {name: value for name, value in step.items() if name != "skipped"}
        self.rows.append(identity | {"spike": what} | numbers)
        self.write(run)
        name = "norm" if what == "gradient" else what
        if not isfinite(value := numbers.get(name, nan)):
            return super().report(run, step, what, evidence)
        mean, deviation = numbers[f"{name}_mean"], numbers[f"{name}_deviation"]
        return (f"the {'gradient norm' if name == 'norm' else name} of step {step['step']} is {value:.4g}, "
                f"{(value - mean) / deviation:.3g} standard deviations above its mean of {mean:.4g}")

    def write(self, run: Run) -> None:
        if run.rank:
            return
        columns = dict.fromkeys(key for row in self.rows for key in row)
        try:
            with atomic_write(self.file) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)
        except OSError as error:
            log.warning("spike: %s cannot be written (%s); trying again at the next spike", self.file, error.strerror)

    def roll_back(self, run: Run) -> None:
        rows = self.rows
        super().roll_back(run)
        self.rows = rows        # those of the steps that were undone too

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"running": self.running, "rows": [*self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.running, self.rows = state["running"], list(state["rows"])
