"""Whether a replay is the same run: compare it with the checkpoints, the log and the tape that the run has left."""
from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loopctl import hookimpl
from loopctl.checkpoint.atomic_files import DamagedCheckpoint, read_checkpoint
from loopctl.checkpoint.finding import check_layout, restore_content
from loopctl.checkpoint.sharded_tensors import check_sharded
from loopctl.checkpoint.state import capture_state
from loopctl.errors import UsageError, counted, names
from loopctl.run import Run
from loopctl.tape.fingerprint import bits
from loopctl.tape.header import environment
from loopctl.tape.reading import TapeContent

log = logging.getLogger("loopctl")


def read_undamaged(file: Path) -> dict[str, Any] | None:
    """The content of a checkpoint; None, with a warning, where it is damaged."""
    try:
        saved = restore_content(read_checkpoint(file))
        check_layout(saved)
        if "sharded" in saved:
            check_sharded(saved, file.parent)
        return saved
    except DamagedCheckpoint as error:
        log.warning("%s %s; it is left out", file, error)
        return None


@dataclass(eq=False)
class Rewind:
    """A plugin that compares a replay with what the run has left, and leaves it after its last step."""

    observer_only = True

    settings: dict[str, Any]
    folder: Path
    first: int
    last: int
    checkpoints: dict[int, Path]            # of the run, after the one in which it is entered
    stepped: bool = False

    @hookimpl
    def setup(self, run: Run) -> None:
        run.config = {key: value for key, value in self.settings.items() if value is not None}
        self.compared = {"checkpoint": 0, "evaluation": 0, "update of its tape": 0}
        self.differences: list[tuple[int, str]] = []

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.here = environment(run.device)
        if self.first > run.planned_steps:
            raise UsageError(f"step {self.first:,} is beyond the end of {self.folder}, which is planned for "
                             f"{counted(run.planned_steps, 'step')}; choose an earlier one")

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if not self.stepped:
            self.known = len(run.history)

    @hookimpl
    def after_step(self, run: Run) -> None:
        self.stepped = True
        if run.attempts >= self.last:
            run.leave = run.leave or "the replay ends here"

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if (file := self.checkpoints.get(run.attempts)) and (saved := read_undamaged(file)) and "sharded" not in saved:
            made = capture_state(run)
            if made["counters"] != saved["counters"]:           # it was saved at the end of the epoch
                return
            parts = {"model": "the weights", "trained": "the weights", "loss_fn": "the weights of the loss",
                     "optimizer": "the state of the optimizer"}
            found = [text for part, text in parts.items() if not equal(made[part], saved.get(part, {}))]
            self.note("checkpoint", run.attempts, f"{found[0]} of its checkpoint" if found else "")
            del self.checkpoints[run.attempts]

    def note(self, kind: str, step: int, differs: str) -> None:
        """Note that something was compared, and what differs, if anything."""
        if differs:
            self.differences.append((step, differs))
        else:
            self.compared[kind] += 1

    def compare_history(self, run: Run, history: list[dict[str, float]]) -> None:
        """Compare the rows of the evaluations that were made with those in the log of the run."""
        there = {(row.get("epoch"), row.get("step")): row for row in history}
        for row in run.history[self.known:]:
            if logged := there.get((row["epoch"], row["step"])):
                numbers = {name: value for name, value in row.items() if name.startswith(("train_", "val_", "lr"))}
                found = [name for name, value in numbers.items()
                         if name in logged and not equal(float(value), logged[name])]
                self.note("evaluation", row["step"], f"{names(found)} in its log" if found else "")

    def compare_tapes(self, there: TapeContent, here: TapeContent, entered: int) -> None:
        """Compare the weights after each update that is in both tapes."""
        for number, update in here.updates.items():
            tables = [each and each.table("weights", "end") for each in (update, there.updates.get(number))]
            if number > entered and all(tables):
                first, second = (table.checksums for table in tables if table)
                self.note("update of its tape", number, "" if first == second else "the weights on its tape")


def equal(one: Any, other: Any) -> bool:
    """Whether two nested values are the same to the bit."""
    if isinstance(one, torch.Tensor):
        return (isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
                and torch.equal(bits(one).cpu(), bits(other).cpu()))
    if isinstance(one, dict):
        return (isinstance(other, dict) and one.keys() == other.keys()
                and all(equal(value, other[key]) for key, value in one.items()))
    if isinstance(one, list | tuple):
        return (isinstance(other, list | tuple) and len(one) == len(other)
                and all(map(equal, one, other)))
    return bool(one == other or (one != one and other != other))


def other_environment(folder: Path, tape: TapeContent | None, here: dict[str, Any]) -> list[str]:
    """What is known to differ between the environment of a run and this one."""
    with (folder / "run.toml").open(encoding="utf-8") as file:
        heading = re.match(r"# loopctl (\S+), torch (\S+)", file.readline())
    there = dict(zip(("loopctl", "torch"), heading.groups(), strict=True)) if heading else {}
    there |= {key: tape.header[key] for key in here if tape and key in tape.header}
    here = here | {"loopctl": version("loopctl")}
    return [f"{key.replace('_', ' ')} was {value} and is {here[key]}" for key, value in there.items()
            if value != here[key]]
