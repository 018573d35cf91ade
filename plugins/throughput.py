"""How fast a run is, and what holds it up."""
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

try:
    import resource
except ImportError:                 # not on Windows
    resource = None                 # type: ignore[assignment]

log = logging.getLogger("loopctl")

# TFLOP/s of matrix products of bfloat16 or float16 (V100, T4: float16) summed in float32, from NVIDIA's data sheets and
# white papers; where these say "with sparsity", half of it, which is the dense figure.
PEAKS = {
    "V100-PCIE": 112, "V100-SXM2": 125, "V100-SXM3": 125, "T4": 65, "L4": 121, "L40S": 362, "RTX 4090": 165,
    "A10": 125, "A30": 165, "A100-PCIE": 312, "A100 PCIe": 312, "A100-SXM4": 312,
    "H100 PCIe": 756, "H100 NVL": 835, "H100 HBM3": 989, "H200": 989, "GH200": 989,
}


@dataclass(eq=False)
class Throughput:
    """Report samples per second, the wait for data, memory, and the share of the device's peak.

    Four metrics per epoch, without the time that evaluation takes. They are measured on the host, which waits for the
    device only where an epoch begins and around an evaluation. After resuming they are of what was trained since then.

    samples_per_s: samples, or what batch_weight counts in their place, over the wall-clock time
    data_wait: the part of that time, 0 to 1, in which the host waits for a batch, and for moving it to the device
    memory_gb: the most memory so far, in 2**30 bytes: on CUDA of torch's tensors in this run, elsewhere of this process
    mfu: model FLOP utilization, arXiv:2204.02311, where the peak is known: FLOP/s over the peak. The FLOPs of a sample
        are those of the first step, backward pass and all, as torch.utils.flop_counter counts the step: matrix
        products, convolutions and attention, two per multiply-add, but not nn.LSTM and its like

    peak: TFLOP/s of the device; if left out, what the data sheets of well-known GPUs say of dense float16 and bfloat16
    flops: of one sample, forward and backward; counted if left out, but not in a compiled model, of which a step would
        run uncompiled for it
    unit: what is counted as speed, the first part of the name samples_per_s
    """

    peak: float | None = None
    flops: float | None = None
    unit: str = "samples"
    observer_only: ClassVar[bool] = True
    capturable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("peak", "flops"):
            if (number := getattr(self, name)) is not None and not number > 0:
                raise ValueError(f"{name} is above 0, not {number}")
        self.waited = 0.0                   # groups are also drawn to count an epoch's steps, before it begins

    @hookimpl
    def setup(self, run: Run) -> None:
        self.top, self.devices = self.peak, run.world_size
        if self.top is None and run.device.type == "cuda":
            self.top = peak_of(torch.cuda.get_device_name(run.device))
        names = [f"{self.unit}_per_s", "data_wait", "memory_gb", *["mfu"] * (self.top is not None)]
        run.metrics |= dict.fromkeys(names, nan)

    @hookimpl(wrapper=True)
    def train(self) -> Generator[None, None, None]:
        with ExitStack() as self.counting:          # ends in after_step, or here after an exception
            return (yield)

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.per_sample, self.counter = self.flops or nan, None
        self.due = self.top is not None and self.flops is None
        if self.due and compiled(run):
            self.due = False
            log.warning("throughput: mfu is left out, as a count would run a step of the compiled model uncompiled; "
                        "pass flops=... of one sample")
        if run.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.device)

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.away, self.waited, self.count, self.since = 0.0, 0.0, 0, now(run.device)

    @hookimpl(wrapper=True)
    def group_batches(self) -> Generator[None, Iterator[list[Any]], Iterator[list[Any]]]:
        return self.timed((yield))

    def timed(self, groups: Any) -> Any:
        while True:
            since = perf_counter()
            group = next(groups, None)
            self.waited += perf_counter() - since
            if group is None:
                return
            yield group

    @hookimpl
    def before_step(self) -> None:
        if self.due:
            self.due, self.counter = False, self.counting.enter_context(FlopCounterMode(display=False))

    @hookimpl
    def after_step(self, run: Run) -> None:
        self.count += run.weight * run.world_size               # over all processes
        if self.counter:
            self.counting.close()
            self.per_sample, self.counter = self.counter.get_total_flops() / run.weight, None

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Generator[None, dict[str, Any], dict[str, Any]]:
        began = now(run.device)
        measured = self.measured(run.device, began - self.since - self.away)
        metrics = yield
        self.away += now(run.device) - began
        return metrics | measured

    def measured(self, device: torch.device, seconds: float) -> dict[str, float]:
        """The metrics of the epoch so far, which took `seconds`."""
        speed = float(self.count) / seconds or nan          # 0 where a run goes on with nothing left of its epoch
        found = {f"{self.unit}_per_s": speed, "data_wait": self.waited / seconds, "memory_gb": memory(device) / 2**30}
        return found | ({"mfu": float(self.per_sample) * speed / (self.top * self.devices * 1e12)} if self.top else {})


def now(device: torch.device) -> float:
    """The time in seconds when `device` has done what it was given."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return perf_counter()


def memory(device: torch.device) -> float:
    """The most memory so far, in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of(name: str) -> float | None:
    """TFLOP/s of the GPU that CUDA calls `name`. Others than these, a slice of one or a laptop's, are not known."""
    return PEAKS.get(re.sub(r"NVIDIA |Tesla |GeForce |[- ]\d+GB", "", name))


def compiled(run: Any) -> bool:
    """Whether torch.compile has been at the model, or at a part of it."""
    marks = ("_orig_mod", "_torchdynamo_orig_callable")
    return any(getattr(part, "_compiled_call_impl", None) or any(hasattr(part, mark) for mark in marks)
               for part in (run.network, *run.model.modules()))
