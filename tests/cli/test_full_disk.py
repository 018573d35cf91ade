"""A disk that fills up, may only be read or is gone: nothing good is lost, and one line says what could not be written."""
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
from loopctl.checkpoint.state import checkpoints_in, find_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs limits and mounts as Linux has them")
cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)

NURSERY = """
import gc, json, os, resource, sys
import sklearn.datasets, torch._dynamo, torchvision.models
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
    said = []                       # it is little: neither pipe fills up while the other is read
    for read, _ in ends:
        with open(read) as stream:
            said.append(stream.read())
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *said]), flush=True)
else:
    os._exit(0)
# From here on it is as if `loopctl` had been called with these words, and a limit to the size of its files.
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
    os._exit(end.code)              # taking down all that is imported takes longer than all else
"""

# From one epoch to another no file may grow beyond a size; or something is done to the folder.
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
def nursery():
    """A process that has imported everything, and forks one that runs what it is told."""
    process = subprocess.Popen([sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(*words, place, limit=None):
        process.stdin.write(json.dumps([str(place), limit, "run", "--without", "progress", *map(str, words)]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


@pytest.fixture
def loopctl(nursery, tmp_path):
    """Call `loopctl run` in a process of its own, no file of which may grow beyond `limit` bytes; its output and its errors."""
    (tmp_path / "full.py").write_text(FULL)

    def call(*words, place=tmp_path, limit=None, status=0):
        ended, out, errors = nursery(*words, place=place, limit=limit)
        assert ended == status, errors
        assert "Traceback" not in errors
        return out, errors.splitlines()
    return call


@pytest.fixture
def disk(tmp_path):
    """A folder that holds 1 MB, where one may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder, free=0):
    """Leave `free` bytes on the disk, to a page."""
    (folder / "filler").unlink(missing_ok=True)
    room = os.statvfs(folder)
    (folder / "filler").write_bytes(bytes(max(0, room.f_bavail * room.f_frsize - free)))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same_end(one, other):
    for name in ("weights.safetensors", "metrics.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def failed(lines):
    """The files that could not be written, by lines which say so, why, and what there is instead."""
    found = []
    for line in lines:
        match = re.fullmatch(r"(csv|checkpoint): (\S+) cannot be written \(([A-Z][a-z -]+)\); (.*)", line)
        assert match, line
        assert match[4] == "the next epoch tries again" if match[1] == "csv" else re.fullmatch(
            r"there is none yet|the last one is \S+", match[4])
        found.append(match[2])
    return found


# `loopctl run`, where files may not grow beyond a limit


LINEAR = ["--model", "linear", "--epochs", 4, "--out"]


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory):
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert nursery(*LINEAR, "a", place=folder)[0] == 0
    return folder / "a"


def test_a_checkpoint_that_cannot_be_written_is_a_line(loopctl, whole, tmp_path):
    """There is room for small files: all else is written, and the run ends well."""
    out, errors = loopctl(*LINEAR, "a", "--plugin", "full.py:Full:size=5000")
    assert failed(errors) == [f"a/checkpoints/step-000000{step}.pt" for step in (46, 69, 92)]
    assert all(line.endswith("(File too large); the last one is a/checkpoints/step-00000023.pt") for line in errors)
    assert out.splitlines()[-2:] == ["finished: 4 epochs, 92 updates", "run folder: a"]
    assert sorted(contents(tmp_path / "a")) == [
        "checkpoints/best.pt", "checkpoints/best.safetensors", "checkpoints/step-00000023.pt", "explain.txt", "metrics.csv", "run.toml",
        "weights.safetensors"]
    same_end(tmp_path / "a", whole)
    assert find_checkpoint(tmp_path / "a")[1]["counters"]["step"] == 23


def test_where_nothing_can_be_written_training_goes_on_and_the_end_is_an_error(loopctl, whole, tmp_path):
    out, errors = loopctl(*LINEAR, "a", "--plugin", "full.py:Full:size=0", status=1)
    assert failed(errors[:-1]) == [name for step in (46, 69, 92) for name in (
        "a/checkpoints/best.safetensors", "a/metrics.csv", f"a/checkpoints/step-000000{step}.pt")]
    assert errors[-1] == "error: a/weights.safetensors cannot be written (File too large); loopctl run --resume a tries again"
    assert "finished" not in out
    assert sorted(contents(tmp_path / "a")) == [
        "checkpoints/best.pt", "checkpoints/best.safetensors", "checkpoints/step-00000023.pt", "explain.txt", "metrics.csv", "run.toml"]
    assert (tmp_path / "a" / "metrics.csv").read_text() == "".join((whole / "metrics.csv").read_text().splitlines(True)[:2])
    _, errors = loopctl("--resume", "a")
    assert errors == []
    same_end(tmp_path / "a", whole)


def test_weights_that_could_not_be_written_are_when_there_is_room(loopctl, whole, tmp_path):
    """The run itself is over: nothing is trained again."""
    loopctl(*LINEAR, "a")
    (tmp_path / "a" / "weights.safetensors").unlink()
    before = contents(tmp_path / "a")
    _, errors = loopctl("--resume", "a", limit=0, status=1)
    assert errors == ["error: a/weights.safetensors cannot be written (File too large); loopctl run --resume a tries again"]
    assert contents(tmp_path / "a") == before
    out, errors = loopctl("--resume", "a")
    assert out.splitlines() == ["finished: 4 epochs, 92 updates", "run folder: a"]
    assert errors == []
    same_end(tmp_path / "a", whole)


def test_when_there_is_room_again_everything_is_written_again(loopctl, whole, tmp_path):
    _, errors = loopctl(*LINEAR, "a", "--plugin", "full.py:Full:size=0,until=4")
    assert len(failed(errors)) == 6
    same_end(tmp_path / "a", whole)
    assert [path.name for path in checkpoints_in(tmp_path / "a" / "checkpoints")] == ["step-00000092.pt", "step-00000023.pt"]
    assert find_checkpoint(tmp_path / "a")[1]["counters"]["step"] == 92
    assert (tmp_path / "a/checkpoints/best.safetensors").read_bytes() == (whole / "checkpoints/best.safetensors").read_bytes()


@pytest.mark.parametrize(("size", "files"), [
    (0, ["best.safetensors", "metrics.csv", "step-00000023.pt"]), (5000, ["step-00000023.pt"])])
def test_without_a_first_checkpoint_it_begins_again(size, files, loopctl, whole, tmp_path):
    """Also where there was room for the best weights."""
    _, errors = loopctl("--model", "linear", "--epochs", 1, "--out", "a", "--plugin", f"full.py:Full:size={size},since=1",
                        status=0 if size else 1)
    assert [name.rpartition("/")[2] for name in failed(errors[:len(files)])] == files
    assert all(line.endswith("; there is none yet") for line in errors[:len(files)] if "csv" not in line)
    (tmp_path / "a" / "weights.safetensors").unlink(missing_ok=True)        # else it would be finished
    _, errors = loopctl("--resume", "a", "--epochs", 4)
    assert errors == ["a has no checkpoint yet; beginning at the start"]
    same_end(tmp_path / "a", whole)


@pytest.mark.parametrize("limit", [100, 600])
def test_a_run_that_cannot_write_what_it_is_made_of_does_not_begin(limit, loopctl, tmp_path):
    """run.toml, or explain.txt after it; the folder is taken away again."""
    _, errors = loopctl(*LINEAR, "a", limit=limit, status=1)
    assert errors == ["error: a cannot be written: File too large"]
    assert not (tmp_path / "a").exists()


def test_a_run_that_goes_on_and_cannot_write_loses_nothing(loopctl, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "a")
    before = contents(tmp_path / "a")
    _, errors = loopctl("--resume", "a", "--epochs", 5, limit=100, status=1)
    assert errors == ["error: a cannot be written: File too large"]
    assert contents(tmp_path / "a") == before


# `loopctl run` on a small disk


def test_a_disk_that_fills_up_loses_no_checkpoint(loopctl, disk, whole):
    loopctl("--model", "linear", "--epochs", 2, "--out", "a", place=disk)
    before = contents(disk / "a")
    fill(disk)
    _, errors = loopctl("--resume", "a", "--epochs", 4, place=disk, status=1)
    assert errors == ["error: a cannot be written: No space left on device"]
    assert contents(disk / "a") == before
    fill(disk, 12_288)                      # three pages: for the small files, but for no checkpoint
    out, errors = loopctl("--resume", "a", "--epochs", 4, place=disk)
    assert failed(errors) == ["a/checkpoints/step-00000069.pt", "a/checkpoints/step-00000092.pt"]
    assert all(line.endswith("(No space left on device); the last one is a/checkpoints/step-00000046.pt") for line in errors)
    assert contents(disk / "a")["checkpoints/step-00000046.pt"] == before["checkpoints/step-00000046.pt"]
    assert "finished: 4 epochs, 92 updates" in out
    assert not list(disk.rglob("*.new"))
    same_end(disk / "a", whole)


def test_a_disk_that_may_only_be_read_is_refused_before_training(loopctl, disk, tmp_path):
    loopctl("--model", "linear", "--epochs", 1, "--out", "a", place=disk)
    before = contents(disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    refused = loopctl(*LINEAR, "b", place=disk, status=2)
    assert refused == ("", ["error: --out b cannot be written: Read-only file system; choose another folder"])
    refused = loopctl("--resume", "a", "--epochs", 2, place=disk, status=2)
    assert refused == ("", [f"error: csv: a/metrics.csv cannot be written ({disk}/a is no folder that can be written to); choose another path"])
    refused = loopctl(*LINEAR, "c", "--plugin", f"checkpoint:dir={disk}/c", status=2)
    why = f"({disk} is no folder that can be written to)"
    assert refused == ("", [f"error: checkpoint: {disk}/c cannot be written {why}; choose another dir"])
    assert contents(disk) == before
    assert not (tmp_path / "c").exists()


def test_a_disk_that_may_only_be_read_from_some_time_on(loopctl, disk, whole):
    _, errors = loopctl(*LINEAR, "disk/a", "--plugin", "full.py:Full:do=lock", status=1)
    assert len(failed(errors[:-1])) == 9
    assert all("(Read-only file system)" in line for line in errors)
    assert errors[-1].startswith("error: disk/a/weights.safetensors cannot be written ")
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    loopctl("--resume", "disk/a")
    same_end(disk / "a", whole)


def test_a_folder_that_is_deleted_meanwhile_is_made_again(loopctl, whole, tmp_path):
    _, errors = loopctl(*LINEAR, "a", "--plugin", "full.py:Full:do=delete")
    assert errors == []
    same_end(tmp_path / "a", whole)
    assert find_checkpoint(tmp_path / "a")[1]["counters"]["step"] == 92


def test_a_file_where_the_folder_was_is_a_line_and_no_more(loopctl, whole, tmp_path):
    _, errors = loopctl(*LINEAR, "a", "--plugin", "full.py:Full:do=block")
    assert len(failed(errors)) == 6
    same_end(tmp_path / "a", whole)


# Python


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Dropout(0.2), nn.Linear(40, 3))


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(5)]


def run(out, *plugins, **settings):
    return fit(small(), cross_entropy, sgd, batches(), batches()[:1], epochs=3, seed=1, out=out,
               plugins=["checkpoint:every_steps=1", "csv", *plugins], **settings)


class Space:
    """Leaves so many bytes on the disk, for some steps."""

    def __init__(self, disk, free, since=7, until=9):
        self.disk, self.free, self.since, self.until = disk, free, since, until

    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == self.since:
            fill(self.disk, self.free)
        if run.attempts == self.until:
            (self.disk / "filler").unlink()


class Look:
    """Does something before a step, and looks on besides."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == self.step:
            self.do(run)


@pytest.mark.parametrize("free", [0, 4096, 8192, 12288, 16384, 65536])
def test_fit_goes_on_while_there_is_no_space(free, disk, tmp_path, same, caplog):
    whole = run(tmp_path / "whole")
    done = run(disk, Space(disk, free))
    same(done.model, whole.model)
    assert repr(done.history) == repr(whole.history)
    assert (disk / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert failed(caplog.messages) == ([] if free > 20000 else [f"{disk}/checkpoints/step-0000000{step}.pt" for step in (8, 9)])
    assert not list(disk.rglob("*.new"))
    assert find_checkpoint(disk)[1]["counters"]["step"] == 15


def test_fit_goes_on_from_what_was_good_when_the_space_ended(disk, tmp_path, same):
    def die(run):
        raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(disk, Space(disk, 0, until=99), Look(9, die))
    assert [path.name for path in checkpoints_in(disk / "checkpoints")] == ["step-00000007.pt", "step-00000006.pt"]
    (disk / "filler").unlink()
    same(run(disk, resume=disk).model, whole.model)


@pytest.mark.parametrize("step", [0, 8])
def test_a_signal_while_there_is_no_space(step, disk, caplog):
    """It leaves without a checkpoint of its own, which its status says too."""
    def send(run):
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as end:
        run(disk, Space(disk, 0, since=step and 7, until=99), Look(step, send))
    assert end.value.code == 1
    written, left = caplog.messages[-2:]
    assert failed([written])
    assert left.startswith("checkpoint: left on SIGTERM after ")
    assert left.endswith(f"; resume continues from {disk}/checkpoints/step-00000007.pt" if step else "; there is no checkpoint to resume from")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The state of a run."""
    folder = tmp_path_factory.mktemp("saved")
    run(folder)
    return find_checkpoint(folder)[1]


def test_wherever_in_the_file_the_space_ends(disk, saved):
    """Page by page: it is written, or the old one stays, and nothing besides."""
    count = 0
    for name, write in (("a.pt", partial(save_checkpoint, saved)), ("a.safetensors", partial(save_weights, nn.Linear(100, 100)))):
        path = disk / name
        write(path)
        good = path.read_bytes()
        for free in range(0, len(good) + 8192, 4096):
            path.write_bytes(b"the old one")
            fill(disk, free)
            why = 0
            try:
                write(path)
            except OSError as error:
                why = error.errno
            assert (why, path.read_bytes()) in [(errno.ENOSPC, b"the old one"), (0, good)]
            count += why > 0
            (disk / "filler").unlink()
            assert [one.name for one in disk.iterdir()] == [name]
        path.unlink()
    assert count > 8


SWEEP = """
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
    good = path.read_bytes()
    for limit in [*range(0, len(good), 251), *range(len(good) - 50, len(good) + 1)]:
        path.write_bytes(b"the old one")
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))
        try:
            write(path)
        except OSError as error:
            assert error.errno == errno.EFBIG, error
            assert path.read_bytes() == b"the old one"
            assert limit < len(good)
        else:
            assert path.read_bytes() == good
            assert limit == len(good)
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        assert {one.name for one in folder.iterdir()} == {"saved", name}
    path.unlink()
print("done")
"""


def test_wherever_in_the_file_the_limit_is(saved, tmp_path):
    """Byte by byte at its end, where the checksum is."""
    torch.save(saved, tmp_path / "saved")
    done = subprocess.run([sys.executable, "-c", SWEEP, tmp_path], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr) == ("done\n", "")


def test_a_folder_that_is_deleted_while_fit_runs(tmp_path, same, caplog):
    whole = run(tmp_path / "whole")
    done = run(tmp_path / "part", Look(7, lambda run: shutil.rmtree(run.out)))
    same(done.model, whole.model)
    assert contents(tmp_path / "part").keys() - {"checkpoints/best.pt", "checkpoints/best.safetensors"} == {
        "metrics.csv", "checkpoints/step-00000014.pt", "checkpoints/step-00000015.pt"}
    assert (tmp_path / "part" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert not caplog.messages


def test_what_cannot_be_taken_away_stops_nothing(tmp_path, same):
    """Somebody's folders under the names of checkpoints."""
    def put(run):
        for name in ("step-00000003.pt", "step-00000009.pt", "old.new"):
            (run.out / "checkpoints" / name / "below").mkdir(parents=True)

    whole, done = run(tmp_path / "whole"), run(tmp_path / "part", Look(7, put))
    same(done.model, whole.model)
    assert find_checkpoint(tmp_path / "part")[1]["counters"]["step"] == 15
    for name in ("step-00000003.pt", "step-00000009.pt", "old.new"):
        assert (tmp_path / "part" / "checkpoints" / name / "below").exists()
