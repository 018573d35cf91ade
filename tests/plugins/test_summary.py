"""The report's numbers against those computed by hand, and that the run does not notice it."""
import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from io import StringIO
from itertools import product

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import VisionTransformer, resnet18

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.cli import main
from loopctl.model.summary import Layer, record_forward, table
from loopctl.plugins.summary import Summary

MIB = 2**20


def cnn():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                         nn.Dropout(), nn.Linear(8 * 4 * 4, 10))


def images(count=4, of=2):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(of, 3, 8, 8, generator=generator), torch.arange(of)) for _ in range(count)]


def train(model, *plugins, data=None, **options):
    return fit(model, nn.functional.cross_entropy, partial(torch.optim.SGD, lr=0.1, momentum=0.9), data or images(),
               plugins=plugins, seed=0, **options)


def seen(model, *inputs, **named):
    with record_forward(model) as layers:
        model(*inputs, **named)
    return {layer.name: layer for layer in layers}


def text(layers, depth=None):
    """The cells of the report's rows, by the first one."""
    report = table(list(layers.values()), depth)
    columns = [[str(cell) for cell in column.cells] for column in report.columns]
    return {label.strip(): cells for label, *cells in zip(*columns, strict=True)}


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def multiply_adds(layers):
    return sum(layer.multiply_adds for layer in layers)


def flops(model, *inputs, **named):
    """torch's own count, of what its kernels are given: two per multiply-add.

    Attention is computed as matrix products, since not every torch counts the CPU's own kernel for it.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*inputs, **named)
    return counter.get_total_flops()


def activations(layers):
    return sum(layer.activations for layer in layers.values())


def test_small_cnn():
    layers = seen(cnn(), torch.randn(2, 3, 8, 8))

    assert [layer.type for layer in layers.values()] == ["Sequential", "Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d",
                                                         "Flatten", "Dropout", "Linear"]
    assert [layer.shape for layer in layers.values()] == ["[2, 10]", *["[2, 8, 8, 8]"] * 3, "[2, 8, 4, 4]",
                                                          *["[2, 128]"] * 2, "[2, 10]"]
    assert [layer.parameters for layer in layers.values()] == [0, 8 * 3 * 9 + 8, 8 + 8, 0, 0, 0, 0, 128 * 10 + 10]
    # Running mean and variance, and the number of batches, which is of eight bytes.
    assert sum(layer.size for layer in layers.values()) == 4 * (224 + 16 + 1290) + 4 * (8 + 8) + 8
    assert activations(layers) == 4 * 2 * (3 * 8 * 8 * 8 + 8 * 4 * 4 + 128 + 128 + 10)
    assert layers[""].inputs == 4 * 2 * 3 * 8 * 8


def test_totals():
    model = cnn()
    model[0].requires_grad_(False)
    rows = text(seen(model, torch.randn(512, 3, 8, 8)))

    assert [rows[name][2] for name in ("Parameters", "trainable", "frozen")] == ["1,530", "1,306", "224"]
    assert rows["Parameters and buffers"][2] == f"{6192 / MIB:.3f} MiB" == "0.006 MiB"
    assert rows["Activations, forward"][2] == f"{4 * 512 * 1930 / MIB:.3f} MiB" == "3.770 MiB"
    assert rows["Input"][2] == f"{4 * 512 * 192 / MIB:.3f} MiB" == "0.375 MiB"
    assert rows["0"] == ["Conv2d", "[512, 8, 8, 8]", "224", "14.6%", "7.08 M", "frozen"]
    assert rows["6"] == ["Linear", "[512, 10]", "1,290", "84.3%", "655 k", "trainable"]
    assert rows["2"] == ["ReLU", "[512, 8, 8, 8]", "", "", "", ""]


def test_precision_and_partly_frozen():
    model = nn.Linear(3, 2, dtype=torch.float64)
    model.bias.requires_grad_(False)
    layers = seen(model, torch.randn(5, 3, dtype=torch.float64))

    assert (layers[""].size, activations(layers), layers[""].inputs) == (8 * 8, 8 * 10, 8 * 15)
    assert text(layers)["model"] == ["Linear", "[5, 2]", "8", "100.0%", "30", "partly frozen"]
    assert text(layers)["trainable"][2] == "6"


class Twice(nn.Module):
    """One block run twice, and in the model under two names."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.alias = self.block
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.alias(self.block(x)))


def test_shared_module():
    model = Twice()
    layers = seen(model, torch.randn(3, 4))
    rows = text(layers)

    assert list(layers) == ["", "block", "block.0", "block.1", "alias", "head"]
    assert sum(layer.parameters for layer in layers.values()) == 20 + 10 == sum(p.numel() for p in model.parameters())
    assert activations(layers) == 4 * 3 * (2 * (4 + 4) + 2)
    assert rows["0"] == ["Linear", "[3, 4]", "20", "66.7%", "96", "trainable, used 2 times"]
    assert rows["alias"] == ["Sequential", "", "", "", "", "used again: block"]


def test_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.drop = nn.Embedding(10, 4), nn.Dropout()
            self.head, self.aux = nn.Linear(4, 10), nn.Linear(4, 10, bias=False)
            self.head.weight = self.aux.weight = self.embed.weight

        def forward(self, x):
            hidden = self.drop(self.embed(x))
            return self.head(hidden) + self.aux(hidden)

    layers = seen(Tied(), torch.arange(6))
    rows = text(layers)

    assert rows["embed"][2:] == ["40", "80.0%", "", "trainable"]
    assert rows["head"][2:] == ["10", "20.0%", "240", "trainable, shared: embed"]
    assert rows["aux"][2:] == ["", "", "240", "shared: embed"]
    assert rows["Parameters"][2] == "50"
    assert sum(layer.size for layer in layers.values()) == 4 * 50


def test_parameter_tied_to_the_model_itself():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model.scale = model[0].weight

    assert text(seen(model, torch.randn(1, 2)))["0"][5] == "shared: model"


def test_lstm_returns_tuples():
    layers = seen(nn.Sequential(nn.LSTM(5, 6, batch_first=True)), torch.randn(2, 3, 5))

    assert layers["0"].shape == "[2, 3, 6] and 2 more"
    assert layers["0"].parameters == 4 * 6 * (5 + 6 + 2)
    assert activations(layers) == 4 * (2 * 3 * 6 + 2 * 2 * 6)


@pytest.mark.parametrize("weights", [True, False])
def test_attention(weights):
    layers = seen(nn.MultiheadAttention(8, 2, batch_first=True), *[torch.randn(2, 3, 8)] * 3, need_weights=weights)

    assert layers[""].shape == ("[2, 3, 8] and 1 more" if weights else "[2, 3, 8]")
    assert (layers[""].parameters, layers["out_proj"].parameters) == (3 * 8 * 8 + 3 * 8, 8 * 8 + 8)
    # Attention multiplies by its projection's weight without running it, so it is itself the innermost that ran.
    assert layers["out_proj"].shape == "-"
    assert activations(layers) == 4 * (2 * 3 * 8 + weights * 2 * 3 * 3)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors():
    """A frozen encoder, with padding to leave out, has them between its layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1).eval().requires_grad_(False)
    padding = torch.tensor([[False, False, False], [False, True, True]])
    layers = seen(encoder, torch.randn(2, 3, 8), src_key_padding_mask=padding)

    assert (layers["layers.0.linear1"].shape, layers[""].shape) == ("nested", "[2, 3, 8]")
    assert layers["layers.0.linear1"].activations == 4 * 4 * 16
    assert layers["layers.0.linear1"].multiply_adds == 4 * 8 * 16
    assert layers["layers.0.self_attn"].multiply_adds == 4 * 8 * 8 * 4 + 2 * (3 * 3 + 1) * 8
    assert text(layers)["Multiply-adds, forward"][2] == "2.21 k"


def test_nothing_ran():
    with record_forward(cnn()) as layers:
        pass
    rows = text({layer.name: layer for layer in layers})

    assert rows["6"] == ["Linear", "-", "1,290", "84.3%", "", "trainable"]
    assert [rows[name][2] for name in ("Activations, forward", "Input", "Multiply-adds, forward")] == ["-"] * 3


def test_dict_output_and_several_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.unused = nn.Linear(4, 2), nn.Linear(3, 2), nn.Linear(2, 2)

        def forward(self, left, pair, scale=None):
            hidden = self.left(left) + self.right(pair["right"])
            return {"logits": hidden * scale, "loss": hidden.sum(), "note": "no tensor"}

    layers = seen(Model(), torch.randn(5, 4), {"right": torch.randn(5, 3)}, scale=torch.ones(2))
    rows = text(layers)

    assert rows["model"][1] == "[5, 2] and 1 more"
    assert layers[""].inputs == 4 * (5 * 4 + 5 * 3 + 2)
    assert rows["unused"] == ["Linear", "-", "6", "25.0%", "", "trainable"]
    assert activations(layers) == 4 * 2 * 5 * 2


def test_dataclass_output_and_no_tensor():
    @dataclass
    class Output:
        hidden: list[torch.Tensor]
        loss: torch.Tensor
        kind: type

    class Model(nn.Module):
        def forward(self, x):
            return Output([x, x[0]], x.sum(), Output) if x is not None else None

    layers = seen(Model(), torch.randn(2, 3))

    assert layers[""].shape == "[2, 3] and 2 more"
    assert activations(layers) == 4 * (6 + 3 + 1)
    assert seen(Model(), None)[""].shape == "no tensor"


def test_parameters_of_a_module_that_has_parts():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 4))
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(torch.cat([self.token.expand(len(x), 1, 4), x], 1))

    rows = text(seen(nn.Sequential(Tokens()), torch.randn(2, 3, 4)))

    assert rows["0"] == ["Tokens", "[2, 4, 4]", "4", "16.7%", "", "trainable"]
    assert rows["Parameters"][2] == "24"


def test_what_has_no_size_yet_or_takes_no_hooks():
    with warnings.catch_warnings(action="ignore"):         # lazy modules and scripts both announce changes
        lazy, never = nn.LazyLinear(3), nn.LazyLinear(2)
        script = torch.jit.script(nn.Linear(3, 3))
    model = nn.Sequential(lazy, script)
    lazy.never = never
    layers = seen(model, torch.randn(5, 4))

    assert [layer.shape for layer in layers.values()] == ["[5, 3]", "[5, 3]", "-", "-"]
    assert [layer.parameters for layer in layers.values()] == [0, 4 * 3 + 3, 0, 3 * 3 + 3]
    assert layers["0.never"].size == 0
    assert layers["0"].multiply_adds == 5 * 4 * 3
    assert text(layers)["Multiply-adds, forward"][2] == "at least 60"       # what the script does is not seen


def test_depth_counts_what_it_hides():
    layers = seen(nn.Sequential(Twice(), nn.Sequential(nn.Linear(2, 2))), torch.randn(3, 4))
    whole, cut = text(layers), text(layers, depth=1)

    assert list(cut)[:3] == ["model", "0", "1"]
    assert (cut["0"][2:], cut["1"][2]) == (["30", "83.3%", "120", "trainable"], "6")
    totals = ("Parameters", "trainable", "frozen", "Parameters and buffers", "Activations, forward", "Input",
              "Multiply-adds, forward")
    assert [cut[name] for name in totals] == [whole[name] for name in totals]


class Arguments(nn.Module):
    """Hands everything to one layer, so that this is not the model itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def conv_net():
    return nn.Sequential(nn.Conv2d(4, 8, (3, 2), stride=2, padding=(1, 0), groups=2), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.Conv2d(8, 8, 3, padding="same", dilation=2, groups=8, bias=False), nn.GroupNorm(2, 8),
                         nn.ConvTranspose2d(8, 6, 4, stride=3, padding=1, output_padding=1, groups=2), nn.PReLU(6))


@pytest.mark.compares(use="summary", technique="multiply-adds of each layer",
                      source="torch.utils.flop_counter.FlopCounterMode", tolerance="to the bit")
@pytest.mark.parametrize(("model", "inputs"), [
    (lambda: nn.Sequential(nn.Linear(7, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 3)), [(5, 7)]),
    (lambda: nn.Linear(7, 3), [(7,)]),
    (lambda: nn.Linear(7, 3), [(2, 4, 5, 7)]),
    (lambda: nn.Linear(7, 3), [(0, 7)]),
    (conv_net, [(3, 4, 11, 9)]),
    (conv_net, [(1, 4, 6, 6)]),
    (lambda: nn.Conv1d(4, 6, 5, stride=3, padding=2, groups=2), [(2, 4, 17)]),
    (lambda: nn.Conv1d(4, 6, 5, padding=4, padding_mode="circular"), [(2, 4, 17)]),
    (lambda: nn.Conv2d(4, 6, 3, padding=5), [(2, 4, 2, 2)]),                       # most windows see only padding
    (lambda: nn.Conv2d(4, 6, 3), [(4, 8, 8)]),                                     # one sample, no batch
    (lambda: nn.Conv2d(4, 6, 3), [(0, 4, 8, 8)]),
    (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1, groups=2), [(2, 2, 4, 5, 6)]),
    (lambda: nn.ConvTranspose1d(4, 6, 5, stride=3, padding=2, groups=2), [(2, 4, 7)]),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), [(4, 5, 3)]),
    (lambda: nn.ConvTranspose3d(2, 4, (1, 2, 3), stride=2, groups=2, dilation=2), [(2, 2, 3, 4, 5)]),
    (lambda: parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), [(2, 4, 8, 8)]),
    (lambda: nn.MultiheadAttention(8, 2), [(5, 3, 8), (7, 3, 8), (7, 3, 8)]),
    (lambda: nn.MultiheadAttention(8, 2), [(5, 8)] * 3),
    (lambda: nn.MultiheadAttention(8, 2, batch_first=True), [(5, 8), (7, 8), (7, 8)]),
    (lambda: nn.MultiheadAttention(8, 4, batch_first=True, kdim=6, vdim=10), [(3, 5, 8), (3, 7, 6), (3, 7, 10)]),
    (lambda: nn.MultiheadAttention(8, 2, batch_first=True, add_bias_kv=True, add_zero_attn=True), [(3, 5, 8)] * 3),
    (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), [(3, 5, 8)]),
    (lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), [(3, 5, 8), (3, 7, 8)]),
    (lambda: nn.RNNCell(5, 6), [(3, 5)]),
    (lambda: nn.Sequential(nn.RNN(5, 6, 2, bidirectional=True)), [(4, 3, 5)]),     # made of products of matrices on the CPU
    (lambda: resnet18(num_classes=10), [(2, 3, 64, 64)]),
    (lambda: VisionTransformer(32, 8, 2, 4, 16, 24), [(2, 3, 32, 32)]),
])
def test_multiply_adds_are_half_of_torchs_flops(model, inputs):
    model, inputs = Arguments(model()), [torch.randn(shape) for shape in inputs]
    layers = list(seen(model, *inputs).values())

    assert 2 * multiply_adds(layers) == flops(model, *inputs)
    assert layers[0].multiply_adds == 0
    assert not any(layer.more for layer in layers)


def test_resnet18():
    layers = seen(resnet18(), torch.randn(1, 3, 224, 224))
    report = table(list(layers.values()))
    rows, console = text(layers), Console(width=1000, file=StringIO())
    console.print(report)
    shares = [float(cell[:-1]) for cell in report.columns[4].cells if cell]

    assert multiply_adds(layers.values()) == 1_814_073_344
    assert rows["Multiply-adds, forward"][2] == "1.81 G"
    assert (layers["conv1"].multiply_adds, layers["fc"].multiply_adds) == (64 * 112 * 112 * 3 * 49, 512 * 1000)
    assert rows["fc"] == ["Linear", "[1, 1000]", "513,000", "4.4%", "512 k", "trainable"]
    assert len(shares) == sum(layer.parameters > 0 for layer in layers.values())
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert max(map(len, console.file.getvalue().splitlines())) <= 110


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_attention_counts_its_projections_and_products(named, weights, training):
    """The same without gradients, where torch has a kernel for all of it."""
    model = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    x = torch.randn(3, 5, 8)
    with torch.set_grad_enabled(training):
        layers = seen(model, *[] if named else [x, x, x], **{"value": x, "key": x, "query": x} if named else {},
                      need_weights=weights)

    assert layers[""].multiply_adds == 3 * 5 * 4 * 8 * 8 + 2 * 3 * 5 * 5 * 8
    assert layers["out_proj"].multiply_adds == 0
    assert text(layers)["Multiply-adds, forward"][2] == "5.04 k"
    if training:
        assert flops(model, x, x, x, need_weights=weights) == 2 * 5040


def recurrent(gates, inputs, hidden, layers=1, directions=1, projected=0):
    """Of one step: the weights of torch's own layer."""
    kind = {1: nn.RNN, 3: nn.GRU, 4: nn.LSTM}[gates]
    layer = kind(inputs, hidden, layers, bidirectional=directions == 2, **{"proj_size": projected} if projected else {})
    return layer, sum(weight.numel() for name, weight in layer.named_parameters() if name.startswith("weight"))


@pytest.mark.filterwarnings("ignore:LSTM with projections")     # which says that it is slow
def test_lstm_by_hand():
    layer, _ = recurrent(4, 5, 6, layers=3, directions=2, projected=2)
    first, others = 4 * 6 * (5 + 2) + 2 * 6, 4 * 6 * (2 * 2 + 2) + 2 * 6

    assert seen(layer, torch.randn(7, 3, 5))[""].multiply_adds == 7 * 3 * 2 * (first + 2 * others)
    assert seen(nn.LSTM(5, 6), torch.randn(7, 3, 5))[""].multiply_adds == 7 * 3 * 4 * 6 * (5 + 6)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("gates", "options"), [
    *product([1, 3, 4], [{}, {"layers": 3}, {"directions": 2}, {"layers": 2, "directions": 2}]),
    (4, {"layers": 2, "directions": 2, "projected": 4})])
def test_recurrent_layers_use_each_weight_in_each_step(gates, options):
    layer, weights = recurrent(gates, 5, 6, **options)
    ragged = [torch.randn(length, 5) for length in (4, 2, 1)]

    assert seen(layer, torch.randn(7, 3, 5))[""].multiply_adds == 7 * 3 * weights
    assert seen(layer, input=torch.randn(7, 5))[""].multiply_adds == 7 * weights           # one sample, no batch
    assert seen(layer, pack_sequence(ragged))[""].multiply_adds == 7 * weights
    assert text(seen(layer, torch.randn(1, 5)))["Multiply-adds, forward"][2] in (f"{weights}", f"{weights / 1000:.2f} k")


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)])
def test_cells(kind, gates):
    assert seen(kind(5, 6), torch.randn(3, 5))[""].multiply_adds == 3 * gates * 6 * (5 + 6)
    assert seen(kind(5, 6), torch.randn(5))[""].multiply_adds == gates * 6 * (5 + 6)


def test_bilinear_uses_each_weight_for_each_sample():
    layers = seen(nn.Bilinear(3, 4, 5), torch.randn(2, 7, 3), input2=torch.randn(2, 7, 4))
    assert layers[""].multiply_adds == 2 * 7 * 3 * 4 * 5


def test_layers_without_products():
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.RMSNorm(4), nn.PReLU(), nn.GELU(), nn.Dropout(),
                          nn.BatchNorm1d(3), nn.InstanceNorm1d(3, affine=True), nn.GroupNorm(3, 3), nn.Softmax(-1))
    rows = text(seen(model, torch.randint(10, (2, 3))))

    assert {row[4] for row in rows.values()} == {""}
    assert rows["Multiply-adds, forward"][2] == "0"


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        return x @ self.weight


class Functional(nn.Module):
    """Multiplies by the weight of a layer in it that it does not run."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return nn.functional.linear(x, self.inner.weight)


class Replaced(nn.Linear):
    def forward(self, x):
        return super().forward(super().forward(x))


@pytest.mark.parametrize("custom", [Custom, Functional, partial(Replaced, 4, 4)])
def test_a_layer_without_a_formula_makes_the_total_a_bound(custom):
    layers = seen(nn.Sequential(nn.Sequential(nn.Linear(4, 4), custom()), nn.Linear(4, 2)), torch.randn(100, 4))
    whole, cut = text(layers), text(layers, depth=1)

    assert [name for name, layer in layers.items() if layer.more] == ["0.1"]
    assert list(table(list(layers.values())).columns[5].cells)[:4] == ["", "", "1.60 k", ""]
    assert whole["Multiply-adds, forward"][2] == cut["Multiply-adds, forward"][2] == "at least 2.40 k"
    assert (cut["0"][4], cut["1"][4]) == ("at least 1.60 k", "800")


def test_what_did_not_run_leaves_the_total_exact():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].unused = Custom()
    assert text(seen(model, torch.randn(1, 4)))["Multiply-adds, forward"][2] == "16"


def test_parameters_of_a_container_count_nothing():
    model = VisionTransformer(32, 8, 1, 4, 16, 24)
    rows = text(seen(model, torch.randn(1, 3, 32, 32)))

    assert rows["model"][2:5] == ["16", f"{16 / sum(p.numel() for p in model.parameters()):.1%}", ""]
    assert not rows["Multiply-adds, forward"][2].startswith("at least")


def test_each_call_counts():
    layers = seen(Twice(), torch.randn(3, 4))
    assert {name: layer.multiply_adds for name, layer in layers.items() if layer.multiply_adds} == {
        "block.0": 2 * 3 * 4 * 4, "head": 3 * 4 * 2}


def test_a_parametrized_weight_is_not_computed_for_it():
    """Spectral norm goes on by a step each time it is, so that the run would be another."""
    torch.manual_seed(0)
    models = [nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 3))) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[0](torch.ones(2, 4))
    layers = seen(models[1], torch.ones(2, 4))

    assert layers["0"].multiply_adds == 2 * 4 * 3
    assert all(torch.equal(value, models[1].state_dict()[name]) for name, value in models[0].state_dict().items())


@pytest.mark.parametrize(("count", "shown"), [
    (7, "7"), (999, "999"), (1000, "1.00 k"), (999_499, "999 k"), (999_500, "1.00 M"), (45_600_000, "45.6 M"),
    (123_400_000, "123 M"), (1_230_000_000, "1.23 G"), (5 * 10**12, "5.00 T"), (2 * 10**15, "2.00 P")])
def test_three_digits(count, shown):
    assert text({"": Layer("", 0, "Model", calls=1, multiply_adds=count)})["model"][4] == shown


def test_depth_is_positive():
    with pytest.raises(ValueError, match="depth is at least 1, not 0"):
        Summary(0)
    with pytest.raises(UsageError, match="depth"):
        train(cnn(), "summary:depth=0")


def test_training_is_bit_equal(capsys):
    def trained(*plugins):
        torch.manual_seed(1)
        model = cnn()
        train(model, *plugins, epochs=2)
        return model.state_dict(), torch.get_rng_state()

    without, state = trained()
    model, state_with = trained(Summary())

    assert capsys.readouterr().out.count("Output shape") == 1
    assert all(torch.equal(without[name], model[name]) for name in without)
    assert torch.equal(state, state_with)


class Spy:
    """What the model looks like at the end of a step, to a plugin that acts after the report's."""

    def __init__(self):
        self.steps = []

    @hookimpl
    def after_step(self, run: Run):
        self.steps.append((hooks(run.model), [module.training for module in run.model.modules()]))


def test_hooks_are_gone_after_the_first_step(capsys):
    model, spy = cnn(), Spy()
    train(model, Summary(), spy)

    assert [count for count, _ in spy.steps] == [0] * 4
    assert all(all(training) for _, training in spy.steps)


def test_hooks_are_gone_after_an_exception(capsys):
    class Fails(nn.Module):
        def forward(self, x):
            assert hooks(model), "the report looks on"
            raise RuntimeError("inside forward")

    model = nn.Sequential(nn.Linear(4, 2), Fails())
    with pytest.raises(RuntimeError, match="inside forward"):
        train(model, Summary(), data=[(torch.randn(2, 4), torch.tensor([0, 1]))])

    assert hooks(model) == 0
    assert capsys.readouterr().out == ""


def test_a_copy_made_as_training_starts_has_no_hooks(capsys):
    class Average:
        @hookimpl
        def train_start(self, run: Run):
            self.model = deepcopy(run.model)

    average = Average()
    train(cnn(), Summary(), average)

    assert hooks(average.model) == 0


@pytest.mark.parametrize("plugins", [(), ("accumulate:every=4",)])
def test_one_micro_batch_counts(plugins):
    summary = Summary()
    train(cnn(), summary, *plugins)

    assert [layer.calls for layer in summary.first_step.layers] == [1] * 8
    assert multiply_adds(summary.first_step.layers) == 2 * (8 * 8 * 8 * 3 * 9 + 128 * 10)
    assert sum(layer.activations for layer in summary.first_step.layers) == 4 * 2 * 1930
    assert summary.first_step.layers[0].inputs == 4 * 2 * 192


def test_a_model_run_in_parts_counts_once_too():
    """Where compute_loss is replaced, the model's own forward may never run."""

    class Parts:
        @hookimpl
        def compute_loss(self, run: Run, batch):
            run.outputs = run.model[1](run.model[0](batch[0]))
            return nn.functional.cross_entropy(run.outputs, batch[1])

    summary = Summary()
    data = [(torch.randn(2, 4), torch.tensor([0, 1]))] * 4
    train(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), summary, Parts(), "accumulate:every=4", data=data)
    rows = text({layer.name: layer for layer in summary.first_step.layers})

    assert [layer.calls for layer in summary.first_step.layers] == [0, 1, 1]
    assert sum(layer.activations for layer in summary.first_step.layers) == 4 * 2 * (3 + 2)
    assert rows["model"][1] == rows["Input"][2] == "-"


def test_evaluation_before_the_first_step_does_not_count():
    class Baseline:
        @hookimpl
        def epoch_start(self, run: Run):
            run.hook.evaluate(run=run)

    summary = Summary()
    train(cnn(), summary, Baseline(), valid=images(1, of=3))

    assert summary.first_step.layers[0].shape == "[2, 10]"


def test_frozen_by_a_plugin(capsys):
    class Freeze:
        @hookimpl
        def setup(self, run: Run):
            run.model[0].requires_grad_(False)

    summary = Summary()
    train(cnn(), summary, Freeze())

    assert sum(layer.trainable for layer in summary.first_step.layers) == 1306


def test_compiled_model(capsys):
    def trained(*plugins):
        graphs = []

        def backend(graph, inputs):
            *nodes, output = (node for node in graph.graph.nodes if node.op != "placeholder")
            graphs.append(([str(node.target) for node in nodes], len(output.args[0])))
            return graph

        class Compile:
            @hookimpl
            def wrap_model(self, run: Run):
                run.network = torch.compile(run.network, backend=backend)

        torch.compiler.reset()
        torch.manual_seed(1)
        model = cnn()
        train(model, *plugins, Compile())
        return model.state_dict(), graphs

    (without, graphs), summary = trained(), Summary()
    model, graphs_with = trained(summary)

    assert all(torch.equal(without[name], model[name]) for name in without)
    assert graphs_with == graphs * 2, "the same once more, when the hooks are gone"
    assert multiply_adds(summary.first_step.layers) == 2 * (8 * 8 * 8 * 3 * 9 + 128 * 10)
    assert [layer.shape for layer in summary.first_step.layers] == ["[2, 10]", *["[2, 8, 8, 8]"] * 3, "[2, 8, 4, 4]",
                                                         *["[2, 128]"] * 2, "[2, 10]"]


@pytest.mark.parametrize("color", [False, True])
def test_no_column_is_cut_off_where_there_is_no_terminal(capsys, monkeypatch, color):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    if color:
        monkeypatch.setenv("FORCE_COLOR", "1")
    name = "a_part_of_the_model_that_has_quite_a_long_name"
    model = nn.Sequential()
    model.add_module("[bold]", nn.Linear(4, 4))
    model.add_module(name, model[0])
    model.add_module(f"{name}_too", nn.Linear(4, 2))
    train(model, Summary(), data=[(torch.randn(2, 4), torch.tensor([0, 1]))])
    lines = capsys.readouterr().out.splitlines()

    row = next(line for line in lines if f"{name}_too" in line)
    assert row.split() == [f"{name}_too", "Linear", "[2,", "2]", "10", "33.3%", "16", "trainable"]
    assert next(line for line in lines if f"{name} " in line).split()[1:] == ["Linear", "used", "again:", "[bold]"]
    assert any(line.split()[:2] == ["[bold]", "Linear"] for line in lines)
    assert len(next(line for line in lines if "Output shape" in line)) > 80


def test_a_narrow_terminal_folds_and_cuts_nothing_off():
    layers = seen(nn.Sequential(nn.Linear(1000, 1000), nn.TransformerEncoderLayer(1000, 2, 16)), torch.randn(2, 1000))
    console = Console(width=50, file=StringIO())
    console.print(table(list(layers.values())))

    assert "…" not in console.file.getvalue()
    assert " 1,001,000  19.9%  2.00 M " in console.file.getvalue()


@pytest.mark.parametrize(("spec", "frozen"), [("keep=7", "24,832"), ("patterns=7,until=1ep", "1,290"), ("patterns=1,gradual=1ep", "8,320")])
def test_the_command_shows_what_is_frozen_in_the_first_step(spec, frozen):
    done = CliRunner().invoke(main, ["summary", "--model", "mlp", "--plugin", f"freeze:{spec}"])
    assert [line.split()[1:] for line in done.output.splitlines() if line.strip().startswith("frozen")] == [[frozen]]


def test_the_command_refuses_a_freeze_that_the_run_would_refuse():
    done = CliRunner().invoke(main, ["summary", "--model", "mlp", "--plugin", "freeze:patterns=*,until=1ep"])
    assert (done.exit_code, done.output) == (2, "error: freeze: nothing is left to train at the start; keep at least the last part trainable\n")
