"""Image files of every depth, damaged ones, hidden ones; labels that no loss can take; a last batch of one sample.

`run` is the command `loopctl run`. A refusal is one line that names the data set, and the sample by index and file.
"""
import multiprocessing
import os
import pickle
import struct
import sys
import warnings

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.datasets.folder import pil_loader

from loopctl import Data, UsageError
from loopctl.cli import data, main
from loopctl.data.checked_dataset import CheckedDataset
from loopctl.metrics.named import accuracy

CPU = torch.device("cpu")
GREY = np.random.default_rng(0).integers(0, 256, (12, 12), dtype=np.uint8)
GREY[0, :2] = 0, 255
CLASSES = ("cat", "dog")


def save(folder, name="1.png", part="val", classes=CLASSES, image=GREY, **options):
    """Write an image to ROOT/part/class for each class; return the paths."""
    paths = [folder / part / cls / name for cls in classes]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return paths


@pytest.fixture
def folder(tmp_path):
    """An image folder with two classes of two images each, in train and val."""
    for part in ("train", "val"):
        for name in ("1.png", "2.png"):
            save(tmp_path / "images", name, part)
    return tmp_path / "images"


def make(folder):
    return data.make("imagefolder:size=10,augment=false", str(folder), download=False)


def assert_pixels(path, grey):
    """The image in a file is the same, bit for bit, as the 8-bit image `grey` saved as a PNG."""
    root = path.parents[2]
    save(root, "0.png", path.parents[1].name, image=grey)
    dataset = make(root)
    files = [name for name, _ in dataset.valid.samples]
    image, expected = (dataset.valid[files.index(str(name))][0] for name in (path, path.parent / "0.png"))
    assert torch.equal(image, expected)


def mode(path):
    with Image.open(path) as image:
        return image.mode


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run `loopctl run` on one epoch. Return its output; assert its exit status, and that an error is one line."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, status=0):
        words = ["run", "--model", "linear", "--epochs", 1, "--device", "cpu", "--without", "progress", *arguments]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # torch warns of loader workers where a machine has one core
            result = CliRunner().invoke(main, list(map(str, words)))
        assert result.exit_code == status, result.output
        if status:
            assert "Traceback" not in result.output
            assert result.stderr.count("\n") == 1, result.stderr
            return result.stderr
        return result.output
    return call


def run_folder(run, folder, *arguments, status=0):
    return run("--data", "imagefolder:size=10", "--data-root", folder, "--batch-size", 2, *arguments, status=status)


PART = """
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from loopctl import Data, hookimpl

class Read(Dataset):
    'Its labels are known only when a sample is read.'
    def __init__(self, labels):
        self.answers = labels
    def __len__(self):
        return len(self.answers)
    def __getitem__(self, index):
        return torch.zeros(1, 4, 4), self.answers[index]

class Known(Read):
    def __init__(self, labels):
        super().__init__(labels)
        self.targets = labels

def images(count):
    return torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
"""


@pytest.fixture
def mine(tmp_path):
    """Write a file with a factory of a data set with 3 classes, whose training set is given as text; return its spec."""
    def write(train, valid="Read([0, 1, 2])", more=""):
        (tmp_path / "mine_for_images.py").write_text(
            f"{PART}{more}\ndef made():\n    return Data({train}, {valid}, 3, (1, 4, 4))\n")
        return f"{tmp_path}/mine_for_images.py:made"
    yield write
    for name in [name for name in sys.modules if "mine_for_images" in name]:
        del sys.modules[name]


# H3: depth


@pytest.mark.fault(row="H3", given="a 16-bit PNG in an image folder", right="its values divided by 257, not white")
def test_a_16_bit_png_has_the_pixels_of_its_8_bit_version(tmp_path):
    values = np.random.default_rng(1).integers(0, 65536, (12, 12), dtype=np.uint16)
    path, _ = save(tmp_path, image=values)
    save(tmp_path, part="train")
    assert mode(path) == "I;16"
    assert_pixels(path, (values / 257).round().astype(np.uint8))


@pytest.mark.fault(row="H3", given="a float TIFF from 0 to 1 in an image folder", right="its values times 255, not black")
def test_a_float_tiff_has_the_pixels_of_its_8_bit_version(tmp_path):
    path, _ = save(tmp_path, "1.tiff", image=(GREY / 255).astype(np.float32))
    save(tmp_path, part="train")
    assert mode(path) == "F"
    assert_pixels(path, GREY)


def tiff(values, bits, photometric=1, kind=1, order="<"):
    """The content of an uncompressed grey TIFF. kind: 1 for unsigned integers, 2 for signed ones, 3 for floats."""
    pixels = values if isinstance(values, bytes) else values.tobytes()
    tags = {256: 12, 257: 12, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 12, 279: len(pixels), 339: kind}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    start = 8 + len(pixels)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", start) + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def packed(values):
    """Values of 12 bits, two in three bytes."""
    pairs = values.reshape(-1, 2).astype(int)
    return bytes(byte for first, second in pairs for byte in (first >> 4, (first & 15) << 4 | second >> 8, second & 255))


DEEP = np.random.default_rng(1).integers(0, 65536, (12, 12), dtype=np.uint16)
DEEP_TO_8_BITS = (DEEP / 257).round().astype(np.uint8)


@pytest.mark.fault(row="H", given="other deep grey images: big-endian and 12-bit TIFF, TIFF in which 0 is white, PGM of 10 and 16 bits",
                   right="the same pixels as their 8-bit versions")
@pytest.mark.parametrize(("name", "content", "grey"), [
    ("1.tif", tiff(DEEP.astype(">u2"), 16, order=">"), DEEP_TO_8_BITS),
    ("1.tif", tiff(DEEP, 16, photometric=0), 255 - DEEP_TO_8_BITS),
    ("1.tif", tiff(packed(DEEP >> 4), 12), ((DEEP >> 4) * (255 / 4095)).round().astype(np.uint8)),
    ("1.tif", tiff((GREY / 255).astype("<f4"), 32, photometric=0, kind=3), 255 - GREY),
    ("1.tif", tiff(GREY.astype("<i4"), 32, kind=2), GREY),
    ("1.pgm", b"P5 12 12 65535\n" + DEEP.astype(">u2").tobytes(), DEEP_TO_8_BITS),
    ("1.pgm", b"P5 12 12 1023\n" + (DEEP >> 6).astype(">u2").tobytes(), ((DEEP >> 6) * (255 / 1023)).round().astype(np.uint8)),
], ids=["big-endian", "white is 0", "12 bits", "floats, white is 0", "32 bits up to 255", "PGM", "PGM of 10 bits"])
def test_deep_grey_images_have_the_pixels_of_their_8_bit_versions(tmp_path, name, content, grey):
    (path, _) = save(tmp_path)
    save(tmp_path, part="train")
    path = path.with_name(name)
    path.write_bytes(content)
    assert_pixels(path, grey)


@pytest.mark.fault(row="H", given="float images beyond 0 to 1, or with NaN; 32-bit integers beyond 255, or negative",
                   right="refused, with index, file and range")
@pytest.mark.parametrize(("values", "words"), [
    (GREY.astype(np.float32), "float32 pixels from 0 to 255, and those from 0 to 1"),
    (np.where(GREY > 9, GREY / 255, np.nan).astype(np.float32), "float32 pixels from nan to nan, and those from 0 to 1"),
    (GREY.astype(np.int32) * 257, "int32 pixels from 0 to 65535, and those from 0 to 255"),
    (GREY.astype(np.int32) - 128, "int32 pixels from -128 to 127, and those from 0 to 255"),
])
def test_an_image_whose_white_is_unknown_is_refused_by_name(folder, run, values, words):
    path, = save(folder, "3.tiff", "train", ["dog"], values)
    error = run_folder(run, folder, status=2)
    assert f"training sample 4 (counted from 0): {path} has {words} can be used; save it with 8 or 16 bits\n" in error


def kinds():
    """Ordinary images, each of another mode or format: (name, image, options of `save`)."""
    colour = Image.fromarray(np.random.default_rng(2).integers(0, 256, (12, 12, 3), dtype=np.uint8))
    alpha = Image.fromarray(GREY.T.copy())
    palette = colour.quantize(16)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    return [("grey.png", Image.fromarray(GREY), {}), ("colour.png", colour, {}), ("colour.jpg", colour, {}),
            ("grey-alpha.png", Image.merge("LA", (alpha, alpha)), {}), ("rgba.png", Image.merge("RGBA", (*colour.split(), alpha)), {}),
            ("one-bit.png", Image.fromarray(GREY > 99), {}), ("cmyk.jpg", colour.convert("CMYK"), {}),
            ("palette.png", palette, {}), ("palette-transparent.png", palette, {"transparency": bytes(range(0, 256, 16))}),
            ("palette-one-transparent.png", palette, {"transparency": 3}), ("webp.webp", colour, {}),
            ("rgba.webp", Image.merge("RGBA", (*colour.split(), alpha)), {}), ("ycbcr.jpg", colour.convert("YCbCr"), {}),
            ("rotated.jpg", colour, {"exif": rotated}), ("lab.tiff", colour.convert("LAB"), {}), ("colour.bmp", colour, {}),
            ("transparent-grey.png", Image.fromarray(GREY), {"transparency": 7})]


@pytest.mark.fault(row="H", given="8-bit images: grey with alpha, 1 bit, CMYK, palette with transparency, WebP, EXIF orientation",
                   right="torchvision's pixels, and no warning")
@pytest.mark.parametrize(("name", "image", "options"), [pytest.param(*kind, id=kind[0]) for kind in kinds()])
def test_ordinary_images_have_the_pixels_that_torchvision_reads(tmp_path, name, image, options):
    path, _ = save(tmp_path, name, image=image, **options)
    save(tmp_path, name, "train", image=image, **options)
    loader = make(tmp_path).valid.loader
    pixels = np.asarray(loader(str(path)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(pixels, np.asarray(pil_loader(path)))


@pytest.mark.fault(row="H", given="a GIF with the name of a PNG; a folder with the name of an image", right="read by its content; left out")
def test_the_content_of_a_file_and_not_its_name_says_what_it_is(folder):
    Image.fromarray(GREY).save(folder / "val" / "cat" / "1.png", format="GIF")
    (folder / "val" / "cat" / "3.png").mkdir()
    dataset = make(folder)
    assert len(dataset.valid) == 4
    assert torch.equal(dataset.valid[0][0], dataset.valid[1][0])


# H4: classes and files of an image folder


@pytest.mark.fault(row="H4", given="one class in the image folder, because of one folder too many above the classes",
                   right="one line before training: nothing to learn")
def test_one_class_is_refused_before_training(tmp_path, run):
    for part in ("train", "val"):
        save(tmp_path / "images", part=part, classes=["flowers/rose", "flowers/lily"])
    assert "error: data imagefolder has one class, so there is nothing to learn" in run_folder(run, tmp_path / "images", status=2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault(row="H", given="random images of one class, a data set whose `classes` has one name", right="refused too")
def test_one_class_of_any_data_set_is_refused(run, tmp_path):
    assert "data fake has one class" in run("--data", "fake:classes=1,size=20", status=2)
    (tmp_path / "one_class.py").write_text(
        PART + "\nclass One(Read):\n    classes = ['a']\n\ndef made():\n    return One([0, 0, 0]), One([0, 0])\n")
    assert "made has one class" in run("--data", "one_class.py:made", status=2)


@pytest.mark.fault(row="H4", given="a folder .ipynb_checkpoints in train and in val", right="no class, and said in one line")
def test_hidden_folders_are_no_classes(folder, caplog):
    hidden = [save(folder, "1-checkpoint.png", part, [".ipynb_checkpoints"])[0].parent for part in ("train", "val")]
    dataset = make(folder)
    assert dataset.classes == 2
    assert dataset.train.classes == dataset.valid.classes == list(CLASSES)
    assert [label for _, label in dataset.train] == [0, 0, 1, 1]
    assert [record.message for record in caplog.records] == [
        f"data imagefolder: {hidden[0]} and 1 more left out, because the name starts with a dot"]


@pytest.mark.fault(row="H", given="hidden files and folders within a class, such as ._1.png or .DS_Store", right="no images")
def test_hidden_files_are_no_images(folder, caplog):
    (folder / "train" / "cat" / ".DS_Store").write_bytes(b"\0")
    (folder / "train" / ".DS_Store").write_bytes(b"\0")
    assert [len(part) for part in (make(folder).train, make(folder).valid)] == [4, 4]
    assert not caplog.records
    (folder / "train" / "cat" / "._1.png").write_bytes(b"Mac OS X")
    save(folder, "1-checkpoint.png", "val", ["cat/.ipynb_checkpoints"])
    assert [len(part) for part in (make(folder).train, make(folder).valid)] == [4, 4]
    assert "train/cat/._1.png and 1 more left out" in caplog.text


@pytest.mark.fault(row="H", given="an animated GIF and a text among the images", right="left out, and said in one line")
def test_files_with_other_endings_are_left_out_and_said(folder, caplog):
    Image.fromarray(GREY).save(folder / "train" / "cat" / "3.gif", save_all=True, append_images=[Image.fromarray(GREY.T)])
    assert [len(part) for part in (make(folder).train, make(folder).valid)] == [4, 4]
    (line,) = {record.message for record in caplog.records}
    assert line.endswith("train/cat/3.gif left out, because the name ends in none of .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff, .webp")
    (folder / "val" / "dog" / "names.txt").write_text("names")
    make(folder)
    assert "train/cat/3.gif and 1 more left out" in caplog.records[-1].message


@pytest.mark.fault(row="H", given="a hidden folder in train alone, without images, and a dot in the path of the root", right="trained")
def test_an_empty_hidden_folder_is_no_class(tmp_path, run):
    for part in ("train", "val"):
        save(tmp_path / ".cache" / "images", part=part)
    (tmp_path / ".cache" / "images" / "train" / ".ipynb_checkpoints").mkdir()
    assert "finished: 1 epoch, 1 update" in run_folder(run, tmp_path / ".cache" / "images")


@pytest.mark.fault(row="H", given="no image in a class, hidden classes only, a class in val only", right="refused in one line that says where")
def test_a_folder_without_images_is_refused(folder, tmp_path, run):
    (folder / "val" / "eel").mkdir()
    error = run_folder(run, folder, status=2)
    assert "data imagefolder: Found no valid file for the classes eel" in error
    assert ".png" in error
    save(folder, classes=["eel"])
    assert "only one of them has eel" in run_folder(run, folder, status=2)
    save(tmp_path / "hidden", part="train", classes=[".cat"])
    (tmp_path / "hidden" / "val").mkdir()
    assert "Couldn't find any class folder in " in run_folder(run, tmp_path / "hidden", status=2)


@pytest.mark.fault(row="H", given="a class folder that is a link, names that are long or not ASCII", right="read as any other")
def test_links_and_long_or_non_ascii_names_are_read(tmp_path, run):
    for part in ("train", "val"):
        save(tmp_path / "images", "été 猫.png", part, ["猫"])
        save(tmp_path / "elsewhere", "n" * 251 + ".png", part, ["x"])
        os.symlink(tmp_path / "elsewhere" / part / "x", tmp_path / "images" / part / "ß")
    assert "finished" in run_folder(run, tmp_path / "images")
    assert make(tmp_path / "images").train.classes == ["ß", "猫"]


# H4: damaged files


def damage(path):
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.fault(row="H4", given="a damaged picture, read by the main process or by a worker", right="one line with its index and file")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_with_its_index(folder, run, workers):
    damage(folder / "train" / "dog" / "1.png")
    error = run_folder(run, folder, "--workers", workers, status=2)
    assert error.startswith(f"error: data imagefolder: training sample 2 (counted from 0): {folder}/train/dog/1.png cannot be used as an "
                            "image (")
    assert error.endswith("); replace it, or remove it\n")


@pytest.mark.fault(row="H", given="an empty file, a text, a truncated JPEG, a link to nothing, a PNG with a wrong checksum",
                   right="one line with index, file and reason, in validation too")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("kind", "words"), [
    ("empty", "the file is empty"), ("text", "it is none of the formats that Pillow reads"), ("truncated", "truncated"),
    ("link", "No such file or directory"), ("checksum", "broken data stream")])
def test_an_unreadable_file_is_named_with_the_reason(folder, run, kind, words, workers):
    path = folder / "val" / "cat" / ("2.jpg" if kind == "truncated" else "2.png")
    if kind == "truncated":
        path.with_suffix(".png").unlink()
        Image.fromarray(np.resize(GREY, (99, 99))).save(path)
    content = path.read_bytes()
    path.unlink()
    if kind == "link":
        path.symlink_to("nowhere.png")
    else:
        path.write_bytes({"empty": b"", "text": b"<html>Not found</html>", "truncated": content[:-400],
                          "checksum": content[:-20] + bytes(4) + content[-16:]}[kind])
    error = run_folder(run, folder, "--workers", workers, status=2)
    assert not multiprocessing.active_children()
    assert f"validation sample 1 (counted from 0): {path} cannot be used as an image" in error
    assert words in error


@pytest.mark.fault(row="H", given="a damaged picture in a Subset of an image folder, and in data kept on the device",
                   right="the index in the data set that is read, and the file")
def test_a_damaged_image_of_a_subset_is_named(folder):
    damage(folder / "train" / "dog" / "2.png")
    whole = make(folder)
    part = Subset(whole.train, [0, 3])
    train, _ = Data(part, part, 2, (3, 10, 10), "mine").loaders(2, 0, CPU)
    with pytest.raises(UsageError, match=rf"^data mine: training sample 1 \(counted from 0\): {folder}/train/dog/2.png cannot be used"):
        list(train)
    held = data.make("imagefolder:size=10,augment=false,on_device=true", str(folder), download=False)
    with pytest.raises(UsageError, match=rf"^data imagefolder: training sample 3 \(counted from 0\): {folder}/train/dog/2.png cannot be"):
        held.loaders(2, 0, CPU)


@pytest.mark.fault(row="H", given="a user's data set that cannot open a file, or raises another error, in a worker too",
                   right="the index in one line; an error of the code keeps its type")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_users_data_set_names_the_index(mine, run, workers):
    more = ("\nclass Opens(Read):\n    def __getitem__(self, index):\n        open(f'/nowhere/{index}').close() if index == 1 else 0\n"
            "        return super().__getitem__(index)\n\nclass Fails(Read):\n    def __getitem__(self, index):\n"
            "        return super().__getitem__(index + 1)\n")
    error = run("--data", mine("Opens([0, 1, 2])", more=more), "--workers", workers, "--batch-size", 2, status=2)
    assert "made: training sample 1 (counted from 0): [Errno 2] No such file or directory: '/nowhere/1'" in error
    error = run("--data", mine("Fails([0, 1, 2])", more=more), "--workers", workers, "--batch-size", 2, status=1)
    assert error.startswith("error: IndexError: list index out of range, raised by ")
    assert "training sample 2 (counted from 0)" in error
    more = "\nclass Worded(Read):\n    def __getitem__(self, index):\n        raise ValueError('a word\\nand another')\n"
    error = run("--data", mine("Worded([0, 1, 2])", more=more), "--workers", workers, "--batch-size", 2, status=1)
    assert error.startswith("error: ValueError: a word")
    assert "and another, raised by " in error


# H4: labels


@pytest.mark.fault(row="H4", given="labels from 1, negative or too large, in `targets` or in a tensor",
                   right="one line before training, with the index and the range")
@pytest.mark.parametrize(("train", "words"), [
    ("Known([1, 2, 3, 3])", "training sample 2 (counted from 0) has the label 3; the labels of 3 classes are 0 to 2: count from 0, not from 1"),
    ("Known([0, -1, 2])", "training sample 1 (counted from 0) has the label -1; the labels of 3 classes are 0 to 2"),
    ("TensorDataset(images(4), torch.tensor([0, 1, 2, 7]))", "training sample 3 (counted from 0) has the label 7"),
])
def test_labels_out_of_range_are_refused_before_training(mine, run, tmp_path, train, words):
    spec = mine(train)
    assert f"{spec}: {words}" in run("--data", spec, status=2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault(row="H4", given="a label out of range that is known only when it is read, by a worker too",
                   right="one line in the first batch that has it, with index, file and range")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_label_out_of_range_is_refused_when_it_is_read(mine, run, workers):
    more = ("\nclass Files(Read):\n    @property\n    def samples(self):\n        return [(f'/images/{n}.png', 0) for n in range(4)]\n")
    spec = mine("Files([0, 1, 2, 3])", more=more)
    error = run("--data", spec, "--workers", workers, "--batch-size", 1, status=2)
    assert (f"{spec}: training sample 3 (counted from 0; /images/3.png) has the label 3; the labels of 3 classes are 0 to 2: count from 0, "
            "not from 1\n") in error


@pytest.mark.fault(row="H", given="labels out of range in the validation set, in a Subset, in numpy, in data kept on the device",
                   right="refused before training")
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("kind", ["valid", "subset", "numpy", "read"])
def test_labels_out_of_range_are_found_wherever_they_are(kind, on_device):
    class Read(Dataset):
        def __init__(self, labels):
            self.answers = labels

        def __len__(self):
            return len(self.answers)

        def __getitem__(self, index):
            return torch.zeros(1, 4, 4), int(self.answers[index])

    good, bad = TensorDataset(torch.zeros(3, 1, 4, 4), torch.arange(3)), TensorDataset(torch.zeros(4, 1, 4, 4), torch.arange(4))
    numbered = Read(np.arange(4, dtype=np.int16))
    if kind == "numpy":
        numbered.labels = numbered.answers
    train, valid = {"valid": (good, bad), "subset": (Subset(bad, [0, 1, 2, 3]), good), "numpy": (numbered, good),
                    "read": (numbered, good)}[kind]
    part = "validation" if kind == "valid" else "training"
    dataset = Data(train, valid, 3, (1, 4, 4), "mine", on_device=on_device)
    with pytest.raises(UsageError, match=rf"^data mine: {part} sample 3 \(counted from 0\) has the label 3"):
        [list(loader) for loader in dataset.loaders(2, 0, CPU)]


@pytest.mark.fault(row="H4", given="labels that are floats, or of shape (N, 1)", right="one line that says what a label is")
@pytest.mark.parametrize(("labels", "words"), [
    ("torch.tensor([0.0, 1.0, 2.0])", "tensor of float32 and shape ()"), ("torch.tensor([[0], [1], [2]])", "tensor of int64 and shape (1,)"),
    ("[0.0, 1.0, 2.0]", "float"), ("[[0], [1], [2]]", "list")])
def test_labels_of_a_wrong_type_or_shape_are_refused(mine, run, labels, words):
    tail = f"(counted from 0) has a label of a wrong type, {words}; use an int, or an int64 tensor of shape ()"
    assert f"made: training sample 0 {tail}" in run("--data", mine(f"Known({labels})"), status=2)
    error = run("--data", mine(f"Read({labels})"), status=2)
    assert "made: training sample " in error
    assert tail in error
    if "torch" in labels:
        assert f"made: validation sample 0 {tail}" in run("--data", mine("Read([0, 1, 2])", f"TensorDataset(images(3), {labels})"), status=2)


@pytest.mark.fault(row="H", given="labels that are int32, bool, text or int64 one-hot vectors", right="one line that says what a label is")
@pytest.mark.parametrize(("labels", "words"), [
    ("torch.tensor([0, 1, 2]).int()", "type, tensor of int32 and shape ()"), ("torch.tensor([False, True, True])", "type, tensor of bool and shape ()"),
    ("[False, True, True]", "type, bool;"), ("['a', 'b', 'c']", "type, str;"), ("torch.eye(3).long()", "type, tensor of int64 and shape (3,)"),
    ("torch.tensor([0, 1, 5]).int()", "has the label 5;"), ("torch.eye(2)[[0, 1, 1]]", "type, tensor of float32 and shape (2,)")])
def test_labels_that_cross_entropy_does_not_take_are_refused(mine, run, labels, words):
    error = run("--data", mine(f"Read({labels})"), status=2)
    assert words in error
    assert "training sample " in error


class Shifted(Dataset):
    """Its `targets` are counted from 1, and its samples from 0."""

    targets = [1, 2, 3]

    def __len__(self):
        return 3

    def __getitem__(self, index):
        torch.rand(1)
        return torch.full((1, 4, 4), float(index)), self.targets[index] - 1


@pytest.mark.fault(row="H", given="labels that torch takes: uint8, probabilities, -100, `targets` from 1 that are read from 0",
                   right="batches and random numbers of a plain DataLoader")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("labels", [torch.tensor([0, 2, 1], dtype=torch.uint8), torch.eye(3), torch.tensor([0, -100, 2]), None],
                         ids=["uint8", "probabilities", "ignored", "from 0"])
def test_right_labels_give_the_batches_of_a_plain_loader(labels, workers):
    dataset = Shifted() if labels is None else TensorDataset(torch.rand(3, 1, 4, 4), labels)
    batches, states = [], []
    for loader in (torch.utils.data.DataLoader(dataset, 2, shuffle=True, num_workers=workers), None):
        torch.manual_seed(5)
        loader = loader or Data(dataset, dataset, 3, (1, 4, 4)).loaders(2, workers, CPU)[0]
        batches.append([*loader, *loader])
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    for batch, expected in zip(*batches, strict=True):
        assert type(batch) is type(expected)
        for one, other in zip(batch, expected, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype
            nn.CrossEntropyLoss()(torch.zeros(len(one), 3), batch[1])


@pytest.mark.fault(row="H", given="regression targets, with a plugin that computes their loss", right="not refused")
def test_labels_of_another_loss_are_not_checked(mine, run):
    more = ("\nclass Squares:\n    @hookimpl\n    def compute_loss(self, run, batch):\n        input, target = batch\n"
            "        run.outputs = run.network(input)\n        return (run.outputs[:, 0] - target).square().mean()\n")
    spec = mine("Read([0.5, 1.5, -2.0])", "Read([0.5])", more)
    assert "finished" in run("--data", spec, "--plugin", spec.replace(":made", ":Squares"))


# H4: a last batch of one sample


NORMS = """
class Flat(nn.Sequential):
    def __init__(self, in_channels=1):
        super().__init__(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))

class Pixel(nn.Sequential):
    'Its BatchNorm gets images of one pixel.'
    def __init__(self):
        super().__init__(nn.Conv2d(1, 8, 4), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 3))

class Spatial(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Flatten(), nn.Linear(32, 3))

class Frozen:
    @hookimpl
    def epoch_start(self, run):
        run.model[2].eval()
"""


@pytest.mark.fault(row="H4", given="a last batch of one sample, for a BatchNorm of features or of one pixel",
                   right="one line before training, with a batch size that works")
@pytest.mark.parametrize(("model", "size", "words"), [
    ("Flat", 3, "the last batch of an epoch has 1 sample, of 7 in batches of 3, and BatchNorm cannot train on 1; use another, such as --batch-size 4"),
    ("Pixel", 2, "of 7 in batches of 2"), ("Flat", 1, "of 7 in batches of 1")])
@pytest.mark.parametrize("on_device", ["", ":on_device=true"])
def test_a_last_batch_of_one_sample_is_refused_where_batchnorm_would_fail(mine, run, tmp_path, model, size, words, on_device):
    spec = mine("TensorDataset(images(7), torch.arange(7) % 3)", more=NORMS)
    error = run("--data", spec + on_device, "--model", spec.replace("made", model), "--batch-size", size, status=2)
    assert words in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.fault(row="H", given="a last batch of one sample that works: images of several pixels, a BatchNorm in eval mode, max_steps before it",
                   right="trained, with the weights of the same run without the check")
@pytest.mark.parametrize(("model", "options"), [
    ("Spatial", []), ("Flat", ["--plugin", "mine_for_images.py:Frozen"]), ("Flat", ["--max-steps", 2]),
    ("Flat", ["--batch-size", 4])])
def test_a_last_batch_of_one_sample_is_accepted_where_it_works(mine, run, tmp_path, monkeypatch, model, options):
    from safetensors.torch import load_file

    spec = mine("TensorDataset(images(7), torch.arange(7) % 3)", more=NORMS)
    for out in ("checked", "plain"):
        run("--data", spec, "--model", spec.replace("made", model), "--batch-size", 3, "--out", out, *options)
        monkeypatch.setattr(data, "check_last_batch", lambda run, call: None)
    one, other = (load_file(tmp_path / out / "weights.safetensors") for out in ("checked", "plain"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.fault(row="H", given="one training sample in all, for a BatchNorm of features", right="one line that asks for more samples")
def test_one_training_sample_is_refused_where_batchnorm_would_fail(mine, run):
    spec = mine("TensorDataset(images(1), torch.tensor([1]))", more=NORMS)
    assert "add training samples" in run("--data", spec, "--model", spec.replace("made", "Flat"), status=2)


# The loaders


def test_a_checked_data_set_is_pickled_for_workers_that_are_spawned():
    checked = CheckedDataset(TensorDataset(torch.rand(3, 1), torch.arange(3)), "mine", 3)
    dataset, collate = pickle.loads(pickle.dumps((checked, checked.collate)))
    assert dataset is collate.__self__
    assert dataset.tensors[1].tolist() == [0, 1, 2]
    assert [len(part) for part in collate(dataset.__getitems__([2, 0]))] == [2, 2]
    assert collate.keeps_sample_count


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_labels_and_the_last_batch_are_checked_before_a_gpu_gets_them(mine, run):
    spec = mine("Read([0, 1, 2, 5])", more=NORMS)
    error = run("--data", spec, "--device", "cuda", "--workers", 1, "--batch-size", 2, status=2)
    assert "training sample 3 (counted from 0) has the label 5" in error
    spec = mine("Read([0, 1, 2, 0])", more=NORMS)
    error = run("--data", spec, "--model", spec.replace("made", "Flat"), "--device", "cuda", "--batch-size", 3, status=2)
    assert "BatchNorm cannot train on 1" in error


# J4: accuracy


@pytest.mark.fault(row="J4", given="the command line's accuracy of perfect scores, with one-hot targets", right="1.0, not 0.333")
def test_the_accuracy_of_perfect_scores_for_one_hot_targets_is_1():
    target = torch.eye(3)[[0, 1, 2, 1]]
    assert accuracy(10 * target, target).item() == 1
    assert accuracy(10 * target, target.argmax(1)).item() == 1
    assert accuracy(10 * target[[1, 1, 2, 1]], target).item() == 0.75


@pytest.mark.fault(row="J", given="soft targets, integer one-hot targets, targets per pixel, as many samples as classes",
                   right="the class is the most probable one")
def test_the_accuracy_for_other_targets_is_that_of_the_most_probable_class():
    output = torch.tensor([[2.0, 1, 0], [0, 1, 2], [0, 3, 2]])
    soft = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.3, 0.3], [0.1, 0.7, 0.2]])
    assert accuracy(output, soft).item() == pytest.approx(2 / 3)
    assert accuracy(output, torch.eye(3).long()[[0, 2, 1]]).item() == 1
    pixels = torch.randn(2, 3, 4, 4)
    assert accuracy(pixels, pixels.argmax(1)).item() == accuracy(pixels, pixels.softmax(1)).item() == 1


@pytest.mark.fault(row="J", given="targets of shape (N, 1), (N, another C) or (another N,)", right="refused in one line with both shapes")
@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (3,), (1,), ()])
def test_the_accuracy_for_targets_of_another_shape_is_refused(shape):
    with pytest.raises(UsageError, match="the output has shape") as caught:
        accuracy(torch.randn(4, 3), torch.zeros(shape))
    assert "(4, 3)" in str(caught.value)
    assert str(shape) in str(caught.value)


@pytest.mark.fault(row="J", given="a run with one-hot targets, on the command line", right="the metrics of the run with classes")
def test_a_run_with_one_hot_targets_reports_the_accuracy_of_classes(mine, run, tmp_path):
    columns = []
    for name, labels in (("classes", "torch.arange(9) % 3"), ("one-hot", "torch.eye(3)[torch.arange(9) % 3]")):
        part = f"TensorDataset(images(9), {labels})"
        run("--data", mine(part, part), "--epochs", 3, "--lr", 0.1, "--out", name)
        head, *rows = (tmp_path / name / "metrics.csv").read_text().splitlines()
        columns.append([[row.split(",")[number] for row in rows] for number, key in enumerate(head.split(",")) if "accuracy" in key])
    assert columns[0] == columns[1]
    assert len(columns[0]) == 2
