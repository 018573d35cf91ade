"""`CachedImages`: a data set of image files whose images are decoded and resized once, into one file."""
from __future__ import annotations

import errno
import hashlib
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from loopctl.data.checked_dataset import CheckedDataset
from loopctl.data.image_file import ImageFile, Unusable, write_images
from loopctl.errors import UsageError, counted, one_line

try:
    import fcntl
except ImportError:                 # Windows has none
    fcntl = None                    # type: ignore[assignment]

VERSION = 1                         # to be increased when images are decoded or resized in another way
HELD = {errno.EWOULDBLOCK, errno.EAGAIN}        # what flock answers where another process holds the lock
IMAGES_PER_WORKER = 64              # for fewer, starting a process takes longer than what it saves

log = logging.getLogger("loopctl")


class CachedImages(Dataset[Any]):
    """`dataset`, a folder data set of torchvision, with its images read from a file in the folder `cache`.

    The file has each image with a shorter side of `side` pixels, and a smaller image as it is. `dataset.transform`
    takes a tensor of uint8, which must not be written to; of a smaller image a Pillow image, as without the cache, so
    that it is resized to the same pixels.

    `open` makes the file where it is missing, damaged, or of other images: the names, sizes and times of the image
    files are compared. A data set that was not opened opens itself when it is read.

    folder: that of the images
    read: returns the image in a file as an array of height x width x 3 bytes
    made_by: what else decides on the pixels, such as versions
    label: how a message begins; the index of a sample comes next
    """

    def __init__(self, dataset: Any, cache: Path, folder: Path, side: int, read: Callable[[str], Any], made_by: str,
                 label: str) -> None:
        self.dataset, self.folder, self.side, self.read, self.label = dataset, folder.resolve(), side, read, label
        root = hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:8]
        self.file = cache.expanduser().absolute() / f"{folder.name}-{side}-{root}.images"
        self.made_by, self.fingerprint = made_by, b""
        self.images: ImageFile | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "dataset" or name.startswith("__"):      # asked for while it is unpickled; another way to read
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"images": None}         # another process maps the file itself

    def __len__(self) -> int:
        return len(self.dataset.samples)

    def __getitem__(self, number: int) -> Any:
        self.open()
        assert self.images is not None
        pixels = self.images[number]
        small = min(pixels.shape[:2]) < self.side
        image = Image.fromarray(pixels.numpy()) if small else pixels.permute(2, 0, 1)
        return self.dataset.transform(image), self.dataset.targets[number]

    def open(self) -> None:
        """Map the file, and make it first where that is needed. Raises UsageError where it cannot be made."""
        if self.images is not None:
            return
        self.fingerprint = self.fingerprint or self.find_fingerprint()
        reason = ""
        try:
            if not (reason := self.reason_to_build()):
                return
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.file.parent) as alone:
                if reason := self.reason_to_build():        # else another process has made it meanwhile
                    self.build(reason, alone)
                    self.images = ImageFile(self.file, self.fingerprint, len(self))
        except OSError as error:
            fact = f"{reason}, and cannot be made" if reason else "cannot be read"
            raise UsageError(f"{self.file} {fact} ({error.strerror or error}); choose another folder as cache"
                             ) from error

    def find_fingerprint(self) -> bytes:
        """A hash of what decides on the pixels: names, sizes and times of the image files, the side, `made_by`."""
        known = hashlib.sha256(f"{VERSION} {self.side} {self.made_by}".encode())
        for path, _ in self.dataset.samples:
            try:
                status = os.stat(path)
                state = f"{status.st_size} {status.st_mtime_ns}"
            except OSError:                 # reported when the image is read
                state = "missing"
            known.update(os.fsencode(os.path.relpath(path, self.folder)) + f"\0{state}\0".encode())
        return known.digest()

    def reason_to_build(self) -> str:
        """Map the file, or return why that cannot be done."""
        try:
            self.images = ImageFile(self.file, self.fingerprint, len(self))
        except FileNotFoundError:
            return "does not exist"
        except Unusable as error:
            return str(error)
        return ""

    def build(self, reason: str, alone: bool) -> None:
        """Write the file, whole or not at all. alone: no other process writes it now. Raises OSError, UsageError."""
        count = len(self)
        decoded: Any = CheckedDataset(Decoded(self.dataset.samples, self.read), self.label, None)
        temporary = self.file.with_name(f"{self.file.name}{'' if alone else f'.{os.getpid()}'}.new")
        try:
            with temporary.open("wb") as file:
                tried = range(0, count, max(1, count // 16))
                needed = sum(decoded[number].nbytes for number in tried) / len(tried) * count
                free = shutil.disk_usage(self.file.parent).free
                if needed > free:
                    raise UsageError(f"{self.file} would take about {needed / 1e9:,.1f} GB, and its disk has "
                                     f"{free / 1e9:,.1f} GB free; choose another folder as cache, or make room")
                log.warning("%s %s; it is made now, of %s", one_line(self.file), reason, counted(count, "image"))
                write_images(file, self.fingerprint, count, shown_on_terminal(in_order(decoded, count), count))
            os.replace(temporary, self.file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        log.warning("%s is complete, %s GB", one_line(self.file), f"{self.file.stat().st_size / 1e9:,.2f}")


class Decoded(Dataset[Any]):
    """The images of `samples`, pairs of a path and a class, as `read` returns them."""

    def __init__(self, samples: Any, read: Callable[[str], Any]) -> None:
        self.samples, self.read = samples, read

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> Any:
        return self.read(self.samples[number][0])


def in_order(decoded: Any, count: int) -> Iterator[Any]:
    """Yield the images, decoded by as many processes as there are cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # A loader worker may have no processes of its own.
    workers = 0 if multiprocessing.current_process().daemon else min(cores, count // IMAGES_PER_WORKER)
    # With a generator of its own, the global random-number generators do not change.
    yield from DataLoader(decoded, None, num_workers=workers if workers > 1 else 0, generator=torch.Generator(),
                          collate_fn=unchanged)


def unchanged(pixels: Any) -> Any:
    return pixels


def shown_on_terminal(images: Iterable[Any], count: int) -> Iterator[Any]:
    """Yield the images, with a bar on the terminal if there is one."""
    from rich.console import Console
    from rich.progress import Progress

    console, shown = Console(file=sys.stderr), 0.0
    # Refreshed here, for a thread of its own would be there when loader workers are forked.
    with Progress(console=console, transient=True, auto_refresh=False, disable=not console.is_terminal) as bar:
        task = bar.add_task("caching images", total=count)
        for number, image in enumerate(images, 1):
            yield image
            if time.monotonic() > shown + 0.1:
                bar.update(task, completed=number, refresh=True)
                shown = time.monotonic()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a lock on `folder`, for which others wait. Yield whether there is one: some file systems have none."""
    if fcntl is None:
        yield False
        return
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield lock(handle, folder)
    finally:
        os.close(handle)


def lock(handle: int, folder: Path) -> bool:
    """Lock an open folder, after waiting where that is needed. Return whether that is possible."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD:
            return False
        log.warning("waiting for another process, which makes a cache in %s", one_line(folder))
        fcntl.flock(handle, fcntl.LOCK_EX)
    return True
