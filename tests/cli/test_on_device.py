"""`--data NAME:on_device=true` against the ordinary DataLoader, and `--matmul`.

On a CPU the device is the host's own memory; the way there is the same.
"""
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from loopctl import Data, Run, UsageError, fit, hookimpl
from loopctl.cli import data, main, models
from loopctl.data import on_device

CPU = torch.device("cpu")


def loaders(spec, root="nowhere", device=CPU, batch_size=5):
    return data.make(spec, str(root), download=False).loaders(batch_size, 0, device)


def same_batches(one, other):
    for ours, theirs in zip(one, other, strict=True):
        assert type(ours) is type(theirs) is list
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())


def compare(spec, root="nowhere"):
    """The batches of both parts, over two epochs, are those of the ordinary loaders to the last bit."""
    held, usual = (loaders(one, root) for one in (f"{spec}{',' if ':' in spec else ':'}on_device=true", spec))
    for ours, theirs in zip(held, usual, strict=True):
        for _ in range(2):
            torch.manual_seed(3)
            expected, after = list(theirs), torch.get_rng_state()
            torch.manual_seed(3)
            same_batches(ours, expected)
            assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("spec", ["digits", "digits:channels=3", "fake:size=260,image=2"])
def test_batches_are_those_of_the_ordinary_loader(spec):
    compare(spec)


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_pictures_too(grey, tmp_path, channels):
    compare(f"{grey[0]}:channels={channels}", tmp_path)


def test_colour_pictures_too(cifar, tmp_path):
    compare(f"{cifar[0]}:augment=false", tmp_path)


def photos(folder):
    from PIL import Image
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for index in range(3):
                picture = np.random.default_rng([number, index]).integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(picture).save(folder / part / name / f"{index}.png")


def test_photographs_too_where_they_are_not_cut_at_random(tmp_path):
    photos(tmp_path)
    compare("imagefolder:size=20,augment=false", tmp_path)
    with pytest.raises(UsageError, match="data imagefolder: its images come out differently at every reading, .* pass augment=false"):
        loaders("imagefolder:size=20,on_device=true", tmp_path)


def test_memory_is_not_pinned_and_an_image_can_be_had_by_itself():
    train, _ = loaders("digits:on_device=true", device=CPU)
    assert not train.pin_memory
    usual = data.digits().train[7]
    assert all(torch.equal(a, b) for a, b in zip(train.dataset[7], usual, strict=True))


# Runs


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments, status=0):
        result = CliRunner().invoke(main, ["run", "--model", "cnn:width=4,dropout=0.1", "--epochs", "2", *map(str, arguments)])
        assert result.exit_code == status, result.output
        return result
    return call


@pytest.mark.parametrize("spec", ["digits", "fake:size=100,image=8"])
def test_a_run_ends_with_the_same_bits(run, tmp_path, spec):
    run("--data", spec, "--out", "usual")
    run("--data", f"{spec}{',' if ':' in spec else ':'}on_device=true", "--out", "held")
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("usual", "held"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "usual" / "metrics.csv").read_text() == (tmp_path / "held" / "metrics.csv").read_text()
    run("--config", "held/run.toml", "--out", "again")
    assert (tmp_path / "again" / "metrics.csv").read_text() == (tmp_path / "held" / "metrics.csv").read_text()


class Break:
    @hookimpl
    def after_step(self, run: Run):
        if run.step == 3:
            raise RuntimeError("the power is gone")


def test_a_run_goes_on_within_an_epoch_with_augmentation(cifar, tmp_path, clone, same):
    def train(model, *plugins, **options):
        train, valid = loaders(f"{cifar[0]}:on_device=true", tmp_path, batch_size=2)
        return fit(model, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=1e-3), train, valid, epochs=2, seed=0,
                   plugins=["checkpoint:every_steps=1", *plugins], **options)

    torch.manual_seed(0)
    whole = models.cnn(cifar[1], 3, width=4, dropout=0.1)
    broken, again = clone(whole), clone(whole)
    train(whole, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the power is gone"):
        train(broken, Break(), out=tmp_path / "a")
    done = train(again, resume=tmp_path / "a", out=tmp_path / "a")
    assert done.step == 10
    same(again, whole)


# Augmentation


def test_every_image_is_some_crop_of_the_padded_picture_or_its_mirror(cifar, tmp_path):
    """Each image of a batch by itself, every place and both sides alike."""
    name, _, pictures = cifar
    torch.manual_seed(0)
    train, valid = loaders(f"{name}:on_device=true", tmp_path, batch_size=10)
    plain = train.dataset.tensors[0]
    usual, _ = loaders(f"{name}:augment=false", tmp_path, batch_size=10)
    recipe = usual.dataset.transform
    padded = np.pad(pictures[:10], ((0, 0), (4, 4), (4, 4), (0, 0)))
    padded = torch.stack([recipe(picture) for picture in padded])           # black, as the picture's own black
    seen = []
    for _ in range(40):
        images = train.dataset.__getitems__(list(range(10)))[0]
        assert images.shape == plain.shape
        assert images.is_contiguous()
        crops = {(top, left, mirrored): crop.flip(3) if mirrored else crop
                 for top in range(9) for left in range(9) for mirrored in (False, True)
                 for crop in [padded[:, :, top:top + 32, left:left + 32]]}
        found = [[place for place, crop in crops.items() if torch.equal(crop[number], images[number])] for number in range(10)]
        assert all(len(places) == 1 for places in found)
        seen.append([place for (place,) in found])
    for image in zip(*seen, strict=True):
        assert len(set(image)) > 20
    tops, lefts, mirrored = zip(*(place for places in seen for place in places), strict=True)
    for places in (tops, lefts):
        assert all(20 < places.count(place) < 75 for place in range(9))     # 44 of 400 each, on average
    assert 150 < sum(mirrored) < 250
    assert sum(len({place[2] for place in places}) == 2 for places in seen) > 30        # within one batch, too
    assert any(top != left for top, left in zip(tops, lefts, strict=True))
    same_batches(valid, loaders(f"{name}:augment=false", tmp_path, batch_size=10)[1])


# Refusals


class Noise(Dataset):
    classes = ["a", "b"]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.rand(1, 8, 8), index % 2


def test_images_that_are_random_are_refused_whoever_makes_them():
    noisy = Data(Noise(), Noise(), 2, (1, 8, 8), name="mine:noise", on_device=True)
    with pytest.raises(UsageError, match=r"^data mine:noise: its images come out differently at every reading"):
        noisy.loaders(2, 0, CPU)


def test_what_does_not_fit_is_refused_with_the_numbers(monkeypatch):
    monkeypatch.setattr(on_device, "free", lambda device: 5e9)
    with pytest.raises(UsageError, match=(r"^data fake: 120,000 images of 3x64x64 take 5\.9 GB, and cpu has 5\.0 GB free; "
                                          "leave out on_device, or use smaller images$")):
        loaders("fake:size=100000,image=64,on_device=true")
    size = 1797 * 64 * 4
    monkeypatch.setattr(on_device, "free", lambda device: size - 1)
    with pytest.raises(UsageError, match="^data digits: 1,797 images"):
        loaders("digits:on_device=true")
    monkeypatch.setattr(on_device, "free", lambda device: size)
    loaders("digits:on_device=true")


def test_free_memory_is_what_the_system_says():
    assert 0 < on_device.free(CPU) < 2**50


def test_data_of_ones_own_can_be_held_too(tmp_path):
    (tmp_path / "held_by_test.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\nfrom loopctl import Data\n\n"
        "class Mine(TensorDataset):\n    classes = ['a', 'b']\n    def __getitem__(self, index):\n"
        "        image, target = super().__getitem__(index)\n        return 2 * image, target\n\n"
        "def made(**settings):\n    part = Mine(torch.rand(6, 1, 8, 8), torch.arange(6) % 2)\n    return part, part\n")
    torch.manual_seed(0)
    found = data.make(f"{tmp_path}/held_by_test.py:made:on_device=true", "nowhere", download=False)
    _, valid = found.loaders(4, 0, CPU)
    usual = Data(found.train, found.valid, 2, (1, 8, 8)).loaders(4, 0, CPU)[1]
    same_batches(valid, list(usual))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_batches_are_there_already():
    device = torch.device("cuda")
    usual, held = loaders("digits"), loaders("digits:on_device=true", device=device)
    assert on_device.free(device) > 0
    for one, other in zip(usual, held, strict=True):
        torch.manual_seed(0)
        expected = list(one)
        torch.manual_seed(0)
        for ours, theirs in zip(other, expected, strict=True):
            assert all(a.is_cuda and torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True))


# --matmul


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_precision_is_set_for_the_run_written_down_and_put_back(run, tmp_path, precision):
    (tmp_path / "seen.py").write_text(
        "import torch\nfrom loopctl import hookimpl\n\nclass Seen:\n    @hookimpl\n    def before_step(self):\n"
        f"        assert torch.get_float32_matmul_precision() == {precision!r}\n")
    before = "medium" if precision == "highest" else "highest"
    torch.set_float32_matmul_precision(before)
    try:
        run("--max-steps", 1, "--matmul", precision, "--plugin", "seen.py:Seen", "--out", "a")
        assert torch.get_float32_matmul_precision() == before
        assert f'matmul = "{precision}"\n' in (tmp_path / "a" / "run.toml").read_text()
        run("--config", "a/run.toml", "--out", "b")
        (tmp_path / "seen.py").write_text("import torch\nfrom loopctl import hookimpl\n\nclass Seen:\n    @hookimpl\n"
                                          "    def before_step(self):\n        raise RuntimeError('no')\n")
        run("--max-steps", 1, "--matmul", precision, "--plugin", "seen.py:Seen", "--out", "c", status=1)
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
