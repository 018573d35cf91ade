"""`Data`: what is trained and validated on, data sets or loaders, and the DataLoaders over it."""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from loopctl.data import on_device
from loopctl.data.batch import length_or_none, to_device
from loopctl.data.checked_dataset import CheckedDataset
from loopctl.data.device_loader import DeviceLoader
from loopctl.data.image_cache import CachedImages
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
    """What is trained and validated on.

    train, valid: a data set of samples, which has `__len__` and `__getitem__`, or an IterableDataset; or a loader, or
        another iterable of batches, which is used as it is. valid is None without validation, or a dict of several by
        name
    classes: the number of classes, where a sample is a pair (input, class)
    shape: of the input of a sample, such as channels, height and width
    collate_fn, sampler, batch_sampler, drop_last: of the DataLoader over `train`; collate_fn also of that over `valid`
    valid_batch_size: the batch size of `valid`, if it is another than that of `train`
    batch_transform: called with every batch of `train` and `valid` once it is on the device, returns the batch to use,
        with as many samples; such as images that travel as uint8 and become floats there. It draws no random numbers
    """

    train: Any
    valid: Any = None
    classes: int | None = None
    shape: tuple[int, ...] | None = None

    # Used where the whole data set is held on the device, see on_device.py.
    name: str = ""
    on_device: bool = False
    pictures: bool = False           # the sets hold all images as uint8 in .data, and .transform takes a batch of them
    unaugmented: Dataset[Any] | None = None                  # `train` without its random augmentation
    augment: Callable[[Tensor], Tensor] | None = None        # that random augmentation, for a whole batch

    # What the use of a trained model needs to know.
    class_names: tuple[str, ...] = ()                        # in the order of their numbers; empty if they have none
    preprocessing: Preprocessing | None = None               # of an image file; None if it is not known

    # Of the DataLoaders.
    collate_fn: Callable[[list[Any]], Any] | None = None
    sampler: Any = None
    batch_sampler: Any = None
    drop_last: bool = False
    valid_batch_size: int | None = None
    batch_transform: Callable[[Any], Any] | None = None
    numbers: bool = True             # the input has floating-point numbers, so that zeros can take its place in a trial

    def __post_init__(self) -> None:
        classes = self.classes
        if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 1):
            raise UsageError(f"Data: classes is {classes!r}; use the number of classes, or None")
        if self.batch_sampler is not None and (self.sampler is not None or self.drop_last):
            raise UsageError("Data: a batch_sampler draws whole batches, so sampler and drop_last would not be used; "
                             "leave them out")
        if not is_dataset(self.train) and (self.collate_fn or self.sampler is not None or self.drop_last
                                           or self.batch_sampler is not None):
            raise UsageError("Data: train is a loader, so collate_fn, sampler, batch_sampler and drop_last would not "
                             "be used; leave them out, or pass the data set")
        given = next((kind for kind, part in (("train", self.train), *(("valid", part) for part in
                      self.validation_sets.values())) if not is_dataset(part)), "")
        if self.batch_transform is not None and given:
            raise UsageError(f"Data: {given} is a loader, so batch_transform would not be used for it; transform its "
                             "batches yourself, or pass the data set")

    @property
    def needs_batch_size(self) -> bool:
        """Whether a batch size is used: not where loaders or a batch sampler make all batches."""
        return ((is_dataset(self.train) and self.batch_sampler is None)
                or (any(map(is_dataset, self.validation_sets.values())) and self.valid_batch_size is None))

    @property
    def validation_sets(self) -> dict[str, Any]:
        """The validation data by name: of several sets, their names; of a single one, ""."""
        if self.valid is None:
            return {}
        return dict(self.valid) if isinstance(self.valid, Mapping) else {"": self.valid}

    def loaders(self, batch_size: int, workers: int, device: torch.device,
                check_labels: bool = True) -> tuple[Any, Any]:
        """Return DataLoaders over `train`, reshuffled in each epoch, and `valid`, in order. Pinned memory for a GPU.

        What is a loader already is returned unchanged.

        check_labels: refuse labels that `nn.CrossEntropyLoss` cannot take, now where the data set has them in `targets`
        or `labels` or is of tensors, otherwise when a batch has them; false where another loss is computed

        Raises UsageError where a batch does not fit in memory, or `workers` is far above the number of cores. A sample
        that cannot be read, or has a wrong label, raises a UsageError that names it.
        """
        check_workers(workers)
        sets = self.validation_sets
        if workers and not any(map(is_dataset, (self.train, *sets.values()))):
            raise UsageError(f"--workers {workers:,} would have nothing to load: data {self.name} has loaders of its "
                             "own; leave it out")
        if self.shape and (samples := length_or_none(self.train) if is_dataset(self.train) else None):
            size = min(batch_size, samples)
            check_memory(f"a batch of {counted(size, 'sample')} of {'x'.join(map(str, self.shape))}",
                         4 * size * prod(self.shape), "use a smaller --batch-size, or smaller samples")
        if check_labels and self.classes == 1:
            raise UsageError(f"data {self.name} has one class, so there is nothing to learn; it needs two or more, or "
                             "for numbers no `classes` and --loss mse")
        parts = [(self.train, "training"), *((part, "validation") for part in sets.values())]
        for part, _ in parts:
            if isinstance(part, CachedImages):
                part.open()                 # before there are loader workers, which would all make the file
        checked = [self.checked(part, kind, check_labels) if is_dataset(part) else None for part, kind in parts]
        for part in checked:
            if part is not None:
                part.check_known()
        datasets: list[Any] = checked
        if self.on_device:
            datasets = on_device.datasets(self, workers, device, check_labels)
        train, *valid = (given if dataset is None else self.loader(dataset, kind, batch_size, workers, device)
                         for dataset, (given, kind) in zip(datasets, parts, strict=True))
        named = dict(zip(sets, valid, strict=True))
        return train, named if isinstance(self.valid, Mapping) else named.get("")

    def loader(self, dataset: Any, kind: str, batch_size: int, workers: int, device: torch.device) -> DataLoader[Any]:
        """Return the DataLoader over the "training" or the "validation" data set by its `kind`."""
        # Not persistent_workers: those draw their base seed once, not in every epoch. Their random numbers would
        # differ from a plain DataLoader's, and from those of a resumed run.
        settings: dict[str, Any] = {"num_workers": workers, "pin_memory": device.type == "cuda" and not self.on_device}
        iterable = isinstance(dataset, CheckedDataset) and isinstance(dataset.dataset, IterableDataset)
        if self.on_device:
            settings["collate_fn"] = on_device.collate_unchanged
        elif iterable:
            dataset, settings["collate_fn"] = dataset.dataset, self.collate_fn
        else:
            settings["collate_fn"] = (dataset.collate if self.collate_fn is None
                                      else partial(dataset.collate, collate_fn=self.collate_fn))
        make: Any = DataLoader
        # Pictures that are held on the device are transformed once, when they are read.
        if self.batch_transform is not None and not (self.on_device and self.pictures):
            make = partial(DeviceLoader, device=device, batch_transform=self.batch_transform)
        if kind == "validation":
            return make(dataset, self.valid_batch_size or batch_size, **settings)
        if self.batch_sampler is not None:
            return make(dataset, batch_sampler=self.batch_sampler, **settings)
        shuffle = None if iterable else self.sampler is None
        return make(dataset, batch_size, shuffle, self.sampler, drop_last=self.drop_last, **settings)

    def checked(self, part: Dataset[Any], kind: str, check_labels: bool) -> CheckedDataset:
        """Return `part`, a "training" or "validation" set by its `kind`, with errors that name the sample."""
        classes = self.classes if check_labels else None
        shape = self.shape if self.shape and self.numbers else ()
        return CheckedDataset(part, f"data {self.name}: {kind} sample", classes, shape)


def check_workers(workers: int) -> None:
    """Raise UsageError where the number of loader processes is far above the number of cores."""
    limit = max(64, 4 * (os.cpu_count() or 1))
    if workers > limit:
        raise UsageError(f"--workers {workers:,} is too many processes for this machine; use {limit} or fewer")


def is_dataset(part: Any) -> bool:
    """Whether `part` holds samples, which a DataLoader makes batches of. Any other iterable yields batches itself."""
    return not isinstance(part, DataLoader) and (
        isinstance(part, IterableDataset) or (hasattr(part, "__getitem__") and hasattr(part, "__len__")))


def check_last_batch(run: Run, call: Callable[[Any], Any]) -> None:
    """Raise UsageError where the last batch of an epoch has one sample, and a BatchNorm cannot train on that.

    Whether it can depends on what it normalises: a batch of one has many values in each channel of an image. The model
    is tried on one black image, or on the first sample where an input is no tensor of numbers. Its modules are in the
    modes they are in; buffers and random numbers are restored.

    call: calls the model with a batch, as in training
    """
    loader, norm = run.train, nn.modules.batchnorm._BatchNorm
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, CheckedDataset | on_device.OnDeviceDataset):
        return
    if not isinstance(loader, DataLoader) or not loader.batch_size or loader.drop_last:
        return
    samples, size = length_or_none(loader.sampler), loader.batch_size
    if samples is None:
        return
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
            if dataset.image_shape:
                run.model(torch.zeros(1, *dataset.image_shape, device=run.device))
            else:
                batch = loader.collate_fn(dataset.__getitems__([0]))
                call(loader.finish(batch) if isinstance(loader, DeviceLoader) else to_device(batch, run.device))
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
