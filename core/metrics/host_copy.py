"""Asynchronous copies of tensors to the host, so that a step does not wait for the device."""
from __future__ import annotations

from math import nan

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor to the host that does not make the host wait.

    From CUDA the copy is asynchronous. A CPU tensor is copied at once. From other devices, `wait` makes the copy.
    """

    def __init__(self, value: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.value = value.detach().clone()         # because the tensor itself may be changed in place
        if value.is_cuda:
            self.value = self.value.to("cpu", non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(value.device))

    @property
    def arrived(self) -> bool:
        """Whether `wait` would return at once."""
        return self.event.query() if self.event else self.value.is_cpu

    def wait(self) -> Tensor:
        """Return the value on the host; wait until it has arrived."""
        if self.event:
            self.event.synchronize()
        return self.value.cpu()


class LatestValue:
    """The latest known value of a scalar that is read repeatedly, such as the loss in a progress bar.

    On CUDA it may be the value of an earlier update; on other devices the host waits for the current value.
    """

    def __init__(self) -> None:
        self.known = nan
        self.copy: HostCopy | None = None

    def update(self, value: Tensor | float) -> float:
        """Start a copy of `value` to the host unless one is under way; return the latest value that has arrived."""
        if not (isinstance(value, Tensor) and value.is_cuda):
            return float(value)
        if self.copy is None:
            self.copy = HostCopy(value)
        elif self.copy.arrived:
            self.known, self.copy = float(self.copy.wait()), HostCopy(value)
        return self.known
