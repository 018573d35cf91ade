"""A report of the run as one HTML page."""
import logging
import os
import platform
from collections.abc import Generator
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from math import inf
from time import monotonic
from typing import Any, ClassVar

import torch

from loopctl import Run, explain, hookimpl
from loopctl.checkpoint.atomic_files import atomic_write, claim_output
from loopctl.checkpoint.folder_lock import LostLock
from loopctl.checkpoint.state import run_config
from loopctl.model import summary
from loopctl.model.summary import FirstStepLayers
from loopctl.report import charts, html

log = logging.getLogger("loopctl")


@dataclass(eq=False)
class Report:
    """Write a page about the run when it ends: curves, layers, composition, configuration.

    The page is one file that opens in any browser without a network. It is also written after an error or Ctrl-C, if
    an epoch was completed. The layers are recorded in the first step, as by `summary`, so the run is the same as
    without it; only torch.compile compiles once more, for the second step. Plugins that have a method
    `report_sections(run)`, such as `norms` and `confusion`, add sections of their own.

    path: the file, relative to the run's folder; it must not exist yet, unless the run is resumed and wrote it itself
    """

    path: str = "report.html"
    capturable: ClassVar[bool] = True       # it only records the first step
    rank_zero_only: ClassVar[bool] = True
    topic = "logging and reports"

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        self.began = False
        with FirstStepLayers() as self.first_step:
            try:
                result = yield
            except LostLock:                        # the folder may be another run's by now
                raise
            except BaseException as error:
                if self.began and run.history:
                    self.write(run, f"broken off: {type(error).__name__}{f': {error}' if str(error) else ''}")
                raise
        if self.began:                              # else the run was finished before, and has its report
            left = f"left at step {run.attempts:,}, to be resumed: {run.leave}" if run.leaving else "finished"
            self.write(run, f"stopped early: {run.stop}" if run.stop else left)
        return result

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.file = run.out / self.path
        resumed = bool(run.resume) and (self.file.is_dir() or self.is_report())       # a folder is always refused
        claim_output(self.file, resumed)
        self.tree = explain(run.hook.plugins.values())
        self.start, self.since = datetime.now(), monotonic()

    @hookimpl
    def epoch_start(self) -> None:
        self.began = True

    @hookimpl
    def before_step(self, run: Run) -> None:
        self.first_step.start(run)

    @hookimpl
    def after_step(self) -> None:
        self.first_step.finish()

    def is_report(self) -> bool:
        """Whether the file does not exist yet, or is a page that this plugin has written."""
        return not self.file.exists() or html.is_report(self.file)

    def write(self, run: Run, end: str) -> None:
        """Write the page, or a line that says why there is none."""
        try:
            if not self.is_report():
                log.warning("report: %s was made by another program and is not overwritten; there is no report",
                            self.file)
                return
            with atomic_write(self.file) as aside:
                html.write(self.content(run, end), aside)
        except Exception as error:              # metrics may be anything; a report must not cost the training
            reason = (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
            log.warning("report: %s cannot be written (%s); there is no report", self.file, reason)

    def content(self, run: Run, end: str) -> str:
        asked = run.config or run_config(run)
        model = asked.get("model", type(run.model).__name__)
        title = f"{model} on {asked['data']}" if "data" in asked else model
        parts = [f'<div class="columns">{html.section("The run", html.table([], self.facts(run)))}'
                 f'{html.section("Results", results(run.history))}</div>']
        if found := charts.curves(run.history):
            drawn = "".join(charts.figure(key, name, lines) for key, (name, lines) in enumerate(found.items()))
            parts.append(html.section("Curves", f'<div class="charts">{drawn}</div>'))
        for plugin in run.hook.plugins.values():
            if hasattr(plugin, "report_sections"):
                parts += plugin.report_sections(run)
        parts += [
            f'<div class="columns">{html.section("Configuration", html.table([], settings(asked)))}'
            f'{html.section("Environment", html.table([], environment(run)))}</div>',
            html.section("Composition", "<p>Every hook, in order, and the plugins that act there.</p>",
                         html.verbatim(self.tree))]
        if self.first_step.layers:
            parts.append(html.section("Layers", layer_table(summary.after_thawing(self.first_step.layers, run.model))))
        return html.page(title, end, parts)

    def facts(self, run: Run) -> list[list[str]]:
        seconds = round(monotonic() - self.since)
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        time = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return [["Epochs", f"{run.epoch:,} of {run.epochs:,}"], ["Updates", f"{run.step:,}"],
                ["Parameters", f"{parameters:,}"],
                ["Resumed at" if run.resume else "Started at", f"{self.start:%Y-%m-%d %H:%M:%S}"],
                ["Time since then", time], ["Folder", str(run.out.absolute())]]


def results(history: list[dict[str, Any]]) -> str:
    """The last and the best value of each metric."""
    rows = []
    for column in dict.fromkeys(key for row in history for key in row if key not in ("epoch", "step")):
        points = [(row["epoch"], row.get(column)) for row in history]
        top = charts.best(column, points)
        epoch, value = top or (None, None)
        rows.append([column, *map(charts.shown, (points[-1][1], value, epoch))])
    return html.table(["metric", "last", "best", "in epoch"], rows, "numbers")


def layer_table(found: list[summary.Layer]) -> str:
    """The report that `summary` prints."""
    report = summary.table(found)
    cells = zip(*([str(cell) for cell in column.cells] for column in report.columns), strict=True)
    return html.table([str(column.header) for column in report.columns], cells, "layers")


def settings(asked: dict[str, Any]) -> list[list[str]]:
    """What the run was asked for, without what was left open."""
    return [[key, html.breaking("\n".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value))]
            for key, value in sorted(asked.items()) if value not in (None, inf, (), [])]


def environment(run: Run) -> list[list[str]]:
    """What the results and the speed of the run may depend on."""
    device = str(run.device)
    if run.device.type == "cuda":
        device += f", {torch.cuda.get_device_name(run.device)}, CUDA {torch.version.cuda}"
    return [["Device", device], ["Threads", str(torch.get_num_threads())], ["torch", torch.__version__],
            ["Python", platform.python_version()], ["loopctl", version("loopctl")], ["System", platform.platform()],
            ["Processors", str(os.cpu_count())]]
