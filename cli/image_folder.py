"""Folders of image files, for `--data imagefolder` and `imagenet`. Importing this module imports torchvision."""
from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from loopctl.data.image_cache import CachedImages
from loopctl.errors import UsageError, one_line

log = logging.getLogger("loopctl")

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262           # tags of a TIFF file


class VisibleImageFolder(ImageFolder):
    """torchvision's ImageFolder without folders and files whose names start with a dot, such as `.ipynb_checkpoints`.

    hidden: the paths of the folders that would have been classes, and of the images, that were left out
    others: the paths of files whose names do not end as those of images that torchvision reads
    """

    def __init__(self, root: str, transform: Any, read: Callable[[str], Any]) -> None:
        self.hidden: list[str] = []
        self.others: list[str] = []
        super().__init__(root, transform, loader=read, is_valid_file=partial(self.is_visible_image, root))

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        found, _ = super().find_classes(directory)
        self.hidden += [str(Path(directory, name)) for name in found if name.startswith(".")]
        classes = [name for name in found if not name.startswith(".")]
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return classes, {name: number for number, name in enumerate(classes)}

    def is_visible_image(self, root: str, path: str) -> bool:
        hidden, is_image = f"{os.sep}." in path[len(root):], path.lower().endswith(IMG_EXTENSIONS)
        if hidden and is_image:
            self.hidden.append(path)
        elif not hidden and not is_image:
            self.others.append(path)
        return is_image and not hidden


class ResizedCropOfTensor(v2.RandomResizedCrop):
    """torchvision's RandomResizedCrop, drawing the same numbers: a crop of Pillow's image is resized as a tensor."""

    def transform(self, image: Any, params: dict[str, Any]) -> Any:
        crop = functional.crop(image, **params)
        if isinstance(crop, Image.Image):
            crop = functional.pil_to_tensor(crop)
        return functional.resize(crop, list(self.size), interpolation=self.interpolation, antialias=self.antialias)


def load_image(path: str) -> Any:
    """Return the image in a file in RGB, 8 bits per channel: torchvision's pixels, and those of deeper grey images.

    Raises UsageError where the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return to_rgb(Image.open(file), path)
    except UsageError:
        raise
    except UnidentifiedImageError:
        reason = "it is none of the formats that Pillow reads" if os.path.getsize(path) else "the file is empty"
    except OSError as error:
        reason = error.strerror or one_line(error)
    except Exception as error:              # decoders raise errors of many types for damaged files
        reason = one_line(error)
    raise UsageError(f"{path} cannot be used as an image ({reason}); replace it, or remove it")


def fast_reader() -> Callable[[str], Any]:
    """Return the function that reads an image for `fast=true`: `load_image`, or `load_tensor` with torchcodec."""
    try:
        from torchcodec.decoders import decode_jpeg
    except ImportError:             # it is not installed, or older than 0.16
        return load_image
    except Exception as error:      # it was built for another torch
        log.warning("torchcodec cannot be imported (%s), so fast=true decodes with Pillow", one_line(error))
        return load_image
    return partial(load_tensor, decode_jpeg)


def load_tensor(decode_jpeg: Callable[..., Any], path: str) -> Any:
    """Return the image in a JPEG file as a tensor of 3 x height x width bytes, and any other as `load_image` does.

    The pixels are Pillow's. Pillow reads what has EXIF data, for torchcodec would turn the image as they say, and what
    torchcodec refuses, so that the error is the same.
    """
    content = bytearray()
    with suppress(OSError):
        content += Path(path).read_bytes()
    if content.startswith(b"\xff\xd8") and b"Exif\0\0" not in content:
        with suppress(RuntimeError):
            return decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), mode="RGB")
    return load_image(path)


def to_rgb(image: Any, path: str) -> Image.Image:
    """Return an image in RGB, 8 bits per channel. Raises UsageError, which begins with `path`, for unusable values."""
    # It is dropped in any case; Pillow would warn of the transparency of a palette.
    image.info.pop("transparency", None)
    image.load()
    if image.mode == "RGB":                     # not converted, which would copy it
        return image
    return (image_of_8_bits(image, path) if image.mode.startswith(("I", "F")) else image).convert("RGB")


def image_of_8_bits(image: Any, path: str) -> Image.Image:
    """Return a grey image of 16 bits, 32 bits or floats with 8 bits; Pillow would cut its values off at 255.

    16-bit values are divided by 257, so that the largest, 65535, becomes 255; of a TIFF with 12 bits the largest is
    4095. Floats are from 0 to 1. 32-bit integers, whose white is not known, are used if they are from 0 to 255. Raises
    UsageError for values out of these ranges.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "F":
        white = 1
    elif image.mode.startswith("I;16") or image.format == "PPM":        # Pillow scales a deep PPM to 16 bits
        white = 2 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    else:
        white = 255
    if not (values.min() >= 0 and values.max() <= white):               # also for NaN
        raise UsageError(f"{path} has {values.dtype} pixels from {values.min():g} to {values.max():g}, and those from "
                         f"0 to {white} can be used; save it with 8 or 16 bits")
    grey = (values * (255 / white)).round().astype(np.uint8)
    return Image.fromarray(255 - grey if tags.get(PHOTOMETRIC) == 0 else grey)      # 0 says that white is 0


def from_cache(parts: Any, cache: str, folders: Any, side: int, label: str, fast: bool) -> Any:
    """Return the training and the validation set with images read from files in the folder `cache`; as they are if "".

    Images in the files have a shorter side of `side` pixels. folders: those of the images of each set. label: how a
    message begins. Raises UsageError where `fast` is set too
    """
    if not cache:
        return parts
    if fast:
        raise UsageError(f"{label}: fast=true with cache: images from the cache are resized as tensors already; leave "
                         "out fast")
    made_by = f"Pillow {PIL.__version__}, torchvision {torchvision.__version__}"
    return [CachedImages(part, Path(cache), Path(folder), side, partial(load_resized, side=side), made_by,
                         f"{label}: {kind} sample")
            for part, folder, kind in zip(parts, folders, ("training", "validation"), strict=True)]


def load_resized(path: str, side: int) -> Any:
    """Return the pixels of an image, its shorter side resized to `side` as in validation; a smaller image as it is."""
    image = load_image(path)
    return np.asarray(functional.resize(image, [side]) if min(image.size) > side else image)
