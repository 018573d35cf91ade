"""qat against torchao's own layers in a plain loop; the model that is left is the user's, with float weights."""
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.qat import Qat
from loopctl.testing import tiny_run

quantization = pytest.importorskip("torchao.quantization")
qat = pytest.importorskip("torchao.quantization.qat")
cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
CONFIGS = {
    "groups": (Qat(group_size=2, modules=["0"]), quantization.Int8DynamicActivationIntxWeightConfig(torch.int4, quantization.PerGroup(2)), ["0"]),
    "rows": (Qat(weight_dtype="int8", group_size=0), quantization.Int8DynamicActivationIntxWeightConfig(torch.int8, quantization.PerAxis(0)), ["0", "4"]),
    "weights": (Qat("IntxWeightOnlyConfig", "int2", 0), quantization.IntxWeightOnlyConfig(torch.int2, quantization.PerAxis(0)), ["0", "4"]),
    "bfloat16": (Qat("Int4WeightOnlyConfig", group_size=2), quantization.Int4WeightOnlyConfig(group_size=2), ["0", "4"]),
}


@pytest.mark.parametrize(("plugin", "config", "names"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.compares(use="qat", technique="quantization-aware training (arXiv:1712.05877)", source="torchao.quantization.qat.QATConfig, torchao 0.18", tolerance="to the bit")
def test_equals_torchao_in_a_plain_loop_to_the_bit(net, batches, valid, clone, same, plugin, config, names):
    other, before = clone(net), {name: type(module) for name, module in net.named_modules()}
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=[plugin], seed=1)
    quantization.quantize_(other, qat.QATConfig(config, step="prepare"), lambda module, name: name in names)
    torch.manual_seed(1)
    optimizer = sgd(other.parameters())
    for _ in range(2):
        other.train()
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(other(input), target).backward()
            optimizer.step()
    same(net, other)
    assert {name: type(module) for name, module in net.named_modules()} == before
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    other.eval()
    net.eval()
    with torch.no_grad():
        losses = [cross_entropy(other(input), target).double() * len(target) for input, target in valid]
        assert run.history[-1]["val_loss"] == (losses[0] + losses[1]).div(13).item()           # evaluations round too
        assert not torch.equal(net(valid[0][0]), other(valid[0][0]))
        if plugin.base_config == "Int4WeightOnlyConfig":
            return                                      # its conversion needs a GPU's kernels
        expected = other(valid[0][0])
        quantization.quantize_(other, qat.QATConfig(config, step="convert"))
        quantization.quantize_(net, config, lambda module, name: name in names)         # the documented line
        assert torch.equal(net(valid[0][0]), other(valid[0][0]))
        assert torch.allclose(net(valid[0][0]), expected, atol=1e-6)        # integers times scales, in another order


def test_checkpoints_have_the_usual_names_and_a_resumed_run_has_the_same_bits(net, batches, valid, clone, same, tmp_path):
    class Interrupt:
        @hookimpl
        def after_step(self, run: Run):
            if run.attempts == 5:
                raise KeyboardInterrupt

    plugins = ["qat:group_size=2", "ema:decay=0.5", "accumulate:every=2", "amp:dtype=bfloat16"]
    whole, resumed, own = clone(net), clone(net), {**net.state_dict()}
    arguments = {"epochs": 2, "seed": 1, "out": tmp_path}
    fit(whole, cross_entropy, sgd, batches, valid, **arguments | {"epochs": 3}, plugins=plugins)
    layers = [*net]
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, sgd, batches, valid, **arguments | {"epochs": 3}, plugins=["checkpoint:every_steps=3", *plugins, Interrupt()])
    assert [*net] == layers         # after an exception, too
    fit(resumed, cross_entropy, sgd, batches, valid, **arguments | {"epochs": 3}, plugins=["checkpoint:every_steps=3", *plugins], resume=tmp_path)
    same(resumed, whole)
    best = load_file(tmp_path / "checkpoints" / "best.safetensors")
    assert {name: value.dtype for name, value in best.items()} == {name: value.dtype for name, value in own.items()}
    clone(net).load_state_dict(best)


def test_the_random_numbers_and_the_hooks_of_layers_are_those_of_a_run_without_it(net, batches, clone):
    states, calls = [], []

    class Record:
        @hookimpl
        def train_start(self, run: Run):
            states.append(torch.get_rng_state())

    net[0].register_forward_hook(lambda module, input, output: calls.append(module.training))
    for plugins in ([], ["qat:group_size=0"]):
        fit(clone(net), cross_entropy, sgd, batches, plugins=[*plugins, Record()], seed=1)
    assert torch.equal(*states)
    assert calls == [True] * 16


class Layers(nn.Module):
    """Attention, whose last layer's forward is not called; two names for one layer; a shared weight."""

    def __init__(self):
        super().__init__()
        self.attention, self.first, self.tied = nn.MultiheadAttention(6, 2), nn.Linear(6, 6), nn.Linear(6, 6)
        self.again, self.tied.weight = self.first, self.first.weight
        self.types = {}

    def forward(self, input):
        self.types = {name: type(module).__name__ for name, module in self.named_modules(remove_duplicate=False)}
        return self.tied(self.again(self.first(self.attention(input, input, input)[0])))


def test_shared_layers_are_prepared_and_those_of_attention_are_not():
    run = tiny_run("qat:group_size=3", model=Layers())
    types = run.model.types
    assert [types[name] for name in ("first", "again", "tied")] == ["FakeQuantizedLinear"] * 3
    assert types["attention.out_proj"] == "NonDynamicallyQuantizableLinear"
    assert run.model.first is run.model.again
    assert run.model.tied.weight is run.model.first.weight
    assert type(run.model.first) is nn.Linear


def test_multiply_adds_are_counted_as_without_it(capsys):
    totals = []
    for plugins in ([], ["qat:group_size=0"]):
        tiny_run("summary", *plugins)
        totals += [line.split() for line in capsys.readouterr().out.splitlines() if "Multiply-adds, forward" in line]
    assert totals[0] == totals[1] == ["Multiply-adds,", "forward", "1.15", "k"]


@pytest.mark.parametrize(("plugins", "arguments", "message"), [
    (["qat"], {}, "^qat: 0 has 6 inputs, which is not a multiple of group_size=32; use another, 0 for whole rows"),
    (["qat:modules=9"], {}, "^qat: no linear layer matches '9'; the model's linear layers are 0, 4$"),
    (["qat:group_size=-1"], {}, "group_size is at least 1, or 0 for a whole row, not -1"),
    (["qat:base_config=Int4WeightOnlyConfig,weight_dtype=int8"], {}, "Int4WeightOnlyConfig has weights of int4 in groups"),
    (["qat:base_config=Int4WeightOnlyConfig,group_size=0"], {}, "Int4WeightOnlyConfig has weights of int4 in groups"),
    (["qat:group_size=0"], {"model": nn.Linear(6, 3)}, "^qat: the model is a linear layer itself"),
    (["qat:group_size=0"], {"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(3))}, "^qat: the model has no linear layer"),
    (["fsdp", "qat:group_size=0"], {}, "^qat: fsdp shards the weights, which are rounded whole; use ddp"),
    (["lora:target_modules=0", "qat:group_size=0"], {}, "^lora: qat rounds the weights, and would round the matrices apart"),
    (["qat:group_size=0,modules=0", "qat:group_size=0,modules=0"], {}, "^qat.2: no linear layer matches '0'; the model's linear layers are 4"),
])
def test_what_cannot_be_prepared_is_refused(plugins, arguments, message):
    with pytest.raises((UsageError, ValueError), match=message):
        tiny_run(*plugins, **arguments)


def test_a_list_of_modules_is_not_text():
    with pytest.raises(ValueError, match="modules takes a list"):
        Qat(modules="0")


def test_without_torchao_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UsageError, match="qat: it needs torchao .*; pip install torchao"):
        tiny_run("qat:group_size=0")
