"""Files that are whole at every moment, and checkpoints among them: torch's own, with a checksum."""
from __future__ import annotations

import io
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

CHECKSUM_MARK = b"loopctl crc32 "
FORMAT = 2                  # of a checkpoint's content; another one is refused


def check_writable(file: Path) -> None:
    """Raise OSError where `file` cannot come to be. Makes nothing, so that a refused run leaves nothing behind."""
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise NotADirectoryError(0, f"{above} is no folder that can be written to")
    if file.is_dir():
        raise IsADirectoryError(0, f"{file} is a folder")


def claim_output(
    target: Path, resumed: bool, option: str = "path", existing: Callable[[], Iterable[Path]] | None = None,
) -> None:
    """Raise UsageError where a plugin cannot write to `target`, the file or folder that its option `option` names.

    resumed: the run continues an earlier one, whose output it may replace
    existing: returns the files that must not be overwritten, in place of `target`, which is a folder then
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
    """Give a path beside `file` to write to, then put what is there in its place, safe from a power cut too.

    Whoever reads `file` finds the old content or the new. Where writing fails, the old stays and the error is raised;
    the folder is made where there is none.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.new")
    try:
        yield aside
        fsync(aside)
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if os.name != "nt":              # where a folder cannot be opened
        fsync(file.parent)


def fsync(path: Path) -> None:
    """Have the system write out what it holds back of a file, or of the names in a folder."""
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_weights(model: nn.Module | Weights, file: Path) -> None:
    """Write the weights of `model` as safetensors, which any program reads and which runs no code. Raises OSError.

    Where several processes have pieces of them, all make `Weights`, and the first writes these.
    """
    weights = model if isinstance(model, Weights) else Weights(model)
    with atomic_write(file) as aside:
        aside.touch()
        usual = aside.stat().st_mode
        try:
            save_model(weights, str(aside))             # type: ignore[arg-type]   # it asks for state_dict alone
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number:
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise OSError(one_line(error)) from error
        aside.chmod(usual)                              # safetensors lets nobody else read it


class Weights:
    """A model without the state that is no tensor, for which safetensors have no place; with pieces put together."""

    def __init__(self, model: nn.Module) -> None:
        # One at a time, and only the first process keeps them: together they may not fit where the pieces are.
        self.found = {}
        for name, one in model.state_dict().items():
            if hasattr(one, "full_tensor"):
                one = one.full_tensor() if rank() else one.full_tensor().clone().cpu()     # not a part of what came
            if isinstance(one, torch.Tensor) and rank() == 0:
                self.found[name] = one

    def state_dict(self) -> dict[str, Any]:
        return self.found


class DamagedCheckpoint(Exception):
    """A file is not what was written."""


def save_checkpoint(content: Any, file: Path) -> None:
    """Write `content` with a checksum, so that `file` is whole at every moment. Raises OSError, and leaves the old.

    It is torch's own format, which `torch.load` reads: a zip archive, with the checksum as its comment.
    """
    with atomic_write(file) as aside, aside.open("wb") as raw:
        stream = ChecksumWriter(raw)
        try:
            torch.save(content, stream)      # type: ignore[arg-type]   # it asks for write and flush alone
        except RuntimeError as error:
            raise error.__context__ or error from None  # torch raises one more while it closes the archive
        raw.seek(-2, io.SEEK_END)                       # an archive ends in the length of its comment, which is 0
        raw.write(checksum_comment(stream.sum))


def checksum_comment(checksum: int) -> bytes:
    """The end of an archive that has `checksum` as its comment."""
    comment = CHECKSUM_MARK + f"{checksum:08x}".encode()
    return len(comment).to_bytes(2, "little") + comment


class ChecksumWriter:
    """A file being written, and the checksum of what is in it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.sum = raw, 0

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.raw.write(data)

    def flush(self) -> None:
        self.raw.flush()


def read_checkpoint(file: Path, device: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint. Runs no code that may be in it. Raises Damaged."""
    whole, length = 0, len(checksum_comment(0))
    try:
        with file.open("rb") as stream:
            left = stream.seek(0, io.SEEK_END) - length
            stream.seek(0)
            start = stream.read(4)
            stream.seek(0)
            while left > 0 and (part := stream.read(min(left, 1 << 20))):
                whole, left = zlib.crc32(part, whole), left - len(part)
            said = stream.read()
    except OSError as error:
        raise DamagedCheckpoint(f"cannot be read: {error.strerror}") from error
    if not said[2:].startswith(CHECKSUM_MARK):
        raise DamagedCheckpoint("is no checkpoint, or not a whole one")
    if said != checksum_comment(zlib.crc32(b"\0\0", whole)):           # as its end was when the sum was taken
        raise DamagedCheckpoint("is damaged: its checksum does not match")
    if start != b"PK\3\4":
        raise DamagedCheckpoint("is no checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):
            saved = torch.load(file, map_location=device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                  # whatever a file that somebody made by hand may lead to
        raise DamagedCheckpoint("has something in it that no checkpoint has, which was not run") from error
    if not isinstance(saved, dict) or saved.get("loopctl") != FORMAT:
        raise DamagedCheckpoint("is no checkpoint that this version of loopctl reads")
    return saved
