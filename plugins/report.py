"""A page about the run, to read, to keep, to send."""
import logging
import os
import platform
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from math import inf
from time import monotonic
from typing import Any, ClassVar

import torch

from loopctl import Run, UsageError, charts, checkpoint, explain, files, hookimpl, layers, page

log = logging.getLogger("loopctl")


@dataclass(eq=False)
class Report:
    """Write a page about the run when it ends: curves, layers, composition, configuration.

    The page is whole in itself, and opens in any browser without a network. It is written after an error or Ctrl-C too,
    if an epoch was complete by then. For the layers it looks on at the first step, as `summary` does, so the run is
    what it would be without; only torch.compile compiles once more, for the second step.

    path: the file, relative to the run's folder; it must not exist yet, unless a run goes on that wrote it
    """

    path: str = "report.html"
    capturable: ClassVar[bool] = True       # it looks on at the first step only
    on_first_rank: ClassVar[bool] = True

    @hookimpl(wrapper=True)
    def train(self, run):
        self.began, self.layers = False, None
        with ExitStack() as self.watching:          # ends in after_step, or here after an exception
            try:
                result = yield
            except BaseException as error:
                if self.began and run.history:
                    self.write(run, f"broken off: {type(error).__name__}{f': {error}' if str(error) else ''}")
                raise
        if self.began:                              # else a run that was at its end already, which has its report
            self.write(run, f"stopped early: {run.stop}" if run.stop else "finished")
        return result

    @hookimpl
    def train_start(self, run):
        self.file = run.out / self.path
        try:
            files.writable(self.file)
            there = self.file.exists() and not (run.resume and page.ours(self.file))
        except OSError as error:
            raise UsageError(f"{self.file} cannot be written ({error.strerror}); say another path") from error
        if there:
            raise UsageError(f"{self.file} exists and is not overwritten; move it, or say another path")
        self.tree = explain(run.hook.plugins.values())
        self.start, self.since = datetime.now(), monotonic()

    @hookimpl
    def epoch_start(self):
        self.began = True

    @hookimpl
    def before_step(self, run):
        if self.layers is None:
            before = run.outputs                    # each micro-batch sets its own: the first ends when these are gone
            self.layers = self.watching.enter_context(layers.watch(run.model, lambda: run.outputs is before))
            self.looking = True

    @hookimpl
    def after_step(self):
        if self.looking:
            self.watching.close()
            self.looking = False

    def write(self, run: Run, end: str) -> None:
        """Write the page, or a line that says why there is none."""
        try:
            if self.file.exists() and not page.ours(self.file):
                log.warning("report: %s has come to be meanwhile and is not overwritten; there is no report", self.file)
                return
            with files.replacing(self.file) as aside:
                page.write(self.content(run, end), aside)
        except Exception as error:              # whatever a metric is: the training is worth more than its report
            said = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            log.warning("report: %s cannot be written (%s); there is no report", self.file, said)

    def content(self, run: Run, end: str) -> str:
        asked = run.config or checkpoint.config(run)
        model = asked.get("model", type(run.model).__name__)
        title = f"{model} on {asked['data']}" if "data" in asked else model
        parts = [f'<div class="columns">{page.section("The run", page.table([], self.facts(run)))}'
                 f'{page.section("Results", results(run.history))}</div>']
        if found := charts.curves(run.history):
            drawn = "".join(charts.figure(key, name, lines) for key, (name, lines) in enumerate(found.items()))
            parts.append(page.section("Curves", f'<div class="charts">{drawn}</div>'))
        parts += [
            f'<div class="columns">{page.section("Configuration", page.table([], settings(asked)))}'
            f'{page.section("Environment", page.table([], environment(run)))}</div>',
            page.section("Composition", "<p>Every moment of training, and the plugins that act there.</p>",
                         page.verbatim(self.tree))]
        if self.layers:
            parts.append(page.section("Layers", layer_table(self.layers)))
        return page.page(title, end, parts)

    def facts(self, run: Run) -> list[list[str]]:
        seconds = round(monotonic() - self.since)
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        time = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return [["Epochs", f"{run.epoch:,} of {run.epochs:,}"], ["Updates", f"{run.step:,}"],
                ["Parameters", f"{parameters:,}"],
                ["Gone on at" if run.resume else "Begun at", f"{self.start:%Y-%m-%d %H:%M:%S}"],
                ["Time since then", time], ["Folder", str(run.out.absolute())]]


def results(history: list[dict[str, Any]]) -> str:
    """The last and the best value of each metric."""
    rows = []
    for column in dict.fromkeys(key for row in history for key in row if key not in ("epoch", "step")):
        points = [(row["epoch"], row.get(column)) for row in history]
        top = charts.best(column, points)
        epoch, value = top or (None, None)
        rows.append([column, *map(charts.shown, (points[-1][1], value, epoch))])
    return page.table(["metric", "last", "best", "in epoch"], rows, "numbers")


def layer_table(found: list[layers.Layer]) -> str:
    """The report that `summary` prints."""
    report = layers.table(found)
    cells = zip(*([str(cell) for cell in column.cells] for column in report.columns), strict=True)
    return page.table([str(column.header) for column in report.columns], cells, "layers")


def settings(asked: dict[str, Any]) -> list[list[str]]:
    """What the run was asked for, without what was left open."""
    return [[key, page.breaking("\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))]
            for key, value in sorted(asked.items()) if value not in (None, inf, (), [])]


def environment(run: Run) -> list[list[str]]:
    """What the run's numbers and its speed may hang on."""
    device = str(run.device)
    if run.device.type == "cuda":
        device += f", {torch.cuda.get_device_name(run.device)}, CUDA {torch.version.cuda}"
    return [["Device", device], ["Threads", str(torch.get_num_threads())], ["torch", torch.__version__],
            ["Python", platform.python_version()], ["loopctl", version("loopctl")], ["System", platform.platform()],
            ["Processors", str(os.cpu_count())]]
