"""The confusion matrix of a pass over data, and its worst mistakes, in bounded memory and without waiting."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from loopctl.data.batch import iter_tensors
from loopctl.errors import UsageError
from loopctl.metrics.named import with_classes_second

MAX_CLASSES = 1000
MAX_SIDE = 128          # pixels of a picture that is kept


@dataclass
class Mistake:
    """A sample that was taken for another class than its own."""

    loss: float                 # the negative logarithm of the probability of its class
    true: int
    predicted: int
    probability: float          # of the predicted class
    index: int                  # its number in the pass of its process, from 0
    picture: Tensor | None      # (channels, height, width), if its input is an image


def scores_and_classes(output: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Return the logits with the classes in the second dimension, and the numbers of the classes.

    Raises UsageError where the outputs are no logits of at most `MAX_CLASSES` classes, or the targets no such numbers.
    """
    second = isinstance(output, Tensor) and isinstance(target, Tensor) and (
        output.shape[:1] + output.shape[2:] == target.shape)            # torch's place of the classes, where it fits
    scores, classes = with_classes_second("a matrix of classes", output, target, 1 if second else None)
    if output.shape == target.shape or target.is_floating_point():
        raise UsageError("the targets are no numbers of classes, which a confusion matrix needs; leave confusion out")
    if scores.shape[1] > MAX_CLASSES:
        raise UsageError(f"the model has {scores.shape[1]:,} outputs, and a matrix of more than {MAX_CLASSES:,} "
                         "classes is not kept; leave confusion out")
    return scores, classes


class ConfusionMatrix:
    """How often each class was taken for each, in one pass over data, and the samples with the largest losses.

    worst: how many mistakes to keep

    Everything stays on the device of the outputs. Targets that are no class, such as -100, do not count.
    """

    def __init__(self, worst: int) -> None:
        self.worst, self.seen = worst, 0
        self.counts: Tensor | None = None           # of the pair (true, predicted), flattened; the last one is of none
        self.rows: Tensor | None = None             # of the worst mistakes, worst first: a column per number of Mistake
        self.pictures: Tensor | None = None

    @torch.no_grad()
    def update(self, output: Any, target: Any, batch: Any) -> None:
        """Count a batch. Raises UsageError where it is not one of classes."""
        scores, classes = scores_and_classes(output, target)
        number, classes = scores.shape[1], classes.long()
        predicted = scores.argmax(1)
        known = (classes >= 0) & (classes < number)
        if self.counts is None:
            self.counts = torch.zeros(number * number + 1, dtype=torch.int64, device=scores.device)
        pairs = torch.where(known, classes * number + predicted, number * number).reshape(-1)
        self.counts.index_add_(0, pairs, torch.ones_like(pairs))
        if scores.ndim == 2 and self.worst:
            self.keep_worst(scores, classes, predicted, known, batch)
        self.seen += len(scores)

    def keep_worst(self, scores: Tensor, classes: Tensor, predicted: Tensor, known: Tensor, batch: Any) -> None:
        """Keep the worst of the mistakes kept so far and those of a batch."""
        logs = functional.log_softmax(scores.float(), 1)
        losses = -logs.gather(1, torch.where(known, classes, 0).unsqueeze(1)).squeeze(1)
        losses = torch.where(known & (predicted != classes), losses.nan_to_num(inf, inf), -inf)
        losses, chosen = losses.topk(min(self.worst, len(losses)))
        probabilities = logs.gather(1, predicted.unsqueeze(1)).squeeze(1).exp()
        columns = losses, classes[chosen], predicted[chosen], probabilities[chosen], chosen + self.seen
        rows, pictures = torch.stack([column.double() if column.device.type != "mps" else column.float()
                                      for column in columns], 1), pictures_of(batch, chosen)
        if self.rows is not None:
            rows = torch.cat([self.rows, rows])
            same = pictures is not None and self.pictures is not None and pictures.shape[1:] == self.pictures.shape[1:]
            pictures = torch.cat([self.pictures, pictures]) if same else None       # type: ignore[list-item]
        order = rows[:, 0].topk(min(self.worst, len(rows))).indices
        self.rows, self.pictures = rows[order], None if pictures is None else pictures[order]

    def on_host(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The counts, the rows and the pictures on the host, which waits for the device."""
        return tuple(None if part is None else part.cpu()               # type: ignore[return-value]
                     for part in (self.counts, self.rows, self.pictures))


def pictures_of(batch: Any, chosen: Tensor) -> Tensor | None:
    """The chosen inputs of a batch if they are images with one or three channels, reduced to `MAX_SIDE` pixels."""
    inputs = next(iter_tensors(batch), None)
    if inputs is None or inputs.ndim != 4 or inputs.shape[1] not in (1, 3) or not inputs.numel():
        return None
    images = inputs[chosen].float()
    factor = MAX_SIDE / max(images.shape[2:])
    if factor >= 1:
        return images
    return functional.interpolate(images, size=[max(1, round(side * factor)) for side in images.shape[2:]], mode="area")


def merged(parts: Iterable[tuple[Tensor | None, Tensor | None, Tensor | None]], worst: int) -> tuple[
        list[list[int]], list[Mistake]]:
    """Return the matrix, a row per true class, and the worst mistakes, of the passes of all processes."""
    parts = list(parts)
    counts = sum(part[0] for part in parts if part[0] is not None)
    assert isinstance(counts, Tensor)           # some process has seen a batch
    number = round((len(counts) - 1) ** 0.5)
    found = []
    for _, rows, pictures in parts:
        for place, (loss, true, predicted, probability, index) in enumerate([] if rows is None else rows.tolist()):
            if loss > -inf:
                found.append(Mistake(loss, int(true), int(predicted), probability, int(index),
                                     None if pictures is None else pictures[place]))
    return counts[:-1].view(number, number).tolist(), sorted(found, key=lambda each: -each.loss)[:worst]
