"""Throughput: samples per second, time waiting for data, memory, and MFU."""
import logging
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import nan
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode

from loopctl import Run, hookimpl
from loopctl.model.forward import is_compiled

try:
    import resource
except ImportError:                 # not on Windows
    resource = None                 # type: ignore[assignment]

log = logging.getLogger("loopctl")

# Peak TFLOP/s of dense matrix products in bfloat16 or float16 (V100, T4: float16) with accumulation in float32, from
# NVIDIA's data sheets and white papers. Of figures "with sparsity", half, which is the dense figure.
PEAKS = {
    "V100-PCIE": 112, "V100-SXM2": 125, "V100-SXM3": 125, "T4": 65, "L4": 121, "L40S": 362, "RTX 4090": 165,
    "A10": 125, "A30": 165, "A100-PCIE": 312, "A100 PCIe": 312, "A100-SXM4": 312,
    "H100 PCIe": 756, "H100 NVL": 835, "H100 HBM3": 989, "H200": 989, "GH200": 989,
}


@dataclass(eq=False)
class Throughput:
    """Report samples per second, time waiting for data, memory and FLOP utilization (MFU).

    Four metrics per epoch, without the time of evaluation. They are measured on the host, which synchronizes with the
    device only at the start of an epoch and around an evaluation. After a resume they cover the steps since then.

    samples_per_s: samples, or what batch_weight counts instead, per second of wall-clock time
    data_wait: fraction of that time, 0 to 1, in which the host waits for a batch, or for moving it to the device
    memory_gb: peak memory so far, in 2**30 bytes: on CUDA of torch's tensors in this run, elsewhere of this process
    mfu: model FLOP utilization, arXiv:2204.02311: FLOP/s of the model divided by the peak of the device, if that is
        known. The FLOPs of a sample are counted in the first step, backward pass included, by torch.utils.flop_counter:
        matrix products, convolutions and attention, two per multiply-add, but not nn.LSTM and nn.GRU

    peak: TFLOP/s of the device; if left out, the dense float16 and bfloat16 peak of well-known GPUs, from data sheets
    flops: FLOPs of one sample, forward and backward; counted if left out, except in a compiled model, because a step
        would have to run uncompiled
    unit: what batches contain, the first part of the name samples_per_s
    """

    peak: float | None = None
    flops: float | None = None
    unit: str = "samples"
    observer_only: ClassVar[bool] = True
    capturable: ClassVar[bool] = True
    topic = "logging and reports"

    def __post_init__(self) -> None:
        for name in ("peak", "flops"):
            if (number := getattr(self, name)) is not None and not number > 0:
                raise ValueError(f"{name} is above 0, not {number}")
        self.waited = 0.0                   # set here, because run.plan() iterates groups before an epoch starts

    @hookimpl
    def setup(self, run: Run) -> None:
        self.device_peak, self.devices = self.peak, run.world_size
        if self.device_peak is None and run.device.type == "cuda":
            self.device_peak = peak_of(torch.cuda.get_device_name(run.device))
        names = [f"{self.unit}_per_s", "data_wait", "memory_gb", *["mfu"] * (self.device_peak is not None)]
        run.metrics |= dict.fromkeys(names, nan)

    @hookimpl(wrapper=True)
    def train(self) -> Generator[None, None, None]:
        with ExitStack() as self.counting:          # closed in after_step, or here after an exception
            return (yield)

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.per_sample, self.counter = self.flops or nan, None
        self.count_due = self.device_peak is not None and self.flops is None
        if self.count_due and is_compiled(run):
            self.count_due = False
            log.warning("throughput: mfu is left out, because counting FLOPs would run a step of the compiled model "
                        "uncompiled; pass flops=... of one sample")
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.evaluating, self.waited, self.count = 0.0, 0.0, 0      # seconds, seconds, samples
        self.start = now(run.device)

    @hookimpl(wrapper=True)
    def group_batches(self) -> Generator[None, Iterator[list[Any]], Iterator[list[Any]]]:
        return self.timed((yield))

    def timed(self, groups: Any) -> Any:
        while True:
            start = perf_counter()
            group = next(groups, None)
            self.waited += perf_counter() - start
            if group is None:
                return
            yield group
            self.waited += getattr(group, "seconds", 0.0)       # where micro-batches were read within the step

    @hookimpl
    def before_step(self) -> None:
        if self.count_due:
            self.count_due, self.counter = False, self.counting.enter_context(FlopCounterMode(display=False))

    @hookimpl
    def after_step(self, run: Run) -> None:
        self.count += run.weight * run.world_size               # over all processes
        if self.counter:
            self.counting.close()
            self.per_sample, self.counter = self.counter.get_total_flops() / run.weight, None

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Generator[None, dict[str, Any], dict[str, Any]]:
        start = now(run.device)
        throughput = self.throughput(run.device, start - self.start - self.evaluating)
        metrics = yield
        self.evaluating += now(run.device) - start
        return metrics | throughput

    def throughput(self, device: torch.device, seconds: float) -> dict[str, float]:
        """The metrics of the epoch so far, which took `seconds` without evaluation."""
        speed = float(self.count) / seconds or nan          # no samples: resumed when the epoch had no steps left
        metrics = {f"{self.unit}_per_s": speed, "data_wait": self.waited / seconds,
                   "memory_gb": peak_memory(device) / 2**30}
        if self.device_peak:
            metrics["mfu"] = float(self.per_sample) * speed / (self.device_peak * self.devices * 1e12)
        return metrics


def now(device: torch.device) -> float:
    """The time in seconds, after waiting for `device` to finish its work."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return perf_counter()


def peak_memory(device: torch.device) -> float:
    """The peak memory so far, in bytes; NaN if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of(name: str) -> float | None:
    """Peak TFLOP/s of the GPU that CUDA calls `name`; None if unknown, as for a laptop GPU or a MIG slice."""
    return PEAKS.get(re.sub(r"NVIDIA |Tesla |GeForce |[- ]\d+GB", "", name))
