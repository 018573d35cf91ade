"""How many steps the epochs of a run have: counted in advance, by grouping numbers in place of batches."""
from __future__ import annotations

from dataclasses import dataclass
from itertools import count, islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loopctl.run import Run


@dataclass(frozen=True)
class Plan:
    """The steps and the micro-batches of each epoch.

    per_epoch: of each epoch, these two numbers; later epochs are like the last one in it
    """

    per_epoch: tuple[tuple[int, int], ...]

    def epoch(self, number: int) -> tuple[int, int]:
        """The steps and the micro-batches of epoch `number`, from 0."""
        return self.per_epoch[min(number, len(self.per_epoch) - 1)]

    def steps(self, epochs: float) -> float:
        """How many steps the first `epochs` epochs have; of a part of an epoch, its part of the steps."""
        last = len(self.per_epoch) - 1
        if not last:                    # the usual case
            return epochs * self.per_epoch[0][0]
        whole = min(int(epochs), last)
        return sum(steps for steps, _ in self.per_epoch[:whole]) + (epochs - whole) * self.per_epoch[whole][0]

    def epochs(self, steps: float) -> float:
        """How many epochs the first `steps` steps are."""
        whole, rest = self.split(steps)
        return whole + rest / self.per_epoch[whole][0]

    def split(self, steps: float) -> tuple[int, float]:
        """How many epochs with an entry of their own, and the steps after them, the first `steps` steps are."""
        for whole, (length, _) in enumerate(self.per_epoch[:-1]):
            if steps < length:
                return whole, steps
            steps -= length
        return len(self.per_epoch) - 1, steps

    def position(self, step: int) -> tuple[int, int]:
        """The epochs and the micro-batches that are complete before step `step`, from 0."""
        whole, rest = self.split(step)
        steps, micro_batches = self.per_epoch[whole]
        return whole + int(rest // steps), self.micro_batches(whole) + round(rest / steps * micro_batches)

    def micro_batches(self, epochs: int) -> int:
        """How many micro-batches the first `epochs` epochs have."""
        last = len(self.per_epoch) - 1
        whole = min(epochs, last)
        return sum(batches for _, batches in self.per_epoch[:whole]) + (epochs - whole) * self.per_epoch[whole][1]


def plan_epochs(run: Run, length: int | None) -> Plan:
    """Count the steps of each epoch. One epoch stands for all, unless a plugin declares `grouping_changes`.

    length: the number of batches in an epoch; None where it is unknown, and `run.steps_per_epoch` ends an epoch
    """
    acting = run.hook.acting["group_batches"]
    changes = any(getattr(run.hook.plugins[name], "grouping_changes", False) for name in acting)
    found: list[tuple[int, int]] = []
    steps = seen = 0
    while not found or (changes and len(found) < run.epochs and steps < run.max_steps):
        start: dict[str, Any] = {"attempts": steps, "step": steps, "seen": seen, "began": (seen, steps)}
        with run.counters.temporarily(**({"epoch": len(found)} | start if changes else {})):
            groups = run.hook.group_batches(run=run, batches=count() if length is None else iter(range(length)))
            sizes = [len(group) for group in islice(groups, run.steps_per_epoch)]
        found.append((len(sizes), sum(sizes)))
        steps, seen = steps + len(sizes), seen + sum(sizes)
    return Plan(tuple(found))
