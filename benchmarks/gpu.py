"""Images per second on a GPU in a loop by hand, in loopctl and in others, in one run: medians of rounds in turns.

    python benchmarks/gpu.py                  all three parts, on cuda
    python benchmarks/gpu.py --tiny           a few small batches on whatever there is: that the script works
    python benchmarks/gpu.py --parts resnet50 --rounds 9

resnet50    ResNet-50 on batches of 128 pictures of 224 x 224 from pinned memory, SGD with momentum, autocast, cosine:
            the complete ImageNet program but for reading files. Loss and accuracy are summed on the device.
small       ResNet-18 and a vision transformer on 32 x 32, batches of 128 that are on the device already.
others      lightning and accelerate with the first part's work, if they are installed.

The clock runs from the batch after the warm-up, compilation and capture included in that, to the last one's end, and
is read when the device is done.
"""
from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import torchvision
from torch import nn

from loopctl import fit

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
PUBLISHED = 2470        # images/s: ResNet-50 training in mixed precision on one A100 80 GB, as NVIDIA published it


class Batches:
    """The same few batches again and again; knows how long those after the warm-up took."""

    def __init__(self, pool: list[Any], warmup: int, steps: int) -> None:
        self.pool, self.warmup, self.steps = pool, warmup, steps
        self.seconds = 0.0

    def __len__(self) -> int:
        return self.warmup + self.steps

    def __iter__(self) -> Iterator[Any]:
        for step in range(len(self)):
            if step == self.warmup:
                began = now()
            yield self.pool[step % len(self.pool)]
        self.seconds = now() - began


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pool(batch: int, size: int, classes: int, device: str, pinned: bool) -> list[Any]:
    torch.manual_seed(0)
    batches = [(torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))) for _ in range(8)]
    if pinned and torch.cuda.is_available():
        return [tuple(part.pin_memory() for part in pair) for pair in batches]
    return [tuple(part.to(device) for part in pair) for pair in batches]


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


def by_hand(model: nn.Module, data: Batches, device: str, dtype: torch.dtype | None = torch.bfloat16) -> None:
    """The loop as people write it, but for `.item()` in every step, which would make the device wait."""
    model = model.to(device).train()
    loss_fn, optimizer = nn.CrossEntropyLoss(), SGD(model.parameters())
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    total = right = torch.zeros((), device=device)
    for input, target in data:
        input, target = input.to(device, non_blocking=True), target.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            output = model(input)
            loss = loss_fn(output, target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total = total + loss.detach() * len(target)
        right = right + (output.argmax(1) == target).sum()
    schedule.step()
    print(end="" if torch.isfinite(total) and right >= 0 else "the loss is not finite; ")


def ours(model: nn.Module, data: Batches, device: str, *plugins: str, fused: bool = False) -> None:
    optimizer = partial(SGD, fused=True) if fused else SGD
    fit(model, nn.CrossEntropyLoss(), optimizer, data, plugins=[*plugins, "cosine:t_max=10"], device=device,
        metrics={"accuracy": accuracy})


def lightning(model: nn.Module, data: Batches, device: str) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            output = self.model(batch[0])
            loss = nn.functional.cross_entropy(output, batch[1])
            self.log_dict({"loss": loss, "accuracy": accuracy(output, batch[1])}, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters())
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]

    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, precision="bf16-mixed", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Module(), data)


def accelerate(model: nn.Module, data: Batches, device: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
    loss_fn, bare = nn.CrossEntropyLoss(), SGD(model.parameters())
    model, optimizer = accelerator.prepare(model, bare)
    schedule = accelerator.prepare(torch.optim.lr_scheduler.CosineAnnealingLR(bare, 10))
    model.train()
    total = right = torch.zeros((), device=device)
    for input, target in data:
        input, target = input.to(device, non_blocking=True), target.to(device, non_blocking=True)
        optimizer.zero_grad()
        with accelerator.autocast():
            output = model(input)
            loss = loss_fn(output, target)
        accelerator.backward(loss)
        optimizer.step()
        total = total + loss.detach() * len(target)
        right = right + (output.argmax(1) == target).sum()
    schedule.step()


Loops = dict[str, Callable[[nn.Module, Batches, str], None]]
BOTH: Loops = {"by hand": by_hand, "loopctl amp": lambda *run: ours(*run, "amp")}
RESNET50: Loops = {
    **BOTH,
    "by hand, float16": lambda *run: by_hand(*run, dtype=torch.float16),
    "loopctl amp:dtype=float16": lambda *run: ours(*run, "amp:dtype=float16"),
    "loopctl amp channels_last": lambda *run: ours(*run, "amp", "channels_last"),
    "loopctl amp channels_last compile prefetch, fused SGD": lambda *run: ours(
        *run, "amp", "channels_last", "compile", "prefetch", fused=True),
}
SMALL: Loops = {
    **BOTH,
    "loopctl amp cudagraph, fused SGD": lambda *run: ours(*run, "amp", "cudagraph", fused=True),
    "loopctl amp compile cudagraph, fused SGD": lambda *run: ours(*run, "amp", "compile", "cudagraph", fused=True),
}
OTHERS: Loops = {**BOTH, "lightning": lightning, "accelerate": accelerate}


def resnet18() -> nn.Module:
    """For 32 x 32: no stride and no pooling at the start."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(image_size=32, patch_size=4, num_layers=6, num_heads=4, hidden_dim=256,
                                                mlp_dim=512, num_classes=10)


def compare(name: str, make: Callable[[], nn.Module], loops: Loops, batches: list[Any],
            args: argparse.Namespace) -> None:
    """Print each loop's images per second and its ratio to the first."""
    print(f"\n{name}, batches of {' x '.join(map(str, batches[0][0].shape))}\n\n"
          "| loop | images/s | of by hand |\n|---|---|---|")
    rates: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for loop, train in loops.items():
            if isinstance(rates.get(loop), str):
                continue
            torch.manual_seed(0)
            data = Batches(batches, args.warmup, args.steps)
            try:
                train(make(), data, args.device)
            except Exception as error:                  # a line in the table, and the others go on
                rates[loop] = f"{type(error).__name__}: {str(error).splitlines()[0]}"        # type: ignore[assignment]
                continue
            rates.setdefault(loop, []).append(args.steps * len(batches[0][1]) / data.seconds)
    first = rates["by hand"]
    for loop, each in rates.items():
        if isinstance(each, str):
            print(f"| {loop} | not measured ({each}) | |")
        else:
            ratio = median(one / other for one, other in zip(each, first, strict=True))
            print(f"| {loop} | {median(each):,.0f} | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["resnet50", "small", "others"]
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cpu" and not args.tiny:
        parser.error("there is no CUDA device; --tiny shows on a CPU that the script works")
    if args.tiny:
        args.rounds, args.steps, args.warmup = 1, 2, 4
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, Python {platform.python_version()}; medians of {args.rounds} rounds")
    large = pool(*(2, 32) if args.tiny else (128, 224), 1000, args.device, pinned=True)     # type: ignore[misc]
    small = pool(2 if args.tiny else 128, 32, 10, args.device, pinned=False)
    resnet50 = partial(torchvision.models.resnet50, num_classes=1000)
    if "resnet50" in args.parts:
        compare(f"ResNet-50 (published: {PUBLISHED:,} images/s on one A100)", resnet50, RESNET50, large, args)
    if "small" in args.parts:
        compare("ResNet-18, 32 x 32", resnet18, SMALL, small, args)
        compare("Vision transformer, 32 x 32", vit, SMALL, small, args)
    if "others" in args.parts:
        compare("ResNet-50 in other frameworks", resnet50, OTHERS, large, args)


if __name__ == "__main__":
    main()
