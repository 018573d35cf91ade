"""freeze against requires_grad, eval() and add_param_group by hand."""
from functools import partial
from itertools import permutations

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": partial(torch.optim.Adam, lr=1e-2, weight_decay=1e-2),
    "fused sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True, fused=True),
}
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
FREEZE, LAYERS = "loopctl.plugins.freeze:Freeze", "loopctl.plugins.layerwise_lr:LayerwiseLr"
NEVER = 10**6


def by_hand(model, optimizer, batches, epochs, thaws):
    """Train; the parts of `model` in `thaws` are frozen until that step, and join the optimizer then."""
    torch.manual_seed(1)
    parts = dict(model.named_children())
    for part in thaws:
        parts[part].requires_grad_(False)
    optimizer, step = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad]), 0
    for _ in range(epochs):
        for input, target in batches:
            for part, start in thaws.items():
                if step == start:
                    optimizer.add_param_group({"params": list(parts[part].requires_grad_().parameters())})
            model.train()
            for part, start in thaws.items():
                if step < start:
                    parts[part].eval()
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            optimizer.step()
            step += 1


class Watch:
    """Notes at each step what trains, which modules are in training mode, and the rates."""

    def __init__(self):
        self.trains, self.modes, self.rates = [], [], []

    @hookimpl
    def after_step(self, run: Run):
        self.trains.append({name for name, parameter in run.model.named_parameters() if parameter.requires_grad})
        self.modes.append({name for name, module in run.model.named_modules() if module.training})
        self.rates.append([group["lr"] for group in run.optimizer.param_groups])


@optimizers
@pytest.mark.parametrize("specs", [
    ["patterns=0.*,1.*"], ["patterns=[01].*"], [r"patterns=/^[01]\./"], ["patterns=0,1"], ["patterns=[01]"], ["keep=4.*"],
    ["keep=4"], ["keep=/4/"], ["patterns=0", "patterns=1"], ["patterns=0,1", "patterns=1"],
], ids=" ".join)
def test_for_the_whole_run(net, batches, valid, clone, same, optimizer, specs):
    other, before = clone(net), clone(net)
    fit(net, cross_entropy, optimizer, batches, valid, epochs=2, eval_every=3, plugins=[f"{FREEZE}:{spec}" for spec in specs], seed=1)
    by_hand(other, optimizer, batches, 2, {"0": NEVER, "1": NEVER})
    same(net, other)
    same(net[:2], before[:2])
    assert [name for name, parameter in net.named_parameters() if parameter.requires_grad] == ["4.weight", "4.bias"]


@optimizers
@pytest.mark.parametrize(("specs", "thaws"), [
    (["patterns=0,1,until=2"], {"0": 16, "1": 16}),
    (["patterns=0,1,until=1ep"], {"0": 8, "1": 8}),
    (["keep=4,until=11st"], {"0": 11, "1": 11}),
    (["patterns=1,until=1.5ep"], {"1": 12}),
    (["patterns=0,1,until=55%"], {"0": 18, "1": 18}),                              # 17.6 steps
    (["patterns=0,1,until=9ep"], {"0": NEVER, "1": NEVER}),
    (["keep=4,gradual=1"], {"1": 8, "0": 16}),
    (["keep=4,gradual=5st"], {"1": 5, "0": 10}),
    (["keep=4,until=3st,gradual=1ep"], {"1": 3, "0": 11}),
    (["patterns=0,until=1ep", "patterns=1,until=13st"], {"0": 8, "1": 13}),
    (["patterns=0,1,until=1ep", "patterns=0,until=20st"], {"0": 20, "1": 8}),      # both hold 0: the longer counts
    (["patterns=0,1,until=1ep", "patterns=0"], {"0": NEVER, "1": 8}),
    (["patterns=0,1,gradual=1ep", "patterns=1,until=2ep"], {"0": 16, "1": 16}),
], ids=str)
def test_thawing_equals_adding_a_group_by_hand(net, batches, valid, clone, same, optimizer, specs, thaws):
    start = net
    for order in permutations(specs):
        net, other = clone(start), clone(start)
        fit(net, cross_entropy, optimizer, batches, valid, epochs=4, plugins=[f"{FREEZE}:{spec}" for spec in order], seed=1)
        by_hand(other, optimizer, batches, 4, thaws)
        same(net, other)


def test_the_length_counts_batches_consumed_with_accumulation_too(net, batches):
    watch = Watch()
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, epochs=3, plugins=[f"{FREEZE}:patterns=0,until=1ep", "accumulate:every=3", watch])
    assert ["0.weight" in names for names in watch.trains] == [False] * 3 + [True] * 6


def test_a_length_that_is_whole_but_for_rounding_is_not_one_step_late(net, batches):
    watch = Watch()
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches[:1] * 25, epochs=4, plugins=[f"{FREEZE}:patterns=0,until=7%", watch])
    assert 7 / 100 * 100 > 7
    assert ["0.weight" in names for names in watch.trains].index(True) == 7


def deep():
    part = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8))
    return nn.Sequential(part, nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_a_part_frozen_whole_is_in_eval_mode_with_all_that_is_in_it(batches, valid):
    model, watch = deep(), Watch()
    means = model[0][1].running_mean.clone(), model[1].running_mean.clone()
    fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, valid, eval_every=2, plugins=[f"{FREEZE}:patterns=0,1.bias,until=5st", watch])
    everything = {name for name, _ in model.named_modules()}
    assert watch.modes[:5] == [{"", "1", "2", "3"}] * 5          # 1 is frozen only in part
    assert watch.modes[5:] == [everything] * 3
    assert not torch.equal(model[0][1].running_mean, means[0])   # it moved after the thaw
    model = deep()
    fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, valid, eval_every=2, plugins=[f"{FREEZE}:patterns=0,1.bias"])
    assert torch.equal(model[0][1].running_mean, means[0])
    assert not torch.equal(model[1].running_mean, means[1])


@pytest.mark.parametrize(("spec", "until"), [("patterns=0,until=3st", "patterns=1,until=5st"), ("patterns=1,until=5st", "patterns=0,until=3st")])
def test_two_in_one_part_wake_it_bit_by_bit(batches, spec, until):
    model, watch = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.BatchNorm1d(6)), nn.Linear(6, 3)), Watch()
    model = nn.ModuleDict({"body": model[:2], "head": model[2]})
    model.forward = lambda x: model["head"](model["body"](x))
    specs = [f"{FREEZE}:{text.replace('patterns=', 'patterns=body.')}" for text in (spec, until)]
    fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[*specs, watch])
    assert watch.modes[:3] == [{"", "head"}] * 3
    assert watch.modes[3:5] == [{"", "head", "body", "body.0", "body.0.0"}] * 2
    assert watch.modes[5:] == [{"", "head", "body", "body.0", "body.0.0", "body.1", "body.1.0"}] * 3


def test_gradual_takes_the_parts_in_which_the_frozen_differ(batches):
    model, watch = deep(), Watch()
    fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:patterns=0,gradual=2st", watch])
    assert [sorted(names - {"1.weight", "1.bias", "3.weight", "3.bias"}) for names in watch.trains[1::2]] == [
        [], ["0.4.bias", "0.4.weight"], ["0.3.bias", "0.3.weight", "0.4.bias", "0.4.weight"],
        ["0.0.bias", "0.0.weight", "0.3.bias", "0.3.weight", "0.4.bias", "0.4.weight"]]


def test_gradual_thaws_a_single_layer_as_one(net, batches):
    watch = Watch()
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:patterns=0,gradual=3st", watch])
    assert [{"0.weight", "0.bias"} & names for names in watch.trains] == [set()] * 3 + [{"0.weight", "0.bias"}] * 5


def test_what_was_frozen_before_stays_so(net, batches, clone):
    net[0].weight.requires_grad_(False)
    before, watch = clone(net), Watch()
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, epochs=2, plugins=[f"{FREEZE}:patterns=0,1,until=1ep", watch])
    assert torch.equal(net[0].weight, before[0].weight)
    assert not torch.equal(net[0].bias, before[0].bias)
    assert watch.trains[-1] == {"0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}


def test_a_weight_that_two_parts_share_is_known_by_both_names(batches):
    def model():
        torch.manual_seed(0)
        tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
        tied[1].weight = tied[0].weight
        return tied

    kept, frozen = model(), model()
    fit(kept, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:keep=1,2"])
    fit(frozen, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:patterns=1.weight"])
    assert not torch.equal(kept[0].weight, model()[0].weight)
    assert torch.equal(frozen[0].weight, model()[0].weight)
    assert torch.equal(kept[0].bias, model()[0].bias)


@pytest.mark.parametrize("spec", ["patterns=0,1", "patterns=0,1,until=5ep"])
def test_a_gradient_from_before_the_run_counts_for_nothing(net, batches, clone, spec):
    net(batches[0][0]).sum().backward()
    other = clone(net)
    other.zero_grad()
    norms = [fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, seed=1, plugins=[f"{FREEZE}:{spec}", "clip"]).history[0]["grad_norm"]
             for model in (net, other)]
    assert norms[0] == norms[1]


def test_an_optimizer_of_ones_own_goes_too(net, batches, clone, same):
    other, optimizer = clone(net), OPTIMIZERS["adam"]
    fit(net, cross_entropy, optimizer(net.parameters()), batches, epochs=2, plugins=[f"{FREEZE}:patterns=0,1,until=5st"], seed=1)
    by_hand(other, optimizer, batches, 2, {"0": 5, "1": 5})
    same(net, other)


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_with_rates_by_layer_and_schedules_in_any_order(net, batches, clone, same, order):
    """Every group has its own rate at every step, before and after its parameters join."""
    plugins = [f"{FREEZE}:keep=4,gradual=5st", f"{LAYERS}:rates=0=0.02,1=x0.5", "cosine:by=step,eta_min=0.001", "warmup:length=6"]
    other, watch, alone = clone(net), Watch(), Watch()
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, epochs=2, seed=1, plugins=[plugins[i] for i in order] + [watch])
    for lr in (0.1, 0.02, 0.05):     # what the schedules make of each rate when it is the only one
        fit(clone(net), cross_entropy, partial(torch.optim.SGD, lr=lr), batches, epochs=2, plugins=[*plugins[2:], alone])
    expected = [[*alone.rates[step], *alone.rates[16 + step], *alone.rates[32 + step]] for step in range(16)]
    assert watch.rates == [pytest.approx(rates, rel=1e-12) for rates in expected]   # the order of two factors rounds
    expected = watch.rates
    optimizer = OPTIMIZERS["sgd"]([{"params": other[4].parameters()}])
    other[0].requires_grad_(False)
    other[1].requires_grad_(False)
    torch.manual_seed(1)
    for step, (input, target) in enumerate(batches * 2):
        if step in (5, 10):
            part = 1 if step == 5 else 0
            optimizer.add_param_group({"params": other[part].requires_grad_().parameters()})
        other.train()
        for part, start in ((1, 5), (0, 10)):
            other[part].train(step >= start)
        for group, lr in zip(optimizer.param_groups, (expected[step][0], expected[step][2], expected[step][1]), strict=False):
            group["lr"] = lr
        optimizer.zero_grad()
        cross_entropy(other(input), target).backward()
        optimizer.step()
    same(net, other)


@optimizers
@pytest.mark.parametrize("spec", ["patterns=0,1", "keep=4,until=2ep", "keep=4,until=28st", "keep=4,until=1ep,gradual=17st"])
@pytest.mark.parametrize("saved", [1, 3])
def test_e5_a_resumed_run_equals_one_that_never_ended(net, batches, clone, same, tmp_path, optimizer, spec, saved):
    plugins = [f"{FREEZE}:{spec}", f"{LAYERS}:decay=0.5,no_decay=true", "warmup:length=50%", "checkpoint"]
    whole, half, other = clone(net), clone(net), clone(net)
    undisturbed = fit(whole, cross_entropy, optimizer, batches, batches, epochs=5, plugins=plugins, seed=1, out=tmp_path / "whole")

    class Interrupt:
        @hookimpl
        def epoch_start(self, run: Run):
            if run.epoch == saved:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(half, cross_entropy, optimizer, batches, batches, epochs=5, plugins=[*plugins, Interrupt()], seed=1, out=tmp_path)
    watch = Watch()
    resumed = fit(other, cross_entropy, optimizer, batches, batches, epochs=5, plugins=[*plugins, watch], seed=1, out=tmp_path, resume=tmp_path)
    same(whole, other)
    assert resumed.history == undisturbed.history
    assert len(watch.trains) == (5 - saved) * 8
    assert watch.trains[-1] == {name for name, parameter in whole.named_parameters() if parameter.requires_grad}


def test_it_follows_a_run_that_is_set_back(batches):
    class SetBack:
        @hookimpl
        def safe_point(self, run: Run):
            if run.step == 6:
                run.counters.attempts = 1

    model, watch = deep(), Watch()
    fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:patterns=0,until=3st", SetBack(), watch])
    assert ["0.0.weight" in names for names in watch.trains] == [False] * 3 + [True] * 3 + [False] * 2
    assert ["0.2" in names for names in watch.modes] == [False] * 3 + [True] * 3 + [False] * 2


def test_one_instance_does_for_several_runs(net, plain, batches, clone, same):
    from loopctl.plugins.freeze import Freeze
    plugin, other = Freeze(["0"], until="3st"), clone(net)
    fit(plain, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[plugin])
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[plugin], seed=1)
    by_hand(other, OPTIMIZERS["sgd"], batches, 1, {"0": 3})
    same(net, other)


@pytest.mark.parametrize(("specs", "message"), [
    (["patterns=conv9.*"], "freeze: no parameter matches 'conv9.*'; the model's parameters start with 0, 1, 4"),
    (["keep=9"], "freeze: no parameter matches '9'; the model's parameters start with 0, 1, 4"),
    (["patterns=0", "patterns=/^x/"], "freeze.2: no parameter matches '/^x/'; the model's parameters start with 0, 1, 4"),
    (["patterns=/(/"], "freeze: '/(/' is not a regular expression (missing ), unterminated subpattern at position 0)"),
    (["patterns=0,keep=1"], "freeze: takes patterns, what to freeze, or keep, what not to freeze: one of the two"),
    (["until=1ep"], "freeze: takes patterns, what to freeze, or keep, what not to freeze: one of the two"),
    (["patterns=0,until=soon"], "freeze: until takes a length, not 'soon': write 30, 5ep, 500st or 10%"),
    (["patterns=*,until=1ep"], "freeze: nothing is left to train at the start; keep at least the last part trainable"),
    (["keep=4", "patterns=4,until=1ep"], "freeze: nothing is left to train at the start; keep at least the last part trainable"),
    (["patterns=*"], "nothing is left to train: the model has no parameter with requires_grad"),
], ids=str)
def test_what_cannot_be_is_refused_in_one_line(net, batches, specs, message):
    with pytest.raises(UsageError) as refused:
        fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:{spec}" for spec in specs])
    assert str(refused.value) == message


def test_fused_sgd_with_dampening_is_refused(net, batches):
    with pytest.raises(UsageError, match="^freeze: torch's fused SGD cannot begin with a parameter later where there is dampening; "):
        fit(net, cross_entropy, partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, fused=True), batches,
            plugins=["freeze:patterns=0,until=1ep"])


def test_a_text_in_place_of_a_list_is_refused():
    from loopctl.plugins.freeze import Freeze
    with pytest.raises(ValueError, match=r"patterns takes a list, such as \['conv1.\*'\], not 'conv1'"):
        Freeze(patterns="conv1")


def test_a_model_of_many_parts_is_not_listed_whole(batches):
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(12)])
    with pytest.raises(UsageError, match=r"start with 0, 1, 2, 3, 4, 5, 6, 7 \.\.\.$"):
        fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:patterns=fc"])
