"""channels_last against `.to(memory_format=torch.channels_last)` by hand, and against the plain loop."""
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
ROUNDING = 1e-4         # sums over other layouts have other orders: 1.3e-5 seen after 50 steps


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


def pixel_by_pixel(tensor):
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


def test_bit_for_bit_the_loop_by_hand_and_the_plain_one_but_for_rounding(conv, clone, same):
    hand, plain = clone(conv), clone(conv)
    run = fit(conv, cross_entropy, sgd, BATCHES, VALID, epochs=5, plugins=["channels_last"])
    assert run.step == 50
    by_hand(hand, BATCHES, 5)
    same(conv, hand)
    other = fit(plain, cross_entropy, sgd, BATCHES, VALID, epochs=5)
    same(conv, plain, tolerance=ROUNDING)
    assert run.history[-1]["val_loss"] == pytest.approx(other.history[-1]["val_loss"], rel=1e-3)


class Nested(nn.Module):
    """Takes inputs in a mapping, and notes how they lie."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, input):
        self.seen.append((self.training, *(pixel_by_pixel(input[name]) for name in ("image", "mask"))))
        assert input["row"].is_contiguous()
        return self.inner(input["image"])


def test_images_anywhere_in_the_input_in_training_and_in_evaluation(conv):
    nested = [({"image": image, "mask": torch.ones(len(image), 3, 8, 8, dtype=torch.long), "row": image[0, 0]}, target)
              for image, target in BATCHES[:2]]
    model = Nested(conv)
    fit(model, cross_entropy, sgd, nested, nested, plugins=["channels_last"])
    assert model.seen == [(True, True, False)] * 2 + [(False, True, False)] * 2       # a mask of integers is no image


class Swap:
    """Puts in a layer of its own, in setup."""

    @hookimpl
    def setup(self, run: Run):
        torch.manual_seed(1)
        run.model[4] = nn.Conv2d(8, 16, 3)


@pytest.mark.parametrize("order", [*permutations([Swap, lambda: "channels_last", lambda: "ema:decay=0.9"])])
def test_every_weight_lies_so_whoever_comes_first(conv, order):
    plugins = [make() for make in order]
    run = fit(conv, cross_entropy, sgd, BATCHES, plugins=plugins)
    four = [tensor for tensor in conv.state_dict().values() if tensor.dim() == 4]
    assert len(four) == 2
    assert all(map(pixel_by_pixel, four))
    state = [run.optimizer.state[weight]["momentum_buffer"] for weight in conv.parameters() if weight.dim() == 4]
    assert all(map(pixel_by_pixel, state))


@pytest.mark.parametrize("average", [lambda: Ema(decay=0.9), lambda: Swa(start="1ep")])
def test_averages_follow(conv, clone, same, average):
    plain, one = clone(conv), average()
    fit(conv, cross_entropy, sgd, BATCHES, VALID, epochs=3, plugins=["channels_last", one])
    fit(plain, cross_entropy, sgd, BATCHES, VALID, epochs=3, plugins=[average()])
    assert pixel_by_pixel(one.average["0.weight"])
    same(conv, plain, tolerance=ROUNDING)


class Break:
    """Ends the run with an error in a step within the second epoch."""

    @hookimpl
    def after_step(self, run: Run):
        if run.step == 14:
            raise RuntimeError("the power is gone")


def test_a_run_goes_on_in_the_same_format(conv, clone, same, tmp_path):
    whole, again = clone(conv), clone(conv)
    plugins = ["channels_last", "ema:decay=0.9", "checkpoint:every_steps=1"]
    fit(whole, cross_entropy, sgd, BATCHES, VALID, epochs=3, plugins=plugins, out=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the power is gone"):
        fit(conv, cross_entropy, sgd, BATCHES, VALID, epochs=3, plugins=[*plugins, Break()], out=tmp_path / "a")
    assert not conv._forward_pre_hooks
    run = fit(again, cross_entropy, sgd, BATCHES, VALID, epochs=3, plugins=plugins, resume=tmp_path / "a", out=tmp_path / "a")
    same(again, whole)
    assert pixel_by_pixel(again[0].weight)
    assert pixel_by_pixel(run.optimizer.state[again[0].weight]["momentum_buffer"])
    assert not again._forward_pre_hooks


def test_layers_that_have_no_weights_yet_get_them_all_the_same(clone):
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(3))
    run = fit(model, cross_entropy, sgd, BATCHES, plugins=["channels_last"])
    assert run.step == 10


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_with_amp_the_loop_by_hand_but_for_rounding(conv, clone, same):
    hand = clone(conv).cuda()
    run = fit(conv, cross_entropy, sgd, BATCHES, epochs=2, plugins=["channels_last"], device="cuda")
    by_hand(hand, [(input.cuda(), target.cuda()) for input, target in BATCHES], 2)
    same(run.model, hand, tolerance=1e-3)           # cuDNN chooses among kernels
