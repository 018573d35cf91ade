"""The plugin freeze, compared with a plain loop that uses requires_grad, eval() and add_param_group."""
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


def by_hand(model, optimizer, batches, epochs, starts):
    """Train; the parts of `model` in `starts` are frozen until the given step, and are added to the optimizer then."""
    torch.manual_seed(1)
    parts = dict(model.named_children())
    for part in starts:
        parts[part].requires_grad_(False)
    optimizer, step = optimizer([parameter for parameter in model.parameters() if parameter.requires_grad]), 0
    for _ in range(epochs):
        for input, target in batches:
            for part, start in starts.items():
                if step == start:
                    optimizer.add_param_group({"params": list(parts[part].requires_grad_().parameters())})
            model.train()
            for part, start in starts.items():
                if step < start:
                    parts[part].eval()
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            optimizer.step()
            step += 1


class Recorder:
    """Records at each step the trainable parameters, the modules in training mode, and the learning rates."""

    def __init__(self):
        self.trainable, self.modes, self.rates = [], [], []

    @hookimpl
    def after_step(self, run: Run):
        self.trainable.append({name for name, parameter in run.model.named_parameters() if parameter.requires_grad})
        self.modes.append({name for name, module in run.model.named_modules() if module.training})
        self.rates.append([group["lr"] for group in run.optimizer.param_groups])


@pytest.mark.compares(use="freeze", technique="freezing, with frozen modules in evaluation mode",
                      source="the loop by hand", tolerance="to the bit")
@optimizers
@pytest.mark.parametrize("specs", [
    ["patterns=0.*,1.*"], ["patterns=[01].*"], [r"patterns=/^[01]\./"], ["patterns=0,1"], ["patterns=[01]"], ["keep=4.*"],
    ["keep=4"], ["keep=/4/"], ["patterns=0", "patterns=1"], ["patterns=0,1", "patterns=1"],
], ids=" ".join)
def test_freezing_for_the_whole_run_equals_a_plain_loop(net, batches, valid, clone, same, optimizer, specs):
    other, before = clone(net), clone(net)
    fit(net, cross_entropy, optimizer, batches, valid, epochs=2, eval_every=3, plugins=[f"{FREEZE}:{spec}" for spec in specs], seed=1)
    by_hand(other, optimizer, batches, 2, {"0": NEVER, "1": NEVER})
    same(net, other)
    same(net[:2], before[:2])
    assert [name for name, parameter in net.named_parameters() if parameter.requires_grad] == ["4.weight", "4.bias"]


@pytest.mark.compares(use="freeze:gradual", technique="gradual unfreezing, arXiv:1801.06146",
                      source="torch.optim.Optimizer.add_param_group", tolerance="to the bit")
@optimizers
@pytest.mark.parametrize(("specs", "starts"), [
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
    (["patterns=0,1,until=1ep", "patterns=0,until=20st"], {"0": 20, "1": 8}),      # both freeze 0: the later end counts
    (["patterns=0,1,until=1ep", "patterns=0"], {"0": NEVER, "1": 8}),
    (["patterns=0,1,gradual=1ep", "patterns=1,until=2ep"], {"0": 16, "1": 16}),
], ids=str)
def test_unfreezing_equals_adding_a_parameter_group(net, batches, valid, clone, same, optimizer, specs, starts):
    initial = net
    for order in permutations(specs):
        net, other = clone(initial), clone(initial)
        fit(net, cross_entropy, optimizer, batches, valid, epochs=4, plugins=[f"{FREEZE}:{spec}" for spec in order], seed=1)
        by_hand(other, optimizer, batches, 4, starts)
        same(net, other)


def freeze_by_hand(model, optimizer, batches, epochs, spans):
    """Train; each part of `model` in `spans` is frozen from the first step of its span to that before the second."""
    torch.manual_seed(1)
    parts = dict(model.named_children())
    optimizer, step = optimizer(model.parameters()), 0
    for _ in range(epochs):
        for input, target in batches:
            model.train()
            optimizer.zero_grad()
            for part, (start, end) in spans.items():
                parts[part].requires_grad_(not start <= step < end)
                parts[part].train(not start <= step < end)
            cross_entropy(model(input), target).backward()
            optimizer.step()
            step += 1


@optimizers
@pytest.mark.parametrize(("specs", "spans"), [
    (["patterns=0,1,start=2"], {"0": (16, NEVER), "1": (16, NEVER)}),
    (["patterns=0,1,start=11st"], {"0": (11, NEVER), "1": (11, NEVER)}),
    (["keep=4,start=7%"], {"0": (3, NEVER), "1": (3, NEVER)}),                     # 2.24 steps
    (["patterns=1,start=3st,until=2ep"], {"1": (3, 16)}),
    (["keep=4,start=5st,until=1ep,gradual=1ep"], {"1": (5, 8), "0": (5, 16)}),
    (["keep=4,start=1ep,gradual=5st"], {"1": (8, 13), "0": (8, 18)}),
    (["patterns=0,start=4st", "patterns=1,start=1ep,until=20st"], {"0": (4, NEVER), "1": (8, 20)}),
    (["keep=0,1,start=5st", "patterns=0,1,start=3st,until=5st"], {"0": (3, 5), "1": (3, 5), "4": (5, NEVER)}),
], ids=str)
@pytest.mark.compares(use="freeze:start", technique="parts frozen from later on", source="the loop by hand", tolerance="to the bit")
def test_freezing_from_later_on_equals_a_plain_loop(net, batches, valid, clone, same, optimizer, specs, spans):
    other = clone(net)
    fit(net, cross_entropy, optimizer, batches, valid, epochs=4, plugins=[f"{FREEZE}:{spec}" for spec in specs], seed=1)
    freeze_by_hand(other, optimizer, batches, 4, spans)
    same(net, other)


def test_durations_count_batches_with_accumulation(net, batches):
    recorder = Recorder()
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, epochs=3, plugins=[f"{FREEZE}:patterns=0,until=1ep", "accumulate:every=3", recorder])
    assert ["0.weight" in names for names in recorder.trainable] == [False] * 3 + [True] * 6


def test_rounding_errors_of_a_duration_do_not_delay_it_by_a_step(net, batches):
    recorder = Recorder()
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches[:1] * 25, epochs=4, plugins=[f"{FREEZE}:patterns=0,until=7%", recorder])
    assert 7 / 100 * 100 > 7
    assert ["0.weight" in names for names in recorder.trainable].index(True) == 7


def nested_model():
    part = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=False), nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8))
    return nn.Sequential(part, nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def test_a_module_with_only_frozen_parameters_is_in_eval_mode_with_its_submodules(batches, valid):
    model, recorder = nested_model(), Recorder()
    means = model[0][1].running_mean.clone(), model[1].running_mean.clone()
    fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, valid, eval_every=2, plugins=[f"{FREEZE}:patterns=0,1.bias,until=5st", recorder])
    everything = {name for name, _ in model.named_modules()}
    assert recorder.modes[:5] == [{"", "1", "2", "3"}] * 5          # 1 is partly frozen
    assert recorder.modes[5:] == [everything] * 3
    assert not torch.equal(model[0][1].running_mean, means[0])   # it changed after unfreezing
    model = nested_model()
    fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, valid, eval_every=2, plugins=[f"{FREEZE}:patterns=0,1.bias"])
    assert torch.equal(model[0][1].running_mean, means[0])
    assert not torch.equal(model[1].running_mean, means[1])


@pytest.mark.parametrize(("first", "second"), [("patterns=0,until=3st", "patterns=1,until=5st"), ("patterns=1,until=5st", "patterns=0,until=3st")])
def test_two_instances_in_one_module_unfreeze_it_gradually(batches, first, second):
    model, recorder = nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.BatchNorm1d(6)), nn.Linear(6, 3)), Recorder()
    model = nn.ModuleDict({"body": model[:2], "head": model[2]})
    model.forward = lambda x: model["head"](model["body"](x))
    specs = [f"{FREEZE}:{text.replace('patterns=', 'patterns=body.')}" for text in (first, second)]
    fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[*specs, recorder])
    assert recorder.modes[:3] == [{"", "head"}] * 3
    assert recorder.modes[3:5] == [{"", "head", "body", "body.0", "body.0.0"}] * 2
    assert recorder.modes[5:] == [{"", "head", "body", "body.0", "body.0.0", "body.1", "body.1.0"}] * 3


def test_gradual_unfreezes_the_outermost_modules_that_differ(batches):
    model, recorder = nested_model(), Recorder()
    fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:patterns=0,gradual=2st", recorder])
    assert [sorted(names - {"1.weight", "1.bias", "3.weight", "3.bias"}) for names in recorder.trainable[1::2]] == [
        [], ["0.4.bias", "0.4.weight"], ["0.3.bias", "0.3.weight", "0.4.bias", "0.4.weight"],
        ["0.0.bias", "0.0.weight", "0.3.bias", "0.3.weight", "0.4.bias", "0.4.weight"]]


def test_gradual_unfreezes_a_single_layer_at_once(net, batches):
    recorder = Recorder()
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:patterns=0,gradual=3st", recorder])
    assert [{"0.weight", "0.bias"} & names for names in recorder.trainable] == [set()] * 3 + [{"0.weight", "0.bias"}] * 5


def test_parameters_frozen_before_the_run_stay_frozen(net, batches, clone):
    net[0].weight.requires_grad_(False)
    before, recorder = clone(net), Recorder()
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, epochs=2, plugins=[f"{FREEZE}:patterns=0,1,until=1ep", recorder])
    assert torch.equal(net[0].weight, before[0].weight)
    assert not torch.equal(net[0].bias, before[0].bias)
    assert recorder.trainable[-1] == {"0.bias", "1.weight", "1.bias", "4.weight", "4.bias"}


def test_a_shared_weight_matches_by_either_name(batches):
    def model():
        torch.manual_seed(0)
        tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
        tied[1].weight = tied[0].weight
        return tied

    trained, frozen = model(), model()
    fit(trained, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:keep=1,2"])
    fit(frozen, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:patterns=1.weight"])
    assert not torch.equal(trained[0].weight, model()[0].weight)
    assert torch.equal(frozen[0].weight, model()[0].weight)
    assert torch.equal(trained[0].bias, model()[0].bias)


@pytest.mark.parametrize("spec", ["patterns=0,1", "patterns=0,1,until=5ep"])
def test_gradients_from_before_the_run_are_discarded(net, batches, clone, spec):
    net(batches[0][0]).sum().backward()
    other = clone(net)
    other.zero_grad()
    norms = [fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, seed=1, plugins=[f"{FREEZE}:{spec}", "clip"]).history[0]["grad_norm"]
             for model in (net, other)]
    assert norms[0] == norms[1]


def test_it_works_with_an_optimizer_instance(net, batches, clone, same):
    other, optimizer = clone(net), OPTIMIZERS["adam"]
    fit(net, cross_entropy, optimizer(net.parameters()), batches, epochs=2, plugins=[f"{FREEZE}:patterns=0,1,until=5st"], seed=1)
    by_hand(other, optimizer, batches, 2, {"0": 5, "1": 5})
    same(net, other)


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_with_layerwise_rates_and_schedules_in_any_order(net, batches, clone, same, order):
    """Every group has its own learning rate at every step, before and after it is unfrozen."""
    plugins = [f"{FREEZE}:keep=4,gradual=5st", f"{LAYERS}:rates=0=0.02,1=x0.5", "cosine:by=step,eta_min=0.001", "warmup:length=6"]
    other, recorder, alone = clone(net), Recorder(), Recorder()
    fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, epochs=2, seed=1, plugins=[plugins[i] for i in order] + [recorder])
    for lr in (0.1, 0.02, 0.05):     # the rates of the schedules for each initial rate alone
        fit(clone(net), cross_entropy, partial(torch.optim.SGD, lr=lr), batches, epochs=2, plugins=[*plugins[2:], alone])
    expected = [[*alone.rates[step], *alone.rates[16 + step], *alone.rates[32 + step]] for step in range(16)]
    assert recorder.rates == [pytest.approx(rates, rel=1e-12) for rates in expected]   # the order of factors changes the rounding
    expected = recorder.rates
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
@pytest.mark.parametrize("spec", ["patterns=0,1", "keep=4,until=2ep", "keep=4,until=28st", "keep=4,until=1ep,gradual=17st", "keep=4,start=12st", "patterns=0,1,start=1ep,until=4ep"])
@pytest.mark.parametrize("saved", [1, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(net, batches, clone, same, tmp_path, optimizer, spec, saved):
    plugins = [f"{FREEZE}:{spec}", f"{LAYERS}:decay=0.5,no_decay=true", "warmup:length=50%", "checkpoint"]
    whole, half, other = clone(net), clone(net), clone(net)
    uninterrupted = fit(whole, cross_entropy, optimizer, batches, batches, epochs=5, plugins=plugins, seed=1, out=tmp_path / "whole")

    class Interrupt:
        @hookimpl
        def epoch_start(self, run: Run):
            if run.epoch == saved:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(half, cross_entropy, optimizer, batches, batches, epochs=5, plugins=[*plugins, Interrupt()], seed=1, out=tmp_path)
    recorder = Recorder()
    resumed = fit(other, cross_entropy, optimizer, batches, batches, epochs=5, plugins=[*plugins, recorder], seed=1, out=tmp_path, resume=tmp_path)
    same(whole, other)
    assert resumed.history == uninterrupted.history
    assert len(recorder.trainable) == (5 - saved) * 8
    assert recorder.trainable[-1] == {name for name, parameter in whole.named_parameters() if parameter.requires_grad}


def test_it_freezes_again_when_the_step_is_set_back(batches):
    class SetBack:
        @hookimpl
        def safe_point(self, run: Run):
            if run.step == 6:
                run.counters.attempts = 1

    model, recorder = nested_model(), Recorder()
    fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:patterns=0,until=3st", SetBack(), recorder])
    assert ["0.0.weight" in names for names in recorder.trainable] == [False] * 3 + [True] * 3 + [False] * 2
    assert ["0.2" in names for names in recorder.modes] == [False] * 3 + [True] * 3 + [False] * 2


def test_one_instance_works_for_several_runs(net, plain, batches, clone, same):
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
    (["patterns=0,keep=1"], "freeze: pass either patterns (what to freeze) or keep (what to train)"),
    (["until=1ep"], "freeze: pass either patterns (what to freeze) or keep (what to train)"),
    (["patterns=0,until=soon"], "freeze: until takes a duration, not 'soon': write 30, 5ep, 500st or 10%"),
    (["patterns=*,until=1ep"], "freeze: nothing is left to train at the start; keep at least the last part trainable"),
    (["keep=4", "patterns=4,until=1ep"], "freeze: nothing is left to train at the start; keep at least the last part trainable"),
    (["patterns=*,start=3st"], "freeze: nothing is left to train from start=3st on; keep at least the last part trainable"),
    (["patterns=0,1,start=3st", "keep=0,1,start=5st"], "freeze.2: nothing is left to train from start=5st on; keep at least the last part trainable"),
    (["patterns=0,start=1ep"], "freeze: start=1ep is not before the run's end, so nothing would be frozen"),
    (["patterns=0,start=4st,until=3st"], "freeze: until=3st is not after start=4st; use a later until"),
    (["patterns=0,start=later"], "freeze: start takes a duration, not 'later': write 30, 5ep, 500st or 10%"),
    (["patterns=*"], "no parameter of the model has requires_grad=True; leave at least one trainable"),
], ids=str)
def test_wrong_options_are_refused_in_one_line(net, batches, specs, message):
    with pytest.raises(UsageError) as refused:
        fit(net, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:{spec}" for spec in specs])
    assert str(refused.value) == message


def test_fused_sgd_with_dampening_is_refused(net, batches):
    with pytest.raises(UsageError, match="^freeze: torch's fused SGD with dampening cannot begin to train a parameter later; use sgd:fused=false"):
        fit(net, cross_entropy, partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, fused=True), batches,
            plugins=["freeze:patterns=0,until=1ep"])


def test_a_string_instead_of_a_list_is_refused():
    from loopctl.plugins.freeze import Freeze
    with pytest.raises(ValueError, match=r"patterns takes a list, such as \['conv1.\*'\], not 'conv1'"):
        Freeze(patterns="conv1")


def test_the_list_of_parameters_of_a_large_model_is_shortened(batches):
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(12)])
    with pytest.raises(UsageError, match=r"start with 0, 1, 2, 3, 4, 5, 6, 7 \.\.\.$"):
        fit(model, cross_entropy, OPTIMIZERS["sgd"], batches, plugins=[f"{FREEZE}:patterns=fc"])
