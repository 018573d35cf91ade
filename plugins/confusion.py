"""The confusion matrix of the validation data, and the worst mistakes."""
import csv
import logging
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.atomic_files import atomic_write, claim_output
from loopctl.data.batch import target_of
from loopctl.distributed.process_group import all_gather
from loopctl.metrics.confusion import ConfusionMatrix, Mistake, merged, scores_and_classes
from loopctl.report import confusion, html

log = logging.getLogger("loopctl")


@dataclass(eq=False)
class Confusion:
    """Write which classes are taken for which, and show the worst mistakes in the report.

    The matrix of the last evaluation is in a CSV file, with a row per true class and a column per predicted one. The
    page of the plugin `report` shows it, with the samples whose loss is largest among those that were taken for another
    class, and their pictures if the inputs are images. Each picture is scaled to its own darkest and lightest value.
    Of several validation sets each has its own file, with the name of the set in its name.

    worst: how many mistakes the report shows
    path: CSV file, relative to the run's folder; it must not exist yet
    """

    worst: int = 12
    path: str = "confusion.csv"
    observer_only: ClassVar[bool] = True
    capturable: ClassVar[bool] = True           # in a step it does nothing
    topic = "logging and reports"

    def __post_init__(self) -> None:
        if self.worst < 0:
            raise ValueError(f"worst is at least 0, not {self.worst}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        if run.valid is None:
            raise UsageError("there is no validation data, from which the matrix would be; leave confusion out")
        if run.turns:
            raise UsageError("forward is a dict, of a loss for each optimizer, and whose outputs are meant is unknown; "
                             "leave confusion out")
        self.passes: dict[str, ConfusionMatrix] = {}        # by the name of the loader
        self.results: dict[str, tuple[list[list[int]], list[Mistake], list[str]]] = {}
        for name, other in run.hook.plugins.items():
            if other is not self and isinstance(other, Confusion) and other.path == self.path:
                raise UsageError(f"{name} writes to path={self.path} too; choose another path in one of them")
        for name in run.validation_sets() if run.rank == 0 else ():
            claim_output(self.file(run, name), bool(run.resume))

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run, batch: Any) -> Generator[None, Tensor, Tensor]:
        loss = yield
        if run.evaluating:
            self.passes.setdefault(run.evaluating, ConfusionMatrix(self.worst)).update(
                run.outputs, target_of(batch), batch)
        elif not loss.requires_grad:            # the trial of a batch, before the first update
            scores_and_classes(run.outputs, target_of(batch))
        return loss

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Generator[None, dict[str, Any], dict[str, Any]]:
        self.passes = {}
        found = yield
        for name in run.validation_sets():
            loader = f"valid.{name}" if name else "valid"
            counted = self.passes.get(loader)
            counts, mistakes = merged(all_gather(run, counted.on_host() if counted else (None, None, None)), self.worst)
            names = run.loaders[loader].identity["classes"] or []
            if len(names) != len(counts):
                names = [*map(str, range(len(counts)))]
            self.results[name] = counts, mistakes, names
            if run.rank == 0:
                self.write(run, name)
        self.passes = {}
        return found

    def file(self, run: Run, name: str) -> Path:
        """The CSV file of a validation set."""
        file = run.out / self.path
        return file.with_stem(f"{file.stem}_{name.replace('/', '_')}") if name else file

    def write(self, run: Run, name: str) -> None:
        counts, _, names = self.results[name]
        rows, file = [[name, *row] for name, row in zip(names, counts, strict=True)], self.file(run, name)
        try:
            with atomic_write(file) as temporary, temporary.open(
                    "w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
                csv.writer(stream).writerows([["true", *names], *rows])
        except OSError as error:
            log.warning("confusion: %s cannot be written (%s); trying again after the next evaluation", file,
                        error.strerror)

    def report_sections(self, run: Run) -> list[str]:
        """The matrix and the worst mistakes, for the plugin report."""
        parts = []
        for name, (counts, mistakes, names) in self.results.items():
            of = f" of {name}" if name else ""
            parts.append(html.section(f"Confusion matrix{of}", confusion.matrix(counts, names)))
            if mistakes:
                rows = [(names[each.true], names[each.predicted], each.loss, each.probability,
                         f", sample {each.index}" * (run.world_size == 1), picture(each.picture)) for each in mistakes]
                parts.append(html.section(f"Worst mistakes{of}", confusion.mistakes(rows)))
        return parts


def picture(image: Tensor | None) -> bytes | None:
    """An image as PNG, from black for its smallest value to white for its largest one."""
    if image is None:
        return None
    image = image.nan_to_num(0.0, 0.0, 0.0)
    image = image - image.min()
    pixels = (image / image.max().clamp(min=1e-12) * 255).round().byte().movedim(0, -1).contiguous()
    height, width, channels = pixels.shape
    return confusion.png(pixels.numpy().tobytes(), width, height, channels == 3)
