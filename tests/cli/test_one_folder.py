"""Two processes with the same run folder: the second is refused while the first runs, and the files of the first are kept."""
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

RUN = ["run", "--model", "linear", "--epochs", "3", "--out", "a"]
# A model whose factory makes the file `building`, then waits for the file `go`.
SLOW = """
import time
from pathlib import Path
from torch import nn
def model():
    Path("building").touch()
    while not Path("go").exists():
        time.sleep(0.02)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
# A plugin that makes the file `training` in the second epoch, then waits for the file `go`.
WAIT = """
import time
from dataclasses import dataclass
from pathlib import Path
from loopctl import Run, hookimpl
@dataclass(eq=False)
class Wait:
    \"\"\"Wait.\"\"\"
    observer_only = True
    @hookimpl
    def before_step(self, run: Run) -> None:
        if run.epoch == 1:
            Path("training").touch()
            while not Path("go").exists():
                time.sleep(0.02)
"""


@pytest.fixture
def start(forked, tmp_path):
    """Start `loopctl` in a new process, which is killed at the end of the test. Return the process."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "wait.py").write_text(WAIT)
    return forked


@pytest.fixture
def call(start):
    """Run `loopctl` in a new process. Return its exit status and stderr."""
    def called(*words):
        process = start(*words)
        errors = process.communicate(timeout=100)[1]
        return process.returncode, errors
    return called


def wait_for(path):
    end = time.monotonic() + 150
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not appear"
        time.sleep(0.02)


@pytest.fixture
def training(start, tmp_path):
    """The process of a run that waits in its second epoch for the file `go`."""
    process = start(*RUN, "--plugin", "wait.py:Wait")
    wait_for(tmp_path / "training")
    return process


def finish(process, tmp_path):
    """Let a waiting run continue. Assert that it ends with all its files and without its lock."""
    (tmp_path / "go").touch()
    _, errors = process.communicate(timeout=100)
    assert (process.returncode, errors) == (0, "")
    assert (tmp_path / "a" / "weights.safetensors").exists()
    assert len((tmp_path / "a" / "metrics.csv").read_text().splitlines()) == 4
    assert 'model = "' in (tmp_path / "a" / "run.toml").read_text()
    assert not (tmp_path / "a" / ".lock").exists()


def test_a_run_is_refused_if_another_makes_its_folder_while_it_builds_the_model(start, call, tmp_path):
    """The refused run does not change the files of the other."""
    slow = start(*RUN, "--model", "slow.py:model")
    wait_for(tmp_path / "building")
    assert call(*RUN) == (0, "")
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()}
    (tmp_path / "go").touch()
    _, errors = slow.communicate(timeout=100)
    assert slow.returncode == 2
    assert errors.startswith("error: --out a exists and is not overwritten")
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()} == before


def test_of_two_runs_started_together_one_trains_and_one_is_refused(start, tmp_path):
    """Either of them may be refused."""
    processes = [start(*RUN) for _ in range(2)]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 2]
    assert len("".join(errors).splitlines()) == 1
    assert (tmp_path / "a" / "weights.safetensors").exists()
    assert not (tmp_path / "a" / ".lock").exists()


@pytest.mark.parametrize("words", [["run", "--resume", "a"], RUN], ids=["resume", "start"])
def test_a_second_process_is_refused_while_the_first_trains(training, call, tmp_path, words):
    status, errors = call(*words)
    assert status == 2
    assert len(errors.splitlines()) == 1
    finish(training, tmp_path)


def test_a_run_suspended_by_sigstop_cannot_be_resumed_by_another_process(training, call, tmp_path):
    training.send_signal(signal.SIGSTOP)
    status, errors = call("run", "--resume", "a")
    assert (status, f"a is in use by process {training.pid} on " in errors) == (2, True)
    training.send_signal(signal.SIGCONT)
    finish(training, tmp_path)


def test_of_three_processes_that_resume_a_killed_run_at_least_one_finishes_it(training, start, tmp_path):
    """A process that starts while another one has the folder is refused."""
    training.kill()
    training.communicate()
    (tmp_path / "go").touch()
    processes = [start("run", "--resume", "a") for _ in range(3)]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    finished = sum(process.returncode == 0 for process in processes)
    assert finished >= 1, errors
    assert all(process.returncode in (0, 2) for process in processes), errors
    assert len((tmp_path / "a" / "metrics.csv").read_text().splitlines()) == 4


def test_a_killed_run_can_be_resumed_although_its_lock_file_remains(training, start, tmp_path):
    training.kill()
    training.communicate()
    assert (tmp_path / "a" / ".lock").exists()
    finish(start("run", "--resume", "a"), tmp_path)


@pytest.mark.parametrize("lose", [lambda folder: (folder / ".lock").unlink(), lambda folder: (shutil.copytree(folder, folder.with_name("b")), shutil.rmtree(folder), folder.with_name("b").rename(folder))],
                         ids=["lock removed", "folder replaced"])
def test_a_run_that_loses_its_lock_ends_without_writing(training, tmp_path, lose):
    lose(tmp_path / "a")
    before = written(tmp_path / "a")
    time.sleep(1.1)                 # a run checks its lock once a second
    (tmp_path / "go").touch()
    _, errors = training.communicate(timeout=100)
    assert training.returncode == 1
    assert errors.splitlines()[-1].endswith("so another process may use the folder; this run ends without writing any more")
    assert written(tmp_path / "a") == before


def written(folder):
    """The files in a folder but for locks, which a run removes when it ends."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_a_refused_run_removes_only_what_it_made(call, tmp_path):
    (tmp_path / "a").mkdir()
    assert call(*RUN, "--model", "nothing")[0] == 2
    assert (tmp_path / "a").is_dir()
    assert not [*(tmp_path / "a").iterdir()]
    shutil.rmtree(tmp_path / "a")
    assert call(*RUN, "--model", "nothing")[0] == 2
    assert not (tmp_path / "a").exists()


def test_processes_of_devices_import_nothing_from_the_working_directory(tmp_path):
    for name in ("loopctl", "random", "secrets", "numpy", "torch", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'a').write({name!r})\nraise SystemExit('imported')\n")
    done = subprocess.run([sys.executable, "-P", "-m", "loopctl", *RUN, "--devices", "0,1", "--device", "cpu"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (tmp_path / "trace").exists()
    assert os.path.exists(tmp_path / "a" / "weights.safetensors")
