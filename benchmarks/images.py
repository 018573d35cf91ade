"""How many photographs of a folder a core reads per second: decoded, cropped, resized, in batches, and passed on.

    python benchmarks/images.py [--tiny]

JPEGs of 500 x 375 pixels, of about 50 and 100 KB, are made on the spot. A DataLoader with one worker reads batches of
64, until they are floats in the main process. The plain program is torchvision's: ImageFolder, the crops, and the
conversion of each image to normalised floats. What counts is the processor's time of the worker, less that of a pass of
one batch, in which it starts; and for the last column that of the main process, which on a CPU makes the floats. Each
round times every way once, in another order; the table has medians, and medians of the ratios to the plain program in
the same round. torchcodec is measured where it is installed. Prints a table of docs/performance.md. --tiny runs all of
it on a few small images.
"""
import os
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import median
from tempfile import TemporaryDirectory
from time import process_time
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from loopctl.cli import data, image_folder
from loopctl.data.limits import limited

TINY = "--tiny" in sys.argv
WIDTH, HEIGHT, SIZE, COUNT, BATCH, ROUNDS = (60, 45, 32, 8, 4, 1) if TINY else (500, 375, 224, 512, 64, 5)
QUALITIES = (83,) if TINY else (83, 94)
torch.set_num_threads(1)


def photograph(number: int) -> Image.Image:
    """Noise of many scales, the coarse ones strongest, as in photographs."""
    noisy, whole = np.random.default_rng(number), np.zeros((HEIGHT, WIDTH, 3))
    for level in range(1, 8):
        side = 2 ** level
        noise = Image.fromarray(noisy.integers(0, 256, (side, side, 3), dtype=np.uint8))
        whole += np.asarray(noise.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), float) / level
    whole += noisy.normal(0, 30, whole.shape)
    whole -= whole.min()
    return Image.fromarray((whole * 255 / whole.max()).astype(np.uint8))


def write(root: Path, quality: int) -> float:
    """Write a folder of JPEGs, for training and validation. Returns the mean size of a file in KB."""
    distinct = min(COUNT, 64)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
    for number in range(distinct):
        photograph(number).save(root / "train" / "ab"[number % 2] / f"{number}.jpg", quality=quality)
    for name in ("a", "b"):
        photograph(0).save(root / "val" / name / "0.jpg", quality=quality)
    files = sorted((root / "train").rglob("*.jpg"))
    for number in range(distinct, COUNT):
        source = files[number % distinct]
        os.link(source, source.with_name(f"{number}.jpg"))
    return sum(file.stat().st_size for file in files) / len(files) / 1000


def plain(root: Path, augment: bool) -> DataLoader:
    first = ([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip()] if augment
             else [v2.Resize(SIZE * 256 // 224), v2.CenterCrop(SIZE)])
    to_floats = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                 v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    return DataLoader(ImageFolder(root / "train", v2.Compose([*first, *to_floats])), BATCH, num_workers=1, shuffle=True)


def named(root: Path, augment: bool, options: str = "") -> DataLoader:
    made = data.make(f"imagefolder:size={SIZE},augment={str(augment).lower()}{options}", str(root), download=False)
    return made.loaders(BATCH, 1, torch.device("cpu"))[0]


def with_pillow(root: Path, augment: bool) -> DataLoader:
    """The loader of `fast=true` where torchcodec is not installed."""
    with mock.patch.object(image_folder, "fast_reader", return_value=image_folder.load_image):
        return named(root, augment, ",fast=true")


def used() -> tuple[float, float]:
    """The processor's time of the workers that have ended, and of this process."""
    workers = getrusage(RUSAGE_CHILDREN)
    return workers.ru_utime + workers.ru_stime, process_time()


def seconds(loader: DataLoader) -> tuple[float, float]:
    """The processor's time that the worker and the main process take for an image."""
    times, counts = [used()], []
    for part in (limited(loader, 1), loader):
        counts.append(sum(len(images) for images, _ in part))
        times.append(used())
    worker, main = ((end - middle) - (middle - start) for start, middle, end in zip(*times, strict=True))
    return worker / (counts[1] - counts[0]), main / (counts[1] - counts[0])


def main() -> None:
    print("| transform | JPEGs of | way | images/s per core of workers | of the plain program | main process, us "
          "per image |\n|---|---|---|---|---|---|")
    for quality in QUALITIES:
        with TemporaryDirectory() as folder:
            root, order = Path(folder), random.Random(0)
            size = f"{write(root, quality):.0f} KB"
            for transform, augment in (("random crop", True), ("centre", False)):
                ways = {"plain program": plain(root, augment), "`imagefolder`": named(root, augment),
                        "`fast=true`": with_pillow(root, augment),
                        "`cache=DIR`": named(root, augment, f",cache={root}/cache")}
                if find_spec("torchcodec"):
                    ways["`fast=true`, with torchcodec"] = named(root, augment, ",fast=true")
                rounds = []
                for _ in range(ROUNDS):
                    rounds.append({way: seconds(ways[way]) for way in order.sample(list(ways), len(ways))})
                for way in ways:
                    worker, main = (median(found[way][part] for found in rounds) for part in (0, 1))
                    ratio = median(found["plain program"][0] / found[way][0] for found in rounds)
                    print(f"| {transform} | {size} | {way} | {1 / worker:.0f} | {ratio:.2f} | {1e6 * main:.0f} |",
                          flush=True)


if __name__ == "__main__":
    main()
