"""float8 against torchao's own layers in a plain loop, with emulated matrix products; a GPU without float8 is refused."""
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.float8 import Float8
from loopctl.testing import tiny_run

float8 = pytest.importorskip("torchao.float8")
cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


@pytest.fixture
def wide():
    """A network whose first three layers have sizes that a GPU can multiply in float8, and the third is the last one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 16))


@pytest.mark.parametrize(("recipe", "modules", "names"), [
    ("tensorwise", [], ["1"]), ("rowwise", ["0", "1"], ["0", "1"]), ("rowwise_with_gw_hp", ["/[15]/"], ["1", "5"]),
])
@pytest.mark.compares(use="float8", technique="linear layers in float8, with scales of largest values (arXiv:2209.05433)", source="torchao.float8.convert_to_float8_training, torchao 0.18", tolerance="to the bit, emulated")
def test_equals_torchao_in_a_plain_loop_to_the_bit(wide, batches, valid, clone, same, recipe, modules, names):
    other, plain, layers, states = clone(wide), clone(wide), [*wide], [*wide.state_dict()]
    run = fit(wide, cross_entropy, sgd, batches, valid, epochs=2, plugins=[Float8(recipe, modules, emulate=True)], seed=1)
    config = replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    float8.convert_to_float8_training(other, config=config, module_filter_fn=lambda module, name: name in names)
    for model in (other, plain):
        torch.manual_seed(1)
        optimizer = sgd(model.parameters())
        for _ in range(2):
            model.train()
            for input, target in batches:
                optimizer.zero_grad()
                cross_entropy(model(input), target).backward()
                optimizer.step()
    same(wide, other)
    assert not torch.equal(wide[1].weight, plain[1].weight)
    assert [*wide] == layers            # the model has its own layers again
    assert [*wide.state_dict()] == states
    other.eval()
    with torch.no_grad():
        losses = [cross_entropy(other(input), target).double() * len(target) for input, target in valid]
    assert run.history[-1]["val_loss"] == (losses[0] + losses[1]).div(13).item()


def test_checkpoints_have_the_usual_names_and_a_resumed_run_has_the_same_bits(wide, batches, valid, clone, same, tmp_path):
    class Interrupt:
        @hookimpl
        def after_step(self, run: Run):
            if run.attempts == 5:
                raise KeyboardInterrupt

    plugins = ["float8:emulate=true", "ema:decay=0.5", "accumulate:every=2", "clip:max_norm=0.1"]
    whole, resumed, layers, own = clone(wide), clone(wide), [*wide], {**wide.state_dict()}
    fit(whole, cross_entropy, sgd, batches, valid, epochs=3, seed=1, plugins=plugins, out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(wide, cross_entropy, sgd, batches, valid, epochs=3, seed=1, plugins=["checkpoint:every_steps=3", *plugins, Interrupt()], out=tmp_path)
    assert [*wide] == layers
    fit(resumed, cross_entropy, sgd, batches, valid, epochs=3, seed=1, plugins=["checkpoint:every_steps=3", *plugins], resume=tmp_path, out=tmp_path)
    same(resumed, whole)
    best = load_file(tmp_path / "checkpoints" / "best.safetensors")
    assert {name: value.dtype for name, value in best.items()} == {name: value.dtype for name, value in own.items()}


def test_a_gpu_without_float8_is_refused_before_training(wide, monkeypatch):
    run = Run(model=wide, loss_fn=None, optimizer=None, train=[])
    run.hook, run.device = type("Hook", (), {"plugins": {}}), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(UsageError, match=r"this GPU has no float8: its compute capability is 8\.6, below 8\.9; use amp:dtype=bfloat16"):
        Float8().setup(run)
    assert [type(module) for module in wide if hasattr(module, "weight")] == [nn.Linear, nn.Linear, nn.BatchNorm1d, nn.Linear]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(UsageError, match="0 has 6 inputs and 16 outputs, which have to be multiples of 16; leave it out"):
        Float8(modules=["0", "1"]).setup(run)
    plugin = Float8()
    plugin.setup(run)
    assert [*plugin.layers] == ["1"]
    assert wide[1].config.pad_inner_dim                     # the last batch may have any number of rows
    assert not wide[1].config.emulate


@pytest.mark.parametrize(("plugins", "message"), [
    (["float8"], "^float8: it needs a GPU, and this run is on cpu; leave it out, or use emulate=true to try it"),
    (["float8:emulate=true"], "^float8: no linear layer but the last one has inputs and outputs in multiples of 16"),
    (["float8:emulate=true,modules=9"], "^float8: no linear layer matches '9'; the model's linear layers are 0, 4$"),
    (["float8:emulate=true,modules=0", "fsdp"], "^float8: fsdp shards the weights"),
    (["float8:emulate=true,modules=0", "qat:group_size=0"], "^qat: float8 computes the same layers in float8; leave out one"),
    (["lora:target_modules=0", "float8:emulate=true,modules=0"], "^lora: float8 replaces the layers that the matrices are beside"),
])
def test_what_cannot_be_converted_is_refused(plugins, message):
    with pytest.raises(UsageError, match=message):
        tiny_run(*plugins)


def test_a_list_of_modules_is_not_text():
    with pytest.raises(ValueError, match="modules takes a list"):
        Float8(modules="0")


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UsageError, match="float8: it needs torchao .*; pip install torchao"):
        tiny_run("float8:emulate=true,modules=0")
