"""`augment=` and `erase=` of the image data sets, against torchvision's own transforms composed by hand."""
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.cli import data, models, saved_run

POLICIES = {"trivial": v2.TrivialAugmentWide, "rand": v2.RandAugment, "augmix": v2.AugMix, "none": v2.Identity}


def by_hand(first, mean, std, erase):
    """torchvision's order: the image, then the tensor, normalised, and last the erased part."""
    return v2.Compose([*first, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.RandomErasing(erase)])


def assert_same_images(part, images, transform):
    """The images of `part` are those of `transform`, to the bit, from the same random numbers."""
    for number, image in enumerate(images):
        torch.manual_seed(number)
        mine = part[number][0]
        torch.manual_seed(number)
        assert torch.equal(mine, transform(image)), number


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", POLICIES)
@pytest.mark.compares(use="--data random:augment", technique="augmentations by name", source="torchvision.transforms.v2.TrivialAugmentWide", tolerance="to the bit")
def test_random_images_are_augmented_as_by_torchvision(augment, channels):
    dataset = data.make(f"fake:size=6,channels={channels},augment={augment},erase=0.5", "", download=False)
    half, raw = [0.5] * channels, FakeData(6, (channels, 32, 32), 10)
    assert_same_images(dataset.train, [image for image, _ in raw], by_hand([POLICIES[augment]()], half, half, 0.5))
    plain = data.make(f"fake:size=6,channels={channels}", "", download=False)
    assert torch.equal(dataset.valid[0][0], plain.valid[0][0])
    assert saved_run.describe_data(dataset) == saved_run.describe_data(plain)


@pytest.mark.parametrize("augment", ["true", "trivial", "none"])
def test_cifar_is_cropped_and_mirrored_before_it_is_augmented(cifar, tmp_path, augment):
    name, _, images = cifar
    dataset, plain = (data.make(f"{name}:{options}", str(tmp_path), download=False) for options in
                      (f"augment={augment},erase=1", "augment=false"))
    values = plain.preprocessing.mean, plain.preprocessing.std
    crops = [] if augment == "none" else [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    policy = [v2.TrivialAugmentWide()] * (augment == "trivial")
    assert_same_images(dataset.train, map(Image.fromarray, images[:10]), by_hand([*crops, *policy], *values, 1))
    assert torch.equal(dataset.valid[0][0], plain.valid[0][0])
    assert dataset.preprocessing == plain.preprocessing


def test_grey_images_are_augmented_in_one_or_three_channels(grey, tmp_path):
    name, mean, std, images = grey
    for channels in (1, 3):
        dataset = data.make(f"{name}:channels={channels},augment=rand", str(tmp_path), download=False)
        first = [v2.Grayscale(3)] * (channels == 3) + [v2.RandAugment()]
        assert_same_images(dataset.train, map(Image.fromarray, images["train"]), by_hand(first, [mean] * channels, [std] * channels, 0))


def test_photographs_are_cropped_at_random_before_they_are_augmented_and_validated_at_their_centre(tmp_path):
    raw = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        Image.fromarray(raw).save(tmp_path / part / "cat" / "0.png")
    dataset, plain = (data.make(f"imagefolder:size=20,{options}", str(tmp_path), download=False) for options in
                      ("augment=augmix,erase=1", "augment=none"))
    values = plain.preprocessing.mean, plain.preprocessing.std
    crops = [v2.RandomResizedCrop(20), v2.RandomHorizontalFlip(), v2.AugMix()]
    assert_same_images(dataset.train, [Image.fromarray(raw)], by_hand(crops, *values, 1))
    assert torch.equal(dataset.valid[0][0], plain.batch_transform([plain.valid[0][0]])[0])
    assert torch.equal(plain.train[0][0], plain.valid[0][0])
    assert dataset.preprocessing == plain.preprocessing


class Interrupt:
    @hookimpl
    def after_step(self, run: Run):
        if run.step == 3:
            raise RuntimeError("interrupted after step 3")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_augmented_run_resumes_within_an_epoch_to_the_bit(tmp_path, clone, same, workers):
    def train(model, *plugins, **options):
        train, valid = data.make("fake:size=10,image=8,augment=trivial,erase=0.5", "", download=False).loaders(5 - workers, workers, torch.device("cpu"))
        return fit(model, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=1e-3), train, valid, epochs=2, seed=0,
                   plugins=["checkpoint:every_steps=1", *plugins], **options)

    torch.manual_seed(0)
    whole = models.cnn(10, 3, width=4)
    interrupted, resumed = clone(whole), clone(whole)
    train(whole, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="interrupted after step 3"):
        train(interrupted, Interrupt(), out=tmp_path / "a")
    train(resumed, resume=tmp_path / "a", out=tmp_path / "a")
    same(resumed, whole)


@pytest.mark.parametrize(("spec", "message"), [
    ("fake:augment=autoaugment", r"data fake: augment takes trivial\|rand\|augmix\|none, not 'autoaugment'"),
    ("fake:augment=true", r"data fake: augment takes trivial\|rand\|augmix\|none, not 'true'"),
    ("fake:erase=1.5", "data fake: erase is a probability, from 0 to 1, not 1.5"),
    ("mnist:erase=-1", "data mnist: erase is a probability, from 0 to 1, not -1"),
    ("cifar10:erase=2", "data cifar10: erase is a probability, from 0 to 1, not 2"),
    ("imagefolder:erase=2", "data imagefolder: erase is a probability, from 0 to 1, not 2"),
    ("fake:augment=rand,channels=2", "data fake: augment=rand: channels is 1 or 3, not 2"),
    ("digits:augment=rand", "data digits: no option 'augment'; it has: channels"),
])
def test_a_wrong_augmentation_is_refused(spec, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        data.make(spec, str(tmp_path), download=False)


@pytest.mark.parametrize("options", ["augment=trivial", "augment=none,erase=0.5"])
def test_what_is_augmented_sample_by_sample_is_not_kept_on_the_device(cifar, tmp_path, options):
    found = data.make(f"{cifar[0]}:{options},on_device=true", str(tmp_path), download=False)
    with pytest.raises(UsageError, match="its samples come out differently at every reading, and on_device=true reads them once"):
        found.loaders(5, 0, torch.device("cpu"))
