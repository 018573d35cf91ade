"""Models by name and by import path, built for the classes and the image shape of the data."""
import subprocess
import sys
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import TensorDataset

from loopctl import Data, fit
from loopctl.cli import data, models
from loopctl.errors import UsageError


def images(channels, size, classes, samples=8):
    """Data of a few random images."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(samples, channels, size, size, generator=generator)
    part = TensorDataset(pixels, torch.arange(samples) % classes)
    return Data(part, part, classes, (channels, size, size))


def output_shape(model, dataset):
    """The shape of the model's output for two images."""
    model.eval()
    with torch.no_grad():
        return model(torch.zeros(2, *dataset.shape)).shape


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that tests can name by import path. It is removed from sys.modules afterwards."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        (tmp_path / "written_for_models.py").write_text("from torch import nn\n\n" + text)
        return "written_for_models"
    yield write
    sys.modules.pop("written_for_models", None)


@pytest.mark.parametrize("name", models.SMALL)
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (1, 28, 7), (3, 32, 100)])
def test_each_small_model_trains_a_step_and_returns_one_logit_per_class(name, channels, size, classes):
    dataset = images(channels, size, classes)
    torch.manual_seed(0)
    model = models.make(name, dataset)
    before = [parameter.clone() for parameter in model.parameters()]
    train, valid = dataset.loaders(4, 0, torch.device("cpu"))
    run = fit(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), train, valid, max_steps=1)
    assert run.step == 1
    assert output_shape(model, dataset) == (2, classes)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_checking_the_output_leaves_the_model_in_training_mode_and_unchanged():
    dataset = images(1, 8, 10)
    model = models.make("cnn", dataset)
    assert all(part.training for part in model.modules())
    batch_norm = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
    assert torch.equal(batch_norm.running_mean, torch.zeros_like(batch_norm.running_mean))


def test_options_after_a_colon_change_the_layers():
    dataset = images(1, 8, 10)
    assert models.make("cnn:width=4", dataset)[0].out_channels == 4
    mlp = models.make("mlp:width=5,dropout=0.25", dataset)
    assert [part.out_features for part in mlp if isinstance(part, nn.Linear)] == [5, 5, 10]
    assert [part.p for part in mlp if isinstance(part, nn.Dropout)] == [0.25, 0.25]
    vit = models.make("vit:patch_size=4,width=8,depth=2,heads=2", dataset)
    assert (vit.patch_size, vit.hidden_dim, len(vit.encoder.layers)) == (4, 8, 2)


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (28, 4), (32, 4)])
def test_the_default_patch_size_of_vit_depends_on_the_image_size(size, patch):
    assert models.make("vit:width=8,depth=1,heads=2", images(1, size, 2)).patch_size == patch


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_torchvision_model_has_one_output_per_class(name):
    dataset = data.make("digits:channels=3", "nowhere", download=False)
    model = models.make(name, dataset)
    assert isinstance(model, type(torchvision.models.get_model(name)))
    assert output_shape(model, dataset) == (2, 10)


def test_a_torchvision_model_takes_the_options_of_torchvision():
    model = models.make("resnet18:zero_init_residual=true", images(3, 32, 7))
    assert model.fc.out_features == 7
    assert not model.layer1[0].bn2.weight.any()          # zero_init_residual sets it to 0


def test_googlenet_returns_one_tensor_in_training_too():
    dataset = images(3, 32, 5)
    model = models.make("googlenet", dataset)
    assert model.training
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


THREE_ARGUMENTS = """
def net(num_classes, in_channels, image_size, hidden=3):
    model = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, hidden), nn.Linear(hidden, num_classes))
    model.arguments = num_classes, in_channels, image_size, hidden
    return model
"""


def test_a_factory_is_passed_the_properties_of_the_data_that_are_its_arguments(module):
    model = models.make(f"{module(THREE_ARGUMENTS)}:net", images(2, 6, 4))
    assert model.arguments == (4, 2, 6, 3)


def test_the_users_options_override_the_properties_of_the_data(module):
    model = models.make(f"{module(THREE_ARGUMENTS)}:net:hidden=7,num_classes=4", images(2, 6, 4))
    assert model.arguments == (4, 2, 6, 7)
    with pytest.raises(UsageError, match=r"shape \(1, 5\) for one sample, but the data has 4 classes"):
        models.make(f"{module(THREE_ARGUMENTS)}:net:num_classes=5", images(2, 6, 4))


def test_a_factory_without_such_arguments_is_passed_nothing(module):
    name = module("def net(*args, **more):\n    assert not args and not more\n"
                  "    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))\n")
    assert output_shape(models.make(f"{name}:net", images(1, 4, 3)), images(1, 4, 3)) == (2, 3)


def test_a_model_is_a_class_in_a_module_or_in_a_file(module, tmp_path):
    text = "class Net(nn.Linear):\n    def __init__(self, num_classes):\n        super().__init__(4, num_classes)\n" \
           "    def forward(self, x):\n        return super().forward(x.flatten(1))\n"
    name = module(text)
    dataset = images(1, 2, 3)
    assert type(models.make(f"{name}:Net", dataset)).__name__ == "Net"
    assert models.make(f"{tmp_path / name}.py:Net", dataset).out_features == 3


@pytest.mark.parametrize(("body", "words"), [
    ("return 3", "model .*:net returned a int, not a torch.nn.Module"),
    ("return nn.Linear(4, 3)", "cannot take inputs of 1x2x2: .*the data may have an option for it"),
    ("return nn.Flatten()", r"shape \(1, 4\) for one sample, but the data has 3 classes; .* so that it is \(1, 3\)"),
    ("return Two()", "returned a tuple, not a tensor; return one logit per class"),
    ("raise ValueError('no\\nway')", "model .*:net: no way"),
])
def test_a_model_that_does_not_fit_the_data_is_refused_in_one_line(module, body, words):
    name = module(f"class Two(nn.Module):\n    def forward(self, x):\n        return x, x\n\ndef net():\n    {body}\n")
    with pytest.raises(UsageError, match=words) as caught:
        models.make(f"{name}:net", images(1, 2, 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spec", "words"), [
    ("cnn:width=0", "model cnn: width is at least 1, not 0"),
    ("cnn:width=1.5", "model cnn: width takes a whole number, not '1.5'"),
    ("mlp:dropout=much", "model mlp: dropout takes a number, not 'much'"),
    ("mlp:width=-1", "model mlp: width is at least 1, not -1"),
    ("vit:patch_size=3", "model vit: patch_size=3 does not divide the image size of 8 pixels"),
    ("vit:patch_size=0", "model vit: patch_size is at least 1, not 0"),
    ("resnet81", "did you mean 'resnet18'"),
    ("qqq", "there are cnn, linear, mlp, vit, .* more, or package.module:name"),
])
def test_the_error_for_a_wrong_name_or_option_suggests_another(spec, words):
    with pytest.raises(UsageError, match=words):
        models.make(spec, images(1, 8, 10))


def test_shell_completion_has_all_models_without_importing_torch():
    code = "import sys; from loopctl.cli import model_names; print(*model_names()); assert 'torch' not in sys.modules"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert names == sorted([*models.SMALL, *torchvision.models.list_models(module=torchvision.models)])
