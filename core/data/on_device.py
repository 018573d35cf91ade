"""Keep a whole data set in the memory of the device, as in `--data cifar10:on_device=true`."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import inf, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from loopctl.data.batch import iter_tensors, map_nested, sample_count
from loopctl.data.device_loader import transformed
from loopctl.errors import UsageError
from loopctl.rng import host_rng_state, set_host_rng_state


class OnDeviceDataset(Dataset[list[Tensor]]):
    """A data set of tensors on one device; a whole batch is selected there by its indices, with `__getitems__`.

    A DataLoader draws the indices as for any other data set, so the order of an epoch is the same, and a run can
    resume in the middle of one. Its collate_fn returns the batch unchanged.
    """

    def __init__(self, tensors: Any, augment: Callable[[Tensor], Tensor] | None = None,
                 image_shape: tuple[int, ...] = ()) -> None:
        self.tensors, self.augment, self.image_shape = tensors, augment, image_shape
        self.first = next(iter_tensors(tensors))

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> Any:
        return map_nested(lambda tensor: tensor[0], self.__getitems__([index]))

    def __getitems__(self, indices: list[int]) -> Any:
        device = self.first.device
        rows = torch.tensor(indices).to(device, non_blocking=device.type == "cuda")
        batch = map_nested(lambda tensor: tensor.index_select(0, rows), self.tensors)
        return [self.augment(batch[0]), *batch[1:]] if self.augment else batch


def datasets(found: Any, workers: int, device: torch.device, check_labels: bool) -> list[OnDeviceDataset]:
    """Return the training data set and the validation sets of `found`, a `Data`, copied to `device`.

    Raises UsageError where the data does not fit there, or where reading a sample draws random numbers, and where a
    sample cannot be read or, with `check_labels`, has a wrong label.
    """
    parts = [found.train, *found.validation_sets.values()]
    if found.collate_fn or not all(hasattr(part, "__getitem__") and hasattr(part, "__len__") for part in parts):
        raise UsageError(f"data {found.name}: on_device=true reads every sample once and makes the batches itself; "
                         "return data sets with a length and without a collate_fn, or leave out on_device")
    if workers:
        raise UsageError(f"--workers {workers:,} would have nothing to load: on_device=true reads the data once; "
                         "leave out one of the two")
    samples = sum(map(len, parts))
    size, available = bytes_per_number(found) * samples * prod(found.shape or ()), free_memory(device)
    if size > available:
        raise UsageError(f"data {found.name}: {samples:,} samples of {'x'.join(map(str, found.shape))} take "
                         f"{size / 1e9:,.1f} GB, and {device} has {available / 1e9:,.1f} GB free; leave out on_device, "
                         "or use smaller samples")
    held = []
    for part, kind, augment in ((found.unaugmented or found.train, "training", found.augment),
                                *((part, "validation", None) for part in found.validation_sets.values())):
        checked = found.checked(part, kind, check_labels)
        held.append(OnDeviceDataset(load_tensors(found, checked, device), augment, checked.image_shape))
    return held


def bytes_per_number(found: Any) -> int:
    """The size of a number of the input, which is smaller than that of a float where floats are made of each batch."""
    if found.batch_transform is None or found.pictures:
        return 4
    before = host_rng_state()
    first = next(iter_tensors(found.checked(found.train, "training", False)[0]), None)
    set_host_rng_state(before)
    return 4 if first is None else first.element_size()


def collate_unchanged(batch: Any) -> Any:
    return batch


# A batch has as many samples as indices, so `Parallel` need not exchange the counts.
collate_unchanged.keeps_sample_count = True       # type: ignore[attr-defined]


def free_memory(device: torch.device) -> float:
    """Return the free memory of `device` in bytes, or infinity where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        match = re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return inf
    return 1024 * int(match[1]) if match else inf


def load_tensors(found: Any, part: Any, device: torch.device) -> Any:
    """Read all samples of `part`, a CheckedDataset over one of the data sets of `found`, into tensors on `device`."""
    if type(part.dataset) is TensorDataset:            # not a subclass: it may override __getitem__
        return [tensor.to(device) for tensor in part.tensors]

    def empty(one: Any) -> Tensor:
        if not isinstance(one, Tensor):
            raise UsageError(f"data {found.name}: a sample has a {type(one).__name__}, and on_device=true keeps "
                             "tensors only; leave out one of the two")
        return torch.empty(len(part), *one.shape[1:], dtype=one.dtype, device=device)

    loaded: Any = None
    begin = 0
    for batch in raw_batches(found, part, device) if found.pictures else sample_batches(found, part):
        loaded = map_nested(empty, batch) if loaded is None else loaded
        end = begin + sample_count(batch)
        for target, source in zip(iter_tensors(loaded), iter_tensors(batch), strict=True):
            target[begin:end] = source
        begin = end
    return loaded


def raw_batches(found: Any, part: Any, device: torch.device) -> Iterator[list[Tensor]]:
    """Yield batches of a data set that has all images as uint8 in `.data`; they are transformed on `device`."""
    data, targets = torch.as_tensor(part.data), torch.as_tensor(part.targets)
    data = data.unsqueeze(1) if data.dim() == 3 else data.permute(0, 3, 1, 2)
    for images, classes in zip(data.split(4096), targets.split(4096), strict=True):
        batch = [part.transform(images.to(device)), classes]
        yield batch if found.batch_transform is None else transformed(found.batch_transform, batch)


def sample_batches(found: Any, part: Any) -> Iterator[Any]:
    """Yield batches of a data set that is read sample by sample. Raises UsageError where reading is random."""
    before = host_rng_state()
    # A DataLoader draws a base seed. With a generator of its own, the global random-number generators do not change.
    for batch in DataLoader(part, 256, generator=torch.Generator(), collate_fn=part.collate):
        if host_rng_state() != before:
            raise UsageError(f"data {found.name}: its samples come out differently at every reading, and "
                             "on_device=true reads them once; pass augment=false and no erase where those are options, "
                             "or leave out on_device")
        yield batch


class CropAndMirror:
    """Pad each image of a batch, crop it at random to its size, and mirror it with probability 0.5.

    It is torchvision's RandomCrop(size, padding) and RandomHorizontalFlip, for a whole batch (N, C, H, W) at once.
    """

    def __init__(self, padding: int, border: Tensor) -> None:
        self.padding, self.border = padding, border      # border: the value of the padding, channels x 1 x 1

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
