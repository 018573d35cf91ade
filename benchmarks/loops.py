"""The loops that benchmarks/gpu.py compares, one small function each, their networks, and the clock that times them.

Each is written as the documentation of its library says, with the same work: autocast, SGD with momentum, and the sums
of loss and accuracy on the device where the library has a place for them. Nothing clips, saves or prints, or reads the
loss in every step where that can be turned off. The epoch never ends, so no schedule would do anything.
"""
from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy

from loopctl import fit

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
for name in ("lightning.pytorch", "lightning.fabric", "transformers"):
    logging.getLogger(name).setLevel(logging.ERROR)


class Enough(Exception):
    """The clock has what it needs."""


class Batches:
    """The same few batches again and again. Those after the warm-up are timed for `seconds`; then Enough is raised.

    The clock is read twice, each time when a batch is asked for and the device is done with all before it. So it does
    not matter how a loop ends, or how many batches it reads in advance, and no loop waits in between.
    """

    def __init__(self, pool: list[Any], warmup: int, seconds: float) -> None:
        self.pool, self.warmup, self.seconds = pool, warmup, seconds
        self.rate: float | None = None          # samples per second

    def __len__(self) -> int:
        return 1_000_000

    def __iter__(self) -> Iterator[Any]:
        began = 0.0
        for step in count():
            if step == self.warmup:
                began = now()
            elif step > self.warmup and time.perf_counter() - began >= self.seconds:
                self.rate = (step - self.warmup) * len(self.pool[0][1]) / (now() - began)
                raise Enough
            yield self.pool[step % len(self.pool)]


def now() -> float:
    """The time in seconds, when the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pool(batch: int, size: int, classes: int, device: str, pinned: bool = False) -> list[Any]:
    """Batches of random pictures and labels: on the device, or in pinned memory where there is a GPU."""
    torch.manual_seed(0)
    batches = [(torch.randn(batch, 3, size, size), torch.randint(classes, (batch,))) for _ in range(8)]
    if pinned and torch.cuda.is_available():
        return [tuple(part.pin_memory() for part in pair) for pair in batches]
    return [tuple(part.to(device) for part in pair) for pair in batches]


def resnet50() -> nn.Module:
    return torchvision.models.resnet50(num_classes=1000)


def resnet18() -> nn.Module:
    """For 32 x 32: no stride and no pooling at the start."""
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    return model


def vit() -> nn.Module:
    return torchvision.models.VisionTransformer(image_size=32, patch_size=4, num_layers=6, num_heads=4, hidden_dim=256,
                                                mlp_dim=512, num_classes=10)


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


def by_hand(model: nn.Module, data: Batches, device: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """The loop as people write it, but for `.item()` in every step, which would make the device wait."""
    model = model.to(device).train()
    loss_fn, optimizer = nn.CrossEntropyLoss(), SGD(model.parameters())
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    total = right = torch.zeros((), device=device)
    for input, target in data:
        input, target = input.to(device, non_blocking=True), target.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            output = model(input)
            loss = loss_fn(output, target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        total = total + loss.detach() * len(target)
        right = right + (output.argmax(1) == target).sum()


def ours(model: nn.Module, data: Batches, device: str, *plugins: str, optimizer: Callable[..., Any] = SGD) -> None:
    fit(model, nn.CrossEntropyLoss(), optimizer, data, plugins=plugins, device=device, metrics={"accuracy": accuracy})


def lightning(model: nn.Module, data: Batches, device: str) -> None:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            output = self.model(batch[0])
            loss = cross_entropy(output, batch[1])
            self.log_dict({"loss": loss, "accuracy": accuracy(output, batch[1])}, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self) -> Any:
            return SGD(self.parameters())

    trainer = lightning.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, precision="bf16-mixed", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(Module(), data)


def accelerate(model: nn.Module, data: Batches, device: str) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=device == "cpu")
    loss_fn, bare = nn.CrossEntropyLoss(), SGD(model.parameters())
    model, optimizer = accelerator.prepare(model, bare)
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


def transformers(model: nn.Module, data: Batches, device: str) -> None:
    """Its Trainer, which has no place for the accuracy of training."""
    from transformers import Trainer, TrainingArguments

    class Images(Trainer):
        def get_train_dataloader(self) -> Any:
            return data

        def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **_: Any) -> torch.Tensor:
            return cross_entropy(model(inputs[0]), inputs[1])

    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=len(data.pool[0][1]), bf16=True, max_grad_norm=0,
            lr_scheduler_type="constant", report_to="none", save_strategy="no", logging_strategy="no",
            logging_nan_inf_filter=False, disable_tqdm=True, use_cpu=device == "cpu")
        # A data set that is never read: only its being there is asked for.
        Images(model, arguments, train_dataset=data.pool, optimizers=(SGD(model.parameters()), None)).train()


def rate(loop: Callable[[nn.Module, Batches, str], None], make: Callable[[], nn.Module], batches: list[Any],
         device: str, warmup: int, seconds: float) -> float:
    """Images per second of a loop. What the loop raises when the clock has been read twice is no matter."""
    torch.manual_seed(0)
    data = Batches(batches, warmup, seconds)
    try:
        loop(make(), data, device)
    except Exception:
        if data.rate is None:
            raise
    if data.rate is None:
        raise RuntimeError("the loop ended before its time")
    return data.rate
