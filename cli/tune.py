"""`loopctl tune`: find the fastest way to run what the command line names, and print the command line to use."""
from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable
from typing import Any

from loopctl.checkpoint.atomic_files import atomic_write
from loopctl.cli import data, launch
from loopctl.cli.arguments import build_arguments, chosen_torch_settings
from loopctl.cli.run_folder import configuration_text, unwritable_is_error
from loopctl.data.dataset import Data
from loopctl.errors import UsageError
from loopctl.global_settings import torch_settings
from loopctl.tuning.choices import Composition, optimizer_options, plugins_of, settings_of
from loopctl.tuning.search import Search

OWN_FLAGS = ("--seconds", "--write", "--tolerance")         # of `loopctl tune`, which `loopctl run` does not take


def tune(settings: dict[str, Any], arguments: list[str]) -> str:
    """Search, and return the table and the command line to use. With --write, also write the configuration.

    arguments: the words of the command line
    """
    seconds, tolerance, file = settings.pop("seconds"), settings.pop("tolerance"), settings.pop("write")
    config, tags = settings.pop("config"), list(settings.pop("tag"))
    for name in ("out", "name", "max_time"):            # of the run, not of a trial
        settings.pop(name)
    if len(launch.device_numbers(settings["devices"])) > 1:
        raise UsageError(f"tune --devices {settings['devices']}: it works in one process; name one device")
    if file is not None and file.exists():
        raise UsageError(f"--write {file} exists and is not overwritten; choose another file")
    arguments_of_fit, resolved, dataset = build_arguments(settings)
    search = Search(arguments_of_fit, seconds, tolerance, other_loaders(settings, dataset, arguments_of_fit),
                    progress=show_progress)
    with torch_settings(**chosen_torch_settings(settings)):
        found = search.run()
    changes = changed_options(settings, found.chosen)
    if file is not None:
        plugins = [*resolved["plugin"][:len(settings["plugin"])], *plugins_of(found.chosen),
                   *resolved["plugin"][len(settings["plugin"]):]]
        written = {key: value for key, value in (resolved | changes | {"plugin": plugins, "tag": tags or None}).items()
                   if value is not None}
        with unwritable_is_error(file.parent), atomic_write(file) as temporary:
            temporary.write_text(configuration_text(written, f"loopctl run --config {file}"), encoding="utf-8")
    gain = f", {found.gain:.2f} times as fast as it was given" if found.chosen else ": nothing tried was faster"
    return f"{found}\n\nuse{gain}:\n{command(arguments, settings, changes, config is not None)}"


def other_loaders(settings: dict[str, Any], dataset: Data, arguments: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Further ways to read the data, by name: on the device, where reading it so draws no other random numbers."""
    if dataset.on_device or dataset.augment or settings["workers"] or not hasattr(arguments["train"], "collate_fn"):
        return {}

    def on_device() -> Any:
        kept = data.make(with_option(settings["data"], "on_device=true"), settings["data_root"], False)
        train, valid = kept.loaders(arguments["train"].batch_size, 0, arguments["device"],
                                    getattr(arguments["train"].dataset, "classes", None) is not None)
        return data.limit(settings, train, valid)[0]

    return {"data:on_device=true": on_device}


def with_option(spec: str, option: str) -> str:
    """A spec with one more option."""
    has_options = "=" in spec.rpartition(":")[2]
    return f"{spec},{option}" if has_options else f"{spec}:{option}"


def changed_options(settings: dict[str, Any], chosen: Composition) -> dict[str, Any]:
    """The options of the command line that a composition changes, but for the plugins."""
    changes: dict[str, Any] = settings_of(chosen)
    for name, value in optimizer_options(chosen).items():
        if value:
            changes["optimizer"] = with_option(settings["optimizer"], f"{name}=true")
    for choice in chosen:
        if choice.workers is not None:
            changes["workers"] = choice.workers
        if choice.loader:
            changes["data"] = with_option(settings["data"], choice.loader.removeprefix("data:"))
    added = plugins_of(chosen)
    return changes | ({"plugin": [*settings["plugin"], *added]} if added else {})


def command(arguments: list[str], settings: dict[str, Any], changes: dict[str, Any], from_file: bool) -> str:
    """The command line of `loopctl run` with the changes.

    from_file: whether options came from a file, whose plugins are not used where the command line names one
    """
    flags = {f"--{name.replace('_', '-')}": value for name, value in changes.items() if name != "plugin"}
    words = without_flags(arguments[1:], {*OWN_FLAGS, *flags} | ({"--plugin"} if from_file and "plugin" in changes
                                                                 else set()))
    plugins = changes.get("plugin", [])
    for text in plugins if from_file else plugins[len(settings["plugin"]):]:
        words += ["--plugin", text]
    for flag, value in flags.items():
        words += [flag] if value is True else [flag, str(value)]
    return shlex.join(["loopctl", "run", *words])


def without_flags(words: list[str], flags: set[str]) -> list[str]:
    """The words of a command line without some options and their values."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in flags:
            skip = True
        elif word.partition("=")[0] not in flags:
            kept.append(word)
    return kept


def show_progress(text: str | None) -> None:
    """Show what is tried, in one line of the terminal that the next one replaces; nothing where there is none."""
    if sys.stderr is not None and sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stderr.write("\r\x1b[K" + ("" if text is None else f"tune: {text}"[:width]))
        sys.stderr.flush()
