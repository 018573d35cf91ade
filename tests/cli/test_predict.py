"""`loopctl predict`: equal to the plain loop, bit for bit; damaged images; data of one's own; wrong input."""
import csv
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from loopctl import UsageError, load_weights
from loopctl.cli import main, models
from loopctl.cli.predict import Columns, csv_rows
from loopctl.cli.saved_run import SavedRun


def run_loopctl(*arguments, status=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with images of three classes in data/, a run that was trained on them in a/, and mine.py."""
    root = tmp_path_factory.mktemp("trained")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 7)):
        for number, name in enumerate(("bird", "cat", "dog")):
            folder = root / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (20, 26, 3), dtype=np.uint8)
                pixels[..., number] //= 2
                Image.fromarray(pixels).save(folder / f"{index}.png")
    run_loopctl("run", "--data", "imagefolder:size=14", "--data-root", root / "data", "--model", "cnn:width=4", "--epochs", 6, "--lr", 0.01,
                "--batch-size", 8, "--out", root / "a", "--without", "progress")
    return root


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of that folder, in which the test runs."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plain_outputs(weights, batch_size):
    """What a plain loop computes for the validation images: their files, their classes and the model's outputs."""
    transform = v2.Compose([v2.Resize(16), v2.CenterCrop(14), v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    dataset = ImageFolder("data/val", transform)
    model = models.cnn(3, 3, width=4)
    load_weights(model, weights)
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(images) for images, _ in DataLoader(dataset, batch_size)])
    return [path for path, _ in dataset.samples], torch.tensor(dataset.targets), outputs


@pytest.mark.parametrize("workers", [0, 2])
def test_predictions_of_a_folder_are_those_of_the_plain_loop_bit_for_bit(here, workers):
    files, _, outputs = plain_outputs("a/checkpoints/best.safetensors", 8)
    rows = rows_of(run_loopctl("predict", "a", "data/val", "--batch-size", 8, "--all", "--workers", workers).stdout)
    probabilities = outputs.softmax(1)
    assert [row["path"] for row in rows] == files
    assert [row["class"] for row in rows] == [("bird", "cat", "dog")[index] for index in outputs.argmax(1)]
    assert np.array_equal(np.array([row["probability"] for row in rows], np.float32), probabilities.max(1).values.numpy())
    columns = [[row[f"probability_{name}"] for name in ("bird", "cat", "dog")] for row in rows]
    assert np.array_equal(np.array(columns, np.float32), probabilities.numpy())


def test_the_accuracy_of_the_predictions_is_the_last_one_of_the_run(here):
    rows = rows_of(run_loopctl("predict", "a", "data/val", "--weights", "last").stdout)
    accuracy = np.mean([row["class"] == Path(row["path"]).parent.name for row in rows])
    last = rows_of(Path("a/metrics.csv").read_text())[-1]
    assert accuracy == pytest.approx(float(last["val_accuracy"]), abs=1e-7)
    assert accuracy > 0.4


def test_the_outputs_are_written_as_an_array(here):
    _, _, outputs = plain_outputs("a/weights.safetensors", 64)
    result = run_loopctl("predict", "a", "data/val", "--weights", "last", "--out", "some/out.npy")
    assert np.array_equal(np.load("some/out.npy"), outputs.numpy())
    assert result.stdout == "some/out.npy: 21 rows, with the weights in a/weights.safetensors\n"
    assert result.stderr == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_and_skipped_and_the_command_fails(here, workers):
    whole = rows_of(run_loopctl("predict", "a", "data/val").stdout)
    Path("data/val/cat/3.png").write_bytes(Path("data/val/cat/3.png").read_bytes()[:300])
    Path("data/val/dog/0.png").write_bytes(b"")
    result = run_loopctl("predict", "a", "data/val", "--out", "out.csv", "--batch-size", 4, "--workers", workers, status=1)
    lines = result.stderr.splitlines()
    assert lines[0].startswith("skipped: data/val/cat/3.png cannot be used as an image (")
    assert lines[1] == "skipped: data/val/dog/0.png cannot be used as an image (the file is empty); replace it, or remove it"
    assert lines[2:] == ["error: 2 of 21 images were skipped, because they cannot be read; they are named above"]
    rest = rows_of(Path("out.csv").read_text())
    expected = [row for row in whole if row["path"] not in ("data/val/cat/3.png", "data/val/dog/0.png")]
    assert [(row["path"], row["class"]) for row in rest] == [(row["path"], row["class"]) for row in expected]


def test_without_a_readable_image_nothing_is_written(here):
    Path("a.png").write_text("text")
    for out in ("out.csv", "out.npy"):
        result = run_loopctl("predict", "a", "a.png", "--out", out, status=1)
        assert result.stderr.splitlines()[-1] == "error: none of the images can be read"
        assert not Path(out).exists()
    assert run_loopctl("predict", "a", "a.png", status=1).stdout == ""


def test_the_rows_are_in_the_order_of_the_inputs_and_folders_are_read_by_name(here):
    for name in ("in/b/1.png", "in/b/0.png", "in/a.png", "in/.hidden.png", "in/.cache/0.png", "in/b/c/9.PNG", "in/b/notes.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("data/val/cat/0.png", name)
    os.symlink(Path("in").resolve(), "in/b/loop")
    rows = rows_of(run_loopctl("predict", "a", "data/val/dog/1.png", "in", "in/.hidden.png", "data/val/dog/1.png").stdout)
    assert [row["path"] for row in rows] == [
        "data/val/dog/1.png", "in/a.png", "in/b/0.png", "in/b/1.png", "in/b/c/9.PNG", "in/.hidden.png", "data/val/dog/1.png"]


def test_the_most_probable_classes_come_first(here):
    _, _, outputs = plain_outputs("a/checkpoints/best.safetensors", 64)
    rows = rows_of(run_loopctl("predict", "a", "data/val", "--top", 2).stdout)
    order = outputs.argsort(1, descending=True)[:, :2].tolist()
    assert [[row["class"], row["class_2"]] for row in rows] == [[("bird", "cat", "dog")[index] for index in pair] for pair in order]
    assert all(float(row["probability"]) >= float(row["probability_2"]) for row in rows)


def test_a_name_that_is_not_utf8_is_escaped_on_stdout_and_kept_in_a_file(here):
    os.mkdir("in")
    shutil.copy(b"data/val/cat/0.png", b"in/\xff,.png")
    assert run_loopctl("predict", "a", "in").stdout.splitlines()[1].startswith('"in/\\udcff,.png",')
    run_loopctl("predict", "a", "in", "--out", "out.csv")
    assert Path("out.csv").read_bytes().splitlines()[1].startswith(b'"in/\xff,.png",')


OWN = """
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from loopctl import Data

IMAGES = torch.randn(10, 3, 14, 14, generator=torch.Generator().manual_seed(0)).mul(8).round() / 8
LABELS = torch.arange(10) % 3

class Stream(IterableDataset):
    def __iter__(self): return iter(IMAGES)

class Indexed:
    def __len__(self): return 10
    def __getitem__(self, index):
        if index > 9: raise IndexError
        return IMAGES[index], 0

def dataset(): return TensorDataset(IMAGES, LABELS)
def pair(): return TensorDataset(IMAGES + 1, LABELS), dataset()
def data(): return Data(*pair(), 3, (3, 14, 14))
def transformed(): return Data(*[TensorDataset((part.tensors[0] - 1) / 2, LABELS) for part in pair()], batch_transform=doubled)
def doubled(batch): return [2 * batch[0] + 1, batch[1]]
def loader(size: int = 4): return DataLoader(dataset(), size)
def stream(): return Stream()
def indexed(): return Indexed()
def tensor(): return IMAGES
def array(): return IMAGES.numpy()
def samples(): return [(image, 0) for image in IMAGES]
def batches(): return [IMAGES[:4], IMAGES[4:8], IMAGES[8:]]
def generated(): return (part for part in batches())
def nothing(): return []
def number(): return 3
def small(): return IMAGES[:, :2]
"""
SOURCES = ["dataset", "pair", "data", "transformed", "loader", "loader:size=4", "stream", "indexed", "tensor", "array", "samples", "batches",
           "generated"]


@pytest.mark.parametrize("source", SOURCES)
def test_data_of_ones_own_is_predicted_whatever_holds_its_samples(here, source):
    Path("mine.py").write_text(OWN)
    scope = {}
    exec(OWN, scope)
    model = models.cnn(3, 3, width=4)
    load_weights(model, "a/checkpoints/best.safetensors")
    with torch.no_grad():
        outputs = torch.cat([model.eval()(part) for part in scope["IMAGES"].split(4)])
    rows = rows_of(run_loopctl("predict", "a", f"mine.py:{source}", "--batch-size", 4).stdout)
    assert [row["sample"] for row in rows] == [str(number) for number in range(10)]
    assert [row["class"] for row in rows] == [("bird", "cat", "dog")[index] for index in outputs.argmax(1)]
    assert np.array_equal(np.array([row["probability"] for row in rows], np.float32), outputs.softmax(1).max(1).values.numpy())


def saved(classes):
    return SavedRun(nn.Identity(), classes, None, {}, (), Path())


@pytest.mark.parametrize(("outputs", "header", "first"), [
    (torch.tensor([[0.5, -1.25], [3, 4]]), ["output_0", "output_1"], ["0.5", "-1.25"]),
    (torch.tensor([0.1, 2]), ["output_0"], ["0.1"]),
    (torch.tensor([[1], [2]]), ["output_0"], ["1"])])
def test_each_output_of_a_model_that_is_no_classifier_has_a_column(outputs, header, first):
    rows = [row for some in csv_rows(saved(()), iter([(["0", "1"], outputs)]), "sample", Columns()) for row in some]
    assert rows[0] == ["sample", *header]
    assert rows[1] == ["0", *first]
    assert len(rows) == 3


def test_outputs_that_do_not_fit_in_a_row_and_classes_that_do_not_exist_are_refused():
    several = iter([(["0"], torch.zeros(1, 2, 5, 5))])
    with pytest.raises(UsageError, match=r"shape \(2, 5, 5\), and do not fit in a row; use --out FILE.npy"):
        list(csv_rows(saved(()), several, "sample", Columns()))
    for columns in (Columns(top=2), Columns(every=True)):
        with pytest.raises(UsageError, match="--top and --all are for models with an output for each class"):
            list(csv_rows(saved(()), iter([(["0"], torch.zeros(1, 2))]), "sample", columns))


WRONG = {
    "predict": "Missing argument 'RUN'",
    "predict a": "Missing argument 'INPUT...'",
    "predict b data/val": "there is no folder b; name the folder of a run",
    "predict a data/vol": "there is no file or folder data/vol",
    "predict a empty": "there is no image in empty; the names of images end in .jpg",
    "predict a data/val --out out.txt": "--out out.txt: predictions are written as .csv",
    "predict a data/val --out a/metrics.csv": "a/metrics.csv exists and is not overwritten",
    "predict a data/val --out a/metrics.csv/out.csv": "a/metrics.csv/out.csv cannot be written",
    "predict a data/val --weights bset": "weights=bset: there is no such file; use best, last",
    "predict a data/val --device tpu": "device 'tpu' is unknown",
    "predict a data/val --workers 9999": "--workers 9,999 is too many processes",
    "predict a data/val --batch-size 0": "Invalid value for '--batch-size'",
    "predict a data/val --top 4": "--top 4: there are 3 classes",
    "predict a mine.py:data data/val": "not 2 inputs with such a function",
    "predict a gone.py:data": "data gone.py:data: there is no file gone.py",
    "predict a mine.py:dota": "mine.py has no 'dota'; did you mean 'data'?",
    "predict a mine.py:nothing": "data mine.py:nothing has no samples",
    "predict a mine.py:number": "data mine.py:number returned a int; return a data set, a DataLoader",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_input_is_refused_in_one_line(here, command):
    Path("mine.py").write_text(OWN)
    os.mkdir("empty")
    result = run_loopctl(*command.split(), status=2)
    (line,) = result.stderr.splitlines()
    assert WRONG[command] in line
    assert result.stdout == ""


def test_inputs_of_another_shape_fail_with_both_shapes(here):
    Path("mine.py").write_text(OWN)
    (line,) = run_loopctl("predict", "a", "mine.py:small", status=1).stderr.splitlines()
    assert "the model was trained on inputs of shape (3, 14, 14), and this batch has (10, 2, 14, 14)" in line


def test_images_for_a_run_on_data_of_ones_own_are_refused(here):
    Path("mine.py").write_text(OWN + "def train():\n    first, second = pair()\n    first.classes = ['a', 'b', 'c']\n    return first, second\n")
    run_loopctl("run", "--data", "mine.py:train", "--model", "linear", "--epochs", 1, "--out", "b", "--without", "progress")
    (line,) = run_loopctl("predict", "b", "data/val", status=2).stderr.splitlines()
    assert line == ("error: b was trained on mine.py:train, and how an image becomes an input is not known; pass a function that makes "
                    "the data, such as mine.py:test")
    assert {row["class"] for row in rows_of(run_loopctl("predict", "b", "mine.py:train").stdout)} <= {"a", "b", "c"}
