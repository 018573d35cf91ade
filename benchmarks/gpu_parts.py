"""What benchmarks/gpu.py measures, a function per part. Each prints what it finds at once, a record of JSON a line.

A part measures in rounds until its time is used: each round has every loop once, so that what else the machine does
slows all of them. The clock runs from the batch after the warm-up, compilation and capture included in that.
"""
from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import loops
import torch
import torchvision
from gpu_report import RATE
from torch import nn

PUBLISHED = 2470        # images/s: ResNet-50 training in mixed precision on one A100 80 GB, as NVIDIA published it
FUSED = partial(loops.SGD, fused=True)
Result = TypeVar("Result")
Loops = dict[str, Callable[[nn.Module, loops.Batches, str], None]]


def amp(*plugins: str, optimizer: Callable[..., Any] = loops.SGD) -> Callable[..., None]:
    return lambda *run: loops.ours(*run, "amp", *plugins, optimizer=optimizer)


BOTH: Loops = {"by hand": loops.by_hand, "loopctl amp": amp()}
OTHERS: Loops = {"lightning": loops.lightning, "accelerate": loops.accelerate, "transformers": loops.transformers}
RESNET50: Loops = {
    **BOTH,
    "by hand, float16": partial(loops.by_hand, dtype=torch.float16),
    "loopctl amp:dtype=float16": lambda *run: loops.ours(*run, "amp:dtype=float16"),
    "loopctl amp channels_last": amp("channels_last"),
    "loopctl amp channels_last prefetch, fused SGD": amp("channels_last", "prefetch", optimizer=FUSED),
}
SMALL: Loops = {
    **BOTH,
    "loopctl amp cudagraph, fused SGD": amp("cudagraph", optimizer=FUSED),
    **OTHERS,
    "loopctl amp compile cudagraph, fused SGD": amp("compile", "cudagraph", optimizer=FUSED),
}


@dataclass
class Work:
    """Where a part measures, and until when."""

    tiny: bool
    device: str
    until: float            # of time.perf_counter()

    @property
    def left(self) -> float:
        return self.until - time.perf_counter()

    def pool(self, size: int, classes: int, pinned: bool = False) -> list[Any]:
        return loops.pool(2 if self.tiny else 128, 32 if self.tiny else size, classes, self.device, pinned)


def machine() -> str:
    """What the figures are made on."""
    device = "CPU"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
        with suppress(OSError, subprocess.SubprocessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
            driver = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout
            device += f", driver {driver.strip()}"
    return (f"{device}, {len(os.sched_getaffinity(0))} cores; torch {torch.__version__}, torchvision "
            f"{torchvision.__version__}, Python {platform.python_version()}.")


def emit(title: str, values: dict[str, Any]) -> None:
    """Print a record: cells of the row that the first of `values` names, in the table `title`.

    A cell that is emitted more than once is reported as the median.
    """
    print(json.dumps({"table": title, "cells": values}), flush=True)


def titled(what: str, batches: list[Any]) -> str:
    return f"{what}, batches of {' x '.join(map(str, batches[0][0].shape))}"


def compare(work: Work, title: str, make: Callable[[], nn.Module], chosen: Loops, batches: list[Any],
            seconds: float) -> None:
    """Emit each loop's images per second, in as many rounds as there is time for, at least one."""
    until = time.perf_counter() + seconds
    warmup, window = (2, 0.02) if work.tiny else (20, min(2.0, seconds / len(chosen) / 4))
    running, lasted = dict(chosen), 0.0
    for number in range(1 if work.tiny else 9):
        began = time.perf_counter()
        if number and began + lasted > until:
            break
        for name, loop in chosen.items():
            if name not in running:
                continue
            measured: float | str
            if not number and time.perf_counter() > until:
                measured = "not measured: no time was left"
            elif work.tiny and ("compile" in name or "float16" in name):
                measured = "not measured: it takes too long on a CPU"
            else:
                measured = attempt(partial(loops.rate, loop, make, batches, work.device, warmup, window))
            emit(title, {"loop": name, RATE: measured})
            if isinstance(measured, str):
                del running[name]
        lasted = time.perf_counter() - began


def attempt(measure: Callable[[], Result]) -> Result | str:
    """What `measure` returns, or why it does not. Leaves no memory of the device in use for the next one."""
    try:
        return measure()
    except ModuleNotFoundError as error:
        return f"not installed: {error.name}"
    except Exception as error:                  # a line in the table, and the others go on
        lines = str(error).strip().splitlines() or [""]
        return f"not measured: {type(error).__name__}: {lines[0][:200]}"
    finally:
        if "torch._dynamo" in sys.modules:      # else every round compiles once more for the same code, up to a limit
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def resnet50(work: Work) -> None:
    """By hand and loopctl, on pictures of 224 x 224 from pinned memory."""
    batches = work.pool(224, 1000, pinned=True)
    title = titled(f"ResNet-50 (published: {PUBLISHED:,} images/s on one A100)", batches)
    compare(work, title, loops.resnet50, RESNET50, batches, work.left)


def others(work: Work) -> None:
    """The same work in other libraries."""
    batches = work.pool(224, 1000, pinned=True)
    title = titled("ResNet-50 in other libraries", batches)
    compare(work, title, loops.resnet50, {**BOTH, **OTHERS}, batches, work.left)


def small(work: Work) -> None:
    """Small networks on pictures of 32 x 32 that are on the device."""
    batches = work.pool(32, 10)
    compare(work, titled("ResNet-18", batches), loops.resnet18, SMALL, batches, work.left / 2)
    compare(work, titled("Vision transformer", batches), loops.vit, SMALL, batches, work.left)


def limit(work: Work) -> None:
    """The best composition that tune finds for each network, with its batches on the device."""
    for name, make, size, classes, share in (("ResNet-50", loops.resnet50, 224, 1000, 0.4),
                                             ("ResNet-18", loops.resnet18, 32, 10, 0.5),
                                             ("a vision transformer", loops.vit, 32, 10, 1.0)):
        batches = work.pool(size, classes)
        tuned(work, titled(f"The limit of {name}", batches), make, batches, share * work.left)


def tuned(work: Work, title: str, make: Callable[[], nn.Module], batches: list[Any], seconds: float) -> None:
    """Emit tune's own table, and how the composition that it names compares with the loop by hand."""
    until = time.perf_counter() + seconds

    def find() -> Any:
        from loopctl import tune
        return tune(make(), nn.CrossEntropyLoss(), loops.SGD, batches * 50, device=work.device, seconds=0.6 * seconds)

    found = attempt(find)
    if isinstance(found, str):
        return emit(title, {"loop": "tune", RATE: found})
    print(json.dumps({"table": title, "text": str(found)}), flush=True)

    def best(*run: Any) -> None:
        from loopctl import torch_settings
        with torch_settings(**found.settings):
            loops.ours(*run, *found.plugins, optimizer=found.optimizer)

    from loopctl.tuning.choices import described
    name = f"loopctl {described(found.chosen)}"
    chosen = {"by hand": loops.by_hand, f"{name}, as tune says": best}
    compare(work, title, make, chosen, batches, until - time.perf_counter())


def jpegs(work: Work) -> None:
    """From a folder of JPEGs."""
    import jpegs

    jpegs.measure(work)


PARTS = {part.__name__: part for part in (resnet50, small, others, limit, jpegs)}
