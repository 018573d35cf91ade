"""Tensors of which each process has a piece, in a checkpoint: the files of torch.distributed.checkpoint, beside it."""
from __future__ import annotations

from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from loopctl.batches import mapped
from loopctl.errors import one_line
from loopctl.files import Damaged

if TYPE_CHECKING:
    from loopctl.run import Run

MARK = "in pieces"


def taken_out(content: Any) -> tuple[Any, dict[str, Any]]:
    """`content` with a description in place of each tensor that is in pieces, and these tensors by the name in it."""
    pieces: dict[str, Any] = {}

    def described(leaf: Any) -> Any:
        if not in_pieces(leaf):
            return leaf
        pieces[name := str(len(pieces))] = leaf.detach()
        return {MARK: name, "shape": list(leaf.shape), "dtype": leaf.dtype,
                "dims": [getattr(placement, "dim", None) for placement in leaf.placements]}

    marked = mapped(described, content)
    return (marked, pieces) if pieces else (content, {})


def in_pieces(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "full_tensor")


def whole(tensor: Any) -> Any:
    """`tensor`, put together if it is in pieces: then all processes must call this."""
    return tensor.full_tensor() if in_pieces(tensor) else tensor


def save(pieces: dict[str, Any], folder: Path) -> Future[Any]:
    """Write `pieces` to `folder` in the background. When this returns they may change: copies are written.

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

    writing: Any = dcp.async_save(pieces, checkpoint_id=folder, process_group=own)      # type: ignore[arg-type]
    writing.add_done_callback(settle)
    return done


def put_in(run: Run, content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`content` with the tensors in it that `taken_out` took out, in pieces for the processes of `run`.

    Raises Damaged where they cannot be read.
    """
    if "pieces" not in content:
        return content
    import torch.distributed.checkpoint as dcp
    meshes: list[Any] = [getattr(one, "device_mesh", None) for one in run.model.parameters() if in_pieces(one)]
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

    filled = mapped(lambda leaf: empty(leaf) if described(leaf) else leaf, content, is_leaf=described)
    try:
        dcp.load(found, checkpoint_id=folder / content["pieces"], no_dist=not dist.is_initialized())
    except Exception as error:                  # whatever a damaged file leads to, wrapped by torch
        raise Damaged(f"cannot be read: {type(error).__name__}") from error
    return filled


def described(leaf: Any) -> bool:
    return isinstance(leaf, dict) and MARK in leaf
