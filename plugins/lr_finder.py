"""Learning-rate finder: the learning-rate range test."""
from collections.abc import Generator
from dataclasses import dataclass
from math import inf, isfinite, nan
from pathlib import Path

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.atomic_files import claim_output
from loopctl.report import plots
from loopctl.report.terminal import say
from loopctl.trial_run import trial_run


@dataclass(eq=False)
class LrFinder:
    """Try increasing learning rates on a copy of the run before training, and suggest good ones.

    The range test of arXiv:1506.01186, section 3.3: each step has a higher learning rate than the one before, and the
    loss shows where learning begins and where it diverges. The steps are those of the run, with plugins such as
    accumulation, half precision and clipping, but without schedules. The run itself does not change, to the bit. With
    several parameter groups, the rates are those of the highest group, and the others keep their ratio to it. A resumed
    run does not repeat the test.

    Two rates are suggested: where the smoothed loss falls most steeply, and a tenth of the rate with the lowest loss.
    They are the plugin's attributes steepest and tenth, NaN if the loss does not fall; rates and losses are attributes
    too.

    start_lr: first learning rate
    end_lr: last learning rate
    num_steps: number of rates to try, at least 3, evenly spaced on a logarithmic scale
    beta: smoothing of the loss, the weight of the past in its running mean, from 0 (none) to below 1
    diverge: stop the test when the smoothed loss is this many times its minimum, or not finite
    use: train with the steepest rate, instead of the optimizer's own
    only: end the run after the test
    path: plot of the losses, a .png, .svg or .pdf file relative to the run's folder, if matplotlib is installed; it
        must not exist yet
    """

    start_lr: float = 1e-7
    end_lr: float = 10.0
    num_steps: int = 100
    beta: float = 0.98
    diverge: float = 4.0
    use: bool = False
    only: bool = False
    path: str = "lr_finder.png"
    topic = "learning rates"

    def __post_init__(self) -> None:
        if not 0 < self.start_lr < self.end_lr:
            raise ValueError(f"start_lr is above 0 and below end_lr, not {self.start_lr} with end_lr={self.end_lr}")
        if self.num_steps < 3:
            raise ValueError(f"num_steps is at least 3, not {self.num_steps}")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta is from 0 to below 1, not {self.beta}")
        if not self.diverge > 1:
            raise ValueError(f"diverge is above 1, not {self.diverge}")
        if self.use and self.only:
            raise ValueError("only=true ends the run before the rate can be used; leave out use or only")
        if Path(self.path).suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"path is a .png, .svg or .pdf file, not {self.path!r}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.rates: list[float] = []
        self.losses: list[float] = []       # smoothed
        self.steepest = self.tenth = nan
        self.file = run.out / self.path
        if run.rank == 0:
            claim_output(self.file, resumed=bool(run.resume))
        if not any(group["initial_lr"] for group in run.optimizer.param_groups):
            raise UsageError("every learning rate is 0, so parameter groups have no ratio to keep; choose one above 0")

    # Here all plugins are ready, and a resumed run is restored. A wrapper, so that plugins that start a timer in this
    # hook do not measure the test.
    @hookimpl(wrapper=True)
    def epoch_start(self, run: Run) -> Generator[None, None, None]:
        if run.seen == 0 and not self.rates:
            self.search(run)
            if not self.rates:
                raise UsageError(f"the loss is not finite at the first rate, {self.start_lr:.3g}; lower start_lr")
            if run.rank == 0:
                self.report(run)
            if self.only:
                run.stop = "the learning-rate test is done, and only=true ends the run after it"
            elif self.use:
                self.use_steepest(run)
        return (yield)

    def search(self, run: Run) -> None:
        """Run the test: set `rates`, `losses` and the suggestions."""
        ratios = [initial / top_rate(run) for initial in initial_rates(run)]
        growth = (self.end_lr / self.start_lr) ** (1 / (self.num_steps - 1))
        mean, lowest = 0.0, inf
        with trial_run(run) as copy:
            for number in range(self.num_steps):
                rate = self.start_lr * growth ** number
                loss = copy.step([rate * ratio for ratio in ratios]).item()
                mean = self.beta * mean + (1 - self.beta) * loss
                smoothed = mean / (1 - self.beta ** (number + 1))       # corrects for the initial 0
                if not isfinite(smoothed) or smoothed - lowest > (self.diverge - 1) * abs(lowest):
                    break
                lowest = min(lowest, smoothed)
                self.rates.append(rate)
                self.losses.append(smoothed)
        self.steepest, self.tenth = suggestions(self.rates, self.losses)

    def report(self, run: Run) -> None:
        caption = f"smoothed loss at rates {self.rates[0]:.3g} to {self.rates[-1]:.3g}, logarithmic"
        say(plots.bars(self.losses, caption))        # it works together with a live progress bar
        if isfinite(self.steepest):
            say(f"learning rate: the loss falls most steeply at {self.steepest:.3g}; a tenth of the rate with the "
                f"lowest loss is {self.tenth:.3g}; the run has {top_rate(run):.3g}")
        else:
            say(f"learning rate: the loss does not fall from {self.start_lr:.3g} to {self.end_lr:.3g}")
        try:
            self.draw()
        except (UsageError, OSError) as error:
            say(f"no plot: {error}")

    def draw(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with plots.picture(self.file) as figure:
            axes = figure.add_subplot(xlabel="learning rate", ylabel="loss, smoothed", xscale="log")
            axes.plot(self.rates, self.losses, **plots.stroke(0))
            axes.grid(color=plots.GREY, linewidth=0.4, linestyle=":")
            marks = {"steepest descent": self.steepest, "a tenth of the lowest loss's": self.tenth}
            for number, (name, rate) in enumerate(marks.items(), 1):
                if isfinite(rate):
                    axes.axvline(rate, label=f"{name}: {rate:.3g}", **plots.stroke(number))
                    axes.legend(fontsize=8, handlelength=4)
        say(f"plot: {self.file}")

    def use_steepest(self, run: Run) -> None:
        if not isfinite(self.steepest):
            raise UsageError("use=true: there is no rate to use, because the loss does not fall; choose another "
                             "start_lr or end_lr, or leave out use")
        factor = self.steepest / top_rate(run)
        for group in run.optimizer.param_groups:
            group["initial_lr"] *= factor
            if hasattr(group["lr"], "fill_"):
                group["lr"].fill_(group["initial_lr"])
            else:
                group["lr"] = group["initial_lr"]


def initial_rates(run: Run) -> list[float]:
    return [group["initial_lr"] for group in run.optimizer.param_groups]


def top_rate(run: Run) -> float:
    return max(initial_rates(run))


def suggestions(rates: list[float], losses: list[float]) -> tuple[float, float]:
    """The rate where the loss falls most steeply, and a tenth of the rate with the lowest loss; NaN if it never falls.

    The first tenth of the losses is left out, because a running mean of few losses is not smooth yet.
    """
    inner = range(max(1, len(losses) // 10), len(losses) - 1)
    slopes = {index: losses[index + 1] - losses[index - 1] for index in inner}      # rates are evenly spaced in log
    steepest = min(slopes, key=slopes.__getitem__, default=0)
    if slopes.get(steepest, 0.0) >= 0:
        return nan, nan
    return rates[steepest], rates[losses.index(min(losses))] / 10
