"""Fixtures for all tests: small models and data, comparison of models, and a pool of processes for distributed tests."""
import contextlib
import copy
import gc
import json
import os
import pickle
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from functools import partial
from multiprocessing.connection import Listener, wait
from pathlib import Path

import pytest
import torch
from torch import nn

from loopctl.distributed import process_group
from loopctl.testing import checks
from loopctl.testing.tiny import tiny_model

# Subprocesses of tests use one thread too, because pytest may run as many tests at once as there are cores.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, so that sums are always added in the same order and parallel tests do not compete for cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_process_group():
    """Destroy the process group after each test, because `fsdp` in one process leaves one behind."""
    yield
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process_group, "sleep", lambda seconds: None)       # what it waits for is needed when Python ends
        process_group.leave_process_group()


@pytest.fixture(scope="session", autouse=True)
def _threads_of_process_groups_end():
    yield
    time.sleep(0.1)


@pytest.fixture(scope="session", autouse=True)
def _few_full_garbage_collections():
    """Collect the oldest generation ten times less often: each time takes as long as twenty tests."""
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], 10 * before[2])
    yield
    gc.set_threshold(*before)


@pytest.fixture(scope="session", autouse=True)
def _no_fsync():
    """Files need not survive a power failure during the tests; waiting for the disk is the slowest part of many of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _short_wait_for_lost_workers():
    """Wait a second, not five, for the workers of a loader that an expected error of a test has left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 1.0)
        yield


@pytest.fixture
def undrawn(monkeypatch):
    """Figures of matplotlib are written as empty files: drawing one takes ten times as long as a short run."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: None)


def discard_compiled(most=0):
    """Discard compiled code if torch has compiled more than `most` functions."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo and dynamo.utils.counters["frames"]["total"] > most:
        dynamo.utils.counters.clear()
        dynamo.reset()


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Discard compiled code after each test: torch stops compiling a forward method after a number of recompilations."""
    discard_compiled()          # of test_pairs.py, which keeps it
    yield
    discard_compiled()


@pytest.fixture
def net():
    """A small network with BatchNorm and Dropout, so that a wrong mode or an extra random number changes the result."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


@pytest.fixture
def plain():
    """A small network without buffers and without randomness."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.fixture
def batches():
    """Seven batches of 8 samples and a last one of 3."""
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


@contextlib.contextmanager
def sync_debug_mode():
    """A function that sets what torch does where the host waits for the GPU, such as "error"; nothing after the block.

    torch warns that its debug mode is a prototype, which would be an error that leaves the mode on for all later tests.
    """
    def set_mode(mode):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
            torch.cuda.set_sync_debug_mode(mode)

    try:
        yield set_mode
    finally:
        set_mode("default")


class ScheduleFree(torch.optim.Optimizer):
    """The arithmetic of schedule-free SGD (arXiv:2405.15682): `train` and `eval` switch between two sets of weights."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta, "train_mode": False, "k": 0})

    @torch.no_grad()
    def switch(self, training):
        for group in self.param_groups:
            if group["train_mode"] != training:
                for parameter in group["params"]:
                    if "z" in self.state[parameter]:
                        weight = 1 - group["beta"] if training else 1 - 1 / group["beta"]
                        parameter.lerp_(self.state[parameter]["z"], weight)
                group["train_mode"] = training

    def train(self):
        self.switch(True)

    def eval(self):
        self.switch(False)

    @torch.no_grad()
    def step(self, closure=None):
        assert self.param_groups[0]["train_mode"], "step in evaluation mode"
        for group in self.param_groups:
            group["k"] += 1
            for parameter in group["params"]:
                z = self.state[parameter].setdefault("z", parameter.clone())
                parameter.lerp_(z, 1 / group["k"])
                parameter.add_(parameter.grad, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["k"]) - 1))
                z.sub_(parameter.grad, alpha=group["lr"])


IMAGES = ("cutmix", "progressive_resizing")         # the plugins that need images


def pool_images(module, arguments):
    """A forward pre-hook with which a network of 6 inputs takes images of 6 channels too."""
    return (arguments[0].mean((2, 3)),) if arguments[0].ndim == 4 else None


def as_images(batches):
    """Batches of images of 6 channels and 8 x 8 pixels, from batches of 6 inputs."""
    pattern = torch.linspace(0.5, 1.5, 64).view(8, 8)
    return [(input[..., None, None] * pattern, target) for input, target in batches]


def teacher_of_images():
    """The teacher of `distill` where another plugin needs images."""
    net = tiny_model()
    net.register_forward_pre_hook(pool_images)
    return net


def data_for(specs, net, *data):
    """The data that plugins need, of batches of 6 inputs: images where one of them needs these, which `net` then takes too."""
    if not any(spec.partition(":")[0] in IMAGES for spec in specs):
        return data
    net.register_forward_pre_hook(pool_images)
    return tuple(map(as_images, data))


# Options for the built-ins that require some, or that have an effect in a short run only with other options than the default.
EXAMPLES = checks.EXAMPLES | {
    "accumulate": "every=3",
    "activation_checkpointing": "modules=*",
    "amp": "dtype=float16",
    "clip": "max_norm=0.1",
    "csv": "every_steps=2",
    "early_stopping": "patience=1,min_delta=9,restore_best=true",
    "ema": "decay=0.9",
    "freeze": "patterns=0,until=1ep",
    "layerwise_lr": "decay=0.5,no_decay=true",
    "lora": "target_modules=0,modules_to_save=4",
    "lr_finder": "num_steps=5",
    "max_time": "limit=1h",
    "mixup": "prob=0.7",
    "norms": "every_steps=2",
    "plateau": "patience=0",
    "profile": "start=1,steps=2",
    "progressive_resizing": "delay_fraction=0.2",
    "selective_backprop": "start=0.1,keep=0.7",
    "spike": "deviations=0.5,warmup=2",
    "tape": "every_steps=2",
    "tensorboard": "every_steps=2,histogram_steps=3",
    "throughput": "peak=1",
    "warmup": "length=50%",
}


# The library that a built-in needs and that may not be installed; its tests are skipped then.
LIBRARIES = {"float8": "torchao", "lora": "peft", "mlflow": "mlflow", "qat": "torchao", "wandb": "wandb"}


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Return the command-line text of a built-in, by its name, with options from EXAMPLES."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())

    def spec(name):
        if name in LIBRARIES:
            pytest.importorskip(LIBRARIES[name])
        return f"{name}:{EXAMPLES[name]}" if name in EXAMPLES else name
    return spec


@pytest.fixture
def same():
    """Assert that two models have equal weights and buffers, bit for bit or within `tolerance`."""
    def compare(one, other, tolerance=0.0):
        for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    return compare


@pytest.fixture
def clone():
    return copy.deepcopy


# What `pip install` calls to build the wheel of the folder, in the third process that it starts.
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="session")
def install(tmp_path_factory):
    """Install copies of package folders, without network access, into a new folder; return that folder."""
    def installed(*folders):
        root = tmp_path_factory.mktemp("installed")
        copies = [shutil.copytree(folder, root / folder.name) for folder in folders]
        for copied in copies:
            done = subprocess.run([sys.executable, "-c", BUILD, root], cwd=copied, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        for wheel in root.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(root / "site")
        return root / "site"
    return installed


class Forked:
    """A process forked from one that has imported everything; used as a subprocess.Popen is.

    words: a command line of `loopctl`, or "rank" and the address of the pool that the process belongs to
    """

    def __init__(self, server, folder, words):
        self.connection, self.returncode = socket.socket(socket.AF_UNIX), None
        self.files = [tempfile.TemporaryFile("w+") for _ in range(2)]        # noqa: SIM115  closed in `close`
        self.connection.connect(server)
        with open(os.devnull) as nothing:
            given = [file.fileno() for file in (nothing, *self.files)]
            socket.send_fds(self.connection, [json.dumps([str(folder), *map(str, words)]).encode()], given)
        self.answers = self.connection.makefile()
        self.pid = int(self.answers.readline())

    def wait(self, timeout=100):
        if self.returncode is None:
            self.connection.settimeout(timeout)
            self.returncode = int(self.answers.readline())
        return self.returncode

    def communicate(self, timeout=100):
        """Wait for its end; return what it printed, and its errors."""
        self.wait(timeout)
        for file in self.files:
            file.seek(0)
        return tuple(file.read() for file in self.files)

    def poll(self):
        return self.wait() if self.returncode is not None or wait([self.connection], 0) else None

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def close(self):
        self.kill()
        self.wait()
        for file in (self.answers, self.connection, *self.files):
            file.close()


class Ranks:
    """A pool of processes that call functions together. They are reused, because each has to import its test files."""

    def __init__(self, server, folder):
        self.server, self.folder = server, folder
        self.listener = Listener(str(folder / "ranks"), backlog=8)
        self.processes = []

    def __call__(self, number, function, *arguments, timeout=100, **environment):
        """Call a function of a test file in `number` processes. Returns what each returned, by rank.

        Raises the error of a process that failed, in preference to errors of processes that only lost their connection to it.
        """
        answers = self.answers(number, function, *arguments, timeout=timeout, **environment)
        errors = [error for _, error in answers if error]
        if errors:
            lost = ("closed by peer", "reset by peer", "gave no answer")
            raise next((error for error in errors if not any(hint in str(error) for hint in lost)), errors[0])
        return [result for result, _ in answers]

    def answers(self, number, function, *arguments, timeout=100, **environment):
        """Call a function in `number` processes. Returns, by rank, what it returned and what it raised, one of them None."""
        while len(self.processes) < number:
            process = Forked(self.server, self.folder, ["rank", self.listener.address])
            self.processes.append((process, self.listener.accept()))
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(number),
                  "TORCHELASTIC_RESTART_COUNT": "0", **environment}
        for rank, (_, connection) in enumerate(self.processes[:number]):
            of_rank = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            called = function.__code__.co_filename, function.__module__, function.__name__
            connection.send_bytes(pickle.dumps((*called, of_rank)))
            connection.send_bytes(pickle.dumps(arguments))
        answers = [None] * number
        waiting = {connection: rank for rank, (_, connection) in enumerate(self.processes[:number])}
        while waiting:
            answered = wait(waiting, timeout)
            for connection in answered:
                rank = waiting.pop(connection)
                answers[rank] = pickle.loads(connection.recv_bytes())
                if answers[rank][1]:
                    timeout = min(timeout, 60)          # processes that communicate with this one fail soon, because it left the group
            if not answered:
                for rank in waiting.values():
                    answers[rank] = None, TimeoutError(f"rank {rank} gave no answer in {timeout} seconds\n{self.stacks(rank)}")
                self.close()
                break
        return answers

    def stacks(self, rank):
        """End a process. Returns what its threads were doing, which faulthandler prints."""
        process, _ = self.processes[rank]
        for number in (signal.SIGABRT, signal.SIGCONT):
            process.send_signal(number)
        return process.communicate()[1]

    def close(self):
        for process, connection in self.processes:
            connection.close()
            process.close()
        self.processes = []


def free_port():
    """Return a free port that neither the system nor another worker of pytest-xdist takes before it is used.

    The system assigns higher ports to connections; each worker has the ports whose remainder is its number.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = random.SystemRandom().randrange(20_000 + worker, 32_000, workers)          # not from the generators that tests seed
        with contextlib.suppress(OSError), socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            return port


@pytest.fixture(scope="session")
def ranks(warm, tmp_path_factory):
    """Call a function of a test file in several processes: `ranks(2, function, *arguments)`."""
    pool = Ranks(warm, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()
    pool.listener.close()


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """The address of the process that tests/warm.py describes. It ends when this process does, or the session."""
    address = str(tmp_path_factory.mktemp("warm") / "socket")
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("warm.py")), address], stdout=subprocess.DEVNULL)
    with socket.socket(socket.AF_UNIX) as connection:
        for _ in range(6000):
            with contextlib.suppress(OSError):
                connection.connect(address)
                break
            time.sleep(0.02)
        yield address
    assert process.wait(60) == 0


@pytest.fixture
def forked(warm, tmp_path):
    """Start `loopctl` in a new process, which is killed at the end of the test: `forked(*words)`, in the folder of the test."""
    processes = []

    def start(*words, cwd=tmp_path):
        processes.append(Forked(warm, cwd, words))
        return processes[-1]
    yield start
    for process in processes:
        process.close()
