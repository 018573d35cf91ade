"""`loopctl export`: what is written gives the outputs of the model, for batches of other sizes too, or is not kept."""
import re
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from loopctl import load_run, load_weights
from loopctl.cli import main, models

export = import_module("loopctl.cli.export")            # not the command of this name

OWN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, num_classes)
        self.second.weight = self.first.weight
    def forward(self, inputs):
        return self.head(self.second(self.first(inputs.flatten(1)).relu()))

class Random(Net):
    def forward(self, inputs):
        outputs = super().forward(inputs)
        return outputs + torch.randn_like(outputs)

class Sized(Net):
    def forward(self, inputs):
        return super().forward(inputs) * (2 if int(inputs.shape[0]) == 3 else 1)

class Branch(Net):
    def forward(self, inputs):
        return super().forward(inputs) if inputs.sum() > 0 else -super().forward(inputs)
"""


def run_loopctl(*arguments, status=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with runs of a small convolutional network, a, and of models in mine.py, by their names."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        Path("mine.py").write_text(OWN)
        for name, model in (("a", "cnn:width=4"), *((name, f"mine.py:{name}") for name in ("Net", "Random", "Sized", "Branch"))):
            run_loopctl("run", "--model", model, "--epochs", 2, "--lr", 0.01, "--out", name, "--without", "progress",
                        "--plugin", "checkpoint:monitor=val_accuracy,mode=min")      # so that best is not last
    return root


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of that folder, in which the test runs."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def batch(size):
    return torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def read_torch(file):
    model = models.cnn(10, 1, width=4)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def read_safetensors(file):
    model = models.cnn(10, 1, width=4)
    load_weights(model, file)
    return model.eval()


def read_exported(file):
    return torch.export.load(file).module()


def read_onnx(file):
    session = pytest.importorskip("onnxruntime").InferenceSession(file)
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    assert (given.name, given.shape, result.name, result.shape) == ("input", ["batch", 1, 8, 8], "output", ["batch", 10])
    return lambda inputs: torch.from_numpy(session.run(None, {"input": inputs.numpy()})[0])


needs_onnx = pytest.mark.skipif(not export.onnx_is_there(), reason="needs pip install 'loopctl[onnx]'")
FORMATS = [("torch", "model.pt", read_torch), ("torch", "net.pth", read_torch), ("torch", "net.safetensors", read_safetensors),
           ("exported", "model.pt2", read_exported), pytest.param("onnx", "model.onnx", read_onnx, marks=needs_onnx)]


@pytest.mark.parametrize(("kind", "name", "read"), FORMATS)
def test_what_is_exported_gives_the_outputs_of_the_model(here, kind, name, read):
    out = [] if name.startswith("model") else ["--out", f"a/{name}"]
    result = run_loopctl("export", "a", "--format", kind, *out)
    assert re.fullmatch(rf"a/{name}: the model of a, with the weights in a/checkpoints/best.safetensors\n"
                        r"checked with batches of 2, 1, 3: its outputs differ by at most \d\.\de[-+]\d\d from those of the model\n", result.stdout)
    assert result.stderr == ""
    best, last, found = load_run("a").model, load_run("a", "last").model, read(f"a/{name}")
    with torch.no_grad():
        for size in (1, 2, 7):
            torch.testing.assert_close(found(batch(size)), best(batch(size)), rtol=0, atol=1e-5 if kind == "onnx" else 0)
            assert not torch.allclose(found(batch(size)), last(batch(size)), atol=1e-3)


@pytest.mark.parametrize("kind", ["torch", "exported", pytest.param("onnx", marks=needs_onnx)])
def test_a_model_with_tied_weights_is_exported(here, kind):
    run_loopctl("export", "Net", "--format", kind, "--weights", "last", "--out", f"net{export.SUFFIXES[kind][0]}")


def test_the_weights_of_a_model_that_draws_random_numbers_are_exported(here):
    assert "differ by at most 0.0e+00" in run_loopctl("export", "Random", "--format", "torch").stdout


@pytest.mark.parametrize(("name", "kind", "reason"), [
    ("Sized", "exported", "Constraints violated (batch)"), ("Branch", "exported", "data-dependent"),
    pytest.param("Sized", "onnx", "it cannot take a batch of 1", marks=needs_onnx),
    pytest.param("Random", "onnx", "its outputs differ by", marks=needs_onnx)])
def test_a_model_that_cannot_be_exported_is_refused_in_one_line(here, capfd, name, kind, reason):
    result = run_loopctl("export", name, "--format", kind, status=2)
    (line,) = result.stderr.splitlines()
    assert reason in line
    assert len(line) < 600
    assert capfd.readouterr() == ("", "")
    assert not [file for file in Path(name).iterdir() if file.name.startswith("model")]


def test_a_file_whose_outputs_differ_is_not_kept(here, monkeypatch):
    for change, reason in ((lambda out: out * 1.001, r"its outputs differ by \S+ from those of the model, which is more"),
                           (lambda out: out * float("nan"), "its outputs differ by nan"),
                           (lambda out: out[:, :3], r"for a batch of 2 its outputs have the shape \(2, 3\), and the model's \(2, 10\)")):
        monkeypatch.setattr(export, "read_weights", lambda *_, change=change: nn.Sequential(load_run("a").model, Changed(change)))
        (line,) = run_loopctl("export", "a", "--format", "torch", status=2).stderr.splitlines()
        assert re.match(f"error: a/model.pt was not kept: {reason}", line)
        assert not [*Path("a").glob("model*")]


class Changed(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, outputs):
        return self.change(outputs)


def test_a_small_difference_is_rounding_and_shown(here, monkeypatch):
    monkeypatch.setattr(export, "read_weights", lambda *_: nn.Sequential(load_run("a").model, Changed(lambda out: out * 1.00001)))
    found = float(re.search(r"at most (\S+)", run_loopctl("export", "a", "--format", "torch").stdout)[1])
    assert 1e-6 < found < 1e-3


@pytest.mark.parametrize("kind", export.SUFFIXES)
def test_nothing_is_overwritten(here, kind):
    out = Path(f"a/model{export.SUFFIXES[kind][0]}")
    out.write_text("mine")
    if kind == "onnx" and not export.onnx_is_there():
        pytest.skip("needs pip install 'loopctl[onnx]'")
    result = run_loopctl("export", "a", "--format", kind, status=2)
    assert result.stderr == f"error: {out} exists and is not overwritten; move it, or choose another --out\n"
    assert out.read_text() == "mine"


def test_onnx_without_its_packages_says_how_to_get_them(here, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    result = run_loopctl("export", "a", "--format", "onnx", status=2)
    assert result.stderr == "error: --format onnx needs more packages; pip install 'loopctl[onnx]'\n"


@needs_onnx
def test_a_model_too_large_for_an_onnx_file_is_refused(here, monkeypatch):
    monkeypatch.setattr(export, "ONNX_LIMIT", 1000)
    (line,) = run_loopctl("export", "a", "--format", "onnx", status=2).stderr.splitlines()
    assert line.endswith("an ONNX file holds 2 GB; use --format exported")


@pytest.mark.parametrize(("arguments", "message"), [
    (["a"], "Missing option '--format'"), (["a", "--format", "pickle"], "'pickle' is not one of"),
    (["a", "--format", "torch", "--out", "net.onnx"], "--out net.onnx: a file of --format torch ends in .pt or .pth or .safetensors"),
    (["b", "--format", "torch"], "there is no folder b; name the folder of a run"),
    (["a", "--format", "torch", "--weights", "first"], "weights=first: there is no such file"),
    (["a", "--format", "torch", "--out", "a/run.toml/net.pt"], "a/run.toml/net.pt cannot be written")])
def test_wrong_input_is_refused_in_one_line(here, arguments, message):
    (line,) = run_loopctl("export", *arguments, status=2).stderr.splitlines()
    assert message in line
