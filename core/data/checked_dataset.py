"""`CheckedDataset`: a data set whose errors name the sample, and which refuses labels that the loss cannot take."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from loopctl.errors import UsageError, one_line
from loopctl.rng import host_rng_state, set_host_rng_state

IGNORED = -100               # the label that torch's cross-entropy leaves out, by default


class DataError(UsageError):
    """A sample that cannot be read, or a wrong label.

    torch raises an error of a loader worker again in the main process, with its whole traceback as the message. Of such
    a text, only the message at its end is kept.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rstrip().rpartition(f".{type(self).__name__}: ")[2])


class Samples(list[Any]):
    """The samples of a batch, and their indices in the data set."""

    def __init__(self, samples: list[Any], indices: list[int]) -> None:
        super().__init__(samples)
        self.indices = indices


class CheckedDataset(Dataset[Any]):
    """`dataset` with the same samples and attributes. An error names the sample by its index and its file.

    Its method `collate` is a collate_fn: torch's default_collate, and a check of the labels of the batch.

    label: how a message begins; the index of a sample comes next, as in `data digits: training sample 3`
    classes: the number of classes; None for labels that are not checked
    image_shape: the shape of an image, for a trial of the model
    """

    def __init__(self, dataset: Any, label: str, classes: int | None, image_shape: tuple[int, ...] = ()) -> None:
        self.dataset, self.label, self.classes, self.image_shape = dataset, label, classes, image_shape

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":               # asked for while the object is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return a sample. Raises DataError where its file cannot be read; other errors get a note with the index."""
        try:
            return self.dataset[index]
        except (OSError, UsageError) as error:
            text = one_line(error)
            raise DataError(f"{self.where(index, text)}: {text}") from error
        except Exception as error:
            error.add_note(f"raised by {self.where(index)}")
            raise

    def __getitems__(self, indices: list[int]) -> Any:
        if not (read := getattr(self.dataset, "__getitems__", None)):
            return Samples([self[index] for index in indices], indices)
        try:
            return Samples(read(indices), indices)
        except (OSError, UsageError):
            for index in indices:           # read again one by one, which raises an error that names the sample
                self[index]
            raise

    def where(self, index: int, text: str = "") -> str:
        """Name the sample at `index`, and its file unless `text` does."""
        file = file_of(self.dataset, index)
        return f"{self.label} {index} (counted from 0{f'; {file}' if file and file not in text else ''})"

    def collate(self, samples: Any, collate_fn: Callable[[Any], Any] = default_collate) -> Any:
        """Return the batch of Samples. Raises DataError where one has a label that cross-entropy cannot take."""
        batch = collate_fn(samples)
        known = self.classes is not None and collate_fn is default_collate      # which sample a label is from
        if known and isinstance(batch, list | tuple) and len(batch) == 2:
            assert self.classes is not None
            wrong = first_wrong(batch[1], self.classes)
            if wrong is not None:
                raise self.label_error(samples.indices[wrong], samples[wrong][1])
        return batch

    # A batch has as many samples as indices, so `Parallel` need not exchange the counts.
    collate.keeps_sample_count = True           # type: ignore[attr-defined]

    def label_error(self, index: int, label: Any) -> DataError:
        """Return the error for the wrong `label` of the sample at `index`."""
        assert self.classes is not None
        where, value = self.where(index), whole_number(label)
        if value is not None and not 0 <= value < self.classes:
            advice = "count from 0, not from 1" if value == self.classes else "correct it, or the number of classes"
            return DataError(f"{where} has the label {value}; the labels of {self.classes} classes are 0 to "
                             f"{self.classes - 1}: {advice}")
        kind = (f"tensor of {str(label.dtype).removeprefix('torch.')} and shape {tuple(label.shape)}"
                if isinstance(label, Tensor) else type(label).__name__)
        return DataError(f"{where} has a label of a wrong type, {kind}; use an int, or an int64 tensor of shape (), "
                         f"for the number of the class, or {self.classes} floats for probabilities")

    def check_known(self) -> None:
        """Check the labels that are known without reading the samples.

        A wrong one is believed only if the sample has it too: the data set may change its labels when it reads them.
        Raises DataError.
        """
        labels = known_labels(self.dataset)
        wrong = first_wrong(labels, self.classes) if labels is not None and self.classes is not None else None
        if wrong is not None:
            before = host_rng_state()
            self.collate(self.__getitems__([wrong]))
            set_host_rng_state(before)


def first_wrong(labels: Any, classes: int) -> int | None:
    """Return the position of the first of a batch's labels that cross-entropy with `classes` classes cannot take.

    It takes class numbers, int64 or uint8 of shape (N,), and probabilities, floats of shape (N, classes).
    """
    if not isinstance(labels, Tensor) or not labels.dim():
        return 0
    if labels.is_floating_point():
        return None if labels.shape[1:] == (classes,) else 0
    if labels.dim() != 1 or labels.dtype == torch.bool:
        return 0
    if len(labels):             # the usual case is two reductions, which takes a few microseconds
        lowest, highest = labels.aminmax()
        if lowest < 0 or highest >= classes:
            wrong = (labels >= classes) | (labels < 0) & (labels != IGNORED)
            if wrong.any():
                return int(wrong.int().argmax())
    return None if labels.dtype in (torch.int64, torch.uint8) else 0


def whole_number(label: Any) -> int | None:
    """Return a label that is one whole number as an int; otherwise None, also for True and False."""
    value = label.item() if isinstance(label, Tensor | np.generic) and not label.ndim else label
    return value if type(value) is int else None


def known_labels(dataset: Any) -> Tensor | None:
    """Return all labels of a data set that has them as a tensor, or in `targets` or `labels`; otherwise None."""
    if isinstance(dataset, Subset):
        labels = known_labels(dataset.dataset)
        return None if labels is None else labels[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, TensorDataset):
        found = dataset.tensors[1] if len(dataset.tensors) == 2 else None
    else:
        found = getattr(dataset, "targets", getattr(dataset, "labels", None))
    try:
        labels = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):           # None, text, or lists of unequal lengths
        return None
    return labels if labels.dim() and len(labels) == len(dataset) else None


def file_of(dataset: Any, index: int) -> str:
    """Return the file of a sample, or "" where it is unknown. Data sets of torchvision have it in `samples`."""
    if isinstance(dataset, Subset):
        return file_of(dataset.dataset, dataset.indices[index])
    try:
        file = dataset.samples[index][0]
    except (AttributeError, LookupError, TypeError):
        return ""
    return file if isinstance(file, str) else ""
