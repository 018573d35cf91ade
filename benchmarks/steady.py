"""Whether a long run stays as fast and as small as it was: time per step and memory over 100,000 steps.

    python benchmarks/steady.py [steps]

The network of benchmarks/overhead.py with clip, a cosine per step and ema, in epochs of 1,000 steps. The time is the
median over the 1,000 steps before, the memory what is resident (Linux). Prints a table of docs/performance.md.
"""
import os
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

from timing import BATCHES, make, sgd
from torch import nn

from loopctl import Run, fit, hookimpl

PER_EPOCH = 1000


def resident() -> float:
    """Megabytes of memory that the process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Watch:
    """Notes the time of every step of an epoch, and at its end says how it was where that is asked for."""

    def __init__(self, at: set[int]) -> None:
        self.at, self.times = at, [0.0] * PER_EPOCH         # made beforehand, so that watching takes no memory

    @hookimpl
    def before_step(self, run: Run) -> None:
        self.times[run.step % PER_EPOCH] = perf_counter()

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        if run.step in self.at:
            steps = [1e6 * (after - before) for before, after in zip(self.times, self.times[1:], strict=False)]
            print(f"| {run.step:,} | {median(steps):.0f} | {resident():.1f} |", flush=True)


if __name__ == "__main__":
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    print("| step | us per step | resident memory, MiB |\n|---|---|---|")
    fit(make(), nn.CrossEntropyLoss(), sgd, BATCHES[:PER_EPOCH], epochs=steps // PER_EPOCH,
        plugins=["clip:max_norm=1", "cosine:by=step", "ema", Watch({1000, 2000, 10_000, steps // 2000 * 1000, steps})])
