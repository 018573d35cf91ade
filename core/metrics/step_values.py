"""Logs of every N-th step: values are copied to the host without waiting, and written when they have arrived."""
from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from loopctl.errors import UsageError, one_line
from loopctl.hooks import hookimpl
from loopctl.metrics.host_copy import HostCopy
from loopctl.metrics.weights import reported_loss

if TYPE_CHECKING:
    from loopctl.run import Run

log = logging.getLogger("loopctl")


class StepValues:
    """The values of every N-th step, and of the first one, on their way to the host. No step waits for the device."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.coming: deque[tuple[int, dict[str, Any]]] = deque()        # by step; tensors as copies to the host

    def due(self, attempts: int) -> bool:
        """Whether step number `attempts` is to be logged; it counts updates made and skipped."""
        return attempts % self.every == 0 or attempts == 1

    def send(self, step: int, values: Mapping[str, Any]) -> None:
        """Start to copy the tensors among the values of a step to the host."""
        copies = {name: HostCopy(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        self.coming.append((step, copies))

    def arrived(self, wait: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the steps whose values are all on the host, with the values: numbers, or of a vector a list.

        wait: also those that are still on their way, which waits for the device
        """
        while self.coming and (wait or all(value.arrived for value in self.coming[0][1].values()
                                           if isinstance(value, HostCopy))):
            step, values = self.coming.popleft()
            yield step, {name: value.wait().tolist() if isinstance(value, HostCopy) else value
                         for name, value in values.items()}


class StepLogger:
    """The base class of plugins that log every N-th step and every evaluation. The option `every_steps` is N.

    A subclass says in `values` what is logged of a step, and writes it in `write_values`, which is called in the order
    of the steps. It may have a method for each of the other moments below. What it writes must not cost the training:
    it writes in `attempt`.
    """

    every_steps: Any
    failures: ClassVar[tuple[type[Exception], ...]] = (OSError,)         # what `attempt` makes a warning

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise ValueError(f"every_steps is at least 1, not {self.every_steps}")

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, Any, Any]:
        self.steps, self.begun, self.refused = StepValues(self.every_steps), False, False
        failure: BaseException | None = None
        try:
            return (yield)
        except BaseException as error:
            failure = error
            raise
        finally:
            if self.begun:
                with suppress(RuntimeError):        # of a device that an error has made unusable
                    self.write_arrived(run, wait=not failure)
                if not self.refused:
                    self.attempt(self.end, run, failure)
                else:
                    with suppress(*self.failures):          # what fails was said; but nothing may be left open
                        self.end(run, failure)

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.begin_once(run)

    # The first hook of a run that was killed when only its end was missing.
    @hookimpl
    def train_end(self, run: Run) -> None:
        self.begin_once(run)

    def begin_once(self, run: Run) -> None:
        if not self.begun:              # only now is it known where the run resumes
            self.saved = run.last_checkpoint
            self.attempt(self.begin, run)
            self.begun = True

    @hookimpl
    def after_step(self, run: Run) -> None:
        if self.steps.due(run.attempts):
            self.steps.send(run.attempts, self.values(run))
            self.write_arrived(run)
        if run.last_checkpoint is not self.saved:       # everything before a checkpoint is written
            self.saved = run.last_checkpoint
            self.write_arrived(run)
            self.attempt(self.flush)

    @hookimpl
    def after_evaluate(self, run: Run) -> None:
        self.write_arrived(run, wait=True)
        self.attempt(self.write_metrics, run)

    def write_arrived(self, run: Run, wait: bool = False) -> None:
        """Write the steps whose values are on the host; with `wait` all of them."""
        for step, values in self.steps.arrived(wait):
            self.attempt(self.write_values, run, step, values)

    def attempt(self, write: Callable[..., None], *arguments: Any) -> None:
        """Call `write`. Where it fails, warn, and write nothing more."""
        if self.refused:
            return
        try:
            write(*arguments)
        except UsageError:
            raise
        except self.failures as error:
            self.refused = True
            reason = getattr(error, "strerror", None) or one_line(error)
            log.warning("%s: %s cannot be written (%s); nothing more is", type(self).__name__.lower(), self.target(),
                        reason)

    def values(self, run: Run) -> dict[str, Any]:
        """What is logged of the step that ends, by name: numbers and tensors."""
        raise NotImplementedError

    def write_values(self, run: Run, step: int, values: Any) -> None:
        """Write what `values` returned in step number `step`."""
        raise NotImplementedError

    def target(self) -> Path | str:
        """Where it writes, for warnings."""
        raise NotImplementedError

    def begin(self, run: Run) -> None:
        """Called in the first epoch, when it is known where the run resumes."""

    def write_metrics(self, run: Run) -> None:
        """Called after an evaluation."""

    def flush(self) -> None:
        """Called after a checkpoint: what was written must be in the file."""

    def end(self, run: Run, error: BaseException | None) -> None:
        """Called when the run ends, also by an error."""


def step_loss(run: Run, name: str = "loss") -> dict[str, Tensor]:
    """The loss of the step that ends, as a mean per sample; with several processes that of this one. Empty if it has
    none."""
    return {} if run.loss is None else {name: reported_loss(run, run.loss, run.weight, run.world_size)}


def give_to_loggers(run: Run, step: int, values: Mapping[str, float]) -> None:
    """Give values of a step, by name, to every plugin that has a method `log_values(run, step, values)`."""
    for plugin in run.hook.plugins.values():
        if hasattr(plugin, "log_values"):
            plugin.log_values(run, step, values)
