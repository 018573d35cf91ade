"""NumPy's numbers as arguments of `fit` and as options of plugins are the numbers that they are."""
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from loopctl import UsageError, fit, hookimpl
from loopctl.composition.compose import compose
from loopctl.composition.options import to_spec
from loopctl.plugins.accumulate import Accumulate
from loopctl.plugins.clip import Clip
from loopctl.plugins.cosine import Cosine
from loopctl.plugins.cyclic import Cyclic
from loopctl.plugins.ema import Ema
from loopctl.plugins.layerwise_lr import LayerwiseLr
from loopctl.plugins.multistep import Multistep
from loopctl.plugins.torch_scheduler import TorchScheduler

cross_entropy = nn.CrossEntropyLoss()


def kinds(value):
    """The types of a value and of everything in it."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    inside = set().union(*map(kinds, value)) if isinstance(value, list | tuple) else set()
    return {type(value)} | inside


@pytest.mark.fault(row="A9", given="epochs, max_steps, eval_every, steps_per_epoch and seed as numpy.int64 and numpy.uint8", right="the run of the same plain numbers, bit for bit")
def test_numbers_of_fit_from_numpy(net, batches, valid, sgd, clone, same):
    other = clone(net)
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=np.int64(2), max_steps=np.uint8(9), eval_every=np.int16(3), steps_per_epoch=np.int32(6), seed=np.int64(5))
    plain = fit(other, cross_entropy, sgd, batches, valid, epochs=2, max_steps=9, eval_every=3, steps_per_epoch=6, seed=5)
    same(net, other)
    assert run.history == plain.history
    assert [type(value) for value in (run.epochs, run.max_steps, run.eval_every, run.steps_per_epoch)] == [int] * 4


@pytest.mark.fault(row="A9", given="Clip(max_norm=numpy.float32(0.1))", right="the run with that number, and a plain number in the specs")
def test_an_option_from_numpy(net, batches, sgd, clone, same, tmp_path):
    other, clip = clone(net), Clip(max_norm=np.float32(0.1))
    fit(net, cross_entropy, sgd, batches, plugins=[clip, "checkpoint"], seed=1, out=tmp_path)
    fit(other, cross_entropy, sgd, batches, plugins=[Clip(max_norm=float(np.float32(0.1)))], seed=1)
    same(net, other)
    assert type(clip.max_norm) is float
    assert to_spec("clip", clip) == "clip:max_norm=0.10000000149011612,norm_type=2.0,value=none,auto=none"
    (file,) = (tmp_path / "checkpoints").glob("step-*.pt")
    saved = torch.load(file, weights_only=True)
    assert not {kind for kind in kinds(saved["config"]) if kind.__module__ == "numpy"}


@dataclass(eq=False)
class Anything:
    flag: bool = False
    rate: float = 0.0
    upper: float = inf
    pair: tuple[int, int] = (0, 0)
    any: Any = None

    @hookimpl
    def before_step(self):
        pass


@dataclass(frozen=True, eq=False)
class Frozen:
    rate: float = 0.0

    @hookimpl
    def before_step(self):
        pass


@pytest.mark.parametrize(("plugin", "option", "value"), [
    (Accumulate(every=np.int64(2)), "every", 2), (Cosine(t_max=np.float64(2.5)), "t_max", 2.5), (Cosine(t_max=np.int32(3)), "t_max", 3),
    (Ema(decay=np.float16(0.5)), "decay", 0.5), (Multistep(milestones=[np.int64(1), 2]), "milestones", [1, 2]),
    (Multistep(milestones=list(np.arange(1, 3))), "milestones", [1, 2]), (Cyclic(base_lr=np.float64(0.1), max_lr=[np.float32(0.5)]), "max_lr", [0.5]),
    (LayerwiseLr(rates={"0": np.float32(0.5)}), "rates", {"0": 0.5}),
    (TorchScheduler(cls=torch.optim.lr_scheduler.StepLR, options={"step_size": np.int64(2), "gamma": np.float32(0.5)}), "options", {"step_size": 2, "gamma": 0.5}),
    (Anything(flag=np.bool_(True)), "flag", True), (Anything(rate=np.longdouble(0.5)), "rate", 0.5), (Anything(upper=np.float32(np.inf)), "upper", inf),
    (Anything(rate=np.array(0.5)), "rate", 0.5), (Anything(pair=(np.int64(1), np.uint8(2))), "pair", (1, 2)), (Anything(any=[{"a": (np.int8(1),)}]), "any", [{"a": (1,)}]),
], ids=lambda value: type(value).__name__ if hasattr(value, "__dataclass_fields__") else str(value))
@pytest.mark.fault(row="A", given="options as numbers, booleans and 0-d arrays of numpy, also in lists, tuples and dicts", right="plain numbers")
def test_options_from_numpy_become_plain(plugin, option, value):
    compose([plugin])
    found = getattr(plugin, option)
    assert found == value
    assert kinds(found) == kinds(value)
    assert "np." not in to_spec("it", plugin)


@pytest.mark.fault(row="A", given="a frozen dataclass with a number of numpy", right="a plain number")
def test_an_option_of_a_frozen_plugin():
    plugin = Frozen(rate=np.float32(0.5))
    compose([plugin])
    assert type(plugin.rate) is float


@pytest.mark.fault(row="A", given="an option that is a list of plain numbers", right="the same list, not a copy")
def test_a_list_without_numbers_of_numpy_is_kept():
    milestones = [1, 2]
    plugin = Multistep(milestones=milestones)
    compose([plugin])
    assert plugin.milestones is milestones


@pytest.mark.parametrize(("arguments", "message"), [
    ({"epochs": np.float64(2.0)}, "epochs is 2.0; use a whole number"), ({"max_steps": np.int64(0)}, "max_steps is 0; use a whole number"),
    ({"seed": np.float32(1.5)}, "seed is 1.5; use a whole number"), ({"seed": "x"}, "seed is 'x'; use a whole number")])
@pytest.mark.fault(row="A", given="numbers of numpy, or a seed, of a wrong kind", right="refused by name, as plain numbers are")
def test_wrong_numbers_are_refused(arguments, message, net, batches, sgd):
    with pytest.raises(UsageError, match=message):
        fit(net, cross_entropy, sgd, batches, **arguments)


@pytest.mark.parametrize("plugin", [Accumulate(every=np.float64(2.0)), Clip(max_norm=np.bool_(True)), Clip(max_norm=np.array([1.0]))])
@pytest.mark.fault(row="A", given="a float, a boolean or an array of numpy for an option of another type", right="refused by name, as plain values are")
def test_options_of_a_wrong_type_are_refused(plugin):
    with pytest.raises(UsageError, match=r"^(accumulate|clip): (every takes a whole number or a list.*|max_norm takes a number), not"):
        compose([plugin])


@pytest.mark.fault(row="A", given="a factory of the optimizer with lr=numpy.float32(0.1)", right="the update by hand with that rate")
def test_a_rate_from_numpy(plain, batches, clone, same):
    by_hand = clone(plain)
    fit(plain, cross_entropy, partial(torch.optim.SGD, lr=np.float32(0.1)), batches)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=float(np.float32(0.1)))
    for inputs, target in batches:
        optimizer.zero_grad()
        cross_entropy(by_hand(inputs), target).backward()
        optimizer.step()
    same(plain, by_hand)
