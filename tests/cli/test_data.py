"""Data sets by name, each read from tiny files in its original format, and their loaders."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import RandomSampler, SequentialSampler, TensorDataset

from loopctl import Data
from loopctl.cli import DATA, data, models
from loopctl.errors import UsageError

CPU = torch.device("cpu")


def random_pixels(count, *shape):
    return np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)


def normalised(image, mean, std):
    """Normalisation by hand: uint8 to 0..1, minus the mean, over the standard deviation. `image` is height x width x channels."""
    values = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1) / 255
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def floats(dataset, image):
    """An image of a data set as the floats that a batch has."""
    return dataset.batch_transform([image[None]])[0][0]


# Digits


def test_digits_have_a_fixed_split_without_overlap():
    from sklearn.datasets import load_digits

    dataset = data.make("digits", "nowhere", download=False)
    again = data.make("digits", "elsewhere", download=False)
    assert (len(dataset.train), len(dataset.valid), dataset.classes, dataset.shape) == (1437, 360, 10, (1, 8, 8))
    assert torch.equal(dataset.train.tensors[0], again.train.tensors[0])

    raw = load_digits()
    image, target = dataset.valid[1]                     # every fifth, so the second is number 5
    torch.testing.assert_close(image[0], torch.tensor((raw.images[5] / 16 - 0.3053) / 0.3761, dtype=torch.float32))
    assert target == raw.target[5]
    # Training and validation set together have every image exactly once.
    all_images = torch.cat([dataset.train.tensors[0], dataset.valid.tensors[0]]).flatten(1) * 0.3761 + 0.3053
    assert sorted(map(tuple, (all_images * 16).round().int().tolist())) == sorted(map(tuple, raw.data.astype(int).tolist()))


def test_digits_are_normalised_and_every_class_is_in_both_sets():
    dataset = data.make("digits", "nowhere", download=False)
    images, targets = dataset.train.tensors
    assert abs(images.mean()) < 0.01
    assert abs(images.std() - 1) < 0.01
    assert images.dtype == torch.float32
    assert set(targets.tolist()) == set(dataset.valid.tensors[1].tolist()) == set(range(10))


def test_digits_can_have_three_equal_channels():
    grey, colour = (data.make(spec, "nowhere", download=False) for spec in ("digits", "digits:channels=3"))
    assert colour.shape == (3, 8, 8) == tuple(colour.train[0][0].shape)
    for channel in range(3):
        assert torch.equal(colour.train[7][0][channel], grey.train[7][0][0])


# MNIST and FashionMNIST: idx files in ROOT/CLASS/raw


def test_mnist_and_fashionmnist_are_read_from_idx_files(grey, tmp_path):
    name, mean, std, images = grey
    dataset = data.make(name, str(tmp_path), download=False)
    assert (len(dataset.train), len(dataset.valid), dataset.classes, dataset.shape) == (12, 4, 10, (1, 28, 28))
    for part, raw in ((dataset.train, images["train"]), (dataset.valid, images["t10k"])):
        image, target = part[3]
        torch.testing.assert_close(image, normalised(raw[3][..., None], [mean], [std]))
        assert target == 3


def test_mnist_and_fashionmnist_can_have_three_channels(grey, tmp_path):
    name, mean, std, images = grey
    dataset = data.make(f"{name}:channels=3", str(tmp_path), download=False)
    image = dataset.train[2][0]
    assert dataset.shape == (3, 28, 28) == tuple(image.shape)
    by_hand = normalised(np.repeat(images["train"][2][..., None], 3, 2), [mean] * 3, [std] * 3)
    torch.testing.assert_close(image, by_hand)


# CIFAR: pickled batches in ROOT/cifar-10-batches-py and ROOT/cifar-100-python


CIFAR_MEAN = {"cifar10": (0.4914, 0.4822, 0.4465), "cifar100": (0.5071, 0.4865, 0.4409)}
CIFAR_STD = {"cifar10": (0.2470, 0.2435, 0.2616), "cifar100": (0.2673, 0.2564, 0.2762)}


def test_cifar_is_read_from_its_batch_files(cifar, tmp_path):
    name, classes, images = cifar
    dataset = data.make(f"{name}:augment=false", str(tmp_path), download=False)
    assert (len(dataset.train), len(dataset.valid), dataset.classes, dataset.shape) == (10, 2, classes, (3, 32, 32))
    for part, number, row in ((dataset.train, 7, 7), (dataset.valid, 1, 11)):
        image, target = part[number]
        torch.testing.assert_close(image, normalised(images[row], CIFAR_MEAN[name], CIFAR_STD[name]))
        assert target == row % classes


def test_by_default_only_the_training_set_of_cifar_is_augmented(cifar, tmp_path):
    name, _, images = cifar
    torch.manual_seed(0)
    dataset = data.make(name, str(tmp_path), download=False)
    samples = [dataset.train[7][0] for _ in range(20)]
    assert len({tuple(sample.flatten().tolist()) for sample in samples}) > 10
    assert {tuple(sample.shape) for sample in samples} == {(3, 32, 32)}
    for _ in range(5):
        torch.testing.assert_close(dataset.valid[1][0], normalised(images[11], CIFAR_MEAN[name], CIFAR_STD[name]))


def test_the_augmentation_of_cifar_is_a_crop_of_the_padded_image_perhaps_mirrored(cifar, tmp_path):
    name, _, images = cifar
    torch.manual_seed(0)
    dataset = data.make(name, str(tmp_path), download=False)
    padded = np.pad(images[7], ((4, 4), (4, 4), (0, 0)))
    crops = {(top, left): normalised(padded[top:top + 32, left:left + 32], CIFAR_MEAN[name], CIFAR_STD[name])
             for top in range(9) for left in range(9)}
    offsets, flips = set(), set()
    for _ in range(60):
        sample = dataset.train[7][0]
        matches = [(place, flipped) for place, crop in crops.items() for flipped in (False, True)
                   if torch.allclose(sample, crop.flip(2) if flipped else crop, atol=1e-5)]
        assert len(matches) == 1
        (top, left), flipped = matches[0]
        offsets |= {top, left}
        flips.add(flipped)
    assert (min(offsets), max(offsets), flips) == (0, 8, {False, True})


# ImageFolder: ROOT/train/CLASS and ROOT/val/CLASS


PHOTO_MEAN, PHOTO_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photos(folder, classes, count, size):
    """Write images as PNG, which is lossless; return them by class."""
    written = {}
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        written[name] = random_pixels(count + number, *size, 3)[number:]
        for index, image in enumerate(written[name]):
            Image.fromarray(image).save(folder / name / f"{index}.png")
    return written


def test_imagefolder_uses_random_crops_for_training_and_the_centre_for_validation(tmp_path):
    photos(tmp_path / "train", ["cat", "dog", "eel"], 3, (40, 30))
    written = photos(tmp_path / "val", ["cat", "dog", "eel"], 2, (20, 20))
    dataset = data.make("imagefolder:size=20", str(tmp_path), download=False)
    assert (len(dataset.train), len(dataset.valid), dataset.classes, dataset.shape) == (9, 6, 3, (3, 20, 20))
    assert [dataset.valid[number][1] for number in range(6)] == [0, 0, 1, 1, 2, 2]
    # For size=20 the shorter side is resized to 22; the centre of 20 is without a border of 1 pixel.
    image = Image.fromarray(written["dog"][1]).resize((22, 22), Image.Resampling.BILINEAR).crop((1, 1, 21, 21))
    torch.testing.assert_close(floats(dataset, dataset.valid[3][0]), normalised(np.asarray(image), PHOTO_MEAN, PHOTO_STD))
    torch.manual_seed(0)
    assert len({tuple(dataset.train[0][0].flatten().tolist()) for _ in range(10)}) == 10
    assert tuple(dataset.train[0][0].shape) == (3, 20, 20)


def test_imagefolder_without_augmentation_uses_the_centre_for_training_too(tmp_path):
    for part in ("train", "val"):
        photos(tmp_path / part, ["cat", "dog"], 2, (24, 24))
    dataset = data.make("imagefolder:size=20,augment=false", str(tmp_path), download=False)
    for _ in range(3):
        assert torch.equal(dataset.train[0][0], dataset.valid[0][0])


def test_imagefolder_resizes_by_256_over_224_by_default(tmp_path):
    for part in ("train", "val"):
        written = photos(tmp_path / part, ["cat"], 1, (256, 256))
    dataset = data.make("imagefolder", str(tmp_path), download=False)
    assert dataset.shape == (3, 224, 224)
    centre = normalised(written["cat"][0][16:240, 16:240], PHOTO_MEAN, PHOTO_STD)
    torch.testing.assert_close(floats(dataset, dataset.valid[0][0]), centre)


def test_imagefolder_refuses_missing_folders_and_different_classes(tmp_path):
    with pytest.raises(UsageError, match=r"there is no folder .*train; put images in train/CLASS and val/CLASS"):
        data.make("imagefolder", str(tmp_path), download=False)
    photos(tmp_path / "train", ["cat", "dog"], 1, (4, 4))
    (tmp_path / "val").mkdir()
    with pytest.raises(UsageError, match=r"Couldn't find any class folder in .*val"):
        data.make("imagefolder", str(tmp_path), download=False)
    photos(tmp_path / "val", ["cat", "eel"], 1, (4, 4))
    with pytest.raises(UsageError, match="have different classes; only one of them has dog, eel"):
        data.make("imagefolder", str(tmp_path), download=False)


# ImageNet: the archives ILSVRC2012_*


@pytest.mark.filterwarnings("default:Python 3.14 will, by default, filter:DeprecationWarning")    # in torchvision
@pytest.mark.usefixtures("imagenet")
def test_imagenet_is_read_from_its_original_archives(tmp_path):
    dataset = data.make("imagenet:size=21,augment=false", str(tmp_path), download=False)
    assert (len(dataset.train), len(dataset.valid), dataset.classes, dataset.shape) == (6, 2, 1000, (3, 21, 21))
    assert [dataset.train[number][1] for number in range(6)] == [0, 0, 0, 1, 1, 1]
    assert dataset.train.classes[0] == ("tench", "Tinca tinca")
    grey = np.full((21, 21, 3), 102, dtype=np.uint8)
    torch.testing.assert_close(floats(dataset, dataset.train[5][0]), normalised(grey, PHOTO_MEAN, PHOTO_STD))
    # By the ground-truth file the first validation image, of grey value 201, is a goldfish and the second a tench.
    assert [dataset.valid[number][1] for number in range(2)] == [0, 1]
    torch.testing.assert_close(floats(dataset, dataset.valid[1][0]), normalised(np.full_like(grey, 201), PHOTO_MEAN, PHOTO_STD))


# Random images, and a user's factories


def test_fake_data_has_the_size_shape_and_classes_of_its_options():
    dataset = data.make("fake:size=10,image=8,classes=3,channels=2", "nowhere", download=False)
    assert (len(dataset.train), len(dataset.valid), dataset.classes, dataset.shape) == (10, 2, 3, (2, 8, 8))
    assert tuple(dataset.train[0][0].shape) == (2, 8, 8)
    assert {int(target) for _, target in dataset.train} <= {0, 1, 2}
    assert torch.equal(dataset.train[4][0], dataset.train[4][0])
    assert not torch.equal(dataset.train[0][0], dataset.valid[0][0])


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that tests can name by import path. It is removed from sys.modules afterwards."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text, more=""):
        (tmp_path / "written_for_data.py").write_text(
            "import torch\nfrom torch.utils.data import DataLoader, TensorDataset\nfrom loopctl import Data\n\n"
            "class Named(TensorDataset):\n    classes = ['a', 'b', 'c']\n\n"
            "def part(count, of=Named):\n    return of(torch.zeros(count, 2, 4, 4), torch.arange(count) % 3)\n\n" + more + "\n\n"
            f"def made(root, extra=1):\n    {text}\n")
        return "written_for_data:made"
    yield write
    sys.modules.pop("written_for_data", None)


def test_a_users_factory_may_return_a_pair(module):
    dataset = data.make(f"{module('return part(5), part(2)')}:extra=3", "nowhere", download=False)
    assert (len(dataset.train), len(dataset.valid), dataset.classes, dataset.shape) == (5, 2, 3, (2, 4, 4))


def test_a_users_factory_may_return_a_data_and_is_passed_the_root(module):
    name = module("return Data(part(len(root)), part(extra), 3, (2, 4, 4))")
    dataset = data.make(f"{name}:extra=4", "nowhere", download=False)
    assert (len(dataset.train), len(dataset.valid)) == (len("nowhere"), 4)


@pytest.mark.parametrize(("text", "classes", "shape"), [
    ("return part(5, TensorDataset), part(2)", None, (2, 4, 4)),
    ("return part(5), None", 3, (2, 4, 4)),
    ("return part(5)", 3, (2, 4, 4)),
    ("return {'train': part(5), 'validation': part(2)}", 3, (2, 4, 4)),
    ("return torch.utils.data.Subset(part(9), range(5)), part(2)", 3, (2, 4, 4)),
    ("return [{'x': torch.zeros(2)}] * 5, part(2)", None, None),
    ("return [torch.zeros(7)] * 5, part(2)", None, None),
    ("return DataLoader(part(5), 2), DataLoader(part(2), 2)", 3, None),
    ("return iter([]), None", None, None),
])
def test_what_a_users_factory_returns_tells_the_classes_and_the_shape(module, text, classes, shape):
    dataset = data.make(module(text), "nowhere", download=False)
    assert (dataset.classes, dataset.shape) == (classes, shape)


def test_reading_the_first_sample_draws_no_random_numbers(module):
    name = module("return Random(), None", "class Random:\n    classes = ['a', 'b']\n    def __len__(self): return 5\n"
                                           "    def __getitem__(self, index): return torch.rand(2), index % 2\n")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    assert data.make(name, "nowhere", download=False).shape == (2,)
    assert torch.rand(1) == expected


def test_a_model_of_tokens_is_tried_on_whole_numbers(module):
    dataset = data.make(module("return Tokens(torch.arange(6).view(3, 2), torch.arange(3)), None", "class Tokens(Named): pass"), "nowhere",
                        download=False)
    assert dataset.numbers is False
    model = torch.nn.Sequential(torch.nn.Embedding(6, 4), torch.nn.Flatten(), torch.nn.Linear(8, 3))
    models.check_output("tokens", model, dataset)


@pytest.mark.parametrize(("text", "words"), [
    ("return part(0), part(2)", "has no training samples"),
    ("return part(2), part(0)", "has no validation samples"),
    ("return Data(part(0), part(2), 3, (2, 4, 4))", "has no training samples"),
    ("return part(2), iter([])", "its validation data is an iterator, which can be read once only; return a list"),
    ("return None", "returned a NoneType as training data; return a data set, a loader .* or a pair"),
    ("return 3, part(2)", "returned a int as training data"),
    ("return part(2), 3", "returned a int as validation data"),
    ("return 'digits'", "returned a str as training data"),
    ("return part(2), part(2), part(2)", "returned a tuple as training data; .* or a pair"),
    ("return torch.zeros(4, 2), torch.zeros(4)", r"returned a Tensor as training data; .*use torch.utils.data.TensorDataset\(inputs, targets\)"),
    ("return {'training': part(2)}", "returned a dict with training; name them train and valid"),
    ("return {}", "returned a dict with no entries; name them train and valid"),
    ("return {'train': part(2), 'val': part(2), 'validation': part(2)}", "name them train and valid"),
    ("return Data(part(2), part(2), ['a', 'b', 'c'])", r"classes is \['a', 'b', 'c'\]; use the number of classes"),
    ("return Data(part(2), part(2), batch_sampler=[[0]], drop_last=True)", "sampler and drop_last would not be used"),
    ("return Data(iter([]), collate_fn=list)", "train is a loader, so collate_fn, .* would not be used"),
    ("raise ValueError('out\\nof disk')", "written_for_data:made: out of disk"),
])
def test_a_wrong_result_of_a_factory_is_refused_in_one_line(module, text, words):
    with pytest.raises(UsageError, match=words) as caught:
        data.make(module(text), "nowhere", download=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mnist", "fashionmnist", "cifar10", "cifar100"])
def test_the_error_for_missing_data_names_the_folder_and_the_download_option(name, tmp_path):
    with pytest.raises(UsageError, match="pass --download to get it, or --data-root DIR") as caught:
        data.make(name, str(tmp_path), download=False)
    assert f"data {name} is missing or incomplete in {tmp_path}" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("spec", "words"), [
    ("digits:channels=0", "data digits: channels is at least 1, not 0"),
    ("mnist:channels=1.5", "data mnist: channels takes a whole number, not '1.5'"),
    ("cifar10:augment=perhaps", r"data cifar10: augment takes true\|false or trivial\|rand\|augmix\|none, not 'perhaps'"),
    ("fake:classes=0", "data fake: classes is at least 1, not 0"),
    ("imagefolder:size=0", "data imagefolder: size is at least 1, not 0"),
])
def test_the_error_for_a_wrong_option_says_what_it_takes(spec, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        data.make(spec, str(tmp_path), download=False)


def test_shell_completion_has_all_names():
    assert sorted(data.NAMES) == DATA


# Loaders


def numbered(count):
    return TensorDataset(torch.arange(count).float().reshape(-1, 1, 1, 1), torch.zeros(count, dtype=torch.long))


@pytest.fixture
def small():
    return Data(numbered(50), numbered(20), 10, (1, 1, 1))


def order(loader):
    return [int(value) for images, _ in loader for value in images.flatten()]


def test_training_data_is_shuffled_anew_each_epoch_and_validation_data_never(small):
    torch.manual_seed(0)
    train, valid = small.loaders(8, 0, CPU)
    first, second = order(train), order(train)
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second
    assert first != list(range(50))
    assert order(valid) == order(valid) == list(range(20))
    assert isinstance(train.sampler, RandomSampler)
    assert isinstance(valid.sampler, SequentialSampler)


def test_the_last_batch_has_the_remaining_samples(small):
    train, valid = small.loaders(8, 0, CPU)
    assert [len(target) for _, target in train] == [8] * 6 + [2]
    assert [len(target) for _, target in valid] == [8, 8, 4]


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("mps", False), ("cuda", True), ("cuda:1", True)])
def test_memory_is_pinned_for_cuda_only(small, device, pinned):
    assert [loader.pin_memory for loader in small.loaders(8, 0, torch.device(device))] == [pinned, pinned]


def test_loader_workers_give_the_same_batches(small):
    train, valid = small.loaders(8, 1, CPU)
    assert (train.num_workers, valid.num_workers) == (1, 1)
    assert order(valid) == list(range(20))
    torch.manual_seed(3)
    shuffled = order(train)
    torch.manual_seed(3)
    assert order(small.loaders(8, 0, CPU)[0]) == shuffled
