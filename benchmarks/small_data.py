"""What regularisation gains where labels are few or wrong: five seeds of a network that learns digits.

    python benchmarks/small_data.py [seeds]

A small convolutional network learns from 100 of the training images of scikit-learn's digits, or from all of them with
40 % of the labels drawn at random. The accuracy is that on the validation images, whose labels are right, after the
last epoch: nothing is chosen by it. The teacher of `distill` is the plain network of the same seed. Prints a table of
docs/recipes.md.
"""
import sys
from functools import partial
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import fit
from loopctl.cli import data
from loopctl.metrics.named import accuracy
from loopctl.plugins.distill import Distill

torch.set_num_threads(1)
VARIANTS = {
    "plain": [], "`mixup`": ["mixup:alpha=0.2"], "`mixup:alpha=1`": ["mixup:alpha=1"], "`cutmix`": ["cutmix"],
    "`mixup`, `cutmix`": ["mixup:alpha=0.8", "cutmix"], "`label_smoothing`": ["label_smoothing"],
    "`ema`": ["ema:decay=0.99"], "`distill`, itself the teacher": None,
}


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
                         nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def samples(kind: str, seed: int) -> tuple[DataLoader, DataLoader]:
    """The loaders of training and validation data."""
    digits = data.digits()
    train, valid = (TensorDataset(*map(torch.stack, zip(*((image, torch.as_tensor(label)) for image, label in part),
                                                        strict=True))) for part in (digits.train, digits.valid))
    random = torch.Generator().manual_seed(seed)
    images, labels = train.tensors
    if kind == "few":
        chosen = torch.randperm(len(labels), generator=random)[:100]
        images, labels = images[chosen], labels[chosen]
    else:
        wrong = torch.rand(len(labels), generator=random) < 0.4
        labels = torch.where(wrong, torch.randint(0, 10, labels.shape, generator=random), labels)
    size = 20 if kind == "few" else 64
    return DataLoader(TensorDataset(images, labels), size, shuffle=True), DataLoader(valid, 500)


def train(kind: str, seed: int, plugins: list) -> tuple[float, nn.Module]:
    torch.manual_seed(seed)
    model = network()
    with TemporaryDirectory() as folder:
        run = fit(model, nn.CrossEntropyLoss(), partial(torch.optim.AdamW, lr=0.003), *samples(kind, seed), seed=seed,
                  epochs=100 if kind == "few" else 30, plugins=["cosine:by=step", *plugins], out=folder,
                  metrics={"accuracy": accuracy})
    return 100 * run.history[-1]["val_accuracy"], run.model


def main(seeds: int) -> None:
    found: dict[tuple[str, str], list[float]] = {}
    for kind in ("few", "wrong"):
        for seed in range(seeds):
            teacher = None
            for name, plugins in VARIANTS.items():
                if plugins is None:
                    plugins = [Distill(teacher=lambda model=teacher: model)]
                value, model = train(kind, seed, plugins)
                teacher = model if name == "plain" else teacher
                found.setdefault((kind, name), []).append(value)
            print(f"{kind} labels, seed {seed}", file=sys.stderr)
    print("| | 100 labels | gained | 40 % random labels | gained |\n|---|---|---|---|---|")
    for name in VARIANTS:
        cells = []
        for kind in ("few", "wrong"):
            values, plain = found[kind, name], found[kind, "plain"]
            gains = [value - other for value, other in zip(values, plain, strict=True)]
            gained = "" if name == "plain" else f"{mean(gains):+.1f} ± {stdev(gains):.1f}"
            cells += [f"{mean(values):.1f} ± {stdev(values):.1f}", gained]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
