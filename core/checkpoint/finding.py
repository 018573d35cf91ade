"""Find checkpoint files, the latest that is not damaged first, and check what they contain."""
from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import fields
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopctl.checkpoint.atomic_files import DamagedCheckpoint, read_checkpoint
from loopctl.checkpoint.plain_values import restore_value
from loopctl.checkpoint.sharded_tensors import check_sharded
from loopctl.counters import Counters
from loopctl.distributed.process_group import all_gather
from loopctl.errors import UsageError

if TYPE_CHECKING:
    from loopctl.run import Run

log = logging.getLogger("loopctl")

# The entries of a checkpoint and their types: of `counters`, and of the whole.
COUNTERS = {field.name: tuple if field.name == "began" else int for field in fields(Counters)}
LAYOUT = {"config": dict, "model": dict, "loss_fn": dict, "optimizer": dict, "plugins": dict, "composition": list,
          "parameters": list, "data": dict, "plan": list, "counted_plan": list, "max_steps": int | float,
          "counters": dict, "stop": str, "metrics": dict, "history": list, "ranks": list}


def find_checkpoint(path: Path, device: Any = "cpu", run: Run | None = None) -> tuple[Path, dict[str, Any]]:
    """Return the latest undamaged checkpoint at `path`, as its file and its content.

    path: a checkpoint file, a folder of checkpoints, or the folder of a run
    run: the run that resumes; its processes share the work of checking sharded tensors, and agree on the checkpoint

    A warning is logged for each damaged checkpoint that is skipped. Raises UsageError where no checkpoint can be read.
    """
    if not (candidates := resume_candidates(run) if run and path == run.resume else find_candidates(path)):
        raise UsageError(f"resume={path}: no checkpoint found; pass a checkpoint file, or a run's folder, "
                         "which has them in checkpoints/")
    skipped: list[str] = []
    for file in candidates:
        saved, damage = {}, ""
        try:
            saved = read_checkpoint(file, device)
            saved = restore_content(saved)
            check_layout(saved)
            if "sharded" in saved:
                check_sharded(saved, file.parent, *((run.rank, run.world_size) if run else ()))
        except DamagedCheckpoint as error:
            damage = f"{file} {error}"
        damage = max(all_gather(run, damage)) if run else damage
        if not damage:
            for line in skipped:
                log.warning("%s; resuming from %s", line, file.name)
            return file, saved
        skipped.append(damage)
    more = f", and the {len(skipped) - 1} before it cannot be used either" if len(skipped) > 1 else ""
    raise UsageError(f"resume={path}: {skipped[0]}{more}; begin a new run")


def restore_content(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a checkpoint as it was captured. Raises DamagedCheckpoint for descriptions made by hand."""
    try:
        return restore_value(saved)
    except Exception as error:
        raise DamagedCheckpoint(f"has values that cannot be restored ({type(error).__name__})") from error


def check_layout(saved: dict[str, Any]) -> None:
    """Raise DamagedCheckpoint if `saved` lacks an entry of `capture_state`, or has one of another type."""
    wrong = [name for name, kind in LAYOUT.items() if not isinstance(saved.get(name), kind)]
    wrong += [name for name, kind in COUNTERS.items()
              if not wrong and not isinstance(saved["counters"].get(name), kind)]
    if wrong:
        raise DamagedCheckpoint(f"has no valid {wrong[0]!r}: it is not a checkpoint that this version of loopctl reads")


def find_candidates(path: Path) -> list[Path]:
    """Return the checkpoint `path`, or those in the folder `path` or in its subfolders; the latest step first."""
    return [path] if path.is_file() else checkpoints_in(path) or checkpoints_in(path, "*/")


def resume_candidates(run: Run) -> list[Path]:
    """Return the checkpoints that `run` may resume from, the latest step first.

    A run that resumes in its own folder has some in the folders that its plugins write to, too, which may be elsewhere.
    Where its folder has others, the plugins' folders were changed, and what is there may be of another run.
    """
    found = find_candidates(run.resume or Path())
    if not resumes_own_folder(run):
        return found
    own = latest_first(file for folder in run.checkpoint_folders for file in checkpoints_in(folder))
    return own if {*map(realpath, found)} <= {*map(realpath, own)} else found


def resumes_own_folder(run: Run) -> bool:
    """Return whether `run` resumes what an earlier run wrote to its folder."""
    return run.resume is not None and run.resume.is_dir() and run.out.is_dir() and run.resume.samefile(run.out)


def checkpoints_in(folder: Path, below: str = "") -> list[Path]:
    """Return the checkpoints in `folder`, the latest step first. With `below="*/"`, return those in its subfolders."""
    return latest_first(file for file in folder.glob(f"{below}step-*.pt") if step_number(file) >= 0)


def latest_first(files: Iterable[Path]) -> list[Path]:
    return sorted(files, key=lambda file: (step_number(file), file), reverse=True)


def step_number(file: Path) -> int:
    """Return the N of step-N.pt, the number of steps made until then, skipped ones included; -1 for other files."""
    digits = re.match(r"step-(\d+)\.pt", file.name)
    return int(digits[1]) if digits else -1
