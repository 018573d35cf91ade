"""What a run's folder holds for later use, and `loopctl.load_run`, which reads it without the data."""
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import load_file
from torchvision.datasets import MNIST, FashionMNIST

import loopctl
from loopctl import Data, UsageError, load_run
from loopctl.checkpoint.atomic_files import read_checkpoint
from loopctl.cli import data, main, models, saved_run

QUICK = ["--model", "linear", "--batch-size", "64", "--without", "progress"]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Call `loopctl run` in a new folder, with output to `a` and options that make it quick."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, epochs=2, out="a"):
        result = CliRunner().invoke(main, ["run", *QUICK, "--epochs", str(epochs), "--out", out, *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return Path(out)
    return call


def write_images(root, size=24):
    """Two classes of two training and two validation images each, of random pixels."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(2):
                Image.fromarray(random.integers(0, 256, (size, size + 6, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def equal(model, tensors):
    own = model.state_dict()
    return own.keys() == tensors.keys() and all(torch.equal(own[name], tensors[name]) for name in own)


def described(dataset):
    return json.loads(saved_run.describe_data(dataset))


def test_the_folder_of_a_run_has_the_classes_the_shape_and_the_preprocessing(train, tmp_path):
    write_images(tmp_path / "data")
    folder = train("--data", "imagefolder:size=14", epochs=1)
    assert json.loads((folder / "data.json").read_text()) == {
        "classes": ["cat", "dog"], "shape": [3, 14, 14],
        "images": {"mode": "RGB", "resize": 16, "crop": 14, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "data.json", "explain.txt", "metrics.csv", "run.toml", "weights.safetensors"]


def test_the_transforms_of_a_folder_of_images_are_those_of_validation(train, tmp_path):
    write_images(tmp_path / "data")
    dataset = data.make("imagefolder:size=14", "data", False)
    folder = train("--data", "imagefolder:size=14", epochs=1)
    transforms = load_run(folder).transforms
    for (path, _), (pixels, _) in zip(dataset.valid.samples, dataset.valid, strict=True):
        expected = dataset.batch_transform([pixels])[0]
        assert torch.equal(transforms(path), expected)
        assert torch.equal(transforms(Path(path)), expected)
        assert torch.equal(transforms(Image.open(path)), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_file_of_a_grey_data_set_becomes_the_same_input(grey, channels, tmp_path):
    name, _, _, images = grey
    dataset = data.make(f"{name}:channels={channels}", str(tmp_path), False)
    transforms = saved_run.ImageTransforms(read_back(dataset, tmp_path).preprocessing)
    Image.fromarray(images["t10k"][0]).save(tmp_path / "one.png")
    assert torch.equal(transforms(tmp_path / "one.png"), dataset.valid[0][0])
    assert described(dataset)["classes"] == {"mnist": MNIST, "fashionmnist": FashionMNIST}[name].classes


def test_an_image_file_of_a_colour_data_set_becomes_the_same_input(cifar, tmp_path):
    name, classes, images = cifar
    dataset = data.make(name, str(tmp_path), False)
    transforms = saved_run.ImageTransforms(read_back(dataset, tmp_path).preprocessing)
    Image.fromarray(images[10]).save(tmp_path / "one.png")
    assert torch.equal(transforms(tmp_path / "one.png"), dataset.valid[0][0])
    assert described(dataset)["classes"] == [f"class {number}" for number in range(classes)]


def test_the_classes_of_imagenet_are_its_words(imagenet, tmp_path):
    dataset = data.make("imagenet:size=16", str(tmp_path), False)
    assert dataset.classes == 1000
    assert dataset.class_names == ("tench, Tinca tinca", "goldfish")
    assert described(dataset)["images"]["resize"] == 18


def read_back(dataset, folder):
    (folder / "data.json").write_text(saved_run.describe_data(dataset))
    return saved_run.read_data(folder / "data.json")


@pytest.mark.parametrize(("spec", "classes", "images"), [
    ("digits", 10, True), ("digits:channels=3", 10, True), ("digits:channels=2", 10, False), ("fake:classes=3,channels=1", 3, True)])
def test_data_without_names_has_a_number_of_classes(spec, classes, images, tmp_path):
    dataset = data.make(spec, "", False)
    content = described(dataset)
    assert content["classes"] == classes
    assert bool(content["images"]) == images
    if images:
        assert saved_run.ImageTransforms(read_back(dataset, tmp_path).preprocessing)(Image.new("RGB", (9, 7))).shape == dataset.shape


def test_data_without_classes_can_be_described(tmp_path):
    dataset = Data([], [], None, (4,))
    assert described(dataset) == {"classes": None, "shape": [4], "images": None}
    assert read_back(dataset, tmp_path).classes is None


OWN = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from loopctl import Data

def part(count):
    generator = torch.Generator().manual_seed(count)
    dataset = TensorDataset(torch.randn(count, 1, 4, 4, generator=generator), torch.arange(count) % 3)
    dataset.classes = ["a", "b", "c"]
    return dataset

def pair():
    return part(30), part(12)

def named():
    return Data(part(30), part(12), 3, (1, 4, 4), class_names=("x", "y", "z"))

def wrong():
    return Data(part(30), part(12), 3, (1, 4, 4), class_names=("x", "y"))

class Tied(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, num_classes)
        self.second.weight = self.first.weight
    def forward(self, inputs):
        return self.head(self.second(self.first(inputs.flatten(1)).relu()))
"""


def test_the_users_own_model_and_data_are_loaded_without_the_data(train, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    (tmp_path / "samples.py").write_text(OWN)
    folder = train("--model", "mine.py:Tied", "--data", "samples.py:pair")
    (tmp_path / "samples.py").unlink()
    run = load_run(folder, "last")
    assert run.classes == ("a", "b", "c")
    assert run.shape == (1, 4, 4)
    assert run.transforms is None
    assert run.config["model"] == "mine.py:Tied"
    assert not any(module.training for module in run.model.modules())
    assert run.model.second.weight is run.model.first.weight
    weights = load_file(folder / "weights.safetensors")
    weights["second.weight"] = weights["first.weight"] = weights.get("first.weight", weights.get("second.weight"))
    assert equal(run.model, weights)
    assert run.weights == folder / "weights.safetensors"


def test_a_data_can_name_its_classes(train, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    assert load_run(train("--data", "mine.py:named", epochs=1)).classes == ("x", "y", "z")
    result = CliRunner().invoke(main, ["explain", "--data", "mine.py:wrong"])
    assert result.exit_code == 2
    assert "data mine.py:wrong has 3 classes and 2 class_names; give as many names as classes, or none" in result.stderr


def test_best_last_and_a_file_are_the_weights_of_that_name(train):
    folder = train("--plugin", "ema:decay=0.5", "--plugin", "early_stopping:patience=1,min_delta=9", epochs=4)
    for weights, file in (("best", "checkpoints/best.safetensors"), (None, "checkpoints/best.safetensors"), ("last", "weights.safetensors"),
                          (folder / "weights.safetensors", "weights.safetensors")):
        run = load_run(folder, weights)
        assert run.weights == folder / file
        assert equal(run.model, load_file(folder / file))
    shutil.rmtree(folder / "checkpoints")
    assert load_run(folder).weights == folder / "weights.safetensors"
    with pytest.raises(UsageError, match=r"there is no a/checkpoints/best.safetensors; use last"):
        load_run(folder, "best")


def test_the_last_weights_of_a_run_that_has_not_ended_are_those_of_its_latest_checkpoint(train):
    folder = train("--plugin", "checkpoint:dir=saved")
    (folder / "weights.safetensors").unlink()
    run = load_run(folder, "last")
    assert run.weights == folder / "saved" / "step-00000046.pt"
    assert equal(run.model, read_checkpoint(run.weights)["model"])
    assert equal(load_run(folder, folder / "saved" / "step-00000023.pt").model, read_checkpoint(folder / "saved" / "step-00000023.pt")["model"])
    assert load_run(folder).weights == folder / "saved" / "best.safetensors"


def test_the_model_of_a_sharded_checkpoint_is_loaded_whole_and_without_processes(train):
    folder = train("--plugin", "fsdp", "--device", "cpu")
    final = load_file(folder / "weights.safetensors")
    (folder / "weights.safetensors").unlink()
    loopctl.distributed.process_group.leave_process_group()
    run = load_run(folder, "last")
    assert run.weights.suffix == ".pt"
    assert list(run.weights.parent.glob(f"{run.weights.stem}-*.sharded"))
    assert equal(run.model, final)


def test_loading_leaves_the_random_numbers_of_the_caller_alone(train):
    folder = train(epochs=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    load_run(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("name", "set_by_weights"), [
    ("resnet18", {}), ("vit_h_14", {"image_size": 518}), ("googlenet", {"transform_input": True, "aux_logits": False, "init_weights": True}), ("maxvit_t", {"input_size": (224, 224)})])
def test_pretrained_weights_are_not_fetched_again(name, set_by_weights):
    assert models.without_weights(name, {"weights": "DEFAULT", "progress": False}) == {"progress": False, **set_by_weights}
    assert models.without_weights(name, {"progress": False}) == {"progress": False}


def test_a_model_is_built_without_its_pretrained_weights(monkeypatch):
    from torchvision.models import resnet

    monkeypatch.setattr(resnet.ResNet18_Weights, "get_state_dict", lambda *_, **__: pytest.fail("downloads"))
    dataset = Data([], [], 1000, (3, 32, 32))
    assert models.make("resnet18:weights=DEFAULT", dataset, pretrained=False).fc.out_features == 1000


def damage(name, content):
    return lambda folder: (folder / name).write_text(content)


CASES = {
    "no folder": (shutil.rmtree, "there is no folder a; name the folder of a run"),
    "a run from Python": (lambda folder: (folder / "run.toml").unlink(), "a has no run.toml, so how to build its model is unknown"),
    "an older run": (lambda folder: (folder / "data.json").unlink(), "a has no data.json, so how to build its model is unknown"),
    "no model": (damage("run.toml", "epochs = 3"), "a has no model in its run.toml"),
    "not JSON": (damage("data.json", "{"), "a/data.json cannot be read: JSONDecodeError"),
    "other JSON": (damage("data.json", "[]"), "a/data.json cannot be read: TypeError"),
    "no shape": (damage("data.json", '{"classes": 3, "images": null}'), "a/data.json cannot be read: KeyError: 'shape'"),
    "a model that is not there": (damage("run.toml", 'model = "gone/mine.py:Net"'), "a: its model is made by gone/mine.py, which is not there; go to the folder where the run was started"),
    "another model": (damage("run.toml", 'model = "mlp"'), "best.safetensors does not fit the model"),
    "no weights": (lambda folder: [shutil.rmtree(folder / "checkpoints"), (folder / "weights.safetensors").unlink()], "a has no weights yet"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that tests copy."""
    folder = tmp_path_factory.mktemp("trained") / "a"
    result = CliRunner().invoke(main, ["run", *QUICK, "--epochs", "1", "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def copied(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained, "a"))


@pytest.mark.parametrize("case", CASES)
def test_a_run_that_cannot_be_loaded_is_refused_in_one_line(case, copied):
    spoil, message = CASES[case]
    spoil(copied)
    with pytest.raises(UsageError) as raised:
        load_run("a")
    assert str(raised.value).startswith(message) or message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_wrong_weights_are_refused(copied):
    with pytest.raises(UsageError, match=r"weights=first: there is no such file; use best, last or the path of a file"):
        load_run("a", "first")
    (file,) = Path("a/checkpoints").glob("step-*.pt")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"step-00000023.pt is .*; name another file for the weights"):
        load_run("a", file)
    with pytest.raises(UsageError, match=r"run.toml cannot be read as weights"):
        load_run("a", "a/run.toml")
    other = CliRunner().invoke(main, ["run", *QUICK, "--epochs", "1", "--out", "b", "--model", "mlp"])
    assert other.exit_code == 0
    with pytest.raises(UsageError, match=r"step-00000023.pt does not fit the model"):
        load_run("a", "b/checkpoints/step-00000023.pt")


def test_a_run_is_loaded_from_any_folder(copied, monkeypatch, tmp_path):
    load = partial(load_run, tmp_path / "a")
    inputs = torch.randn(2, 1, 8, 8)
    before = load().model(inputs)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(load().model(inputs), before)
