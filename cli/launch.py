"""`loopctl run --devices 0,1`: start one process per device, with torch.distributed's elastic launcher."""
from __future__ import annotations

import logging
import os
import signal
import sys
import time
import uuid
from threading import Thread
from typing import Any

import click
import torch

from loopctl.distributed.process_group import launched_processes, torchrun_serves_store
from loopctl.errors import UsageError


def device_numbers(devices: str | None) -> list[int]:
    """The numbers in the value of --devices; an empty list if it was not given."""
    return [int(number) for number in devices.split(",")] if devices else []


def check_devices(devices: str | None, device: str) -> None:
    """Raise UsageError for a device that does not exist, or for a number of them other than torchrun's processes."""
    numbers = device_numbers(devices)
    if device not in ("auto", "cuda", "cpu") and numbers:
        raise UsageError(f"--devices {devices} with --device {device}: pass --device cuda or cpu, or leave out one of "
                         "the two")
    available = torch.cuda.device_count()
    missing = [number for number in numbers if number >= available]
    if (missing and device == "cuda") or (available and missing and device == "auto"):
        has = f"{available} CUDA device{'s' * (available != 1)}" if available else "no CUDA device"
        raise UsageError(f"--devices {devices}: there is no device {missing[0]}; this machine has {has}")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", launched_processes()))
    if launched_processes() > 1 and numbers and len(numbers) != local:
        raise UsageError(f"--devices {devices}: torchrun has started {local} processes on this machine; "
                         "leave out --devices")


def launch(devices: list[int], arguments: list[str]) -> int:
    """Run `loopctl` with these arguments in a process per device. Return the exit status of the first to fail, or 0.

    SIGTERM, SIGINT and SIGUSR1 are passed on to the processes, which have 30 seconds to save and end.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    def end_processes(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)           # the processes are being ended already
        raise SignalException(f"received signal {number}", signal.Signals(number))

    if hasattr(signal, "SIGUSR1"):                      # torch handles the others in the same way
        signal.signal(signal.SIGUSR1, end_processes)
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)              # processes print their own errors
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        chosen = [visible[number] if visible[0] else str(number) for number in devices]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(chosen)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices))))
    config = LaunchConfig(1, 1, len(devices), run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          local_addr="localhost", max_restarts=0, monitor_interval=0.1)
    try:
        # -m would add the working directory to the processes' sys.path. -P prevents it, unless it is on sys.path here.
        safe_path = [] if {"", os.getcwd()} & set(sys.path) else ["-P"]
        elastic_launch(config, sys.executable)(*safe_path, "-m", "loopctl", *arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        name = signal.Signals(-first.exitcode).name
        click.echo(f"error: process {first.local_rank} was ended by {name}; the other processes were stopped", err=True)
        return 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def end_with_launcher() -> None:
    """Make this process end when torchrun, or the launcher of --devices, that has started it is gone.

    Without it, nothing would end the processes of a run together. They get SIGTERM, at which `checkpoint` saves, and 30
    seconds later SIGKILL. A thread watches the parent, because PR_SET_PDEATHSIG is specific to Linux and cannot do the
    second. Before the thread runs, joining the process group fails if the launcher is gone.
    """
    if not torchrun_serves_store():
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        os.kill(os.getpid(), signal.SIGKILL)

    Thread(target=watch, daemon=True).start()
