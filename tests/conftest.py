"""Small things that many tests train."""
import copy
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
