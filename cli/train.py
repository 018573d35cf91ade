"""`loopctl run`: build a run from the options, train it, and write its configuration and weights to its folder."""
from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from itertools import count
from math import inf
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import click
import torch
from torch import nn

from loopctl import Parallel, explain, fit, hookimpl
from loopctl.checkpoint.atomic_files import Weights, atomic_write, save_weights
from loopctl.checkpoint.folder_lock import NAME as LOCK
from loopctl.checkpoint.folder_lock import FolderLock, LostLock
from loopctl.checkpoint.state import find_candidates
from loopctl.cli import data, launch, models, optimizers
from loopctl.cli.specs import DEFAULT_PLUGINS
from loopctl.composition.compose import blame_plugin, compose
from loopctl.composition.discovery import build_plugin, split_spec
from loopctl.composition.options import to_spec
from loopctl.distributed.process_group import launched_processes, rank, read_note, restart_count, store_note
from loopctl.errors import UsageError
from loopctl.loop import DEFAULTS
from loopctl.model.eval_mode import eval_mode
from loopctl.model.summary import record_forward, render, table
from loopctl.prepare import build_run, find_device
from loopctl.rng import seed_everything
from loopctl.run import Run


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The fraction of a batch whose highest logit is that of its class."""
    return (output.argmax(1) == target).float().mean()


def build_arguments(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build what the settings name. Return the arguments of `fit`, and the settings with all defaults filled in."""
    specs, plugins = build_plugins(settings)
    device = find_device(device_name(settings))
    factory, lr = optimizers.make(settings["optimizer"], settings["lr"], device.type)
    if settings["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    seed_everything(settings["seed"])
    dataset = data.make(settings["data"], settings["data_root"], settings["download"])
    model = models.make(settings["model"], dataset)
    train, valid = dataset.loaders(settings["batch_size"], settings["workers"], device)
    arguments = {
        "model": model, "loss_fn": nn.CrossEntropyLoss(), "optimizer": factory, "train": train, "valid": valid,
        "epochs": settings["epochs"], "max_steps": settings["max_steps"], "eval_every": settings["eval_every"],
        "plugins": plugins, "metrics": {"accuracy": accuracy}, "device": device, "seed": settings["seed"]}
    full_specs = [to_spec(split_spec(text)[0], plugin) for text, plugin in zip(specs, plugins, strict=True)]
    several = launched_processes() > 1 or settings["devices"]               # then each process has a device of its own
    return arguments, settings | {"lr": lr, "device": device.type if several else str(device), "plugin": full_specs}


def build_plugins(settings: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Return the specs and the instances of the run's plugins. Raises UsageError if they cannot be combined."""
    launch.check_devices(settings["devices"], settings["device"])
    specs = list(settings["plugin"])
    given = {build_plugin(text)[0] for text in specs}
    specs += [f"{name}:unit=images" if name == "progress" else name for name in DEFAULT_PLUGINS
              if name not in given and name not in settings["without"]]
    plugins = [build_plugin(text)[1] for text in specs]
    numbers = launch.device_numbers(settings["devices"])
    if len(numbers) > 1 and not any(isinstance(plugin, Parallel) for plugin in plugins):
        specs, plugins = ["ddp", *specs], [build_plugin("ddp")[1], *plugins]
    compose(plugins)                          # refuses a wrong combination before the data is read
    return specs, plugins


def device_name(settings: dict[str, Any]) -> str:
    """The device of this process: the one that --devices lists, if it lists one only, otherwise --device."""
    numbers, device = launch.device_numbers(settings["devices"]), settings["device"]
    if len(numbers) == 1 and torch.cuda.is_available() and device in ("auto", "cuda"):
        return f"cuda:{numbers[0]}"
    return device


def run(settings: dict[str, Any], arguments: list[str]) -> None:
    """Train with these settings, here or in the processes of --devices, which are started with the same `arguments`."""
    if len(numbers := launch.device_numbers(settings["devices"])) > 1 and launched_processes() == 1:
        build_plugins(settings)             # a wrong composition is reported here, once, before any process is started
        sys.exit(launch.launch(numbers, arguments))
    out, resume = settings.pop("out"), settings.pop("resume")
    settings.pop("config")
    if resume and out:
        raise UsageError("--resume with --out: a resumed run writes to its own folder; leave out --out")
    if rank():
        logging.getLogger("loopctl").setLevel(logging.ERROR)            # only rank 0 prints warnings
    elif restart_count() and not resume:
        folder = Path(read_note("out") or out or "")                    # of the attempt before the restart
        out, resume = (None, folder) if folder.name and folder.exists() else (out, None)
    train(settings, out, resume)


def train(settings: dict[str, Any], out: Path | None, resume: Path | None) -> None:
    """Train in this process, in a new folder or in that of the run to resume, and save the final weights there."""
    arguments, resolved = build_arguments(settings)
    if resume and (resume / "weights.safetensors").exists() and not find_candidates(resume):
        raise UsageError(f"--resume {resume}: this run is finished and has no checkpoint to resume from; "
                         "start a new run")
    recorder = Recorder(resolved, new=not resume)
    arguments["plugins"].append(recorder)
    # Only rank 0 makes the folder; the other processes get its path from rank 0 when they join the process group.
    opened = run_folder(resume or out, recorder) if rank() == 0 else nullcontext(Path())
    with opened as folder, matmul_precision(settings["matmul"]):
        try:
            result = fit(**arguments, resume=resume, out=folder)
        except KeyboardInterrupt:
            where = f"; what was written is in {folder}" if recorder.started else ""
            if rank() == 0:
                click.echo(f"interrupted{where}", err=True)
            raise SystemExit(130) from None
        weights = folder / "weights.safetensors"
        if not recorder.started and weights.exists():
            more = f"{result.epoch} epochs); use more --epochs to continue it"
            raise UsageError(f"{folder}: this run is finished ({f'{result.stop})' if result.stop else more}")
        final = Weights(result.model)         # a collective operation if the model's tensors are sharded
        if rank():
            return
        recorder.check_lock()
        try:
            save_weights(final, weights)
        except OSError as error:
            raise click.ClickException(f"{weights} cannot be written ({error.strerror or error}); "
                                       f"use loopctl run --resume {folder} to try again") from error
    click.echo(f"stopped early: {result.stop}" if result.stop
               else f"finished: {result.epoch} epochs, {result.step:,} updates")
    click.echo(f"run folder: {folder}")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Set torch's precision of float32 matrix products inside the block, and restore it afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def prepare_run(settings: dict[str, Any]) -> Run:
    """Build the run that the settings describe, up to its optimizer, without training."""
    settings.pop("config")
    arguments, _ = build_arguments(settings)
    arguments["max_steps"] = arguments["max_steps"] or inf
    world_size = max(1, len(launch.device_numbers(settings["devices"])))
    return build_run(DEFAULTS, **arguments, world_size=world_size)


def explanation(settings: dict[str, Any]) -> str:
    """The text of `loopctl explain`: which plugin acts at which hook, and the plan in numbers."""
    run = prepare_run(settings)
    with blame_plugin(run.hook):
        return explain(run=run)


def layer_summary(settings: dict[str, Any]) -> str:
    """The text of `loopctl summary`: the model's layers, with their output shapes for one batch."""
    run = prepare_run(settings)
    images, _ = next(iter(run.train))
    with eval_mode(run.model), torch.no_grad(), record_forward(run.model) as layers:
        run.model(images.to(run.device))
    return render(table(layers))


@dataclass(eq=False)
class Recorder:
    """A plugin that writes the run's configuration to its folder, when training starts and all checks have passed.

    It also ends the run if the lock on the folder is lost, before anything else is written.
    """

    observer_only = True
    rank_zero_only = True

    settings: dict[str, Any]
    new: bool
    started: bool = False
    lock: FolderLock | None = None
    next_check: float = 0.0             # by time.monotonic()

    def check_lock(self) -> None:
        """Raise an exception that ends the run if its folder is no longer locked by this process."""
        try:
            if self.lock:
                self.lock.check()
        except LostLock as error:
            raise click.ClickException(f"{error.strerror}; this run ends without writing any more") from error

    @hookimpl
    def after_step(self) -> None:
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
        if self.new:
            for name in ("run.toml", "explain.txt"):       # so that a plugin cannot choose these names
                (run.out / name).touch()

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if self.started:
            return
        explained = explain(run=run) + "\n"                # first, because it may raise UsageError
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        loaders: tuple[Any, Any] = run.train, run.valid
        size = [len(loader.dataset) for loader in loaders]
        print(f"{self.settings['model']} ({parameters:,} parameters) on {self.settings['data']} "
              f"({size[0]:,} + {size[1]:,} images), {self.settings['optimizer']}, {self.settings['device']}"
              f"{f', {run.world_size} processes' if run.world_size > 1 else ''}")
        versions = f"loopctl {version('loopctl')}, torch {torch.__version__}"
        heading = f"# {versions}\n# loopctl run --config {run.out}/run.toml\n"
        # Strings, numbers, booleans and lists of them are written in TOML as in JSON.
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False, indent=4)}\n"
                 for key, value in sorted(run.config.items())]
        try:
            with atomic_write(run.out / "run.toml") as file:
                file.write_text(heading + "".join(lines), encoding="utf-8")
            if self.new:
                (run.out / "explain.txt").write_text(explained, encoding="utf-8")
        except OSError as error:
            raise click.ClickException(f"{run.out} cannot be written: {error.strerror}") from error
        self.started = True


@contextmanager
def run_folder(path: Path | None, recorder: Recorder) -> Iterator[Path]:
    """Give the run's folder, new or that of the run to resume, and lock it.

    A new folder is removed if training never started. Raises UsageError where another process uses the folder.
    """
    folder, made = make_folder(path) if recorder.new else (path or Path(), [])
    try:
        with FolderLock(folder) as recorder.lock:
            if recorder.new and files_in(folder):           # another run started and ended in the meantime
                raise UsageError(f"--out {folder} exists and is not overwritten; choose another folder")
            try:
                store_note("out", str(folder))
                yield folder
            finally:
                if recorder.new and not recorder.started:
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
                alternative = f", or use --resume {path}" if folder.is_dir() else ""
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
