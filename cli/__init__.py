"""The command line `loopctl`: its commands and options. Importing this module does not import torch."""
from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from loopctl.cli.completion import completer
from loopctl.cli.grouped_help import MAIN, GroupedCommand, GroupedOption
from loopctl.cli.parameters import DevicesType, FloatType, IntegerType, LimitType, PathType, TextType, TimeType
from loopctl.cli.specs import DATA, DEFAULT_PLUGINS
from loopctl.errors import UsageError, nearest, one_line
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


def plugin_names() -> list[str]:
    from loopctl.composition.discovery import available
    return list(available())


def model_names() -> list[str]:
    from loopctl.cli import models
    return models.known_names()


def optimizer_names() -> list[str]:
    from loopctl.cli import optimizers
    return optimizers.known_names()


def metric_names() -> list[str]:
    from loopctl.cli import metrics
    return metrics.known_names()


def loss_names() -> list[str]:
    from loopctl.cli import losses
    return losses.known_names()


def read_defaults(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Use the values of a run.toml as defaults of the options, so that options on the command line override them."""
    if path is None:
        return None
    file = path / "run.toml" if param.name == "resume" else path
    try:
        with file.open("rb") as stream:
            content = stream.read(2**20 + 1)
        if len(content) > 2**20:                           # also of a file without an end, such as /dev/zero
            raise ValueError("it is larger than 1 MiB")
        values = tomllib.loads(content.decode("utf-8-sig"))
        str(values)                                        # raises for a number too long for the messages below
    except FileNotFoundError:
        raise click.UsageError(f"--{param.name}: there is no file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--{param.name}: {file} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:          # also for a number too long, or lists nested too deep
        raise click.UsageError(f"--{param.name}: {file} is not TOML: {error}") from None
    if param.name == "resume" and not values:
        raise click.UsageError(f"--resume: {file} is empty, so what to train is unknown; start a new run")
    command_line_only = ("config", "resume", "out", "fast_dev_run", "name", "traceback")
    known = {option.name: option for option in ctx.command.params if option.name not in command_line_only}
    if ctx.command is not run:              # what only `run` takes is of no matter to a command that does not train
        values = {key: value for key, value in values.items() if key not in ("max_time", "tag")}
    for key, value in values.items():
        if key not in known:
            advice = "pass it on the command line" if key in command_line_only else nearest(key, known, "there are")
            raise click.UsageError(f"--{param.name}: {file}: {key!r} is not a key of a configuration; {advice}")
        if isinstance(value, dict) or (isinstance(value, list) != known[key].multiple):
            kind = "a list" if known[key].multiple else "one value"
            raise click.UsageError(f"--{param.name}: {file}: {key} takes {kind}, not {value!r}")
        try:                        # as text, so that it is checked as on the command line: epochs = 1.5 is refused
            values[key] = [str(item) for item in value] if isinstance(value, list) else str(value)
            known[key].type_cast_value(ctx, values[key])
        except click.BadParameter as error:
            raise click.UsageError(f"--{param.name}: {file}: {key}: {error.message}") from None
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


def shared_option(flag: str, names: Callable[[], list[str]] | None = None, **settings: Any) -> Callable[..., Any]:
    """An option in a group. Its help shows its default, and the shell completes its `names` and their options.

    group: the heading that `--help` shows it under; the options of `MAIN` fill the first screen, so choose another
    """
    if settings.get("default") is not None and not settings.get("is_flag"):
        settings["show_default"] = True
    complete = completer(names, flag.removeprefix("--")) if names else None
    return click.option(flag, cls=GroupedOption, shell_complete=complete, **settings)


COUNT = IntegerType(1)
TASK, LENGTH, DEVICES, REPEATING = "Task", "Length and evaluation", "Devices and precision", "Repeating a run"
traceback_option = shared_option("--traceback", is_flag=True, expose_value=False,
                                 help="Show Python's traceback of a failure.")
SHARED_OPTIONS = (
    shared_option("--model", model_names, group=MAIN, default="cnn", type=TextType(), metavar="M",
                  help="One of `loopctl models`, package.module:factory or file.py:factory."),
    shared_option("--data", lambda: DATA, group=MAIN, default="digits", type=TextType(), metavar="D",
                  help="One of `loopctl data`, package.module:factory or file.py:factory."),
    shared_option("--optimizer", optimizer_names, group=MAIN, default="adamw", type=TextType(), metavar="O",
                  help="One of `loopctl optimizers`, package.module:Class or file.py:Class."),
    shared_option("--lr", group=MAIN, type=FloatType(), metavar="F",
                  help="Learning rate.  [default: the optimizer's own]"),
    shared_option("--epochs", group=MAIN, default=20, type=COUNT, metavar="N", help="Passes over the training data."),
    shared_option("--batch-size", group=MAIN, type=COUNT, metavar="N",
                  help="Samples per batch, in each process.  [default: 64]"),
    shared_option("--plugin", plugin_names, group=MAIN, multiple=True, type=TextType(), metavar="NAME[:OPTIONS]",
                  help="Add one of `loopctl plugins`, as in clip:max_norm=1; repeat it for more, which act in the "
                       "order given."),
    shared_option("--device", group=MAIN, default="auto", type=TextType(), metavar="DEVICE",
                  help="auto (cuda, then mps, then cpu), cpu, mps, cuda or one such as cuda:1."),
    shared_option("--loss", loss_names, group=TASK, type=TextType(), metavar="L",
                  help="The loss: any of torch.nn by name with its options, such as mse or "
                       "cross_entropy:label_smoothing=0.1, package.module:name or file.py:name; model, where the "
                       "model returns it.  [default: cross_entropy, where the data has classes]"),
    shared_option("--metric", metric_names, group=TASK, multiple=True, type=TextType(), metavar="NAME[:OPTIONS]",
                  help="Report a metric: accuracy, top5, mae, rmse, r2, perplexity, a class of torchmetrics, "
                       "package.module:name or file.py:name; repeat the option for more.  [default: accuracy, where "
                       "the data has classes]"),
    shared_option("--monitor", group=TASK, type=TextType(), metavar="METRIC",
                  help="The metric that checkpoint, early_stopping and plateau judge by, such as val_accuracy.  "
                       "[default: val_loss]"),
    shared_option("--forward", group=TASK, type=TextType(), metavar="F",
                  help="In place of a loss, a function (model, batch) that returns loss and outputs, as "
                       "package.module:function or file.py:function."),
    shared_option("--init", group=TASK, type=TextType(), metavar="FILE",
                  help="Weights to begin with: a file (.safetensors, .pt, .pth), a checkpoint or a run's folder; with "
                       ":strict=false only those that fit."),
    shared_option("--data-root", group="Data", default="data", type=PathType(str), metavar="DIR",
                  help="The folder where data sets are stored."),
    shared_option("--download", group="Data", is_flag=True,
                  help="Download the data set if it is not in --data-root."),
    shared_option("--workers", group="Data", default=0, type=IntegerType(0), metavar="N",
                  help="Number of worker processes that load data; 0 loads it in the main process."),
    shared_option("--max-steps", group=LENGTH, type=COUNT, metavar="N",
                  help="End the run after N updates, even if --epochs are not complete."),
    shared_option("--eval-every", group=LENGTH, type=COUNT, metavar="N",
                  help="Evaluate every N steps, in addition to the end of each epoch."),
    shared_option("--steps-per-epoch", group=LENGTH, type=COUNT, metavar="N",
                  help="Updates per epoch; needed where the data has no length."),
    shared_option("--eval-first", group=LENGTH, is_flag=True, help="Evaluate before the first step, too."),
    shared_option("--test", lambda: DATA, group=TASK, type=TextType(), metavar="D",
                  help="Data to evaluate the final weights on at the end of the run, as for --data; of training and "
                       "validation data it is the latter."),
    shared_option("--limit-train", group=LENGTH, type=LimitType(), metavar="N|P%",
                  help="Train on the first N batches of each epoch only, or on P percent of them; N in each process."),
    shared_option("--limit-valid", group=LENGTH, type=LimitType(), metavar="N|P%",
                  help="Validate on the first N batches only, or on P percent of them; N in each process."),
    shared_option("--overfit", group=LENGTH, type=COUNT, metavar="N",
                  help="Train and validate on the same N batches, in the order of the data: a model that is right "
                       "learns them by heart."),
    shared_option("--without", type=click.Choice(DEFAULT_PLUGINS), multiple=True, metavar="NAME",
                  help=f"Leave out a plugin that `run` adds by default: {', '.join(DEFAULT_PLUGINS)}."),
    shared_option("--devices", group=DEVICES, type=DevicesType(), metavar="0,1",
                  help="Train in several processes, one for each GPU listed (on a CPU, one for each number), and add "
                       "the plugin ddp unless ddp or fsdp is given."),
    shared_option("--matmul", group=DEVICES, type=click.Choice(["highest", "high", "medium"]), default="highest",
                  metavar="P",
                  help="Precision of float32 matrix products (torch.set_float32_matmul_precision): highest, high or "
                       "medium; the last two are faster on recent GPUs."),
    shared_option("--seed", group=REPEATING, default=0, type=IntegerType(0, 2**64 - 1), metavar="N",
                  help="Seed of the random-number generators of Python, NumPy and torch."),
    shared_option("--deterministic", group=REPEATING, is_flag=True,
                  help="Use only deterministic algorithms (torch.use_deterministic_algorithms)."),
    shared_option("--config", group=REPEATING, type=PathType(), is_eager=True, callback=read_defaults,
                  metavar="FILE.toml",
                  help="Read options from the run.toml of another run; options on the command line override them."),
    traceback_option,
)
weights_option = click.option("--weights", type=TextType(), metavar="best|last|FILE",
                              help="The weights: the best, those at the end of the run, or a .safetensors file or a "
                                   "checkpoint.  [default: best if there is one, otherwise last]")


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that describe what is trained and how."""
    for option in reversed(SHARED_OPTIONS):
        command = option(command)
    return command


@click.group(cls=Commands, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("loopctl"), prog_name="loopctl")
@click.pass_context
def main(ctx: click.Context) -> None:
    """A PyTorch training loop made of plugins: the loop says when, plugins say what."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@main.command()
@training_options
@shared_option("--max-time", group=LENGTH, type=TimeType(), metavar="TIME",
               help="Leave the run when this time is over, such as 90s, 30m, 2h, 1h30m or 1d, with a checkpoint from "
                    "which it can be resumed.")
@shared_option("--fast-dev-run", group=LENGTH, is_flag=True,
               help="Try everything with two epochs of three batches: training, validation, plugins, checkpoints. "
                    "Leaves no folder behind.")
@shared_option("--name", group=REPEATING, type=TextType(), metavar="NAME",
               help="Write to the folder runs/NAME, which must not exist yet.")
@shared_option("--tag", group=REPEATING, type=TextType(), multiple=True, metavar="TAG",
               help="A word by which `loopctl runs` and `compare` tell the run from others; repeat it for more.")
@shared_option("--out", group=MAIN, type=PathType(), metavar="DIR",
               help="The run's folder.  [default: a new one in runs/]")
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
@click.argument("runs", nargs=-1, required=True, type=PathType())
@click.option("--out", type=PathType(), metavar="FILE", help="Also write an HTML page with the curves: compare.html.")
def compare(runs: tuple[Path, ...], out: Path | None) -> None:
    """Show how the options and the results of runs differ. RUNS are the folders of two runs or more."""
    from loopctl.cli.compare import compare_runs  # by its full path, for `compare` is this command
    say(compare_runs(runs, out))


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
def plugins(name: str | None, check: bool) -> None:
    """List the installed plugins, or show the options of one.

    With a NAME, its options with their types and defaults, its hooks and its origin are shown.
    """
    from loopctl.cli import listing
    if name is not None:
        say(listing.page(name, check))
    else:
        listed, broken = listing.table(check)
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
