"""Atomic writes: a file has its old content or its new content, never a part. Checkpoints have a checksum too."""
from __future__ import annotations

import errno
import io
import logging
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn

from loopctl.distributed.process_group import rank
from loopctl.errors import UsageError, one_line
from loopctl.model.own_names import own_state_dict

CHECKSUM_MARK = b"loopctl crc32 "
FORMAT = 3                  # version of the content of a checkpoint; other versions are refused
# What a file system answers that cannot sync a folder, or change the mode of a file, as CIFS and some FUSE do not.
UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EBADF}

log = logging.getLogger("loopctl")
warned: set[tuple[str, int]] = set()        # what was said, and of which file system


def check_writable(file: Path) -> None:
    """Raise OSError if `file` cannot be created. Creates nothing, so that a refused run leaves nothing behind."""
    parent = next(folder for folder in file.absolute().parents if os.path.lexists(folder))
    if parent.is_symlink() and not parent.exists():
        raise NotADirectoryError(0, f"{parent} is a link to {os.readlink(parent)}, which does not exist")
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise NotADirectoryError(0, f"{parent} is not a writable folder")
    if file.is_dir():
        raise IsADirectoryError(0, f"{file} is a folder")


def claim_output(
    target: Path, resumed: bool, option: str = "path", existing: Callable[[], Iterable[Path]] | None = None,
) -> None:
    """Raise UsageError where a plugin cannot write to `target`, the file or folder that its option `option` names.

    resumed: the run is resumed and may replace the output of the earlier run
    existing: returns the files that must not be overwritten; `target` is a folder then. Without it, that is `target`
    """
    try:
        check_writable(target / "file" if existing else target)
        files = [] if resumed else [file for file in (existing() if existing else [target]) if file.exists()]
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}); choose another {option}") from error
    if files:
        raise UsageError(f"{files[0]} exists and is not overwritten; move it, or choose another {option}")


@contextmanager
def atomic_write(file: Path) -> Iterator[Path]:
    """Yield a temporary path beside `file`, then replace `file` with what was written there, and sync it to the disk.

    A reader of `file` sees the old content or the new, also after a power cut. If writing fails, the old content stays
    and the error is raised. Missing folders are created.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.new")
    try:
        yield temporary
        fsync(temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name != "nt":              # Windows cannot open a folder
        fsync(file.parent)


def fsync(path: Path) -> None:
    """Make the system write the buffered content of a file, or the names in a folder, to the disk. Raises OSError."""
    folder = path if path.is_dir() else path.parent
    with unsupported_is_warned(folder, "cannot be synced to the disk", "a power cut may damage what is in it"):
        handle = os.open(path, os.O_RDONLY if path == folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def unsupported_is_warned(folder: Path, fact: str, consequence: str) -> Iterator[None]:
    """Log a warning, in place of an error, where the file system of `folder` does not support what the block does."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(folder, f"{folder} {fact} ({error.strerror}); {consequence}", fact)


def warn_once(folder: Path, text: str, key: str) -> None:
    """Log the warning `text`, unless one with the same `key` was logged about the same file system."""
    try:
        known = key, folder.stat().st_dev
    except OSError:
        known = key, 0
    if known not in warned:
        warned.add(known)
        log.warning(text)


def save_weights(model: nn.Module | Weights, file: Path) -> None:
    """Write the weights of `model` as safetensors, which other programs can read and which runs no code.

    If the weights are sharded, make `Weights` of the model on all ranks and pass it on rank 0. Raises OSError.
    """
    weights = model if isinstance(model, Weights) else Weights(model)
    with atomic_write(file) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_model(weights, str(temporary))         # type: ignore[arg-type]   # it only calls state_dict()
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number:
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise OSError(one_line(error)) from error
        with unsupported_is_warned(file.parent, "has files whose mode cannot be set", "others cannot read them"):
            temporary.chmod(mode)                       # safetensors makes the file readable by its owner alone


class Weights:
    """The tensors of a model's state dict on rank 0, as full tensors; empty on other ranks.

    If they are sharded, they are gathered, so all processes must make it. Values that are not tensors are left out,
    because safetensors cannot hold them. Sparse tensors become dense, and overlapping ones copies, for the same reason.
    A plugin that changes the names in a model for training sets the model's attribute `exported_state_dict`, a function
    that returns the state dict of the plain model.
    """

    def __init__(self, model: nn.Module) -> None:
        # One tensor is gathered at a time, and only rank 0 keeps it, on the host: a device may be too small for all.
        self.tensors = {}
        exported = getattr(model, "exported_state_dict", None)
        for name, value in (exported() if exported else own_state_dict(model)).items():
            if hasattr(value, "full_tensor"):
                # Cloned because it may be a view of the larger buffer that was gathered into.
                value = value.full_tensor() if rank() else value.full_tensor().clone().cpu()
            if isinstance(value, torch.Tensor) and rank() == 0:
                self.tensors[name] = value if value.layout is torch.strided else value.to_dense()
                if overlaps(self.tensors[name]):
                    self.tensors[name] = value.clone(memory_format=torch.contiguous_format)

    def state_dict(self) -> dict[str, Any]:
        return self.tensors


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether several elements of `tensor` are the same memory, as after `expand`."""
    return tensor.layout is torch.strided and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


class DamagedCheckpoint(Exception):
    """A file is damaged or not a checkpoint. The message is the predicate of a sentence that starts with its path."""


def save_checkpoint(content: Any, file: Path) -> None:
    """Write `content` atomically, with a checksum. Raises OSError; then the old file stays as it is.

    The format is that of `torch.save`, a zip archive, with the checksum as its comment; `torch.load` reads it.
    """
    with atomic_write(file) as temporary, temporary.open("wb") as raw:
        stream = ChecksumWriter(raw)
        try:
            torch.save(content, stream)      # type: ignore[arg-type]   # it only calls write() and flush()
        except RuntimeError as error:
            raise error.__context__ or error from None  # torch raises a second error when it closes the archive
        raw.seek(-2, io.SEEK_END)                       # an archive ends with the length of its comment, which is 0
        raw.write(checksum_comment(stream.sum))


def checksum_comment(checksum: int) -> bytes:
    """Return the last bytes of an archive whose comment is `checksum`: the comment's length and the comment."""
    comment = CHECKSUM_MARK + f"{checksum:08x}".encode()
    return len(comment).to_bytes(2, "little") + comment


class ChecksumWriter:
    """Write to a binary file and compute the CRC-32 checksum of what was written."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.sum = raw, 0

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.raw.write(data)

    def flush(self) -> None:
        self.raw.flush()


def read_checkpoint(file: Path, device: Any = "cpu") -> dict[str, Any]:
    """Return the content of a checkpoint, with its tensors on `device`. Code in the file is never executed.

    Raises DamagedCheckpoint where the file cannot be read, its checksum does not match, or it is not a checkpoint.
    """
    checksum, length = 0, len(checksum_comment(0))
    try:
        with file.open("rb") as stream:
            remaining = stream.seek(0, io.SEEK_END) - length
            stream.seek(0)
            start = stream.read(4)
            stream.seek(0)
            while remaining > 0 and (part := stream.read(min(remaining, 1 << 20))):
                checksum, remaining = zlib.crc32(part, checksum), remaining - len(part)
            comment = stream.read()
    except OSError as error:
        raise DamagedCheckpoint(f"cannot be read: {error.strerror}") from error
    if not comment[2:].startswith(CHECKSUM_MARK):
        raise DamagedCheckpoint("is not a checkpoint, or is incomplete")
    # The checksum was computed when the archive ended with 0, the length of an empty comment.
    if comment != checksum_comment(zlib.crc32(b"\0\0", checksum)):
        raise DamagedCheckpoint("is damaged: its checksum does not match")
    if start != b"PK\3\4":
        raise DamagedCheckpoint("is not a checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):
            saved = torch.load(file, map_location=device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                  # a file made by hand may raise anything, and its code is not executed
        raise DamagedCheckpoint("has content other than tensors and plain values, which was not loaded") from error
    if not isinstance(saved, dict) or saved.get("loopctl") != FORMAT:
        raise DamagedCheckpoint("is not a checkpoint that this version of loopctl reads")
    return saved
