"""How far a run is: counters of epochs, updates and micro-batches. Only the methods here change them."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Counters:
    """The counters of one run. The loop counts; a checkpoint saves and loads them."""

    epoch: int = 0                      # epochs completed
    step: int = 0                       # updates made
    attempts: int = 0                   # updates made and updates skipped
    seen: int = 0                       # micro-batches consumed, over all epochs
    began: tuple[int, int] = (0, 0)     # `seen` and `attempts` when the current epoch began
    shift: int = 0                      # steps that the run gained or lost by resuming with another world size
    evaluated: int = -1                 # `attempts` at the last evaluation; -1 before the first
    recorded: int = -1                  # `attempts` at the last row of the history; -1 before the first

    @property
    def seen_in_epoch(self) -> int:
        """Micro-batches consumed in the current epoch."""
        return self.seen - self.began[0]

    @property
    def attempts_in_epoch(self) -> int:
        """Updates made or skipped in the current epoch."""
        return self.attempts - self.began[1]

    def finish_step(self, micro_batches: int, skipped: bool) -> None:
        """Count a step over so many micro-batches."""
        self.attempts += 1
        self.seen += micro_batches
        self.step += not skipped

    def finish_epoch(self) -> None:
        """Count an epoch; the next one begins here."""
        self.epoch += 1
        self.began = self.seen, self.attempts

    def finish_evaluation(self) -> None:
        """Remember that the run was evaluated after the last step."""
        self.evaluated = self.attempts

    def finish_record(self) -> None:
        """Remember that the history has a row for the last step."""
        self.recorded = self.attempts

    def take_back(self, planned: float) -> None:
        """Take back in `shift` what the epochs so far had more or fewer than the `planned` steps."""
        self.shift = self.attempts - int(planned)

    def discard_update(self) -> None:
        """Count an update that `finish_step` counted as made as one that was skipped."""
        self.step -= 1

    @contextmanager
    def temporarily(self, **values: int) -> Iterator[None]:
        """Set the counters named in `values` inside the block; all counters get their own values back at its end.

        To ask what the run would do elsewhere, such as a schedule for its rate at a later step.
        """
        own = self.state_dict()
        try:
            self.load_state_dict(own | values)
            yield
        finally:
            self.load_state_dict(own)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, state[name])
