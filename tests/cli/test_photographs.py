"""`--data imagefolder` and `imagenet`: the pixels of the plain torchvision program, and with `fast` within 1 of 255."""
import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from loopctl import UsageError, evaluate
from loopctl.cli import data, evaluation
from loopctl.cli.image_folder import load_image, load_tensor

CPU = torch.device("cpu")
SIZES = ((61, 47), (40, 90), (33, 33), (29, 30))             # width and height


def photograph(number, size):
    """A smooth image with some noise, so that JPEG has something to do."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(small) + rng.normal(0, 6, (size[1], size[0], 3)), 0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / part / name).mkdir(parents=True)
            for number, size in enumerate(SIZES):
                photograph(number, size).save(tmp_path / part / name / f"{number}.jpg", quality=90)
    return tmp_path


def by_hand(*first, erase=0.0):
    return v2.Compose([*first, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                       v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), *([v2.RandomErasing(erase)] if erase else [])])


CENTRE = v2.Resize(22), v2.CenterCrop(20)
RANDOM = v2.RandomResizedCrop(20), v2.RandomHorizontalFlip()


def batches_of(loader, seed=0):
    torch.manual_seed(seed)
    return list(loader), torch.get_rng_state()


@pytest.mark.parametrize(("options", "crops", "erase", "workers"), [
    ("augment=false", CENTRE, 0, 0), ("augment=true", RANDOM, 0, 0), ("augment=true", RANDOM, 0, 2),
    ("augment=trivial", (*RANDOM, v2.TrivialAugmentWide()), 0, 0), ("erase=0.5", RANDOM, 0.5, 0)])
@pytest.mark.compares(use="--data imagefolder", technique="photographs that travel as uint8", source="torchvision.datasets.ImageFolder",
                      tolerance="to the bit")
def test_batches_equal_those_of_the_plain_program_to_the_bit(folder, options, crops, erase, workers):
    made = data.make(f"imagefolder:size=20,{options}", str(folder), download=False)
    train, valid = made.loaders(3, workers, CPU)
    plain = DataLoader(ImageFolder(folder / "train", by_hand(*crops, erase=erase)), 3, shuffle=True, num_workers=workers)
    plain_valid = DataLoader(ImageFolder(folder / "val", by_hand(*CENTRE)), 3, num_workers=workers)
    for mine, other in ((train, plain), (valid, plain_valid)):
        (batches, state), (expected, expected_state) = batches_of(mine), batches_of(other)
        assert torch.equal(state, expected_state)
        for (images, targets), (other_images, other_targets) in zip(batches, expected, strict=True):
            assert (images.dtype, images.stride()) == (torch.float32, other_images.stride())
            assert torch.equal(images, other_images)
            assert torch.equal(targets, other_targets)
    assert made.train[0][0].dtype == (torch.float32 if erase else torch.uint8)


@pytest.mark.parametrize("augment", ["true", "false"])
def test_fast_has_the_same_random_numbers_and_pixels_within_1_of_255(folder, augment):
    exact, fast = (data.make(f"imagefolder:size=20,augment={augment}{option}", str(folder), download=False)
                   for option in ("", ",fast=true"))
    differ = 0
    for part in ("train", "valid"):
        for seed in range(3):
            (batches, state), (expected, expected_state) = (
                batches_of(DataLoader(getattr(one, part), 8), seed) for one in (fast, exact))
            assert torch.equal(state, expected_state)
            difference = (batches[0][0].int() - expected[0][0].int()).abs()
            assert difference.max() <= 1
            differ += int((difference > 0).sum())
    assert differ                       # it is another resampling
    assert fast.preprocessing == exact.preprocessing


def test_fast_gives_the_policies_images_of_pillow(folder):
    exact, cropped, fast = (data.make(f"imagefolder:size=20,{options}", str(folder), download=False)
                            for options in ("augment=rand", "fast=true", "augment=rand,fast=true"))
    for number in range(8):
        torch.manual_seed(number)
        expected = v2.RandAugment()(to_pil_image(cropped.train[number][0]))
        torch.manual_seed(number)
        assert torch.equal(fast.train[number][0], pil_to_tensor(expected))
        state = torch.get_rng_state()
        torch.manual_seed(number)
        assert exact.train[number][0].shape == (3, 20, 20)
        assert torch.equal(state, torch.get_rng_state())


def test_an_evaluation_of_a_saved_run_has_the_floats(folder):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(1200, 2))
    made = data.make("imagefolder:size=20", str(folder), download=False)
    plain = DataLoader(ImageFolder(folder / "val", by_hand(*CENTRE)), 3)
    assert (evaluation.evaluate_with({"loss": "cross_entropy", "batch_size": 3}, CPU, made)(model)
            == evaluate(model, plain, loss_fn=nn.CrossEntropyLoss()))


def test_an_image_of_any_mode_is_read_in_rgb(tmp_path):
    image = photograph(0, (37, 25))
    for mode, name in (("RGB", "a.jpg"), ("L", "grey.jpg"), ("CMYK", "cmyk.jpg"), ("P", "palette.png"), ("RGBA", "alpha.png"),
                       ("RGB", "a.gif"), ("RGB", "a.webp")):
        image.convert(mode).save(tmp_path / name)
        read = load_image(str(tmp_path / name))
        assert read.mode == "RGB"
        with Image.open(tmp_path / name) as expected:
            assert np.array_equal(np.asarray(read), np.asarray(expected.convert("RGB"))), name


def test_a_damaged_file_is_named_by_its_sample(folder):
    file = folder / "train" / "dog" / "1.jpg"
    file.write_bytes(file.read_bytes()[:300])
    for options in ("", ",fast=true"):
        train, _ = data.make(f"imagefolder:size=20{options}", str(folder), download=False).loaders(8, 0, CPU)
        with pytest.raises(UsageError, match=rf"^data imagefolder: training sample 5 \(counted from 0\): {file} cannot be used as an image"):
            list(train)


def test_without_augmentation_images_are_kept_on_the_device_as_uint8(folder):
    ordinary, held = (data.make(f"imagefolder:size=20,augment=false{option}", str(folder), download=False).loaders(3, 0, CPU)
                      for option in ("", ",on_device=true"))
    assert held[0].dataset.tensors[0].dtype == torch.uint8
    for one, other in zip(ordinary, held, strict=True):
        for (images, _), (expected, _) in zip(batches_of(other)[0], batches_of(one)[0], strict=True):
            assert torch.equal(images, expected)


# With torchcodec.

@pytest.fixture
def decoded(monkeypatch):
    """What torchcodec decodes, by a stand-in for it with Pillow's pixels; it turns images with EXIF data."""
    found = []

    def decode_jpeg(content, mode):
        assert (mode, content.dtype) == ("RGB", torch.uint8)
        try:
            image = Image.open(io.BytesIO(bytes(content)))
            image.load()
        except OSError as error:
            raise RuntimeError("the file is truncated") from error
        found.append(image.size)
        return pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))

    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.ModuleType("torchcodec.decoders"))
    sys.modules["torchcodec.decoders"].decode_jpeg = decode_jpeg
    return found


def samples(folder, options):
    made = data.make(f"imagefolder:size=20,{options}", str(folder), download=False)
    torch.manual_seed(0)
    return [part[number][0] for part in (made.train, made.valid) for number in range(8)]


@pytest.mark.parametrize("augment", ["true", "false", "rand"])
def test_a_jpeg_that_torchcodec_decodes_gives_the_pixels_of_fast(folder, decoded, monkeypatch, augment):
    found = samples(folder, f"fast=true,augment={augment}")
    assert len(decoded) == 16
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)           # it is not installed
    assert all(torch.equal(*pair) for pair in zip(found, samples(folder, f"fast=true,augment={augment}"), strict=True))
    assert len(decoded) == 16


def test_files_that_torchcodec_may_read_otherwise_are_read_by_pillow(folder, decoded):
    """Those with EXIF data, which may say that the image is turned, and other formats than JPEG."""
    turned = Image.Exif()
    turned[0x0112] = 6
    photograph(0, (40, 60)).save(folder / "train" / "cat" / "0.jpg", exif=turned)
    photograph(0, (40, 60)).save(folder / "train" / "cat" / "1.jpg", "PNG")
    train = data.make("imagefolder:size=20,fast=true,augment=false", str(folder), download=False).train
    assert [train.loader(train.samples[number][0]).size for number in (0, 1)] == [(40, 60)] * 2
    assert train.loader(train.samples[2][0]).shape == (3, 33, 33)
    assert decoded == [(33, 33)]


def test_a_file_that_torchcodec_refuses_has_the_error_of_pillow(folder, decoded):
    file = folder / "train" / "cat" / "0.jpg"
    loader = data.make("imagefolder:size=20,fast=true", str(folder), download=False).train.loader
    for content in (file.read_bytes()[:600], b"", None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UsageError, match=f"^{file} cannot be used as an image"):
            loader(str(file))


def test_a_torchcodec_that_does_not_fit_is_not_used_and_that_is_said(folder, monkeypatch, caplog):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError("undefined symbol")

    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Broken("torchcodec.decoders"))
    samples(folder, "fast=true")
    assert "torchcodec cannot be imported (undefined symbol), so fast=true decodes with Pillow" in caplog.text


def test_torchcodec_decodes_to_the_pixels_of_pillow(folder):
    decoders = pytest.importorskip("torchcodec.decoders")
    for path in folder.rglob("*.jpg"):
        assert torch.equal(load_tensor(decoders.decode_jpeg, str(path)), pil_to_tensor(load_image(str(path))))
