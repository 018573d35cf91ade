"""Updates without torch's layers around them: the same bits, and whoever asked for a layer still gets it."""
import functools
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from loopctl.optim.fast_step import fast_step, without_dynamo_wrappers, zero_grad

CLASSES = sorted((kind for kind in vars(torch.optim).values() if isinstance(kind, type)
                  and kind not in (torch.optim.Optimizer, torch.optim.SparseAdam, torch.optim.LBFGS)), key=lambda kind: kind.__name__)
MORE = {"SGD": [{"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "fused": True}, {"foreach": True, "weight_decay": 0.1}],
        "Adam": [{"amsgrad": True}, {"fused": True}, {"foreach": True}], "RMSprop": [{"centered": True, "momentum": 0.9}]}


@pytest.mark.parametrize(("kind", "options"), [(kind, options) for kind in CLASSES for options in [{}, *MORE.get(kind.__name__, [])]],
                         ids=lambda value: ",".join(value) if isinstance(value, dict) else value.__name__)
def test_every_class_bit_for_bit(plain, clone, same, batches, kind, options):
    one, other = clone(plain), clone(plain)
    for model in (one, other):
        for parameter in model.parameters():
            parameter.requires_grad_(kind.__name__ != "Muon" or parameter.ndim == 2)      # which takes matrices
    theirs, ours = (kind([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01, **options)
                    for model in (one, other))

    def look(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss.detach()

    for batch in batches:
        theirs.zero_grad()
        expected = theirs.step(partial(look, one, batch))
        zero_grad(ours)
        assert torch.equal(fast_step(ours, partial(look, other, batch)), expected)
    same(one, other)


@pytest.fixture
def optimizer(plain):
    return torch.optim.SGD(plain.parameters(), lr=0.1)


def closure():
    return torch.zeros(())


def test_hooks_are_called(optimizer):
    """Before the step the gradients are there, as hooks expect."""
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    handle = optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    fast_step(optimizer, lambda: seen.append("gradients"))
    assert seen == ["gradients", "before", "after"]
    handle.remove()
    fast_step(optimizer, closure)
    assert seen[3:] == ["before"]


@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_hooks_for_all_optimizers_are_called(optimizer, register):
    seen = []
    handle = register(lambda *_: seen.append("hook"))
    try:
        fast_step(optimizer, closure)
    finally:
        handle.remove()
    fast_step(optimizer, closure)
    assert seen == ["hook"]


def test_wrappers_are_kept(optimizer, monkeypatch):
    """Around this optimizer's step, as schedulers of torch put one, or around the class's."""
    seen, inner = [], torch.optim.SGD.step

    @functools.wraps(inner)
    def outer(self, *args):
        seen.append("class")
        return inner(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", outer)
    fast_step(optimizer, closure)
    optimizer.step = lambda: seen.append("instance")
    fast_step(optimizer, closure)
    assert seen == ["class", "instance"]


def test_an_optimizer_of_ones_own_is_given_the_closure(plain):
    class Mine(torch.optim.SGD):
        def step(self, closure):
            self.given = closure
            return closure()

        def zero_grad(self):
            self.cleared = True

    mine = Mine(plain.parameters(), lr=0.1)
    zero_grad(mine)
    fast_step(mine, closure)
    assert mine.cleared
    assert mine.given is closure


@pytest.mark.parametrize("differentiable", [False, True])
def test_the_update_is_differentiated_where_that_is_asked_for(plain, monkeypatch, differentiable):
    seen, inner = [], torch.optim.SGD._init_group
    monkeypatch.setattr(torch.optim.SGD, "_init_group", lambda *args: seen.append(torch.is_grad_enabled()) or inner(*args))
    fast_step(torch.optim.SGD(plain.parameters(), lr=0.1, differentiable=differentiable), closure)
    assert seen == [differentiable]


def test_a_profiler_sees_the_step(optimizer):
    with torch.profiler.profile() as profiler:
        fast_step(optimizer, closure)
    assert "Optimizer.step#SGD.step" in {event.name for event in profiler.events()}


def test_the_layers_are_back_afterwards():
    before = dict(vars(torch.optim.Optimizer))
    with without_dynamo_wrappers():
        assert not hasattr(torch.optim.Optimizer.add_param_group, "__wrapped__")
    with pytest.raises(ZeroDivisionError), without_dynamo_wrappers():
        1 / 0       # noqa: B018
    assert dict(vars(torch.optim.Optimizer)) == before


def test_gradients_are_gone(plain, batches):
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(batches[0][0]).sum().backward()
    zero_grad(optimizer)
    assert [parameter.grad for parameter in plain.parameters()] == [None] * 4


def test_the_compiler_is_not_imported_for_a_run(tmp_path):
    """It takes a second or two. A fit, a checkpoint and going on with it do without; so does `loopctl run`."""
    code = """
import sys, torch
from functools import partial
from loopctl import fit
batches = [(torch.randn(4, 6), torch.randint(3, (4,)))] * 3
for epochs, resume in ((1, None), (2, ".")):
    fit(torch.nn.Linear(6, 3), torch.nn.CrossEntropyLoss(), partial(torch.optim.AdamW, lr=0.1), batches, batches, epochs=epochs,
        plugins=["amp:dtype=bfloat16", "accumulate:every=2", "clip", "cosine", "ema", "checkpoint"], resume=resume)
assert "torch._dynamo" not in sys.modules
from loopctl.cli import main
sys.argv = ["loopctl", "run", "--epochs", "1", "--model", "linear"]
try:
    main()
finally:
    assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
