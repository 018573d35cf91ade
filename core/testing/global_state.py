"""Read and restore the global state of the process: torch's settings, signal handlers, random number generators."""
from __future__ import annotations

import io
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch

from loopctl.rng import rng_state, set_rng_state

# By the name used in messages: a function that reads the setting, and one that sets it.
SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "anomaly mode": (torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (lambda: str(torch.get_default_device()),
                       lambda device: torch.set_default_device(None if device == "cpu" else device)),
    "debug mode of deterministic algorithms": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "precision of float32 matrix products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "working directory": (os.getcwd, os.chdir),
}


def cudnn(name: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: getattr(torch.backends.cudnn, name), lambda value: setattr(torch.backends.cudnn, name, value)


def autocast(device: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: torch.is_autocast_enabled(device), lambda value: torch.set_autocast_enabled(device, value)


def handler(number: int) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    return lambda: signal.getsignal(number), lambda value: signal.signal(number, value)


def nesting() -> int:
    """Return the number of open autocast contexts."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def set_nesting(depth: int) -> None:
    """Leave autocast contexts until `depth` are open."""
    while nesting() > depth:
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()            # as autocast does when its outermost context ends


for name in ("deterministic", "benchmark"):
    SWITCHES[f"cudnn.{name}"] = cudnn(name)
for name in ("cpu", "cuda", "mps"):
    SWITCHES[f"autocast for {name}"] = autocast(name)
SWITCHES["number of open autocast contexts"] = nesting, set_nesting
if threading.current_thread() is threading.main_thread():       # only the main thread may set handlers
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if number := getattr(signal, name, None):
            SWITCHES[f"handler of {name}"] = handler(number)


def read_switches() -> dict[str, Any]:
    """Return the value of each setting, by name."""
    return {name: read() for name, (read, _) in SWITCHES.items()}


def restore_switches(before: dict[str, Any]) -> None:
    """Set the settings whose values differ from `before` back to those."""
    for name, (read, write) in SWITCHES.items():
        if read() != before[name]:
            write(before[name])


@contextmanager
def isolated() -> Iterator[io.StringIO]:
    """Restore settings and random-number-generator states at the end of the block, and capture what it prints."""
    before, random = read_switches(), rng_state()
    try:
        with redirect_stdout(io.StringIO()) as printed:
            yield printed
    finally:
        restore_switches(before)
        set_rng_state(random)
