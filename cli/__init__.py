"""The command line `loopctl`: its commands and options. Importing this module does not import torch."""
from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from loopctl.cli.completion import completer
from loopctl.cli.grouped_help import MAIN, GroupedCommand
from loopctl.cli.options import (
    COUNT,
    LENGTH,
    REPEATING,
    metric_names,
    model_names,
    optimizer_names,
    plugin_names,
    read_defaults,
    shared_option,
    traceback_option,
    training_options,
    weights_option,
)
from loopctl.cli.parameters import FloatType, IntegerType, PathType, TextType, TimeType
from loopctl.cli.specs import DATA
from loopctl.errors import UsageError, one_line
from loopctl.report.terminal import say, use_plain_letters


class Commands(click.Group):
    """A group of commands that reports an error in one line. Usage errors exit with status 2, other failures with 1."""

    command_class = GroupedCommand

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["loopctl.arguments"] = list(args)
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        use_plain_letters()
        try:
            sys.exit(super().main(*args, **kwargs) or 0)
        except click.ClickException as error:
            print_error(error.format_message(), error)
            sys.exit(error.exit_code)
        except UsageError as error:
            print_error(own_message(error), error)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt) as error:
            print_error("interrupted", error, "")
            sys.exit(130)
        except BrokenPipeError:                      # the reader of the output, such as `head`, has closed the pipe
            sys.stderr.close()
            sys.exit(1)
        except Exception as error:
            if "--traceback" in sys.argv:
                raise
            print_error(f"{describe_failure(error)}; --traceback shows where", error)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:                    # click would report it as the end of the user's input
            raise OSError(f"a file ends too early ({describe_failure(error)})") from error


def print_error(text: object, error: BaseException, start: str = "error: ") -> None:
    """Print an error to stderr. Of several processes that train together, only one prints it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        from loopctl.distributed.process_group import claim_error_report, is_peer_failure, rank
        # A usage error is the same in all processes: rank 0 prints it. An error caused by the failure of another
        # process is printed only if that process has not printed its own.
        same_in_rank0 = isinstance(error, UsageError | click.ClickException) and rank() > 0
        if not claim_error_report(same_in_rank0 or is_peer_failure(error)):
            return
        if is_peer_failure(error):
            text = f"another process of the run has ended, or cannot be reached ({text})"
        start += f"process {rank()}: " if rank() else ""
    click.echo(f"{start}{one_line(text)}", err=True)


def describe_failure(error: BaseException) -> str:
    """An unexpected error in one line: its type, its message, and which plugin raised it."""
    parts = [f"{type(error).__name__}: {own_message(error)}", *getattr(error, "__notes__", [])]
    return " ".join(", ".join(parts).split())


def own_message(error: BaseException) -> str:
    """The message of an error. Of one that torch raises again for a loader worker, without the worker's traceback."""
    before, found, raised = str(error).rpartition("\nOriginal Traceback (most recent call last):\n")
    if not found or not before.startswith("Caught "):
        return str(error)
    last = re.findall(rf"^(?:[\w.]+\.)?{type(error).__name__}: ((?:.*\n?)+)", raised, re.MULTILINE)
    return ", ".join(last[-1].strip().splitlines()) if last else str(error)


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("loopctl"), prog_name="loopctl")
@click.pass_context
def main(ctx: click.Context) -> None:
    """A PyTorch training loop made of plugins: the loop says when, plugins say what."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def folder_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a run that is written to a folder."""
    for option in reversed((
        shared_option("--max-time", group=LENGTH, type=TimeType(), metavar="TIME",
                      help="Leave the run when this time is over, such as 90s, 30m, 2h, 1h30m or 1d, with a checkpoint "
                           "from which it can be resumed."),
        shared_option("--name", group=REPEATING, type=TextType(), metavar="NAME",
                      help="Write to the folder runs/NAME, which must not exist yet."),
        shared_option("--tag", group=REPEATING, type=TextType(), multiple=True, metavar="TAG",
                      help="A word by which `loopctl runs` and `compare` tell the run from others; repeat it for "
                           "more."),
        shared_option("--out", group=MAIN, type=PathType(), metavar="DIR",
                      help="The run's folder.  [default: a new one in runs/]"),
    )):
        command = option(command)
    return command


@main.command()
@training_options
@shared_option("--fast-dev-run", group=LENGTH, is_flag=True,
               help="Try everything with two epochs of three batches: training, validation, plugins, checkpoints. "
                    "Leaves no folder behind.")
@folder_options
@shared_option("--resume", group=MAIN, type=PathType(), is_eager=True, callback=read_defaults, metavar="DIR",
               help="Resume the run in DIR from its last checkpoint.")
@click.pass_context
def run(ctx: click.Context, **settings: Any) -> None:
    """Train a model. Without options, a small convolutional network on images of handwritten digits."""
    from loopctl.cli import train
    train.run(settings, ctx.meta["loopctl.arguments"])


@main.command()
@training_options
def explain(**settings: Any) -> None:
    """Show which plugin acts at which hook, without training.

    The planned number of updates, the batch size and the learning rates are shown too.
    """
    from loopctl.cli import train
    say(train.explanation(settings))


@main.command()
@training_options
@shared_option("--out", group=MAIN, type=PathType(), metavar="FILE",
               help="Also write an image of the curve: lr.png, lr.svg or lr.pdf.")
def lr(out: Path | None, **settings: Any) -> None:
    """Draw the learning rate over a whole run, without training."""
    from loopctl.cli import curve
    say(curve.draw(settings, out))


@main.command()
@training_options
@folder_options
@shared_option("--seconds", group=MAIN, default=60.0, type=FloatType(), metavar="S",
               help="How long the search may take.")
@shared_option("--tolerance", group=MAIN, type=FloatType(), metavar="F",
               help="The largest relative difference from the loss of the run as given with which something may be "
                    "chosen.  [default: 0.002; in half precision 0.02]")
@shared_option("--write", group=MAIN, type=PathType(), metavar="FILE.toml",
               help="Also write what was found to this new file, for `loopctl run --config`.")
@click.pass_context
def tune(ctx: click.Context, **settings: Any) -> None:
    """Find what makes a run faster, and print the command line to use.

    Half precision, memory format, compilation, CUDA graphs, loader processes and more are tried for a few seconds each,
    on copies of the run with its own model and data. What is tried does not change the recipe. Nothing is written: the
    run's folder is only part of the command line that is printed.
    """
    from loopctl.cli.tune import tune as search  # by its full path, for `tune` is this command
    say(search(settings, ctx.meta["loopctl.arguments"]))


@main.command()
@training_options
def summary(**settings: Any) -> None:
    """Show a model's layers, output shapes and parameters."""
    from loopctl.cli import train
    say(train.layer_summary(settings))


@main.command()
@click.argument("run", type=PathType())
@click.argument("inputs", nargs=-1, required=True, type=TextType(), metavar="INPUT...")
@click.option("--out", type=PathType(), metavar="FILE",
              help="Write to this new file in place of stdout: .csv, or .npy for a numpy array of the model's outputs.")
@click.option("--top", default=1, type=COUNT, metavar="K", show_default=True,
              help="The number of classes to show, the most probable first.")
@click.option("--all", "every", is_flag=True, help="Also the probability of each class.")
@weights_option
@shared_option("--device", default="auto", type=TextType(), metavar="DEVICE",
               help="Device of the model: auto, cpu, mps, cuda or one such as cuda:1.")
@shared_option("--batch-size", default=64, type=COUNT, metavar="N", help="Inputs per batch.")
@shared_option("--workers", default=0, type=IntegerType(0), metavar="N",
               help="Number of worker processes that read the inputs; 0 reads them in the main process.")
@traceback_option
def predict(run: Path, inputs: tuple[str, ...], out: Path | None, top: int, every: bool, weights: str | None,
            device: str, batch_size: int, workers: int) -> None:
    """Predict the classes of images with the model of a run, as CSV.

    RUN is the folder of a run of `loopctl run`. Each INPUT is an image file, or a folder with images. For data of your
    own, INPUT is one function, file.py:function or package.module:function, that returns a data set, a DataLoader or an
    iterable of samples or batches; of a model that is not a classifier, each output has a column.
    """
    from loopctl.cli.predict import Columns, write_predictions  # by its full path, for `predict` is this command
    write_predictions(run, inputs, out, weights, device, batch_size, workers, Columns(top, every))


@main.command()
@click.argument("run", type=PathType())
@shared_option("--data", lambda: DATA, type=TextType(), metavar="D",
               help="Evaluate other data than that of the run, as for `loopctl run`; of training and validation data "
                    "it is the latter.")
@shared_option("--data-root", type=PathType(str), metavar="DIR", help="The folder where data sets are stored.")
@shared_option("--metric", metric_names, multiple=True, type=TextType(), metavar="NAME[:OPTIONS]",
               help="Report these metrics in place of those of the run.")
@weights_option
@shared_option("--device", default="auto", type=TextType(), metavar="DEVICE",
               help="Device of the model: auto, cpu, mps, cuda or one such as cuda:1.")
@shared_option("--batch-size", type=COUNT, metavar="N", help="Samples per batch.  [default: that of the run]")
@shared_option("--workers", default=0, type=IntegerType(0), metavar="N",
               help="Number of worker processes that load data; 0 loads it in the main process.")
@click.option("--json", "as_json", is_flag=True, help="Print an object, for scripts.")
@traceback_option
def evaluate(run: Path, weights: str | None, metric: tuple[str, ...], as_json: bool, **settings: Any) -> None:
    """Compute loss and metrics of the model of a run, on its validation data or on other data.

    RUN is the folder of a run of `loopctl run`. In processes that torchrun has started, each evaluates its part.
    """
    from loopctl.cli import evaluation
    if text := evaluation.evaluate_run(run, weights, settings | {"metric": metric or None}, as_json):
        say(text)                       # rank 0 only


@main.command()
@click.argument("run", type=PathType())
@click.option("--format", "kind", type=click.Choice(["torch", "exported", "onnx"]), required=True,
              help="torch: a state dict, for torch.load(weights_only=True). exported: a program of torch.export, which "
                   "runs without the code of the model. onnx: ONNX; it needs pip install 'loopctl[onnx]'.")
@click.option("--out", type=PathType(), metavar="FILE",
              help="The new file.  [default: model.pt, model.pt2 or model.onnx in RUN]")
@weights_option
@traceback_option
def export(run: Path, kind: str, out: Path | None, weights: str | None) -> None:
    """Write the model of a run for other programs, and check what was written.

    RUN is the folder of a run of `loopctl run`. The file is read again, and its outputs for random inputs are compared
    with those of the model, in batches of several sizes.
    """
    from loopctl.cli.export import export_model  # by its full path, for `export` is this command
    say(export_model(run, kind, out, weights))


@main.command()
@click.argument("run", type=PathType())
@shared_option("--to", required=True, type=COUNT, metavar="STEP",
              help="The step to look at. Steps count updates made and skipped, from 1 on, as names of checkpoints do.")
@shared_option("--plugin", plugin_names, multiple=True, type=TextType(), metavar="NAME[:OPTIONS]",
               help="Add an observer, such as norms, tape or profile; repeat it for more.")
@shared_option("--steps", default=1, type=IntegerType(0), metavar="N",
              help="The number of steps to make after STEP.")
@click.option("--out", type=PathType(), metavar="DIR",
              help="The folder for what the observers write.  [default: a new one in rewinds/]")
@traceback_option
def rewind(run: Path, to: int, plugin: tuple[str, ...], steps: int, out: Path | None) -> None:
    """Make steps of a run again, with observers added, to look at them after they happened.

    RUN is the folder of a run of `loopctl run`, which is left as it is. The run is entered in its last checkpoint
    before STEP. What it has left, checkpoints, evaluations and a tape, is compared to the bit with what is made again.
    """
    from loopctl.cli.rewind import rewind_run  # by its full path, for `rewind` is this command
    rewind_run(run, to, steps, plugin, out)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=PathType())
@click.option("--out", type=PathType(), metavar="FILE", help="Also write an HTML page with the curves: compare.html.")
def compare(runs: tuple[Path, ...], out: Path | None) -> None:
    """Show how the options and the results of runs differ. RUNS are the folders of two runs or more."""
    from loopctl.cli.compare import compare_runs  # by its full path, for `compare` is this command
    say(compare_runs(runs, out))


@main.command()
@click.argument("runs", nargs=2, required=True, type=PathType(), metavar="A B")
@click.option("--no-replay", is_flag=True, help="Only read what is there; make no update again to look closer.")
@click.option("--json", "as_json", is_flag=True, help="Print an object, for scripts.")
@traceback_option
def why(runs: tuple[Path, Path], no_replay: bool, as_json: bool) -> None:
    """Say what first differs between two runs, and what that means.

    A and B are folders of runs with the plugin tape, tapes, or Python scripts, which are run and recorded. Where the
    tapes do not say enough, updates of both runs are made again from their checkpoints, with a tape of every module.
    Of runs without tapes, configurations, curves and checkpoints are compared.
    """
    from loopctl.cli.why import why as explain_runs  # by its full path, for `why` is this command
    say(explain_runs(runs, not no_replay, as_json, lambda line: click.echo(line, err=True)))


@main.command()
@click.argument("folder", default="runs", type=PathType(), metavar="[DIR]")
@click.option("--json", "as_json", is_flag=True, help="Print a list of objects, for scripts.")
def runs(folder: Path, as_json: bool) -> None:
    """List the runs in a folder, runs/ by default: when, what, how far, how good, and their state.

    A run is running, finished, stopped (it can be resumed) or broken (there is nothing to resume from).
    """
    from loopctl.cli.runs import list_runs  # by its full path, for `runs` is this command
    defaults = {option.name or "": option.default for option in run.params}
    say(list_runs(folder, defaults, as_json))


@main.command()
@click.argument("name", required=False, type=TextType(), shell_complete=completer(plugin_names))
@click.option("--check", is_flag=True, help="Import each plugin, or NAME, and show what cannot be imported.")
@click.option("--search", type=TextType(), metavar="WORD", default="",
              help="List only plugins that have WORD in their name, help or options.")
def plugins(name: str | None, check: bool, search: str) -> None:
    """List the installed plugins, or show the options of one.

    With a NAME, its options with their types and defaults, its hooks and its origin are shown.
    """
    from loopctl.cli import listing
    if name is not None and search:
        raise UsageError(f"plugins {name} --search: one plugin is not searched; leave out one of the two")
    if name is not None:
        say(listing.page(name, check))
    else:
        listed, broken = listing.table(check, search)
        say(listed)
        if broken:
            raise click.ClickException(f"broken plugins: {', '.join(broken)}; see their lines above")


def describe_kind(kind: str, name: str | None) -> None:
    """List what has a name for `--kind`, or describe the one called `name`."""
    from loopctl.cli import catalogue
    say(catalogue.table(kind) if name is None else catalogue.page(kind, name))


@main.command("models")
@click.argument("name", required=False, type=TextType(), shell_complete=completer(model_names))
def list_models(name: str | None) -> None:
    """List the models that have a name, or show the options of one."""
    describe_kind("model", name)


@main.command("data")
@click.argument("name", required=False, type=TextType(), shell_complete=completer(lambda: DATA))
def list_data(name: str | None) -> None:
    """List the data sets that have a name, or show the options of one."""
    describe_kind("data", name)


@main.command("optimizers")
@click.argument("name", required=False, type=TextType(), shell_complete=completer(optimizer_names))
def list_optimizers(name: str | None) -> None:
    """List the optimizers that have a name, or show the options of one."""
    describe_kind("optimizer", name)


@main.command()
def hooks() -> None:
    """Show every hook that a plugin can implement, in order."""
    from loopctl import hooks
    say((hooks.__doc__ or "").rstrip())


@main.command("new-plugin")
@click.argument("name", type=TextType())
@click.option("--kind", type=click.Choice(["schedule", "observer", "wrapper", "replacer"]), default="observer",
              show_default=True,
              help="The example that the plugin starts as: a learning-rate schedule, an observer that reports a "
                   "metric, a wrapper of the forward pass, or a replacement of the loss.")
@click.option("--out", type=PathType(), metavar="DIR",
              help="The new folder to write the package to.  [default: loopctl-NAME]")
def new_plugin(name: str, kind: str, out: Path | None) -> None:
    """Write a package with a new plugin, ready to install. It has tests and a README."""
    from loopctl.cli import scaffold
    say(scaffold.write(name, kind, out))
