"""What a checkpoint costs, beside writing as many bytes and beside torch.save alone; medians of interleaved rounds.

    python benchmarks/saving.py [--dir FOLDER]
"""
from __future__ import annotations

import argparse
import os
import statistics
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torchvision.models import resnet18, resnet50

from loopctl import Run, fit, hookimpl
from loopctl.checkpoint.atomic_files import save_checkpoint
from loopctl.checkpoint.state import capture_state


class Measure:
    """At the first safe point, write the run's state again and again, in three ways."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.seen_in_epoch != 2:
            return
        ours, theirs, raw = (self.folder / name for name in ("ours", "theirs", "raw"))
        times: dict[str, list[float]] = {"ours": [], "theirs": [], "raw": []}
        for _ in range(self.rounds):
            with timed(times["ours"]):
                save_checkpoint(capture_state(run), ours)
            data = ours.read_bytes()
            with timed(times["theirs"]), theirs.open("wb") as file:
                torch.save(capture_state(run), file)
                sync(file)
            with timed(times["raw"]), raw.open("wb") as file:
                file.write(data)
                sync(file)
        self.size = len(data)
        self.medians = {name: statistics.median(found) for name, found in times.items()}


class timed:
    def __init__(self, times: list[float]) -> None:
        self.times = times

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.times.append(time.perf_counter() - self.began)


def sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


MODELS = {
    "64-64-10": (lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), (32, 64), 99),
    "ResNet-18, SGD": (lambda: resnet18(num_classes=10), (2, 3, 32, 32), 9),
    "ResNet-18, AdamW": (lambda: resnet18(num_classes=10), (2, 3, 32, 32), 9),
    "ResNet-50, AdamW": (lambda: resnet50(num_classes=10), (2, 3, 32, 32), 5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dir", help="where to write; a new folder for temporary files if left out")
    folder = parser.parse_args().dir
    torch.set_num_threads(1)
    print("| state | MB | loopctl, ms | torch.save, ms | as many bytes, ms |\n|---|---|---|---|---|")
    for name, (make, shape, rounds) in MODELS.items():
        adam, sgd = partial(torch.optim.AdamW, lr=1e-3), partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        optimizer = adam if "AdamW" in name else sgd
        batches = [(torch.randn(shape), torch.zeros(shape[0], dtype=torch.long))] * 3
        with TemporaryDirectory(dir=folder) as place:
            measure = Measure(Path(place), rounds)
            fit(make(), nn.CrossEntropyLoss(), optimizer, batches, plugins=[measure])
        cost = "".join(f" {1000 * measure.medians[way]:,.1f} |" for way in ("ours", "theirs", "raw"))
        print(f"| {name} | {measure.size / 1e6:,.2f} |{cost}")


if __name__ == "__main__":
    main()
