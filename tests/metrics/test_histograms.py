"""Histograms on the device, against torch's."""
import math

import pytest
import torch

from loopctl.metrics.histograms import BINS, bin_edges, histogram


@pytest.mark.parametrize("values", [torch.randn(1000), torch.randn(20, 30).bfloat16(), torch.arange(65.0), torch.zeros(7), torch.tensor(3.0)])
@pytest.mark.compares(use="tensorboard:histogram_steps", technique="histograms of weights and gradients", source="torch.histc", tolerance="to the bit")
def test_the_counts_are_those_of_torch(values):
    low, high, total, squares, *counts = histogram(values).tolist()
    exact = values.float().flatten()
    assert (low, high) == (exact.min().item(), exact.max().item())
    assert (total, squares) == (exact.sum().item(), exact.square().sum().item())
    if high > low:
        assert counts == torch.histc(exact, BINS, low, high).tolist()
    else:
        assert counts == [len(exact)] + [0] * (BINS - 1)


def test_the_edges_enclose_the_values():
    edges = bin_edges(-1.0, 3.0)
    assert (len(edges), edges[-1]) == (BINS, 3.0)
    assert edges[0] == -1.0 + 4 / BINS
    assert bin_edges(2.0, 2.0)[-1] == 3.0


def test_values_that_are_not_finite_are_left_out():
    found = histogram(torch.tensor([1.0, math.nan, math.inf, 2.0, -math.inf]))
    assert torch.equal(found, histogram(torch.tensor([1.0, 2.0])))
    low, high, *_, counts = *histogram(torch.tensor([math.nan])).tolist()[:4], histogram(torch.tensor([math.nan]))[4:].sum().item()
    assert (low > high, counts) == (True, 0)
