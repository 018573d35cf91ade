"""`loopctl runs`: a table of the runs in a folder, read from their files without importing torch."""
from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from loopctl.checkpoint.folder_lock import CHECKPOINTS, RUN, is_locked
from loopctl.cli.compare import log_path, read_config, read_history
from loopctl.cli.specs import DEFAULT_PLUGINS
from loopctl.composition.quoting import unquote
from loopctl.errors import UsageError, harmless, one_line
from loopctl.report import charts

# Keys of run.toml that the line of a run names otherwise, or that say where it ran rather than what was trained.
NOT_TOLD = ("model", "data", "lr", "epochs", "tag", "plugin", "device", "devices", "data_root", "download", "workers",
            "without")


def list_runs(folder: Path, defaults: dict[str, Any], as_json: bool) -> str:
    """Return the table of the runs in `folder`, or a list as JSON. Raises UsageError where there is no such folder.

    defaults: the default of each option of `loopctl run`; only values that differ from them are shown
    """
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}; name the folder that holds the folders of runs")
    children = [folder] if is_run(folder) else [child for child in folder.iterdir() if is_run(child)]
    runs = sorted((describe(child, defaults) for child in children), key=lambda run: (run["when"], run["name"]))
    if as_json:
        return json.dumps(runs, indent=2)
    return "\n".join(table(runs)) if runs else f"no runs in {folder}"


def is_run(folder: Path) -> bool:
    """Whether `folder` is that of a run, also of one that was started in Python or is damaged."""
    with suppress(OSError):
        return folder.is_dir() and (any((folder / name).exists() for name in ("run.toml", "metrics.csv", RUN))
                                    or any(checkpoints(folder, {})))
    return False


def describe(folder: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    """What is known of a run. A file that cannot be read leaves out what it would tell, and is named in "problem"."""
    config: dict[str, Any] = {}
    history: list[dict[str, float]] = []
    problem = ""
    try:
        config = read_config(folder / "run.toml")
        history = read_history(folder / log_path(config))
    except UsageError as error:
        problem = one_line(error)
    metric, value = best(config, history)
    tags = config.get("tag")
    return {"name": folder.resolve().name, "folder": str(folder), "when": began(folder), "state": state(folder, config),
            "epochs": last_epoch(history), "of": config.get("epochs"), "metric": metric, "best": value,
            "model": config.get("model"), "data": config.get("data"), "changed": changed(config, defaults),
            "tags": list(map(str, tags)) if isinstance(tags, list) else [], "problem": problem}


def state(folder: Path, config: dict[str, Any]) -> str:
    """"running", "finished", "stopped" where it can be resumed, or "broken" where there is nothing to resume from."""
    found = list(checkpoints(folder, config))
    folders = {folder / "checkpoints", *(file.parent for file in found)}
    if is_locked(folder / RUN) or any(is_locked(each / CHECKPOINTS) for each in folders):
        return "running"
    return "finished" if (folder / "weights.safetensors").is_file() else "stopped" if found else "broken"


def checkpoints(folder: Path, config: dict[str, Any]) -> Iterator[Path]:
    """The checkpoints of a run, in its folder, in the folders in it and where the option `dir` has them."""
    places = [folder, *folder.glob("*/")]
    with suppress(ValueError):
        places += [folder / unquote(found) for found in checkpoint_options(config, "dir")]
    for place in places:
        with suppress(OSError):
            yield from (file for file in place.glob("step-*.pt") if re.match(r"step-\d+\.pt", file.name))


def checkpoint_options(config: dict[str, Any], name: str) -> list[str]:
    """The values of an option in the specs of the plugin checkpoint."""
    specs = config.get("plugin")
    texts = [str(spec) for spec in (specs if isinstance(specs, list) else []) if str(spec).startswith("checkpoint:")]
    return [found[1] for text in texts if (found := re.search(rf"[:,]{name}=(\"[^\"]*\"|[^,]*)", text))]


def best(config: dict[str, Any], history: list[dict[str, float]]) -> tuple[str | None, float | None]:
    """The metric by which checkpoints are judged, and its best value."""
    losses = [name for row in history[:1] for name in row if name.startswith("val_") and name.endswith("_loss")]
    names = [*filter(None, (*checkpoint_options(config, "monitor"), config.get("monitor"))), *losses, "train_loss"]
    metric = next((name for name in names if any(name in row for row in history)), None)
    values = [row[metric] for row in history if metric in row and charts.number(row[metric])] if metric else []
    if not values or metric is None:
        return metric, None
    if modes := [mode for mode in checkpoint_options(config, "mode") if mode in ("min", "max")]:
        return metric, (min if modes[0] == "min" else max)(values)
    point = charts.best(metric, list(enumerate(values)))
    return metric, point[1] if point else values[-1]


def last_epoch(history: list[dict[str, float]]) -> float:
    epochs = [row["epoch"] for row in history if charts.number(row.get("epoch"))]
    return epochs[-1] if epochs else 0


def began(folder: Path) -> str:
    """When the run began: the time in its name, else that of its oldest file of those written at the start."""
    with suppress(ValueError):
        return datetime.strptime(folder.resolve().name[:19], "%Y-%m-%d_%H-%M-%S").isoformat(" ")
    times = []
    for name in ("explain.txt", "run.toml", "metrics.csv", "."):
        with suppress(OSError):
            times.append((folder / name).stat().st_mtime)
    return datetime.fromtimestamp(min(times, default=0)).isoformat(" ", "seconds")


def changed(config: dict[str, Any], defaults: dict[str, Any]) -> list[str]:
    """The options that differ from the defaults, and the names of the plugins that `run` does not add by itself.

    Which of a plugin's options differ is known to its code only, which is not imported; `loopctl compare` shows them.
    """
    plugins, left_out = config.get("plugin"), config.get("without")
    names = [str(spec).partition(":")[0] for spec in (plugins if isinstance(plugins, list) else [])]
    usual = {"metric": ["accuracy"], "loss": "cross_entropy"}       # where the data has classes
    options = [f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
               for key, value in sorted(config.items()) if key not in NOT_TOLD and value not in (None, [], False)
               and str(value) != str(defaults.get(key)) and value != usual.get(key)]
    without = [f"without {name}" for name in (left_out if isinstance(left_out, list) else [])]
    return [*options, *(name for name in names if name not in DEFAULT_PLUGINS), *without]


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
    """Two lines per run, of at most the width of the terminal: how it went, and what it is."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 200
    longest = min(30, max(len(one_line(run["name"])) for run in runs))
    yield f"{'name':{longest}}  {'when':16}  {'state':8}  {'epochs':>8}  best"
    for run in runs:
        epochs = f"{run['epochs']:g}" + (f"/{run['of']}" if run["of"] is not None else "")
        value = f"{run['metric']} {charts.shown(run['best'])}" if run["best"] is not None else ""
        head = f"{one_line(run['name']):{longest}}  {run['when'][:16]}  {run['state']:8}  {epochs:>8}  {value}"
        yield shortened(head, width)
        tags = [f"#{tag}" for tag in run["tags"]]
        what = [f"{run['model']} on {run['data']}"] * bool(run["model"] and run["data"])
        told = [" ".join(tags)] * bool(tags) + what + run["changed"] + [run["problem"]] * bool(run["problem"])
        yield shortened(f"  {one_line(', '.join(told) or 'started in Python')}", width)


def shortened(line: str, width: int) -> str:
    line = harmless(line)
    return line.rstrip() if len(line.rstrip()) <= width else f"{line[:width - 3]}..."
