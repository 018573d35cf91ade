"""`Data`: a classification data set with training and validation parts, and the DataLoaders over it."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from loopctl.data import on_device
from loopctl.data.memory import check_memory
from loopctl.errors import UsageError


@dataclass(frozen=True, eq=False)
class Data:
    """A classification data set: (image, class) samples to train on and to validate on."""

    train: Dataset[Any]
    valid: Dataset[Any]
    classes: int
    shape: tuple[int, int, int]      # channels, height, width

    # Used where the whole data set is held on the device, see on_device.py.
    name: str = ""
    on_device: bool = False
    pictures: bool = False           # the sets hold all images as uint8 in .data, and .transform takes a batch of them
    unaugmented: Dataset[Any] | None = None                  # `train` without its random augmentation
    augment: Callable[[Tensor], Tensor] | None = None        # that random augmentation, for a whole batch

    def loaders(self, batch_size: int, workers: int, device: torch.device) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return DataLoaders over `train`, reshuffled in each epoch, and `valid`, in order. Pinned memory for a GPU.

        Raises UsageError where a batch does not fit in memory, or `workers` is far above the number of cores.
        """
        limit = max(64, 4 * (os.cpu_count() or 1))
        if workers > limit:
            raise UsageError(f"--workers {workers:,} is too many processes for this machine; use {limit} or fewer")
        images = min(batch_size, len(self.train))        # type: ignore[arg-type]
        check_memory(f"a batch of {images:,} images of {'x'.join(map(str, self.shape))}", 4 * images * prod(self.shape),
             "use a smaller --batch-size, or smaller images")
        if self.on_device:
            return on_device.loaders(self, batch_size, workers, device)

        def loader(part: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
            # Not persistent_workers: those draw their base seed once, not in every epoch. Their random numbers would
            # differ from a plain DataLoader's, and from those of a resumed run.
            return DataLoader(part, batch_size, shuffle, num_workers=workers, pin_memory=device.type == "cuda")
        return loader(self.train, True), loader(self.valid, False)
