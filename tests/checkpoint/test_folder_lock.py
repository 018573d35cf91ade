"""The lock on a folder: who is refused, when it ends, and what is noticed when it is lost."""
import errno
import os
import signal
import socket
import subprocess
import sys

import pytest

from loopctl import UsageError
from loopctl.checkpoint import atomic_files, folder_lock
from loopctl.checkpoint.folder_lock import FolderLock, LostLock

HOLD = """
import sys, time
from pathlib import Path
from loopctl.checkpoint.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with process:
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """A warning is logged once per process; here once per test."""
    monkeypatch.setattr(atomic_files, "warned", set())


def taken(folder):
    with FolderLock(folder):
        return True


def test_a_second_process_is_refused_with_the_first_ones_host_and_number(tmp_path, holder):
    with pytest.raises(UsageError, match=f"is in use by process {holder.pid} on {socket.gethostname()}, since 2"):
        taken(tmp_path)


def test_a_stopped_process_holds_it_still(tmp_path, holder):
    holder.send_signal(signal.SIGSTOP)
    with pytest.raises(UsageError, match="in use"):
        taken(tmp_path)


def test_it_ends_with_the_process(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert taken(tmp_path)


FORK = """
import os, sys, time
from pathlib import Path
from loopctl.checkpoint.folder_lock import FolderLock
ready, started = os.pipe()
with FolderLock(Path(sys.argv[1])):
    child = os.fork()
    if not child:
        os.write(started, b".")
        time.sleep(60)
    os.read(ready, 1)               # the child runs, and has let go of the lock
    print(child, flush=True)
    time.sleep(60)
"""


def test_a_forked_process_does_not_hold_it(tmp_path):
    """A loader's worker may live some seconds longer than the run."""
    process = subprocess.Popen([sys.executable, "-c", FORK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try:
        process.kill()
        process.wait()
        assert taken(tmp_path)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def test_it_can_be_taken_again_after_it_was_released_and_leaves_no_file(tmp_path):
    assert taken(tmp_path)
    assert not [*tmp_path.iterdir()]
    assert taken(tmp_path)


def test_the_file_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()
    with FolderLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_file_that_its_holder_removes_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """The first file that is opened is removed before it is locked, as by a run that ends just then."""
    real, calls = folder_lock.fcntl.flock, []

    def remove_first(handle, how):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(handle)
        return real(handle, how)
    monkeypatch.setattr(folder_lock.fcntl, "flock", remove_first)
    with FolderLock(tmp_path) as lock:
        assert len(calls) == 2
        lock.check()


RACE = """
import sys, time, random
from pathlib import Path
from loopctl import UsageError
from loopctl.checkpoint.folder_lock import FolderLock
folder, held, got = Path(sys.argv[1]), Path(sys.argv[1]) / "held", 0
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        with FolderLock(folder):
            held.mkdir()                # fails where two hold it at once
            time.sleep(random.random() / 1000)
            held.rmdir()
            got += 1
    except UsageError:
        pass
print(got)
"""


def test_of_four_processes_that_lock_and_release_all_the_time_never_two_hold_it(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", RACE, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [process.communicate() for process in processes]
    assert [errors for _, errors in answers] == [""] * 4
    assert sum(int(count) for count, _ in answers) > 20


@pytest.mark.parametrize("lose", [lambda file: file.unlink(), lambda file: (file.unlink(), file.touch()),
                                  lambda file: (file.parent.rename(file.parent.with_name("moved")), file.parent.mkdir())],
                         ids=["removed", "replaced", "folder replaced"])
def test_a_lost_lock_is_noticed(tmp_path, lose):
    folder = tmp_path / "run"
    folder.mkdir()
    with FolderLock(folder) as lock:
        lock.check()
        lose(folder / ".lock")
        with pytest.raises(LostLock, match="another process may use the folder"):
            lock.check()


def test_a_folder_that_was_deleted_is_made_and_locked_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with FolderLock(folder) as lock:
        folder.rename(tmp_path / "moved")
        lock.check()
        assert (folder / ".lock").exists()
        lock.check()
    assert not [*folder.iterdir()]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b'{"process": {"a": 1}}', b'{"host": "x"}', b"0" * 5000])
def test_what_is_in_the_file_is_not_trusted(tmp_path, holder, content):
    (tmp_path / ".lock").write_bytes(content)
    with pytest.raises(UsageError, match="is in use by (another )?process") as error:
        taken(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    with FolderLock(tmp_path) as lock:
        lock.check()
    assert caplog.messages == [f"{tmp_path} is not locked: its file system has no locks ({os.strerror(number)}); do not resume this run twice at once"]


def test_a_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(folder_lock, "fcntl", None)
    with FolderLock(tmp_path) as lock:
        lock.check()
    assert "this system has no file locks" in caplog.text
