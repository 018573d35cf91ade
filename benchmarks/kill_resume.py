"""Kill `loopctl run` many times, resume it each time, and compare the result with an uninterrupted run.

    python benchmarks/kill_resume.py                    50 kills of one combination of plugins, then 3 of each plugin
    python benchmarks/kill_resume.py --kills 5 --only amp,swa
    python benchmarks/kill_resume.py --kills 0 --only stateful      two processes, metrics and a loss that keep a state
    python benchmarks/kill_resume.py --device cuda --kills 3        on a GPU, with --deterministic; cudagraph included

The process and its loader workers are killed with SIGKILL at a random moment: usually during training, sometimes while
it starts. At the end the weights, metrics.csv and the whole last checkpoint, with the optimizer state and the states of
the random-number generators, must be bitwise equal. Exits with status 1 where they are not, or where a run takes longer
than --limit. `stateful` is always on the CPU: its two processes would need two GPUs.
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

from loopctl import UsageError, available
from loopctl.checkpoint.finding import find_candidates, find_checkpoint
from loopctl.prepare import find_device
from loopctl.testing import checks

# Real images with noise from the random numbers of Python, NumPy and torch: if the state of one of these generators is
# wrong after a resume, the images differ.
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

def teacher():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
"""
# A run from Python in two processes, with a loss function that has a parameter and a buffer, and two validation metrics
# that keep a state over all evaluations.
STATEFUL = """
import os
import socket
import subprocess
import sys
from functools import partial
import torch
from torch import nn
from torchmetrics import MeanMetric, SumMetric
from loopctl import fit
from loopctl.checkpoint.atomic_files import save_weights
from loopctl.checkpoint.finding import find_candidates

if "RANK" not in os.environ:        # start both processes, in one process group, which is killed as a whole
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = [subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port})
        for rank in range(2)]
    sys.exit(max(abs(rank.wait()) for rank in ranks))

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(()))
    def forward(self, output, target):
        self.calls += torch.is_grad_enabled()
        return nn.functional.cross_entropy(output * self.scale, target)

class Best(MeanMetric):
    best, evaluations = 0.0, 0
    def update(self, output, target):
        super().update((output.argmax(1) == target).float())
    def compute(self):
        self.evaluations += 1
        self.best = max(self.best, super().compute().item())
        return torch.tensor(self.best + self.evaluations)

class Seen(SumMetric):
    evaluations = 0
    def update(self, output, target):
        super().update(len(target))
    def compute(self):
        self.evaluations += 1
        return super().compute() * self.evaluations

torch.set_num_threads(1)
torch.manual_seed(0)
out = sys.argv[1]
data = torch.utils.data.TensorDataset(torch.randn(400, 8), torch.randint(0, 3, (400,)))
train, valid = torch.utils.data.random_split(data, [320, 80])
model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 3))
loss_fn = Scaled()
fit(model, loss_fn, partial(torch.optim.AdamW, lr=0.01), torch.utils.data.DataLoader(train, 8, shuffle=True),
    torch.utils.data.DataLoader(valid, 8), epochs=int(sys.argv[2]), eval_every=7,
    metrics={"best": Best(), "seen": Seen()},
    plugins=["ddp", "csv", "checkpoint:every_steps=4", "cosine", "ema:decay=0.9"], seed=0, out=out,
    resume=out if find_candidates(__import__("pathlib").Path(out)) else None)
if torch.distributed.get_rank() == 0:
    save_weights(nn.ModuleDict({"model": model, "loss_fn": loss_fn}),
                 __import__("pathlib").Path(out, "weights.safetensors"))
"""
RUN = ["--data", "noisy.py:digits", "--model", "cnn:width=8,dropout=0.2", "--workers", "2", "--eval-every", "9",
       "--lr", "0.002"]
FEATURED = ["amp", "accumulate:every=2", "clip:max_norm=1", "warmup:length=1ep", "cosine", "ema:decay=0.99"]
# Options that a plugin requires, or with which it does something in a short run.
EXAMPLES = checks.EXAMPLES | {
    "accumulate": "every=1,3@30st", "activation_checkpointing": "modules=*", "clip": "auto=20", "csv": "every_steps=3",
    "distill": "teacher=noisy.py:teacher", "mixup": "prob=0.7", "norms": "every_steps=3",
    "selective_backprop": "start=0.1", "spike": "deviations=0.5,warmup=5",
    "tensorboard": "every_steps=3,histogram_steps=9",
    "amp": "dtype=float16,growth_interval=7", "cyclic": "base_lr=0.001,max_lr=0.01,cycle_momentum=false",
    "early_stopping": "patience=30,restore_best=true", "freeze": "patterns=0,until=50st",
    "layerwise_lr": "decay=0.5,no_decay=true", "multistep": "milestones=1,2", "nan_guard": "action=skip",
    "onecycle": "max_lr=0.01", "plateau": "patience=0", "swa": "start=1", "trapezoidal": "max_lr=0.01,step_size=25%",
    "warmup": "length=50%",
}
# throughput reports measured times, which differ between any two runs. Others need a library.
LEFT_OUT = {"float8", "lora", "mlflow", "qat", "throughput", "wandb"}
GPU_ONLY = {"cudagraph"}


def command(plugins: list[str], epochs: int, *more: str) -> list[str]:
    if plugins == ["stateful"]:
        return [sys.executable, "stateful.py", more[1], str(epochs)]
    saving = [] if any(name.startswith("checkpoint") for name in plugins) else ["checkpoint:every_steps=4"]
    chosen = [part for plugin in [*plugins, *saving] for part in ("--plugin", plugin)]
    return [sys.executable, "-m", "loopctl", "run", *RUN, "--epochs", str(epochs), *chosen, *more]


def survive(plugins: list[str], epochs: int, kills: int, folder: Path, draw: random.Random, more: list[str],
            limit: float) -> tuple[int, float]:
    """Run once uninterrupted and once with kills; raise AssertionError where the two differ, or a run exceeds `limit`.

    more: further arguments of both runs
    Returns the number of kills, and the time of the killed run over that of the uninterrupted one.
    """
    started = time.monotonic()
    whole = start(command(plugins, epochs, "--out", "whole", *more), folder)
    wait(whole, folder / "whole", [], started + limit)
    training = time.monotonic()
    errors = finish(whole, folder, started + limit)
    assert whole.returncode == 0, errors
    uninterrupted, training, killed = time.monotonic() - started, time.monotonic() - training, 0
    last = step_of(find_candidates(folder / "whole")[0])
    say(f"    uninterrupted: {uninterrupted:.0f} s, {last} steps")
    started = time.monotonic()
    while True:
        resumable = (folder / "killed" / "run.toml").exists()
        options = ["--resume", "killed"] if resumable else ["--out", "killed"]
        before = find_candidates(folder / "killed")[:1]
        begun = time.monotonic()
        process = start(command(plugins, epochs, *options, *more), folder)
        if killed < kills:
            if draw.random() < 0.1:
                time.sleep(draw.uniform(0, 4))           # while it starts
            else:           # at a moment after a new checkpoint, also of the last kill long before the end
                step = last * draw.uniform(killed, killed + 0.8) / (kills + 1)
                wait(process, folder / "killed", before, begun + limit, step)
                time.sleep(draw.uniform(0, 0.05 * training))
            if process.poll() is None:
                kill(process)
                killed += 1
                saved = find_candidates(folder / "killed")[:1]
                say(f"    kill {killed} of {kills}, {time.monotonic() - begun:.0f} s after the start, "
                    + (f"at step {step_of(saved[0])} or later" if saved else "before the first checkpoint"))
                continue
        errors = finish(process, folder, begun + limit)
        if killed and process.returncode == 2 and "this run is finished" in errors:
            break                                        # the last kill came when training was complete
        assert process.returncode == 0, errors
        break
    compare(folder)
    return killed, (time.monotonic() - started) / uninterrupted


def start(arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    # Not to a pipe: a process that writes more than fits would wait for a reader.
    with (folder / "errors.txt").open("w") as errors:
        return subprocess.Popen(arguments, cwd=folder, start_new_session=True, text=True, stdout=subprocess.DEVNULL,
                                stderr=errors)


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a process and its loader workers."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check_time(process: subprocess.Popen[str], deadline: float) -> None:
    """Kill the process and raise AssertionError if it is past its deadline."""
    if time.monotonic() > deadline:
        kill(process)
        raise AssertionError("a run took longer than --limit and was ended")


def finish(process: subprocess.Popen[str], folder: Path, deadline: float) -> str:
    """Wait for the end of a process; return what it wrote to stderr."""
    while process.poll() is None:
        check_time(process, deadline)
        time.sleep(0.05)
    return (folder / "errors.txt").read_text()


def say(text: str) -> None:
    """Print a line at once, so that it shows how far a program is that takes long."""
    print(text, flush=True)


def wait(process: subprocess.Popen[str], run: Path, before: list[Path], deadline: float, step: float = 0) -> None:
    """Wait until the run has a newer checkpoint than `before`, of at least this step, or the process has ended."""
    while process.poll() is None:
        check_time(process, deadline)
        newest = find_candidates(run)[:1]
        if newest and newest != before and step_of(newest[0]) >= step:
            break
        time.sleep(0.01)


def step_of(checkpoint: Path) -> int:
    """The number in the name of a checkpoint, `step-00000042.pt`."""
    return int(checkpoint.stem.removeprefix("step-"))


def compare(folder: Path) -> None:
    """Raise AssertionError where the killed run's results differ from those of the uninterrupted one."""
    for name in ("metrics.csv", "weights.safetensors"):
        one, other = ((folder / run / name).read_bytes() for run in ("whole", "killed"))
        assert one == other, f"{name} differs"
    one, other = (find_checkpoint(folder / run) for run in ("whole", "killed"))
    assert one[0].name == other[0].name
    for key, value in one[1].items():
        assert equal(value, other[1][key]), f"{key} differs in the last checkpoints"


def equal(one: object, other: object) -> bool:
    """Return whether two nested structures have bitwise equal values."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))      # type: ignore[arg-type]
    return one == other or (one != one and other != other)                 # NaN


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of the combination of plugins")
    parser.add_argument("--epochs", type=int, default=60, help="of the combination of plugins")
    parser.add_argument("--each", type=int, default=3, help="kills of each plugin alone")
    parser.add_argument("--only", help="these plugins, separated by commas; none: only the combination of plugins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="as of loopctl run; on any but cpu with --deterministic")
    parser.add_argument("--limit", type=float, default=600, help="seconds that one run may take, or one resumed run")
    args = parser.parse_args()
    try:
        on_cpu = find_device(args.device).type == "cpu"
    except UsageError as error:
        parser.error(str(error))
    more = ["--device", args.device, *["--deterministic"] * (not on_cpu)]
    draw, failed = random.Random(args.seed), 0
    left_out = LEFT_OUT | GPU_ONLY if on_cpu else LEFT_OUT
    only = [name for name in available() if name not in left_out] if args.only is None else args.only.split(",")
    programs = [(FEATURED, args.epochs, args.kills)] * bool(args.kills)
    programs += [([f"{name}:{EXAMPLES[name]}" if name in EXAMPLES else name], 4, args.each)
                 for name in only if name not in ("none", "stateful")]
    programs += [(["stateful"], 100, args.each)] * (args.only is None or "stateful" in only)
    for plugins, epochs, kills in programs:
        with TemporaryDirectory() as folder:
            (Path(folder) / "noisy.py").write_text(DATA)
            (Path(folder) / "stateful.py").write_text(STATEFUL)
            say(f"{', '.join(plugins)}: {kills} kills")
            try:
                killed, slower = survive(plugins, epochs, kills, Path(folder), draw, more, args.limit)
                result = f"equal after {killed} kills, in {slower:.1f} times the uninterrupted run's time"
            except AssertionError as error:
                failed += 1
                result = f"FAILED: {error}"
        say(f"{', '.join(plugins)}: {result}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
