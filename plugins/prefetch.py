"""Prefetching: copy batches to the GPU while it computes."""
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from loopctl import Run, hookimpl
from loopctl.data.batch import iter_tensors
from loopctl.data.micro_batches import MicroBatches

DEVICES = ("cuda",)                     # types of devices that copy and compute at the same time


@dataclass(eq=False)
class Prefetch:
    """Copy batches to the GPU while it computes, on a separate stream.

    The run is the same, to the bit. The batches of the next step are read once the backward pass of the current step is
    launched, if they come from a list or from loader workers. Otherwise they are read when they are due: reading in the
    main process may draw random numbers, whose order must not change. Copies overlap with computation only from pinned
    memory, DataLoader(pin_memory=True), which `loopctl run` uses. On a CPU the plugin does nothing.
    """

    capturable: ClassVar[bool] = True
    observer_only: ClassVar[bool] = True
    topic = "precision and speed"

    def __post_init__(self) -> None:
        self.groups: Iterator[list[Any]] | None = None         # of the current epoch
        self.prefetched: list[Any] = []                        # what `fetch` returned for the next step, at most one
        self.in_use: deque[tuple[Any, Any]] = deque()          # batches that the GPU may still read, and their events

    @hookimpl(wrapper=True)
    def train(self) -> Generator[None, None, None]:
        try:
            return (yield)
        finally:
            self.__post_init__()                               # release batches and loader

    @hookimpl(wrapper=True)
    def group_batches(self, run: Run) -> Generator[None, Iterator[list[Any]], Iterator[list[Any]]]:
        groups = iter((yield))
        return self.prefetch(run, groups) if run.device.type in DEVICES else groups

    @hookimpl
    def grads_ready(self, run: Run) -> None:
        if self.groups and self.draws_nothing and not self.prefetched and not torch.cuda.is_current_stream_capturing():
            self.prefetched = [self.fetch(self.groups)]

    def prefetch(self, run: Run, groups: Iterator[list[Any]]) -> Iterator[list[Any]]:
        self.draws_nothing = isinstance(run.train, list | tuple) or getattr(run.train, "num_workers", 0) > 0
        self.side_stream, main = torch.cuda.Stream(run.device), torch.cuda.current_stream(run.device)
        while True:
            ready = self.groups is groups and self.prefetched
            group, error, copied = self.prefetched.pop() if ready else self.fetch(groups)
            if error:
                raise error
            if group is None:
                return
            if next(iter_tensors(group), None) is not None:         # not in run.plan(), which groups numbers
                self.groups, self.prefetched = groups, []
            main.wait_event(copied)
            yield group
            # The memory belongs to the side stream, which would reuse it while the main stream still reads the batches.
            self.in_use.append((group, main.record_event()))
            while self.in_use and self.in_use[0][1].query():
                self.in_use.popleft()

    def fetch(self, groups: Iterator[list[Any]]) -> tuple[list[Any] | None, Exception | None, Any]:
        """Return the batches of the next step, None at the end; the error of the loader, or None; and the event after
        which the batches are copied."""
        group, error = None, None
        with torch.cuda.stream(self.side_stream):
            try:
                group = next(groups, None)
                if isinstance(group, MicroBatches) and self.draws_nothing:
                    group = list(group)
            except Exception as raised:                        # raised again when the batch is due
                error = raised
            return group, error, self.side_stream.record_event()
