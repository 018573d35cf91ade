"""`loopctl run --devices 0,1`, and torchrun: processes as users start them."""
import os
import subprocess
import sys
import time
import tomllib

import pytest
from safetensors.torch import load_file

from loopctl.cli import main

SETTINGS = ["--model", "linear", "--epochs", "6", "--batch-size", "32", "--plugin", "checkpoint:every_steps=5", "--plugin", "cosine"]

# Ends one of the processes in the first attempt, in one way or another.
ENDS = '''
import os
from dataclasses import dataclass
from loopctl import hookimpl

@dataclass(eq=False)
class Ends:
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
    return subprocess.run([*launcher, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, env=environment)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    place = tmp_path_factory.mktemp("undisturbed")
    return place / "a", loopctl("run", "--devices", "0,1", *SETTINGS, "--out", "a", cwd=place)


def test_one_command_trains_in_two_processes_and_one_of_them_speaks(undisturbed):
    out, done = undisturbed
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("epoch 6/6") == 1
    assert "cpu, 2 processes" in done.stdout
    assert done.stdout.count("run folder: a") == 1
    resolved = tomllib.loads((out / "run.toml").read_text())
    assert resolved["devices"] == "0,1"
    assert resolved["device"] == "cpu"
    assert resolved["plugin"][0].startswith("ddp:")         # which nobody named
    assert "effective batch  64 samples" in (out / "explain.txt").read_text()


def test_killed_and_started_again_by_torchrun_it_ends_with_the_same_bits(undisturbed, tmp_path):
    (tmp_path / "ends.py").write_text(ENDS)
    done = loopctl("run", "--plugin", "ddp", *SETTINGS, "--plugin", "ends.py:Ends:how=killed", cwd=tmp_path,
                   launcher=(*TORCHRUN, "--max-restarts", "1", "-m", "loopctl"))
    assert done.returncode == 0, done.stderr
    (out,) = (tmp_path / "runs").iterdir()                  # the second attempt has found the folder of the first
    assert (out / "metrics.csv").read_bytes() == (undisturbed[0] / "metrics.csv").read_bytes()
    there, here = (load_file(run / "weights.safetensors") for run in (undisturbed[0], out))
    assert all(bool((there[name] == here[name]).all()) for name in there)


@pytest.mark.parametrize(("how", "status", "line"), [
    ("killed", 137, "error: process 1 was ended by SIGKILL, and the others with it"),
    ("raises", 1, "error: process 1: ValueError: the disk is full of holes, raised by plugin 'ends' in its hook after_step; --traceback shows where"),
])
def test_where_one_fails_all_end_soon_and_say_so_once(tmp_path, how, status, line):
    (tmp_path / "ends.py").write_text(ENDS)
    began = time.monotonic()
    done = loopctl("run", "--devices", "0,1", *SETTINGS, "--plugin", f"ends.py:Ends:how={how}", "--out", "a", cwd=tmp_path)
    assert done.returncode == status
    assert done.stderr.strip() == line
    assert time.monotonic() - began < 60            # a process that waits for another one waits for half an hour


# Says, after all else, which threads a process still has when Python ends.
THREADS = '''
import atexit, os, sys

@atexit.register
def threads():
    names = [open(f"/proc/self/task/{one}/comm").read().strip() for one in os.listdir("/proc/self/task")]
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


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="tells threads by Linux's /proc")
@pytest.mark.parametrize("text", [COMMAND, SCRIPT], ids=["command", "script"])
def test_no_thread_of_the_process_group_outlives_it(tmp_path, text):
    """One that lets go of a tensor while Python ends would end the process by SIGABRT, now and then."""
    (tmp_path / "trains.py").write_text(THREADS + text)
    done = loopctl("trains.py", cwd=tmp_path, launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith("threads: ")]
    assert len(said) == 2
    assert not [line for line in said if "gloo" in line]


# One process fails while its gradients are on their way, and the other does not come to meet them.
MEETS_NOBODY = '''
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


def test_a_failure_is_said_though_nobody_meets_its_gradients(tmp_path):
    (tmp_path / "parts.py").write_text(MEETS_NOBODY)
    began = time.monotonic()
    done = loopctl("run", "--devices", "0,1", "--model", "parts.py:Net", "--plugin", "ddp:bucket_cap_mb=1", "--plugin", "parts.py:Parts",
                   "--out", "a", cwd=tmp_path)
    assert done.returncode == 1
    assert "error: process 1: ValueError: half of a backward pass" in done.stderr
    assert time.monotonic() - began < 60


def test_processes_that_nobody_joins_are_refused(tmp_path):
    done = loopctl("run", *SETTINGS, "--out", "a", cwd=tmp_path, launcher=(*TORCHRUN, "-m", "loopctl"))
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: torchrun has started 2 processes, and no plugin has them train together; add ddp"]
    assert not (tmp_path / "a").exists()


def explained(capsys, *arguments):
    with pytest.raises(SystemExit):
        main(["explain", *arguments])
    return capsys.readouterr().out


@pytest.mark.parametrize("plugin", ["ddp", "fsdp"])
def test_explain_plans_processes_that_are_not_there(capsys, plugin):
    said = explained(capsys, "--devices", "0,1,2", "--plugin", plugin, "--plugin", "accumulate:every=2", "--device", "cpu")
    assert "updates          80: 20 epochs of 4, 2 micro-batches each" in said      # 23 batches, 8 for each
    assert "processes        3, each with batches of 64 samples" in said
    assert "effective batch  384 samples" in said


def test_one_device_is_one_process(capsys):
    said = explained(capsys, "--devices", "0", "--device", "cpu")
    assert "processes" not in said
    assert "ddp" not in said
