"""Progress on the terminal."""
import sys
import time
from collections.abc import Container, Generator, Iterator
from dataclasses import dataclass
from math import nan
from typing import Any, ClassVar

from rich.cells import cell_len, set_cell_size

from loopctl import Run, hookimpl
from loopctl.metrics.host_copy import LatestValue
from loopctl.report.terminal import PlainStream, one_line


@dataclass(eq=False)
class Progress:
    """Show a row of metrics per epoch and a live bar, or a line per epoch without a terminal.

    A row is printed when its epoch ends, above the live bar, and also for each evaluation within an epoch. A narrow
    terminal leaves out the columns that matter least: step, then lr, metrics of training, those of plugins. A resumed
    run shows the last rows before it again. Without a terminal a line has all values.

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

        stream: Any = PlainStream(sys.stdout)
        self.console = Console(file=stream)
        self.live = self.console.is_terminal
        self.bar = make_bar(self.console, self.live)
        self.task = self.bar.add_task("", total=run.planned_steps, epoch="", now="")
        self.next, self.loss, self.count = 0.0, LatestValue(), LatestValue()
        self.began, self.printed, self.trained = False, 0, ""
        self.layout: dict[str, int] = {}
        try:
            return (yield)
        finally:
            self.bar.stop()
            if self.began:
                self.print_rows(run)                    # that of an evaluation after which no step was made

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.since, self.counted = time.monotonic(), 0
        if not self.began:
            self.began, self.printed = True, max(0, len(run.history) - 20) if self.live else len(run.history)

    @hookimpl
    def after_step(self, run: Run) -> None:
        self.counted += run.weight * run.world_size         # over all processes
        if len(run.history) != self.printed:
            self.print_rows(run)
        if self.live and time.monotonic() >= self.next:
            self.next = time.monotonic() + self.interval
            self.bar.start()                           # does nothing when it has started
            rates = sorted(float(group["lr"]) for group in run.optimizer.param_groups)
            lr = " to ".join(f"{rate:.3g}" for rate in dict.fromkeys((rates[0], rates[-1])))
            loss = self.loss.update(nan if run.loss is None else run.loss)
            now = f"loss {loss:.4f} lr {lr} {self.speed(self.count.update(self.counted))}"
            self.bar.update(self.task, completed=run.attempts, epoch=f"{run.epoch + 1}/{run.epochs}", now=now)
            self.bar.refresh()

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        self.print_rows(run)

    def print_rows(self, run: Run) -> None:
        """Print the rows of the history that are not printed yet. After a rollback the history is shorter."""
        self.printed, start = len(run.history), min(self.printed, len(run.history))
        for row in run.history[start:]:
            if self.live:
                self.print_row(run, row)
            else:
                values = "  ".join(f"{one_line(key)} {shown(value)}" for key, value in row.items() if key != "epoch")
                self.print(f"epoch {cell(row, 'epoch')}/{run.epochs}  {values}  {self.trained}")

    def print_row(self, run: Run, row: dict[str, Any]) -> None:
        """Print a row of the table, and its heading above it if that is another one than before."""
        monitored = {getattr(plugin, "monitor", None) for plugin in run.hook.plugins.values()}
        layout = fitting_columns(row, self.layout, self.console.width, monitored)
        if layout != self.layout:
            self.layout = layout
            self.print("  ".join(fitted(one_line(column), width) for column, width in layout.items()), style="bold")
        self.print("  ".join(fitted(cell(row, column), width) for column, width in layout.items()))

    def print(self, text: str, style: str | None = None) -> None:
        self.console.print(text, style=style, highlight=False, markup=False, emoji=False, soft_wrap=True)

    @hookimpl(wrapper=True)
    def evaluate(self) -> Generator[None, dict[str, Any], dict[str, Any]]:
        self.trained = self.speed(float(self.counted))      # before the time that the evaluation takes
        return (yield)

    def speed(self, count: float) -> str:
        return f"{count / (time.monotonic() - self.since):,.0f} {one_line(self.unit)}/s"


def make_bar(console: Any, live: bool) -> Any:
    """The live bar, from rich. It leaves two columns free, for a terminal writes ^C there at Ctrl-C."""
    from rich.constrain import Constrain
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    class Bar(Progress):
        def get_renderables(self) -> Iterator[Any]:
            for renderable in super().get_renderables():
                yield Constrain(renderable, max(1, console.width - 2))

    return Bar(
        TextColumn("epoch {task.fields[epoch]}"), *[BarColumn(None)] * (console.width >= 100),     # else no room for it
        TextColumn("step {task.completed:,}/{task.total:,} {task.fields[now]}", markup=False),
        TimeRemainingColumn(compact=True), TextColumn("left"),
        console=console, auto_refresh=False, disable=not live, transient=True)


def shown(value: object) -> str:
    """A metric in few characters."""
    if not isinstance(value, float):
        return one_line(value)
    return f"{value:.4f}" if 1e-2 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def cell(row: dict[str, Any], column: str) -> str:
    """A value of the row in few characters; of an epoch that is not complete two decimals."""
    value = row[column]
    return f"{value:.2f}" if column == "epoch" and isinstance(value, float) else shown(value)


def fitting_columns(
    row: dict[str, Any], before: dict[str, int], width: int, monitored: Container[Any],
) -> dict[str, int]:
    """The columns of `row` that fit in `width`, with their widths, which are at least those of the layout `before`.

    The most important ones are chosen first; they keep the order of the row.
    """
    widths = {column: min(24, max(cell_len(one_line(column)), cell_len(cell(row, column)), before.get(column, 0),
                                  6 if column in ("epoch", "step") else 9)) for column in row}
    chosen: dict[str, int] = {}
    used = -2
    for column in sorted(widths, key=lambda column: importance(column, monitored)):
        used += 2 + widths[column]
        if used > width and chosen:
            break
        chosen[column] = widths[column]
    return {column: chosen[column] for column in row if column in chosen}


def importance(column: str, monitored: Container[Any]) -> int:
    """The place of a column where not all fit: 0 is the last one to be left out."""
    first = ("epoch", "val_loss", "train_loss")
    if column in first:
        return first.index(column)
    if column in monitored:
        return 3
    kind = column.partition("_")[0]
    return {"val": 4, "train": 6, "lr": 7, "step": 8}.get(kind, 5)


def fitted(text: str, width: int) -> str:
    """`text` at the right edge of a column; what is too long, as a list of values may be, is cut."""
    length = cell_len(text)
    return f"{' ' * (width - length)}{text}" if length <= width else f"{set_cell_size(text, width - 1)}…"
