"""Pictures per second from a folder of JPEGs as `loopctl run` reads them, alone and with a network to train."""
from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import loops
import torch
from gpu_parts import RATE, Work, attempt, emit
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.io import decode_jpeg, encode_jpeg, read_file

from loopctl import fit, hookimpl
from loopctl.plugins.throughput import Throughput

SPEEDUPS, SPEEDUPS_TINY = ("amp:dtype=float16", "channels_last", "prefetch"), ("amp",)    # float16 is slow on a CPU
ALONE, TRAINED, WAITING = "data alone, images/s", RATE, "waiting for data, of the time"


def measure(work: Work) -> None:
    """Emit a table of ways to read the same folder, the first of which reads nothing."""
    cores = len(os.sched_getaffinity(0))
    workers = 1 if work.tiny else cores
    batch, files, copies = (4, 4, 20) if work.tiny else (128, 256, 40)
    plugins = SPEEDUPS_TINY if work.tiny else SPEEDUPS
    title = (f"ResNet-50 from a folder of 500 x 375 JPEGs, batches of {batch}, `--workers {workers}`, "
             f"loopctl {' '.join(plugins)}")
    with TemporaryDirectory(prefix="loopctl-jpegs-") as temporary:
        root = Path(temporary)
        size = make_folder(root, files, copies)
        print(f"{files} files of {size / files / 1000:.0f} kB, each {copies} times under another name", flush=True)
        ways = {"`imagefolder`": "imagefolder", "`imagefolder:fast=true`": "imagefolder:fast=true",
                "`imagefolder:cache=DIR`": f"imagefolder:cache={root / 'cache'}"}
        if work.tiny:                           # smaller crops train faster
            ways = {name: f"{data}{',' if ':' in data else ':'}size=32" for name, data in ways.items()}
        window = 0.02 if work.tiny else min(2.0, work.left / 25)
        in_memory = attempt(lambda: loops.rate(lambda *run: loops.ours(*run, *plugins), loops.resnet50,
                                               work.pool(224, 1000), work.device, 2 if work.tiny else 20, window))
        emit(title, {"data": "tensors on the device", TRAINED: in_memory, WAITING: 0.0})
        for column, reads in ((TRAINED, trained), (ALONE, alone)):
            for name, data in ways.items():
                options = ["--data", data, "--data-root", str(root), "--batch-size", str(batch), "--workers",
                           str(workers), "--device", work.device]
                options += [word for plugin in plugins for word in ("--plugin", plugin)]
                emit(title, {"data": name} | timed(work, column, partial(reads, options, batch, workers, window)))
        decoders(work, root, window)


def timed(work: Work, column: str, measure: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """What `measure` returns, or in `column` why it does not."""
    found = attempt(measure) if work.left > 0 else "not measured: no time was left"
    return {column: found} if isinstance(found, str) else found


def make_folder(root: Path, files: int, copies: int) -> int:
    """Write `files` JPEGs of two classes to `root`, each under `copies` names. Return their bytes."""
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)
    total = 0
    for number in range(files):
        encoded = encode_jpeg(picture(generator), quality=95)
        total += encoded.numel()
        folder = root / "train" / "ab"[number % 2]
        first = folder / f"{number:04}-0.jpg"
        first.write_bytes(encoded.numpy().tobytes())
        for copy in range(1, copies):
            os.link(first, folder / f"{number:04}-{copy}.jpg")
        if number < 2:
            os.link(first, root / "val" / "ab"[number] / "0.jpg")
    return total


def picture(generator: torch.Generator) -> Tensor:
    """A picture of 500 x 375 whose JPEG is as large as one of ImageNet: large and small shapes, and noise."""
    def shapes(height: int, width: int) -> Tensor:
        return interpolate(torch.rand(1, 3, height, width, generator=generator), (375, 500), mode="bilinear")[0]

    noise = torch.randn(3, 375, 500, generator=generator)
    return (180 * shapes(12, 16) + 50 * shapes(94, 125) + 8 * noise).clamp(0, 255).byte()


def arguments(options: list[str]) -> dict[str, Any]:
    """The arguments of `fit` to which `loopctl run` turns these options for ResNet-50."""
    from loopctl import cli
    from loopctl.cli.arguments import build_arguments
    from loopctl.cli.specs import DEFAULT_PLUGINS

    command = cli.main.commands["run"]
    network = ["--model", "resnet50", "--optimizer", "sgd:momentum=0.9", "--lr", "0.1"]
    without = [word for name in DEFAULT_PLUGINS for word in ("--without", name)]
    return build_arguments(command.make_context("run", [*options, *network, *without]).params)[0]


def alone(options: list[str], batch: int, workers: int, window: float) -> dict[str, float]:
    """The rate at which the batches of `loopctl run` come when nobody uses them."""
    train = arguments(options)["train"]
    started = in_advance(train, workers)
    began = done = 0.0
    read = 0
    for number, _ in enumerate(train):
        done = time.perf_counter()
        if number == started:
            began = done
        elif number > started:
            read += 1
            if done - began > window:
                break
    return {ALONE: read * batch / (done - began)}


def in_advance(loader: Any, workers: int) -> int:
    """How many batches to leave out: those that workers read in advance come faster than they are read."""
    return min(2 * workers, len(loader) // 3)


@dataclass(eq=False)
class Clock(Throughput):
    """The plugin throughput for steps after a warm-up; raises Enough when they have taken `window` seconds."""

    warmup: int = 0
    window: float = 0.0
    cells: dict[str, float] | None = None

    @hookimpl
    def after_step(self, run: Any) -> None:
        super().after_step(run)
        if run.attempts == self.warmup:
            self.epoch_start(run)
        elif run.attempts > self.warmup and (run.attempts == len(run.train)
                                             or time.perf_counter() - self.start > self.window):
            found = self.throughput(run.device, loops.now() - self.start)
            self.cells = {TRAINED: found["samples_per_s"], WAITING: found["data_wait"]}
            raise loops.Enough


def trained(options: list[str], batch: int, workers: int, window: float) -> dict[str, float]:
    """The rate of `loopctl run`, and the part of the time in which it waits for batches."""
    settings = arguments(options)
    clock = Clock(warmup=in_advance(settings["train"], workers), window=window)
    with suppress(loops.Enough):
        fit(**settings | {"plugins": [*settings["plugins"], clock], "valid": None})
    assert clock.cells, "the folder is read before the clock has begun"
    return clock.cells


def decoders(work: Work, root: Path, window: float) -> None:
    """Emit how fast torchvision decodes the files whole, on a core and on the GPU, without cropping."""
    files = [read_file(str(path)) for path in sorted((root / "train").glob("*/*-0.jpg"))][:128]
    title = f"Decoding 500 x 375 JPEGs whole, lists of {len(files)}"
    for name, device in (("`decode_jpeg` on one core", "cpu"), ("`decode_jpeg(..., device=\"cuda\")`, nvjpeg", "cuda")):
        emit(title, {"decoder": name} | timed(work, RATE, partial(decoded, files, device, window)))


def decoded(files: list[Tensor], device: str, window: float) -> dict[str, float]:
    """Pictures per second of torchvision's decoder."""
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("there is no GPU")       # torch would say so in forty lines
    decode_jpeg(files, device=device)
    began, done = loops.now(), 0
    while not done or time.perf_counter() - began < window:
        decode_jpeg(files, device=device)
        done += len(files)
    return {RATE: done / (loops.now() - began)}
