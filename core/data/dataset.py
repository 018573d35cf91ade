"""A classification data set, and the loaders that give its batches."""
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

    # For data held on the device as a whole, see on_device.py.
    name: str = ""
    on_device: bool = False
    pictures: bool = False           # the sets have all pictures as bytes, in .data, and .transform takes many at once
    still: Dataset[Any] | None = None                        # `train` without what is done to it at random, ...
    augment: Callable[[Tensor], Tensor] | None = None        # ... and what does that to a whole batch

    def loaders(self, batch_size: int, workers: int, device: torch.device) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Batches of `train`, shuffled anew each epoch, and of `valid`, in order; in pinned memory for a GPU.

        Raises UsageError where a batch, or the processes that load it, are more than this machine bears.
        """
        most = max(64, 4 * (os.cpu_count() or 1))
        if workers > most:
            raise UsageError(f"--workers {workers:,} is too many processes for this machine; use {most} or fewer")
        images = min(batch_size, len(self.train))        # type: ignore[arg-type]
        check_memory(f"a batch of {images:,} images of {'x'.join(map(str, self.shape))}", 4 * images * prod(self.shape),
             "use a smaller --batch-size, or smaller images")
        if self.on_device:
            return on_device.loaders(self, batch_size, workers, device)

        def loader(part: Dataset[Any], shuffle: bool) -> DataLoader[Any]:
            # Workers that persist would draw their seed once and not every epoch: other random numbers than those of
            # the plain DataLoader, and of a run that went on in between.
            return DataLoader(part, batch_size, shuffle, num_workers=workers, pin_memory=device.type == "cuda")
        return loader(self.train, True), loader(self.valid, False)
