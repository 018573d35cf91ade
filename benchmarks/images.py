"""How many photographs of a folder one loader worker reads per second, decoded, cropped, resized and passed on.

    python benchmarks/images.py [--tiny]

JPEGs of 500 x 375 pixels, of about 50 and 100 KB, are made on the spot. A DataLoader with one worker reads batches of 64,
until they are floats in the main process. The plain program is torchvision's: ImageFolder, the crops, and conversion to
normalised floats for each image. Each round times every way once, in another order; the table has medians, and medians of
the ratios to the plain program in the same round. Prints a table of docs/performance.md. --tiny runs all of it on a few
small images.
"""
import os
import random
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from loopctl.cli import data

TINY = "--tiny" in sys.argv
WIDTH, HEIGHT, SIZE, COUNT, BATCH, ROUNDS = (60, 45, 32, 8, 4, 1) if TINY else (500, 375, 224, 768, 64, 7)
QUALITIES = {"50 KB": 90, "100 KB": 96}
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


def rate(loader: DataLoader) -> float:
    """Images per second of a pass, from the first batch on: starting the worker is left out."""
    batches, count = iter(loader), 0
    next(batches)
    start = perf_counter()
    for images, _ in batches:
        assert images.dtype == torch.float32
        count += len(images)
    return count / (perf_counter() - start)


def main() -> None:
    print("| transform | JPEGs of | plain program | `imagefolder` | `imagefolder:fast=true` |\n|---|---|---|---|---|")
    for label, quality in QUALITIES.items():
        with TemporaryDirectory() as folder:
            size = write(Path(folder), quality)
            for transform, augment in (("random crop", True), ("centre", False)):
                root, order = Path(folder), random.Random(0)
                loaders = plain(root, augment), named(root, augment), named(root, augment, ",fast=true")
                rounds: list[dict[int, float]] = []
                for _ in range(ROUNDS):
                    rounds.append({number: rate(loaders[number]) for number in order.sample(range(3), 3)})
                cells = []
                for number in range(3):
                    ratio = median(found[number] / found[0] for found in rounds)
                    cells.append(f"{median(found[number] for found in rounds):.0f} images/s, {ratio:.2f}")
                print(f"| {transform} | {label if TINY else f'{size:.0f} KB'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
