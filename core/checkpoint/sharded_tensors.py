"""Sharded tensors (DTensor) in a checkpoint: torch.distributed.checkpoint writes them to a folder beside its file."""
from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from loopctl.checkpoint.atomic_files import DamagedCheckpoint
from loopctl.data.batch import map_nested
from loopctl.errors import one_line

if TYPE_CHECKING:
    from loopctl.run import Run

MARK = "sharded tensor"


def extract_sharded(content: Any) -> tuple[Any, dict[str, Any]]:
    """`content` with a description in place of each sharded tensor, and these tensors by the name in it."""
    tensors: dict[str, Any] = {}

    def describe(leaf: Any) -> Any:
        if not is_sharded(leaf):
            return leaf
        tensors[name := str(len(tensors))] = leaf.detach()
        return {MARK: name, "shape": list(leaf.shape), "dtype": leaf.dtype,
                "dims": [getattr(placement, "dim", None) for placement in leaf.placements]}

    marked = map_nested(describe, content)
    return (marked, tensors) if tensors else (content, {})


def is_sharded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "full_tensor")


def full_tensor(tensor: Any) -> Any:
    """`tensor`, gathered from all processes if it is sharded: then all of them must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def save_sharded(tensors: dict[str, Any], folder: Path) -> Future[Any]:
    """Write `tensors` to `folder` in the background. They may change once this returns: copies are written.

    All processes must call it. In the first, the future is done when the others' are too.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    # A group of its own, for what it says must not come between what training says.
    own = dist.new_group(backend="gloo")
    done: Future[Any] = Future()

    def settle(written: Future[Any]) -> None:
        error = written.exception()
        if isinstance(error, CheckpointException):
            said = (f"process {rank}: {one_line(why[0])}" for rank, why in error.failures.items())
            error = OSError(0, "; ".join(said))
        done.set_exception(error) if error else done.set_result(True)
        with suppress(ValueError):          # it may be gone already, with all others
            dist.destroy_process_group(own)

    writing: Any = dcp.async_save(tensors, checkpoint_id=folder, process_group=own)      # type: ignore[arg-type]
    writing.add_done_callback(settle)
    return done


def load_sharded(run: Run, content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`content` with the tensors that `extract_sharded` replaced, sharded over the processes of `run`.

    Raises Damaged where they cannot be read.
    """
    if "sharded" not in content:
        return content
    import torch.distributed.checkpoint as dcp
    meshes: list[Any] = [getattr(one, "device_mesh", None) for one in run.model.parameters() if is_sharded(one)]
    found: dict[str, Any] = {}

    def empty(leaf: dict[str, Any]) -> Any:
        if meshes:
            from torch.distributed.tensor import Replicate, Shard, zeros
            placed = [Replicate() if dim is None else Shard(dim) for dim in leaf["dims"]]
            tensor: Any = zeros(leaf["shape"], dtype=leaf["dtype"], device_mesh=meshes[0], placements=placed)
        else:
            tensor = torch.zeros(leaf["shape"], dtype=leaf["dtype"], device=run.device)
        found[leaf[MARK]] = tensor
        return tensor

    filled = map_nested(lambda leaf: empty(leaf) if is_description(leaf) else leaf, content, is_leaf=is_description)
    try:
        dcp.load(found, checkpoint_id=folder / content["sharded"], no_dist=not dist.is_initialized())
    except Exception as error:                  # whatever a damaged file leads to, wrapped by torch
        raise DamagedCheckpoint(f"cannot be read: {type(error).__name__}") from error
    return filled


def is_description(leaf: Any) -> bool:
    return isinstance(leaf, dict) and MARK in leaf
