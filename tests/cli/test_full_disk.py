"""A disk that is full or read-only, or a folder that was deleted: no checkpoint is lost, and one line reports the failure."""
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, fit, hookimpl
from loopctl.checkpoint.atomic_files import save_checkpoint, save_weights
from loopctl.checkpoint.finding import checkpoints_in, find_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs resource limits and mounts of Linux")
cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)

FORK_SERVER = """
import gc, json, os, resource, sys
import torch._dynamo, torchvision.models
import loopctl.cli.data, loopctl.cli.train, loopctl.plugins.checkpoint, loopctl.plugins.csv

torch.set_num_threads(1)
gc.freeze()
for line in sys.stdin:
    folder, limit, *words = json.loads(line)
    ends = [os.pipe(), os.pipe()]
    child = os.fork()
    if not child:
        break
    for _, write in ends:
        os.close(write)
    outputs = []                    # they are short: neither pipe fills up while the other is read
    for read, _ in ends:
        with open(read) as stream:
            outputs.append(stream.read())
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *outputs]), flush=True)
else:
    os._exit(0)
# The forked process continues here: it runs `loopctl` with these words and a limit on the size of its files.
os.chdir(folder)
for number, (read, write) in enumerate(ends, 1):
    os.dup2(write, number)
    os.close(read)
    os.close(write)
if limit is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    loopctl.cli.main(words)
except SystemExit as end:
    sys.stdout.flush()
    os._exit(end.code)              # the usual exit would take longer than the run
"""

# A plugin that, from epoch `since` to epoch `until`, limits the size of files, or does something to the run's folder once.
FULL = """
import resource, shutil, subprocess
from dataclasses import dataclass
from loopctl import hookimpl

@dataclass(eq=False)
class Full:
    size: int = -1
    since: int = 2
    until: int = 99
    do: str = ""

    @hookimpl
    def before_step(self, run):
        if run.resume:
            return
        within = self.since <= run.epoch + 1 < self.until
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size if within else -1, -1))
        do, self.do = (self.do, "") if within else ("", self.do)
        if do == "delete":
            shutil.rmtree(run.out)
        elif do == "block":
            shutil.rmtree(run.out / "checkpoints")
            (run.out / "checkpoints").touch()
        elif do == "lock":
            subprocess.run(["mount", "-o", "remount,ro", run.out.absolute().parent], check=True)
"""


@pytest.fixture(scope="module")
def fork_server():
    """A process that has imported everything, and forks a process for each call of `loopctl run`."""
    process = subprocess.Popen([sys.executable, "-c", FORK_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(*words, folder, limit=None):
        process.stdin.write(json.dumps([str(folder), limit, "run", "--without", "progress", *map(str, words)]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


@pytest.fixture
def loopctl(fork_server, tmp_path):
    """Call `loopctl run` in a new process whose files cannot grow beyond `limit` bytes. Return its stdout, and the lines of stderr."""
    (tmp_path / "full.py").write_text(FULL)

    def call(*words, folder=tmp_path, limit=None, status=0):
        exit_status, out, errors = fork_server(*words, folder=folder, limit=limit)
        assert exit_status == status, errors
        assert "Traceback" not in errors
        return out, errors.splitlines()
    return call


@pytest.fixture
def disk(tmp_path):
    """A mounted disk of 1 MB; the test is skipped if it cannot be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder, free=0):
    """Fill the disk up to `free` bytes, rounded to a page."""
    (folder / "filler").unlink(missing_ok=True)
    disk = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - free)))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_result(one, other):
    """Two runs' folders have the same final weights and metrics."""
    for name in ("weights.safetensors", "metrics.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def unwritten_files(lines):
    """The files that these messages report as not written. Each message has the reason and what happens instead."""
    files = []
    for line in lines:
        match = re.fullmatch(r"(csv|checkpoint): (\S+) cannot be written \(([A-Z][a-z -]+)\); (.*)", line)
        assert match, line
        assert match[4] == "trying again after the next epoch" if match[1] == "csv" else re.fullmatch(
            r"there is no checkpoint yet|the last checkpoint is \S+", match[4])
        files.append(match[2])
    return files


# `loopctl run` with a limit on the size of files


LINEAR = ["--model", "linear", "--epochs", 4, "--out"]


@pytest.fixture(scope="module")
def whole(fork_server, tmp_path_factory):
    """The folder of a run without failures."""
    folder = tmp_path_factory.mktemp("whole")
    assert fork_server(*LINEAR, "a", folder=folder)[0] == 0
    return folder / "a"


def test_a_run_continues_with_a_warning_when_a_checkpoint_cannot_be_written(loopctl, whole, tmp_path):
    """The limit leaves room for smaller files: they are written, and the run finishes."""
    out, errors = loopctl(*LINEAR, "a", "--plugin", "full.py:Full:size=5000")
    assert unwritten_files(errors) == [f"a/checkpoints/step-000000{step}.pt" for step in (46, 69, 92)]
    assert all(line.endswith("(File too large); the last checkpoint is a/checkpoints/step-00000023.pt") for line in errors)
    assert out.splitlines()[-2:] == ["finished: 4 epochs, 92 updates", "run folder: a"]
    assert sorted(contents(tmp_path / "a")) == [
        "checkpoints/best.pt", "checkpoints/best.safetensors", "checkpoints/step-00000023.pt", "data.json", "explain.txt", "metrics.csv", "run.toml",
        "weights.safetensors"]
    assert_same_result(tmp_path / "a", whole)
    assert find_checkpoint(tmp_path / "a")[1]["counters"]["step"] == 23


def test_when_no_file_can_be_written_training_continues_and_ends_with_an_error(loopctl, whole, tmp_path):
    out, errors = loopctl(*LINEAR, "a", "--plugin", "full.py:Full:size=0", status=1)
    assert unwritten_files(errors[:-1]) == [name for step in (46, 69, 92) for name in (
        "a/checkpoints/best.safetensors", "a/metrics.csv", f"a/checkpoints/step-000000{step}.pt")]
    assert errors[-1] == "error: a/weights.safetensors cannot be written (File too large); use loopctl run --resume a to try again"
    assert "finished" not in out
    assert sorted(contents(tmp_path / "a")) == [
        "checkpoints/best.pt", "checkpoints/best.safetensors", "checkpoints/step-00000023.pt", "data.json", "explain.txt", "metrics.csv", "run.toml"]
    assert (tmp_path / "a" / "metrics.csv").read_text() == "".join((whole / "metrics.csv").read_text().splitlines(True)[:2])
    _, errors = loopctl("--resume", "a")
    assert errors == []
    assert_same_result(tmp_path / "a", whole)


def test_resuming_a_complete_run_writes_its_missing_final_weights(loopctl, whole, tmp_path):
    """Nothing is trained again."""
    loopctl(*LINEAR, "a")
    (tmp_path / "a" / "weights.safetensors").unlink()
    before = contents(tmp_path / "a")
    _, errors = loopctl("--resume", "a", limit=0, status=1)
    assert errors == ["error: a/weights.safetensors cannot be written (File too large); use loopctl run --resume a to try again"]
    assert contents(tmp_path / "a") == before
    out, errors = loopctl("--resume", "a")
    assert out.splitlines() == ["finished: 4 epochs, 92 updates", "run folder: a"]
    assert errors == []
    assert_same_result(tmp_path / "a", whole)


def test_when_the_limit_is_lifted_the_next_checkpoints_are_written(loopctl, whole, tmp_path):
    _, errors = loopctl(*LINEAR, "a", "--plugin", "full.py:Full:size=0,until=4")
    assert len(unwritten_files(errors)) == 6
    assert_same_result(tmp_path / "a", whole)
    assert [path.name for path in checkpoints_in(tmp_path / "a" / "checkpoints")] == ["step-00000092.pt", "step-00000023.pt"]
    assert find_checkpoint(tmp_path / "a")[1]["counters"]["step"] == 92
    assert (tmp_path / "a/checkpoints/best.safetensors").read_bytes() == (whole / "checkpoints/best.safetensors").read_bytes()


@pytest.mark.parametrize(("size", "files"), [
    (0, ["best.safetensors", "metrics.csv", "step-00000023.pt"]), (5000, ["step-00000023.pt"])])
def test_a_run_resumed_without_any_checkpoint_starts_from_the_beginning(size, files, loopctl, whole, tmp_path):
    """Also if the file of the best weights could be written."""
    _, errors = loopctl("--model", "linear", "--epochs", 1, "--out", "a", "--plugin", f"full.py:Full:size={size},since=1",
                        status=0 if size else 1)
    assert [name.rpartition("/")[2] for name in unwritten_files(errors[:len(files)])] == files
    assert all(line.endswith("; there is no checkpoint yet") for line in errors[:len(files)] if "csv" not in line)
    (tmp_path / "a" / "weights.safetensors").unlink(missing_ok=True)        # otherwise the run counts as finished
    _, errors = loopctl("--resume", "a", "--epochs", 4)
    assert errors == ["a has no checkpoint yet; training from the beginning"]
    assert_same_result(tmp_path / "a", whole)


@pytest.mark.parametrize("limit", [100, 600])
def test_a_run_that_cannot_write_its_configuration_does_not_start(limit, loopctl, tmp_path):
    """With these limits run.toml, or explain.txt after it, cannot be written. The new folder is removed again."""
    _, errors = loopctl(*LINEAR, "a", limit=limit, status=1)
    assert errors == ["error: a cannot be written: File too large"]
    assert not (tmp_path / "a").exists()


def test_a_resumed_run_that_cannot_write_its_configuration_loses_nothing(loopctl, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "a")
    before = contents(tmp_path / "a")
    _, errors = loopctl("--resume", "a", "--epochs", 5, limit=100, status=1)
    assert errors == ["error: a cannot be written: File too large"]
    assert contents(tmp_path / "a") == before


# `loopctl run` on a small disk


def test_no_checkpoint_is_lost_when_the_disk_is_full(loopctl, disk, whole):
    loopctl("--model", "linear", "--epochs", 2, "--out", "a", folder=disk)
    before = contents(disk / "a")
    fill(disk)
    _, errors = loopctl("--resume", "a", "--epochs", 4, folder=disk, status=1)
    assert errors == ["error: a cannot be written: No space left on device"]
    assert contents(disk / "a") == before
    fill(disk, 12_288)                      # three pages: enough for the small files, too little for a checkpoint
    out, errors = loopctl("--resume", "a", "--epochs", 4, folder=disk)
    assert unwritten_files(errors) == ["a/checkpoints/step-00000069.pt", "a/checkpoints/step-00000092.pt"]
    assert all(line.endswith("(No space left on device); the last checkpoint is a/checkpoints/step-00000046.pt") for line in errors)
    assert contents(disk / "a")["checkpoints/step-00000046.pt"] == before["checkpoints/step-00000046.pt"]
    assert "finished: 4 epochs, 92 updates" in out
    assert not list(disk.rglob("*.new"))
    assert_same_result(disk / "a", whole)


def test_a_read_only_disk_is_refused_before_training(loopctl, disk, tmp_path):
    loopctl("--model", "linear", "--epochs", 1, "--out", "a", folder=disk)
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    result = loopctl(*LINEAR, "b", folder=disk, status=2)
    assert result == ("", ["error: --out b cannot be written: Read-only file system; choose another folder"])
    result = loopctl("--resume", "a", "--epochs", 2, folder=disk, status=2)
    assert result == ("", [f"error: csv: a/metrics.csv cannot be written ({disk}/a is not a writable folder); choose another path"])
    result = loopctl(*LINEAR, "c", "--plugin", f"checkpoint:dir={disk}/c", status=2)
    reason = f"({disk} is not a writable folder)"
    assert result == ("", [f"error: checkpoint: {disk}/c cannot be written {reason}; choose another dir"])
    assert contents(disk) == before
    assert not (tmp_path / "c").exists()


def test_a_disk_that_becomes_read_only_during_training(loopctl, disk, whole):
    _, errors = loopctl(*LINEAR, "disk/a", "--plugin", "full.py:Full:do=lock", status=1)
    assert len(unwritten_files(errors[:-1])) == 9
    assert all("(Read-only file system)" in line for line in errors)
    assert errors[-1].startswith("error: disk/a/weights.safetensors cannot be written ")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    loopctl("--resume", "disk/a")
    assert_same_result(disk / "a", whole)


def test_a_run_folder_deleted_during_training_is_made_again(loopctl, whole, tmp_path):
    _, errors = loopctl(*LINEAR, "a", "--plugin", "full.py:Full:do=delete")
    assert errors == []
    assert_same_result(tmp_path / "a", whole)
    assert find_checkpoint(tmp_path / "a")[1]["counters"]["step"] == 92


def test_a_run_continues_when_a_file_replaces_its_checkpoint_folder(loopctl, whole, tmp_path):
    _, errors = loopctl(*LINEAR, "a", "--plugin", "full.py:Full:do=block")
    assert len(unwritten_files(errors)) == 6
    assert_same_result(tmp_path / "a", whole)


# `fit` in Python


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.2), nn.Linear(40, 3))


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(5)]


def run(out, *plugins, **settings):
    return fit(small_model(), cross_entropy, sgd, batches(), batches()[:1], epochs=3, seed=1, out=out,
               plugins=["checkpoint:every_steps=1", "csv", *plugins], **settings)


class FillDisk:
    """Leaves `free` bytes on the disk from step `since` to step `until`."""

    def __init__(self, disk, free, since=7, until=9):
        self.disk, self.free, self.since, self.until = disk, free, since, until

    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == self.since:
            fill(self.disk, self.free)
        if run.attempts == self.until:
            (self.disk / "filler").unlink()


class CallBefore:
    """Calls `function(run)` before one step."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == self.step:
            self.function(run)


@pytest.mark.parametrize("free", [0, 4096, 8192, 12288, 16384, 65536])
def test_fit_continues_while_the_disk_is_full(free, disk, tmp_path, same, caplog):
    whole = run(tmp_path / "whole")
    done = run(disk, FillDisk(disk, free))
    same(done.model, whole.model)
    assert repr(done.history) == repr(whole.history)
    assert (disk / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert unwritten_files(caplog.messages) == ([] if free > 20000 else [f"{disk}/checkpoints/step-0000000{step}.pt" for step in (8, 9)])
    assert not list(disk.rglob("*.new"))
    assert find_checkpoint(disk)[1]["counters"]["step"] == 15


def test_fit_resumes_from_the_last_checkpoint_before_the_disk_was_full(disk, tmp_path, same):
    def interrupt(run):
        raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(disk, FillDisk(disk, 0, until=99), CallBefore(9, interrupt))
    assert [path.name for path in checkpoints_in(disk / "checkpoints")] == ["step-00000007.pt", "step-00000006.pt"]
    (disk / "filler").unlink()
    same(run(disk, resume=disk).model, whole.model)


@pytest.mark.parametrize("step", [0, 8])
def test_a_signal_while_the_disk_is_full_ends_the_run_without_a_checkpoint(step, disk, caplog):
    """The exit status is 1, not the one of a saved run."""
    def send(run):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        run(disk, FillDisk(disk, 0, since=step and 7, until=99), CallBefore(step, send))
    assert end.value.code == 1
    not_written, ended = caplog.messages[-2:]
    assert unwritten_files([not_written])
    assert ended.startswith("checkpoint: stopped by SIGTERM after ")
    assert ended.endswith(f"; resume continues from {disk}/checkpoints/step-00000007.pt" if step else "; there is no checkpoint to resume from")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The content of a checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    run(folder)
    return find_checkpoint(folder)[1]


def test_a_file_is_written_or_the_old_one_kept_for_any_free_space(disk, saved):
    """The free space grows page by page. No temporary file is left."""
    count = 0
    for name, write in (("a.pt", partial(save_checkpoint, saved)), ("a.safetensors", partial(save_weights, nn.Linear(100, 100)))):
        path = disk / name
        write(path)
        complete = path.read_bytes()
        for free in range(0, len(complete) + 8192, 4096):
            path.write_bytes(b"the old one")
            fill(disk, free)
            code = 0
            try:
                write(path)
            except OSError as error:
                code = error.errno
            assert (code, path.read_bytes()) in [(errno.ENOSPC, b"the old one"), (0, complete)]
            count += code > 0
            (disk / "filler").unlink()
            assert [file.name for file in disk.iterdir()] == [name]
        path.unlink()
    assert count > 8


TRY_ALL_LIMITS = """
import errno, resource, sys
from functools import partial
from pathlib import Path
import torch
from loopctl.checkpoint.atomic_files import save_checkpoint, save_weights

folder = Path(sys.argv[1])
saved = torch.load(folder / "saved", weights_only=True)
for name, write in (("a.pt", partial(save_checkpoint, saved)), ("a.safetensors", partial(save_weights, torch.nn.Linear(50, 50)))):
    path = folder / name
    write(path)
    complete = path.read_bytes()
    for limit in [*range(0, len(complete), 251), *range(len(complete) - 50, len(complete) + 1)]:
        path.write_bytes(b"the old one")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        try:
            write(path)
        except OSError as error:
            assert error.errno == errno.EFBIG, error
            assert path.read_bytes() == b"the old one"
            assert limit < len(complete)
        else:
            assert path.read_bytes() == complete
            assert limit == len(complete)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        assert {file.name for file in folder.iterdir()} == {"saved", name}
    path.unlink()
print("done")
"""


def test_a_file_is_written_or_the_old_one_kept_for_any_size_limit(saved, tmp_path):
    """The limit grows byte by byte at the end of the file, where the checksum is."""
    torch.save(saved, tmp_path / "saved")
    done = subprocess.run([sys.executable, "-c", TRY_ALL_LIMITS, tmp_path], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_folder_deleted_while_fit_runs_is_made_again(tmp_path, same, caplog):
    whole = run(tmp_path / "whole")
    done = run(tmp_path / "part", CallBefore(7, lambda run: shutil.rmtree(run.out)))
    same(done.model, whole.model)
    assert contents(tmp_path / "part").keys() - {"checkpoints/best.pt", "checkpoints/best.safetensors"} == {
        "metrics.csv", "checkpoints/step-00000014.pt", "checkpoints/step-00000015.pt"}
    assert (tmp_path / "part" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert not caplog.messages


def test_folders_with_the_names_of_checkpoints_do_not_stop_a_run(tmp_path, same):
    """An old checkpoint that should be removed is a folder of the user's, and is kept."""
    def make_folders(run):
        for name in ("step-00000003.pt", "step-00000009.pt", "old.new"):
            (run.out / "checkpoints" / name / "below").mkdir(parents=True)

    whole, done = run(tmp_path / "whole"), run(tmp_path / "part", CallBefore(7, make_folders))
    same(done.model, whole.model)
    assert find_checkpoint(tmp_path / "part")[1]["counters"]["step"] == 15
    for name in ("step-00000003.pt", "step-00000009.pt", "old.new"):
        assert (tmp_path / "part" / "checkpoints" / name / "below").exists()
