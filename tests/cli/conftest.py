"""Fixtures that write tiny data sets to disk, each in its original file format."""
import gzip
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from loopctl.cli import main


def random_pixels(count, *shape):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(array):
    """The content of an idx file: two zeros, the type (8 is uint8), the number of dimensions, their sizes, the values."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture(params=[("mnist", "MNIST", 0.1307, 0.3081), ("fashionmnist", "FashionMNIST", 0.2860, 0.3530)],
                ids=lambda param: param[0])
def grey(request, tmp_path):
    """MNIST or FashionMNIST with 12 training and 4 test images: its name, mean, standard deviation and the images."""
    name, folder, mean, std = request.param
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    images = {"train": random_pixels(12, 28, 28), "t10k": random_pixels(4, 28, 28)[::-1].copy()}
    for part, array in images.items():
        targets = np.arange(len(array), dtype=np.uint8) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(array))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(targets))
    return name, mean, std, images


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """CIFAR-10 or CIFAR-100 with 10 training and 2 test images. torchvision's checksums are replaced by those of the files."""
    from torchvision.datasets import CIFAR10, CIFAR100

    name = request.param
    cls, classes, key, parts = {
        "cifar10": (CIFAR10, 10, "labels", ([f"data_batch_{number}" for number in range(1, 6)], ["test_batch"])),
        "cifar100": (CIFAR100, 100, "fine_labels", (["train"], ["test"])),
    }[name]
    folder = tmp_path / cls.base_folder
    folder.mkdir()

    def write(file, content):
        packed = pickle.dumps(content)
        (folder / file).write_bytes(packed)
        return [file, hashlib.md5(packed).hexdigest()]

    flat, checksums = random_pixels(12, 3072), []        # each row: all red, then all green, then all blue values
    images = flat.reshape(12, 3, 32, 32).transpose(0, 2, 3, 1)
    split = np.array_split(np.arange(10), len(parts[0]))
    for files, rows in ((parts[0], split), (parts[1], [np.arange(10, 12)])):
        checksums.append([write(file, {"data": flat[row], key: (row % classes).tolist()})
                          for file, row in zip(files, rows, strict=True)])
    meta = write(cls.meta["filename"], {cls.meta["key"]: [f"class {number}" for number in range(classes)]})
    monkeypatch.setattr(cls, "train_list", checksums[0])
    monkeypatch.setattr(cls, "test_list", checksums[1])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": meta[1]})
    return name, classes, images


def tar(files):
    """The content of a tar archive of `files`, a dict of contents by name."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def jpeg(value):
    """The content of a JPEG file of 24x24 pixels that all have this grey value."""
    stream = io.BytesIO()
    Image.new("RGB", (24, 24), (value, value, value)).save(stream, "JPEG", quality=100, subsampling=0)
    return stream.getvalue()


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """ImageNet with two of its classes, in three archives; torchvision's checksums are replaced by theirs."""
    from scipy.io import savemat
    from torchvision.datasets import imagenet

    wnids = ["n01440764", "n01443537"]
    fields = ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images")
    synsets = [(1, wnids[0], "tench, Tinca tinca", "a fish", 0, 0, 0, 3),
               (2, wnids[1], "goldfish", "a fish", 0, 0, 0, 3),
               (3, "n02512053", "fish", "both of them", 2, [1, 2], 1, 0)]
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(synsets, dtype=[(name, object) for name in fields]).reshape(-1, 1)})
    files = {
        "ILSVRC2012_devkit_t12.tar.gz": gzip.compress(tar({
            "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n"})),
        "ILSVRC2012_img_train.tar": tar({
            f"{wnid}.tar": tar({f"{wnid}_{number}.JPEG": jpeg(100 * label + number) for number in range(3)})
            for label, wnid in enumerate(wnids)}),
        "ILSVRC2012_img_val.tar": tar({
            f"ILSVRC2012_val_0000000{number}.JPEG": jpeg(200 + number) for number in (1, 2)}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(imagenet, "ARCHIVE_META", {
        part: (name, hashlib.md5(files[name]).hexdigest()) for part, (name, _) in imagenet.ARCHIVE_META.items()})


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Run a command in a new folder. Return its output; with `refused` its error message."""
    monkeypatch.chdir(tmp_path)

    def call(*words, refused=False):
        result = CliRunner().invoke(main, list(words))
        assert (result.exit_code != 0) == refused, result.output
        return result.stderr if refused else result.stdout
    return call
