"""lora against peft's own layers in a plain loop; the model that is left is the plain one."""
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.lora import Lora
from loopctl.testing import tiny_run

peft = pytest.importorskip("peft")
cross_entropy = nn.CrossEntropyLoss()


def by_hand(model, batches, full=(), epochs=2, **config):
    """Inject peft's matrices, train what requires gradients in a plain loop, and merge with peft."""
    torch.manual_seed(1)
    peft.inject_adapter_in_model(peft.LoraConfig(**config), model)
    for name, parameter in model.named_parameters():
        if name in full:
            parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    for _ in range(epochs):
        model.train()
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            optimizer.step()
    for number, module in enumerate(model):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
            model[number] = module.get_base_layer()


adamw = partial(torch.optim.AdamW, lr=0.01)


@pytest.mark.parametrize(("options", "full"), [
    ({"target_modules": ["0"], "r": 2, "lora_alpha": 4.0, "lora_dropout": 0.25}, ()),
    ({"target_modules": ["0"]}, ("4.weight", "4.bias")), ({"target_modules": ["0", "4"], "r": 1}, ()),
], ids=["one", "head", "both"])
@pytest.mark.compares(use="lora", technique="small matrices beside frozen weights (arXiv:2106.09685)", source="peft.LoraConfig, peft 0.15", tolerance="to the bit")
def test_equals_peft_in_a_plain_loop_to_the_bit(net, batches, valid, clone, same, options, full):
    other, names, flags = clone(net), [*net.state_dict()], [parameter.requires_grad for parameter in net.parameters()]
    by_hand(other, batches, full, **options)
    run = fit(net, cross_entropy, adamw, batches, valid, epochs=2, plugins=[Lora(**options, modules_to_save=["4"] if full else [])], seed=1)
    same(net, other)
    assert [*net.state_dict()] == names
    assert flags == [parameter.requires_grad for parameter in net.parameters()]
    assert [type(module) for module in net] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear]
    assert not hasattr(net, "peft_config")
    net.eval()
    with torch.no_grad():
        losses = [cross_entropy(net(input), target).item() * len(target) for input, target in valid]
    assert run.history[-1]["val_loss"] == pytest.approx(sum(losses) / 13, rel=1e-5)         # merged, sums are in another order


def test_what_is_frozen_keeps_its_bits_and_the_optimizer_holds_the_rest(net, batches, clone):
    other = clone(net)
    run = fit(net, cross_entropy, adamw, batches, plugins=["lora:target_modules=0,r=2"], seed=1)
    assert sum(parameter.numel() for group in run.optimizer.param_groups for parameter in group["params"]) == 2 * 6 + 2 * 16
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)) == (name != "0.weight"), name


def test_the_best_weights_are_those_of_the_plain_model_and_a_resumed_run_has_the_same_bits(net, batches, valid, clone, same, tmp_path):
    class Interrupt:
        @hookimpl
        def after_step(self, run: Run):
            if run.attempts == 5:
                raise KeyboardInterrupt

    plugins = ["lora:target_modules=0,r=2,lora_dropout=0.2", "ema:decay=0.5", "early_stopping:restore_best=true"]
    whole, resumed, names = clone(net), clone(net), {*net.state_dict()}
    fit(whole, cross_entropy, adamw, batches, valid, epochs=2, plugins=["checkpoint:monitor=train_loss,mode=max", *plugins], seed=1, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, adamw, batches, valid, epochs=2, plugins=["checkpoint:every_steps=3", *plugins, Interrupt()], seed=1, out=tmp_path / "a")
    assert {*net.state_dict()} == names             # the model of a run that failed is the plain one too
    fit(resumed, cross_entropy, adamw, batches, valid, epochs=2, plugins=["checkpoint:every_steps=3", *plugins], seed=1, resume=tmp_path / "a", out=tmp_path / "a")
    same(resumed, whole)
    best = load_file(tmp_path / "a" / "checkpoints" / "best.safetensors")
    assert best.keys() == names
    for name, value in whole.state_dict().items():
        assert torch.equal(best[name], value), name                  # of the last epoch, the best


def test_the_folder_of_a_run_is_read_as_that_of_any_other(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from loopctl import load_run
    from loopctl.cli import main

    monkeypatch.chdir(tmp_path)
    for arguments in (["--out", "a"], ["--out", "b", "--init", "a", "--plugin", "lora:target_modules=1,r=2,modules_to_save=7"], ["--out", "c", "--init", "b"]):
        done = CliRunner().invoke(main, ["run", "--data", "fake:size=20,image=4", "--epochs", "1", "--model", "mlp", *arguments])
        assert done.exit_code == 0, done.output
    states = [load_run(tmp_path / name).model.state_dict() for name in "ab"]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == ["1.weight", "7.weight", "7.bias"]
    for name, value in load_run(tmp_path / "b", "last").model.state_dict().items():
        assert torch.equal(value, states[1][name])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight

    def forward(self, input):
        return self.second(self.first(input))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, input):
        return self.attention(input, input, input)[0]


@pytest.mark.parametrize(("plugins", "arguments", "message"), [
    (["lora:target_modules=9"], {}, "lora: target_modules: Target modules .*9.* not found in the base model"),
    (["lora:target_modules=2"], {}, "lora: target_modules: Target module ReLU"),
    (["lora:target_modules=0,modules_to_save=9"], {}, "lora: no parameter matches '9'"),
    (["lora:target_modules=0,r=0"], {}, "r is at least 1, not 0"),
    (["lora:target_modules=0,lora_dropout=1"], {}, "lora_dropout is from 0 to below 1, not 1"),
    (["lora:target_modules=0", "prune:amount=0.5"], {}, "lora: prune sets weights to 0 that the matrices are added to"),
    (["fsdp", "lora:target_modules=0"], {}, "lora: fsdp shards the weights that the matrices are added to; use ddp"),
    (["lora:target_modules=0", "lora:target_modules=4"], {}, "lora.2: the model has such matrices already"),
    (["lora:target_modules=first"], {"model": Tied()}, "target_modules: first, a Linear, shares its weight with another module"),
    (["lora:target_modules=attention"], {"model": Attention()}, "target_modules: attention, a MultiheadAttention, has no weight that the matrices"),
])
def test_what_cannot_be_adapted_is_refused(plugins, arguments, message):
    with pytest.raises(UsageError, match=message):
        tiny_run(*plugins, **arguments)


def test_an_optimizer_that_has_no_matrices_is_refused(net, batches):
    with pytest.raises(UsageError, match="lora: the optimizer was made before the matrices; pass a factory"):
        fit(net, cross_entropy, torch.optim.SGD(net.parameters(), lr=0.1), batches, plugins=["lora:target_modules=0"])


def test_without_peft_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="lora: it needs peft .*; pip install peft"):
        tiny_run("lora:target_modules=0")
