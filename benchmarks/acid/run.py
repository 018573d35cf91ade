"""The acid test: the same small works in several libraries, each compared with the plain loop, update by update.

`python benchmarks/acid/run.py` trains every work with every library that is installed, and says what came of it.
`python benchmarks/acid/run.py LIBRARY WORK` trains one, and says what differs.
`--install` first makes an environment for each library, in a folder of its own below `--environments`.
`--page` writes docs/acid.md from the results.
"""
from __future__ import annotations

import argparse
import json
import os
import site
import subprocess
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from math import isclose
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from cell import HERE
from page import PAGE, page
from works import WORKS

from loopctl.errors import counted
from loopctl.tape.header import environment
from loopctl.tape.reading import TapeContent, read_tape
from loopctl.why.differences import explain_difference

LIBRARIES = {           # the folder, the name, and the package whose version is reported
    "loopctl": ("loopctl", "loopctl"), "lightning": ("PyTorch Lightning", "lightning"),
    "accelerate": ("Accelerate", "accelerate"), "transformers": ("HF Trainer", "transformers"),
    "ignite": ("Ignite", "pytorch-ignite"), "fastai": ("fastai", "fastai"), "keras": ("Keras", "keras"),
    "skorch": ("skorch", "skorch"), "mmengine": ("MMEngine", "mmengine"), "torchtnt": ("torchtnt", "torchtnt")}
NAMES = {library: name for library, (name, _) in LIBRARIES.items()}
LIMIT = 180             # seconds for a part of a cell
ROUNDING = 1e-5         # to which weights agree where sums or formulas have another order


@dataclass
class Cell:
    """What came of one work with one library."""

    end: str                    # same, rounding, differs, not offered, needs a GPU, or failed
    update: int | None = None   # the first update that differs
    cause: str = ""
    text: str = ""
    results: dict[str, Any] = field(default_factory=dict)       # theirs and the plain loop's, where they differ


def python_of(library: str, environments: Path) -> str:
    """The interpreter that has a library."""
    own = environments / library / "bin" / "python"
    return str(own) if own.exists() else sys.executable


def train(library: str, name: str, folder: Path, python: str, part: int) -> dict[str, Any]:
    """Train one part of a work in a process of its own, or in as many as the work wants."""
    folder.mkdir(parents=True, exist_ok=True)
    processes = WORKS[name].processes if library != "plain" else 1
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
              "--rdzv-endpoint=localhost:0"] if processes > 1 else []
    command = [python, *launch, str(HERE / "cell.py"), library, name, str(folder), str(part)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "torch",
                                "HF_HUB_OFFLINE": "1"}
    with (folder / f"output-{part}.txt").open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment,
                                   start_new_session=True)
        try:
            process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
            return {"end": "failed", "text": f"not over after {LIMIT} s"}
    outcome = folder / "outcome-0.json"
    if not outcome.exists():
        return {"end": "failed", "text": (folder / f"output-{part}.txt").read_text()[-3000:]}
    found: dict[str, Any] = json.loads(outcome.read_text())
    outcome.unlink()
    return found


def train_all_parts(library: str, name: str, folder: Path, python: str) -> dict[str, Any]:
    """Train a work; where it is stopped and resumed, in two processes, one after the other."""
    parts = (1, 2) if WORKS[name].stop_after and library != "plain" else (0,)
    outcome: dict[str, Any] = {}
    for part in parts:
        outcome = train(library, name, folder, python, part)
        if outcome["end"] != "trained":
            break
    return outcome


def weights_after(tape: TapeContent) -> list[tuple[int, Any]]:
    """The number of every update that was made, and the fingerprints of the weights after it."""
    return [(update.number, update.table("weights", "end")) for update in tape if not update.skipped]


def first_difference(ours: Path, theirs: Path, exact: bool = True) -> int | None:
    """The number of the first update after which the weights differ, in a bit or by more, or which one tape has."""
    one, other = weights_after(read_tape(ours)), weights_after(read_tape(theirs))
    for index in range(max(len(one), len(other))):
        if index >= len(one) or index >= len(other):
            return max(one, other, key=len)[index][0]
        a, b = one[index][1], other[index][1]
        alike = a.checksums == b.checksums if exact else all(
            isclose(x, y, rel_tol=ROUNDING, abs_tol=ROUNDING)
            for x, y in zip(a.norms + a.projections, b.norms + b.projections, strict=True))
        if not alike:
            return one[index][0]
    return None


def other_results(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """The results that differ by more than a rounding."""
    def alike(one: Any, other: Any) -> bool:
        if isinstance(one, list):
            return isinstance(other, list) and len(one) == len(other) and all(map(alike, one, other))
        return other is not None and isclose(one, other, rel_tol=1e-6, abs_tol=1e-6)
    return {name: [theirs.get(name), value] for name, value in ours.items() if not alike(value, theirs.get(name))}


def samples_of(folder: Path, update: int) -> Counter[int]:
    """The samples of an update in all processes, as checksums."""
    found: Counter[int] = Counter()
    for file in folder.glob("*.tape"):
        if made := read_tape(file).updates.get(update):
            for point in made.points("samples"):
                found.update(made.observed["samples", point])
    return found


def explain_samples(ours: Path, theirs: Path, update: int) -> tuple[str, str]:
    """The cause and a text, by the batches and the samples of an update in all processes."""
    tapes = [read_tape(file).updates for file in (theirs, ours)]
    if not all(update in updates for updates in tapes):
        return "length", f"{counted(len(tapes[0]), 'update')}, and the plain loop makes {len(tapes[1])}; those that " \
            "both make are the same"
    batches = [updates[update].values["micro_batches"] for updates in tapes]
    processes = len([*theirs.parent.glob("*.tape")])
    if processes == 1 and batches[0] != batches[1]:
        return "grouping", f"update {update} is made from {counted(batches[0], 'batch')}, and that of the plain loop " \
            f"from {counted(batches[1], 'batch')}"
    expected, found = samples_of(ours.parent, update), samples_of(theirs.parent, update)
    if found.total() == expected.total() and found != expected:
        return "data", f"update {update} has other samples than that of the plain loop"
    text = f"update {update} has {counted(found.total(), 'sample')}, and that of the plain loop {expected.total()}"
    if more := found - expected:
        before = sum((samples_of(ours.parent, number) for number in range(1, update)), Counter())
        if again := (more & (before + expected)).total():
            return "data repeated", f"{text}: {counted(again, 'sample')} a second time"
        return "data", f"{text}: {counted(more.total(), 'sample')} of others"
    if missing := expected - found:
        return "data missing", f"{text}: {counted(missing.total(), 'sample')} left out"
    text = f"the weights differ after update {update}, which has the same samples"
    return ("weighting", f"{text}: they count by other weights") if processes > 1 else ("unknown", text)


def compare(name: str, ours: Path, theirs: Path, results: dict[str, Any], outcome: dict[str, Any]) -> Cell:
    """Compare what a library did with the plain loop."""
    if outcome["end"] != "trained":
        return Cell(outcome["end"], text=outcome["text"])
    update = first_difference(ours, theirs, exact=False)
    other = other_results(results, outcome["results"])
    if update is None and not other:
        rounded = first_difference(ours, theirs)
        return Cell("rounding", rounded) if rounded else Cell("same")
    if update is None:
        shown = [f"{key} is {theirs}, and the plain loop's is {ours}" for key, (theirs, ours) in other.items()
                 if not isinstance(ours, list)] or [f"{key} differs" for key in other]
        return Cell("differs", cause="result", text="the updates are the same; " + "; ".join(shown), results=other)
    found = explain_difference(theirs, ours)
    # With several processes the gradients are of a part of the samples; some libraries keep them elsewhere, or call the
    # model before they load the weights of a checkpoint.
    if (WORKS[name].processes > 1 or found.cause == "weights changed"
            or ((found.update or 0) < update and found.cause != "length")):
        return Cell("differs", update, *explain_samples(ours, theirs, update), other)
    return Cell("differs", update, found.cause, found.text, other)


def install(library: str, environments: Path) -> None:
    """Make an environment for a library on top of this one, whose torch it uses."""
    folder = environments / library
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    packages = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # With what its own .pth files add, such as the folder of a package that is installed editable.
    Path(packages, "below.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n"
                                                   for path in site.getsitepackages()))
    constraints = folder / "constraints.txt"
    constraints.write_text(f"torch=={torch.__version__.partition('+')[0]}\n")
    subprocess.run([folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--requirement",
                    HERE / "requirements" / f"{library}.txt", "--constraint", constraints], check=True)


def version_of(library: str, python: str) -> str:
    """The version of a library in its environment; empty where it is not there."""
    code = f"from importlib.metadata import version; print(version({LIBRARIES[library][1]!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", nargs="?", choices=[*LIBRARIES], metavar="LIBRARY")
    parser.add_argument("work", nargs="?", choices=[*WORKS], metavar="WORK")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "loopctl-acid",
                        help="the folder with an environment for each library")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing")
    parser.add_argument("--tapes", type=Path, help="keep the tapes and what was printed in this folder")
    parser.add_argument("--results", type=Path, help="the file with the results, to which those of a library or a work "
                        "are added; left out, results.json beside this file, and none for a single work")
    parser.add_argument("--page", action="store_true", help="write docs/acid.md from the results, without training")
    parser.add_argument("--jobs", type=int, default=1, help="how many works are trained at once")
    given = parser.parse_args()
    file = given.results or HERE / "results.json"
    if given.page:
        PAGE.write_text(page(json.loads(file.read_text()), NAMES))
        return
    if given.tapes and given.tapes.exists() and any(given.tapes.iterdir()):
        parser.error(f"--tapes {given.tapes} is not empty; choose another folder")
    libraries = [given.library] if given.library else [*LIBRARIES]
    names = [given.work] if given.work else [*WORKS]
    for library in libraries:
        if given.install and not version_of(library, python_of(library, given.environments)):
            install(library, given.environments)
    pythons = {library: python_of(library, given.environments) for library in libraries}
    versions = {library: version for library in libraries if (version := version_of(library, pythons[library]))}
    for library in libraries:
        if library not in versions:
            print(f"{library} is not installed; use --install, or name the folder of its environment: --environments")
    if not versions:
        raise SystemExit(1)
    with TemporaryDirectory() as temporary, ThreadPoolExecutor(given.jobs) as threads:
        folder = given.tapes or Path(temporary)
        plain = dict(zip(names, threads.map(
            lambda name: train_all_parts("plain", name, folder / "plain" / name, sys.executable), names), strict=True))
        for name, outcome in plain.items():
            if outcome["end"] != "trained":
                raise SystemExit(f"the plain loop of {name} failed: {outcome['text']}")

        def one(library: str, name: str) -> Cell:
            if not (HERE / library / f"{name}.py").exists():
                return Cell("failed", text="there is no script")
            own = folder / library / name
            outcome = train_all_parts(library, name, own, pythons[library])
            return compare(name, folder / "plain" / name / "updates.tape", own / "updates.tape",
                           plain[name]["results"], outcome)
        waiting = {(library, name): threads.submit(one, library, name) for library in versions for name in names}
        cells: dict[str, dict[str, Any]] = {library: {} for library in versions}
        for (library, name), future in waiting.items():
            cell = future.result()
            cells[library][name] = asdict(cell)
            where = f" at update {cell.update}" if cell.update else ""
            print(f"{library:12} {name:36} {cell.end}{where}{': ' * bool(cell.text)}{cell.text}", flush=True)
    if given.results or not given.work:
        kept = json.loads(file.read_text()) if given.library and file.exists() else {"versions": {}, "cells": {}}
        for library, own in cells.items():
            kept["cells"][library] = kept["cells"].get(library, {}) | own
        file.write_text(json.dumps({"environment": environment(torch.device("cpu")),
                                    "versions": kept["versions"] | versions, "cells": kept["cells"]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
