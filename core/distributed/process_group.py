"""The process group of a run, from torch.distributed: join and leave it, rank and world size, collectives, agreement.

torchrun or `loopctl run --devices` starts the processes, and a plugin such as ddp makes the run join their process
group. In a run of one process, each collective here returns its input at once.
"""
from __future__ import annotations

import atexit
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from threading import Thread
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from loopctl.errors import UsageError, names

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loopctl.run import Run

T = TypeVar("T")

# By type of device. Python objects are exchanged with gloo, between hosts, which does not synchronize the GPU.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def launched_processes() -> int:
    """Return how many processes torchrun has started for this run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def restart_count() -> int:
    """Return how often torchrun has restarted the processes after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if "RANK" in os.environ else 0


def rank() -> int:
    """Return the rank of this process. It is known from the environment before the process group exists."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched_processes() > 1 else 0


def is_only_planned(run: Run) -> bool:
    """Return whether the run is only explained for several processes, without a process group of that size."""
    return run.world_size > 1 and not (dist.is_initialized() and dist.get_world_size() == run.world_size)


def is_single_process(run: Run) -> bool:
    """Return whether there are no other processes: the world size is 1, or the run is only planned, not trained."""
    return run.world_size == 1 or is_only_planned(run)


def join_process_group(run: Run, even_single: bool = False, timeout: float = 1800) -> bool:
    """Create the process group where there is none yet, and set `run.rank` and `run.world_size`.

    A run whose `world_size` is set already is only planned: no group is created for it.

    even_single: create a process group even for a single process
    timeout: seconds after which a process that waits for others in a collective gets an error

    Returns whether this call created the process group. Raises UsageError where two processes use the same device, or
    where the type of device is not supported.
    """
    create = not dist.is_initialized() and run.world_size == 1 and (launched_processes() > 1 or even_single)
    if create:
        kind = run.device.type
        if kind not in BACKENDS:
            raise UsageError(f"several processes train on cpu or cuda, not on {kind}; pass device cpu")
        if kind == "cuda":
            torch.cuda.set_device(run.device)
        settings: dict[str, Any] = {}
        if launched_processes() == 1:
            settings = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        elif store := torchrun_store():     # kept over restarts; the prefix hides the addresses of ended processes
            settings = {"store": dist.PrefixStore(f"attempt {restart_count()}", store), "rank": rank(),
                        "world_size": launched_processes()}
        # When imported, this module keeps a reference to the current process group forever, so import it before there
        # is one: `leave_process_group` needs the last reference.
        import_module("torch.distributed.nn.functional")
        dist.init_process_group(BACKENDS[kind], timeout=timedelta(seconds=timeout), **settings)
        atexit.register(leave_process_group)
    if dist.is_initialized() and run.world_size == 1:
        run.rank, run.world_size = dist.get_rank(), dist.get_world_size()
    if not is_single_process(run):
        devices = all_gather(run, (socket.gethostname(), str(run.device)))       # on a CPU too: others may have GPUs
        same = [str(number) for number, device in enumerate(devices) if device == devices[run.rank]]
        if len(same) > 1 and run.device.type != "cpu":
            raise UsageError(f"processes {' and '.join(same)} have the same device, {run.device}; pass device cuda, "
                             "which gives each process its own")
    return create


def leave_process_group(seconds: float | None = None) -> None:
    """Destroy the process group. Processes that wait for this one in a collective get an error.

    seconds: wait at most this long for unfinished collectives, since other processes may hang; None waits until they
        are finished
    """
    atexit.unregister(leave_process_group)
    if dist.is_initialized():
        group = [dist.group.WORLD]
        group_alive = weakref.ref(group[0])
        dist.destroy_process_group()
        # The group's threads end with the last reference to it. A thread that still frees a tensor while Python exits
        # aborts the process.
        if seconds is None:
            group.clear()
            if group_alive():
                sleep(0.1)      # time for the threads to finish: after fsdp, torch's caches keep a reference
        else:
            clearing = Thread(target=group.clear, daemon=True)
            clearing.start()
            clearing.join(seconds)


@contextmanager
def missing_processes_named(timeout: float) -> Iterator[None]:
    """Inside this block, replace the error of a collective that timed out by one that names the missing processes.

    timeout: of the process group, in seconds. Raises TimeoutError.
    """
    try:
        yield
    except Exception as error:
        if not (is_peer_failure(error) and "timed out" in str(error).lower() and dist.is_initialized()):
            raise
        missing = find_missing(min(timeout, 10))
        if not missing:
            raise
        several = len(missing) > 1
        raise TimeoutError(
            f"process{'es' * several} {names(map(str, missing))} did not answer for {timeout:g} seconds; see whether "
            f"{'they are' if several else 'it is'} stopped or slow, or pass a larger timeout") from error


def find_missing(seconds: float) -> list[int]:
    """Return the ranks that do not report within `seconds` that they too have waited in vain.

    The processes report in the store of the process group. If it cannot be reached, rank 0, which may serve it, is
    missing.
    """
    store: dist.Store = dist.distributed_c10d._get_default_store()      # torch has no public name for it
    own, others = dist.get_rank(), [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    missing = [] if own == 0 or torchrun_serves_store() else [0]

    def exchange() -> None:
        with suppress(dist.DistError):              # the process that serves the store has ended
            store.set(f"timed out {own}", "")
            store.check([f"timed out {own}"])       # waits for an answer of the store, as `set` does not
            missing[:] = others
            while missing:
                missing[:] = [rank for rank in missing if not store.check([f"timed out {rank}"])]
                sleep(0.1)

    thread = Thread(target=exchange, daemon=True)       # a store whose process is stopped never answers
    thread.start()
    thread.join(seconds)
    return list(missing)


def broadcast_from_rank0(run: Run, value: T) -> T:
    """Return the `value` of rank 0 in every process. Any object that can be pickled."""
    if is_single_process(run):
        return value
    objects = [value]
    dist.broadcast_object_list(objects, 0)
    return objects[0]


def all_gather(run: Run, value: T) -> list[T]:
    """Return the `value` of each process, by rank, in every process. Any object that can be pickled."""
    if is_single_process(run):
        return [value]
    values: list[Any] = [None] * run.world_size
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(run: Run, value: Any) -> Any:
    """Return the sum of `value` over all processes. `value`: a number, or a tensor on the run's device, not changed."""
    return value if is_single_process(run) else all_reduce(run, value, dist.ReduceOp.SUM)


def all_reduce(run: Run, value: Any, operation: Any) -> Any:
    if isinstance(value, Tensor):
        total = value.detach().clone()
    else:
        host = "cpu" in dist.get_backend_config()           # false for a user's own process group without a CPU backend
        total = torch.tensor(float(value), dtype=torch.float64, device="cpu" if host else run.device)
    dist.all_reduce(total, operation)
    return total if isinstance(value, Tensor) else total.item()


def all_reduce_mean(run: Run, value: Tensor) -> Tensor:
    """Return the mean of the tensor `value` over all processes."""
    return value if is_single_process(run) else all_reduce_sum(run, value) / run.world_size


def all_reduce_max(run: Run, value: Any) -> Any:
    """Return the maximum of `value` over all processes; elementwise for a tensor on the run's device."""
    return value if is_single_process(run) else all_reduce(run, value, dist.ReduceOp.MAX)


class OfThisRank:
    """A tensor in a plugin's state dict that has another value in each process. A checkpoint holds the values of all.

    `load_state_dict` is given the tensor of its own process; None if the number of processes is another one. Each
    process writes its own to a file, in the background, so nothing is gathered.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


@torch.no_grad()
def broadcast_tensors(run: Run, tensors: Iterable[Tensor]) -> None:
    """Copy the `tensors` of rank 0 into those of all processes, in place; one broadcast per dtype."""
    by_dtype: dict[Any, list[Tensor]] = {}
    for tensor in () if is_single_process(run) else tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    flattened = [torch.cat([tensor.reshape(-1) for tensor in group]) for group in by_dtype.values()]
    works: list[Any] = [dist.broadcast(flat, 0, async_op=True) for flat in flattened]
    for work in works:
        work.wait()
    for flat, group in zip(flattened, by_dtype.values(), strict=True) if run.rank else ():
        parts = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view_as(tensor) for part, tensor in zip(parts, group, strict=True)])


@torch.no_grad()
def average_tensors(run: Run, tensors: Iterable[Tensor]) -> None:
    """Replace `tensors` by their means over all processes, in place; one collective per dtype."""
    by_dtype: dict[Any, list[Tensor]] = {}
    for tensor in () if is_single_process(run) else tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    for group in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group]).div_(run.world_size)
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_(group, [part.view_as(tensor) for part, tensor in zip(parts, group, strict=True)])


def torchrun_serves_store() -> bool:
    """Return whether torchrun, which is then this process's parent, serves the key-value store of the run."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def torchrun_store() -> dist.Store | None:
    """Return the key-value store of torchrun, which is kept over restarts; None without torchrun."""
    if not torchrun_serves_store():
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"loopctl/{os.environ.get('TORCHELASTIC_RUN_ID', '')}", store)


def store_note(note: str, text: str) -> None:
    """Store `text` under the key `note`, for the processes after a restart by torchrun."""
    if store := torchrun_store():
        store.set(note, text)


def read_note(note: str) -> str:
    """Return the text that `store_note` stored; empty if there is none."""
    store = torchrun_store()
    return store.get(note).decode() if store and store.check([note]) else ""


def claim_error_report(wait: bool) -> bool:
    """Return whether this process should report why the run ends. True in the first process that asks.

    wait: give the other processes five seconds to ask first
    """
    try:
        store = torchrun_store()
        if store is None:
            return not wait or rank() == 0
        note = f"end {restart_count()}"
        for _ in range(50 if wait else 0):      # on a busy machine a process may be seconds behind
            if store.check([note]):
                return False
            sleep(0.1)
        return store.add(note, 1) == 1
    except (dist.DistError, RuntimeError):      # torchrun, which serves the store, has ended
        return rank() == 0


def is_peer_failure(error: BaseException) -> bool:
    """Return whether `error` is only the consequence of another process having ended."""
    message = str(error).lower()
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and any(
        hint in message for hint in ("closed by peer", "reset by peer", "gloo"))


class AgreedStop(str):
    """A reason to stop that all processes have found at the same step, so that they need not exchange it."""


class StopConsensus:
    """Share what one process has noticed, such as a signal, with all processes, so that they act at the same step.

    An exchange in every step would cost a collective each. The processes exchange about once a second, and at the end
    of each epoch.
    """

    def __init__(self) -> None:
        self.next_exchange = 0                                  # at which `run.attempts`
        self.last_exchange: tuple[int, float] | None = None     # its `run.attempts`, and its time in seconds

    def __call__(self, run: Run, noticed: T) -> T | None:
        """Return the maximum of `noticed` over all processes, or None in steps without an exchange.

        All processes must call it in every safe point.
        """
        if is_single_process(run):
            return noticed
        if run.attempts < self.next_exchange and run.seen_in_epoch:
            return None
        steps, seconds = 1, 1.0
        if self.last_exchange:
            steps, seconds = max(1, run.attempts - self.last_exchange[0]), perf_counter() - self.last_exchange[1]
        gathered = all_gather(run, (noticed, steps / max(seconds, 1e-6)))
        self.next_exchange = run.attempts + max(1, int(gathered[0][1]))     # by the clock of rank 0, in all processes
        self.last_exchange = run.attempts, perf_counter()
        return max(value for value, _ in gathered)                          # type: ignore[type-var]
