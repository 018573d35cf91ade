"""Gradient accumulation over several batches."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from loopctl import Run, hookimpl
from loopctl.data.micro_batches import grouped


@dataclass(eq=False)
class Accumulate:
    """Accumulate gradients over several batches: the update of one big batch in less memory.

    every: batches per update; the batches that remain at the end of an epoch make a smaller update
    """

    every: int = 4
    topic = "gradients"

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every is at least 1, not {self.every}")

    @hookimpl
    def group_batches(self, run: Run, batches: Iterable[Any]) -> Iterator[Sequence[Any]]:
        return grouped(run, batches, self.every)
