"""`loopctl rewind`: make some steps of a run again, with observers added, and prove that it is the same run."""
from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from loopctl import fit, torch_settings
from loopctl.checkpoint.finding import checkpoints_in, find_candidates, step_number
from loopctl.cli import data, launch
from loopctl.cli.arguments import build_arguments, chosen_torch_settings
from loopctl.cli.compare import log_path, read_config, read_history
from loopctl.cli.options import training_options
from loopctl.cli.replay_plugins import (
    check_observer,
    check_outside,
    complete,
    in_replay,
    rolls_back,
    shadow_checkpoints,
)
from loopctl.cli.replay_proof import Rewind, other_environment, read_undamaged
from loopctl.cli.run_folder import make_folder, unwritable_is_error, write_inside
from loopctl.cli.saved_run import checkpoint_folders
from loopctl.composition.discovery import build_plugin, split_spec
from loopctl.distributed.process_group import launched_processes
from loopctl.errors import UsageError, counted, names
from loopctl.plugins.tape import Tape
from loopctl.run import Run
from loopctl.tape.reading import TapeContent, read_tape

log = logging.getLogger("loopctl")
CHANGED = ("epochs", "max_steps", "eval_every")         # may be others in a resumed run, and change what follows


@dataclass
class Replay:
    """A part of a run that was made again."""

    run: Run                            # as it was left, after step `last`
    entered: int                        # the step after which it was entered; 0 is the beginning
    checkpoint: Path | None             # in which it was entered; None is the beginning
    last: int                           # the last step that was made
    out: Path                           # the folder with what the plugins wrote
    compared: dict[str, int]            # how many of which fingerprints of the run are equal, by what they are
    differs: tuple[int, str] | None     # the first step at which it is not the same run, and what differs there
    reasons: list[str]                  # what is known to differ in the environment and in the settings
    next: int | None                    # the step of the run's first checkpoint that was not reached

    @property
    def proved(self) -> bool:
        """Whether something was compared, and all of it is equal."""
        return self.differs is None and any(self.compared.values())


def replay(
    folder: Path, first: int, last: int, plugins: Sequence[str] = (), out: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Replay:
    """Make the steps `first` to `last` of the run in `folder` again, and those before them since its last checkpoint.

    Steps count updates made and skipped, from 1 on, as the names of checkpoints do. The run is entered in the latest
    undamaged checkpoint before `first`, or at its beginning, and is left after `last` or at its own end. Its folder is
    only read. Nothing is printed but what plugins print.

    plugins: observers to add, as for --plugin; their option `every_steps` is 1 unless it is given
    out: the folder that they write to, new or empty; None is a new one in rewinds/
    tell: is called with a line that says where the run is entered, before anything is trained

    Raises UsageError where the run cannot be entered, or a plugin is no observer.
    """
    settings = read_settings(folder)
    config = read_config(folder / "run.toml")
    specs = list(settings["plugin"])
    left = checkpoints_of(folder, config)
    tape, history = tape_of(folder, specs), readable(read_history, folder / log_path(config)) or []
    check_end(folder, first, left, tape)
    entry = find_entry(left, first)
    added = [complete(spec, first, last, entry.step) for spec in plugins]
    for spec, text in zip(plugins, added, strict=True):
        check_observer(spec, text)
    with TemporaryDirectory(prefix="loopctl-") as scratch, new_folder(folder, out, first) as target, same_settings():
        check_outside(folder, target, [build_plugin(text)[1] for text in added])
        arguments, resolved, _ = build_arguments(settings | {"plugin": [*specs, *added]}, entry.file)
        own, rest = arguments["plugins"][:len(specs)], arguments["plugins"][len(specs):]
        write_inside(own)
        saving = any(map(rolls_back, own))
        resume = shadow_checkpoints(folder, own, entry.step, entry.file, Path(scratch)) if saving else entry.file
        proof = Rewind(resolved, folder, first, last, {step: file for step, file in left if step > entry.step})
        recorded = [Tape(tape[0].every_steps, path=str(Path(scratch, "run.tape")))] if tape else []
        arguments["plugins"] = [*filter(None, (in_replay(plugin, saving) for plugin in own)), *rest, *recorded,
                                data.BatchSize(), proof]
        tell(entry.describe(folder, first))
        with torch_settings(**chosen_torch_settings(settings)):
            run = fit(**arguments, resume=resume, out=target)
        if run.attempts < first:
            reason = run.stop or run.leave
            raise UsageError(f"step {first:,} was not reached: {folder} ends at step {run.attempts:,}"
                             f"{f' ({reason})' if reason else ''}; choose an earlier one")
        proof.compare_history(run, history)
        if tape:
            proof.compare_tapes(tape[1], read_tape(recorded[0].file), entry.step)
        reasons = other_environment(folder, tape[1] if tape else None, proof.here) + entry.other_settings(config)
        return Replay(run, entry.step, entry.file, run.attempts, target, proof.compared,
                      min(proof.differences, default=None), reasons, min(proof.checkpoints, default=None))


# What the run has left


@click.command()
@training_options
def configured(**settings: Any) -> None:
    """The options that a run.toml has, without those that say how long a run may take and what it is called."""


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`, as `loopctl run --resume` would have them. Raises UsageError."""
    if not folder.is_dir():
        named = Path("runs", folder)
        raise UsageError(f"there is no folder {folder}; " + (
            f"did you mean {named}?" if (named / "run.toml").exists() else "name the folder of a run, such as runs/a"))
    file = folder / "run.toml"
    if not file.is_file() or not read_config(file):
        raise UsageError(f"{folder} has no run.toml that says what it trained; name the folder of a run of `loopctl "
                         "run`")
    try:
        settings = configured.make_context("run", [f"--config={file}"]).params
    except click.UsageError as error:
        raise UsageError(error.format_message().removeprefix("--config: ")) from error
    number = max(len(launch.device_numbers(settings["devices"])), launched_processes())
    if number > 1:
        raise UsageError(f"{folder} is a run of {number} processes; only a run of one process can be replayed")
    return {name: value for name, value in settings.items() if name != "config"}


def checkpoints_of(folder: Path, config: dict[str, Any]) -> list[tuple[int, Path]]:
    """The checkpoints that a run has left, with their steps, the latest first. best.pt is one too."""
    places = [folder / name for name in checkpoint_folders(config)]
    files = {file.resolve(): file for place in places for file in checkpoints_in(place)}
    files |= {file.resolve(): file for file in find_candidates(folder)}
    found = {step_number(file): file for file in files.values()}
    for file in (place / "best.pt" for place in places):
        linked = any(map(file.samefile, found.values())) if file.is_file() else True
        if not linked and (saved := read_undamaged(file)):
            found.setdefault(saved["counters"]["attempts"], file)
    return sorted(found.items(), reverse=True)


def tape_of(folder: Path, specs: Iterable[str]) -> tuple[Tape, TapeContent] | None:
    """The plugin tape of a run and its tape; None where it has none."""
    for spec in specs:
        if split_spec(spec)[0] == "tape":
            plugin = build_plugin(spec)[1]
            if (folder / plugin.path).is_file() and (content := readable(read_tape, folder / plugin.path)):
                return plugin, content
    return None


def readable(read: Callable[[Path], Any], file: Path) -> Any:
    """What `read` returns of a file; None, with a warning, where it is damaged."""
    try:
        return read(file)
    except UsageError as error:
        log.warning("%s; it is left out", error)
        return None


def check_end(folder: Path, first: int, left: list[tuple[int, Path]], tape: tuple[Tape, TapeContent] | None) -> None:
    """Raise UsageError where a finished run has no step `first`."""
    end = max((step for step, _ in left), default=0)
    if tape:
        end = max(end, *tape[1].updates)
    if 0 < end < first and (folder / "weights.safetensors").exists():
        raise UsageError(f"step {first:,} is beyond the end of {folder}, which has {counted(end, 'step')}; choose an "
                         "earlier one")


@dataclass
class Entry:
    """Where a run is entered: a checkpoint and its step, or the beginning."""

    step: int = 0
    file: Path | None = None
    saved: dict[str, Any] = field(default_factory=dict)         # the configuration in the checkpoint, and its limit

    def describe(self, folder: Path, first: int) -> str:
        if self.file:
            return f"{folder} is entered after step {self.step:,}, in {self.file}"
        again = f", so {counted(first - 1, 'step')} before it {'is' if first == 2 else 'are'} made again too"
        return f"{folder} is entered at its beginning: it has no checkpoint before step {first:,}{again * (first > 1)}"

    def other_settings(self, config: dict[str, Any]) -> list[str]:
        """The settings that the run had in its checkpoint and that it was resumed with others of."""
        return [f"the run was resumed with another {key} ({self.saved[key]}, then {config.get(key)})"
                for key in CHANGED if self.saved and self.saved.get(key) != config.get(key)]


def find_entry(left: list[tuple[int, Path]], first: int) -> Entry:
    """The latest undamaged checkpoint from which step `first` is still to be made; the beginning where there is none.
    """
    for step, file in left:
        if step < first and (saved := read_undamaged(file)):
            if len(saved["ranks"]) > 1:
                raise UsageError(f"{file} is of a run of {len(saved['ranks'])} processes; only a run of one process "
                                 "can be replayed")
            return Entry(step, file, saved["config"])
    return Entry()


# The folder, the environment, the text


@contextmanager
def new_folder(folder: Path, out: Path | None, step: int) -> Iterator[Path]:
    """Give the folder of a replay, new or empty. What was made is removed where the replay is refused."""
    if out and out.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"--out {out} is in {folder}, which is left as it is; choose another folder")
    if out and (out / "run.toml").exists():
        raise UsageError(f"--out {out} is the folder of a run and is not overwritten; choose another folder")
    target, made = make_folder(out or unused_folder(folder, step))
    try:
        yield target
    except BaseException as error:
        for child in target.iterdir() if isinstance(error, UsageError) else ():     # it was refused
            shutil.rmtree(child) if child.is_dir() else child.unlink()
        for parent in made:
            with suppress(OSError):                 # not empty
                parent.rmdir()
        raise


def unused_folder(folder: Path, step: int) -> Path:
    """A path in rewinds/ that does not exist, named after the run and the step."""
    name = f"rewinds/{folder.resolve().name}-step-{step}"
    paths = (Path(f"{name}_{number}" if number > 1 else name) for number in count(1))
    return next(path for path in paths if not path.exists())


@contextmanager
def same_settings() -> Iterator[None]:
    """Restore, after the block, what --deterministic switches on for the whole process."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def rewind_run(folder: Path, to: int, steps: int, plugins: Sequence[str], out: Path | None) -> None:
    """Replay the run until `steps` after step `to`, and print whether it is the same run.

    Raises an exception that ends the command with status 1 where it is another one.
    """
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        click.echo(line)

    found = replay(folder, to, to + steps, plugins, out, tell)
    tell(f"steps {found.entered + 1:,} to {found.last:,} were made again")
    tell(verdict(found, to))
    with unwritable_is_error(found.out):
        (found.out / "rewind.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    written = sorted(file.name for file in found.out.iterdir() if file.name != "rewind.txt")
    click.echo(f"folder: {found.out}{f' with {names(written)}' if written else ''}")
    if found.differs:
        raise click.ClickException(f"what is in {found.out} is not of the run {folder}")


def verdict(found: Replay, to: int) -> str:
    """Whether a replay of step `to` is the same run, and how that is known."""
    because = f": {'; '.join(found.reasons)}" if found.reasons else ""
    if found.differs:
        step, what = found.differs
        known = because or (": no version or setting is known to be another one; look at the data, at code of your own "
                            "and, on a GPU, at --deterministic")
        return f"not the same run: at step {step:,}, {what} {'has' if 'log' in what else 'are'} other values{known}"
    equal = [counted(number, kind) if kind != "update of its tape" else f"{counted(number, 'update')} of its tape"
             for kind, number in found.compared.items() if number]
    if equal:
        return f"the same run: {names(equal)} {'is' if sum(found.compared.values()) == 1 else 'are'} equal to the bit"
    reach = f"--steps {found.next + 1 - to} goes beyond its checkpoint of step {found.next:,}" if found.next else ""
    return ("not proved to be the same run: between these steps it left no checkpoint, evaluation or tape to compare "
            f"with{because}; {reach}{', and ' * bool(reach)}a run with the plugin tape can be compared at each step")
