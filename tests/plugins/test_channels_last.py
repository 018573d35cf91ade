"""The plugin channels_last, compared with `.to(memory_format=torch.channels_last)`, and with a plain loop."""
from functools import partial
from itertools import permutations

import pytest
import torch
from torch import nn

from loopctl import Run, fit, hookimpl
from loopctl.plugins.ema import Ema
from loopctl.plugins.swa import Swa

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ROUNDING = 1e-4         # sums are in another order: 1.3e-5 was seen after 50 steps


@pytest.fixture
def conv():
    """A small convolutional network with BatchNorm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
                         nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def images(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 3, 8, 8, generator=generator), torch.arange(size) % 3) for size in sizes]


BATCHES = images([8] * 9 + [5])
VALID = images([8, 5], seed=1)


def is_channels_last(tensor):
    return tensor.is_contiguous(memory_format=torch.channels_last)


def by_hand(model, batches, epochs):
    model.to(memory_format=torch.channels_last)
    optimizer = sgd(model.parameters())
    for _ in range(epochs):
        model.train()
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(input.to(memory_format=torch.channels_last)), target).backward()
            optimizer.step()


@pytest.mark.compares(use="channels_last", technique="the channels-last memory format",
                      source="torch.channels_last", tolerance="to the bit")
def test_equals_a_channels_last_loop_to_the_bit_and_a_plain_loop_except_for_rounding(conv, clone, same):
    hand, plain = clone(conv), clone(conv)
    run = fit(conv, cross_entropy, sgd, BATCHES, VALID, epochs=5, plugins=["channels_last"])
    assert run.step == 50
    by_hand(hand, BATCHES, 5)
    same(conv, hand)
    other = fit(plain, cross_entropy, sgd, BATCHES, VALID, epochs=5)
    same(conv, plain, tolerance=ROUNDING)
    assert run.history[-1]["val_loss"] == pytest.approx(other.history[-1]["val_loss"], rel=1e-3)


class Nested(nn.Module):
    """Takes inputs in a dict, and records their memory format."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, input):
        self.seen.append((self.training, *(is_channels_last(input[name]) for name in ("image", "mask"))))
        assert input["row"].is_contiguous()
        return self.inner(input["image"])


def test_nested_images_are_converted_in_training_and_in_evaluation(conv):
    nested = [({"image": image, "mask": torch.ones(len(image), 3, 8, 8, dtype=torch.long), "row": image[0, 0]}, target)
              for image, target in BATCHES[:2]]
    model = Nested(conv)
    fit(model, cross_entropy, sgd, nested, nested, plugins=["channels_last"])
    tried = [(False, True, False)]          # the first validation batch, in the first step
    assert model.seen == [(True, True, False), *tried, (True, True, False)] + [(False, True, False)] * 2      # an integer mask is not converted


class ReplaceLayer:
    """Replaces a layer in setup."""

    @hookimpl
    def setup(self, run: Run):
        torch.manual_seed(1)
        run.model[4] = nn.Conv2d(8, 16, 3)


@pytest.mark.parametrize("order", [*permutations([ReplaceLayer, lambda: "channels_last", lambda: "ema:decay=0.9"])])
def test_all_weights_are_converted_in_any_order_of_plugins(conv, order):
    plugins = [make() for make in order]
    run = fit(conv, cross_entropy, sgd, BATCHES, plugins=plugins)
    filters = [tensor for tensor in conv.state_dict().values() if tensor.dim() == 4]
    assert len(filters) == 2
    assert all(map(is_channels_last, filters))
    state = [run.optimizer.state[weight]["momentum_buffer"] for weight in conv.parameters() if weight.dim() == 4]
    assert all(map(is_channels_last, state))


@pytest.mark.parametrize("average", [lambda: Ema(decay=0.9), lambda: Swa(start="1ep")])
def test_weight_averages_are_channels_last(conv, clone, same, average):
    plain, plugin = clone(conv), average()
    fit(conv, cross_entropy, sgd, BATCHES, VALID, epochs=3, plugins=["channels_last", plugin])
    fit(plain, cross_entropy, sgd, BATCHES, VALID, epochs=3, plugins=[average()])
    assert is_channels_last(plugin.average["0.weight"])
    same(conv, plain, tolerance=ROUNDING)


class Fail:
    """Raises an error in a step of the second epoch."""

    @hookimpl
    def after_step(self, run: Run):
        if run.step == 14:
            raise RuntimeError("simulated failure")


def test_a_resumed_run_keeps_the_memory_format(conv, clone, same, tmp_path):
    whole, resumed = clone(conv), clone(conv)
    plugins = ["channels_last", "ema:decay=0.9", "checkpoint:every_steps=1"]
    fit(whole, cross_entropy, sgd, BATCHES, VALID, epochs=3, plugins=plugins, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="simulated failure"):
        fit(conv, cross_entropy, sgd, BATCHES, VALID, epochs=3, plugins=[*plugins, Fail()], out=tmp_path / "a")
    assert not conv._forward_pre_hooks
    run = fit(resumed, cross_entropy, sgd, BATCHES, VALID, epochs=3, plugins=plugins, resume=tmp_path / "a", out=tmp_path / "a")
    same(resumed, whole)
    assert is_channels_last(resumed[0].weight)
    assert is_channels_last(run.optimizer.state[resumed[0].weight]["momentum_buffer"])
    assert not resumed._forward_pre_hooks


def test_lazy_layers_are_initialized(clone):
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(3))
    run = fit(model, cross_entropy, sgd, BATCHES, plugins=["channels_last"])
    assert run.step == 10


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_it_equals_a_channels_last_loop_except_for_rounding(conv, clone, same):
    hand = clone(conv).cuda()
    run = fit(conv, cross_entropy, sgd, BATCHES, epochs=2, plugins=["channels_last"], device="cuda")
    by_hand(hand, [(input.cuda(), target.cuda()) for input, target in BATCHES], 2)
    same(run.model, hand, tolerance=1e-3)           # cuDNN may choose other kernels
