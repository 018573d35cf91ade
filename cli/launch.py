"""`loopctl run --devices 0,1`: the processes, one per device, started by torch's own launcher."""
from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

import click
import torch

from loopctl.distributed.process_group import launched_processes
from loopctl.errors import UsageError


def wanted(devices: str | None) -> list[int]:
    """The devices that are asked for; none where nothing is."""
    return [int(one) for one in devices.split(",")] if devices else []


def check(devices: str | None, device: str) -> None:
    """Refuse, with UsageError, devices that are not here, or another number of them than torchrun has processes."""
    numbers = wanted(devices)
    if device not in ("auto", "cuda", "cpu") and numbers:
        raise UsageError(f"--devices {devices} with --device {device}: pass --device cuda or cpu, or leave out one of "
                         "the two")
    here = torch.cuda.device_count()
    missing = [number for number in numbers if number >= here]
    if (missing and device == "cuda") or (here and missing and device == "auto"):
        has = f"{here} CUDA device{'s' * (here != 1)}" if here else "no CUDA device"
        raise UsageError(f"--devices {devices}: there is no device {missing[0]}; this machine has {has}")
    local = int(os.environ.get("LOCAL_WORLD_SIZE", launched_processes()))
    if launched_processes() > 1 and numbers and len(numbers) != local:
        raise UsageError(f"--devices {devices}: torchrun has started {local} processes here; leave out --devices")


def launch(devices: list[int], arguments: list[str]) -> int:
    """Run `loopctl` with these arguments once per device. Returns the exit status, that of the first that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)                  # what fails says so itself
    if torch.cuda.is_available():
        mine = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(mine[number] if mine[0] else str(number) for number in devices)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(devices))))
    config = LaunchConfig(1, 1, len(devices), run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          local_addr="localhost", max_restarts=0, monitor_interval=0.1)
    try:
        elastic_launch(config, sys.executable)("-m", "loopctl", *arguments)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        ended = signal.Signals(-first.exitcode).name
        click.echo(f"error: process {first.local_rank} was ended by {ended}, and the others with it", err=True)
        return 128 - first.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0
