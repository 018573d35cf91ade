"""A lock on a folder, so that two runs never write to it at once."""
from __future__ import annotations

import errno
import json
import os
import socket
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from weakref import WeakSet

from loopctl.errors import UsageError

try:
    import fcntl
except ImportError:                 # Windows has none
    fcntl = None                    # type: ignore[assignment]

RUN = ".lock"                       # locks the folder of a run of the command line
CHECKPOINTS = ".checkpoints.lock"   # locks a folder that a plugin writes checkpoints to, which may be the same folder
# What flock answers where another process holds the lock, and where a file system has no locks, as some have none.
HELD = {errno.EWOULDBLOCK, errno.EAGAIN}
UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


class LostLock(Exception):
    """The folder's lock file is gone or another one, so another process may write to the folder."""


class FolderLock:
    """A lock on `folder`, a context manager. It ends with the process, however that ends.

    It is a lock of `flock` on the file `name` in the folder, which says who holds it. Forked processes, such as loader
    workers, let go of it at once, so that it ends with the process itself and not with the last of its workers.

    Raises UsageError where another process, or another run of this process, holds the lock.
    """

    def __init__(self, folder: Path, name: str = RUN) -> None:
        self.folder, self.file = folder, folder / name
        self.handle: int | None = None

    def __enter__(self) -> FolderLock:
        if fcntl is None:
            self.warn("this system has no file locks")
            return self
        while self.handle is None:
            try:
                handle = lock_file(self.file)
            except OSError as error:
                if error.errno in HELD:
                    raise UsageError(f"{self.folder} is in use by {describe(read_holder(self.file))}; wait until it "
                                     "ends, or choose another folder") from None
                if error.errno in UNSUPPORTED:
                    self.warn(f"its file system has no locks ({error.strerror})")
                return self             # else the folder cannot be written to, which is checked elsewhere
            if same_file(self.file, handle):
                self.handle = handle
            else:                       # its holder has just removed it
                os.close(handle)
        held.add(self)
        text = json.dumps({"host": socket.gethostname(), "process": os.getpid(),
                           "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"})
        with suppress(OSError):         # on a full disk it says nothing of its holder
            self.file.write_text(text)
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the file, and release the lock with it."""
        if self.handle is not None and same_file(self.file, self.handle):
            with suppress(OSError):
                self.file.unlink()
        self.release()

    def release(self) -> None:
        """Close this process's handle. The lock ends where no other process has one."""
        if self.handle is not None:
            os.close(self.handle)
            self.handle = None

    def check(self) -> None:
        """Raise LostLock where the file that is locked is no longer the one in the folder.

        A folder that was deleted as a whole is made again and locked again: nothing of another process is in it.
        """
        if self.handle is None or same_file(self.file, self.handle):
            return
        if self.folder.is_dir():
            raise LostLock(f"{self.file} was removed or replaced, so another process may use the folder; "
                           "this run ends without writing any more")
        # All of them at once: if one were made with what is around it, the lock of that would seem to be lost.
        deleted = [lock for lock in held if lock.handle is not None and not lock.folder.is_dir()]
        for lock in deleted:
            lock.release()
            with suppress(OSError):         # where it cannot be made, plugins say so when they write
                lock.folder.mkdir(parents=True, exist_ok=True)
                lock.__enter__()

    def warn(self, reason: str) -> None:
        from loopctl.checkpoint.atomic_files import warn_once  # it imports torch, which `loopctl runs` does not

        warn_once(self.folder, f"{self.folder} is not locked: {reason}; do not resume this run twice at once", "lock")


held: WeakSet[FolderLock] = WeakSet()


def release_all() -> None:
    """Close this process's handles of all locks."""
    for lock in held:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=release_all)


def is_locked(file: Path) -> bool:
    """Whether a process holds the lock on `file`. Where the file system has no locks: whether the file exists."""
    try:
        handle = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if fcntl is None:
            return True
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return error.errno in HELD | UNSUPPORTED
    finally:
        os.close(handle)


def lock_file(file: Path) -> int:
    """Open `file`, make it if there is none, and lock it. Raises OSError."""
    # Not for writing, which would keep a disk from being mounted read-only; but NFS wants that for a lock.
    for flags in (os.O_RDONLY, os.O_RDWR):
        handle = os.open(file, flags | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError as error:
            os.close(handle)
            if error.errno != errno.EBADF or flags == os.O_RDWR:
                raise
    raise AssertionError("not reached")


def same_file(file: Path, handle: int) -> bool:
    """Whether `file` is the open file `handle`."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except OSError:
        return False


def read_holder(file: Path) -> dict[str, Any]:
    """What the process that holds the lock has written about itself; empty where that cannot be read."""
    try:
        content = json.loads(file.read_bytes()[:1000])
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def describe(holder: dict[str, Any]) -> str:
    process, host, since = (str(holder.get(key, ""))[:100] for key in ("process", "host", "since"))
    if not process:
        return "another process"
    return f"process {process} on {host}" + f", since {since}" * bool(since)
