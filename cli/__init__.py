"""The command line. Nothing here imports torch; what a command needs, it imports when it runs."""
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

from loopctl.cli.parameters import Devices, Number, Place, Text, Whole
from loopctl.cli.specs import DEFAULT_PLUGINS
from loopctl.errors import UsageError, nearest, one_line


class Commands(click.Group):
    """A group that says what is wrong in one line: usage errors exit with 2, failures with 1."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["loopctl.arguments"] = list(args)
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        kwargs["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **kwargs) or 0)
        except click.ClickException as error:
            complain(error.format_message(), error)
            sys.exit(error.exit_code)
        except UsageError as error:
            complain(error, error)
            sys.exit(2)
        except (click.Abort, KeyboardInterrupt) as error:
            complain("interrupted", error, "")
            sys.exit(130)
        except BrokenPipeError:                      # what reads our output, such as `head`, has seen enough
            sys.stderr.close()
            sys.exit(1)
        except Exception as error:
            if "--traceback" in sys.argv:
                raise
            complain(f"{failure(error)}; --traceback shows where", error)
            sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except EOFError as error:                    # which click takes for an end of the user's input
            raise OSError(f"a file ends too early ({failure(error)})") from error


def complain(text: object, error: BaseException, start: str = "error: ") -> None:
    """Say on stderr what is wrong. Of several processes that train together, one says it."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "RANK" in os.environ:
        from loopctl.distributed.process_group import claim_error_report, is_peer_failure, rank
        # What is wrong everywhere, the first process says; what a lost one leads to, nobody if that one has said it.
        common = isinstance(error, UsageError | click.ClickException) and rank() > 0
        if not claim_error_report(common or is_peer_failure(error)):
            return
        if is_peer_failure(error):
            text = f"another process of the run has ended, or cannot be reached ({text})"
        start += f"process {rank()}: " if rank() else ""
    click.echo(f"{start}{one_line(text)}", err=True)


def failure(error: BaseException) -> str:
    """An unexpected error in one line: what it is, and which plugin raised it."""
    said = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])]
    return " ".join(", ".join(said).split())


def completes(names: Callable[[], list[str]]) -> Callable[..., list[CompletionItem]]:
    """Shell completion from `names`, which imports nothing heavy."""
    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in names() if name.startswith(incomplete)]
    return complete


def plugin_names() -> list[str]:
    from loopctl.composition.discovery import available
    return list(available())


def model_names() -> list[str]:
    from loopctl.cli import models
    return models.known()


def optimizer_names() -> list[str]:
    from loopctl.cli import optimizers
    return optimizers.known()


DATA = ["cifar10", "cifar100", "digits", "fake", "fashionmnist", "imagefolder", "imagenet", "mnist"]


def from_file(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Take the values of a run.toml as defaults, so that what the command line says wins."""
    if path is None:
        return None
    file = path / "run.toml" if param.name == "resume" else path
    try:
        with file.open("rb") as stream:
            content = stream.read(2**20 + 1)
        if len(content) > 2**20:                           # or endless, as /dev/zero
            raise ValueError("it has more than a megabyte")
        found = tomllib.loads(content.decode("utf-8-sig"))
        str(found)                                         # so that whatever is in it can be said below
    except FileNotFoundError:
        raise click.UsageError(f"--{param.name}: there is no file {file}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--{param.name}: {file} cannot be read: {error}") from None
    except (ValueError, RecursionError) as error:          # also a number, or a nesting, that nobody wrote
        raise click.UsageError(f"--{param.name}: {file} is not TOML: {error}") from None
    not_here = ("config", "resume", "out", "traceback")
    known = {option.name: option for option in ctx.command.params if option.name not in not_here}
    for key, value in found.items():
        if key not in known:
            way = "pass it on the command line" if key in not_here else nearest(key, known, "there are")
            raise click.UsageError(f"--{param.name}: {file}: {key!r} is no key of a configuration; {way}")
        if isinstance(value, dict) or (isinstance(value, list) != (key in ("plugin", "without"))):
            kind = "a list" if key in ("plugin", "without") else "one value"
            raise click.UsageError(f"--{param.name}: {file}: {key} takes {kind}, not {value!r}")
        try:                        # as text, as the command line has it: 1.5 is no number of epochs, true no rate
            found[key] = [str(item) for item in value] if isinstance(value, list) else str(value)
            known[key].type_cast_value(ctx, found[key])
        except click.BadParameter as error:
            raise click.UsageError(f"--{param.name}: {file}: {key}: {error.message}") from None
    ctx.default_map = {**(ctx.default_map or {}), **found}
    return path


def choice(flag: str, names: Callable[[], list[str]] | None = None, **settings: Any) -> Callable[..., Any]:
    """An option with a default to show, and names to complete."""
    if settings.get("default") is not None and not settings.get("is_flag"):
        settings["show_default"] = True
    return click.option(flag, shell_complete=completes(names) if names else None, **settings)


COUNT = Whole(1)
COMPOSITION = (
    choice("--model", model_names, default="cnn", type=Text(), metavar="M",
           help="cnn, linear, mlp, vit, any of torchvision's, package.module:factory or file.py:factory."),
    choice("--data", lambda: DATA, default="digits", type=Text(), metavar="D",
           help=f"{', '.join(DATA)}, package.module:factory or file.py:factory; "
                "with :on_device=true all of it is kept there."),
    choice("--data-root", default="data", type=Place(str), metavar="DIR", help="Where data sets are."),
    choice("--download", is_flag=True, help="Get the data set if it is not there."),
    choice("--workers", default=0, type=Whole(0), metavar="N", help="Processes that load data."),
    choice("--optimizer", optimizer_names, default="adamw", type=Text(), metavar="O",
           help="Any of torch.optim, such as sgd:momentum=0.9, package.module:Class or file.py:Class."),
    choice("--lr", type=Number(), metavar="F", help="Learning rate.  [default: the optimizer's own]"),
    choice("--epochs", default=20, type=COUNT, metavar="N", help="Passes over the data."),
    choice("--max-steps", type=COUNT, metavar="N", help="End after so many updates."),
    choice("--eval-every", type=COUNT, metavar="N", help="Evaluate every N steps too."),
    choice("--batch-size", default=64, type=COUNT, metavar="N", help="Images per batch."),
    choice("--plugin", plugin_names, multiple=True, type=Text(), metavar="NAME[:option=value,...]",
           help="Add a plugin; may be repeated, and they act in this order. See `loopctl plugins`."),
    choice("--without", type=click.Choice(DEFAULT_PLUGINS), multiple=True,
           help="Leave out a plugin that run adds by itself."),
    choice("--device", default="auto", type=Text(), metavar="DEVICE", help="auto, cpu, mps, cuda or cuda:1."),
    choice("--devices", type=Devices(), metavar="0,1",
           help="Train in several processes, one per GPU; on a CPU, in as many as are named. Adds ddp."),
    choice("--seed", default=0, type=Whole(0, 2**64 - 1), metavar="N", help="Seed of all random numbers."),
    choice("--matmul", type=click.Choice(["highest", "high", "medium"]), default="highest",
           help="Precision of float32 matrix products; high and medium are faster on recent GPUs."),
    choice("--deterministic", is_flag=True, help="Only deterministic algorithms."),
    choice("--config", type=Place(), is_eager=True, callback=from_file, metavar="FILE.toml",
           help="Take options from a run's run.toml; those given here win."),
    choice("--traceback", is_flag=True, expose_value=False, help="Show Python's traceback of a failure."),
)


def composition(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what is trained, and how."""
    for option in reversed(COMPOSITION):
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
@composition
@click.option("--out", type=Place(), metavar="DIR",
              help="The run's folder.  [default: a new one in runs/]")
@click.option("--resume", type=Place(), is_eager=True, callback=from_file, metavar="DIR",
              help="Go on with the run in this folder.")
@click.pass_context
def run(ctx: click.Context, **settings: Any) -> None:
    """Train a model. Without options: a small network on images of digits."""
    from loopctl.cli import train
    train.run(settings, ctx.meta["loopctl.arguments"])


@main.command()
@composition
def explain(**settings: Any) -> None:
    """Show which plugin acts at which hook, and the plan in numbers, without training."""
    from loopctl.cli import train
    click.echo(train.explained(settings))


@main.command()
@composition
@click.option("--out", type=Place(), metavar="FILE", help="Draw a picture too: lr.png, lr.svg.")
def lr(out: Path | None, **settings: Any) -> None:
    """Draw the learning rate over a run, without training."""
    from loopctl.cli import curve
    click.echo(curve.drawn(settings, out))


@main.command()
@composition
def summary(**settings: Any) -> None:
    """Show a model's layers, their shapes, parameters and sizes."""
    from loopctl.cli import train
    click.echo(train.summarized(settings))


@main.command()
@click.argument("runs", nargs=-1, required=True, type=Place())
@click.option("--out", type=Place(), metavar="FILE", help="Write a page with the curves too: compare.html.")
def compare(runs: tuple[Path, ...], out: Path | None) -> None:
    """Show what differs between the runs in these folders: what they were asked for, and what came of it."""
    from loopctl.cli.compare import compared  # by its path: here `compare` is this command
    click.echo(compared(runs, out))


@main.command()
@click.argument("name", required=False, type=Text(), shell_complete=completes(plugin_names))
@click.option("--check", is_flag=True, help="Import each plugin, and mark the broken ones.")
def plugins(name: str | None, check: bool) -> None:
    """List the plugins, or show one with its options, its hooks and where it comes from."""
    from loopctl.cli import listing
    if name is not None:
        click.echo(listing.page(name))
    else:
        listed, broken = listing.table(check)
        click.echo(listed)
        if broken:
            raise click.ClickException(f"broken plugins: {', '.join(broken)}; their lines above say why")


@main.command()
def hooks() -> None:
    """Show every moment of training that a plugin can join."""
    from loopctl import hooks
    click.echo((hooks.__doc__ or "").rstrip())


@main.command("new-plugin")
@click.argument("name", type=Text())
@click.option("--kind", type=click.Choice(["schedule", "observer", "wrapper", "replacer"]), default="observer",
              show_default=True,
              help="What it begins with: a learning rate, a metric, something on in the forward pass, or a loss.")
@click.option("--out", type=Place(), metavar="DIR", help="The package's folder, a new one.  [default: loopctl-NAME]")
def new_plugin(name: str, kind: str, out: Path | None) -> None:
    """Write a package with a plugin, its test and its help, ready to install."""
    from loopctl.cli import scaffold
    click.echo(scaffold.write(name, kind, out))
