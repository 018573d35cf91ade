"""Several processes as users start them: `loopctl run --devices 0,1`, and torchrun."""
import os
import subprocess
import sys
import time
import tomllib

import pytest
from safetensors.torch import load_file

from loopctl.cli import main

SETTINGS = ["--model", "linear", "--epochs", "6", "--batch-size", "32", "--plugin", "checkpoint:every_steps=5", "--plugin", "cosine"]

# A plugin that makes the process of rank 1 fail in the first attempt: it is killed, or an exception is raised.
FAIL = '''
import os
from dataclasses import dataclass
from loopctl import hookimpl

@dataclass(eq=False)
class Fail:
    how: str = ""
    observer_only = True

    @hookimpl
    def after_step(self, run):
        if run.rank == 1 and run.step == 42 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            if self.how == "killed":
                os.kill(os.getpid(), 9)
            if self.how == "raises":
                raise ValueError("the disk is full of holes")
'''


def loopctl(*arguments, launcher=(sys.executable, "-m", "loopctl"), cwd):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.run([*launcher, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, env=environment)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder and the result of a run in two processes that no failure interrupts."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder / "a", loopctl("run", "--devices", "0,1", *SETTINGS, "--out", "a", cwd=folder)


def test_devices_trains_in_two_processes_of_which_only_rank_0_prints(uninterrupted):
    out, done = uninterrupted
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("epoch 6/6") == 1
    assert "cpu, 2 processes" in done.stdout
    assert done.stdout.count("run folder: a") == 1
    resolved = tomllib.loads((out / "run.toml").read_text())
    assert resolved["devices"] == "0,1"
    assert resolved["device"] == "cpu"
    assert resolved["plugin"][0].startswith("ddp:")         # added by --devices
    assert "effective batch  64 samples" in (out / "explain.txt").read_text()


def test_a_run_killed_and_restarted_by_torchrun_ends_with_the_same_bits(uninterrupted, tmp_path):
    (tmp_path / "fail.py").write_text(FAIL)
    done = loopctl("run", "--plugin", "ddp", *SETTINGS, "--plugin", "fail.py:Fail:how=killed", cwd=tmp_path,
                   launcher=(*TORCHRUN, "--max-restarts", "1", "-m", "loopctl"))
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "runs").iterdir()                  # the second attempt continues in the folder of the first
    assert (out / "metrics.csv").read_bytes() == (uninterrupted[0] / "metrics.csv").read_bytes()
    expected, restarted = (load_file(run / "weights.safetensors") for run in (uninterrupted[0], out))
    assert all(bool((expected[name] == restarted[name]).all()) for name in expected)


@pytest.mark.parametrize(("how", "status", "line"), [
    ("killed", 137, "error: process 1 was ended by SIGKILL; the other processes were stopped"),
    ("raises", 1, "error: process 1: ValueError: the disk is full of holes, raised by plugin 'fail' in its hook after_step; --traceback shows where"),
])
def test_if_one_process_fails_all_end_soon_with_one_error_message(tmp_path, how, status, line):
    (tmp_path / "fail.py").write_text(FAIL)
    start = time.monotonic()
    done = loopctl("run", "--devices", "0,1", *SETTINGS, "--plugin", f"fail.py:Fail:how={how}", "--out", "a", cwd=tmp_path)
    assert done.returncode == status
    assert done.stderr.strip() == line
    assert time.monotonic() - start < 300            # a collective operation times out only after half an hour


# Prints, last of all exit handlers, the threads that the process still has when Python ends.
THREADS = '''
import atexit, os, sys

@atexit.register
def threads():
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    sys.stdout.write(f"threads: {sorted(names)}\\n")

'''
COMMAND = '''
from loopctl.cli import main
main(["run", "--model", "linear", "--epochs", "1", "--plugin", "ddp", "--plugin", "early_stopping"])
'''
SCRIPT = '''
from functools import partial
import torch
from loopctl import fit
data = [(torch.randn(4, 3), torch.randint(0, 2, (4,))) for _ in range(5)]
run = fit(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, partial(torch.optim.SGD, lr=0.1), data, plugins=["ddp"])
'''


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads the threads from Linux's /proc")
@pytest.mark.parametrize("text", [COMMAND, SCRIPT], ids=["command", "script"])
def test_no_thread_of_the_process_group_is_left_when_python_ends(tmp_path, text):
    """A thread that frees a tensor while Python ends can abort the process with SIGABRT."""
    (tmp_path / "trains.py").write_text(THREADS + text)
    done = loopctl("trains.py", cwd=tmp_path, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("threads: ")]
    assert len(lines) == 2
    assert not [line for line in lines if "gloo" in line]


# Rank 1 fails within its backward pass, when ddp has already started an all_reduce. Rank 0 never joins that all_reduce.
PENDING_ALL_REDUCE = '''
import signal, time
from dataclasses import dataclass
import torch
from torch import nn
from loopctl import hookimpl

class Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        return input.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.5)
        raise ValueError("half of a backward pass")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 600), nn.Linear(600, 600), nn.Linear(600, 10)

    def forward(self, input):
        hidden = self.first(input.flatten(1))
        return self.third(self.second(Fails.apply(hidden) if getattr(self, "fails", False) else hidden))

@dataclass(eq=False)
class Parts:
    @hookimpl
    def before_step(self, run):
        if run.step == 5:
            run.model.fails = run.rank == 1
            if run.rank == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(100)
'''


def test_a_failure_during_an_all_reduce_that_rank_0_never_joins_is_reported(tmp_path):
    (tmp_path / "parts.py").write_text(PENDING_ALL_REDUCE)
    start = time.monotonic()
    done = loopctl("run", "--devices", "0,1", "--model", "parts.py:Net", "--plugin", "ddp:bucket_cap_mb=1", "--plugin", "parts.py:Parts",
                   "--out", "a", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: process 1: ValueError: half of a backward pass" in done.stderr
    assert time.monotonic() - start < 300


def test_processes_of_torchrun_without_ddp_are_refused(tmp_path):
    done = loopctl("run", *SETTINGS, "--out", "a", cwd=tmp_path, launcher=(*TORCHRUN, "-m", "loopctl"))
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: torchrun has started 2 processes, but no plugin makes them train together; add ddp or fsdp"]
    assert not (tmp_path / "a").exists()


def explain(capsys, *arguments):
    with pytest.raises(SystemExit):
        main(["explain", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("plugin", ["ddp", "fsdp"])
def test_explain_shows_the_plan_of_several_processes_without_starting_them(capsys, plugin):
    text = explain(capsys, "--devices", "0,1,2", "--plugin", plugin, "--plugin", "accumulate:every=2", "--device", "cpu")
    assert "updates          80: 20 epochs of 4, 2 micro-batches each" in text      # 23 batches, 8 for each process
    assert "processes        3, each with batches of 64 samples" in text
    assert "effective batch  384 samples" in text


def test_one_device_is_one_process(capsys):
    text = explain(capsys, "--devices", "0", "--device", "cpu")
    assert "processes" not in text
    assert "ddp" not in text
