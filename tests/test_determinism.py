"""An operation without a deterministic form is named, where torch is told to use deterministic algorithms only."""
import re
import warnings

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()
WAY_OUT = ("and only deterministic algorithms are allowed; use other operations, or --deterministic=warn, in Python "
           "torch.use_deterministic_algorithms(True, warn_only=True)")


def put(tensor):
    """An operation that has no deterministic form, on a CPU neither. It changes nothing."""
    tensor.detach().put_(torch.tensor([0]), tensor.detach().flatten()[:1].clone())
    return tensor


@pytest.fixture
def mode():
    yield torch.set_deterministic_debug_mode
    torch.set_deterministic_debug_mode("default")


class PutsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input):
        return input.clone()

    @staticmethod
    def backward(ctx, gradient):
        return put(gradient.clone())


class Puts(nn.Sequential):
    def __init__(self, model, when):
        super().__init__(*model)
        self.when = when

    def forward(self, input):
        output = super().forward(input)
        if self.when == "backward":
            return PutsInBackward.apply(output)
        return put(output) if (self.when == "training") == self.training else output


class PutsInPlugin:
    @hookimpl
    def after_backward(self, run: Run):
        put(torch.zeros(2))


@pytest.mark.parametrize(("when", "plugins", "where"), [
    ("training", [], ""),
    ("backward", [], ""),
    ("evaluation", [], " (raised by the first batch of valid, before the first update)"),
    ("never", [PutsInPlugin()], " (raised by plugin 'puts_in_plugin' in its hook after_backward)"),
])
def test_it_is_named_before_the_first_update(plain, batches, valid, sgd, mode, when, plugins, where):
    mode("error")
    model = Puts(plain, when)
    model.eval().requires_grad_(True)
    if when == "never":
        model.forward = plain.forward
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(UsageError) as refused:
        fit(model, cross_entropy, sgd, batches, valid, plugins=plugins)
    assert str(refused.value) == f"put_ has no deterministic form{where}, {WAY_OUT}"
    assert all(map(torch.equal, before, model.parameters()))


def test_other_errors_stay_as_they_are(plain, batches, sgd, mode):
    mode("error")
    with pytest.raises(RuntimeError, match="^mat1 and mat2 shapes cannot be multiplied"):
        fit(nn.Linear(5, 3), cross_entropy, sgd, batches)


def test_where_torch_only_warns_each_operation_is_logged_once(plain, batches, valid, sgd, mode, caplog, recwarn):
    """Other warnings are shown as before, in the run and after it."""
    class Warns:
        @hookimpl
        def train_end(self):
            warnings.warn("of another kind", UserWarning, stacklevel=2)

    mode("warn")
    show = warnings.showwarning
    run = fit(Puts(plain, "backward"), cross_entropy, sgd, batches, valid, epochs=2, plugins=[PutsInPlugin(), Warns()])
    warnings.warn("Flash Attention defaults to a non-deterministic algorithm.", stacklevel=2)
    assert run.step == 16
    assert caplog.messages == ["put_ has no deterministic form, so another run may differ from this one"]
    assert [re.match(r"\w+ \w+", str(warning.message))[0] for warning in recwarn] == ["of another", "Flash Attention"]
    assert warnings.showwarning is show


def test_attention_that_is_not_deterministic_is_logged_too(plain, batches, sgd, mode, caplog):
    class Warns:
        @hookimpl
        def after_step(self):
            warnings.warn("Memory Efficient attention defaults to a non-deterministic algorithm. To explicitly enable", stacklevel=2)

    mode("warn")
    fit(plain, cross_entropy, sgd, batches, plugins=[Warns()])
    assert caplog.messages == ["Memory Efficient attention has no deterministic form, so another run may differ from this one"]
