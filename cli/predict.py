"""`loopctl predict`: what the model of a run says about image files, or about data of the user's own."""
from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from loopctl.checkpoint.atomic_files import atomic_write, claim_output
from loopctl.cli.data import split_parts
from loopctl.cli.saved_run import SavedRun, load_run
from loopctl.cli.specs import call_factory, resolve
from loopctl.data.batch import to_device
from loopctl.data.dataset import Data, check_workers
from loopctl.data.device_loader import transformed
from loopctl.errors import UsageError, harmless, one_line
from loopctl.model.forward import named_inputs, predictions
from loopctl.prepare import find_device

Outputs = Iterator[tuple[list[str], Tensor]]            # of each batch: what each row is about, and the model's outputs


@dataclass
class Columns:
    """Which columns a CSV file has, besides that of what a row is about."""

    top: int = 1                    # of the most probable classes, each with its probability
    every: bool = False             # the probability of each class


@dataclass(eq=False)
class ImageFiles(Dataset[Any]):
    """The inputs that image files become; in place of one that cannot be read, what is wrong with it, as text."""

    files: list[Path]
    transforms: Any
    skipped: list[str] = field(default_factory=list)        # what was wrong with each that was skipped

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.transforms(self.files[index])
        except UsageError as error:
            return one_line(error)


def write_predictions(folder: Path, inputs: tuple[str, ...], out: Path | None, weights: str | None, device: str,
                      batch_size: int, workers: int, columns: Columns) -> None:
    """Write the predictions of the run in `folder` for the `inputs` to stdout, or to the new file `out`.

    An image that cannot be read is named and skipped; at the end, an exception makes the command exit with status 1.
    Raises UsageError where the run or the inputs cannot be used.
    """
    if out and out.suffix.lower() not in (".csv", ".npy"):
        raise UsageError(f"--out {out}: predictions are written as .csv or, for a numpy array of the model's outputs, "
                         f".npy; use {out}.csv")
    if out:
        claim_output(out, False, "--out")
    check_workers(workers)
    run, place = load_run(folder, weights), find_device(device)
    run.model.to(place)
    images = None
    if any(is_spec(text) for text in inputs):
        if len(inputs) > 1:
            raise UsageError(f"predict takes image files and folders, or one function that makes data, such as "
                             f"mine.py:test; not {len(inputs)} inputs with such a function")
        label, outputs = "sample", outputs_for_data(run, inputs[0], place, batch_size, workers)
    else:
        if not run.transforms:
            raise UsageError(f"{folder} was trained on {run.config.get('data')}, and how an image becomes an input is "
                             "not known; pass a function that makes the data, such as mine.py:test")
        images = ImageFiles(find_images(inputs), run.transforms)
        label, outputs = "path", outputs_for_images(run, images, place, batch_size, workers)
    if out and out.suffix.lower() == ".npy":
        count = write_array(outputs, out)
    else:
        count = write_csv(csv_rows(run, outputs, label, columns), out)
    if out:
        click.echo(f"{out}: {count:,} rows, with the weights in {run.weights}")
    if images and images.skipped:
        raise click.ClickException(f"{len(images.skipped):,} of {len(images):,} images were skipped, because they "
                                   "cannot be read; they are named above")


# The inputs


def is_spec(text: str) -> bool:
    """Whether an input names a function, as `file.py:name` or `package.module:name`, and not an existing file."""
    return not os.path.exists(text) and "." in text.partition(":")[0] and ":" in text


def find_images(inputs: Iterable[str]) -> list[Path]:
    """The files that the inputs name, and the images in the folders that they name, in this order; in folders by name.

    Folders and images in a folder whose names start with a dot are left out. Raises UsageError where there are none.
    """
    from loopctl.cli.image_folder import IMG_EXTENSIONS

    found: list[Path] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise UsageError(f"there is no file or folder {path}")
        if not path.is_dir():
            found.append(path)
            continue
        before = len(found)
        for root, folders, files in os.walk(path, followlinks=True):
            here = Path(root).resolve()
            folders[:] = [name for name in sorted(folders) if not name.startswith(".")
                          and not here.is_relative_to(Path(root, name).resolve())]          # a link that leads back
            found += [Path(root, name) for name in sorted(files)
                      if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")]
        if len(found) == before:
            raise UsageError(f"there is no image in {path}; the names of images end in {', '.join(IMG_EXTENSIONS)}")
    return found


def outputs_for_images(run: SavedRun, images: ImageFiles, device: torch.device, batch_size: int,
                       workers: int) -> Outputs:
    """Yield the outputs for batches of images. One that cannot be read is named on stderr, and left out."""
    position = 0
    for batch in DataLoader(images, batch_size, num_workers=workers, collate_fn=list):
        files, position = images.files[position:position + len(batch)], position + len(batch)
        wrong = [sample for sample in batch if isinstance(sample, str)]
        for text in wrong:
            click.echo(f"skipped: {text}", err=True)
        images.skipped += wrong
        good = [(str(file), sample) for file, sample in zip(files, batch, strict=True) if isinstance(sample, Tensor)]
        if good:
            yield [name for name, _ in good], call_model(run, torch.stack([sample for _, sample in good]), device)
    if len(images.skipped) == len(images):
        raise click.ClickException("none of the images can be read")


def outputs_for_data(run: SavedRun, spec: str, device: torch.device, batch_size: int, workers: int) -> Outputs:
    """Yield the outputs for batches of the data that the function named by `spec` returns."""
    count = 0
    for batch in own_batches(run, spec, device, batch_size, workers):
        output = call_model(run, input_of(batch), device)
        yield [str(number) for number in range(count, count + len(output))], output
        count += len(output)
    if not count:
        raise UsageError(f"data {spec} has no samples")


def own_batches(run: SavedRun, spec: str, device: torch.device, batch_size: int, workers: int) -> Iterable[Any]:
    """The batches of the user's own data, as `batches_of` makes them; of a Data, after its `batch_transform`.

    Of a pair (train, valid) of data sets, as for training, the second is used.
    """
    name, factory, options = resolve("data", spec, lambda: (), lambda name: factory)
    made = call_factory(f"data {name}", factory, options, {"root": run.config.get("data_root"), "download": False})
    batches = batches_of(run, name, inputs_of(name, made), batch_size, workers)
    if isinstance(made, Data) and made.batch_transform is not None:
        return (transformed(made.batch_transform, to_device(batch, device)) for batch in batches)
    return batches


def batches_of(run: SavedRun, name: str, data: Any, batch_size: int, workers: int) -> Iterable[Any]:
    """The batches of a data set, a DataLoader, or an iterable of samples or of batches.

    Raises UsageError for anything else.
    """
    if isinstance(data, DataLoader):
        return data
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and not hasattr(data, "__iter__")):
        return DataLoader(data, batch_size, num_workers=workers)
    if not hasattr(data, "__iter__"):
        raise UsageError(f"data {name} returned a {type(data).__name__}; return a data set, a DataLoader, or an "
                         "iterable of samples or batches")
    iterator = iter(data)
    first = list(islice(iterator, 1))
    whole = chain(first, iterator)
    if first and np.ndim(input_of(first[0])) > len(run.shape or ()):
        return whole
    return (default_collate(batch) for batch in iter(lambda: list(islice(whole, batch_size)), []))


def inputs_of(name: str, data: Any) -> Any:
    """The data to predict for in what a function has returned; of training and validation data it is the latter."""
    pair = isinstance(data, tuple | list) and len(data) == 2 and all(
        isinstance(part, Dataset | DataLoader | dict) or part is None for part in data)
    if not isinstance(data, Data | Mapping) and not pair:
        return data
    parts = data if isinstance(data, Data) else Data(*split_parts(name, data))
    sets = parts.validation_sets
    if len(sets) > 1:
        raise UsageError(f"data {name} has several validation sets, {', '.join(sets)}; name a function that returns "
                         "one of them")
    return next(iter(sets.values()), parts.train)


def of_classes(run: SavedRun) -> bool:
    """Whether the outputs are logits of classes: the loss was cross entropy."""
    return str(run.config.get("loss") or "cross_entropy").partition(":")[0].replace("_", "").lower() == "crossentropy"


def input_of(batch: Any) -> Any:
    """The model's input in a batch or a sample: its first part, or all of it if it has no parts, or is a dict."""
    return batch[0] if isinstance(batch, tuple | list) and batch else batch


def call_model(run: SavedRun, inputs: Any, device: torch.device) -> Tensor:
    """The model's output for a batch, on the CPU. Raises UsageError where it is not a tensor."""
    try:
        with torch.no_grad():
            placed = to_device(inputs, device)
            output = predictions(run.model(**named_inputs(run.model, placed)) if isinstance(placed, Mapping)
                                 else run.model(placed))
    except Exception as error:
        if isinstance(inputs, Tensor) and run.shape:
            error.add_note(f"the model was trained on inputs of shape {run.shape}, and this batch has "
                           f"{tuple(inputs.shape)}")
        raise
    if not isinstance(output, Tensor) or not output.dim():
        raise UsageError(f"the model returned a {type(output).__name__}, not a tensor with a row for each sample; use "
                         "loopctl.load_run in Python")
    output = output.cpu()
    return output.float() if output.is_floating_point() and output.itemsize < 4 else output      # numpy has no bfloat16


# The predictions


def csv_rows(run: SavedRun, outputs: Outputs, label: str, columns: Columns) -> Iterator[list[list[str]]]:
    """Yield the rows of a CSV file, some at a time, first the header.

    The output of a classifier becomes the most probable class and its probability; other outputs have a column each.
    """
    names = run.classes
    for number, (labels, output) in enumerate(outputs):
        classes = bool(names) and output.shape[1:] == (len(names),) and of_classes(run)
        if not classes and (columns.top > 1 or columns.every):
            raise UsageError("--top and --all are for models with an output for each class")
        if not classes and output.dim() > 2:
            raise UsageError(f"the outputs of a sample have the shape {tuple(output.shape[1:])}, and do not fit in a "
                             "row; use --out FILE.npy")
        if columns.top > len(names) > 0:
            raise UsageError(f"--top {columns.top}: there are {len(names)} classes")
        if not number:
            ranked = [f"{name}_{place}" if place > 1 else name for place in range(1, columns.top + 1)
                      for name in ("class", "probability")]
            all_classes = [f"probability_{name}" for name in names] if columns.every else []
            width = 1 if output.dim() == 1 else output.shape[1]
            yield [[label, *(ranked + all_classes if classes else [f"output_{column}" for column in range(width)])]]
        if classes:
            values = output.softmax(1)
            best = output.sort(dim=1, descending=True, stable=True).indices[:, :columns.top]
            yield [[about, *chain.from_iterable((names[index], str(row[index])) for index in places),
                    *(map(str, row) if columns.every else ())]
                   for about, places, row in zip(labels, best.tolist(), values.numpy(), strict=True)]
        else:
            yield [[about, *map(str, row)]
                   for about, row in zip(labels, output.reshape(len(output), -1).numpy(), strict=True)]


def write_csv(rows: Iterator[list[list[str]]], out: Path | None) -> int:
    """Write the rows to the new file `out`, or to stdout as they come. Return their number, without the header."""
    count = -1
    # A file has the names of images as they are. On stdout their unprintable characters are escaped.
    with atomic_write(out) if out else nullcontext() as temporary, (
            temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") if temporary
            else nullcontext(sys.stdout)) as file:
        writer = csv.writer(file, lineterminator="\n")
        for some in rows:
            writer.writerows(some if out else [[harmless(cell) for cell in row] for row in some])
            file.flush()
            count += len(some)
    return count


def write_array(outputs: Outputs, out: Path) -> int:
    """Write the model's outputs to the new file `out`, as a numpy array with a row for each sample; return its rows."""
    whole = torch.cat([output for _, output in outputs]).numpy()
    with atomic_write(out) as temporary, temporary.open("wb") as file:
        np.save(file, whole)
    return len(whole)
