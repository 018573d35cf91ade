"""The processes that train together, each with a loop of its own: which one this is, and what all of them agree on.

They are torch.distributed's. torchrun starts them, or `loopctl run --devices`; a plugin such as ddp has the run join
them. In a run of one process each function here gives back at once what it is given.
"""
from __future__ import annotations

import atexit
import os
import socket
import weakref
from importlib import import_module
from threading import Thread
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from loopctl.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from loopctl.run import Run

T = TypeVar("T")

# By kind of device. Objects and decisions go between the hosts, so that no device is waited for.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}


def launched_processes() -> int:
    """How many processes torchrun has started for what runs here; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def restart_count() -> int:
    """How often torchrun has started these processes again, after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) if "RANK" in os.environ else 0


def rank() -> int:
    """Which of the processes this is, from 0; known before they have joined each other."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched_processes() > 1 else 0


def is_only_planned(run: Run) -> bool:
    """Whether a run of several processes is only planned: they are not there."""
    return run.world_size > 1 and not (dist.is_initialized() and dist.get_world_size() == run.world_size)


def is_single_process(run: Run) -> bool:
    """Whether there is nobody to talk to: one process, or a run of more that is planned and not trained."""
    return run.world_size == 1 or is_only_planned(run)


def join_process_group(run: Run, even_alone: bool = False) -> bool:
    """Have `run` train together with those in the other processes: sets `run.rank` and `run.world_size`.

    even_alone: be a process group also where there is one process. A run whose `world_size` is set is only planned.

    Returns whether there was no process group yet.

    Raises UsageError where two processes have the same device, or where this kind of device cannot join.
    """
    begins = not dist.is_initialized() and run.world_size == 1 and (launched_processes() > 1 or even_alone)
    if begins:
        kind = run.device.type
        if kind not in BACKENDS:
            raise UsageError(f"several processes train on cpu or cuda, not on {kind}; pass device cpu")
        if kind == "cuda":
            torch.cuda.set_device(run.device)
        settings: dict[str, Any] = {}
        if launched_processes() == 1:
            settings = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        elif store := torchrun_store():     # it outlives a restart; the prefix hides the addresses of ended processes
            settings = {"store": dist.PrefixStore(f"attempt {restart_count()}", store), "rank": rank(),
                        "world_size": launched_processes()}
        # Its functions keep for ever the process group that there is when they are imported, which must end: see leave.
        import_module("torch.distributed.nn.functional")
        dist.init_process_group(BACKENDS[kind], **settings)
        atexit.register(leave_process_group)
    if dist.is_initialized() and run.world_size == 1:
        run.rank, run.world_size = dist.get_rank(), dist.get_world_size()
    if run.device.type != "cpu" and not is_single_process(run):
        devices = all_gather(run, (socket.gethostname(), str(run.device)))
        same = [str(number) for number, device in enumerate(devices) if device == devices[run.rank]]
        if len(same) > 1:
            raise UsageError(f"processes {' and '.join(same)} have the same device, {run.device}; pass device cuda, "
                             "which gives each its own")
    return begins


def leave_process_group(seconds: float | None = None) -> None:
    """Leave the other processes. Those that wait for this one get an error.

    seconds: wait no longer for messages that are on their way, whose other end may hang; None waits for them
    """
    atexit.unregister(leave_process_group)
    if dist.is_initialized():
        group = [dist.group.WORLD]
        held = weakref.ref(group[0])
        dist.destroy_process_group()
        # Its threads end when nobody holds it. One that still lets go of a tensor while Python ends aborts the process.
        if seconds is None:
            group.clear()
            if held():
                sleep(0.1)      # so that they may be done, where torch's caches hold it, as they do after fsdp
        else:
            clears = Thread(target=group.clear, daemon=True)
            clears.start()
            clears.join(seconds)


def broadcast_from_rank0(run: Run, value: T) -> T:
    """The first process's `value`, in every process."""
    if is_single_process(run):
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def all_gather(run: Run, value: T) -> list[T]:
    """The `value` of each process, in every process."""
    if is_single_process(run):
        return [value]
    values: list[Any] = [None] * run.world_size
    dist.all_gather_object(values, value)
    return values


def all_reduce_sum(run: Run, value: Any) -> Any:
    """The sum of what `value` is in each process: a number, or a tensor on the run's device, which stays as it is."""
    return value if is_single_process(run) else all_reduce(run, value, dist.ReduceOp.SUM)


def all_reduce(run: Run, value: Any, how: Any) -> Any:
    if isinstance(value, Tensor):
        total = value.detach().clone()
    else:
        host = "cpu" in dist.get_backend_config()           # else the user's own process group, of devices alone
        total = torch.tensor(float(value), dtype=torch.float64, device="cpu" if host else run.device)
    dist.all_reduce(total, how)
    return total if isinstance(value, Tensor) else total.item()


def all_reduce_mean(run: Run, value: Tensor) -> Tensor:
    """The mean of the tensors that `value` is in each process."""
    return value if is_single_process(run) else all_reduce_sum(run, value) / run.world_size


def all_reduce_max(run: Run, value: Any) -> Any:
    """The largest of what `value` is in each process: a number, or each number of a tensor on the run's device."""
    return value if is_single_process(run) else all_reduce(run, value, dist.ReduceOp.MAX)


@torch.no_grad()
def broadcast_tensors(run: Run, tensors: Iterable[Tensor]) -> None:
    """Copy the first process's `tensors` into everybody's. One message for all that have the same type."""
    by_type: dict[Any, list[Tensor]] = {}
    for tensor in () if is_single_process(run) else tensors:
        by_type.setdefault(tensor.dtype, []).append(tensor.detach())
    sent = [torch.cat([tensor.reshape(-1) for tensor in alike]) for alike in by_type.values()]
    messages: list[Any] = [dist.broadcast(flat, 0, async_op=True) for flat in sent]
    for message in messages:
        message.wait()
    for flat, alike in zip(sent, by_type.values(), strict=True) if run.rank else ():
        parts = flat.split([tensor.numel() for tensor in alike])
        torch._foreach_copy_(alike, [part.view_as(tensor) for part, tensor in zip(parts, alike, strict=True)])


def torchrun_store() -> dist.Store | None:
    """Where torchrun keeps notes for the processes that it starts; they outlive these."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"loopctl/{os.environ.get('TORCHELASTIC_RUN_ID', '')}", store)


def store_note(note: str, text: str) -> None:
    """Keep a note for processes that may be started again in place of these."""
    if store := torchrun_store():
        store.set(note, text)


def read_note(note: str) -> str:
    """What was remembered; empty if nothing was."""
    store = torchrun_store()
    return store.get(note).decode() if store and store.check([note]) else ""


def claim_error_report(waits: bool) -> bool:
    """Whether this process is the one to say why all of them end. The first that asks is.

    waits: it gives others five seconds to say so first
    """
    try:
        store = torchrun_store()
        if store is None:
            return not waits or rank() == 0
        note = f"end {restart_count()}"
        for _ in range(50 if waits else 0):     # a process may be seconds behind, on a busy machine
            if store.check([note]):
                return False
            sleep(0.1)
        return store.add(note, 1) == 1
    except (dist.DistError, RuntimeError):      # torchrun has gone
        return rank() == 0


def is_peer_failure(error: BaseException) -> bool:
    """Whether `error` says no more than that another process has ended."""
    said = str(error).lower()
    return isinstance(error, dist.DistBackendError | dist.DistNetworkError) or (
        isinstance(error, RuntimeError) and any(hint in said for hint in ("closed by peer", "reset by peer", "gloo")))


class AgreedStop(str):
    """A reason to stop that all processes have come to at the same step, so that they need not ask each other."""


class StopConsensus:
    """Brings what each process notices by itself, such as a signal, to all of them, who then act at the same step.

    To ask in every step would cost a message each. They ask each other about once a second, and where an epoch ends.
    """

    def __init__(self) -> None:
        self.due = 0                                    # the step, by `run.attempts`, at which they ask
        self.asked: tuple[int, float] | None = None     # when they last did

    def __call__(self, run: Run, noticed: T) -> T | None:
        """The largest of what all have noticed; None in steps where nobody asks. Call it in every safe point."""
        if is_single_process(run):
            return noticed
        if run.attempts < self.due and run.seen_in_epoch:
            return None
        steps, seconds = 1, 1.0
        if self.asked:
            steps, seconds = max(1, run.attempts - self.asked[0]), perf_counter() - self.asked[1]
        answers = all_gather(run, (noticed, steps / max(seconds, 1e-6)))
        self.due = run.attempts + max(1, int(answers[0][1]))            # the first process's clock counts for all
        self.asked = run.attempts, perf_counter()
        return max(answer for answer, _ in answers)                     # type: ignore[type-var]
