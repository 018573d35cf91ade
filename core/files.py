"""Files that are whole at every moment, and checkpoints among them: torch's own, with a checksum."""
from __future__ import annotations

import io
import os
import re
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import nn

from loopctl.errors import UsageError, one_line
from loopctl.world import rank

SEAL = b"loopctl crc32 "


def writable(file: Path) -> None:
    """Raise OSError where `file` cannot come to be. Makes nothing, so that a refused run leaves nothing behind."""
    above = next(folder for folder in file.absolute().parents if folder.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise NotADirectoryError(0, f"{above} is no folder that can be written to")
    if file.is_dir():
        raise IsADirectoryError(0, f"{file} is a folder")


def claim(file: Path, replace: bool) -> None:
    """Raise UsageError where a plugin cannot write `file`, the file that its option `path` names.

    replace: it may take the place of one that is there, as that of the run which goes on.
    """
    try:
        writable(file)
        there = file.exists() and not replace
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror}); say another path") from error
    if there:
        raise UsageError(f"{file} exists and is not overwritten; move it, or say another path")


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a path beside `file` to write to, then put what is there in its place, safe from a power cut too.

    Whoever reads `file` finds the old content or the new. Where writing fails, the old stays and the error is raised;
    the folder is made where there is none.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f"{file.name}.new")
    try:
        yield aside
        flush(aside)
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if os.name != "nt":              # where a folder cannot be opened
        flush(file.parent)


def flush(path: Path) -> None:
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
    with replacing(file) as aside:
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


class Damaged(Exception):
    """A file is not what was written."""


def save(content: Any, file: Path) -> None:
    """Write `content` with a checksum, so that `file` is whole at every moment. Raises OSError, and leaves the old.

    It is torch's own format, which `torch.load` reads: a zip archive, with the checksum as its comment.
    """
    with replacing(file) as aside, aside.open("wb") as raw:
        stream = Summed(raw)
        try:
            torch.save(content, stream)      # type: ignore[arg-type]   # it asks for write and flush alone
        except RuntimeError as error:
            raise error.__context__ or error from None  # torch raises one more while it closes the archive
        raw.seek(-2, io.SEEK_END)                       # an archive ends in the length of its comment, which is 0
        raw.write(seal(stream.sum))


def seal(checksum: int) -> bytes:
    """The end of an archive that has `checksum` as its comment."""
    comment = SEAL + f"{checksum:08x}".encode()
    return len(comment).to_bytes(2, "little") + comment


class Summed:
    """A file being written, and the checksum of what is in it."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.sum = raw, 0

    def write(self, data: Any) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.raw.write(data)

    def flush(self) -> None:
        self.raw.flush()


def read(file: Path, device: Any = "cpu") -> dict[str, Any]:
    """The content of a checkpoint. Runs no code that may be in it. Raises Damaged."""
    whole, length = 0, len(seal(0))
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
        raise Damaged(f"cannot be read: {error.strerror}") from error
    if not said[2:].startswith(SEAL):
        raise Damaged("is no checkpoint, or not a whole one")
    if said != seal(zlib.crc32(b"\0\0", whole)):           # as its end was when the sum was taken
        raise Damaged("is damaged: its checksum does not match")
    if start != b"PK\3\4":
        raise Damaged("is no checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):
            saved = torch.load(file, map_location=device, weights_only=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:                  # whatever a file that somebody made by hand may lead to
        raise Damaged("has something in it that no checkpoint has, which was not run") from error
    if not isinstance(saved, dict) or saved.get("loopctl") != 1:
        raise Damaged("is no checkpoint that this version of loopctl reads")
    return saved
