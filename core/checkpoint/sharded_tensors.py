"""Sharded tensors (DTensor) in a checkpoint: each process writes its shards to a safetensors file beside it.

A tensor that has another value in each process, an `OfThisRank`, is written as a tensor with a row for each.

The folder `step-N-E.sharded` holds `rank-00000.safetensors` and so on. The checkpoint has its name, the checksum of
each file and a description in place of each sharded tensor. No pickle is involved, and no name leads out of the folder.
"""
from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from loopctl.checkpoint.atomic_files import DamagedCheckpoint, atomic_write
from loopctl.data.batch import map_nested
from loopctl.distributed.process_group import OfThisRank
from loopctl.errors import UsageError, one_line

if TYPE_CHECKING:
    from loopctl.run import Run

MARK = "sharded tensor"
FOLDER = re.compile(r"step-\d{1,20}-\d{1,20}\.sharded")
FILE = re.compile(r"rank-\d{5,8}\.safetensors")


def extract_sharded(content: Any) -> tuple[Any, dict[str, Any]]:
    """`content` with a description in place of each sharded tensor, and these tensors by the name in it."""
    tensors: dict[str, Any] = {}
    single: list[Any] = []              # tensors of this process where it is the only one

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, OfThisRank):
            if not (dist.is_initialized() and dist.get_world_size() > 1):
                single.append(leaf.tensor)
                return leaf.tensor
            tensors[name := str(len(tensors))] = leaf
            return {MARK: name, "shape": [dist.get_world_size(), *leaf.tensor.shape], "dtype": leaf.tensor.dtype,
                    "rows": True}
        if not is_sharded(leaf):
            return leaf
        tensors[name := str(len(tensors))] = leaf.detach()
        return {MARK: name, "shape": list(leaf.shape), "dtype": leaf.dtype,
                "dims": [getattr(placement, "dim", None) for placement in leaf.placements]}

    marked = map_nested(describe, content)
    return (marked, tensors) if tensors or single else (content, {})


def is_sharded(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and hasattr(value, "full_tensor")


def full_tensor(tensor: Any) -> Any:
    """`tensor`, gathered from all processes if it is sharded: then all of them must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local_rows(tensor: Any) -> torch.Tensor:
    """`tensor`, or of a sharded one the rows that this process holds, which are a view. For use without gradients.

    Raises UsageError if it is sharded along another dimension than the first, as `fully_shard` does not.
    """
    if not is_sharded(tensor):
        return tensor
    if any(placement.is_shard() and not placement.is_shard(0) for placement in tensor.placements):
        raise UsageError("a parameter is sharded along another dimension than its first, so no process has whole rows")
    return tensor.to_local()


def sum_over_shards(tensor: Any, value: torch.Tensor) -> torch.Tensor:
    """The sum of `value` over the processes that hold the shards of `tensor`; `value` itself if it is not sharded."""
    for dim, placement in enumerate(tensor.placements if is_sharded(tensor) else ()):
        if placement.is_shard():
            value = value.clone()
            dist.all_reduce(value, group=tensor.device_mesh.get_group(dim))
    return value


def save_sharded(tensors: dict[str, Any], folder: Path) -> Future[dict[str, int]]:
    """Write this process's shards of `tensors` to `folder` in the background. All processes must call this.

    The tensors may change once this returns: copies are written. The future's result, in each process, is the checksum
    (CRC-32) of every process's file by name; it raises OSError where one of them could not write.
    """
    group: Any = dist.new_group(backend="gloo")     # of its own, so that its messages do not mix with those of training
    name = f"rank-{dist.get_rank():05}.safetensors"
    shards, places = {}, {}
    for key, tensor in tensors.items():
        offsets, local = own_shard(tensor)
        if local.numel() and not is_copy(tensor):
            shards[key], places[key] = local.detach().to("cpu", copy=True).contiguous(), offsets

    def write() -> dict[str, int]:
        checksum, error = 0, ""
        try:
            with atomic_write(folder / name) as aside:
                save_file(shards, aside, metadata={"offsets": json.dumps(places)})
            checksum = file_checksum(folder / name)
        except (OSError, SafetensorError) as raised:
            error = one_line(getattr(raised, "strerror", None) or raised)
        found: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(found, (name, checksum, error), group=group)
        with suppress(ValueError):              # the process group may have ended meanwhile
            dist.destroy_process_group(group)
        if failures := [f"process {rank}: {why}" for rank, (_, _, why) in enumerate(found) if why]:
            raise OSError(0, "; ".join(failures))
        return {file: total for file, total, _ in found}

    with_thread = ThreadPoolExecutor(1)
    future = with_thread.submit(write)
    with_thread.shutdown(wait=False)
    return future


def own_shard(tensor: Any) -> tuple[list[int], torch.Tensor]:
    """Where this process's shard begins in `tensor`, by dimension, and the shard."""
    if isinstance(tensor, OfThisRank):          # a row of a tensor with a row for each process
        return [dist.get_rank()] + [0] * tensor.tensor.ndim, tensor.tensor[None]
    (chunk,) = tensor.__create_chunk_list__()
    return list(chunk.offsets), tensor.to_local()


def is_copy(tensor: Any) -> bool:
    """Whether another process has the same shard too, and writes it: of replicas, the first one writes."""
    if isinstance(tensor, OfThisRank):
        return False
    return any(place and placement.is_replicate()
               for place, placement in zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True))


def file_checksum(file: Path) -> int:
    total = 0
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            total = zlib.crc32(part, total)
    return total


def check_sharded(saved: dict[str, Any], parent: Path, part: int = 0, parts: int = 1) -> None:
    """Raise DamagedCheckpoint where the sharded tensors of a checkpoint in `parent` are not those that were written.

    part, parts: compute the checksums of only each `parts`-th file, from number `part` on.
    """
    folder, checksums = sharded_files(saved, parent)
    for number, (name, checksum) in enumerate(checksums.items()):
        try:
            if number % parts == part and file_checksum(folder / name) != checksum:
                raise DamagedCheckpoint(f"is damaged: the checksum of {folder.name}/{name} does not match")
        except OSError as error:
            raise DamagedCheckpoint(f"misses {folder.name}/{name} ({error.strerror})") from error


def sharded_files(saved: dict[str, Any], parent: Path) -> tuple[Path, dict[str, int]]:
    """The folder of a checkpoint's sharded tensors, and the checksum of each file in it, by name.

    Raises DamagedCheckpoint where a name is not one that `save_sharded` gives, or leads out of `parent`.
    """
    found = saved["sharded"]
    name, checksums = (found.get("folder"), found.get("checksums")) if isinstance(found, dict) else (None, None)
    if not (isinstance(name, str) and FOLDER.fullmatch(name) and isinstance(checksums, dict) and checksums
            and all(isinstance(file, str) and FILE.fullmatch(file) and isinstance(total, int)
                    for file, total in checksums.items())):
        raise DamagedCheckpoint("has names of sharded tensors that no checkpoint has")
    folder, inside = parent / name, parent.resolve()
    for path in (folder, *(folder / file for file in checksums)):
        if not path.resolve().is_relative_to(inside):
            raise DamagedCheckpoint(f"has sharded tensors outside of its folder, in {path.resolve()}")
    return folder, checksums


@dataclass
class Shard:
    """One shard in a file: which part of the tensor it is."""

    file: Any                   # open, of safetensors
    key: str
    begin: tuple[int, ...]
    size: tuple[int, ...]

    def read(self, begin: list[int], size: list[int]) -> Iterator[tuple[Any, torch.Tensor]]:
        """The part of the shard that is in the region `begin` to `begin + size`, and its place in that region."""
        low = [max(one, other) for one, other in zip(self.begin, begin, strict=True)]
        high = [min(a + n, b + m) for a, n, b, m in zip(self.begin, self.size, begin, size, strict=True)]
        if all(a < b for a, b in zip(low, high, strict=True)):
            inner = tuple(slice(a - start, b - start) for a, b, start in zip(low, high, self.begin, strict=True))
            place = tuple(slice(a - start, b - start) for a, b, start in zip(low, high, begin, strict=True))
            yield place, self.file.get_slice(self.key)[inner]


def load_sharded(run: Run, content: dict[str, Any], parent: Path) -> dict[str, Any]:
    """`content` with the tensors that `extract_sharded` replaced, sharded over the processes of `run`.

    parent: the folder of the checkpoint. Raises DamagedCheckpoint where they cannot be read.
    """
    if "sharded" not in content:
        return content
    folder, checksums = sharded_files(content, parent)
    meshes: list[Any] = [getattr(one, "device_mesh", None) for one in run.model.parameters() if is_sharded(one)]
    try:
        shards = read_headers([folder / name for name in checksums])

        def load(leaf: dict[str, Any]) -> Any:
            shape = [int(size) for size in leaf["shape"]]
            parts = shards.get(leaf[MARK], [])
            if not tiles(shape, parts):
                raise DamagedCheckpoint(f"has {len(parts)} shards that do not make up a tensor of shape {shape}")
            if leaf.get("rows"):
                return own_row(run, shape, leaf["dtype"], parts)
            if not meshes:
                tensor: Any = torch.empty(shape, dtype=leaf["dtype"])
                fill(tensor, [0] * len(shape), parts)
                return tensor.to(run.device)
            from torch.distributed.tensor import Replicate, Shard, empty
            dims = [dim for dim in leaf["dims"] if dim is not None]         # this run may have other replicas
            placements = [Replicate()] * (meshes[0].ndim - len(dims)) + [Shard(dim) for dim in dims]
            tensor = empty(shape, dtype=leaf["dtype"], device_mesh=meshes[0], placements=placements)
            offsets, local = own_shard(tensor)
            fill(local, offsets, parts)
            return tensor

        return map_nested(lambda leaf: load(leaf) if is_description(leaf) else leaf, content, is_leaf=is_description)
    except (DamagedCheckpoint, torch.OutOfMemoryError):
        raise
    except Exception as error:                  # whatever a file that was made by hand may lead to
        raise DamagedCheckpoint(f"has sharded tensors that cannot be read ({type(error).__name__})") from error


def own_row(run: Run, shape: list[int], dtype: torch.dtype, shards: list[Shard]) -> torch.Tensor | None:
    """The value of this process in a tensor with a row for each; None if this run has another number of processes."""
    if shape[0] != run.world_size:
        return None
    row = torch.empty([1, *shape[1:]], dtype=dtype)
    fill(row, [run.rank] + [0] * (len(shape) - 1), shards)
    return row[0].to(run.device)


def read_headers(files: list[Path]) -> dict[str, list[Shard]]:
    """The shards of each tensor in `files`, by the tensor's name; one of several copies of a replicated tensor."""
    found: dict[str, dict[tuple[int, ...], Shard]] = {}
    for path in files:
        file: Any = safe_open(path, "pt")
        places = json.loads((file.metadata() or {})["offsets"])
        for key in file.keys():                 # noqa: SIM118   # it is no mapping
            begin = tuple(int(offset) for offset in places[key])
            size = tuple(file.get_slice(key).get_shape())
            if len(begin) != len(size) or min(begin, default=0) < 0:
                raise DamagedCheckpoint(f"has a shard with wrong offsets in {path.name}")
            found.setdefault(key, {}).setdefault(begin, Shard(file, key, begin, size))
    return {key: list(shards.values()) for key, shards in found.items()}


def tiles(shape: list[int], shards: list[Shard]) -> bool:
    """Whether the shards, in order, make up a tensor of `shape` along one dimension, without gaps and overlaps."""
    dim = next((dim for dim in range(len(shape)) if any(shard.begin[dim] for shard in shards)), 0)
    end = 0
    for shard in sorted(shards, key=lambda shard: shard.begin):
        expected = [0] * len(shape)
        expected[dim] = end
        end += shard.size[dim] if shape else 0
        whole = [*shape[:dim], shard.size[dim], *shape[dim + 1:]] if shape else []
        if list(shard.begin) != expected or list(shard.size) != whole:
            return False
    return prod(shape) == 0 or end == shape[dim]


@torch.no_grad()
def fill(tensor: torch.Tensor, begin: list[int], shards: list[Shard]) -> None:
    """Copy the parts of `shards` that lie in the region of `tensor`, which begins at `begin`, into it."""
    for shard in shards:
        for place, part in shard.read(begin, list(tensor.shape)):
            if part.dtype != tensor.dtype:
                raise DamagedCheckpoint(f"has a shard of {part.dtype} for a tensor of {tensor.dtype}")
            tensor[place].copy_(part)


def is_description(leaf: Any) -> bool:
    return isinstance(leaf, dict) and MARK in leaf
