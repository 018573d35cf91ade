"""What `loopctl run` does."""
from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
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
    """The part of a batch whose highest score is that of its class."""
    return (output.argmax(1) == target).float().mean()


def assemble(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Make what the settings name. Return the arguments of `fit`, and the settings with nothing left to choose."""
    specs, plugins = chosen(settings)
    device = find_device(on(settings))
    factory, lr = optimizers.make(settings["optimizer"], settings["lr"], device.type)
    if settings["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    seed_everything(settings["seed"])
    found = data.make(settings["data"], settings["data_root"], settings["download"])
    model = models.make(settings["model"], found)
    train, valid = found.loaders(settings["batch_size"], settings["workers"], device)
    arguments = {
        "model": model, "loss_fn": nn.CrossEntropyLoss(), "optimizer": factory, "train": train, "valid": valid,
        "epochs": settings["epochs"], "max_steps": settings["max_steps"], "eval_every": settings["eval_every"],
        "plugins": plugins, "metrics": {"accuracy": accuracy}, "device": device, "seed": settings["seed"]}
    written = [to_spec(split_spec(text)[0], plugin) for text, plugin in zip(specs, plugins, strict=True)]
    several = launched_processes() > 1 or settings["devices"]               # then each process has its own
    return arguments, settings | {"lr": lr, "device": device.type if several else str(device), "plugin": written}


def chosen(settings: dict[str, Any]) -> tuple[list[str], list[Any]]:
    """The plugins that the settings name, as specs and made. Raises UsageError where they do not go together."""
    launch.check(settings["devices"], settings["device"])
    specs = list(settings["plugin"])
    given = {build_plugin(text)[0] for text in specs}
    specs += [f"{name}:unit=images" if name == "progress" else name for name in DEFAULT_PLUGINS
              if name not in given and name not in settings["without"]]
    plugins = [build_plugin(text)[1] for text in specs]
    if len(launch.wanted(settings["devices"])) > 1 and not any(isinstance(plugin, Parallel) for plugin in plugins):
        specs, plugins = ["ddp", *specs], [build_plugin("ddp")[1], *plugins]
    compose(plugins)                          # what does not go together is refused before the data is read
    return specs, plugins


def on(settings: dict[str, Any]) -> str:
    """The device that the settings name: of --devices the only one, else torchrun says which is this process's."""
    numbers, device = launch.wanted(settings["devices"]), settings["device"]
    if len(numbers) == 1 and torch.cuda.is_available() and device in ("auto", "cuda"):
        return f"cuda:{numbers[0]}"
    return device


def run(settings: dict[str, Any], arguments: list[str]) -> None:
    """Train as the settings say, in a folder of the run's own. `arguments` are those of the command line."""
    if len(numbers := launch.wanted(settings["devices"])) > 1 and launched_processes() == 1:
        chosen(settings)
        sys.exit(launch.launch(numbers, arguments))
    out, resume = settings.pop("out"), settings.pop("resume")
    settings.pop("config")
    if resume and out:
        raise UsageError("a resumed run goes on in its own folder; leave out --out")
    if rank():
        logging.getLogger("loopctl").setLevel(logging.ERROR)            # the first process speaks for all
    elif restart_count() and not resume:
        begun = Path(read_note("out") or out or "")
        out, resume = (None, begun) if begun.name and begun.exists() else (out, None)
    train(settings, out, resume)


def train(settings: dict[str, Any], out: Path | None, resume: Path | None) -> None:
    arguments, resolved = assemble(settings)
    if resume and (resume / "weights.safetensors").exists() and not find_candidates(resume):
        raise UsageError(f"--resume {resume}: this run is finished and has no checkpoint to resume from; "
                         "begin a new one")
    recorder = Recorder(resolved, new=not resume)
    arguments["plugins"].append(recorder)
    # Of several processes, the first has the folder; the others learn of it when they have joined.
    mine = folder(resume or out, recorder) if rank() == 0 else nullcontext(Path())
    with mine as place, matmul(settings["matmul"]):
        try:
            done = fit(**arguments, resume=resume, out=place)
        except KeyboardInterrupt:
            where = f"; what it has written is in {place}" if recorder.started else ""
            if rank() == 0:
                click.echo(f"interrupted{where}", err=True)
            raise SystemExit(130) from None
        weights = place / "weights.safetensors"
        if not recorder.started and weights.exists():
            more = f"{done.epoch} epochs); to go on, ask for more --epochs"
            raise UsageError(f"{place}: this run is finished ({f'{done.stop})' if done.stop else more}")
    final = Weights(done.model)           # which takes all processes where each has a piece
    if rank():
        return
    try:
        save_weights(final, weights)
    except OSError as error:
        raise click.ClickException(f"{weights} cannot be written ({error.strerror or error}); "
                                   f"loopctl run --resume {place} tries again") from error
    click.echo(f"stopped early: {done.stop}" if done.stop else f"finished: {done.epoch} epochs, {done.step:,} updates")
    click.echo(f"run folder: {place}")


@contextmanager
def matmul(precision: str) -> Iterator[None]:
    """Have float32 matrices multiplied as precisely as torch.set_float32_matmul_precision has it, for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def prepared(settings: dict[str, Any]) -> Run:
    """The run that the settings make, with its optimizer built and nothing trained."""
    settings.pop("config")
    arguments, _ = assemble(settings)
    arguments["max_steps"] = arguments["max_steps"] or inf
    world_size = max(1, len(launch.wanted(settings["devices"])))
    return build_run(DEFAULTS, **arguments, world_size=world_size)


def explained(settings: dict[str, Any]) -> str:
    """The composition that the settings make, and its plan in numbers."""
    run = prepared(settings)
    with blame_plugin(run.hook):
        return explain(run=run)


def summarized(settings: dict[str, Any]) -> str:
    """The layers of the model that the settings make, with its shapes for one batch."""
    run = prepared(settings)
    images, _ = next(iter(run.train))
    with eval_mode(run.model), torch.no_grad(), record_forward(run.model) as layers:
        run.model(images.to(run.device))
    return render(table(layers))


@dataclass(eq=False)
class Recorder:
    """Writes what the run is made of into its folder, once nothing speaks against training any more."""

    observer_only = True
    rank_zero_only = True

    settings: dict[str, Any]
    new: bool
    started: bool = False

    @hookimpl
    def setup(self, run: Run) -> None:
        run.config = {key: value for key, value in self.settings.items() if value is not None}
        if self.new:
            for name in ("run.toml", "explain.txt"):       # so that no plugin takes them for its own
                (run.out / name).touch()

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if self.started:
            return
        explained = explain(run=run) + "\n"                # first, for it may find what is wrong
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        loaders: tuple[Any, Any] = run.train, run.valid
        size = [len(loader.dataset) for loader in loaders]
        print(f"{self.settings['model']} ({parameters:,} parameters) on {self.settings['data']} "
              f"({size[0]:,} + {size[1]:,} images), {self.settings['optimizer']}, {self.settings['device']}"
              f"{f', {run.world_size} processes' if run.world_size > 1 else ''}")
        versions = f"loopctl {version('loopctl')}, torch {torch.__version__}"
        heading = f"# {versions}\n# loopctl run --config {run.out}/run.toml\n"
        # Names, numbers, truth values and lists of them are written in TOML as in JSON.
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
def folder(path: Path | None, recorder: Recorder) -> Iterator[Path]:
    """The run's own new folder, or the one it goes on in. A new one where nothing was started is taken away again."""
    if recorder.new:
        place, made = make_folder(path)
    else:
        place, made = path or Path(), []
    try:
        store_note("out", str(place))
        yield place
    finally:
        if recorder.new and not recorder.started:
            for child in place.iterdir():
                shutil.rmtree(child) if child.is_dir() else child.unlink()
            for parent in made:
                with suppress(OSError):                  # in runs/, another run may have begun
                    parent.rmdir()


def make_folder(path: Path | None) -> tuple[Path, list[Path]]:
    """Make the folder `path`, or one in runs/ named by the time; return it and what did not exist before, inmost first.

    Raises UsageError where something is in it already, or where it cannot be written.
    """
    for place in [path] if path else by_time():
        made: list[Path] = []
        try:
            if place is path and place.exists() and not (place.is_dir() and not any(place.iterdir())):
                instead = f", or --resume {path}" if place.is_dir() else ""
                raise UsageError(f"--out {path} exists and is not overwritten; choose another folder{instead}")
            made = [parent for parent in (place, *place.parents) if not parent.exists()]
            place.mkdir(parents=True, exist_ok=place is path)
            with TemporaryFile(dir=place):              # it can be written
                pass
        except FileExistsError:                          # another run, begun in the same second
            continue
        except OSError as error:
            for parent in made:
                with suppress(OSError):
                    parent.rmdir()
            raise UsageError(f"--out {place} cannot be written: {error.strerror}; choose another folder") from error
        return place, made
    raise UsageError(f"--out {path} cannot be written: it has just become a file; choose another folder")


def by_time() -> Iterator[Path]:
    """Names in runs/ for a run that begins now."""
    name = f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}"
    return (Path(f"{name}_{number}" if number > 1 else name) for number in count(1))
