"""The folder of a run: make it, lock it, and write the run's configuration there."""
from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import click
import torch

from loopctl import explain, hookimpl
from loopctl.checkpoint.atomic_files import atomic_write
from loopctl.checkpoint.folder_lock import RUN as LOCK
from loopctl.checkpoint.folder_lock import FolderLock, LostLock
from loopctl.cli import saved_run
from loopctl.data.batch import length_or_none
from loopctl.distributed.process_group import rank, restart_count, store_note
from loopctl.errors import UsageError
from loopctl.run import Run


@dataclass(eq=False)
class Recorder:
    """A plugin that writes the run's configuration to its folder, and what the use of its model needs to know.

    It also ends the run if the lock on the folder is lost, before anything else is written. Only rank 0 writes; all
    processes have `run.config`, which `ddp` and `fsdp` compare.
    """

    observer_only = True

    settings: dict[str, Any]
    data: str                           # the content of data.json
    new: bool
    started: bool = False
    stepped: bool = False               # a step was made
    lock: FolderLock | None = None
    next_check: float = 0.0             # by time.monotonic()

    def check_lock(self) -> None:
        """Raise LostLock if the run's folder is no longer locked by this process."""
        if self.lock:
            self.lock.check()

    @hookimpl
    def after_step(self) -> None:
        self.stepped = True
        if (now := time.monotonic()) >= self.next_check:        # also true after a process was stopped for a while
            self.next_check = now + 1
            self.check_lock()

    @hookimpl(wrapper=True)             # a wrapper runs before the plain hooks of plugins that write files
    def after_evaluate(self) -> Generator[None, None, None]:
        self.check_lock()
        return (yield)

    @hookimpl(wrapper=True)
    def epoch_end(self) -> Generator[None, None, None]:
        self.check_lock()
        return (yield)

    @hookimpl
    def setup(self, run: Run) -> None:
        run.config = {key: value for key, value in self.settings.items() if value is not None}
        if self.new and run.rank == 0:          # early, so that a run that is killed before it trains can be resumed
            self.write_configuration(run)
            (run.out / "explain.txt").touch()               # so that a plugin cannot choose this name

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if self.started or run.rank:
            return
        explained = explain(run=run) + "\n"                # first, because it may raise UsageError
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        print(f"{self.settings['model']} ({parameters:,} parameters) on {self.settings['data']}{data_size(run)}, "
              f"{self.settings['optimizer']}, {self.settings['device']}"
              f"{f', {run.world_size} processes' if run.world_size > 1 else ''}")
        if self.settings["init"] and self.new:
            print(f"weights to begin with: {self.settings['init']}")
        if not self.new:
            self.write_configuration(run)
        with unwritable_is_error(run.out):
            if self.new or not (run.out / "explain.txt").exists() or not (run.out / "explain.txt").stat().st_size:
                (run.out / "explain.txt").write_text(explained, encoding="utf-8")
        self.started = True

    def write_configuration(self, run: Run) -> None:
        text = configuration_text(run.config, f"loopctl run --config {run.out}/run.toml")
        with unwritable_is_error(run.out), atomic_write(run.out / "run.toml") as file:
            file.write_text(text, encoding="utf-8")
        with unwritable_is_error(run.out), atomic_write(run.out / saved_run.DATA) as file:
            file.write_text(self.data, encoding="utf-8")


def configuration_text(settings: dict[str, Any], command: str) -> str:
    """Settings as TOML, under a heading with the versions and the command that reads them."""
    heading = f"# loopctl {version('loopctl')}, torch {torch.__version__}\n# {command}\n"
    # Strings, numbers, booleans and lists of them are written in TOML as in JSON.
    return heading + "".join(f"{key} = {json.dumps(value, ensure_ascii=False, indent=4)}\n"
                             for key, value in sorted(settings.items()))


def data_size(run: Run) -> str:
    """The size of the training and validation data in brackets, in samples if they are known, else in batches."""
    parts = [part for part in run.data_sets().values() if part is not None]
    for unit, sizes in (("samples", [length_or_none(getattr(part, "dataset", None)) for part in parts]),
                        ("batches", [length_or_none(part) for part in parts])):
        if None not in sizes:
            return f" ({' + '.join(f'{size:,}' for size in sizes)} {unit})"
    return ""


def write_inside(plugins: Iterable[Any]) -> None:
    """Have plugins that would write elsewhere write to the run's folder too."""
    for plugin in plugins:
        for name in ("dir", "path"):
            value = getattr(plugin, name, None)
            if isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
                setattr(plugin, name, Path(value).name)


@contextmanager
def unwritable_is_error(folder: Path) -> Iterator[None]:
    """Raise an exception that ends the command in one line where the block cannot write to `folder`."""
    try:
        yield
    except OSError as error:
        raise click.ClickException(f"{folder} cannot be written: {error.strerror}") from error


@contextmanager
def run_folder(path: Path | None, recorder: Recorder) -> Iterator[Path]:
    """Give the run's folder, new or that of the run to resume, and lock it.

    A new folder is removed if training never started, or was refused before its first update. Raises UsageError where
    another process uses the folder.
    """
    folder, made = make_folder(path) if recorder.new else (path or Path(), [])
    try:
        with FolderLock(folder) as recorder.lock:
            if recorder.new and files_in(folder):           # another run started and ended in the meantime
                raise UsageError(f"--out {folder} exists and is not overwritten; choose another folder")
            try:
                store_note("out", str(folder))
                yield folder
            except UsageError:
                recorder.started &= recorder.stepped
                raise
            finally:
                if recorder.new and not recorder.started:
                    with suppress(LostLock):                # then what is in the folder is another run's
                        recorder.check_lock()
                        for child in files_in(folder):
                            shutil.rmtree(child) if child.is_dir() else child.unlink()
    finally:
        for parent in made if not recorder.started else ():
            with suppress(OSError):                         # not empty: another run may have started there
                parent.rmdir()


def files_in(folder: Path) -> list[Path]:
    """The files and folders in a folder, except for its lock."""
    return [child for child in folder.iterdir() if child.name != LOCK]


def make_folder(path: Path | None) -> tuple[Path, list[Path]]:
    """Make the folder `path`, or one in runs/ named after the time. Return it and all folders made, innermost first.

    Raises UsageError where the folder is not empty, or cannot be written to.
    """
    for folder in [path] if path else timestamped_folders():
        made: list[Path] = []
        try:
            if folder is path and folder.exists() and not (folder.is_dir() and not files_in(folder)):
                alternative = f", or use --resume {path}" if (folder / "run.toml").exists() else ""
                raise UsageError(f"--out {path} exists and is not overwritten; choose another folder{alternative}")
            made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
            folder.mkdir(parents=True, exist_ok=folder is path)
            with TemporaryFile(dir=folder):              # raises OSError if the folder cannot be written to
                pass
        except FileExistsError:                          # another run started in the same second
            continue
        except OSError as error:
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise UsageError(f"--out {folder} cannot be written: {error.strerror}; choose another folder") from error
        return folder, made
    raise UsageError(f"--out {path} cannot be written: a file of this name was just created; choose another folder")


def timestamped_folders() -> Iterator[Path]:
    """Paths in runs/ named after the current time; the second and further ones end in a number."""
    name = f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return (Path(f"{name}_{number}" if number > 1 else name) for number in count(1))


def named_folder(name: str, settings: dict[str, Any]) -> Path:
    """Return the folder of the run called `name`. Raises UsageError where it exists, or where there can be none."""
    for option in ("out", "resume"):
        if settings[option]:
            raise UsageError(f"--name {name} with --{option}: both name the run's folder; leave out one of the two")
    if Path(name).name != name or name.startswith(("-", ".")):
        raise UsageError(f"--name {name}: the name is that of a folder in runs/; use a name without / or, for a folder "
                         "elsewhere, --out DIR")
    folder = Path("runs", name)
    if rank() == 0 and not restart_count() and folder.exists():
        raise UsageError(f"--name {name}: {folder} exists and is not overwritten; choose another name"
                         + f", or use --resume {shlex.quote(str(folder))}" * folder.is_dir())
    return folder
