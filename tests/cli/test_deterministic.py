"""`--deterministic`: how it is given and saved, and that every built-in model has what it needs for it on a GPU."""
import tomllib

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import TensorDataset

from loopctl import Data
from loopctl.cli import main, models
from loopctl.cli.deterministic import DeterministicAvgPool2d, use_deterministic_pooling, window_means

# The operations that torch.use_deterministic_algorithms lists as an error, in their forward or in their backward pass.
WITHOUT_FORM = {
    "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d", "fractional_max_pool2d", "fractional_max_pool3d",
    "max_unpool2d", "max_unpool3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "nll_loss2d_forward",
    "_ctc_loss", "_embedding_bag", "put", "put_", "histc", "bincount", "median", "kthvalue", "grid_sampler_2d", "grid_sampler_3d",
    "scatter_reduce", "scatter_reduce_", "resize_",
}
# The smallest of each kind of torchvision's models; the others of its module have the same layers.
SMALLEST = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
            "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
            "swin_v2_t", "vgg11", "vit_b_32")


class Operations(TorchDispatchMode):
    """Records the names of operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def operations(model, channels, size):
    """The operations of a training step of a model on the meta device, where nothing is computed, as on a GPU."""
    with Operations() as recorded:
        output = model.to("meta")(torch.empty(2, channels, size, size, device="meta"))
    assert output.requires_grad
    return recorded.names


def small_models():
    yield models.cnn(10, 1), 1, 28
    yield models.linear(10, 1, 8), 1, 8
    yield models.mlp(10, 1, 8), 1, 8
    yield models.vit(10, 1, 8), 1, 8


def test_the_small_models_use_only_operations_that_have_a_deterministic_form():
    for model, channels, size in small_models():
        use_deterministic_pooling(model)
        assert not operations(model, channels, size) & WITHOUT_FORM


def test_a_model_of_each_kind_of_torchvision_uses_only_operations_that_have_a_deterministic_form():
    assert {models.torchvision_names()[name] for name in SMALLEST} == {*models.torchvision_names().values()}
    for name in SMALLEST:
        options = models.SINGLE_OUTPUT.get(name, {})
        with torch.device("cpu" if name.startswith("regnet") else "meta"):
            model = models.torchvision_factory(name)(**{**options, "init_weights": False} if options else options)
        names = [*model.state_dict()]
        use_deterministic_pooling(model)
        assert [*model.state_dict()] == names
        assert not operations(model, 3, 224) & WITHOUT_FORM, name


def test_the_pooling_of_torch_is_found_to_have_none():
    assert operations(models.cnn(10, 1), 1, 28) & WITHOUT_FORM == {"_adaptive_avg_pool2d"}


@pytest.mark.parametrize("size", [2, (7, 7), (3, 5), (None, 4)])
@pytest.mark.parametrize("shape", [(12, 12), (7, 10), (13, 5), (2, 2)])
def test_means_of_slices_equal_adaptive_average_pooling(size, shape):
    one, other = (torch.randn(2, 3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
                  for _ in range(2))
    rows, columns = size if isinstance(size, tuple) else (size, size)
    expected, found = nn.functional.adaptive_avg_pool2d(one, size), window_means(window_means(other, -2, rows), -1, columns)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    torch.testing.assert_close(other.grad, one.grad, rtol=1e-12, atol=1e-12)
    assert DeterministicAvgPool2d(size)(torch.empty(2, 3, *shape, device="meta")).shape == expected.shape


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call `loopctl` in a new folder. Return the result of click's CliRunner. torch's settings are restored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    # torch's own imports inductor for a setting of it, which takes seconds.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", torch._C._set_deterministic_algorithms)

    def call(*arguments, status=0):
        torch._C._set_deterministic_algorithms(False)
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == status, result.output
        return result

    yield call
    torch._C._set_deterministic_algorithms(False)


def test_on_a_cpu_the_cnn_trains_the_same_bits_with_and_without_it(run, tmp_path):
    for name, more in (("a", []), ("b", ["--deterministic"])):
        run("run", "--max-steps", 5, *more, "--out", name)
    files = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_the_pooling_is_replaced_only_in_built_in_models_and_only_where_asked_for(run):
    data = Data(*[TensorDataset(torch.rand(4, 3, 32, 32), torch.arange(4) % 2)] * 2, 2, (3, 32, 32))
    for on, spec, found in ((False, "cnn", nn.AdaptiveAvgPool2d), (True, "cnn", DeterministicAvgPool2d),
                            (True, "loopctl.cli.models:cnn", nn.AdaptiveAvgPool2d)):
        torch.use_deterministic_algorithms(on)
        assert type(models.make(spec, data)[13]) is found
    resnet = models.make("resnet18", data)          # whose pooling to a single pixel torch computes as a mean
    assert type(resnet.avgpool) is nn.AdaptiveAvgPool2d


PUTS = """
import torch
from torch import nn

class Puts(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.inner = nn.Linear(64, num_classes)
    def forward(self, images):
        images.put_(torch.tensor([0]), images.flatten()[:1].clone())
        return self.inner(images.flatten(1))
"""


def test_an_operation_without_a_deterministic_form_is_refused_before_training_or_allowed_with_warn(run, tmp_path, caplog):
    (tmp_path / "puts.py").write_text(PUTS)
    command = "run", "--model", "puts.py:Puts", "--max-steps", 3
    refused = ("put_ has no deterministic form, and only deterministic algorithms are allowed; use other operations, or "
               "--deterministic=warn, in Python torch.use_deterministic_algorithms(True, warn_only=True)\n")
    error = run(*command, "--deterministic", "--out", "a", status=2).stderr
    assert error == f"error: model puts.py:Puts: {refused}"
    (tmp_path / "only_training.py").write_text(PUTS.replace("images.put_", "self.training and images.put_"))
    error = run("run", "--model", "only_training.py:Puts", "--deterministic", "--out", "a", status=2).stderr
    assert error == f"error: {refused}"
    assert not (tmp_path / "a").exists()
    run(*command, "--deterministic=warn", "--out", "a")
    assert caplog.messages == ["put_ has no deterministic form, so another run may differ from this one"]
    assert tomllib.loads((tmp_path / "a" / "run.toml").read_text())["deterministic"] == "warn"


def test_it_is_given_without_a_value_or_with_warn_and_read_from_configurations(run, tmp_path):
    for words, saved in ((["--deterministic"], True), (["--deterministic", "--seed", 1], True), ([], False),
                         (["--deterministic=warn"], "warn"), (["--deterministic", "warn"], "warn")):
        run("run", "--model", "linear", "--max-steps", 1, *words, "--out", str(saved) + str(len(words)))
        file = tmp_path / (str(saved) + str(len(words))) / "run.toml"
        assert tomllib.loads(file.read_text())["deterministic"] == saved
        assert torch.get_deterministic_debug_mode() == {True: 2, False: 0, "warn": 1}[saved]
        run("run", "--config", file, "--out", f"again{saved}{len(words)}")
        assert torch.get_deterministic_debug_mode() == {True: 2, False: 0, "warn": 1}[saved]
    for wrong in ("--deterministic=maybe", "--deterministic="):
        error = run("run", wrong, "--out", "c", status=2).stderr
        assert error == f"error: Invalid value for '--deterministic': {wrong.partition('=')[2]!r} is not warn; pass that, or no value.\n"
