"""The plugin agc, compared with the formula of arXiv:2102.06171 in a plain loop, and with timm's function."""
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import UsageError, fit
from loopctl.plugins.agc import Agc

cross_entropy = nn.CrossEntropyLoss()


def unit_norm(tensor):
    """Of a vector, its norm; else of each output unit, which is the first dimension."""
    dims = tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None
    return torch.linalg.vector_norm(tensor, dim=dims, keepdim=tensor.ndim > 1)


@torch.no_grad()
def clip_by_formula(parameters, clip_factor=0.01, eps=1e-3):
    """Equation 3 of the paper: G becomes clip_factor * max(|W|, eps) / |G| * G where |G| is larger than that."""
    changed = 0
    for parameter in parameters:
        limit = clip_factor * unit_norm(parameter).clamp(min=eps)
        norm = unit_norm(parameter.grad)
        clipped = parameter.grad * (limit / norm.clamp(min=1e-6))
        changed += (norm > limit).sum().item()
        parameter.grad.copy_(torch.where(norm < limit, parameter.grad, clipped))
    return changed


def by_hand(model, optimizer, batches, clip, epochs=2, every=1, loss_fn=cross_entropy):
    torch.manual_seed(1)
    model.train()
    for _ in range(epochs):
        for start in range(0, len(batches), every):
            group = batches[start:start + every]
            size = sum(len(target) for _, target in group)
            optimizer.zero_grad()
            for input, target in group:
                loss = loss_fn(model(input), target)
                (loss * (len(target) / size) if len(group) > 1 else loss).backward()
            clip()
            optimizer.step()


@pytest.fixture
def images():
    """Images and a network with convolutions of different kinds, whose biases begin at zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2, bias=False), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3))
    nn.init.zeros_(model[0].bias)
    return model, [(torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))) for _ in range(4)]


@pytest.mark.parametrize(("spec", "left_out", "options"), [
    ("agc", ["5.weight", "5.bias"], {}), ("agc:clip_factor=0.08,eps=0.1", ["5.weight", "5.bias"], {"clip_factor": 0.08, "eps": 0.1}),
    ("agc:exclude_head=false", [], {}), ("agc:exclude=2", ["5.weight", "5.bias", "2.weight"], {}),
    ("agc:exclude_head=false,exclude=*.bias,3", ["0.bias", "3.weight", "3.bias", "5.bias"], {}),
    ("agc:clip_factor=1e-5,eps=1e-5", ["5.weight", "5.bias"], {"clip_factor": 1e-5, "eps": 1e-5}),
])
@pytest.mark.compares(use="agc", technique="adaptive clipping by unit", source="arXiv:2102.06171", tolerance="to the bit")
def test_equals_the_formula_of_the_paper_to_the_bit(images, clone, same, sgd, spec, left_out, options):
    net, data = images
    other = clone(net)
    fit(net, cross_entropy, sgd, data, epochs=2, plugins=[spec], seed=1)
    clipped = [parameter for name, parameter in other.named_parameters() if name not in left_out]
    by_hand(other, sgd(other.parameters()), data, lambda: clip_by_formula(clipped, **options))
    same(net, other)


def test_gradients_near_zero_are_as_in_the_formula(images, clone, same, sgd):
    def small(output, target):
        return cross_entropy(output, target) * 1e-7

    net, data = images
    other = clone(net)
    fit(net, small, sgd, data, epochs=2, plugins=["agc:clip_factor=1e-5,eps=1e-5"], seed=1)
    by_hand(other, sgd(other.parameters()), data, lambda: clip_by_formula([*other.parameters()][:-2], 1e-5, 1e-5), loss_fn=small)
    same(net, other)


@pytest.mark.compares(use="agc", technique="adaptive clipping by unit", source="timm.utils.agc.adaptive_clip_grad, timm 1.0", tolerance="to the bit")
def test_equals_timm_to_the_bit(images, clone, same, sgd):
    agc = pytest.importorskip("timm.utils.agc")
    net, data = images
    other = clone(net)
    fit(net, cross_entropy, sgd, data, epochs=2, plugins=["agc"], seed=1)
    head_left_out = [*other.parameters()][:-2]          # as timm leaves out the head
    by_hand(other, sgd(other.parameters()), data, lambda: agc.adaptive_clip_grad(head_left_out))
    same(net, other)


def test_some_units_are_clipped_and_some_are_not(images):
    net, data = images
    cross_entropy(net(data[0][0]), data[0][1]).backward()
    units = sum(len(parameter) if parameter.ndim > 1 else 1 for parameter in net.parameters())
    assert 0 < clip_by_formula(net.parameters(), clip_factor=0.08, eps=0.1) < units


def test_numbers_that_are_no_vectors_and_weights_of_zero_are_clipped_too(clone, same, sgd):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.shift, self.linear = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.zeros(3)), nn.Linear(6, 3)

        def forward(self, input):
            return self.linear(input).tanh() * self.scale + self.shift

    net, data = Scale(), [(torch.randn(4, 6), torch.randint(0, 3, (4,)))] * 3
    other = clone(net)
    fit(net, cross_entropy, sgd, data, plugins=[Agc(exclude_head=False)], seed=1)
    by_hand(other, sgd(other.parameters()), data, lambda: clip_by_formula([other.scale, other.shift, *other.linear.parameters()]), epochs=1)
    same(net, other)
    assert net.shift.any()


def test_gradients_are_unscaled_and_complete_when_they_are_clipped(plain, batches, clone, same, sgd):
    """With float16, whose loss is scaled by 2**16, and accumulation. Within a tolerance, since half precision rounds otherwise."""
    other = clone(plain)
    fit(plain, cross_entropy, sgd, batches, plugins=["agc", "amp:dtype=float16", "accumulate:every=2"], seed=1)
    by_hand(other, sgd(other.parameters()), batches, lambda: clip_by_formula(other[0].parameters()), epochs=1, every=2)
    same(plain, other, tolerance=2e-3)


@pytest.mark.parametrize("plugins", [["agc", "layerwise_lr:decay=0.5"], ["agc", "freeze:patterns=0.weight"], ["agc", "accumulate:every=2"]], ids=str)
def test_parameters_without_gradients_and_in_groups_are_as_by_hand(plain, batches, clone, same, plugins):
    other, sgd = clone(plain), partial(torch.optim.SGD, lr=0.1)
    fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=plugins, seed=1)
    if "freeze" in plugins[1]:
        other[0].weight.requires_grad_(False)
    clipped = [parameter for parameter in other[0].parameters() if parameter.requires_grad]
    groups = ([{"params": other[0].parameters(), "lr": 0.05}, {"params": other[2].parameters()}]
              if "decay" in plugins[1] else other.parameters())
    by_hand(other, sgd(groups), batches, lambda: clip_by_formula(clipped), every=2 if "accumulate" in plugins[1] else 1)
    same(plain, other)


@pytest.mark.parametrize(("options", "message"), [
    ({"clip_factor": 0}, "clip_factor is above 0, not 0"), ({"eps": -1.0}, "eps is above 0"), ({"eps": float("nan")}, "eps is above 0"),
    ({"exclude": "layer1"}, "exclude takes a list")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Agc(**options)


@pytest.mark.parametrize(("model", "plugin", "message"), [
    (nn.Linear(6, 3), Agc(), "agc: every trained parameter is left out, so nothing would be clipped; use exclude_head=false"),
    (nn.Linear(6, 3), Agc(exclude=["wieght"]), "agc: no parameter matches 'wieght'"),
    (nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3)), Agc(), "agc: the gradient of 0 is sparse"),
])
def test_what_could_not_be_clipped_is_refused_before_training(model, plugin, message, batches, sgd):
    with pytest.raises(UsageError, match=f"^{message}"):
        fit(model, cross_entropy, sgd, batches, plugins=[plugin])
