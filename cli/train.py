"""`loopctl run`: train with the settings of the command line, here or in several processes, and save the weights."""
from __future__ import annotations

import json
import logging
import shlex
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch

from loopctl import explain, fit, hookimpl, torch_settings
from loopctl.checkpoint.atomic_files import Weights, atomic_write, save_weights
from loopctl.checkpoint.finding import step_number
from loopctl.checkpoint.folder_lock import LostLock
from loopctl.cli import data, evaluation, launch, saved_run
from loopctl.cli.arguments import build_arguments, build_plugins, chosen_torch_settings, has_checkpoint
from loopctl.cli.batch_size import find_batch_size
from loopctl.cli.lasting_output import lasting_output
from loopctl.cli.run_folder import Recorder, named_folder, run_folder, write_inside
from loopctl.composition.compose import blame_plugin
from loopctl.data.batch import to_device
from loopctl.distributed.process_group import launched_processes, rank, read_note, restart_count
from loopctl.errors import UsageError, counted, one_line
from loopctl.loop import DEFAULTS
from loopctl.model.eval_mode import eval_mode
from loopctl.model.forward import call_model
from loopctl.model.summary import record_forward, render, table
from loopctl.plugins.checkpoint import Checkpoint
from loopctl.plugins.freeze import Freeze
from loopctl.prepare import build_run
from loopctl.run import Run


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
            if settings["batch_size"] == "auto":
                if resume:
                    raise UsageError("--batch-size auto with --resume: a resumed run keeps its batch size; leave it "
                                     "out")
                settings["batch_size"] = find_batch_size(settings)
            if few:
                fast_dev_run(settings)
            else:
                train(settings, out, resume)
        except LostLock as error:
            raise click.ClickException(str(error)) from error


def train(settings: dict[str, Any], out: Path | None, resume: Path | None) -> None:
    """Train in this process, in a new folder or in that of the run to resume, and save the final weights there."""
    arguments, resolved, dataset = build_arguments(settings, resume)
    savers = [plugin for plugin in arguments["plugins"] if isinstance(plugin, Checkpoint)]
    if resume and (resume / "weights.safetensors").exists() and not has_checkpoint(resume, savers):
        raise UsageError(f"--resume {resume}: this run is finished and has no checkpoint to resume from; "
                         "start a new run")
    test = evaluation.test_set(settings, resolved, arguments["device"], dataset)
    recorder = Recorder(resolved, saved_run.describe_data(dataset), new=not resume)
    arguments["plugins"] += [data.BatchSize(), recorder]
    # Only rank 0 makes the folder; the other processes get its path from rank 0 when they join the process group.
    opened = run_folder(resume or out, recorder) if rank() == 0 else nullcontext(Path())
    with opened as folder, torch_settings(**chosen_torch_settings(settings)):
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
        try:
            if not rank():
                recorder.check_lock()
                save_weights(final, weights)
            tested = test(result.model) if test else {}
            if rank():
                return
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
    test = evaluation.test_set(settings, resolved, arguments["device"], dataset)
    write_inside(arguments["plugins"])
    arguments["plugins"] += [data.BatchSize(), Recorder(resolved, saved_run.describe_data(dataset), new=True),
                             TwoEpochs()]
    with (TemporaryDirectory(prefix="loopctl-") if rank() == 0 else nullcontext("")) as folder, torch_settings(
            **chosen_torch_settings(settings)):
        result = fit(**arguments, out=folder)
        final = Weights(result.model)
        if test:
            test(result.model)
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


def prepare_run(settings: dict[str, Any]) -> Run:
    """Build the run that the settings describe, up to its optimizer, without training."""
    settings.pop("config")
    arguments, *_ = build_arguments(settings, trains=False)
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
