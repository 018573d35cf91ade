"""Values of tensors on the host, without waiting for the device."""
from __future__ import annotations

from math import nan

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor that travels to the host while the device works on.

    From CUDA the copy is asynchronous. On the CPU it has arrived at once. From other devices it is made when it is
    waited for.
    """

    def __init__(self, value: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        self.value = value.detach().clone()         # the tensor itself may be filled in place
        if value.is_cuda:
            self.value = self.value.to("cpu", non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(value.device))

    @property
    def arrived(self) -> bool:
        """Whether the value can be read without waiting."""
        return self.event.query() if self.event else self.value.is_cpu

    def wait(self) -> Tensor:
        """The value, on the host; waits for it if it has not arrived."""
        if self.event:
            self.event.synchronize()
        return self.value.cpu()


class LatestValue:
    """The latest known value of a scalar that is asked for again and again, such as the loss in a progress bar.

    On CUDA it may be that of the time before; elsewhere the host waits for the device.
    """

    def __init__(self) -> None:
        self.known = nan
        self.copy: HostCopy | None = None

    def update(self, value: Tensor | float) -> float:
        """Send `value` to the host unless another one is still on its way; return the latest that has arrived."""
        if not (isinstance(value, Tensor) and value.is_cuda):
            return float(value)
        if self.copy is None:
            self.copy = HostCopy(value)
        elif self.copy.arrived:
            self.known, self.copy = float(self.copy.wait()), HostCopy(value)
        return self.known
