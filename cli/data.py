"""Data sets by name: the digits that come with scikit-learn, torchvision's, or `package.module:factory`.

Each name below is a function; its arguments are the options on the command line. `root` and `download` are the
command line's own `--data-root` and `--download`.
"""
from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from loopctl.cli.specs import at_least_one, at_most, call, resolve
from loopctl.composition.options import Option
from loopctl.data import on_device
from loopctl.data.dataset import Data
from loopctl.data.memory import check_memory
from loopctl.errors import UsageError, one_line

# The option that every data set has, besides its function's own.
HELD = {"on_device": Option("on_device", bool, False, "")}


def make(spec: str, root: str, download: bool) -> Data:
    """The data that `spec` says, read from the folder `root`.

    A factory of one's own returns a Data, or a pair (train, valid) of map-style data sets of which the first has
    `classes`. The option on_device=true, which all have, holds the data on the device. Raises UsageError where the data
    is not there, or is empty.
    """
    name, factory, options = resolve("data", spec, lambda: NAMES, NAMES.__getitem__, HELD)
    held = options.pop("on_device", False)
    made = call(f"data {name}", factory, options, {"root": root, "download": download})
    if isinstance(made, tuple | list) and len(made) == 2:
        made = from_pair(name, *made)
    if not isinstance(made, Data):
        raise UsageError(f"data {name} made a {type(made).__name__}; "
                         "return a pair (train, valid) or a loopctl.Data")
    for part, samples in (("training", made.train), ("validation", made.valid)):
        if len(samples) == 0:        # type: ignore[arg-type]
            raise UsageError(f"data {name} has no {part} images")
    return replace(made, name=name, on_device=held)


def from_pair(name: str, train: Any, valid: Any) -> Data:
    """A Data of two data sets, whose number of classes and shape are read from the first."""
    if not (hasattr(train, "__len__") and hasattr(valid, "__len__")):
        raise UsageError(f"data {name}: both data sets need a length")
    if not hasattr(train, "classes"):
        raise UsageError(f"data {name}: the training set has no `classes`; "
                         "return a loopctl.Data, which says how many")
    if len(train) == 0:
        raise UsageError(f"data {name} has no training images")
    return Data(train, valid, len(train.classes), tuple(train[0][0].shape))


def digits(channels: int = 1) -> Data:
    """1,797 handwritten digits of 8x8 pixels (UCI, bundled with scikit-learn); every fifth is for validation."""
    from sklearn.datasets import load_digits

    at_least_one("data digits", channels=channels)
    check_memory(f"data digits: {channels:,} channels", 3 * 4 * 1797 * 64 * channels, "use fewer")
    found = load_digits()
    images = (torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3053) / 0.3761
    images, targets = images.expand(-1, channels, -1, -1).contiguous(), torch.tensor(found.target)
    held_out = torch.arange(len(targets)) % 5 == 0
    train, valid = (TensorDataset(images[part], targets[part]) for part in (~held_out, held_out))
    return Data(train, valid, 10, (channels, 8, 8))


def transforms(mean: Any, std: Any, first: Any = (), channels: int = 0) -> Any:
    """Steps on the picture, then a normalised tensor; `channels` makes grey pictures have so many."""
    from torchvision.transforms import v2

    grey = [v2.Grayscale(channels)] if channels > 1 else []
    return v2.Compose([*grey, *first, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def from_torchvision(name: str, cls: Any, root: str, download: bool, train: Any, valid: Any,
                     shape: tuple[int, int, int]) -> Data:
    """torchvision's class `cls`, with its own transform for training and for validation."""
    try:
        sets = [cls(root, train=part, transform=transform, download=download)
                for part, transform in ((True, train), (False, valid))]
    except (RuntimeError, OSError) as error:
        if download:
            raise UsageError(f"data {name} could not be downloaded to {root}: {one_line(error)}") from error
        raise UsageError(f"data {name} is not in {Path(root).absolute()}, or not whole; "
                         "add --download to get it, or --data-root DIR") from error
    return Data(sets[0], sets[1], len(sets[0].classes), shape, pictures=True)


def one_or_three(who: str, channels: int) -> None:
    if channels not in (1, 3):
        raise UsageError(f"{who}: channels is 1 or 3, not {channels}")


def mnist(root: str, download: bool, channels: int = 1) -> Data:
    """60,000 and 10,000 handwritten digits of 28x28 pixels."""
    from torchvision.datasets import MNIST

    one_or_three("data mnist", channels)
    plain = transforms([0.1307] * channels, [0.3081] * channels, channels=channels)
    return from_torchvision("mnist", MNIST, root, download, plain, plain, (channels, 28, 28))


def fashionmnist(root: str, download: bool, channels: int = 1) -> Data:
    """60,000 and 10,000 pictures of clothes of 28x28 pixels."""
    from torchvision.datasets import FashionMNIST

    one_or_three("data fashionmnist", channels)
    plain = transforms([0.2860] * channels, [0.3530] * channels, channels=channels)
    return from_torchvision("fashionmnist", FashionMNIST, root, download, plain, plain, (channels, 28, 28))


def cifar10(root: str, download: bool, augment: bool = True) -> Data:
    """50,000 and 10,000 colour pictures of 32x32 pixels in 10 classes; training crops and mirrors at random."""
    from torchvision.datasets import CIFAR10

    return cifar("cifar10", CIFAR10, root, download, augment, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(root: str, download: bool, augment: bool = True) -> Data:
    """50,000 and 10,000 colour pictures of 32x32 pixels in 100 classes; training crops and mirrors at random."""
    from torchvision.datasets import CIFAR100

    return cifar("cifar100", CIFAR100, root, download, augment, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def cifar(name: str, cls: Any, root: str, download: bool, augment: bool, mean: Any, std: Any) -> Data:
    from torchvision.transforms import v2

    crops, plain = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()], transforms(mean, std)
    with_crops = transforms(mean, std, crops) if augment else plain
    found = from_torchvision(name, cls, root, download, with_crops, plain, (3, 32, 32))
    if not augment:
        return found
    still: Any = copy(found.train)
    still.transform = plain
    black = plain(torch.zeros(3, 1, 1, dtype=torch.uint8))
    return replace(found, still=still, augment=on_device.CropAndMirror(4, black))


def imagenet(root: str, size: int = 224, augment: bool = True) -> Data:
    """ImageNet 2012, 1,000 classes, from its own archives in `root`; see `imagefolder` for the transforms."""
    from torchvision.datasets import ImageNet

    sized("data imagenet", size=size)
    try:
        sets = [ImageNet(root, split=split, transform=photograph(size, augment and split == "train"))
                for split in ("train", "val")]
    except (RuntimeError, OSError) as error:
        raise UsageError(f"data imagenet is not in {Path(root).absolute()}; put ILSVRC2012_devkit_t12.tar.gz, "
                         "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there, or pass --data-root DIR "
                         f"({one_line(error)})") from error
    return Data(sets[0], sets[1], 1000, (3, size, size))


def imagefolder(root: str, size: int = 224, augment: bool = True) -> Data:
    """Pictures in `root`/train/CLASS and `root`/val/CLASS.

    Training takes a random part of each, mirrored at random; validation the centre, after the shorter side is made
    256 (for a size of 224). augment=false takes the centre for both.
    """
    from torchvision.datasets import ImageFolder

    sized("data imagefolder", size=size)
    folders = [Path(root, split).absolute() for split in ("train", "val")]
    way_out = "it takes pictures in train/CLASS and val/CLASS of --data-root DIR"
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"data imagefolder: there is no folder {folder}; {way_out}")
    try:
        sets = [ImageFolder(str(folder), photograph(size, augment and folder.name == "train")) for folder in folders]
    except FileNotFoundError as error:         # no class, or a class without pictures
        raise UsageError(f"data imagefolder: {one_line(error)}; {way_out}") from error
    if sets[0].classes != sets[1].classes:
        differ = sorted(set(sets[0].classes) ^ set(sets[1].classes))
        raise UsageError(f"data imagefolder: train and val in {root} differ in their classes; "
                         f"only one has {', '.join(differ)}")
    return Data(sets[0], sets[1], len(sets[0].classes), (3, size, size))


def sized(who: str, channels: int = 3, **side: int) -> None:
    """Raise UsageError where images of such a side leave no room for a network, which holds each many times over."""
    at_least_one(who, channels=channels, **side)
    for name, value in side.items():
        check_memory(f"{who}: a network on images of {name}={value}", 50 * 4 * channels * value**2, "use a smaller one")


def photograph(size: int, augment: bool) -> Any:
    """The usual transforms of photographs, as ImageNet's."""
    from torchvision.transforms import v2

    random = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    centre = [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
    return transforms((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), random if augment else centre)


def fake(size: int = 1000, image: int = 32, classes: int = 10, channels: int = 3) -> Data:
    """Random pictures with random classes, to try things out; a fifth as many for validation."""
    from torchvision.datasets import FakeData

    at_least_one("data fake", size=size, classes=classes)
    at_most("data fake", 10_000_000, size=size, classes=classes)
    sized("data fake", channels, image=image)
    shape, to_tensor = (channels, image, image), transforms([0.5] * channels, [0.5] * channels)
    train = FakeData(size, shape, classes, to_tensor)
    return Data(train, FakeData(max(1, size // 5), shape, classes, to_tensor, random_offset=size), classes, shape)


NAMES = {function.__name__: function for function in
         (digits, mnist, fashionmnist, cifar10, cifar100, imagenet, imagefolder, fake)}
