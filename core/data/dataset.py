"""`Data`: a classification data set with training and validation parts, and the DataLoaders over it."""
from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from loopctl.data import on_device
from loopctl.data.checked_dataset import CheckedDataset
from loopctl.data.limits import find_limit
from loopctl.data.memory import check_memory
from loopctl.errors import UsageError, counted
from loopctl.rng import rng_state, set_rng_state

if TYPE_CHECKING:
    from loopctl.run import Run


@dataclass(frozen=True)
class Preprocessing:
    """How an image file becomes the input of a model, as in validation. The values are plain, to be written to a file.

    An image is resized, cut to the square at its centre, scaled to values from 0 to 1, and normalised by channel.
    """

    mode: Literal["L", "RGB"]        # grey or colour; a grey image is repeated in each channel
    resize: int                      # the shorter side, in pixels
    crop: int                        # the side of the square, in pixels
    mean: tuple[float, ...]          # of each channel
    std: tuple[float, ...]


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

    # What the use of a trained model needs to know.
    class_names: tuple[str, ...] = ()                        # in the order of their numbers; empty if they have none
    preprocessing: Preprocessing | None = None               # of an image file; None if it is not known

    def loaders(self, batch_size: int, workers: int, device: torch.device,
                check_labels: bool = True) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return DataLoaders over `train`, reshuffled in each epoch, and `valid`, in order. Pinned memory for a GPU.

        check_labels: refuse labels that `nn.CrossEntropyLoss` cannot take, now where the data set has them in `targets`
        or `labels` or is of tensors, otherwise when a batch has them; false where a plugin computes another loss

        Raises UsageError where a batch does not fit in memory, or `workers` is far above the number of cores. A sample
        that cannot be read, or has a wrong label, raises a UsageError that names it.
        """
        check_workers(workers)
        images = min(batch_size, len(self.train))        # type: ignore[arg-type]
        check_memory(f"a batch of {counted(images, 'image')} of {'x'.join(map(str, self.shape))}",
                     4 * images * prod(self.shape), "use a smaller --batch-size, or smaller images")
        if check_labels and self.classes < 2:
            raise UsageError(f"data {self.name} has one class, so there is nothing to learn; it needs two or more")
        train, valid = (self.checked(part, kind, check_labels)
                        for part, kind in ((self.train, "training"), (self.valid, "validation")))
        for part in (train, valid):
            part.check_known()
        if self.on_device:
            return on_device.loaders(self, batch_size, workers, device, check_labels)

        def loader(part: CheckedDataset, shuffle: bool) -> DataLoader[Any]:
            # Not persistent_workers: those draw their base seed once, not in every epoch. Their random numbers would
            # differ from a plain DataLoader's, and from those of a resumed run.
            iterable = isinstance(part.dataset, IterableDataset)
            return DataLoader(part.dataset if iterable else part, batch_size, shuffle, num_workers=workers,
                              pin_memory=device.type == "cuda", collate_fn=None if iterable else part.collate)
        return loader(train, True), loader(valid, False)

    def checked(self, part: Dataset[Any], kind: str, check_labels: bool) -> CheckedDataset:
        """Return `part`, a "training" or "validation" set by its `kind`, with errors that name the sample."""
        classes = self.classes if check_labels else None
        return CheckedDataset(part, f"data {self.name}: {kind} sample", classes, self.shape)


def check_workers(workers: int) -> None:
    """Raise UsageError where the number of loader processes is far above the number of cores."""
    limit = max(64, 4 * (os.cpu_count() or 1))
    if workers > limit:
        raise UsageError(f"--workers {workers:,} is too many processes for this machine; use {limit} or fewer")


def check_last_batch(run: Run) -> None:
    """Raise UsageError where the last batch of an epoch has one sample, and a BatchNorm cannot train on that.

    Whether it can depends on what it normalises: a batch of one has many values in each channel of an image. The model
    is tried on one black image, with its modules in the modes they are in; buffers and random numbers are restored.
    """
    loader, norm = run.train, nn.modules.batchnorm._BatchNorm
    shape = getattr(getattr(loader, "dataset", None), "image_shape", None)
    if not shape or not isinstance(loader, DataLoader) or not loader.batch_size or loader.drop_last:
        return
    samples, size = len(loader.sampler), loader.batch_size               # type: ignore[arg-type]
    limit = find_limit(loader)
    cut = run.max_steps < run.plan()[0] or (limit is not None and limit.cuts)
    reached = size == 1 or (samples % size == 1 and not cut)
    if not reached or not any(isinstance(module, norm) and module.training for module in run.model.modules()):
        return
    random = rng_state(loader)
    saved = [(module._buffers, name, buffer, buffer.clone()) for module in run.model.modules()
             for name, buffer in module._buffers.items() if buffer is not None]
    try:
        with torch.no_grad():
            run.model(torch.zeros(1, *shape, device=run.device))
    except Exception as error:              # others are left to the first step, which raises them again
        if isinstance(error, ValueError) and "more than 1 value per channel" in str(error):
            sizes = (other for other in count(size + 1) if samples % other != 1)
            advice = f"use another, such as --batch-size {next(sizes)}" if samples > 1 else "add training samples"
            raise UsageError(f"the last batch of an epoch has 1 sample, of {samples:,} in batches of {size:,}, and "
                             f"BatchNorm cannot train on 1; {advice}") from error
    finally:
        set_rng_state(random, loader)
        with torch.no_grad():
            for buffers, name, buffer, value in saved:
                buffer.copy_(value)
                buffers[name] = buffer
