"""Weights to begin with: --init, torchvision's models with weights, and their new last layer."""
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import torchvision
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import get_model, get_model_builder, get_model_weights, list_models

from loopctl import UsageError
from loopctl.cli import main, models
from loopctl.cli.pretrained import replace_head
from loopctl.data.dataset import Data


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call `loopctl` in a new folder. Return the result of click's CliRunner."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, status=0):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == status, result.output
        return result
    return call


LINEAR = ("run", "--model", "linear", "--epochs", 1)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_begins_with_the_weights_of_another_and_says_and_records_which(run, tmp_path):
    run(*LINEAR, "--out", "a")
    result = run(*LINEAR, "--lr", 0.0, "--init", "a", "--out", "b")
    assert "\nweights to begin with: a/checkpoints/best.safetensors\n" in result.stdout
    assert equal(*(load_file(tmp_path / name / "weights.safetensors") for name in "ab"))
    assert tomllib.loads((tmp_path / "b" / "run.toml").read_text())["init"] == "a/checkpoints/best.safetensors"
    run("run", "--config", "b/run.toml", "--out", "c")
    assert equal(*(load_file(tmp_path / name / "weights.safetensors") for name in "ac"))


def test_a_run_resumes_without_the_file_that_it_began_with(run, tmp_path):
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).state_dict(), tmp_path / "w.pt")
    run(*LINEAR, "--epochs", 2, "--init", "w.pt", "--out", "whole")
    run(*LINEAR, "--epochs", 1, "--init", "w.pt", "--out", "a")
    (tmp_path / "w.pt").unlink()
    result = run("run", "--resume", "a", "--epochs", 2)
    assert "weights to begin with" not in result.stdout
    assert equal(*(load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "a")))
    shutil.rmtree(tmp_path / "a" / "checkpoints")
    (tmp_path / "a" / "weights.safetensors").unlink()
    result = run("run", "--resume", "a", status=2)         # it would train from the beginning
    assert result.stderr == "error: --init: there is no file w.pt\n"


def test_explain_lr_and_summary_take_init_and_check_that_it_fits(run, tmp_path):
    run(*LINEAR, "--out", "a")
    for command in ("explain", "lr", "summary"):
        run(command, "--model", "linear", "--init", "a")
        result = run(command, "--model", "mlp", "--init", "a", status=2)
        assert result.stderr.startswith("error: --init: a/checkpoints/best.safetensors does not fit the model: it has no 4.weight, 4.bias")
        assert result.stderr.count("\n") == 1


def test_strict_false_loads_what_fits_and_names_the_rest(run, tmp_path):
    run(*LINEAR, "--model", "mlp", "--out", "a")
    arguments = ("run", "--model", "mlp", "--data", "fake:image=8,channels=1,classes=4,size=64", "--epochs", 1, "--lr", 0.0)
    result = run(*arguments, "--init", "a", status=2)
    assert "7.weight is 10x128 and 4x128 in the model" in result.stderr
    result = run(*arguments, "--init", "a:strict=false", "--out", "b")
    assert "weights to begin with: a/checkpoints/best.safetensors:strict=false\n" in result.stdout
    begun, now = load_file(tmp_path / "a" / "checkpoints" / "best.safetensors"), load_file(tmp_path / "b" / "weights.safetensors")
    assert {name for name in now if not torch.equal(begun[name], now[name])} <= {"7.weight", "7.bias"}


@pytest.mark.parametrize(("init", "words"), [
    ("nowhere.pt", "--init: there is no file nowhere.pt"),
    ("", "--init: '' is not a path; leave it out, or pass a file"),
    ("nowhere.pt:strict=false", "--init: there is no file nowhere.pt"),
    ("w.pt:strict=maybe", "--init: strict takes true|false, not 'maybe'"),
    ("w.pt:lenient=true", "--init: no option 'lenient'; it has: strict"),
    (".", "--init: . has no weights: neither best.safetensors, weights.safetensors nor a checkpoint"),
    ("w.pt", "--init: w.pt cannot be read as weights: it is damaged"),
])
def test_a_wrong_init_is_refused_in_one_line_before_a_folder_is_made(run, tmp_path, init, words):
    (tmp_path / "w.pt").write_text("no weights")
    result = run(*LINEAR, "--init", init, status=2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


# torchvision's models


def test_weights_that_cannot_be_downloaded_are_refused_with_the_way_out(monkeypatch):
    def offline(self, **arguments):
        raise OSError("no network")
    monkeypatch.setattr(get_model_weights("resnet18"), "get_state_dict", offline)
    with pytest.raises(UsageError, match="resnet18: its weights cannot be downloaded .no network.; pass a file, as in resnet18:weights=FILE"):
        models.make("resnet18:weights=DEFAULT", images(4))


FAMILIES = {}                       # a model of each file in torchvision/models
for name in list_models(module=torchvision.models):
    FAMILIES.setdefault(get_model_builder(name).__module__, "regnet_y_400mf" if "regnet" in name else name)


@pytest.mark.parametrize("name", FAMILIES.values())
def test_every_family_of_torchvision_gets_a_new_head_that_has_the_classes_of_the_data(name):
    device = "cpu" if "regnet" in name else "meta"          # regnet computes with tensors when it is built
    with torch.device(device), torch.no_grad():
        model = get_model(name, weights=None, **models.SINGLE_OUTPUT.get(name, {})).eval()
        before = dict(model.named_parameters())
        replace_head(name, model, 4)
        assert model(torch.zeros(1, 3, 299 if "inception" in name else 224, 299 if "inception" in name else 224)).shape == (1, 4)
    changed = {key for key, parameter in model.named_parameters() if before.get(key) is not parameter}
    assert len({key.rpartition(".")[0] for key in changed}) == 1
    assert changed == {key for key in before if key.rpartition(".")[0] == next(iter(changed)).rpartition(".")[0]}


def test_a_model_without_such_a_layer_is_refused():
    with pytest.raises(UsageError, match="model x: it has no linear layer or convolution to replace"):
        replace_head("model x", nn.Sequential(nn.BatchNorm2d(3)), 4)


def images(classes, size=32):
    return Data([], [], classes, (3, size, size))


@pytest.fixture
def downloaded(monkeypatch):
    """Make torchvision's weights of a model random ones, which are returned, in place of a download."""
    def replace(name, **options):
        torch.manual_seed(1)
        state = get_model(name, weights=None, init_weights=False, aux_logits=True).state_dict() if options.get("aux") else \
            get_model(name, weights=None).state_dict()
        monkeypatch.setattr(get_model_weights(name), "get_state_dict", lambda self, **arguments: state)
        return state
    return replace


@pytest.mark.parametrize("spec", ["mobilenet_v3_small:weights=DEFAULT", "squeezenet1_1:weights=IMAGENET1K_V1"])
def test_named_weights_are_loaded_and_the_head_is_new(downloaded, spec):
    state = downloaded(spec.partition(":")[0])
    model = models.make(spec, images(4))
    head = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name]) or tensor.shape != state[name].shape}
    assert head == {f"{list(dict(model.named_parameters()))[-1].rpartition('.')[0]}.{part}" for part in ("weight", "bias")}
    assert model.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 4)
    assert model.train().training
    same = models.make(spec, images(1000))
    assert equal(same.state_dict(), state)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 32), ("inception_v3", 75)])
def test_named_weights_of_models_with_auxiliary_heads(downloaded, name, size):
    downloaded(name, aux=True)
    model = models.make(f"{name}:weights=DEFAULT", images(4, size))
    assert model.transform_input
    assert model.train()(torch.zeros(2, 3, size, size)).shape == (2, 4)


@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_in_a_file_are_loaded_and_a_head_of_other_classes_is_new(tmp_path, wrapped):
    torch.manual_seed(1)
    state = get_model("mobilenet_v3_small", weights=None).state_dict()
    content = {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}} if wrapped else state
    torch.save(content, tmp_path / "w.pth")
    spec = f"mobilenet_v3_small:weights={tmp_path}/w.pth"
    model = models.make(spec, images(4))
    differ = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])}
    assert differ == {"classifier.3.weight", "classifier.3.bias"}
    assert equal(models.make(spec, images(1000)).state_dict(), state)
    assert not equal(models.make(spec, images(1000), pretrained=False).state_dict(), state)


def test_a_files_auxiliary_heads_are_left_out(tmp_path):
    torch.save(get_model("googlenet", weights=None, init_weights=False, aux_logits=True).state_dict(), tmp_path / "w.pth")
    assert models.make(f"googlenet:weights={tmp_path}/w.pth", images(4)).fc.out_features == 4


@pytest.mark.parametrize(("content", "words"), [
    (None, "resnet18: weights takes none, IMAGENET1K_V1, DEFAULT or a file; there is no file {file}"),
    ({"a": torch.ones(1)}, "resnet18: {file} does not fit the model: .*; it is of another model"),
    ({"conv1.weight": torch.ones(64, 3, 7, 7)}, "resnet18: {file} does not fit the model: it has no bn1.weight, .*; --init FILE:strict=false"),
    ([1], "resnet18: {file} has no weights: it holds a list"),
])
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, content, words):
    file = tmp_path / "w.safetensors" if isinstance(content, dict) else tmp_path / "w.pth"
    if isinstance(content, dict):
        save_file(content, file)
    elif content:
        torch.save(content, file)
    with pytest.raises(UsageError, match=words.format(file=file)) as refused:
        models.make(f"resnet18:weights={file}", images(4))
    assert "\n" not in str(refused.value)


def test_a_run_from_a_file_resumes_without_it(run, tmp_path):
    torch.save(get_model("mobilenet_v3_small", weights=None).state_dict(), tmp_path / "w.pth")
    arguments = ("run", "--model", "mobilenet_v3_small:weights=w.pth", "--data", "fake:classes=4,size=16", "--batch-size", 8)
    run(*arguments, "--epochs", 1, "--out", "a")
    Path("w.pth").rename("moved.pth")
    run("run", "--resume", "a", "--epochs", 2)
