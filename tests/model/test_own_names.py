"""A plugin that wraps submodules changes no name: in checkpoints, files of weights, patterns, averages and summaries."""
import ast
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from loopctl import hookimpl
from loopctl.checkpoint.atomic_files import save_weights
from loopctl.checkpoint.state import capture_state
from loopctl.checkpoint.weights_file import load_weights
from loopctl.model import summary
from loopctl.model.layers import layers
from loopctl.model.own_names import load_own_state_dict, own_modules, own_parameters, own_state_dict
from loopctl.model.weight_decay import undecayed_parameters
from loopctl.testing import plugin_checks, tiny_run
from loopctl.testing.comparison import first_difference
from loopctl.testing.tiny import tiny_model

ROOT = Path(__file__).parents[2]
NAMED = {"named_parameters", "named_modules", "named_buffers"}
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")          # torch.compile looks at it


def compiled(module):
    return torch.compile(module, backend="eager")


class Wrap:
    """Another package's plugin, which wraps the linear layers of a model in `setup`."""

    observer_only = True
    wrap = staticmethod(checkpoint_wrapper)

    @hookimpl
    def setup(self, run):
        for name, part in run.model.named_children():
            if isinstance(part, nn.Linear):
                setattr(run.model, name, self.wrap(part))


class Compiled(Wrap):
    """The same with torch.compile."""

    wrap = staticmethod(compiled)


class Both(Wrap):
    """The same with both."""

    wrap = staticmethod(lambda part: compiled(checkpoint_wrapper(part)))


class Leave:
    """Leaves the run in the middle of its second epoch."""

    observer_only = True

    @hookimpl
    def after_step(self, run):
        run.leave = "enough" if run.attempts == 7 else ""


class Apply:
    """The same with torch's own function, which wraps in place."""

    observer_only = True

    @hookimpl
    def setup(self, run):
        apply_activation_checkpointing(run.model, check_fn=lambda part: isinstance(part, nn.Linear))


class Keep:
    """Keeps a checkpoint of the last safe point."""

    observer_only = True

    @hookimpl
    def safe_point(self, run):
        self.saved = capture_state(run)


PLUGINS = ("freeze:patterns=0.bias,1,until=1ep", "layerwise_lr:decay=0.5,no_decay=true", "ema:decay=0.9", "early_stopping:restore_best=true")


@pytest.mark.parametrize("wrap", [Wrap, Apply, Compiled, Both])
def test_checkpoints_patterns_averages_and_weights_have_the_own_names(wrap, same, tmp_path):
    kept, runs = [Keep(), Keep()], []
    for keep, more in zip(kept, ([], [wrap()]), strict=True):
        runs.append(tiny_run(*more, *PLUGINS, keep))
    assert any("_" in name for name, _ in runs[1].model.named_modules())        # it was wrapped
    for key in ("model", "optimizer", "parameters", "plugins"):
        assert not first_difference(kept[0].saved[key], kept[1].saved[key], key)
    for run, file in zip(runs, ("plain", "wrapped"), strict=True):
        save_weights(run.model, tmp_path / f"{file}.safetensors")
    files = [load_file(tmp_path / f"{file}.safetensors") for file in ("plain", "wrapped")]
    assert files[0].keys() == files[1].keys() == runs[0].model.state_dict().keys()
    torch.testing.assert_close(*files, rtol=0, atol=0)
    loaded = tiny_model()
    load_weights(loaded, tmp_path / "wrapped.safetensors")
    same(loaded, runs[0].model)
    assert load_weights(runs[1].model, tmp_path / "plain.safetensors") == []


@pytest.mark.parametrize("first", [True, False], ids=["wrapped first", "wrapped later"])
@pytest.mark.parametrize("wrap", [Wrap, Compiled])
def test_a_run_is_resumed_with_and_without_the_wrapping(wrap, first, tmp_path):
    plugins = "checkpoint", "ema:decay=0.9", "swa:start=1ep"
    whole = tiny_run(*plugins[1:], epochs=3)
    tiny_run(*plugins, *[wrap()] * first, Leave(), epochs=3, out=tmp_path)
    resumed = tiny_run(*plugins, *[wrap()] * (not first), epochs=3, out=tmp_path, resume=tmp_path)
    torch.testing.assert_close(own_state_dict(resumed.model), whole.model.state_dict(), rtol=0, atol=0)
    assert resumed.history[-1] == whole.history[-1]


@pytest.mark.parametrize("check", [pytest.param(check, id=check.__name__) for check in plugin_checks(Wrap) if check.__name__ != "composes"])
def test_a_plugin_that_wraps_conforms(check):
    check()


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, compiled], ids=["checkpoint", "compile"])
def test_layers_blocks_and_kinds_of_parameters_are_those_of_the_model_without_wrappers(wrap):
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2)] + [nn.TransformerEncoderLayer(4, 1, 4) for _ in range(2)]
    plain = nn.Sequential(nn.Linear(3, 4), nn.Sequential(*blocks), nn.Linear(4, 2))
    expected = layers(plain), [id(block) for block in summary.repeated_blocks(plain)], undecayed_parameters(plain, ["norms", "biases"])
    names, rows = list(own_parameters(plain)), [layer.name for layer in summary.layers(plain, {})]
    plain[1] = nn.Sequential(*map(wrap, blocks))
    wrapped = wrap(plain)
    assert (layers(wrapped), [id(block) for block in summary.repeated_blocks(wrapped)], undecayed_parameters(wrapped, ["norms", "biases"])) == expected
    assert list(own_parameters(wrapped)) == names
    assert [layer.name for layer in summary.layers(wrapped, {})] == rows == [name for name, _ in own_modules(wrapped)]


def test_names_stay_as_they_are_where_two_would_be_the_same():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self._orig_mod = nn.Parameter(torch.zeros(1)), nn.Linear(1, 1, bias=False)

    model = Twice()
    assert [*own_state_dict(model)] == ["weight", "_orig_mod.weight"] == [*own_parameters(model)]
    load_own_state_dict(model, {"weight": torch.ones(1), "_orig_mod.weight": torch.full((1, 1), 2.0)})
    assert model.weight.item() == 1
    assert model._orig_mod.weight.item() == 2


def test_names_are_asked_for_in_one_place():
    """What has names uses core/model/own_names.py; a module's own parameters, without those of submodules, have none.

    Metrics are not wrapped; and where layers are exchanged, it is for those at their actual places.
    """
    allowed = {ROOT / file for file in ("core/model/own_names.py", "core/metrics/meters.py", "core/model/linear_layers.py", "plugins/lora.py")}
    for path in {*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").glob("*.py")} - allowed:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            of_model = node.func.attr in ("state_dict", "load_state_dict") and ast.unparse(node.func.value) in ("run.model", "model")
            whole = node.func.attr in NAMED and not any(keyword.arg == "recurse" for keyword in node.keywords)
            assert not of_model, f"{path}:{node.lineno}"
            assert not whole, f"{path}:{node.lineno}"
