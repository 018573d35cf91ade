"""A percentile of all values so far, kept on the device, so that no step waits for it."""
from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor


class RunningPercentile:
    """A percentile of the finite values that were added, interpolated linearly as by torch.quantile and NumPy.

    It keeps all values in order, 4 bytes for each in float32, and adding one takes time in proportion to their number.

    percent: 0 for the smallest value, 100 for the largest
    """

    def __init__(self, percent: float) -> None:
        self.fraction = percent / 100
        self.ordered: Any = None    # the values in ascending order, then inf in the places that are free
        self.count: Any = None      # how many there are
        self.added = 0              # how many were added, with those that are not finite: the host does not know count
        self.before: Any = None     # the three of them before the last value

    def add(self, value: Tensor, replace: bool = False) -> Tensor:
        """Add a scalar, and return the percentile; NaN while no value is finite.

        replace: remove the value that was added last, before
        """
        value = value.detach().nan_to_num(inf, inf)
        if replace:
            self.ordered, self.count, self.added = self.before
        elif self.ordered is None:
            self.ordered, self.count = value.new_full((1,), inf), value.new_zeros((), dtype=torch.int64)
        self.before = self.ordered, self.count, self.added
        if self.added == len(self.ordered):
            self.ordered = torch.cat((self.ordered, torch.full_like(self.ordered, inf)))
        # A step of insertion sort: the larger of the value before and the smaller of the value here and the new one.
        inserted = torch.minimum(self.ordered, value)
        inserted[1:] = torch.maximum(self.ordered[:-1], inserted[1:])
        self.ordered, self.count, self.added = inserted, self.count + value.isfinite(), self.added + 1
        precise = torch.float32 if value.device.type == "mps" else torch.float64        # MPS has no float64
        rank = (self.count - 1).clamp(min=0).to(precise) * self.fraction
        below, above = self.ordered.take(rank.floor().long()), self.ordered.take(rank.ceil().long())
        return below.lerp(above, (rank - rank.floor()).to(value.dtype))

    def state_dict(self) -> dict[str, Any]:
        return {"ordered": self.ordered, "count": self.count, "added": self.added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ordered, self.count, self.added = state["ordered"], state["count"], state["added"]
