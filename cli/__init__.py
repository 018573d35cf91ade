"""The command line `loopctl`: its commands and options. Importing this module does not import torch."""
from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from loopctl.cli.parameters import DevicesType, FloatType, IntegerType, PathType, TextType
from loopctl.cli.specs import DEFAULT_PLUGINS
from loopctl.errors import UsageError, nearest, one_line
from loopctl.report.terminal import say, use_plain_letters


class Commands(click.Group):
    """A group of commands that reports an error in one line. Usage errors exit with status 2, other failures with 1."""

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
            print_error(error, error)
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
    parts = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
    return " ".join(", ".join(parts).split())


def completer(names: Callable[[], list[str]]) -> Callable[..., list[CompletionItem]]:
    """Shell completion of the names that `names` returns, without importing torch."""
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in names() if name.startswith(incomplete)]
    return complete


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


DATA = ["cifar10", "cifar100", "digits", "fake", "fashionmnist", "imagefolder", "imagenet", "mnist"]


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
    command_line_only = ("config", "resume", "out", "traceback")
    known = {option.name: option for option in ctx.command.params if option.name not in command_line_only}
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
    """An option of several commands. Its help shows its default, and the shell completes its `names`."""
    if settings.get("default") is not None and not settings.get("is_flag"):
        settings["show_default"] = True
    return click.option(flag, shell_complete=completer(names) if names else None, **settings)


COUNT = IntegerType(1)
SHARED_OPTIONS = (
    shared_option("--model", model_names, default="cnn", type=TextType(), metavar="M",
                  help="The model: cnn, linear, mlp, vit, any of torchvision's by name, package.module:factory or "
                       "file.py:factory."),
    shared_option("--data", lambda: DATA, default="digits", type=TextType(), metavar="D",
                  help=f"The data set: {', '.join(DATA)}, package.module:factory or file.py:factory; "
                       "with :on_device=true all of it is kept in the memory of the device."),
    shared_option("--loss", loss_names, type=TextType(), metavar="L",
                  help="The loss: any of torch.nn by name with its options, such as mse or "
                       "cross_entropy:label_smoothing=0.1, package.module:name or file.py:name; model, where the "
                       "model returns it.  [default: cross_entropy, where the data has classes]"),
    shared_option("--metric", metric_names, multiple=True, type=TextType(), metavar="NAME[:option=value,...]",
                  help="Report a metric: accuracy, top5, mae, rmse, r2, perplexity, a class of torchmetrics, "
                       "package.module:name or file.py:name; repeat the option for more.  [default: accuracy, where "
                       "the data has classes]"),
    shared_option("--monitor", type=TextType(), metavar="METRIC",
                  help="The metric that checkpoint, early_stopping and plateau judge by, such as val_accuracy.  "
                       "[default: val_loss]"),
    shared_option("--forward", type=TextType(), metavar="F",
                  help="In place of a loss, a function (model, batch) that returns loss and outputs, as "
                       "package.module:function or file.py:function."),
    shared_option("--data-root", default="data", type=PathType(str), metavar="DIR",
                  help="The folder where data sets are stored."),
    shared_option("--download", is_flag=True, help="Download the data set if it is not in --data-root."),
    shared_option("--workers", default=0, type=IntegerType(0), metavar="N",
                  help="Number of worker processes that load data; 0 loads it in the main process."),
    shared_option("--optimizer", optimizer_names, default="adamw", type=TextType(), metavar="O",
                  help="The optimizer: any of torch.optim with its options, such as sgd:momentum=0.9, "
                       "package.module:Class or file.py:Class."),
    shared_option("--lr", type=FloatType(), metavar="F", help="Learning rate.  [default: the optimizer's own]"),
    shared_option("--epochs", default=20, type=COUNT, metavar="N", help="Number of passes over the training data."),
    shared_option("--max-steps", type=COUNT, metavar="N",
                  help="End the run after N updates, even if --epochs are not complete."),
    shared_option("--eval-every", type=COUNT, metavar="N",
                  help="Evaluate every N steps, in addition to the end of each epoch."),
    shared_option("--batch-size", type=COUNT, metavar="N", help="Samples per batch, in each process.  [default: 64]"),
    shared_option("--steps-per-epoch", type=COUNT, metavar="N",
                  help="Updates per epoch; needed where the data has no length."),
    shared_option("--plugin", plugin_names, multiple=True, type=TextType(), metavar="NAME[:option=value,...]",
                  help="Add a plugin (see `loopctl plugins`); repeat the option for more, which act in the "
                       "order given. A value with a comma is put in double quotes."),
    shared_option("--without", type=click.Choice(DEFAULT_PLUGINS), multiple=True,
                  help="Leave out a plugin that `run` adds by default."),
    shared_option("--device", default="auto", type=TextType(), metavar="DEVICE",
                  help="Device to train on: auto, cpu, mps, cuda or one such as cuda:1; auto chooses cuda, then mps, "
                       "then cpu."),
    shared_option("--devices", type=DevicesType(), metavar="0,1",
                  help="Train in several processes, one for each GPU listed (on a CPU, one for each number), and add "
                       "the plugin ddp unless ddp or fsdp is given."),
    shared_option("--seed", default=0, type=IntegerType(0, 2**64 - 1), metavar="N",
                  help="Seed of the random-number generators of Python, NumPy and torch."),
    shared_option("--matmul", type=click.Choice(["highest", "high", "medium"]), default="highest",
                  help="Precision of float32 matrix products (torch.set_float32_matmul_precision); high and medium are "
                       "faster on recent GPUs."),
    shared_option("--deterministic", is_flag=True,
                  help="Use only deterministic algorithms (torch.use_deterministic_algorithms)."),
    shared_option("--config", type=PathType(), is_eager=True, callback=read_defaults, metavar="FILE.toml",
                  help="Read options from the run.toml of another run; options on the command line override them."),
    shared_option("--traceback", is_flag=True, expose_value=False, help="Show Python's traceback of a failure."),
)


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
@click.option("--out", type=PathType(), metavar="DIR",
              help="The folder that the run writes to.  [default: a new one in runs/]")
@click.option("--resume", type=PathType(), is_eager=True, callback=read_defaults, metavar="DIR",
              help="Resume the run in this folder from its last checkpoint.")
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
@click.option("--out", type=PathType(), metavar="FILE",
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
@click.argument("runs", nargs=-1, required=True, type=PathType())
@click.option("--out", type=PathType(), metavar="FILE", help="Also write an HTML page with the curves: compare.html.")
def compare(runs: tuple[Path, ...], out: Path | None) -> None:
    """Show how the options and the results of runs differ. RUNS are the folders of two runs or more."""
    from loopctl.cli.compare import compare_runs  # by its full path, for `compare` is this command
    say(compare_runs(runs, out))


@main.command()
@click.argument("name", required=False, type=TextType(), shell_complete=completer(plugin_names))
@click.option("--check", is_flag=True, help="Import each plugin and mark those that cannot be imported.")
def plugins(name: str | None, check: bool) -> None:
    """List the installed plugins, or describe one of them: its options, hooks and origin."""
    from loopctl.cli import listing
    if name is not None:
        say(listing.page(name))
    else:
        listed, broken = listing.table(check)
        say(listed)
        if broken:
            raise click.ClickException(f"broken plugins: {', '.join(broken)}; see their lines above")


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
