"""Small things that many tests train."""
import copy
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread():
    """The same sums in the same order, and no two tests' threads in each other's way."""
    torch.set_num_threads(1)


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
