"""`ImageFile`: many images in one memory-mapped file.

The file has a header, an index with the height, the width and a checksum of each image, and the images one after
another: rows of RGB pixels, one byte per value, padded to a multiple of 8 bytes. Where an image begins follows from the
sizes before it.
"""
from __future__ import annotations

import mmap
import os
import struct
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from loopctl.errors import UsageError

MAGIC = b"loopctl images 1"                     # the number is the version of the format
HEADER = struct.Struct("<16s32sQQ")             # magic, fingerprint, number of images, CRC-32 of the index
ENTRY = np.dtype([("height", "<u4"), ("width", "<u4"), ("sum", "<i8")])


class Unusable(Exception):
    """A file cannot be used as the cache. The message is the predicate of a sentence that starts with its path."""


class ImageFile:
    """The images in the file at `path`, mapped into memory. Nothing in it can run, and no size in it is trusted.

    Raises Unusable where it does not have `count` images of this `fingerprint`, or its length or index is wrong.
    """

    def __init__(self, path: Path, fingerprint: bytes, count: int) -> None:
        self.path = path
        with path.open("rb") as file:
            length, head = os.fstat(file.fileno()).st_size, file.read(HEADER.size)
            if len(head) < HEADER.size or not head.startswith(MAGIC):
                raise Unusable("is not a cache that this version of loopctl reads")
            _, found, number, checksum = HEADER.unpack(head)
            if found != fingerprint or number != count:
                raise Unusable("is not of these images as they are now")
            index = file.read(count * ENTRY.itemsize)
            if len(index) < count * ENTRY.itemsize or zlib.crc32(index) != checksum:
                raise Unusable("is damaged: its index is incomplete or wrong")
            self.index = np.frombuffer(index, ENTRY)
            height, width = (self.index[name].astype(np.int64) for name in ("height", "width"))
            if (height * 3.0 * width).sum() > length:           # as floats, which do not overflow
                raise Unusable("is damaged: its images would be larger than the file")
            self.ends = HEADER.size + len(index) + np.cumsum(padded(3 * height * width))
            if not self.ends[-1] == length or not (height * width).all():
                raise Unusable("is damaged: its length is wrong")
            # Read-only, because a writable mapping counts as memory: one of hundreds of GB would be refused.
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)
        with warnings.catch_warnings(action="ignore"):          # torch warns that the tensor must not be written to
            self.bytes = torch.frombuffer(mapped, dtype=torch.uint8)

    def __getitem__(self, number: int) -> Tensor:
        """Return an image as a tensor of height x width x 3 in the mapped file. Raises UsageError for a damaged one."""
        height, width, checksum = self.index[number].item()
        size, end = 3 * height * width, int(self.ends[number])
        block = self.bytes[end - padded(size):end]
        # A sum of words finds each changed bit, and takes a fifth of the time of CRC-32.
        if block.view(torch.int64).sum().item() != checksum:
            raise UsageError(f"{self.path} is damaged at image {number} (counted from 0); delete it, and it is made "
                             "again")
        return block[:size].view(height, width, 3)


def padded(size: Any) -> Any:
    """The number of bytes, or an array of numbers, rounded up to a multiple of 8."""
    return (size + 7) // 8 * 8


def write_images(file: BinaryIO, fingerprint: bytes, count: int, images: Iterable[Any]) -> None:
    """Write `count` images, arrays of height x width x 3 bytes, in the format of `ImageFile`. Raises OSError."""
    index = np.zeros(count, ENTRY)
    file.seek(HEADER.size + index.nbytes)
    for number, pixels in enumerate(images):
        block = np.zeros(padded(pixels.size), np.uint8)
        block[:pixels.size] = pixels.reshape(-1)
        index[number] = *pixels.shape[:2], block.view("<i8").sum()
        file.write(block.data)
    file.seek(0)
    file.write(HEADER.pack(MAGIC, fingerprint, count, zlib.crc32(index.tobytes())))
    file.write(index.tobytes())
    file.flush()
    os.fsync(file.fileno())
