"""Kill `loopctl run` again and again, go on each time, and compare with a run that nobody disturbed.

    python benchmarks/kill_resume.py                    50 kills of one composition, then 3 of each plugin
    python benchmarks/kill_resume.py --kills 5 --only amp,swa

The killed process is given no warning (SIGKILL, its loader's workers too), at a random moment: most of the time while
it trains, sometimes while it starts. In the end the weights, metrics.csv and everything in the last checkpoint,
optimizer state and random numbers included, must be equal to the last bit. Exits with 1 where they are not.
"""
from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from loopctl import available
from loopctl.checkpoint.state import find_candidates, find_checkpoint

# Real images whose every reading draws random numbers of Python, NumPy and torch: wherever one of them stands wrongly
# after a resume, the pictures differ.
DATA = """
import random
import numpy as np
import torch
from torch.utils.data import Dataset
from loopctl.cli import data

class Noisy(Dataset):
    def __init__(self, images):
        self.images = images
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        image, target = self.images[index]
        return image + 0.1 * torch.randn_like(image) + 0.1 * random.random() + 0.1 * np.random.rand(), target

def digits():
    plain = data.digits()
    return data.Data(Noisy(plain.train), plain.valid, plain.classes, plain.shape)
"""
RUN = ["--data", "noisy.py:digits", "--model", "cnn:width=8,dropout=0.2", "--workers", "2", "--eval-every", "9",
       "--lr", "0.002"]
FEATURED = ["amp", "accumulate:every=2", "clip:max_norm=1", "warmup:length=1ep", "cosine", "ema:decay=0.99"]
# What a plugin needs to be told, or does something with in a short run; the rest act by themselves.
EXAMPLES = {
    "amp": "dtype=float16,growth_interval=7", "compile": "backend=eager", "cosine_restarts": "t_0=1",
    "cyclic": "base_lr=0.001,max_lr=0.01,cycle_momentum=false",
    "early_stopping": "patience=30,restore_best=true", "exponential": "gamma=0.9", "freeze": "patterns=0,until=50st",
    "lambda": "lr_lambda=math:exp", "layerwise_lr": "decay=0.5,no_decay=true", "multiplicative": "lr_lambda=math:cos",
    "multistep": "milestones=1,2", "nan_guard": "action=skip", "onecycle": "max_lr=0.01", "plateau": "patience=0",
    "step": "step_size=1", "swa": "start=1", "torch_scheduler": "cls=torch.optim.lr_scheduler:ExponentialLR,gamma=0.9",
    "trapezoidal": "max_lr=0.01,step_size=25%", "warmup": "length=50%",
}
# One needs a GPU; what the other measures is time, which is never the same.
LEFT_OUT = {"cudagraph", "throughput"}


def command(plugins: list[str], epochs: int, *more: str) -> list[str]:
    saving = [] if any(name.startswith("checkpoint") for name in plugins) else ["checkpoint:every_steps=4"]
    chosen = [part for plugin in [*plugins, *saving] for part in ("--plugin", plugin)]
    return [sys.executable, "-m", "loopctl", "run", *RUN, "--epochs", str(epochs), *chosen, *more]


def survive(plugins: list[str], epochs: int, kills: int, place: Path, draw: random.Random) -> tuple[int, float]:
    """Run undisturbed and killed; raise AssertionError where they differ. Returns the kills and the slowdown."""
    began = time.monotonic()
    whole = start(command(plugins, epochs, "--out", "whole"), place)
    wait(whole, place / "whole", [])
    training = time.monotonic()
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    undisturbed, training, killed = time.monotonic() - began, time.monotonic() - training, 0
    began = time.monotonic()
    while True:
        begun = (place / "killed" / "run.toml").exists()
        how = ["--resume", "killed"] if begun else ["--out", "killed"]
        before = find_candidates(place / "killed")[:1]
        process = start(command(plugins, epochs, *how), place)
        if killed < kills:
            if draw.random() < 0.1:
                time.sleep(draw.uniform(0, 4))           # while it starts
            else:
                wait(process, place / "killed", before)
                time.sleep(draw.uniform(0, 0.8 * training / kills))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                killed += 1
                continue
        _, errors = process.communicate()
        if killed and process.returncode == 2 and "this run is finished" in errors:
            break                                        # it was killed after its last line of work
        assert process.returncode == 0, errors
        break
    compare(place)
    return killed, (time.monotonic() - began) / undisturbed


def start(words: list[str], place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(words, cwd=place, start_new_session=True, text=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE)


def wait(process: subprocess.Popen[str], run: Path, before: list[Path]) -> None:
    """Wait until the run has a checkpoint that it did not have before, or the process has ended."""
    while process.poll() is None and find_candidates(run)[:1] == before:
        time.sleep(0.01)


def compare(place: Path) -> None:
    for name in ("metrics.csv", "weights.safetensors"):
        one, other = ((place / run / name).read_bytes() for run in ("whole", "killed"))
        assert one == other, f"{name} differs"
    one, other = (find_checkpoint(place / run) for run in ("whole", "killed"))
    assert one[0].name == other[0].name
    for key, value in one[1].items():
        assert equal(value, other[1][key]), f"{key} differs in the last checkpoints"


def equal(one: object, other: object) -> bool:
    """Whether two nestings have the same values, to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))      # type: ignore[arg-type]
    return one == other or (one != one and other != other)                 # NaN


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of the composition")
    parser.add_argument("--epochs", type=int, default=60, help="of the composition")
    parser.add_argument("--each", type=int, default=3, help="kills of each plugin alone")
    parser.add_argument("--only", help="these plugins, separated by commas; none: the composition alone")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, failed = random.Random(asked.seed), 0
    only = [name for name in available() if name not in LEFT_OUT] if asked.only is None else asked.only.split(",")
    programs = [(FEATURED, asked.epochs, asked.kills)] * bool(asked.kills)
    programs += [([f"{name}:{EXAMPLES[name]}" if name in EXAMPLES else name], 4, asked.each)
                 for name in only if name != "none"]
    for plugins, epochs, kills in programs:
        with TemporaryDirectory() as folder:
            (Path(folder) / "noisy.py").write_text(DATA)
            try:
                killed, slower = survive(plugins, epochs, kills, Path(folder), draw)
                said = f"equal after {killed} kills, in {slower:.1f} times the undisturbed run's time"
            except AssertionError as error:
                failed += 1
                said = f"FAILED: {error}"
        print(f"{', '.join(plugins)}: {said}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
