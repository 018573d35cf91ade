"""`loopctl run`: build a run from the options, train it, and write its configuration and weights to its folder."""
from __future__ import annotations

import json
import logging
import os
import shlex
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
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import click
import torch
from torch import nn

from loopctl import Data, Parallel, explain, fit, hookimpl
from loopctl.checkpoint.atomic_files import Weights, atomic_write, save_weights
from loopctl.checkpoint.folder_lock import RUN as LOCK
from loopctl.checkpoint.folder_lock import FolderLock, LostLock
from loopctl.checkpoint.state import checkpoints_in, find_candidates, step_number
from loopctl.cli import data, evaluation, launch, losses, metrics, models, optimizers, pretrained, saved_run
from loopctl.cli.lasting_output import lasting_output
from loopctl.cli.specs import DEFAULT_PLUGINS
from loopctl.composition.compose import blame_plugin, compose
from loopctl.composition.discovery import build_plugin, split_spec
from loopctl.composition.options import to_spec
from loopctl.data.batch import length_or_none, to_device
from loopctl.distributed.process_group import launched_processes, rank, read_note, restart_count, store_note
from loopctl.errors import UsageError, counted, one_line
from loopctl.loop import DEFAULTS
from loopctl.model.eval_mode import eval_mode
from loopctl.model.forward import call_model
from loopctl.model.summary import record_forward, render, table
from loopctl.plugins.checkpoint import Checkpoint
from loopctl.plugins.freeze import Freeze
from loopctl.plugins.max_time import MaxTime
from loopctl.prepare import build_run, find_device
from loopctl.rng import seed_everything
from loopctl.run import Run

DEFAULT_BATCH_SIZE = 64


def build_arguments(
    settings: dict[str, Any], resume: Path | None = None,
) -> tuple[dict[str, Any], dict[str, Any], Data]:
    """Build what the settings name. Return the arguments of `fit`, the settings with all defaults filled in, the data.

    resume: the folder of a run; if it has a checkpoint, the files of weights to begin with are not read again
    """
    specs, plugins = build_plugins(settings)
    begins = not has_checkpoint(resume, plugins)
    device = find_device(device_name(settings))
    factory, lr = optimizers.make(settings["optimizer"], settings["lr"], device.type)
    if settings["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    seed_everything(settings["seed"])
    dataset = data.make(settings["data"], settings["data_root"], settings["download"])
    replaced = "compute_loss" in compose(plugins).replaced
    task = task_of(settings, dataset, replaced)
    loss_fn = losses.make(task["loss"]) if task["loss"] is not None else None
    forward = losses.make_forward(task["forward"]) if task["forward"] is not None else None
    of_classes = isinstance(loss_fn, nn.CrossEntropyLoss)
    model = models.make(settings["model"], dataset, of_classes, begins)
    init = settings["init"]
    if begins and init is not None:
        init = pretrained.load_init(model, init)
    batch_size = used_batch_size(settings["batch_size"], dataset)
    train, valid = dataset.loaders(batch_size or DEFAULT_BATCH_SIZE, settings["workers"], device,
                                   of_classes and not replaced)
    train, valid = data.limit(settings, train, valid)
    if length_or_none(train) is None and settings["steps_per_epoch"] is None:
        raise UsageError(f"data {dataset.name} has no length, so the end of an epoch is unknown; pass "
                         "--steps-per-epoch N")
    arguments = {
        "model": model, "loss_fn": loss_fn, "optimizer": factory, "train": train, "valid": valid, "forward": forward,
        "epochs": settings["epochs"], "max_steps": settings["max_steps"], "eval_every": settings["eval_every"],
        "eval_first": settings["eval_first"], "steps_per_epoch": settings["steps_per_epoch"], "reduction": None,
        "plugins": plugins,
        "monitor": settings["monitor"] or "", "metrics": metrics.make(task["metric"], dataset.classes),
        "device": device, "seed": settings["seed"]}
    full_specs = [to_spec(split_spec(text)[0], plugin) for text, plugin in zip(specs, plugins, strict=False)]
    several = launched_processes() > 1 or settings["devices"]               # then each process has a device of its own
    resolved = {"lr": lr, "init": init, "device": device.type if several else str(device), "plugin": full_specs,
                "batch_size": batch_size}
    return arguments, settings | task | resolved, dataset


def has_checkpoint(folder: Path | None, plugins: list[Any]) -> bool:
    """Whether a run with these plugins has written a checkpoint to its folder; False without a folder."""
    dirs = [plugin.dir for plugin in plugins if isinstance(plugin, Checkpoint)]
    return folder is not None and bool(find_candidates(folder) or any(checkpoints_in(folder / name) for name in dirs))


def task_of(settings: dict[str, Any], dataset: Data, replaced: bool) -> dict[str, Any]:
    """Return the settings of loss and metrics with their defaults: cross entropy and accuracy where there are classes.

    replaced: whether a plugin computes the loss. Raises UsageError where nothing does, or two do.
    """
    loss, forward = settings["loss"], settings["forward"]
    if loss is not None and forward is not None:
        raise UsageError(f"--loss {loss} with --forward {forward}: the function computes the loss itself; leave out "
                         "one of the two")
    if loss is None and forward is None:
        if dataset.classes is not None:
            loss = "cross_entropy"
        elif not replaced:
            raise UsageError(f"data {dataset.name} has no `classes`, so its loss is not known; pass --loss mse or "
                             "another name for numbers, --loss cross_entropy for numbers of classes, --loss "
                             "file.py:function, --loss model where the model returns it, or --forward file.py:function")
    default = ["accuracy"] if dataset.classes is not None and forward is None else []
    return {"loss": loss, "forward": forward, "metric": list(settings["metric"]) or default}


def used_batch_size(given: int | None, dataset: Data) -> int | None:
    """Return the batch size, as given or the default; None where the data makes its batches itself.

    Raises UsageError where one is given that would not be used.
    """
    if dataset.needs_batch_size:
        return given or DEFAULT_BATCH_SIZE
    if given:
        raise UsageError(f"--batch-size {given}: data {dataset.name} makes its batches itself, so it would not be "
                         "used; leave it out")
    return None


def build_plugins(settings: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """Return the specs and the instances of the run's plugins. Raises UsageError if they cannot be combined.

    The plugins of other options, such as --max-time, come last and have no spec.
    """
    launch.check_devices(settings["devices"], settings["device"])
    specs = list(settings["plugin"])
    given = {build_plugin(text)[0] for text in specs}
    specs += [name for name in DEFAULT_PLUGINS if name not in given and name not in settings["without"]]
    plugins = [build_plugin(text)[1] for text in specs]
    numbers = launch.device_numbers(settings["devices"])
    if len(numbers) > 1 and not any(isinstance(plugin, Parallel) for plugin in plugins):
        specs, plugins = ["ddp", *specs], [build_plugin("ddp")[1], *plugins]
    if limit := settings.get("max_time"):
        if not any(isinstance(plugin, Checkpoint) for plugin in plugins):
            raise UsageError(f"--max-time {limit} without the plugin checkpoint: nothing would be left of the run; "
                             "leave out --without checkpoint")
        plugins = [*plugins, MaxTime(limit)]
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
    few, name = settings.pop("fast_dev_run"), settings.pop("name")
    settings["tag"] = list(settings["tag"]) or None
    if name and not few:
        settings["out"] = named_folder(name, settings)
    if few and settings["resume"]:
        raise UsageError("--fast-dev-run with --resume: it begins a short run of its own; leave out one of the two")
    if len(numbers := launch.device_numbers(settings["devices"])) > 1 and launched_processes() == 1:
        build_plugins(settings)             # a wrong composition is reported here, once, before any process is started
        sys.exit(launch.launch(numbers, arguments))
    launch.end_with_launcher()
    out, resume = settings.pop("out"), settings.pop("resume")
    settings.pop("config")
    if resume and out:
        raise UsageError("--resume with --out: a resumed run writes to its own folder; leave out --out")
    if rank():
        logging.getLogger("loopctl").setLevel(logging.ERROR)            # only rank 0 prints warnings
    elif restart_count() and not resume:
        folder = Path(read_note("out") or out or "")                    # of the attempt before the restart
        out, resume = (None, folder) if folder.name and folder.exists() else (out, None)
    with lasting_output():
        try:
            if few:
                fast_dev_run(settings)
            else:
                train(settings, out, resume)
        except LostLock as error:
            raise click.ClickException(str(error)) from error


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


def train(settings: dict[str, Any], out: Path | None, resume: Path | None) -> None:
    """Train in this process, in a new folder or in that of the run to resume, and save the final weights there."""
    arguments, resolved, dataset = build_arguments(settings, resume)
    savers = [plugin for plugin in arguments["plugins"] if isinstance(plugin, Checkpoint)]
    if resume and (resume / "weights.safetensors").exists() and not has_checkpoint(resume, savers):
        raise UsageError(f"--resume {resume}: this run is finished and has no checkpoint to resume from; "
                         "start a new run")
    test = evaluation.test_set(settings, resolved, arguments["device"])
    recorder = Recorder(resolved, saved_run.describe_data(dataset), new=not resume)
    arguments["plugins"] += [data.BatchSize(), recorder]
    # Only rank 0 makes the folder; the other processes get its path from rank 0 when they join the process group.
    opened = run_folder(resume or out, recorder) if rank() == 0 else nullcontext(Path())
    with opened as folder, matmul_precision(settings["matmul"]):
        try:
            result = fit(**arguments, resume=resume, out=folder)
        except (KeyboardInterrupt, SystemExit) as error:
            by_signal = isinstance(error, KeyboardInterrupt) or any(getattr(saver, "signal", 0) for saver in savers)
            more = (f"; to go on:\nloopctl run --resume {shlex.quote(str(folder))}" if savers
                    else f"; what was written is in {folder}") if recorder.started else ""
            if by_signal and rank() == 0:
                click.echo(f"interrupted{more}", err=True)
            raise SystemExit(130) if isinstance(error, KeyboardInterrupt) else error from None
        if result.leaving:
            if rank() == 0:
                report_leaving(result, folder)
            return
        weights = folder / "weights.safetensors"
        if not recorder.started and weights.exists():
            more = f"{counted(result.epoch, 'epoch')}); use more --epochs to continue it"
            raise UsageError(f"{folder}: this run is finished ({f'{result.stop})' if result.stop else more}")
        final = Weights(result.model)         # a collective operation if the model's tensors are sharded
        tested = test(result.model) if test else {}
        if rank():
            return
        try:
            recorder.check_lock()
            save_weights(final, weights)
            if tested:
                with atomic_write(folder / "test.json") as file:
                    file.write_text(json.dumps(tested, indent=4) + "\n", encoding="utf-8")
        except OSError as error:
            raise click.ClickException(f"{weights} cannot be written ({error.strerror or error}); "
                                       f"use loopctl run --resume {folder} to try again") from error
    click.echo(f"stopped early: {one_line(result.stop)}" if result.stop
               else f"finished: {counted(result.epoch, 'epoch')}, {counted(result.step, 'update')}")
    if tested:
        click.echo(f"test: {evaluation.described(tested)}")
    click.echo(f"run folder: {folder}")
    check_losses(result, weights)


@dataclass(eq=False)
class TwoEpochs:
    """A plugin that ends the run after two epochs, while schedules and plugins plan with all of its epochs."""

    observer_only = True

    @hookimpl
    def epoch_end(self, run: Run) -> None:
        if run.epoch == 2 and not run.finished:
            run.stop = "two epochs are enough to try everything"


def fast_dev_run(settings: dict[str, Any]) -> None:
    """Train two epochs of three batches with all that the settings name, in a temporary folder that is then removed."""
    few = {"limit_train": "3", "limit_valid": "3", "overfit": None, "max_time": None}
    arguments, resolved, dataset = build_arguments(settings | few)
    for plugin in arguments["plugins"]:
        for name in ("dir", "path"):            # what would be written elsewhere goes to the temporary folder too
            value = getattr(plugin, name, None)
            if isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts):
                setattr(plugin, name, Path(value).name)
    arguments["plugins"] += [data.BatchSize(), Recorder(resolved, saved_run.describe_data(dataset), new=True),
                             TwoEpochs()]
    with (TemporaryDirectory(prefix="loopctl-") if rank() == 0 else nullcontext("")) as folder, matmul_precision(
            settings["matmul"]):
        result = fit(**arguments, out=folder)
        final = Weights(result.model)
        if rank():
            return
        save_weights(final, Path(folder, "weights.safetensors"))
    check_losses(result, Path("weights.safetensors"))
    click.echo(f"fast-dev-run: everything works: {counted(result.step, 'update')} in {counted(result.epoch, 'epoch')}; "
               "nothing was kept")


def report_leaving(run: Run, folder: Path) -> None:
    """Say how to resume a run that was left. Raises an exception that ends the command with status 1 if it cannot be
    resumed from where it was left."""
    click.echo(f"left at step {run.attempts:,}, in epoch {run.epoch + 1} of {run.epochs}: {one_line(run.leave)}")
    command = f"loopctl run --resume {shlex.quote(str(folder))}"
    last = run.last_checkpoint
    if not last or step_number(last) < run.attempts:
        raise click.ClickException("the checkpoint could not be written; " + (f"{command} goes on from {last}" if last
                                   else "there is none to resume from"))
    click.echo(f"to go on: {command}")


def check_losses(run: Run, weights: Path) -> None:
    """Raise an exception that ends the command with status 1 if the losses at the end of the run are not finite.

    A script that goes on with the weights would go on with NaN.
    """
    if lost := run.lost_loss():
        advice = "" if "nan_guard" in run.hook.plugins else ", or --plugin nan_guard, which skips such steps"
        raise click.ClickException(f"{lost}, so {weights} is of no use; begin a new run with a lower --lr{advice}")


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
    arguments, *_ = build_arguments(settings)
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
    with blame_plugin(run.hook):
        for plugin in run.hook.plugins.values():
            if isinstance(plugin, Freeze):          # one with `until` freezes only now
                plugin.train_start(run)
    batch = to_device(next(iter(run.train)), run.device)
    with eval_mode(run.model), torch.no_grad(), record_forward(run.model) as layers:
        call_model(run, batch)
    return render(table(layers))


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
    lock: FolderLock | None = None
    next_check: float = 0.0             # by time.monotonic()

    def check_lock(self) -> None:
        """Raise LostLock if the run's folder is no longer locked by this process."""
        if self.lock:
            self.lock.check()

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
        versions = f"loopctl {version('loopctl')}, torch {torch.__version__}"
        heading = f"# {versions}\n# loopctl run --config {run.out}/run.toml\n"
        # Strings, numbers, booleans and lists of them are written in TOML as in JSON.
        lines = [f"{key} = {json.dumps(value, ensure_ascii=False, indent=4)}\n"
                 for key, value in sorted(run.config.items())]
        with unwritable_is_error(run.out), atomic_write(run.out / "run.toml") as file:
            file.write_text(heading + "".join(lines), encoding="utf-8")
        with unwritable_is_error(run.out), atomic_write(run.out / saved_run.DATA) as file:
            file.write_text(self.data, encoding="utf-8")


def data_size(run: Run) -> str:
    """The size of the training and validation data in brackets, in samples if they are known, else in batches."""
    parts = [part for part in run.data_sets().values() if part is not None]
    for unit, sizes in (("samples", [length_or_none(getattr(part, "dataset", None)) for part in parts]),
                        ("batches", [length_or_none(part) for part in parts])):
        if None not in sizes:
            return f" ({' + '.join(f'{size:,}' for size in sizes)} {unit})"
    return ""


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
