"""Data that is held on the device as a whole: `--data cifar10:on_device=true`."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from loopctl.errors import UsageError
from loopctl.rng import host_rng_state


class Held(Dataset[list[Tensor]]):
    """Samples held on a device, in tensors; a batch is picked out of them there, in one go.

    A DataLoader draws the indices as it does for any other data, so that the order of an epoch is the same, and a run
    can go on in its middle. Its collate_fn has nothing left to do.
    """

    def __init__(self, tensors: list[Tensor], augment: Callable[[Tensor], Tensor] | None = None) -> None:
        self.tensors, self.augment = tensors, augment

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> list[Tensor]:
        return [tensor[0] for tensor in self.__getitems__([index])]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        device = self.tensors[0].device
        which = torch.tensor(indices).to(device, non_blocking=device.type == "cuda")
        images, *others = (tensor.index_select(0, which) for tensor in self.tensors)
        return [self.augment(images) if self.augment else images, *others]


def loaders(found: Any, batch_size: int, workers: int, device: torch.device) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """What `Data.loaders` returns, for data held on `device`.

    Raises UsageError where it does not fit there, or where its images differ with every reading.
    """
    if workers:
        raise UsageError(f"--workers {workers:,} would have nothing to load: on_device=true reads the data once; "
                         "leave out one of the two")
    images = len(found.train) + len(found.valid)
    size, there = 4 * images * prod(found.shape), free(device)
    if size > there:
        raise UsageError(f"data {found.name}: {images:,} images of {'x'.join(map(str, found.shape))} take "
                         f"{size / 1e9:,.1f} GB, and {device} has {there / 1e9:,.1f} GB free; leave out on_device, "
                         "or use smaller images")
    train = Held(tensors(found, found.still or found.train, device), found.augment)
    valid = Held(tensors(found, found.valid, device))
    return (DataLoader(train, batch_size, shuffle=True, collate_fn=as_it_is),
            DataLoader(valid, batch_size, collate_fn=as_it_is))


def as_it_is(batch: Any) -> Any:
    return batch


as_it_is.keeps_sample_count = True       # type: ignore[attr-defined]   # as many as there are indices, see Parallel


def free(device: torch.device) -> float:
    """The bytes of memory that `device` has free; infinite where it does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        said = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return inf
    return 1024 * int(said[1]) if said else inf


def tensors(found: Any, part: Any, device: torch.device) -> list[Tensor]:
    """All samples of `part`, one of the data sets of `found`, as tensors on `device`."""
    if type(part) is TensorDataset:            # what is derived from it may give its samples otherwise
        return [tensor.to(device) for tensor in part.tensors]
    held: list[Tensor] = []
    begin = 0
    for batch in pictures(part, device) if found.pictures else samples(found, part):
        held = held or [torch.empty(len(part), *one.shape[1:], dtype=one.dtype, device=device) for one in batch]
        for whole, one in zip(held, batch, strict=True):
            whole[begin:begin + len(one)] = one
        begin += len(batch[0])
    return held


def pictures(part: Any, device: torch.device) -> Iterator[list[Tensor]]:
    """Batches of a data set that has its pictures as bytes: they are made into floats many at a time, on `device`."""
    data, targets = torch.as_tensor(part.data), torch.as_tensor(part.targets)
    data = data.unsqueeze(1) if data.dim() == 3 else data.permute(0, 3, 1, 2)
    for some, classes in zip(data.split(4096), targets.split(4096), strict=True):
        yield [part.transform(some.to(device)), classes]


def samples(found: Any, part: Any) -> Iterator[list[Tensor]]:
    """Batches of whatever gives its samples one by one."""
    before = host_rng_state()
    for batch in DataLoader(part, 256, generator=torch.Generator()):       # its own, to draw no random number
        if host_rng_state() != before:
            raise UsageError(f"data {found.name}: its images come out differently at every reading, and on_device=true "
                             "reads them once; pass augment=false where it has that, or leave out on_device")
        yield batch


class CropAndMirror:
    """Moves each image of a batch by up to `padding` pixels, at random, and mirrors it with a chance of one half.

    It is what torchvision's RandomCrop(size, padding) and RandomHorizontalFlip do to one image at a time.
    """

    def __init__(self, padding: int, border: Tensor) -> None:
        self.padding, self.border = padding, border      # border: a pixel of it, channels x 1 x 1

    def __call__(self, images: Tensor) -> Tensor:
        count, channels, height, width = images.shape
        device, around = images.device, 2 * self.padding
        padded = self.border.to(device).expand(count, channels, height + around, width + around).contiguous()
        padded[:, :, self.padding:-self.padding, self.padding:-self.padding] = images
        top, left = torch.randint(around + 1, (2, count, 1), device=device)
        columns = torch.arange(width, device=device).expand(count, width)
        columns = torch.where(torch.rand(count, 1, device=device) < 0.5, columns, columns.flip(1)) + left
        rows = torch.arange(height, device=device) + top
        pixels = rows[:, :, None] * (width + around) + columns[:, None, :]
        pixels = pixels.view(count, 1, -1).expand(-1, channels, -1)
        return padded.flatten(2).gather(2, pixels).view(images.shape)
