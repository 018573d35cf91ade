"""`--data NAME:on_device=true`, compared with the ordinary DataLoader, and `--matmul`.

On a CPU, the memory of the device is that of the host; the code is the same as for a GPU.
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


def assert_same_batches(loader, expected):
    for batch, expected_batch in zip(loader, expected, strict=True):
        assert type(batch) is type(expected_batch) is list
        for a, b in zip(batch, expected_batch, strict=True):
            assert torch.equal(a, b)
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())


def assert_same_as_ordinary(spec, root="nowhere"):
    """Training and validation batches of two epochs, and the random-number state, equal those of the ordinary loaders."""
    on_device_spec = f"{spec}{',' if ':' in spec else ':'}on_device=true"
    for loader, ordinary in zip(loaders(on_device_spec, root), loaders(spec, root), strict=True):
        for _ in range(2):
            torch.manual_seed(3)
            expected, after = list(ordinary), torch.get_rng_state()
            torch.manual_seed(3)
            assert_same_batches(loader, expected)
            assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("spec", ["digits", "digits:channels=3", "fake:size=260,image=2"])
def test_batches_equal_those_of_the_ordinary_loader(spec):
    assert_same_as_ordinary(spec)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_of_mnist_and_fashionmnist_are_equal(grey, tmp_path, channels):
    assert_same_as_ordinary(f"{grey[0]}:channels={channels}", tmp_path)


def test_batches_of_cifar_without_augmentation_are_equal(cifar, tmp_path):
    assert_same_as_ordinary(f"{cifar[0]}:augment=false", tmp_path)


def photos(folder):
    from PIL import Image
    for part in ("train", "val"):
        for number, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for index in range(3):
                image = np.random.default_rng([number, index]).integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(image).save(folder / part / name / f"{index}.png")


def test_imagefolder_is_accepted_only_without_augmentation(tmp_path):
    photos(tmp_path)
    assert_same_as_ordinary("imagefolder:size=20,augment=false", tmp_path)
    with pytest.raises(UsageError, match="data imagefolder: its samples come out differently at every reading, .* pass augment=false"):
        loaders("imagefolder:size=20,on_device=true", tmp_path)


def test_memory_is_not_pinned_and_a_sample_can_be_read_alone():
    train, _ = loaders("digits:on_device=true", device=CPU)
    assert not train.pin_memory
    expected = data.digits().train[7]
    assert all(torch.equal(a, b) for a, b in zip(train.dataset[7], expected, strict=True))


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
def test_a_run_with_on_device_ends_with_the_same_bits(run, tmp_path, spec):
    run("--data", spec, "--out", "usual")
    run("--data", f"{spec}{',' if ':' in spec else ':'}on_device=true", "--out", "held")
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("usual", "held"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "usual" / "metrics.csv").read_text() == (tmp_path / "held" / "metrics.csv").read_text()
    run("--config", "held/run.toml", "--out", "again")
    assert (tmp_path / "again" / "metrics.csv").read_text() == (tmp_path / "held" / "metrics.csv").read_text()


class Interrupt:
    @hookimpl
    def after_step(self, run: Run):
        if run.step == 3:
            raise RuntimeError("interrupted after step 3")


def test_a_run_with_augmentation_resumes_within_an_epoch(cifar, tmp_path, clone, same):
    def train(model, *plugins, **options):
        train, valid = loaders(f"{cifar[0]}:on_device=true", tmp_path, batch_size=2)
        return fit(model, nn.CrossEntropyLoss(), partial(torch.optim.Adam, lr=1e-3), train, valid, epochs=2, seed=0,
                   plugins=["checkpoint:every_steps=1", *plugins], **options)

    torch.manual_seed(0)
    whole = models.cnn(cifar[1], 3, width=4, dropout=0.1)
    interrupted, resumed = clone(whole), clone(whole)
    train(whole, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="interrupted after step 3"):
        train(interrupted, Interrupt(), out=tmp_path / "a")
    run = train(resumed, resume=tmp_path / "a", out=tmp_path / "a")
    assert run.step == 10
    same(resumed, whole)


# Augmentation


def test_each_augmented_image_is_a_random_crop_of_the_padded_image_perhaps_mirrored(cifar, tmp_path):
    """The crops of a batch differ. All offsets, and mirrored or not, are about equally frequent."""
    name, _, raw = cifar
    torch.manual_seed(0)
    train, valid = loaders(f"{name}:on_device=true", tmp_path, batch_size=10)
    plain = train.dataset.tensors[0]
    ordinary, _ = loaders(f"{name}:augment=false", tmp_path, batch_size=10)
    padded = np.pad(raw[:10], ((0, 0), (4, 4), (4, 4), (0, 0)))
    padded = torch.stack([ordinary.dataset.transform(image) for image in padded])           # the border is black, normalised
    chosen = []         # per batch: the crop of each image
    for _ in range(40):
        images = train.dataset.__getitems__(list(range(10)))[0]
        assert images.shape == plain.shape
        assert images.is_contiguous()
        crops = {(top, left, mirrored): crop.flip(3) if mirrored else crop
                 for top in range(9) for left in range(9) for mirrored in (False, True)
                 for crop in [padded[:, :, top:top + 32, left:left + 32]]}
        matches = [[key for key, crop in crops.items() if torch.equal(crop[number], images[number])] for number in range(10)]
        assert all(len(keys) == 1 for keys in matches)
        chosen.append([key for (key,) in matches])
    for crops_of_image in zip(*chosen, strict=True):
        assert len(set(crops_of_image)) > 20
    tops, lefts, mirrored = zip(*(crop for batch in chosen for crop in batch), strict=True)
    for offsets in (tops, lefts):
        assert all(20 < offsets.count(offset) < 75 for offset in range(9))  # 44 of 400 each, on average
    assert 150 < sum(mirrored) < 250
    assert sum(len({crop[2] for crop in batch}) == 2 for batch in chosen) > 30          # both kinds in one batch
    assert any(top != left for top, left in zip(tops, lefts, strict=True))
    assert_same_batches(valid, loaders(f"{name}:augment=false", tmp_path, batch_size=10)[1])


# Errors


class Noise(Dataset):
    classes = ["a", "b"]

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return torch.rand(1, 8, 8), index % 2


def test_a_users_data_set_with_random_images_is_refused():
    noisy = Data(Noise(), Noise(), 2, (1, 8, 8), name="mine:noise", on_device=True)
    with pytest.raises(UsageError, match=r"^data mine:noise: its samples come out differently at every reading"):
        noisy.loaders(2, 0, CPU)


def test_data_larger_than_the_free_memory_is_refused(monkeypatch):
    monkeypatch.setattr(on_device, "free_memory", lambda device: 5e9)
    with pytest.raises(UsageError, match=(r"^data fake: 120,000 samples of 3x64x64 take 5\.9 GB, and cpu has 5\.0 GB free; "
                                          "leave out on_device, or use smaller samples$")):
        loaders("fake:size=100000,image=64,on_device=true")
    size = 1797 * 64 * 4
    monkeypatch.setattr(on_device, "free_memory", lambda device: size - 1)
    with pytest.raises(UsageError, match="^data digits: 1,797 samples"):
        loaders("digits:on_device=true")
    monkeypatch.setattr(on_device, "free_memory", lambda device: size)
    loaders("digits:on_device=true")


def test_the_free_memory_of_the_host_is_known():
    assert 0 < on_device.free_memory(CPU) < 2**50


def test_a_users_data_set_can_be_kept_on_the_device(tmp_path):
    (tmp_path / "held_by_test.py").write_text(
        "import torch\nfrom torch.utils.data import TensorDataset\nfrom loopctl import Data\n\n"
        "class Mine(TensorDataset):\n    classes = ['a', 'b']\n    def __getitem__(self, index):\n"
        "        image, target = super().__getitem__(index)\n        return 2 * image, target\n\n"
        "def made(**settings):\n    part = Mine(torch.rand(6, 1, 8, 8), torch.arange(6) % 2)\n    return part, part\n")
    torch.manual_seed(0)
    dataset = data.make(f"{tmp_path}/held_by_test.py:made:on_device=true", "nowhere", download=False)
    _, valid = dataset.loaders(4, 0, CPU)
    ordinary = Data(dataset.train, dataset.valid, 2, (1, 8, 8)).loaders(4, 0, CPU)[1]
    assert_same_batches(valid, list(ordinary))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_are_on_cuda_and_equal_those_of_the_ordinary_loader():
    device = torch.device("cuda")
    ordinary, on_gpu = loaders("digits"), loaders("digits:on_device=true", device=device)
    assert on_device.free_memory(device) > 0
    for host_loader, gpu_loader in zip(ordinary, on_gpu, strict=True):
        torch.manual_seed(0)
        expected = list(host_loader)
        torch.manual_seed(0)
        for batch, expected_batch in zip(gpu_loader, expected, strict=True):
            assert all(a.is_cuda and torch.equal(a.cpu(), b) for a, b in zip(batch, expected_batch, strict=True))


# --matmul


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_matmul_precision_is_set_for_the_run_saved_and_restored(run, tmp_path, precision):
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
