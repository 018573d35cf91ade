"""Data sets on disk: a few pictures of each, in the format its own files have."""
import gzip
import hashlib
import io
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image


def pixels(count, *shape):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(array):
    """An idx file: two zeros, the type (8, bytes), the number of dimensions, their sizes, then the values."""
    return bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


@pytest.fixture(params=[("mnist", "MNIST", 0.1307, 0.3081), ("fashionmnist", "FashionMNIST", 0.2860, 0.3530)],
                ids=lambda param: param[0])
def grey(request, tmp_path):
    """One of the two sets with 12 and 4 pictures: its name, mean and deviation, and the pictures."""
    name, folder, mean, std = request.param
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    pictures = {"train": pixels(12, 28, 28), "t10k": pixels(4, 28, 28)[::-1].copy()}
    for part, found in pictures.items():
        targets = np.arange(len(found), dtype=np.uint8) % 10
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(found))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(targets))
    return name, mean, std, pictures


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request, tmp_path, monkeypatch):
    """One of the two sets with a few pictures; torchvision checks the sums of the files, so it is told theirs."""
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

    flat, sums = pixels(12, 3072), []                    # the rows of the files: red, then green, then blue
    pictures = flat.reshape(12, 3, 32, 32).transpose(0, 2, 3, 1)
    split = np.array_split(np.arange(10), len(parts[0]))
    for files, rows in ((parts[0], split), (parts[1], [np.arange(10, 12)])):
        sums.append([write(file, {"data": flat[row], key: (row % classes).tolist()})
                     for file, row in zip(files, rows, strict=True)])
    meta = write(cls.meta["filename"], {cls.meta["key"]: [f"class {number}" for number in range(classes)]})
    monkeypatch.setattr(cls, "train_list", sums[0])
    monkeypatch.setattr(cls, "test_list", sums[1])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": meta[1]})
    return name, classes, pictures


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def packed(files, mode="w"):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:
        for name, content in files.items():
            add(archive, name, content)
    return stream.getvalue()


def jpeg(value):
    stream = io.BytesIO()
    Image.new("RGB", (24, 24), (value, value, value)).save(stream, "JPEG", quality=100, subsampling=0)
    return stream.getvalue()


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Two of the thousand classes, in the three archives that are given out; torchvision is told their sums."""
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
        "ILSVRC2012_devkit_t12.tar.gz": gzip.compress(packed({
            "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"2\n1\n"})),
        "ILSVRC2012_img_train.tar": packed({
            f"{wnid}.tar": packed({f"{wnid}_{number}.JPEG": jpeg(100 * label + number) for number in range(3)})
            for label, wnid in enumerate(wnids)}),
        "ILSVRC2012_img_val.tar": packed({
            f"ILSVRC2012_val_0000000{number}.JPEG": jpeg(200 + number) for number in (1, 2)}),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(imagenet, "ARCHIVE_META", {
        part: (name, hashlib.md5(files[name]).hexdigest()) for part, (name, _) in imagenet.ARCHIVE_META.items()})
