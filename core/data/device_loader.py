"""`DeviceLoader`: a DataLoader whose batches are changed on the device, such as images from uint8 to floats."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from loopctl.data.batch import sample_count, to_device
from loopctl.errors import UsageError


class DeviceLoader(DataLoader[Any]):
    """A DataLoader that moves each batch to `device` when it is read, and yields what `batch_transform` makes of it.

    So loader workers and the copy to the device handle the batch as it was collated. `prefetch` has both done on its
    stream, in advance.

    as_collated: yield the batches unchanged, for a copy of the loader whose owner calls `finish`
    """

    def __init__(self, dataset: Any, *positional: Any, device: torch.device, batch_transform: Callable[[Any], Any],
                 **settings: Any) -> None:
        super().__init__(dataset, *positional, **settings)
        self.device, self.batch_transform, self.as_collated = device, batch_transform, False

    def __iter__(self) -> Any:
        batches = super().__iter__()
        return batches if self.as_collated else map(self.finish, batches)

    def finish(self, batch: Any) -> Any:
        """Return a collated batch on the device, transformed. Raises UsageError where its number of samples changes."""
        return transformed(self.batch_transform, to_device(batch, self.device))


def transformed(batch_transform: Callable[[Any], Any], batch: Any) -> Any:
    """Return what `batch_transform` makes of a batch. Raises UsageError where the number of samples changes."""
    samples = sample_count(batch)
    changed = batch_transform(batch)
    if (now := sample_count(changed)) != samples:
        raise UsageError(f"Data: batch_transform returned {now} samples for {samples}; return as many as it is given")
    return changed


class Normalize:
    """A batch_transform: images of uint8, the first part of a batch, become floats from 0 to 1, normalised by channel.

    The numbers are those of torchvision's ToDtype(torch.float32, scale=True) and Normalize(mean, std), to the bit.
    Those would copy mean and std to the device for each batch, and wait for it.

    mean, std: of each channel
    """

    def __init__(self, mean: Any, std: Any) -> None:
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, batch: Any) -> Any:
        images, *rest = batch
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return [images.to(torch.float32).mul_(1 / 255).sub_(self.mean).div_(self.std), *rest]
