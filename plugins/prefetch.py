"""Batches on the GPU before it asks for them."""
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loopctl import Run, hookimpl
from loopctl.data.batch import iter_tensors

STREAMS = ("cuda",)                     # devices that copy and compute at once


@dataclass(eq=False)
class Prefetch:
    """Copy batches to the GPU while it computes, on a stream of their own.

    They are the same batches, to the bit. The next step's are read as soon as this one's backward pass is on its way,
    if they come from a list or from loader workers; reading in the main process draws random numbers, whose order stays
    as it is. Copies overlap with computing only from pinned memory, DataLoader(pin_memory=True), which `loopctl run`
    has. On a CPU there is nothing to copy.
    """

    capturable: ClassVar[bool] = True
    observer_only: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.groups: Iterator[list[Any]] | None = None         # of the epoch at hand
        self.coming: list[Any] = []                            # the step's batches that were read ahead, if any
        self.leaving: deque[tuple[Any, Any]] = deque()         # what the GPU may still read, and when it has done so

    @hookimpl(wrapper=True)
    def train(self) -> Generator[None, None, None]:
        try:
            return (yield)
        finally:
            self.__post_init__()                               # let go of batches and loader

    @hookimpl(wrapper=True)
    def group_batches(self, run: Run) -> Generator[None, Iterator[list[Any]], Iterator[list[Any]]]:
        groups = iter((yield))
        return self.ahead(run, groups) if run.device.type in STREAMS else groups

    @hookimpl
    def grads_ready(self, run: Run) -> None:
        elsewhere = isinstance(run.train, list | tuple) or getattr(run.train, "num_workers", 0) > 0
        if self.groups and elsewhere and not self.coming and not torch.cuda.is_current_stream_capturing():
            self.coming = [self.fetch(self.groups)]

    def ahead(self, run: Run, groups: Iterator[list[Any]]) -> Iterator[list[Any]]:
        self.side, main = torch.cuda.Stream(run.device), torch.cuda.current_stream(run.device)
        while True:
            mine = self.groups is groups and self.coming
            group, error, copied = self.coming.pop() if mine else self.fetch(groups)
            if error:
                raise error
            if group is None:
                return
            if next(iter_tensors(group), None) is not None:         # else it only counts steps, with numbers
                self.groups, self.coming = groups, []
            main.wait_event(copied)
            yield group
            # Its memory is the side stream's, which would use it again while the GPU still computes with it.
            self.leaving.append((group, main.record_event()))
            while self.leaving and self.leaving[0][1].query():
                self.leaving.popleft()

    def fetch(self, groups: Iterator[list[Any]]) -> tuple[list[Any] | None, Exception | None, Any]:
        """The next step's batches, or why there are none, and the event after which they are there."""
        group, error = None, None
        with torch.cuda.stream(self.side):
            try:
                group = next(groups, None)
            except Exception as raised:                        # it is due when the batch is
                error = raised
            return group, error, self.side.record_event()
