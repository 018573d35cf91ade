"""The options of `loopctl run` and the commands that take them too. Importing this module does not import torch."""
from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from loopctl.cli.completion import completer
from loopctl.cli.grouped_help import MAIN, GroupedOption
from loopctl.cli.parameters import (
    BatchSizeType,
    DevicesType,
    FlagOrWarnType,
    FloatType,
    IntegerType,
    LimitType,
    PathType,
    TextType,
)
from loopctl.cli.specs import DATA, DEFAULT_PLUGINS
from loopctl.errors import nearest


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
    if param.name == "resume" and path.is_file():
        raise click.UsageError(f"--resume {path} is a file; name the folder of the run, as in --resume runs/a")
    if param.name == "resume" and not path.exists() and Path("runs", path, "run.toml").exists():
        raise click.UsageError(f"--resume: there is no folder {path}; did you mean runs/{path}?")
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
    if ctx.command.name != "run":           # what only `run` takes is of no matter to a command that does not train
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
    if (default := settings.get("default")) is not None and default is not False:
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
                  help="One of `loopctl optimizers`, package.module:Class or file.py:Class; or two by kind of weight, "
                       "muon,adamw."),
    shared_option("--lr", group=MAIN, type=FloatType(), metavar="F",
                  help="Learning rate.  [default: the optimizer's own]"),
    shared_option("--epochs", group=MAIN, default=20, type=COUNT, metavar="N", help="Passes over the training data."),
    shared_option("--batch-size", group=MAIN, type=BatchSizeType(1), metavar="N|auto",
                  help="Samples per batch, in each process; auto: what fits.  [default: 64]"),
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
    shared_option("--cudnn-benchmark", group=DEVICES, is_flag=True,
                  help="Let cuDNN try its algorithms for each shape of a convolution and keep the fastest "
                       "(torch.backends.cudnn.benchmark)."),
    shared_option("--threads", group=DEVICES, type=IntegerType(1, 1024), metavar="N",
                  help="Threads that compute on the CPU (torch.set_num_threads).  [default: torch's own]"),
    shared_option("--seed", group=REPEATING, default=0, type=IntegerType(0, 2**64 - 1), metavar="N",
                  help="Seed of the random-number generators of Python, NumPy and torch."),
    shared_option("--deterministic", lambda: ["warn"], group=REPEATING, is_flag=False, flag_value="true", default=False,
                  type=FlagOrWarnType(), metavar="[=warn]",
                  help="Use only deterministic algorithms (torch.use_deterministic_algorithms). An operation that has "
                       "none is an error; with =warn it is allowed, and logged."),
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
