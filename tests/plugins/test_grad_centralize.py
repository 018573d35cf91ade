"""The plugin grad_centralize, compared with the formula of arXiv:2004.01461 in a plain loop, and with pytorch_optimizer."""
import pytest
import torch
from torch import nn

from loopctl import fit
from loopctl.plugins.grad_centralize import GradCentralize

cross_entropy = nn.CrossEntropyLoss()


def centralize(parameters, above=1):
    """Equation 1 of the paper: the gradient of a weight vector less its mean, which is over all dimensions but the first."""
    for parameter in parameters:
        if parameter.ndim > above:
            parameter.grad.sub_(parameter.grad.mean(dim=tuple(range(1, parameter.ndim)), keepdim=True))


def by_hand(model, optimizer, batches, change, max_norm=None):
    torch.manual_seed(1)
    model.train()
    for _ in range(2):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            change(list(model.parameters()))
            if max_norm:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()


@pytest.fixture
def images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Conv1d(4, 4, 5, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(128, 3))
    return model, [(torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))) for _ in range(4)]


@pytest.mark.parametrize(("plugins", "above", "max_norm"), [
    (["grad_centralize"], 1, None), (["grad_centralize:gc_conv_only=true"], 3, None),
    (["clip:max_norm=0.1", "grad_centralize"], 1, 0.1), (["grad_centralize", "clip:max_norm=0.1"], 1, 0.1)], ids=str)
@pytest.mark.compares(use="grad_centralize", technique="gradients without the mean of each unit", source="arXiv:2004.01461", tolerance="to the bit")
def test_equals_the_formula_of_the_paper_to_the_bit(images, clone, same, sgd, plugins, above, max_norm):
    net, data = images
    other = clone(net)
    fit(net, cross_entropy, sgd, data, epochs=2, plugins=plugins, seed=1)
    by_hand(other, sgd(other.parameters()), data, lambda parameters: centralize(parameters, above), max_norm)
    same(net, other)


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.compares(use="grad_centralize", technique="gradients without the mean of each unit", source="pytorch_optimizer.optimizer.centralize_gradient, 3", tolerance="to the bit")
def test_equals_pytorch_optimizer_to_the_bit(images, clone, same, sgd, only):
    library = pytest.importorskip("pytorch_optimizer.optimizer.gradient_centralization")
    net, data = images
    other = clone(net)
    fit(net, cross_entropy, sgd, data, epochs=2, plugins=[GradCentralize(gc_conv_only=only)], seed=1)

    def change(parameters):
        for parameter in parameters:
            library.centralize_gradient(parameter.grad, gc_conv_only=only)

    by_hand(other, sgd(other.parameters()), data, change)
    same(net, other)


def test_the_rows_of_a_weight_keep_their_mean_when_no_other_term_changes_them(images, sgd):
    net, data = images
    before = [parameter.detach().mean(tuple(range(1, parameter.ndim))) for parameter in net.parameters() if parameter.ndim > 1]
    fit(net, cross_entropy, sgd, data, epochs=2, plugins=["grad_centralize"], seed=1)
    after = [parameter.detach().mean(tuple(range(1, parameter.ndim))) for parameter in net.parameters() if parameter.ndim > 1]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)


def test_a_model_with_vectors_only_trains(batches, sgd):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, input):
            return input * self.scale

    assert fit(Scale(), cross_entropy, sgd, batches, plugins=["grad_centralize"]).step == 8
