"""Small things that many tests train, and the processes in which some do."""
import contextlib
import copy
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
from functools import partial
from multiprocessing.connection import Listener, wait
from pathlib import Path

import pytest
import torch
from torch import nn

from loopctl.distributed.process_group import leave_process_group

# The processes that a test begins have one thread too: as many tests as there are cores may be running.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _one_thread():
    """The same sums in the same order, and no two tests' threads in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _alone():
    """`fsdp` in one process is a process group until that ends; the next test is to know nothing of it."""
    yield
    leave_process_group()


@pytest.fixture
def net():
    """A small network with BatchNorm and Dropout, whose state and random numbers a wrong loop disturbs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


@pytest.fixture
def plain():
    """A small network without randomness."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture
def batches():
    """Seven batches of 8 samples, and one of 3."""
    return make_batches([8] * 7 + [3])


@pytest.fixture
def valid():
    """Two batches of different sizes."""
    return make_batches([8, 5], seed=1)


@pytest.fixture
def sgd():
    return partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def make_batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator)) for size in sizes]


# A spec of each built-in that must have options, or that does something in a short run only with some.
EXAMPLES = {
    "accumulate": "every=3", "amp": "dtype=float16", "clip": "max_norm=0.1", "compile": "backend=eager", "cosine_restarts": "t_0=1",
    "cyclic": "base_lr=0.01,max_lr=0.1,step_size_up=3", "early_stopping": "patience=1,min_delta=9,restore_best=true",
    "exponential": "gamma=0.9", "freeze": "patterns=0,until=1ep", "lambda": "lr_lambda=math:exp",
    "layerwise_lr": "decay=0.5,no_decay=true", "lr_finder": "num_steps=5", "multiplicative": "lr_lambda=math:cos", "multistep": "milestones=1",
    "onecycle": "max_lr=0.1", "plateau": "patience=0", "profile": "start=1,steps=2", "step": "step_size=1",
    "ema": "decay=0.9", "swa": "start=50%", "tensorboard": "every_steps=2", "throughput": "peak=1",
    "torch_scheduler": "cls=torch.optim.lr_scheduler:ExponentialLR,gamma=0.9",
    "trapezoidal": "max_lr=0.2,step_size=25%", "warmup": "length=50%",
}


@pytest.fixture
def example():
    """The spec of a built-in by its name."""
    return lambda name: f"{name}:{EXAMPLES[name]}" if name in EXAMPLES else name


@pytest.fixture
def same():
    """Assert that two models have the same weights and buffers, to the last bit or to `tolerance`."""
    def compare(one, other, tolerance=0.0):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    return compare


@pytest.fixture
def clone():
    return copy.deepcopy


@pytest.fixture(scope="session")
def install(tmp_path_factory):
    """Install packages from their folders into a new one, which it returns; needs no network and leaves them as they are."""
    def installed(*folders):
        place = tmp_path_factory.mktemp("installed")
        copies = [shutil.copytree(folder, place / folder.name) for folder in folders]
        done = subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps",
                               "--no-build-isolation", "--target", place / "site", *copies], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return place / "site"
    return installed


class Ranks:
    """Processes that train together. They are kept, for to start one takes seconds."""

    def __init__(self, folder):
        self.listener = Listener(str(folder / "ranks"), backlog=8)
        self.kept = []

    def __call__(self, number, function, *arguments, timeout=100, **environment):
        """Call a function of a test file in each of so many processes. Returns what each returned, by rank; raises what
        one raised, and of those that only missed another one nothing."""
        answers = self.answers(number, function, *arguments, timeout=timeout, **environment)
        errors = [error for _, error in answers if error]
        if errors:
            missed = ("closed by peer", "reset by peer", "gave no answer")
            raise next((error for error in errors if not any(hint in str(error) for hint in missed)), errors[0])
        return [result for result, _ in answers]

    def answers(self, number, function, *arguments, timeout=100, **environment):
        """By rank: what the function returned, and what it raised."""
        while len(self.kept) < number:
            process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("rank.py")), self.listener.address],
                                       env=os.environ | {"OMP_NUM_THREADS": "1"})
            self.kept.append((process, self.listener.accept()))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(number),
                  "TORCHELASTIC_RESTART_COUNT": "0", **environment}
        for rank, (_, wire) in enumerate(self.kept[:number]):
            ranked = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            where = function.__code__.co_filename, function.__module__, function.__name__
            wire.send_bytes(pickle.dumps((*where, ranked)))
            wire.send_bytes(pickle.dumps(arguments))
        found = [None] * number
        wires = {wire: rank for rank, (_, wire) in enumerate(self.kept[:number])}
        while wires:
            answered = wait(wires, timeout)
            for wire in answered:
                rank = wires.pop(wire)
                found[rank] = pickle.loads(wire.recv_bytes())
                if found[rank][1]:
                    timeout = 10            # a process that still waits for this one is told by its end at the latest
            if not answered:
                self.close()
                for rank in wires.values():
                    found[rank] = None, TimeoutError(f"rank {rank} gave no answer in {timeout} seconds")
                break
        return found

    def close(self):
        for process, wire in self.kept:
            wire.close()
            process.kill()
            process.wait()
        self.kept = []


def free_port():
    """A port to listen at. It is below those that the system gives to connections, so that none takes it before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)          # tests seed the other random numbers
        with contextlib.suppress(OSError), socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Call a function of the test's file in several processes: `ranks(2, function, *arguments)`."""
    pool = Ranks(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
    pool.listener.close()
