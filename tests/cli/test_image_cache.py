"""`--data imagefolder:cache=DIR` and `imagenet:cache=DIR`, compared with the same data without a cache."""
import re
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn
from torchvision.transforms import v2

from loopctl import UsageError, fit, hookimpl
from loopctl.cli import data, main, models

CPU = torch.device("cpu")
# Larger, equal and smaller than the shorter side, 22 pixels for size=20; also very long ones.
SIZES = (40, 30), (30, 40), (22, 50), (22, 22), (21, 60), (7, 5), (100, 22), (300, 24)


@pytest.fixture
def root(tmp_path):
    for part in ("train", "val"):
        for number, size in enumerate(SIZES):
            folder = tmp_path / "images" / part / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            raw = np.random.default_rng([number, len(part)]).integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(raw if number else raw[..., 0]).save(folder / f"{number}.png")
    return tmp_path / "images"


def make(root, options="", cache=""):
    cache = f",cache={cache}" if cache else ""
    return data.make(f"imagefolder:size=20{options}{cache}", str(root), download=False)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_the_centres_and_all_of_the_validation_are_equal_to_the_bit(root, tmp_path, workers):
    loaders = make(root, ",augment=false", tmp_path / "cache").loaders(3, workers, CPU)
    for loader, ordinary in zip(loaders, make(root, ",augment=false").loaders(3, 0, CPU), strict=True):
        for _ in range(1 if workers else 2):
            torch.manual_seed(3)
            expected = list(ordinary)
            torch.manual_seed(3)
            for (images, targets), (same, labels) in zip(loader, expected, strict=True):
                assert torch.equal(images, same)
                assert torch.equal(targets, labels)
    augmented = make(root, "", tmp_path / "cache").loaders(8, 0, CPU)[1]
    assert torch.equal(next(iter(augmented))[0], next(iter(make(root).loaders(8, 0, CPU)[1]))[0])


def test_random_crops_are_cut_from_the_resized_image_and_of_a_small_one_are_those_of_the_image_itself(root, tmp_path):
    dataset, ordinary = make(root, "", tmp_path / "cache").train, make(root).train
    crop = v2.Compose([v2.RandomResizedCrop(20), v2.RandomHorizontalFlip(), *ordinary.transform.transforms[2:]])
    for number, (path, target) in enumerate(ordinary.samples):
        image = Image.open(path).convert("RGB")
        small = min(image.size) < 22
        torch.manual_seed(number)
        expected = crop(image if small else v2.functional.pil_to_tensor(v2.Resize(22)(image)))
        torch.manual_seed(number)
        assert torch.equal(dataset[number][0], expected)
        assert dataset[number][1] == target


@pytest.mark.parametrize("augment", ["trivial", "rand", "augmix"])
def test_a_policy_is_given_a_pillow_image(root, tmp_path, augment, monkeypatch):
    given = []
    cls = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment, "augmix": v2.AugMix}[augment]
    monkeypatch.setattr(cls, "forward", lambda self, image: given.append(type(image)) or image)
    dataset = make(root, f",augment={augment},erase=0.5", tmp_path / "cache").train
    assert {tuple(dataset[number][0].shape) for number in range(8)} == {(3, 20, 20)}
    assert given == [Image.Image] * 8


def test_it_goes_together_with_on_device_without_augmentation(root, tmp_path):
    found = [make(root, ",augment=false,on_device=true", cache).loaders(8, 0, CPU)[1] for cache in ("", tmp_path / "cache")]
    assert torch.equal(*(next(iter(loader))[0] for loader in found))


def test_fast_is_refused_with_it(root, tmp_path):
    with pytest.raises(UsageError, match=r"^data imagefolder: fast=true with cache: images from the cache are resized as tensors already; leave out fast$"):
        make(root, ",fast=true", tmp_path / "cache")


class Interrupt:
    @hookimpl
    def after_step(self, run):
        if run.step == 3:
            raise RuntimeError("interrupted after step 3")


def test_a_run_resumes_within_an_epoch_to_the_bit(root, tmp_path, clone, same):
    def train(model, *plugins, **options):
        train, valid = make(root, "", tmp_path / "cache").loaders(2, 0, CPU)
        return fit(model, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=1e-3), train, valid, epochs=2, seed=0,
                   plugins=["checkpoint:every_steps=1", *plugins], **options)

    torch.manual_seed(0)
    whole = models.cnn(2, 3, width=4)
    interrupted, resumed = clone(whole), clone(whole)
    train(whole, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="interrupted after step 3"):
        train(interrupted, Interrupt(), out=tmp_path / "a")
    train(resumed, resume=tmp_path / "a", out=tmp_path / "a")
    same(resumed, whole)


def run(root, *arguments, status=0):
    words = ["run", "--model", "linear", "--epochs", 1, "--device", "cpu", "--without", "progress", "--data-root", root, *arguments]
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exit_code == status, result.output
    return result


def test_a_run_names_a_damaged_image_in_one_line(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = "imagefolder:size=20,cache=cache"
    run(root, "--data", spec)
    file, = (tmp_path / "cache").glob("train-22-*.images")
    content = bytearray(file.read_bytes())
    content[-40] ^= 1                                   # of the last image, in the order of the folder
    file.write_bytes(content)
    error = run(root, "--data", spec, status=2).stderr
    image = root / "train" / "dog" / "7.png"
    assert error == (f"error: data imagefolder: training sample 7 (counted from 0; {image}): {file} is damaged at image 7 (counted from 0); "
                     "delete it, and it is made again\n")
    file.unlink()
    run(root, "--data", spec)


def test_an_evaluation_makes_the_file_of_the_validation_alone(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(root, "--data", "imagefolder:size=20,cache=cache", "--out", "a")
    for file in (tmp_path / "cache").iterdir():
        file.unlink()
    assert not CliRunner().invoke(main, ["evaluate", "a"]).exit_code
    assert [file.name.partition("-")[0] for file in (tmp_path / "cache").iterdir()] == ["val"]


def test_a_broken_image_is_refused_as_without_the_cache(root, tmp_path):
    (root / "train" / "dog" / "3.png").write_bytes(b"")
    with pytest.raises(UsageError, match=rf"^data imagefolder: training sample 5 \(counted from 0\): {root}/train/dog/3.png cannot be used as an "
                                         r"image \(the file is empty\); replace it, or remove it$"):
        make(root, "", tmp_path / "cache").loaders(2, 0, CPU)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.filterwarnings("default:Python 3.14 will, by default, filter:DeprecationWarning")    # in torchvision
@pytest.mark.usefixtures("imagenet")
def test_imagenet_is_cached_too(tmp_path):
    parts = [data.make(f"imagenet:size=21,augment=false{more}", str(tmp_path), download=False)
             for more in ("", f",cache={tmp_path / 'cache'}")]
    for ordinary, cached in zip(*([*part.loaders(6, 0, CPU)] for part in parts), strict=True):
        assert torch.equal(*(torch.cat([images for images, _ in loader]).sum((1, 2, 3)).sort()[0] for loader in (ordinary, cached)))
    assert sorted(re.sub("-[0-9a-f]{8}", "", file.name) for file in (tmp_path / "cache").iterdir()) == ["train-24.images", "val-24.images"]
