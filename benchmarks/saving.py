"""Time to write a checkpoint, compared with torch.save and with writing as many bytes; medians of interleaved rounds.

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
    """Write the run's state repeatedly in three ways, at a safe point of the first epoch, and time each."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder, rounds

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.seen_in_epoch != 2:
            return
        checkpoint, torch_save, raw = (self.folder / name for name in ("loopctl", "torch.save", "raw"))
        times: dict[str, list[float]] = {"loopctl": [], "torch.save": [], "raw": []}
        for _ in range(self.rounds):
            with timed(times["loopctl"]):
                save_checkpoint(capture_state(run), checkpoint)
            data = checkpoint.read_bytes()
            with timed(times["torch.save"]), torch_save.open("wb") as file:
                torch.save(capture_state(run), file)
                sync(file)
            with timed(times["raw"]), raw.open("wb") as file:
                file.write(data)
                sync(file)
        self.size = len(data)
        self.medians = {name: statistics.median(seconds) for name, seconds in times.items()}


class timed:
    def __init__(self, times: list[float]) -> None:
        self.times = times

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.times.append(time.perf_counter() - self.started)


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
    parser.add_argument("--dir", help="where to write; a temporary folder if left out")
    folder = parser.parse_args().dir
    torch.set_num_threads(1)
    print("| state | MB | loopctl, ms | torch.save, ms | as many bytes, ms |\n|---|---|---|---|---|")
    for name, (make, shape, rounds) in MODELS.items():
        adam, sgd = partial(torch.optim.AdamW, lr=1e-3), partial(torch.optim.SGD, lr=0.1, momentum=0.9)
        optimizer = adam if "AdamW" in name else sgd
        batches = [(torch.randn(shape), torch.zeros(shape[0], dtype=torch.long))] * 3
        with TemporaryDirectory(dir=folder) as temporary:
            measure = Measure(Path(temporary), rounds)
            fit(make(), nn.CrossEntropyLoss(), optimizer, batches, plugins=[measure])
        cost = "".join(f" {1000 * seconds:,.1f} |" for seconds in measure.medians.values())
        print(f"| {name} | {measure.size / 1e6:,.2f} |{cost}")


if __name__ == "__main__":
    main()
