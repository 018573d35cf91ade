"""`loopctl why`: where two runs part and what that means, from their tapes; or as far as their folders tell."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from loopctl.checkpoint.atomic_files import DamagedCheckpoint, read_checkpoint
from loopctl.checkpoint.finding import checkpoints_in, latest_first, restore_content, step_number
from loopctl.cli.compare import RecordedRun, read_run
from loopctl.cli.rewind import replay
from loopctl.cli.saved_run import checkpoint_folders
from loopctl.composition.discovery import build_plugin, split_spec
from loopctl.errors import UsageError, counted, one_line
from loopctl.tape.reading import TapeContent, read_tape
from loopctl.why.differences import Explanation, configuration_differences, explain_tapes

HOW_TO_RECORD = ("To find the update, record both: loopctl run with --plugin tape; other code inside `with "
                 "loopctl.tape.record(FILE):`, or as a script, which loopctl why runs itself.")
SEARCHED = ("direction", "dtype", "random numbers", "not finite", "unknown", "plugin", "rounding")  # modules tell more
MOST_REPLAYED = 2000            # updates that are made again in the search for one
SCRIPT = """
import pathlib, runpy, sys
from loopctl.tape import record
tape, script = sys.argv[1:]
sys.argv = [script]
sys.path[0] = str(pathlib.Path(script).resolve().parent)
with record(tape, modules=True):
    runpy.run_path(script, run_name="__main__")
"""


@dataclass
class Side:
    """One of the two that are compared."""

    name: str                               # A or B
    path: Path
    folder: Path | None = None              # of a run
    tape: TapeContent | None = None

    @property
    def described(self) -> str:
        what = f"tape of {counted(len(self.tape.updates), 'update')}" if self.tape else "no tape"
        damage = f", {counted(self.tape.damaged, 'record')} damaged" if self.tape and self.tape.damaged else ""
        return f"{self.name}: {self.path} ({what}{damage})"


def why(paths: tuple[Path, Path], replays: bool, as_json: bool, tell: Callable[[str], None]) -> str:
    """Return the explanation as text, or as a JSON object.

    paths: of each, the folder of a run, a tape, or a Python script, which is run
    replays: whether updates may be made again, where the tapes do not say enough
    tell: is called with a line about what takes time

    Raises UsageError where one of the paths is none of these.
    """
    if paths[0].resolve() == paths[1].resolve():
        raise UsageError(f"{paths[0]} is given twice; name two runs, such as runs/a runs/b")
    with ExitStack() as opened:
        scratch = Path(opened.enter_context(TemporaryDirectory(prefix="loopctl-")))
        sides = [read_side(name, path, scratch, tell) for name, path in zip("AB", paths, strict=True)]
        a, b = sides
        if a.tape and b.tape:
            found = explain_tapes(a.tape, b.tape)
            lines = [found.text]
            if replays and a.folder and b.folder and worth_replaying(found):
                found, lines = search(a, b, found, scratch, tell)
        else:
            found, lines = without_tapes(a, b, replays, scratch, tell)
    if as_json:
        return json.dumps({"same": found.same, "update": found.update, "cause": found.cause, "certain": found.certain,
                           "plugins": list(found.plugins), "text": "\n".join(lines)}, ensure_ascii=False, indent=4)
    return "\n".join([a.described, b.described, "", *lines])


def read_side(name: str, path: Path, scratch: Path, tell: Callable[[str], None]) -> Side:
    """Read one of the two. Raises UsageError where it is no run, tape or script."""
    if path.is_dir():
        run = read_run(path, str(path))
        tapes = [path / file for file in tape_paths(run.config)] or sorted(path.glob("*.tape"))
        tapes = [file for file in tapes if file.is_file()]
        return Side(name, path, path, read_tape(tapes[0]) if tapes else None)
    if not path.is_file():
        raise UsageError(f"there is no {path}; name the folder of a run, a tape or a Python script")
    if path.suffix != ".py":
        return Side(name, path, None, read_tape(path))
    file = scratch / f"{name}.tape"
    tell(f"running {path}")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(file), str(path)], stdout=2, check=False)
    if done.returncode or not file.exists():
        reason = (f"ended with status {done.returncode}" if done.returncode
                  else "made no update with an optimizer of torch")
        raise UsageError(f"{path} {reason}, so there is nothing to compare")
    return Side(name, path, None, read_tape(file))


def tape_paths(config: dict[str, Any]) -> list[str]:
    """The files, relative to a run's folder, that its plugins `tape` write to."""
    specs = [str(spec) for spec in config.get("plugin") or []]
    return [build_plugin(spec)[1].path for spec in specs if split_spec(spec)[0] == "tape"]


# The search: make updates again with a finer tape


def worth_replaying(found: Explanation) -> bool:
    """Whether a finer tape says more: the update is not known, or the module is not."""
    if found.same or found.update is None or found.cause == "length":
        return False
    return found.last_equal < found.update - 1 or found.cause in SEARCHED


def search(a: Side, b: Side, found: Explanation, scratch: Path,
           tell: Callable[[str], None]) -> tuple[Explanation, list[str]]:
    """Make the updates from the last equal one to the first that differs again, with tapes of every module."""
    assert found.update is not None
    assert a.folder
    assert b.folder
    first, last = narrowed(a.folder, b.folder, found.last_equal + 1, found.update)
    if last - first >= MOST_REPLAYED:
        return found, [found.text, f"It lies in the updates {first:,} to {last:,}, which are too many to make again; "
                                   "run with checkpoint:every_steps=N or tape:every_steps=N to come nearer."]
    finer = []
    for side in (a, b):
        assert side.folder
        tell(f"making the updates {first:,} to {last:,} of {side.path} again, with a tape of every module")
        out = scratch / f"replay-{side.name}"
        try:
            with redirect_stdout(sys.stderr):           # what the code of the run prints is no part of the answer
                done = replay(side.folder, first, last, ["tape:modules=true,path=replay.tape"], out)
        except Exception as error:                      # the code of the run may raise anything; what is known is said
            reason = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            return found, [found.text, f"Its updates could not be made again to look closer: {one_line(reason)}."]
        if done.differs:
            return found, [found.text, f"Its updates could not be made again to look closer: {side.name} runs "
                                       f"otherwise here than it did, from update {done.differs[0]} on "
                                       f"({done.differs[1]})."]
        finer.append(read_tape(done.out / "replay.tape"))
    closer = explain_tapes(*finer)
    if closer.same:
        return found, [found.text, f"Made again here, the updates {first:,} to {last:,} are the same in both: what "
                                   "differed then is not in what a run is made from, such as the machine or its load."]
    return closer, [closer.text, f"Found by making the updates {first:,} to {last:,} of both again."]


def narrowed(one: Path, other: Path, first: int, last: int) -> tuple[int, int]:
    """A smaller range of updates that the difference lies in, by the weights in checkpoints that both runs have."""
    files = [{step_number(file): file for file in run_checkpoints(folder)} for folder in (one, other)]
    steps = sorted(step for step in files[0].keys() & files[1].keys() if first <= step < last)
    while steps:
        middle = steps[len(steps) // 2]
        if equal_weights(files[0][middle], files[1][middle]):
            first, steps = middle + 1, [step for step in steps if step > middle]
        else:
            last, steps = middle, [step for step in steps if step < middle]
    return first, last


def run_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, the latest first."""
    config = read_run(folder, str(folder)).config
    return latest_first(file for name in checkpoint_folders(config) for file in checkpoints_in(folder / name))


def equal_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold the same weights, to the bit. One that is damaged counts as different."""
    try:
        models = [restore_content(read_checkpoint(file))["model"] for file in (one, other)]
    except (DamagedCheckpoint, KeyError):
        return False
    return models[0].keys() == models[1].keys() and all(
        torch.equal(value, models[1][name]) for name, value in models[0].items())


# Without tapes: what the folders tell


def without_tapes(a: Side, b: Side, replays: bool, scratch: Path,
                  tell: Callable[[str], None]) -> tuple[Explanation, list[str]]:
    """Compare configurations, environments, curves and checkpoints, and search between checkpoints."""
    unknown = Explanation(False, None, "unknown", False, "")
    lacking = " and ".join(side.name for side in (a, b) if not side.tape)
    lines = [f"{lacking} {'have' if ' and ' in lacking else 'has'} no tape."]
    if not (a.folder and b.folder):
        return unknown, [*lines, HOW_TO_RECORD]
    runs = [read_run(folder, str(folder)) for folder in (a.folder, b.folder)]
    versions = [heading(folder) for folder in (a.folder, b.folder)]
    if versions[0] != versions[1]:
        lines.append(f"They were made by other versions: {versions[0]} in A, {versions[1]} in B.")
    options = configuration_differences(runs[0].config, runs[1].config)
    lines.append(f"The configurations differ: {'; '.join(options)}." if options else "The configurations are the same.")
    differing = first_row(runs)
    lines += [differing[1]] if differing else []
    steps, agreement = checkpoints_that_differ(a.folder, b.folder)
    lines += agreement
    last = steps[1] if steps else differing[0] if differing else None
    if replays and last:
        start = Explanation(False, last, "unknown", False, "", last_equal=steps[0] if steps else 0)
        found, more = search(a, b, start, scratch, tell)
        if found is not start:
            return found, [*more, *lines]
        lines += [line for line in more if line]
    return unknown, [*lines, HOW_TO_RECORD]


def heading(folder: Path) -> str:
    """The versions in the heading of a run's configuration."""
    file = folder / "run.toml"
    found = re.match(r"# (loopctl .+)", file.read_text(encoding="utf-8")) if file.is_file() else None
    return found[1] if found else "unknown versions"


def first_row(runs: list[RecordedRun]) -> tuple[int, str] | None:
    """The first row of the histories in which a metric of both differs: its update, and a sentence."""
    for one, other in zip(*(run.history for run in runs), strict=False):
        for name, value in one.items():
            if name in other and other[name] != value and not (value != value and other[name] != other[name]):
                step = int(min(one.get("step", 0), other.get("step", 0)))
                return step, (f"Their curves part by update {step:,} (epoch {one.get('epoch', 0):g}): {name} is "
                              f"{value:.7g} in A and {other[name]:.7g} in B.")
    return None


def checkpoints_that_differ(one: Path, other: Path) -> tuple[tuple[int, int] | None, list[str]]:
    """The last update at which checkpoints of both have the same weights, and the first at which not; and sentences."""
    files = [{step_number(file): file for file in run_checkpoints(folder)} for folder in (one, other)]
    steps = sorted(files[0].keys() & files[1].keys())
    if not steps:
        return None, ["They have no checkpoints of the same update."]
    if equal_weights(files[0][steps[-1]], files[1][steps[-1]]):
        return None, [f"The weights in their checkpoints of update {steps[-1]:,} are the same to the bit."]
    first, last = narrowed(one, other, 1, steps[-1])
    equal = f"the same to the bit at update {first - 1:,} and " if first > 1 else ""
    return (first - 1, last), [f"The weights in their checkpoints are {equal}different at update {last:,}."]
