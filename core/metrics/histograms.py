"""Histograms of tensors, computed on their device without waiting for it."""
from __future__ import annotations

from math import inf

import torch
from torch import Tensor

BINS = 64


@torch.no_grad()
def histogram(values: Tensor) -> Tensor:
    """Return the least and the largest value, the sum, the sum of squares, and the counts of `BINS` bins between the
    two, as one vector. Values that are not finite are left out; of a sharded tensor it is this process's part."""
    values = values.to_local() if hasattr(values, "to_local") else values
    values = values.detach().reshape(-1).float()
    finite = values.isfinite()
    low, high = torch.where(finite, values, inf).amin(), torch.where(finite, values, -inf).amax()
    known = torch.where(finite, values, 0.0)
    width = torch.where(high > low, high - low, 1.0)
    places = ((known - low) / width * BINS).long().clamp(0, BINS - 1)       # the largest value is in the last bin
    counts = torch.zeros(BINS, device=values.device).index_add_(0, places, finite.float())
    return torch.cat([torch.stack([low, high, known.sum(), known.square().sum()]), counts])


def bin_edges(low: float, high: float) -> list[float]:
    """The upper edges of the bins."""
    width = (high - low if high > low else 1.0) / BINS
    return [low + width * (index + 1) for index in range(BINS)]
