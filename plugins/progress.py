"""Progress on the terminal."""
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass
from math import nan
from typing import Any, ClassVar

from loopctl import Run, hookimpl
from loopctl.metrics.host_copy import LatestValue
from loopctl.report.terminal import PlainStream, one_line


@dataclass(eq=False)
class Progress:
    """Show a live progress bar, or a line per epoch without a terminal, and a table at the end.

    unit: the name of what is counted for the speed
    interval: seconds between two updates of the bar
    """

    unit: str = "samples"
    interval: float = 0.1
    rank_zero_only: ClassVar[bool] = True
    topic = "logging and reports"

    def __post_init__(self) -> None:
        if not self.interval >= 0:
            raise ValueError(f"interval is at least 0, not {self.interval}")

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        stream: Any = PlainStream(sys.stdout)
        self.console = Console(file=stream)
        if not self.console.is_terminal:
            self.console = Console(file=stream, width=200)      # so that no line wraps where there is no window
        self.live = self.console.is_terminal
        self.bar = Bar(
            TextColumn("epoch {task.fields[epoch]}"), BarColumn(None),
            TextColumn("step {task.completed:,}/{task.total:,} {task.fields[now]}", markup=False),
            TimeRemainingColumn(compact=True), TextColumn("left"),
            console=self.console, auto_refresh=False, disable=not self.live, transient=True)
        self.task = self.bar.add_task("", total=run.planned_steps, epoch="", now="")
        self.next, self.loss, self.count = 0.0, LatestValue(), LatestValue()
        self.began = False
        try:
            result = yield
        finally:
            self.bar.stop()
        if self.began and run.history:
            self.console.print(table(run.history))
        return result

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.since, self.counted, self.began = time.monotonic(), 0, True

    @hookimpl
    def after_step(self, run: Run) -> None:
        self.counted += run.weight * run.world_size         # over all processes
        if self.live and time.monotonic() >= self.next:
            self.next = time.monotonic() + self.interval
            self.bar.start()                           # does nothing when it has started
            lr = float(run.optimizer.param_groups[0]["lr"])
            loss = self.loss.update(nan if run.loss is None else run.loss)
            now = f"loss {loss:.4f} lr {lr:.3g} {self.speed(self.count.update(self.counted))}"
            self.bar.update(self.task, completed=run.attempts, epoch=f"{run.epoch + 1}/{run.epochs}", now=now)
            self.bar.refresh()

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        if not self.live:
            row = "  ".join(f"{one_line(key)} {shown(value)}" for key, value in run.history[-1].items()
                            if key != "epoch")
            self.console.print(f"epoch {run.epoch}/{run.epochs}  {row}  {self.trained}",
                               highlight=False, markup=False, emoji=False)

    @hookimpl(wrapper=True)
    def evaluate(self) -> Generator[None, dict[str, Any], dict[str, Any]]:
        self.trained = self.speed(float(self.counted))      # before the time that the evaluation takes
        return (yield)

    def speed(self, count: float) -> str:
        return f"{count / (time.monotonic() - self.since):,.0f} {one_line(self.unit)}/s"


def shown(value: object) -> str:
    """A metric in few characters."""
    if not isinstance(value, float):
        return one_line(value)
    return f"{value:.4f}" if 1e-2 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def table(history: list) -> object:
    """The epochs as a table; of a long run the first and the last ones."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    columns = list(dict.fromkeys(key for row in history for key in row))
    found = Table(box=SIMPLE, pad_edge=False)
    for column in columns:
        # As Text, because a plain string would be read as markup.
        found.add_column(Text(one_line(column)), justify="right", overflow="fold")
    rows = history if len(history) <= 30 else [*history[:5], {}, *history[-20:]]
    for row in rows:
        found.add_row(*(Text(shown(row.get(column, "")) if row else "...") for column in columns))
    return found
