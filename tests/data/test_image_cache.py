"""The file of decoded images: what is read equals what was written, and what is wrong with it is noticed."""
import errno
import logging
import multiprocessing
import os
import pickle
import struct
import zlib
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from loopctl import UsageError
from loopctl.data import image_cache
from loopctl.data.image_cache import CachedImages
from loopctl.data.image_file import ENTRY, HEADER, ImageFile, Unusable, write_images

MARK = bytes(range(32))
SIZES = (5, 7), (4, 4), (6, 5)


def pixels(number, size=None):
    return np.random.default_rng(number).integers(0, 256, (*(size or SIZES[number]), 3), dtype=np.uint8)


@pytest.fixture
def file(tmp_path):
    """A file of three images, the first of which has 105 bytes and 7 of padding."""
    path = tmp_path / "images"
    with path.open("wb") as stream:
        write_images(stream, MARK, 3, map(pixels, range(3)))
    return path


def test_images_are_read_as_they_were_written(file):
    images = ImageFile(file, MARK, 3)
    for number in (2, 0, 1):
        assert np.array_equal(images[number].numpy(), pixels(number))
    assert file.stat().st_size == HEADER.size + 3 * ENTRY.itemsize + 112 + 48 + 96


@pytest.mark.parametrize("length", [0, 1, HEADER.size - 1, HEADER.size, HEADER.size + 20, HEADER.size + 48, 200, -8, -1])
def test_a_truncated_file_is_refused_when_it_is_opened(file, length):
    content = file.read_bytes()
    file.write_bytes(content[:length])
    with pytest.raises(Unusable, match=r"^is (not a cache|damaged)"):
        ImageFile(file, MARK, 3)


def test_a_longer_file_is_refused(file):
    with file.open("ab") as stream:
        stream.write(bytes(8))
    with pytest.raises(Unusable, match="its length is wrong"):
        ImageFile(file, MARK, 3)


def test_each_changed_byte_of_an_image_is_found_when_it_is_read(file):
    content, begin = file.read_bytes(), HEADER.size + 3 * ENTRY.itemsize
    for place in range(begin, len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1:])
        images, damaged = ImageFile(file, MARK, 3), 0 if place < begin + 112 else 1 if place < begin + 160 else 2
        for number in range(3):
            if number != damaged:
                assert np.array_equal(images[number].numpy(), pixels(number))
        with pytest.raises(UsageError, match=rf"^{file} is damaged at image {damaged} \(counted from 0\); delete it, and it is made again$"):
            images[damaged]


def test_each_changed_byte_of_header_and_index_is_found_when_it_is_opened(file):
    content = file.read_bytes()
    for place in range(HEADER.size + 3 * ENTRY.itemsize):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        with pytest.raises(Unusable, match=r"^is (not|damaged)"):
            ImageFile(file, MARK, 3)


def test_a_file_of_other_images_or_another_version_is_refused(file):
    for mark, count in ((bytes(32), 3), (MARK, 2), (MARK, 4)):
        with pytest.raises(Unusable, match="is not of these images as they are now"):
            ImageFile(file, mark, count)
    file.write_bytes(b"loopctl images 2" + file.read_bytes()[16:])
    with pytest.raises(Unusable, match="is not a cache that this version of loopctl reads"):
        ImageFile(file, MARK, 3)


@pytest.mark.parametrize("sizes", [
    [(2**32 - 1, 2**32 - 1)] * 3,                       # 3 * height * width exceeds 64 bits
    [(2**31, 2**31)] * 4 + [(5, 17)],                   # their sum in 64 bits is the right length
    [(0, 5), (5, 17), (3, 0)],                          # so is this sum
    [(5, 7), (4, 4), (6, 6)],
    [(5, 7), (4, 4), (1, 1)],
])
def test_sizes_that_someone_made_up_are_refused(file, sizes):
    content = file.read_bytes()[-256:]
    index = np.array([(*size, 0) for size in sizes], ENTRY).tobytes()
    file.write_bytes(HEADER.pack(b"loopctl images 1", MARK, len(sizes), zlib.crc32(index)) + index + content)
    with pytest.raises(Unusable, match=r"its images would be larger than the file|its length is wrong"):
        ImageFile(file, MARK, len(sizes))


def test_a_count_that_someone_made_up_allocates_nothing(file):
    content = bytearray(file.read_bytes())
    struct.pack_into("<Q", content, 48, 2**60)
    file.write_bytes(content)
    with pytest.raises(Unusable, match="is not of these images"):
        ImageFile(file, MARK, 3)


# The data set


def read(path):
    if path.endswith("bad.png"):
        raise UsageError(f"{path} cannot be used as an image")
    return np.asarray(Image.open(path))


def cached(root, cache, side=4, made_by="1", **replaced):
    paths = sorted(map(str, root.iterdir()))
    inner = SimpleNamespace(samples=[(path, 0) for path in paths], targets=[0] * len(paths), transform=lambda image: image,
                            classes=["one"])
    return CachedImages(inner, cache, root, side, replaced.get("read", read), made_by, "data x: sample")


@pytest.fixture
def root(tmp_path):
    (tmp_path / "train").mkdir()
    for number in range(3):
        Image.fromarray(pixels(number)).save(tmp_path / "train" / f"{number}.png")
    return tmp_path / "train"


@pytest.fixture
def said(caplog):
    """The lines that were logged since the last call."""
    caplog.set_level(logging.WARNING, "loopctl")

    def lines():
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found
    return lines


def test_the_file_is_made_once_and_says_so(root, tmp_path, said):
    first = cached(root, tmp_path / "a" / "b")
    first.open()
    file = first.file
    assert file.parent == tmp_path / "a" / "b"
    assert said() == [f"{file} does not exist; it is made now, of 3 images", f"{file} is complete, 0.00 GB"]
    assert os.listdir(file.parent) == [file.name]
    again = cached(root, tmp_path / "a" / "b")
    again.open()
    assert not said()
    assert first.classes == ["one"]
    assert len(again) == 3
    for number in range(3):
        image, target = again[number]
        assert target == 0
        assert torch.equal(image, torch.from_numpy(pixels(number)).permute(2, 0, 1))


def test_a_smaller_image_is_read_as_a_pillow_image(root, tmp_path):
    dataset = cached(root, tmp_path / "cache", side=5)
    assert [isinstance(dataset[number][0], Image.Image) for number in range(3)] == [False, True, False]
    assert np.array_equal(np.asarray(dataset[1][0]), pixels(1))


def change(root, kind):
    path = root / "1.png"
    status = path.stat()
    if kind == "added":
        Image.fromarray(pixels(1)).save(root / "3.png")
    elif kind == "removed":
        path.unlink()
    elif kind == "renamed":
        path.rename(root / "11.png")
    elif kind == "touched":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    elif kind == "size":
        path.write_bytes(path.read_bytes() + b"\0")
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("kind", ["added", "removed", "renamed", "touched", "size"])
def test_the_file_is_made_again_where_the_folder_has_changed(root, tmp_path, said, kind):
    dataset = cached(root, tmp_path / "cache")
    dataset.open()
    said()
    change(root, kind)
    again = cached(root, tmp_path / "cache")
    images = [again[number][0] for number in range(len(again))]
    assert said()[0] == f"{dataset.file} is not of these images as they are now; it is made now, of {len(again)} images"
    for image, (path, _) in zip(images, again.samples, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(Image.open(path)))


def test_the_file_is_made_again_for_other_versions_and_has_another_name_for_another_side_or_folder(root, tmp_path, said):
    dataset = cached(root, tmp_path / "cache")
    dataset.open()
    said()
    cached(root, tmp_path / "cache", made_by="2").open()
    assert "is not of these images as they are now" in said()[0]
    names = {dataset.file, cached(root, tmp_path / "cache", side=5).file}
    (tmp_path / "other").mkdir()
    names.add(cached(root.rename(tmp_path / "other" / "train"), tmp_path / "cache").file)
    assert len(names) == 3


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: bytes(len(content)), lambda content: b""])
def test_a_damaged_file_is_made_again(root, tmp_path, said, damage):
    dataset = cached(root, tmp_path / "cache")
    dataset.open()
    whole = dataset.file.read_bytes()
    said()
    dataset.file.unlink()
    dataset.file.write_bytes(damage(whole))
    cached(root, tmp_path / "cache").open()
    assert said()[0].endswith("; it is made now, of 3 images")
    assert dataset.file.read_bytes() == whole


def test_a_broken_image_is_named_and_no_file_is_left(root, tmp_path):
    (root / "11-bad.png").touch()
    with pytest.raises(UsageError, match=rf"^data x: sample 2 \(counted from 0\): {root}/11-bad.png cannot be used as an image$"):
        cached(root, tmp_path / "cache").open()
    assert not os.listdir(tmp_path / "cache")


def test_an_interrupted_file_is_not_left_and_the_old_one_stays(root, tmp_path):
    def interrupt(path):
        raise KeyboardInterrupt

    dataset = cached(root, tmp_path / "cache")
    dataset.open()
    whole = dataset.file.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        cached(root, tmp_path / "cache", made_by="2", read=interrupt).open()
    assert os.listdir(tmp_path / "cache") == [dataset.file.name]
    assert dataset.file.read_bytes() == whole


def test_a_full_disk_is_noticed_before_and_while_the_file_is_written(root, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: usage(100, 50, 50))
    with pytest.raises(UsageError, match=r"\.images would take about 0\.0 GB, and its disk has 0\.0 GB free; choose another folder as cache, "
                                         "or make room$"):
        cached(root, tmp_path / "cache").open()
    monkeypatch.undo()

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(image_cache, "write_images", full)
    with pytest.raises(UsageError, match=r"\.images does not exist, and cannot be made \(No space left on device\); choose another folder as cache$"):
        cached(root, tmp_path / "cache").open()
    assert not os.listdir(tmp_path / "cache")


def test_a_folder_that_cannot_be_written_is_refused_unless_the_file_is_there(root, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=rf"^{tmp_path}/file/train-4-.*\.images cannot be read \(Not a directory\); choose another folder"):
        cached(root, tmp_path / "file").open()
    cached(root, tmp_path / "cache").open()

    def denied(path, mode="r", *arguments):
        if "w" in mode:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open(path, mode, *arguments)

    monkeypatch.setattr(Path, "open", denied)
    cached(root, tmp_path / "cache").open()
    with pytest.raises(UsageError, match=r"images is not of these images as they are now, and cannot be made \(Permission denied\); choose another folder"):
        cached(root, tmp_path / "cache", made_by="2").open()


def test_another_process_maps_the_file_itself(root, tmp_path):
    dataset = cached(root, tmp_path / "cache")
    dataset.dataset.transform = None
    dataset.open()
    packed = pickle.dumps(dataset)
    assert len(packed) < 2000
    copy = pickle.loads(packed)
    assert copy.images is None
    copy.dataset.transform = torch.clone
    assert torch.equal(copy[2][0], torch.from_numpy(pixels(2)).permute(2, 0, 1))


def test_loader_workers_decode_the_same_file(root, tmp_path, monkeypatch, said):
    one = cached(root, tmp_path / "one")
    one.open()
    monkeypatch.setattr(image_cache, "IMAGES_PER_WORKER", 1)
    monkeypatch.setattr(image_cache.os, "sched_getaffinity", lambda process: {0, 1})
    torch.manual_seed(0)
    before = torch.get_rng_state()
    two = cached(root, tmp_path / "two")
    two.open()
    assert torch.equal(torch.get_rng_state(), before)
    assert one.file.read_bytes() == two.file.read_bytes()

    def broken_in_a_worker(path):
        if multiprocessing.parent_process():
            raise UsageError(f"{path} cannot be used as an image")
        return read(path)

    with pytest.raises(UsageError, match=rf"^data x: sample 0 \(counted from 0\): {root}/0.png cannot be used as an image$"):
        cached(root, tmp_path / "three", read=broken_in_a_worker).open()
    assert not os.listdir(tmp_path / "three")


def build_and_report(root, cache, results, reached, go):
    decoded = []

    def slow(path):
        decoded.append(path)
        reached.set()
        go.wait(30)
        return read(path)

    dataset = cached(root, cache, read=slow)
    dataset.open()
    results.put((len(decoded) > 0, torch.equal(dataset[1][0], torch.from_numpy(pixels(1)).permute(2, 0, 1))))


def test_of_two_processes_at_once_one_makes_the_file_and_the_other_waits(root, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    results, reached, go, waiting = context.Queue(), context.Event(), context.Event(), context.Event()
    monkeypatch.setattr(image_cache.log, "warning", lambda text, *values: waiting.set() if text.startswith("waiting for") else None)
    arguments = root, tmp_path / "cache", results, reached, go
    first, second = (context.Process(target=build_and_report, args=arguments, daemon=True) for _ in range(2))
    first.start()
    assert reached.wait(30)
    second.start()
    assert waiting.wait(30)
    go.set()
    assert sorted(results.get(timeout=30) for _ in range(2)) == [(False, True), (True, True)]
    first.join(30)
    second.join(30)
    assert len(os.listdir(tmp_path / "cache")) == 1


def test_without_file_locks_each_process_writes_a_file_of_its_own(root, tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    written = []
    monkeypatch.setattr(image_cache.fcntl, "flock", none)
    monkeypatch.setattr(image_cache.os, "replace", lambda source, target: written.append(source.name) or source.rename(target))
    dataset = cached(root, tmp_path / "cache")
    dataset.open()
    assert written == [f"{dataset.file.name}.{os.getpid()}.new"]
