"""Models by name, by import path, and fitted to the data."""
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
    """Data of random images, as small as they come."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(samples, channels, size, size, generator=generator)
    part = TensorDataset(pictures, torch.arange(samples) % classes)
    return Data(part, part, classes, (channels, size, size))


def outputs(model, found):
    model.eval()
    with torch.no_grad():
        return model(torch.zeros(2, *found.shape)).shape


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module that tests can name by import path; it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        (tmp_path / "written_for_models.py").write_text("from torch import nn\n\n" + text)
        return "written_for_models"
    yield write
    sys.modules.pop("written_for_models", None)


@pytest.mark.parametrize("name", models.SMALL)
@pytest.mark.parametrize(("channels", "size", "classes"), [(1, 8, 10), (1, 28, 7), (3, 32, 100)])
def test_each_small_model_trains_a_step_and_gives_one_score_per_class(name, channels, size, classes):
    found = images(channels, size, classes)
    torch.manual_seed(0)
    model = models.make(name, found)
    before = [parameter.clone() for parameter in model.parameters()]
    train, valid = found.loaders(4, 0, torch.device("cpu"))
    run = fit(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), train, valid, max_steps=1)
    assert run.step == 1
    assert outputs(model, found) == (2, classes)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_the_model_is_left_in_training_mode_and_untouched_by_being_tried_out():
    found = images(1, 8, 10)
    model = models.make("cnn", found)
    assert all(part.training for part in model.modules())
    batch_norm = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
    assert torch.equal(batch_norm.running_mean, torch.zeros_like(batch_norm.running_mean))


def test_options_after_a_colon_shape_the_model():
    found = images(1, 8, 10)
    assert models.make("cnn:width=4", found)[0].out_channels == 4
    mlp = models.make("mlp:width=5,dropout=0.25", found)
    assert [part.out_features for part in mlp if isinstance(part, nn.Linear)] == [5, 5, 10]
    assert [part.p for part in mlp if isinstance(part, nn.Dropout)] == [0.25, 0.25]
    vit = models.make("vit:patch_size=4,width=8,depth=2,heads=2", found)
    assert (vit.patch_size, vit.hidden_dim, len(vit.encoder.layers)) == (4, 8, 2)


@pytest.mark.parametrize(("size", "patch"), [(8, 2), (28, 4), (32, 4)])
def test_the_patches_of_vit_suit_the_images_unless_they_are_said(size, patch):
    assert models.make("vit:width=8,depth=1,heads=2", images(1, size, 2)).patch_size == patch


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_a_torchvision_model_is_fitted_to_the_classes(name):
    found = data.make("digits:channels=3", "nowhere", download=False)
    model = models.make(name, found)
    assert isinstance(model, type(torchvision.models.get_model(name)))
    assert outputs(model, found) == (2, 10)


def test_options_of_a_torchvision_model_are_its_own():
    model = models.make("resnet18:zero_init_residual=true", images(3, 32, 7))
    assert model.fc.out_features == 7
    assert not model.layer1[0].bn2.weight.any()          # what zero_init_residual does


def test_googlenet_gives_one_tensor_in_training_too():
    found = images(3, 32, 5)
    model = models.make("googlenet", found)
    assert model.training
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


WITH_ALL = """
def net(num_classes, in_channels, image_size, hidden=3):
    made = nn.Sequential(nn.Flatten(), nn.Linear(in_channels * image_size**2, hidden), nn.Linear(hidden, num_classes))
    made.given = num_classes, in_channels, image_size, hidden
    return made
"""


def test_a_factory_by_import_path_is_given_what_it_names_of_the_data(module):
    model = models.make(f"{module(WITH_ALL)}:net", images(2, 6, 4))
    assert model.given == (4, 2, 6, 3)


def test_what_the_user_says_wins_over_the_data(module):
    model = models.make(f"{module(WITH_ALL)}:net:hidden=7,num_classes=4", images(2, 6, 4))
    assert model.given == (4, 2, 6, 7)
    with pytest.raises(UsageError, match=r"shape \(1, 5\) for one image, and the data has 4 classes"):
        models.make(f"{module(WITH_ALL)}:net:num_classes=5", images(2, 6, 4))


def test_a_factory_that_names_nothing_of_the_data_is_given_nothing(module):
    name = module("def net(*args, **more):\n    assert not args and not more\n"
                  "    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))\n")
    assert outputs(models.make(f"{name}:net", images(1, 4, 3)), images(1, 4, 3)) == (2, 3)


def test_a_class_in_a_module_or_a_file(module, tmp_path):
    text = "class Net(nn.Linear):\n    def __init__(self, num_classes):\n        super().__init__(4, num_classes)\n" \
           "    def forward(self, x):\n        return super().forward(x.flatten(1))\n"
    name = module(text)
    found = images(1, 2, 3)
    assert type(models.make(f"{name}:Net", found)).__name__ == "Net"
    assert models.make(f"{tmp_path / name}.py:Net", found).out_features == 3


@pytest.mark.parametrize(("body", "words"), [
    ("return 3", "model .*:net made a int, not a torch.nn.Module"),
    ("return nn.Linear(4, 3)", "cannot take images of 1x2x2: .*the data may have an option for it"),
    ("return nn.Flatten()", r"shape \(1, 4\) for one image, and the data has 3 classes; it must be \(1, 3\)"),
    ("return Two()", "gives a tuple in place of a tensor of scores"),
    ("raise ValueError('no\\nway')", "model .*:net: no way"),
])
def test_what_does_not_fit_is_refused_in_one_line(module, body, words):
    name = module(f"class Two(nn.Module):\n    def forward(self, x):\n        return x, x\n\ndef net():\n    {body}\n")
    with pytest.raises(UsageError, match=words) as caught:
        models.make(f"{name}:net", images(1, 2, 3))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("spec", "words"), [
    ("cnn:width=0", "model cnn: width is at least 1, not 0"),
    ("cnn:width=1.5", "model cnn: width takes a whole number, not '1.5'"),
    ("mlp:dropout=much", "model mlp: dropout takes a number, not 'much'"),
    ("mlp:width=-1", "model mlp: width is at least 1, not -1"),
    ("vit:patch_size=3", "model vit: patch_size=3 does not divide the images' side of 8 pixels"),
    ("vit:patch_size=0", "model vit: patch_size is at least 1, not 0"),
    ("resnet81", "did you mean 'resnet18'"),
    ("qqq", "there are cnn, linear, mlp, vit, .* more, or package.module:name"),
])
def test_a_wrong_name_or_option_is_refused_with_the_way_out(spec, words):
    with pytest.raises(UsageError, match=words):
        models.make(spec, images(1, 8, 10))


def test_the_names_for_completion_are_torchvisions_registry_found_without_importing_torch():
    code = "import sys; from loopctl.cli import model_names; print(*model_names()); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found == sorted([*models.SMALL, *torchvision.models.list_models(module=torchvision.models)])
