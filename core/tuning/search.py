"""`tune`: find the fastest composition of a run by trials, greedily, within a budget of seconds."""
from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import isnan, nan
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from loopctl.data.batch import iter_tensors, length_or_none, map_nested, sample_count
from loopctl.data.limits import draws_indices, with_batch_sampler
from loopctl.data.on_device import OnDeviceDataset
from loopctl.distributed.process_group import launched_processes
from loopctl.errors import UsageError, one_line
from loopctl.prepare import find_device
from loopctl.rng import rng_state, set_rng_state
from loopctl.tuning.choices import (
    Choice,
    Composition,
    copies_in_advance,
    described,
    optimizer_with,
    plugins_of,
    possible_choices,
    settings_of,
    worker_numbers,
)
from loopctl.tuning.report import Row, Tuning
from loopctl.tuning.trial import OutOfTime, Repeated, Result, run_trial, time_limit

log = logging.getLogger("loopctl")

FASTER = 1.03               # a choice has to be faster by this factor, which is more than the noise of a trial
COMPARED_STEPS = 20         # losses are compared over the first steps of the trials, at most so many
FLOAT32, HALF = 2e-3, 2e-2  # how far a loss may stray relatively: by other sums in float32, by fewer bits
NOISE_FLOAT32, NOISE_HALF = 2**-23, 2**-8       # how much rounding changes a weight, relatively
ROUNDING = 4                # so many times as far as by rounding of the weights at the start, a loss may stray too
POOL, POOL_BYTES = 8, 2**30             # how many batches the trials of the model use, and their size in memory
SHORTEST_PASS = 1000        # batches of a pass in these trials, so that no epoch ends in between
SHARE_OF_SEARCH, SHARE_OF_MODEL = 0.6, 0.75    # of the seconds: until then it searches, then measures the best again
NEAR, FINALISTS, MOST_TURNS = 0.85, 4, 3        # which are measured again, how many and how often at most
FIRST_TRIAL = 30            # seconds that the run as it was given may take in any case


def tune(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    optimizer: Any,
    train: Iterable[Any],
    valid: Any = None,
    *,
    seconds: float = 60.0,
    tolerance: float | None = None,
    **arguments: Any,
) -> Tuning:
    """Try what makes the run that `fit` would make with these arguments faster, and return what was found.

    Each trial trains a copy of the run for a few steps. What is tried changes the speed and not the recipe: precision,
    memory format, compilation, CUDA graphs, the form of the optimizer's update, torch's settings, loader processes. The
    run itself is not changed: not the model, the random-number generators nor torch's settings.

    seconds: how long all of it may take
    tolerance: the largest relative difference between the loss of a trial and that of the run as it was given, with
        which a composition may be chosen; left out, 0.002, and 0.02 where half precision is tried
    The other arguments are those of `fit`.

    Raises UsageError where the run itself does not work, and where its data can be read only once.
    """
    unknown = {"resume", "out"} & {*arguments}
    if unknown:
        raise UsageError(f"tune takes no {min(unknown)}: it trains copies, and keeps nothing; leave it out")
    given = {"model": model, "loss_fn": loss_fn, "optimizer": optimizer, "train": train, "valid": valid, **arguments}
    given["plugins"] = list(arguments.get("plugins", ()))
    return Search(given, seconds, tolerance).run()


@dataclass(eq=False)
class Search:
    """The search for the fastest composition.

    arguments: those of `fit`
    loaders: other ways to read the same training data, by name: functions that return a loader
    progress: called with what is being tried, and None at the end
    """

    arguments: dict[str, Any]
    seconds: float = 60.0
    tolerance: float | None = None
    loaders: dict[str, Callable[[], Any]] = field(default_factory=dict)
    progress: Callable[[str | None], None] = lambda text: None

    def run(self) -> Tuning:
        self.began = perf_counter()
        train = self.arguments["train"]
        if launched_processes() > 1:
            raise UsageError("tune works in one process; leave out torchrun")
        if not self.seconds > 0:
            raise UsageError(f"tune: seconds is above 0, not {self.seconds:g}")
        if isinstance(train, Iterator):
            raise UsageError("tune reads the training data more than once; pass a list or a DataLoader")
        self.device = find_device(self.arguments.get("device"), self.arguments["model"])
        self.rows: list[Row] = []
        self.left_out: list[Composition] = []
        self.rounding: dict[float, float] = {}
        self.seeds_differ = 0.0
        random = rng_state(train)
        try:
            self.say("the data alone")
            batches, self.data_rate = self.read_batches(train)
            length = length_or_none(train) or 0
            self.pool = Repeated(batches, max(length, SHORTEST_PASS), last_batch(train, batches[0]))
            self.find_composition()
            self.find_loader()
        finally:
            self.progress(None)
            set_rng_state(random, train)
        return self.result()

    @property
    def spent(self) -> float:
        return perf_counter() - self.began

    def say(self, what: str) -> None:
        self.progress(f"{self.spent:.0f} of {self.seconds:.0f} s, {what}")

    @property
    def step_seconds(self) -> float:
        """How long the steps of one trial are timed."""
        return min(3.0, max(0.1, self.seconds / 60))

    # The data alone.

    def read_batches(self, train: Any) -> tuple[list[Any], float]:
        """Read batches for a while. Return the first ones, and samples per second without the first batch, with which
        loader processes start."""
        kept: list[Any] = []
        size, samples, end, begin = 0, 0, nan, nan
        limit = perf_counter() + self.step_seconds
        for batch in train:
            end = perf_counter()
            if isnan(begin):
                begin = end
            else:
                samples += sample_count(batch)
            size += sum(tensor.nbytes for tensor in iter_tensors(batch))
            full = not kept or sample_count(batch) == sample_count(kept[0])         # not the last one of a pass
            if full and (not kept or (len(kept) < POOL and size <= POOL_BYTES)):
                kept.append(copy.copy(batch))
            if end > limit and samples:
                break
        if not kept:
            raise UsageError("train gave no batches")
        return kept, samples / (end - begin) if samples and end > begin else nan

    # The model alone, on a few batches again and again.

    def find_composition(self) -> None:
        self.plain = best = self.measure(())
        if isnan(best.rate):
            raise UsageError(f"the run as it was given cannot be tried: {best.result.reason}")
        if best.result.draws:
            self.seeds_differ = self.measure_seeds()
        groups = possible_choices(self.arguments, self.device)
        best, again = self.add_choices(best, [group for group in groups if not group[0].slow])
        for choice in again:            # what did not pay may pay together with what was chosen after it
            others = tuple(one for one in best.composition if one.group != choice.group)
            if not any({*row.composition} == {*others, choice} for row in self.rows):
                row = self.measure((*others, choice), best)
                best = row if self.is_better(row, best) else best
        best, _ = self.add_choices(best, [group for group in groups if group[0].slow])
        self.best = self.confirmed(best)

    def add_choices(self, best: Row, groups: list[list[Choice]]) -> tuple[Row, list[Choice]]:
        """Try the choices of each group with the best composition so far, which the fastest of them joins.

        Return the best one at the end, and the choices that were not taken and are not much slower.
        """
        others: list[Choice] = []
        for group in groups:
            here = best
            for choice in group:
                row = self.measure((*best.composition, choice), best)
                if self.is_better(row, here):
                    here = row
                elif row.ratio > 0.8 * best.ratio:
                    others.append(choice)
            best = here
        return best, others

    def measure_seeds(self) -> float:
        """How far the loss strays with another seed, which it may with other random numbers too."""
        seed = (self.arguments.get("seed") or 0) + 1
        other = run_trial(self.arguments | {"seed": seed}, (), self.pool, self.device, 0.0,
                          limit=self.seconds - self.spent)
        return difference(other.losses, self.plain.result.losses)

    def is_better(self, row: Row, best: Row) -> bool:
        return row.allowed and row.ratio > FASTER * best.ratio

    def rate_again(self, row: Row) -> list[float]:
        """Measure a composition again; return samples per second in a list, which is empty where that fails."""
        self.say(f"{described(row.composition)}, again")
        train = self.loaders_tried[row] if row.with_data else self.pool
        rate = run_trial(self.arguments, row.composition, train, self.device, self.step_seconds,
                         limit=self.seconds - self.spent).rate
        return [] if isnan(rate) else [rate]

    def measure(self, composition: Composition, best: Row | None = None, train: Any = None) -> Row:
        """Try a composition, on the same few batches or on the loader `train`, and add a row to the table.

        best: the one to compare with; None for the run as it was given, which is tried however long it takes
        """
        row = Row(composition, Result(reason="no time was left"), with_data=train is not None)
        left = (SHARE_OF_SEARCH if train is None else 1.0) * self.seconds - self.spent
        if best is not None and left < max(2 * self.step_seconds, 0.7 * best.result.seconds):
            self.left_out.append(composition)
            return row
        self.say(described(composition))
        row.result = run_trial(
            self.arguments, composition, self.pool if train is None else train, self.device, self.step_seconds,
            limit=left if best else max(left, FIRST_TRIAL),
            slowest=0.5 * best.rate if best and train is None else 0.0)
        self.rows.append(row)
        row.ratio = self.ratio(row, best) if composition and best else 1.0
        if train is None:
            row.strays = difference(row.result.losses, self.rows[0].result.losses)
            row.allowed = self.may_stray(row, best)
        return row

    def ratio(self, row: Row, best: Row) -> float:
        """How many times as fast as the run as it was given. The best one so far is measured again for that: where
        other programs use the machine too, two trials that are far apart cannot be compared."""
        rate, took = best.rate, best.result.seconds
        if row.rate > 0.5 * rate and took < 3 * self.step_seconds + 2 and self.spent + took < self.seconds:
            rate = next(iter(self.rate_again(best)), rate)
        return row.rate / rate * best.ratio

    def may_stray(self, row: Row, best: Row | None) -> bool:
        """Whether the loss of a composition is so near to that of the run as it was given that it may be chosen.

        Where it is not, the run may be one in which rounding alone changes the loss as much. Whether that is so is
        measured only for a composition that would be chosen.
        """
        if self.tolerance is not None:
            return row.strays <= self.tolerance
        rounds, draws = (any(getattr(one, name) for one in row.composition) for name in ("rounds", "draws"))
        most = max(HALF if rounds else FLOAT32, 2 * self.seeds_differ if draws else 0.0)
        noise = NOISE_HALF if rounds else NOISE_FLOAT32
        if row.strays > most and best is not None and (noise in self.rounding or row.ratio > FASTER * best.ratio):
            most = max(most, ROUNDING * self.rounding_strays(noise))
        return row.strays <= most               # false for NaN

    def rounding_strays(self, noise: float) -> float:
        """How far the loss strays where the weights at the start are rounded otherwise."""
        if noise not in self.rounding:
            self.say("the run as it was given, with weights that are rounded otherwise")
            other = run_trial(self.arguments, (), self.pool, self.device, self.step_seconds,
                              limit=self.seconds - self.spent, noise=noise)
            self.rounding[noise] = difference(other.losses, self.plain.result.losses)
        return self.rounding[noise]

    def confirmed(self, best: Row) -> Row:
        """Measure the fastest ones again, in turns with the run as it was given, and return the fastest."""
        near = [row for row in self.rows if row.allowed and row.ratio > NEAR * best.ratio]
        fastest_first = sorted(near, key=lambda row: -row.ratio)
        finalists = [*dict.fromkeys([self.plain, *fastest_first[:FINALISTS]])]
        return simplest_of_fastest(self.measure_in_turns(finalists, SHARE_OF_MODEL * self.seconds))

    def measure_in_turns(self, rows: list[Row], until: float) -> dict[Row, float]:
        """Measure all of `rows` again, several times until so many seconds are spent, and set their rates and ratios.

        Return how many times as fast each is as the first one, the run as it was given: the median over the turns.
        """
        turns: list[dict[Row, float]] = []
        expected = 1.2 * sum(row.result.seconds for row in rows)
        while len(rows) > 1 and len(turns) < MOST_TURNS and self.spent + expected < until:
            found = {row: rate for row in rows for rate in self.rate_again(row)}
            if len(found) < len(rows):
                break
            turns.append(found)
        for row in rows if turns else ():
            row.result.rate = median(turn[row] for turn in turns)
            row.ratio = median(turn[row] / turn[rows[0]] for turn in turns)
        return {row: row.ratio for row in rows}

    # Data and model together.

    def find_loader(self) -> None:
        """Train with the data as it is read, as given and in other ways, and choose the fastest."""
        train, chosen = self.arguments["train"], self.best.composition
        self.loaders_tried: dict[Row, Any] = {}
        self.before = self.measure_with(train, (), self.plain)
        usual = best = self.measure_with(train, chosen, self.before) if chosen else self.before
        if self.best.rate > (FASTER - 1) * self.data_rate:          # else no loader could make it faster
            for choice, loader in self.other_loaders():
                row = self.measure_with(loader, (*chosen, choice), best)
                best = row if self.is_better(row, best) else best
        for choice in copies_in_advance(self.arguments, self.device):
            row = self.measure_with(self.loaders_tried[best], (*best.composition, choice), best)
            best = row if self.is_better(row, best) else best
        if isnan(best.rate) or isnan(self.before.rate):             # there was no time to read the data
            self.before, self.together, self.gain = self.plain, self.best, self.best.ratio
            return
        finalists = [*dict.fromkeys([self.before, usual, best])]
        ratios = self.measure_in_turns([row for row in finalists if not isnan(row.rate)], self.seconds)
        self.together = simplest_of_fastest(ratios)
        self.gain = ratios[self.together]
        if self.together.loader_choice:
            self.say("the data alone, again")
            self.data_rate = self.read_batches(self.loaders_tried[self.together])[1]

    def measure_with(self, loader: Any, composition: Composition, best: Row) -> Row:
        row = self.measure(composition, best, loader)
        self.loaders_tried[row] = loader
        return row

    def other_loaders(self) -> Iterator[tuple[Choice, Any]]:
        for name, make in self.loaders.items():
            self.say(f"reading the data with {name}")
            choice, reason = Choice("data", loader=name), ""
            try:
                with time_limit(self.seconds - self.spent):
                    loader = make()
            except OutOfTime:
                reason = "the data could not be read in the time that was left"
            except UsageError as error:
                reason = one_line(error)
            except Exception as error:          # a full memory, for example, is a line in the table
                reason = f"{type(error).__name__}: {one_line(error)}"
            if reason:
                self.rows.append(Row((*self.best.composition, choice), Result(reason=reason), with_data=True))
            else:
                yield choice, loader
        train = self.arguments["train"]
        if draws_indices(train) and not isinstance(train.dataset, OnDeviceDataset):
            for number in worker_numbers(train.num_workers):
                yield Choice("data", workers=number), with_workers(train, number)

    def result(self) -> Tuning:
        chosen = self.together.composition
        loader = self.together.loader_choice
        optimizer = self.arguments["optimizer"]
        if not isinstance(optimizer, torch.optim.Optimizer):
            optimizer = optimizer_with(optimizer, chosen)
        model_rate = self.best.rate if chosen else self.plain.rate
        return Tuning(plugins_of(chosen), optimizer, settings_of(chosen), loader.workers if loader else None, chosen,
                      self.rows, model_rate, self.data_rate, self.gain, self.seeds_differ,
                      self.left_out)


def simplest_of_fastest(rates: dict[Row, float]) -> Row:
    """The fastest of some rows; of those that are as fast but for the noise, the one that changes least."""
    fastest = max(rates.values())
    return min((row for row, rate in rates.items() if FASTER * rate >= fastest), key=lambda row: len(row.composition))


def difference(losses: list[float], plain: list[float]) -> float:
    """How far losses are from those of the plain run, relatively, in the last quarter of the compared steps."""
    steps = min(len(losses), len(plain), COMPARED_STEPS)
    if not steps:
        return nan
    last = range(steps - max(1, steps // 4), steps)
    size = sum(abs(plain[step]) for step in last)
    return sum(abs(losses[step] - plain[step]) for step in last) / size if size else nan


def last_batch(loader: Any, batch: Any) -> Any:
    """What the last batch of an epoch is like, if it is smaller than `batch`, a full one; otherwise None."""
    size = getattr(loader, "batch_size", None)
    if not draws_indices(loader) or not size or loader.drop_last or not (left := len(loader.sampler) % size):
        return None

    def first(value: Any) -> Any:
        return value[:left] if isinstance(value, torch.Tensor) and value.ndim and len(value) == size else value

    return map_nested(first, batch)


def with_workers(loader: Any, number: int) -> Any:
    """A copy of a DataLoader with another number of loader processes."""
    more = {"prefetch_factor": loader.prefetch_factor or 2} if number else {"prefetch_factor": None}
    return with_batch_sampler(loader, loader.batch_sampler, num_workers=number, **more)
