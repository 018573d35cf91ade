"""Optimizer steps without torch's wrappers: equal bit for bit, and with the wrappers where something needs them."""
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
def test_fast_step_equals_step_for_every_optimizer_class(plain, clone, same, batches, kind, options):
    one, other = clone(plain), clone(plain)
    for model in (one, other):
        for parameter in model.parameters():
            parameter.requires_grad_(kind.__name__ != "Muon" or parameter.ndim == 2)      # Muon takes matrices only
    usual, fast = (kind([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01, **options)
                    for model in (one, other))

    def compute_loss(model, batch):
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        return loss.detach()

    for batch in batches:
        usual.zero_grad()
        expected = usual.step(partial(compute_loss, one, batch))
        zero_grad(fast)
        assert torch.equal(fast_step(fast, partial(compute_loss, other, batch)), expected)
    same(one, other)


@pytest.fixture
def optimizer(plain):
    return torch.optim.SGD(plain.parameters(), lr=0.1)


def closure():
    return torch.zeros(())


def test_hooks_of_the_optimizer_are_called_after_the_closure(optimizer):
    """So the gradients exist when a pre-hook is called."""
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


def test_other_wrappers_around_step_are_called(optimizer, monkeypatch):
    """On the class, or on the instance, where torch's schedulers put one."""
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


def test_an_optimizer_class_outside_of_torch_is_given_the_closure(plain):
    class OwnOptimizer(torch.optim.SGD):
        def step(self, closure):
            self.given = closure
            return closure()

        def zero_grad(self):
            self.cleared = True

    optimizer, losses = OwnOptimizer(plain.parameters(), lr=0.1), [torch.ones(()), torch.zeros(())]
    zero_grad(optimizer)
    assert fast_step(optimizer, lambda: losses.pop()) == 0
    assert optimizer.cleared
    assert optimizer.given() == 1       # it was called once in the step


@pytest.mark.parametrize("differentiable", [False, True])
def test_grad_mode_is_on_in_the_step_only_with_differentiable(plain, monkeypatch, differentiable):
    seen, inner = [], torch.optim.SGD._init_group
    monkeypatch.setattr(torch.optim.SGD, "_init_group", lambda *args: seen.append(torch.is_grad_enabled()) or inner(*args))
    fast_step(torch.optim.SGD(plain.parameters(), lr=0.1, differentiable=differentiable), closure)
    assert seen == [differentiable]


def test_the_profiler_records_the_step(optimizer):
    with torch.profiler.profile() as profiler:
        fast_step(optimizer, closure)
    assert "Optimizer.step#SGD.step" in {event.name for event in profiler.events()}


def test_the_wrappers_are_restored_after_the_block():
    before = dict(vars(torch.optim.Optimizer))
    with without_dynamo_wrappers():
        assert not hasattr(torch.optim.Optimizer.add_param_group, "__wrapped__")
    with pytest.raises(ZeroDivisionError), without_dynamo_wrappers():
        1 / 0       # noqa: B018
    assert dict(vars(torch.optim.Optimizer)) == before


def test_zero_grad_sets_gradients_to_none(plain, batches):
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain(batches[0][0]).sum().backward()
    zero_grad(optimizer)
    assert [parameter.grad for parameter in plain.parameters()] == [None] * 4


def test_a_run_does_not_import_the_compiler(tmp_path):
    """Importing torch._dynamo takes a second or two. `fit` with checkpoints, a resume and `loopctl run` do not need it."""
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
