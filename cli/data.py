"""Data sets by name for `--data`: scikit-learn's digits, torchvision's data sets, or `package.module:factory`.

The function of each name returns its `Data`. Its arguments are the options on the command line, except for `root` and
`download`, which are the values of `--data-root` and `--download`.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from loopctl.cli.specs import Augment, Policy, at_least_one, at_most, call_factory, resolve
from loopctl.composition.options import Option
from loopctl.data import on_device
from loopctl.data.batch import length_or_none
from loopctl.data.checked_dataset import CheckedDataset
from loopctl.data.dataset import Data, Preprocessing, check_last_batch, is_dataset
from loopctl.data.device_loader import Normalize
from loopctl.data.identity import class_names
from loopctl.data.limits import limited, overfit
from loopctl.data.memory import check_memory
from loopctl.errors import UsageError, names, one_line
from loopctl.hooks import hookimpl
from loopctl.model.forward import call_model
from loopctl.rng import host_rng_state, set_host_rng_state
from loopctl.run import Run

log = logging.getLogger("loopctl")

# The option that every data set has, besides the arguments of its function.
COMMON_OPTIONS = {"on_device": Option("on_device", bool, False, "keep all of it in the memory of the device")}

VALID = ("valid", "validation", "val")         # entries of a dict that are the validation data


def make(spec: str, root: str, download: bool) -> Data:
    """Return the data set that `spec` names, read from the folder `root`.

    A user's factory returns a Data, or what `from_parts` takes. With the option on_device=true, which all data sets
    have, the data is kept on the device. Raises UsageError where the data is missing or empty.
    """
    name, factory, options = resolve("data", spec, lambda: NAMES, NAMES.__getitem__, COMMON_OPTIONS)
    keep_on_device = options.pop("on_device", False)
    result = call_factory(f"data {name}", factory, options, {"root": root, "download": download})
    parts = result if isinstance(result, Data) else Data(*split_parts(name, result))
    for kind, part in (("training", parts.train), *(("validation", part) for part in parts.validation_sets.values())):
        check_part(name, kind, part)
    if not isinstance(result, Data):
        parts = described(name, parts)
    if keep_on_device and not all(map(is_dataset, (parts.train, *parts.validation_sets.values()))):
        raise UsageError(f"data {name}: on_device=true makes batches of samples, and {name} has loaders of its own; "
                         "return data sets, or leave it out")
    if name not in NAMES and parts.class_names and len(parts.class_names) != parts.classes:
        raise UsageError(f"data {name} has {parts.classes} classes and {len(parts.class_names)} class_names; give as "
                         "many names as classes, or none")
    found = tuple(class_names(parts.train) or ())
    own = parts.class_names or (found if len(found) == parts.classes else ())
    return replace(parts, name=name, on_device=keep_on_device, class_names=own)


def split_parts(name: str, result: Any) -> tuple[Any, Any]:
    """The training and the validation data in what a user's factory has returned.

    That is a pair (train, valid), a dict with the entries train and valid, or training data alone. Raises UsageError.
    """
    if isinstance(result, tuple | list) and len(result) == 2:
        return result[0], result[1]
    if isinstance(result, Mapping):
        valid = [key for key in VALID if key in result]
        if "train" not in result or len(valid) > 1:
            raise UsageError(f"data {name} returned a dict with {names(map(str, result)) if result else 'no entries'}; "
                             "name them train and valid")
        return result["train"], result[valid[0]] if valid else None
    return result, None


def check_part(name: str, kind: str, part: Any) -> None:
    """Raise UsageError where `part`, the "training" or "validation" data by its `kind`, cannot be read, or is empty."""
    wrong = isinstance(part, Tensor | np.ndarray | Mapping | str | bytes | tuple)
    if wrong or not (hasattr(part, "__iter__") or is_dataset(part)):
        advice = ("; use torch.utils.data.TensorDataset(inputs, targets)" if isinstance(part, Tensor | np.ndarray)
                  else "")
        raise UsageError(f"data {name} returned a {type(part).__name__} as {kind} data; return a data set, a loader or "
                         f"another iterable of batches, or a pair (train, valid) of them{advice}")
    if length_or_none(part) == 0:
        raise UsageError(f"data {name} has no {kind} samples")
    if kind == "validation" and not is_dataset(part) and isinstance(part, Iterator):
        raise UsageError(f"data {name}: its validation data is an iterator, which can be read once only; return a "
                         "list, a DataLoader or an object whose __iter__ begins anew")


def described(name: str, parts: Data) -> Data:
    """`parts` with what the training data tells: the number of classes, and the shape of the input of a sample.

    The first sample is read; the random numbers that this draws are drawn again afterwards.
    """
    train = parts.train
    given: Any = getattr(train, "classes", None)
    given = class_names(train) if given is None else given
    classes = len(given) if hasattr(given, "__len__") else given
    if not is_dataset(train) or isinstance(train, IterableDataset):
        return replace(parts, classes=classes)
    before = host_rng_state()
    sample = CheckedDataset(train, f"data {name}: training sample", None)[0]
    set_host_rng_state(before)
    input = sample[0] if isinstance(sample, tuple | list) and len(sample) == 2 else None
    if not isinstance(input, Tensor):
        return replace(parts, classes=classes)
    return replace(parts, classes=classes, shape=tuple(input.shape), numbers=input.is_floating_point())


def digits(channels: int = 1) -> Data:
    """1,797 handwritten digits of 8x8 pixels (UCI, bundled with scikit-learn); every fifth is in the validation set.

    channels: the grey image is repeated in this many channels, such as 3 for a model of colour images
    """
    at_least_one("data digits", channels=channels)
    check_memory(f"data digits: {channels:,} channels", 3 * 4 * 1797 * 64 * channels, "use fewer")
    # The file is read without importing scikit-learn, which takes longer than all other imports of a run but torch.
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(str(file), delimiter=","))
    images = (rows[:, :64].float().view(-1, 1, 8, 8) / 16 - 0.3053) / 0.3761
    images, targets = images.expand(-1, channels, -1, -1).contiguous(), rows[:, 64].long()
    held_out = torch.arange(len(targets)) % 5 == 0
    train, valid = (TensorDataset(images[part], targets[part]) for part in (~held_out, held_out))
    return Data(train, valid, 10, (channels, 8, 8),
                preprocessing=Preprocessing("L", 8, 8, (0.3053,) * channels, (0.3761,) * channels))


def transforms(mean: Any, std: Any, first: Any = (), channels: int = 0, erase: float = 0.0) -> Any:
    """Return `first`, then conversion to a normalised tensor. `channels` > 1 repeats a grey image in each channel.

    erase: the probability with which a part of the normalised image is erased
    """
    from torchvision.transforms import v2

    grey, last = [v2.Grayscale(channels)] if channels > 1 else [], [v2.RandomErasing(erase)] if erase else []
    return v2.Compose([*grey, *first, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std),
                       *last])


def policy(augment: Any) -> list[Any]:
    """torchvision's transform that `augment` names, with its own settings, in a list; empty where it names none."""
    from torchvision.transforms import v2

    classes = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment, "augmix": v2.AugMix}
    return [classes[augment]()] if augment in classes else []


def check_erase(label: str, erase: float) -> None:
    """Raise UsageError where `erase` is no probability; `label` begins the message."""
    if not 0 <= erase <= 1:
        raise UsageError(f"{label}: erase is a probability, from 0 to 1, not {erase:g}")


def preprocessing(valid: Any, mode: Any, size: int, resize: int | None = None) -> Preprocessing:
    """The values of the transform `valid`, which `transforms` made for images of `size` pixels."""
    normalize = valid.transforms[-1]
    return Preprocessing(mode, resize or size, size, tuple(normalize.mean), tuple(normalize.std))


def from_torchvision(name: str, cls: Any, root: str, download: bool, train: Any, valid: Any, mode: str,
                     shape: tuple[int, int, int]) -> Data:
    """A Data of torchvision's class `cls`, with one transform for training and one for validation."""
    try:
        sets = [cls(root, train=part, transform=transform, download=download)
                for part, transform in ((True, train), (False, valid))]
    except (RuntimeError, OSError) as error:
        if download:
            raise UsageError(f"data {name} could not be downloaded to {root}: {one_line(error)}") from error
        raise UsageError(f"data {name} is missing or incomplete in {Path(root).absolute()}; "
                         "pass --download to get it, or --data-root DIR") from error
    return Data(sets[0], sets[1], len(sets[0].classes), shape, pictures=train is valid,
                preprocessing=preprocessing(valid, mode, shape[-1]))


def check_channels(label: str, channels: int) -> None:
    """Raise UsageError for other numbers of channels than 1 and 3; `label` begins the message."""
    if channels not in (1, 3):
        raise UsageError(f"{label}: channels is 1 or 3, not {channels}")


def mnist(root: str, download: bool, channels: int = 1, augment: Policy = "none", erase: float = 0.0) -> Data:
    """60,000 and 10,000 images of handwritten digits, 28x28 pixels.

    channels: 1, or 3 for a model of colour images: the grey image is repeated
    augment: torchvision's TrivialAugmentWide, RandAugment or AugMix for the training images
    erase: the probability with which RandomErasing erases a part of a training image
    """
    from torchvision.datasets import MNIST

    return grey("mnist", MNIST, root, download, channels, augment, erase, 0.1307, 0.3081)


def fashionmnist(root: str, download: bool, channels: int = 1, augment: Policy = "none", erase: float = 0.0) -> Data:
    """60,000 and 10,000 images of clothes, 28x28 pixels.

    channels: 1, or 3 for a model of colour images: the grey image is repeated
    augment: torchvision's TrivialAugmentWide, RandAugment or AugMix for the training images
    erase: the probability with which RandomErasing erases a part of a training image
    """
    from torchvision.datasets import FashionMNIST

    return grey("fashionmnist", FashionMNIST, root, download, channels, augment, erase, 0.2860, 0.3530)


def grey(name: str, cls: Any, root: str, download: bool, channels: int, augment: Any, erase: float, mean: float,
         std: float) -> Data:
    """MNIST or Fashion-MNIST."""
    check_channels(f"data {name}", channels)
    check_erase(f"data {name}", erase)
    values = [mean] * channels, [std] * channels
    plain = train = transforms(*values, channels=channels)
    if (first := policy(augment)) or erase:
        train = transforms(*values, first, channels, erase)
    return from_torchvision(name, cls, root, download, train, plain, "L", (channels, 28, 28))


def cifar10(root: str, download: bool, augment: Augment = True, erase: float = 0.0) -> Data:
    """50,000 and 10,000 colour images of 32x32 pixels in 10 classes; the training set is augmented.

    augment: random crops of the image padded by 4 pixels, mirrored at random; false or none for the image itself;
        trivial, rand and augmix crop and mirror, then do as torchvision's TrivialAugmentWide, RandAugment and AugMix
    erase: the probability with which RandomErasing erases a part of a training image
    """
    from torchvision.datasets import CIFAR10

    return cifar("cifar10", CIFAR10, root, download, augment, erase, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


def cifar100(root: str, download: bool, augment: Augment = True, erase: float = 0.0) -> Data:
    """50,000 and 10,000 colour images of 32x32 pixels in 100 classes; the training set is augmented.

    augment: random crops of the image padded by 4 pixels, mirrored at random; false or none for the image itself;
        trivial, rand and augmix crop and mirror, then do as torchvision's TrivialAugmentWide, RandAugment and AugMix
    erase: the probability with which RandomErasing erases a part of a training image
    """
    from torchvision.datasets import CIFAR100

    return cifar("cifar100", CIFAR100, root, download, augment, erase, (0.5071, 0.4865, 0.4409),
                 (0.2673, 0.2564, 0.2762))


def cifar(name: str, cls: Any, root: str, download: bool, augment: Any, erase: float, mean: Any, std: Any) -> Data:
    """CIFAR-10 or CIFAR-100; augmentation is a random crop of the image padded by 4 pixels, mirrored at random."""
    from torchvision.transforms import v2

    check_erase(f"data {name}", erase)
    crops = [] if is_off(augment) else [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    plain = train = transforms(mean, std)
    if crops or erase:
        train = transforms(mean, std, [*crops, *policy(augment)], erase=erase)
    dataset = from_torchvision(name, cls, root, download, train, plain, "RGB", (3, 32, 32))
    if augment is not True or erase:
        return dataset
    unaugmented: Any = copy(dataset.train)
    unaugmented.transform = plain
    black = plain(torch.zeros(3, 1, 1, dtype=torch.uint8))
    return replace(dataset, pictures=True, unaugmented=unaugmented, augment=on_device.CropAndMirror(4, black))


def is_off(augment: Any) -> bool:
    """Whether the option `augment` says that images are used as they are."""
    return augment in (False, "none")


def imagenet(root: str, size: int = 224, augment: Augment = True, erase: float = 0.0, fast: bool = False,
             cache: str = "") -> Data:
    """ImageNet 2012, 1,000 classes, from its original archives in `root`; the transforms are those of `imagefolder`.

    size: height and width of the images in pixels
    augment: random crops, mirrored at random; false or none for the centre; trivial, rand and augmix crop and mirror,
        then do as torchvision's TrivialAugmentWide, RandAugment and AugMix
    erase: the probability with which RandomErasing erases a part of a training image
    fast: resize tensors instead of Pillow's images, which is faster; pixels differ by up to 1 of 255. With torchcodec,
        pip install 'loopctl[images]', decoding is faster too
    cache: a folder that keeps the images decoded, with a shorter side of 256 pixels (for size=224), in one file for
        training and one for validation; random crops are then cut from these smaller images
    """
    from torchvision.datasets import ImageNet

    from loopctl.cli.image_folder import from_cache

    check_image_size("data imagenet", size=size)
    check_erase("data imagenet", erase)
    photos = Photos(size, augment, erase, fast)
    try:
        sets = [ImageNet(root, split=split, transform=transform, loader=photos.read)
                for split, transform in (("train", photos.train), ("val", photos.valid))]
    except (RuntimeError, OSError) as error:
        raise UsageError(f"data imagenet is missing or incomplete in {Path(root).absolute()}; put "
                         "ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar there, "
                         f"or pass --data-root DIR ({one_line(error)})") from error
    sets = from_cache(sets, cache, [part.split_folder for part in sets], shorter_side(size), "data imagenet", fast)
    return photos.data(sets, 1000, class_names=tuple(map(", ".join, sets[0].classes)))


def imagefolder(root: str, size: int = 224, augment: Augment = True, valid: str = "val", erase: float = 0.0,
                fast: bool = False, cache: str = "") -> Data:
    """Image files in `root`/train/CLASS and `root`/val/CLASS. Names that start with a dot are left out.

    A training image is a random crop, mirrored at random. A validation image is the centre, after the shorter side is
    resized to 256 pixels (for size=224). augment=false uses the centre for both.

    size: height and width of the images in pixels
    augment: random crops, mirrored at random; false or none for the centre; trivial, rand and augmix crop and mirror,
        then do as torchvision's TrivialAugmentWide, RandAugment and AugMix
    valid: name of the folder of the validation images, such as test for --test imagefolder:valid=test
    erase: the probability with which RandomErasing erases a part of a training image
    fast: resize tensors instead of Pillow's images, which is faster; pixels differ by up to 1 of 255. With torchcodec,
        pip install 'loopctl[images]', decoding is faster too
    cache: a folder that keeps the images decoded, with a shorter side of 256 pixels (for size=224), in one file for
        training and one for validation; random crops are then cut from these smaller images
    """
    from loopctl.cli.image_folder import IMG_EXTENSIONS, VisibleImageFolder, from_cache

    check_image_size("data imagefolder", size=size)
    check_erase("data imagefolder", erase)
    folders = [Path(root, split).absolute() for split in ("train", valid)]
    advice = f"put images in train/CLASS and {one_line(valid)}/CLASS of --data-root DIR"
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(f"data imagefolder: there is no folder {folder}; {advice}")
    photos = Photos(size, augment, erase, fast)
    try:
        sets = [VisibleImageFolder(str(folder), transform, photos.read) for folder, transform in
                zip(folders, (photos.train, photos.valid), strict=True)]
    except FileNotFoundError as error:         # no class, or a class without images
        raise UsageError(f"data imagefolder: {one_line(error).rstrip('. ')}; {advice}, with names that end in "
                         f"{', '.join(IMG_EXTENSIONS)}") from error
    if hidden := [path for part in sets for path in part.hidden]:
        log.warning("data imagefolder: %s%s left out, because the name starts with a dot", one_line(hidden[0]),
                    f" and {len(hidden) - 1:,} more" if hidden[1:] else "")
    if others := [path for part in sets for path in part.others]:
        log.warning("data imagefolder: %s%s left out, because the name ends in none of %s", one_line(others[0]),
                    f" and {len(others) - 1:,} more" if others[1:] else "", ", ".join(IMG_EXTENSIONS))
    if sets[0].classes != sets[1].classes:
        differ = sorted(set(sets[0].classes) ^ set(sets[1].classes))
        raise UsageError(f"data imagefolder: train and {one_line(valid)} in {root} have different classes; "
                         f"only one of them has {', '.join(differ)}")
    sets = from_cache(sets, cache, folders, shorter_side(size), "data imagefolder", fast)
    return photos.data(sets, len(sets[0].classes))


def check_image_size(label: str, channels: int = 3, **side: int) -> None:
    """Raise UsageError for images so large that the activations of a network, about 50 times an image, exceed memory.

    side: the option that sets the images' width and height in pixels, by its name. `label` begins the message.
    """
    at_least_one(label, channels=channels, **side)
    for name, value in side.items():
        needed = 50 * 4 * channels * value**2
        check_memory(f"{label}: a network on images of {name}={value}", needed, "use a smaller one")


class Photos:
    """How the photographs of `imagenet` and `imagefolder` are read and transformed, with their options.

    A sample is uint8, so that a quarter of the bytes goes from the loader workers to the device, where the floats are
    made. What `erase` erases becomes 0 after the normalisation, so with it a sample has the floats.

    read: returns the image in a file, of Pillow or as a tensor
    train, valid: the transforms of a training image, at random with `augment`, and of a validation image
    """

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)            # of the channels of ImageNet's images

    def __init__(self, size: int, augment: Any, erase: float, fast: bool) -> None:
        from torchvision.transforms import v2

        from loopctl.cli.image_folder import ResizedCropOfTensor, fast_reader, load_image

        self.size, self.floats, self.read = size, bool(erase), fast_reader() if fast else load_image
        centre = [v2.Resize(shorter_side(size)), v2.CenterCrop(size)]
        # The policies would do something else to a tensor, as of `fast` or the cache, than to an image of Pillow.
        policies = [v2.ToPILImage(), *policy(augment)] if policy(augment) else []
        random = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), *policies]
        if fast:
            centre = [v2.PILToTensor(), *centre]
            random = [ResizedCropOfTensor(size), v2.RandomHorizontalFlip(), *policies]
        self.train = self.to_tensor(centre if is_off(augment) else random, erase)
        self.valid = self.to_tensor(centre)

    def to_tensor(self, first: list[Any], erase: float = 0.0) -> Any:
        """Return the transforms in `first`, then conversion to a tensor."""
        from torchvision.transforms import v2

        if self.floats:
            return transforms(self.MEAN, self.STD, first, erase=erase)
        return v2.Compose([*first, v2.PILToTensor()])

    def data(self, sets: list[Any], classes: int, class_names: tuple[str, ...] = ()) -> Data:
        """Return the Data of a training and a validation set."""
        train, valid = sets
        return Data(train, valid, classes, (3, self.size, self.size), class_names=class_names,
                    preprocessing=Preprocessing("RGB", shorter_side(self.size), self.size, self.MEAN, self.STD),
                    batch_transform=None if self.floats else Normalize(self.MEAN, self.STD))


def shorter_side(size: int) -> int:
    """To how many pixels the shorter side of a validation image is resized, before `size` pixels are cut out."""
    return size * 256 // 224


def fake(size: int = 1000, image: int = 32, classes: int = 10, channels: int = 3, augment: Policy = "none",
         erase: float = 0.0) -> Data:
    """Random images with random classes, for experiments; the validation set is a fifth as large.

    size: number of training images
    image: height and width of the images in pixels
    classes: number of classes
    channels: number of channels
    augment: torchvision's TrivialAugmentWide, RandAugment or AugMix for the training images
    erase: the probability with which RandomErasing erases a part of a training image
    """
    from torchvision.datasets import FakeData

    at_least_one("data fake", size=size, classes=classes)
    at_most("data fake", 10_000_000, size=size, classes=classes)
    check_image_size("data fake", channels, image=image)
    check_erase("data fake", erase)
    first = policy(augment)
    if first:
        check_channels(f"data fake: augment={augment}", channels)
    shape, values = (channels, image, image), ([0.5] * channels, [0.5] * channels)
    to_tensor = transforms(*values)
    train = FakeData(size, shape, classes, transforms(*values, first, erase=erase))
    return Data(train, FakeData(max(1, size // 5), shape, classes, to_tensor, random_offset=size), classes, shape,
                preprocessing=preprocessing(to_tensor, "L" if channels == 1 else "RGB", image))


NAMES = {function.__name__: function for function in
         (digits, mnist, fashionmnist, cifar10, cifar100, imagenet, imagefolder, fake)}


@dataclass(eq=False)
class BatchSize:
    """A plugin that refuses, before the first step, a last batch of one sample that a BatchNorm cannot train on.

    All processes try it together, because the model may be sharded, or synchronize its BatchNorm.
    """

    observer_only = True

    tried: bool = False

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        if not self.tried:
            self.tried = True
            check_last_batch(run, partial(call_model, run))


def limit(settings: dict[str, Any], train: Any, valid: Any) -> tuple[Any, Any]:
    """Return the loaders with the limits of --limit-train, --limit-valid and --overfit."""
    limits, number = [settings["limit_train"], settings["limit_valid"]], settings["overfit"]
    if number:
        if any(limits):
            raise UsageError(f"--overfit {number} with --limit-{'train' if limits[0] else 'valid'}: it limits both to "
                             "the same batches; leave out one of the two")
        return (overfit(train, number),) * 2
    return tuple(limited(data, most) if most and data is not None else data
                 for data, most in zip((train, valid), limits, strict=True))
