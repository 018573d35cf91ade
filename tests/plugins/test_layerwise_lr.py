"""The plugin layerwise_lr, compared with parameter groups written by hand."""
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from loopctl import Run, UsageError, explain, fit
from loopctl.composition.compose import compose
from loopctl.composition.options import to_spec
from loopctl.loop import DEFAULTS
from loopctl.plugins.layerwise_lr import LayerwiseLr
from loopctl.prepare import make_optimizer, prepare

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
adamw = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
LAYERS, FREEZE = "loopctl.plugins.layerwise_lr:LayerwiseLr", "loopctl.plugins.freeze:Freeze"


def train(model, optimizer, batches, epochs=3):
    torch.manual_seed(1)
    model.train()
    for _ in range(epochs):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            optimizer.step()


def groups(model, plugin, optimizer=sgd):
    """The parameter names, the learning rate and the weight decay of each of the optimizer's groups."""
    run = Run(model, None, optimizer, [1], hook=compose([plugin], DEFAULTS), device=next(model.parameters()).device)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [([names[parameter] for parameter in group["params"]], group["lr"], group["weight_decay"])
            for group in make_optimizer(run).param_groups]


def rates(model, plugin):
    """The learning rate of each parameter by name."""
    return {name: lr for names, lr, _ in groups(model, plugin, partial(torch.optim.SGD, lr=1.0)) for name in names}


@pytest.mark.parametrize("pattern", ["*convolution1*", "/convolution1/"])
def test_another_rate_for_one_layer_with_adam(batches, clone, same, pattern):
    """Layers whose names contain convolution1 have a rate of 0.01, all others 0.001, with the same weight decay."""
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(unflatten=nn.Unflatten(1, (1, 6)), my_convolution1=nn.Conv1d(1, 4, 3), act=nn.ReLU(),
                                    convolution2=nn.Conv1d(4, 4, 3), flat=nn.Flatten(), fc=nn.Linear(8, 3)))
    other, adam = clone(net), partial(torch.optim.Adam, lr=1e-3, weight_decay=1e-3)
    fit(net, cross_entropy, adam, batches, epochs=3, plugins=[f"{LAYERS}:rates={pattern}=0.01"], seed=1)
    train(other, torch.optim.Adam([
        {"params": [p for name, p in other.named_parameters() if "convolution1" in name], "lr": 0.01},
        {"params": [p for name, p in other.named_parameters() if "convolution1" not in name]}], lr=1e-3, weight_decay=1e-3), batches)
    same(net, other)


# The expected groups by options: parameters, learning rate, and whether they have weight decay.
GROUPS = {
    "rates=0=0.02,4.*=x3": lambda m, lr: [([m[1].weight, m[1].bias], lr, True), ([*m[0].parameters()], 0.02, True), ([*m[4].parameters()], lr * 3, True)],
    r"rates=/^4\.w/=0,4=x1": lambda m, lr: [([*m[:4].parameters()], lr, True), ([m[4].weight], 0.0, True), ([m[4].bias], lr, True)],
    "decay=0.5": lambda m, lr: [([*m[4].parameters()], lr, True), ([*m[:4].parameters()], lr * 0.5, True)],
    "decay=0.5,rates=1=0.3": lambda m, lr: [([*m[4].parameters()], lr, True), ([*m[0].parameters()], lr * 0.5, True), ([*m[1].parameters()], 0.3, True)],
    "no_decay=true": lambda m, lr: [([m[0].weight, m[4].weight], lr, True), ([m[0].bias, *m[1].parameters(), m[4].bias], lr, False)],
    "no_decay=true,decay=0.5": lambda m, lr: [([m[4].weight], lr, True), ([m[4].bias], lr, False), ([m[0].weight], lr * 0.5, True), ([m[0].bias, *m[1].parameters()], lr * 0.5, False)],
}


@pytest.mark.compares(use="layerwise_lr", technique="learning rates by layer, layer-wise decay as in arXiv:2106.08254",
                      source="parameter groups by hand", tolerance="to the bit")
@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
@pytest.mark.parametrize("options", GROUPS)
def test_equals_groups_written_by_hand_to_the_bit(net, batches, clone, same, optimizer, options):
    other = clone(net)
    expected = optimizer([{"params": parameters, "lr": lr} | ({} if decays else {"weight_decay": 0.0})
                          for parameters, lr, decays in GROUPS[options](other, optimizer.keywords["lr"])])
    names = {parameter: name for name, parameter in other.named_parameters()}
    assert groups(net, f"{LAYERS}:{options}", optimizer) == [
        ([names[parameter] for parameter in group["params"]], group["lr"], group["weight_decay"]) for group in expected.param_groups]
    run = fit(net, cross_entropy, optimizer, batches, epochs=3, plugins=[f"{LAYERS}:{options}"], seed=1)
    train(other, expected, batches)
    same(net, other)
    assert [row["lr"] for row in run.history] == [optimizer.keywords["lr"]] * 3


def test_layer_decay_of_a_resnet():
    with torch.device("meta"):
        found = rates(torchvision.models.resnet18(weights=None), "loopctl.plugins.layerwise_lr:LayerwiseLr:decay=0.5")
    order = ["conv1", *(f"layer{i}.{j}" for i in (1, 2, 3, 4) for j in (0, 1)), "fc"]
    for name, rate in found.items():
        part = "conv1" if name.startswith("bn1") else next(part for part in order if name.startswith(f"{part}."))
        assert rate == 0.5 ** (9 - order.index(part)), name


def test_layer_decay_of_a_vit_counts_layers_as_beit():
    with torch.device("meta"):
        found = rates(torchvision.models.vit_b_16(weights=None), LayerwiseLr(decay=0.5))
    for name, rate in found.items():
        block = name.partition("encoder_layer_")[2].partition(".")[0]
        layer = int(block) + 1 if block else 13 if name.startswith(("heads", "encoder.ln")) else 0
        assert rate == 0.5 ** (13 - layer), name
    assert {"class_token", "conv_proj.weight", "encoder.pos_embedding", "encoder.ln.weight", "heads.head.bias"} <= set(found)


@pytest.mark.parametrize(("name", "count"), [("convnext_tiny", 23), ("efficientnet_b0", 19), ("swin_t", 17), ("vgg11_bn", 11), ("densenet121", 63)])
def test_layer_decay_of_other_models_divides_no_block(name, count):
    """The layers are stem, blocks, transitions and classifier, and have all parameters."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
    found = rates(model, LayerwiseLr(decay=0.5))
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert len(set(found.values())) == count


def test_layer_decay_of_a_nested_model_and_of_one_that_begins_with_a_norm():
    with torch.device("meta"):
        inner = rates(torchvision.models.resnet18(weights=None), LayerwiseLr(decay=0.5))
        outer = rates(nn.Sequential(nn.Identity(), torchvision.models.resnet18(weights=None)), LayerwiseLr(decay=0.5))
    assert {f"1.{name}": rate for name, rate in inner.items()} == outer
    assert set(rates(nn.Sequential(nn.LayerNorm(3), nn.ReLU()), LayerwiseLr(decay=0.5)).values()) == {1.0}
    assert rates(nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 3), nn.Linear(3, 3)), LayerwiseLr(decay=0.5)) == {
        "0.weight": 0.5, "0.bias": 0.5, "1.weight": 0.5, "1.bias": 0.5, "2.weight": 1.0, "2.bias": 1.0}


def test_a_shared_weight_is_in_one_group(net):
    net[4] = nn.Linear(16, 16)
    net.append(nn.Linear(16, 16))
    net[5].weight = net[4].weight
    assert sorted(name for names, *_ in groups(net, LayerwiseLr(decay=0.5)) for name in names) == sorted(name for name, _ in net.named_parameters())
    assert groups(net, LayerwiseLr({"5": 0.3}))[1] == (["4.weight", "5.bias"], 0.3, 1e-2)


def test_a_tensor_learning_rate_stays_a_tensor(net):
    factory = partial(torch.optim.Adam, lr=torch.tensor(0.1))
    found = groups(net, LayerwiseLr({"0": 0.02, "1": "x2"}), factory)
    assert [type(lr) for _, lr, _ in found] == [torch.Tensor] * 3
    assert [lr.item() for _, lr, _ in found] == pytest.approx([0.1, 0.02, 0.2])


@pytest.mark.parametrize("order", [1, -1])
def test_only_permanently_frozen_parameters_are_left_out(net, batches, order):
    def group_sizes_and_rates(freeze):
        plugins = [f"{LAYERS}:rates=0=0.02,1=0.03", f"{FREEZE}:{freeze}"][::order]
        run = fit(net.requires_grad_(), cross_entropy, sgd, batches, plugins=plugins)
        return [(len(group["params"]), group["lr"]) for group in run.optimizer.param_groups]

    assert group_sizes_and_rates("patterns=0,until=1ep") == [(2, 0.1), (2, 0.02), (2, 0.03)]
    assert group_sizes_and_rates("patterns=0") == [(2, 0.1), (2, 0.03)]


def test_explain_shows_the_optimizers_own_rate(net, batches):
    run = Run(net, cross_entropy, sgd, batches, epochs=2, hook=compose([LayerwiseLr(decay=0.5), "cosine"], DEFAULTS))
    prepare(run, {}, None, None)
    assert "learning rate    group layer 2: 0.1 at the start, 0.1 at its peak, 0.05 at the end" in explain(run=run)
    assert "param_groups          layerwise_lr" in explain(run=run)


def test_its_options_can_be_parsed_from_its_spec():
    plugin = compose([f"{LAYERS}:rates=conv1.*=0.01,fc=x10,decay=0.5,no_decay=true"]).plugins["layerwise_lr"]
    assert plugin.rates == {"conv1.*": 0.01, "fc": "x10"}
    assert to_spec("layerwise_lr", plugin) == "layerwise_lr:rates=conv1.*=0.01,fc=x10,decay=0.5,no_decay=true,weight_decays="
    spec = "layerwise_lr:rates=fc=x10,decay=0.5,no_decay=norms,tokens,weight_decays=conv1.*=0.01,fc=x0.5"
    plugin = compose([spec.replace("layerwise_lr", LAYERS, 1)]).plugins["layerwise_lr"]
    assert plugin.no_decay == ["norms", "tokens"]
    assert plugin.weight_decays == {"conv1.*": 0.01, "fc": "x0.5"}
    assert to_spec("layerwise_lr", plugin) == spec


EXPECTED = "takes conv1.*=0.01, or conv1.*=x10 for ten times the optimizer's own rate, not"


@pytest.mark.parametrize(("options", "message"), [
    ("rates=conv9=0.1", "no parameter matches 'conv9'; the model's parameters start with 0, 1, 4"),
    ("rates=[01]=0.1,1=0.2", "rates: earlier patterns match all parameters that '1' matches; put it first"),
    ("rates=0=fast", f"rates {EXPECTED} 0=fast"),
    ("rates=0=-1", f"rates {EXPECTED} 0=-1.0"),
    ("rates=0=xnan", f"rates {EXPECTED} 0=xnan"),
    ("rates=0.1", f"rates {EXPECTED} =0.1"),
    ("decay=1.5", "decay is above 0 and at most 1, not 1.5"),
    ("decay=0", "decay is above 0 and at most 1, not 0.0"),
    ("weight_decays=conv9=0.1", "no parameter matches 'conv9'; the model's parameters start with 0, 1, 4"),
    ("weight_decays=[01]=0.1,1=0.2", "weight_decays: earlier patterns match all parameters that '1' matches; put it first"),
    ("weight_decays=0=-1", "weight_decays takes conv1.*=0.01, or conv1.*=x10 for ten times the optimizer's own weight decay, not 0=-1.0"),
    ("no_decay=heads", "no_decay takes true|false or a list of norms|biases|embeddings|tokens, not 'heads'"),
    ("no_decay=norms,heads", "no_decay takes true|false or a list of norms|biases|embeddings|tokens, not 'norms,heads'"),
    ("no_decay=false", "one of rates, decay, no_decay and weight_decays is required; pass decay=0.75, for example"),
])
def test_wrong_options_are_refused_in_one_line(net, batches, options, message):
    with pytest.raises(UsageError) as refused:
        fit(net, cross_entropy, sgd, batches, plugins=[f"{LAYERS}:{options}"])
    assert str(refused.value) == f"layerwise_lr: {message}"


class Attention(nn.Module):
    """Tokens with a class token and positions, an embedding that the head shares, a norm with a matrix, and an LSTM."""

    def __init__(self):
        super().__init__()
        self.words, self.cls_token, self.pos_embed = nn.Embedding(9, 4), nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 7, 4))
        self.mix, self.norm, self.lstm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm((7, 4)), nn.LSTM(4, 4, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 9, bias=True)
        self.head.weight = self.words.weight

    def forward(self, input):
        words = self.words(input)
        mixed = self.norm(torch.cat([self.cls_token.expand(len(input), -1, -1), words], 1) + self.pos_embed)
        mixed = mixed + self.mix(mixed, mixed, mixed, need_weights=False)[0]
        return self.head(self.lstm(mixed)[0][:, 0] * self.scale)


# What each option excludes from weight decay, by name.
UNDECAYED = {
    "norms": {"norm.weight", "norm.bias"},
    "biases": {"mix.in_proj_bias", "mix.out_proj.bias", "norm.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0", "head.bias"},
    "embeddings": {"words.weight"},
    "tokens": {"cls_token", "pos_embed"},
}
UNDECAYED |= {"norms,biases,embeddings,tokens": set().union(*UNDECAYED.values()),
              "true": {"mix.in_proj_bias", "mix.out_proj.bias", "lstm.bias_ih_l0", "lstm.bias_hh_l0", "head.bias", "scale"}}
UNDECAYED |= {"norms,biases": UNDECAYED["norms"] | UNDECAYED["biases"]}


@pytest.mark.compares(use="layerwise_lr:no_decay", technique="no weight decay for norms, biases, embeddings, tokens",
                      source="parameter groups by hand", tolerance="to the bit")
@pytest.mark.parametrize("kinds", UNDECAYED)
@pytest.mark.parametrize("optimizer", [sgd, adamw], ids=["sgd", "adamw"])
def test_exclusion_from_weight_decay_equals_groups_written_by_hand_to_the_bit(kinds, optimizer, clone, same):
    torch.manual_seed(0)
    model, undecayed = Attention(), UNDECAYED[kinds]
    other = clone(model)
    data = [(torch.randint(0, 9, (5, 6)), torch.randint(0, 9, (5,))) for _ in range(4)]
    named = list(other.named_parameters())
    expected = optimizer([{"params": [parameter for name, parameter in named if name not in undecayed]},
                          {"params": [parameter for name, parameter in named if name in undecayed], "weight_decay": 0.0}])
    fit(model, cross_entropy, optimizer, data, epochs=2, plugins=[f"{LAYERS}:no_decay={kinds}"], seed=1)
    train(other, expected, data, epochs=2)
    same(model, other)
    found = groups(model, f"{LAYERS}:no_decay={kinds}", optimizer)
    assert {name for names, _, decay in found if decay == 0 for name in names} == undecayed


@pytest.mark.compares(use="layerwise_lr:weight_decays", technique="weight decays by pattern",
                      source="parameter groups by hand", tolerance="to the bit")
def test_weight_decays_by_pattern_equal_groups_written_by_hand_to_the_bit(net, batches, clone, same):
    """A pattern comes before no_decay, x is a factor of the optimizer's own, and rates divide the groups further."""
    other = clone(net)
    adam = {"lr": 1e-2, "weight_decay": 0.1}
    expected = torch.optim.AdamW([
        {"params": [other[0].weight]}, {"params": [other[0].bias, other[1].weight], "weight_decay": 0.0},
        {"params": [other[1].bias], "weight_decay": 0.3}, {"params": [*other[4].parameters()], "lr": 0.1, "weight_decay": 0.05}], **adam)
    spec = f"{LAYERS}:rates=4=x10,no_decay=norms,biases,weight_decays=1.bias=0.3,4=x0.5"
    fit(net, cross_entropy, partial(torch.optim.AdamW, **adam), batches, epochs=3, plugins=[spec], seed=1)
    train(other, expected, batches)
    same(net, other)


@pytest.mark.parametrize("name", ["vit_b_16", "swin_t", "convnext_tiny"])
@pytest.mark.parametrize("options", [{"no_decay": ["norms", "biases", "embeddings", "tokens"], "decay": 0.7},
                                     {"no_decay": True, "weight_decays": {"/weight$/": 0.3}, "rates": {"/bias$/": 0.2}}])
def test_each_parameter_is_in_one_group_and_only_those_of_the_kinds_have_no_weight_decay(name, options):
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
    frozen = list(dict(model.named_parameters()))[:3]
    for parameter in list(model.parameters())[:3]:
        parameter.requires_grad_(False)
    found = groups(model, LayerwiseLr(**options), adamw)
    members = [name for names, *_ in found for name in names]
    assert sorted(members) == sorted({name for name, _ in model.named_parameters()} - {*frozen})
    undecayed = {name for names, _, decay in found if not decay for name in names}
    if "decay" in options:              # timm's convention, and the tokens, positions and tables of these models
        assert undecayed == {name for name, parameter in model.named_parameters() if name not in frozen and (
            parameter.ndim <= 1 or name.endswith(("class_token", "pos_embedding", "bias_table")))}  # layer_scale is 3-D


def test_the_names_that_the_model_itself_excludes_count_as_tokens(plain):
    plain[0].no_weight_decay = lambda: {"weight"}
    assert groups(plain, LayerwiseLr(no_decay=["tokens"]))[1] == (["0.weight"], 0.1, 0.0)


def test_a_relative_weight_decay_needs_an_optimizer_that_has_one(net, batches):
    with pytest.raises(UsageError, match="layerwise_lr: weight_decays: the optimizer has no weight decay; use another, such as adamw"):
        fit(net, cross_entropy, partial(torch.optim.Rprop, lr=0.1), batches, plugins=[LayerwiseLr(weight_decays={"0": 0.1})])


def test_the_parameters_of_a_loss_function_are_trained_too(plain, batches, clone, same):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, output, target):
            return cross_entropy(output * self.scale, target)

    loss, other, other_loss = Scaled(), clone(plain), Scaled()
    fit(plain, loss, sgd, batches, epochs=2, plugins=[LayerwiseLr(decay=0.5)])
    optimizer = sgd([{"params": [*other[2].parameters(), other_loss.scale]}, {"params": other[0].parameters(), "lr": 0.05}])
    for input, target in batches * 2:
        optimizer.zero_grad()
        other_loss(other(input), target).backward()
        optimizer.step()
    same(plain, other)
    assert torch.equal(loss.scale, other_loss.scale)


def test_rates_that_are_not_a_dict_are_refused():
    with pytest.raises(ValueError, match=r"rates takes a dict of rates by pattern, such as \{'conv1.\*': 0.01\}, not 0.1"):
        LayerwiseLr(rates=0.1)


def test_an_optimizer_instance_is_refused(net, batches):
    with pytest.raises(UsageError, match="layerwise_lr sets the parameter groups, but the optimizer has its own; pass a factory"):
        fit(net, cross_entropy, sgd(net.parameters()), batches, plugins=[LayerwiseLr(decay=0.5)])


def test_groups_are_named_after_their_pattern_or_layer(net):
    def named(spec):
        run = Run(net, cross_entropy, sgd, [], hook=compose([spec], DEFAULTS))
        return [group["name"] for group in run.hook.param_groups(run=run)]
    assert named("layerwise_lr:rates=4.*=x10") == ["rest", "4.*"]
    assert named("layerwise_lr:decay=0.5,no_decay=true") == ["layer 2", "layer 2 (no decay)", "layer 1", "layer 1 (no decay)"]
