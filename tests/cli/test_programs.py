"""The three commands of docs/programs.md, compared with the same programs in plain PyTorch, on a few images of each set.

The plain programs read the same files with torchvision. The final weights are equal to the last bit.
"""
import copy
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
import torchvision
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from loopctl.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "programs.md").read_text()
PROGRAMS = re.findall(r"^\$ (loopctl run .*)$", PAGE, re.MULTILINE)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run one of the commands, with `smaller` options after its own. Return the final weights and the rows of metrics.csv."""
    monkeypatch.chdir(tmp_path)

    def call(number, *smaller, replace=("", "")):
        command = PROGRAMS[number].replace("DIR", str(tmp_path)).replace(*replace)
        result = CliRunner().invoke(main, [*shlex.split(command)[1:], "--workers", "0", "--out", "run", *smaller])
        assert result.exit_code == 0, result.output
        assert (tmp_path / "run" / "checkpoints" / "best.safetensors").exists()
        heading, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
        rows = [dict(zip(heading.split(","), map(float, row.split(",")), strict=True)) for row in rows]
        return load_file(tmp_path / "run" / "weights.safetensors"), rows
    return call


def image_transform(mean, std, *first):
    return v2.Compose([*first, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def train_by_hand(model, train, valid, batch_size, optimizer, epochs, schedule, metric_steps=False, half=False,
           patience=None, best_kept=True):
    """The plain training loop. Returns the final (or best) weights and a row of metrics per epoch."""
    train, valid = DataLoader(train, batch_size, shuffle=True), DataLoader(valid, batch_size)
    criterion, best, waited, rows = nn.CrossEntropyLoss(), (-1.0, None), 0, []
    torch.manual_seed(0)
    for _ in range(epochs):
        model.train()
        for input, target in train:
            lr = optimizer.param_groups[0]["lr"]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = criterion(model(input), target)
            loss.backward()
            optimizer.step()
            if schedule and schedule[0] == "step":
                schedule[1].step()
        model.eval()
        total = right = count = 0
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            for input, target in valid:
                output = model(input)
                total += criterion(output, target).double().item() * len(target)
                right += (output.argmax(1) == target).sum().item()
                count += len(target)
        rows.append({"val_loss": total / count, "val_accuracy": right / count, "lr": lr})
        if schedule and schedule[0] == "epoch":
            schedule[1].step(*([total / count] if metric_steps else []))
        if right / count > best[0]:
            best, waited = (right / count, copy.deepcopy(model.state_dict())), 0
        else:
            waited += 1
        if patience and waited >= patience:
            break
    return best[1] if patience and best_kept else model.state_dict(), rows


def assert_same(weights, rows, expected, expected_rows):
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name
    assert len(rows) == len(expected_rows)
    for row, expected_row in zip(rows, expected_rows, strict=True):
        # Not exact: the means are summed in another order, and torch computes each rate from the one before.
        assert {key: row[key] for key in expected_row} == pytest.approx(expected_row, rel=1e-6)


@pytest.mark.usefixtures("imagenet")
@pytest.mark.filterwarnings("default:Python 3.14 will, by default, filter:DeprecationWarning")    # in torchvision
def test_row_28_resnet50_on_imagenet(run, tmp_path):
    weights, rows = run(0, "--epochs", "2", "--batch-size", "3", replace=("augment=false", "augment=false,size=64"))
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"} <= set(rows[0])

    to_tensor = image_transform((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), v2.Resize(64 * 256 // 224), v2.CenterCrop(64))
    train, valid = (datasets.ImageNet(tmp_path, split, transform=to_tensor) for split in ("train", "val"))
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None, num_classes=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    assert_same(weights, rows, *train_by_hand(model, train, valid, 3, optimizer, 2, ("epoch", schedule), half=True))


def test_row_29_a_linear_model_on_mnist(run, tmp_path, grey):
    name, mean, std, _ = grey
    weights, rows = run(1, "--epochs", "30", replace=("mnist", name) if name != "mnist" else ("", ""))

    cls, to_tensor = {"mnist": datasets.MNIST, "fashionmnist": datasets.FashionMNIST}[name], image_transform([mean], [std])
    train, valid = (cls(tmp_path, train=part, transform=to_tensor) for part in (True, False))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer)
    assert_same(weights, rows, *train_by_hand(model, train, valid, 64, optimizer, 30, ("epoch", schedule), metric_steps=True, patience=10))


def test_row_30_a_vit_on_cifar(run, tmp_path, cifar):
    name, classes, _ = cifar
    weights, rows = run(2, "--epochs", "3", replace=("cifar10", name))
    assert rows[0]["lr"] < rows[1]["lr"] < rows[2]["lr"]                           # still in the warmup

    cls, mean, std = {"cifar10": (datasets.CIFAR10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
                      "cifar100": (datasets.CIFAR100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))}[name]
    crops = v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()
    train = cls(tmp_path, train=True, transform=image_transform(mean, std, *crops))
    valid = cls(tmp_path, train=False, transform=image_transform(mean, std))
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 4, 6, 4, 64, 128, num_classes=classes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=1e-4)
    steps = len(DataLoader(train, 128))

    def factor(step):
        return (1 / 3 + (1 - 1 / 3) * min(1.0, step / (5 * steps))) * ((1 + math.cos(math.pi * (step // steps) / 200)) / 2)

    schedule = lr_scheduler.LambdaLR(optimizer, factor)
    assert_same(weights, rows, *train_by_hand(model, train, valid, 128, optimizer, 3, ("step", schedule), patience=30, best_kept=False))
