"""The report's numbers against those computed by hand, and that the run does not notice it."""
import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

from loopctl import UsageError, fit, hookimpl
from loopctl.plugins.summary import Summary, table, watch

MB = 2**20


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
    with watch(model) as layers:
        model(*inputs, **named)
    return {layer.name: layer for layer in layers}


def text(layers, depth=None):
    """The cells of the report's rows, by the first one."""
    report = table(list(layers.values()), depth)
    columns = [[str(cell) for cell in column.cells] for column in report.columns]
    return {label.strip(): cells for label, *cells in zip(*columns, strict=True)}


def hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


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
    assert rows["Parameters and buffers"][2] == f"{6192 / MB:.3f} MB" == "0.006 MB"
    assert rows["Activations, forward"][2] == f"{4 * 512 * 1930 / MB:.3f} MB" == "3.770 MB"
    assert rows["Input"][2] == f"{4 * 512 * 192 / MB:.3f} MB" == "0.375 MB"
    assert rows["0"] == ["Conv2d", "[512, 8, 8, 8]", "224", "frozen"]
    assert rows["6"] == ["Linear", "[512, 10]", "1,290", "trainable"]
    assert rows["2"] == ["ReLU", "[512, 8, 8, 8]", "", ""]


def test_precision_and_partly_frozen():
    model = nn.Linear(3, 2, dtype=torch.float64)
    model.bias.requires_grad_(False)
    layers = seen(model, torch.randn(5, 3, dtype=torch.float64))

    assert (layers[""].size, activations(layers), layers[""].inputs) == (8 * 8, 8 * 10, 8 * 15)
    assert text(layers)["model"] == ["Linear", "[5, 2]", "8", "partly frozen"]
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
    assert rows["0"] == ["Linear", "[3, 4]", "20", "trainable, used 2 times"]
    assert rows["alias"] == ["Sequential", "", "", "used again: block"]


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

    assert rows["embed"][2:] == ["40", "trainable"]
    assert rows["head"][2:] == ["10", "trainable, shared: embed"]
    assert rows["aux"][2:] == ["", "shared: embed"]
    assert rows["Parameters"][2] == "50"
    assert sum(layer.size for layer in layers.values()) == 4 * 50


def test_parameter_tied_to_the_model_itself():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    model.scale = model[0].weight

    assert text(seen(model, torch.randn(1, 2)))["0"][3] == "shared: model"


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


def test_nothing_ran():
    with watch(cnn()) as layers:
        pass
    rows = text({layer.name: layer for layer in layers})

    assert rows["6"] == ["Linear", "-", "1,290", "trainable"]
    assert (rows["Activations, forward"][2], rows["Input"][2]) == ("-", "-")


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
    assert rows["unused"] == ["Linear", "-", "6", "trainable"]
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

    assert rows["0"] == ["Tokens", "[2, 4, 4]", "4", "trainable"]
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


def test_depth_counts_what_it_hides():
    layers = seen(nn.Sequential(Twice(), nn.Sequential(nn.Linear(2, 2))), torch.randn(3, 4))
    whole, cut = text(layers), text(layers, depth=1)

    assert list(cut)[:3] == ["model", "0", "1"]
    assert (cut["0"][2:], cut["1"][2]) == (["30", "trainable"], "6")
    totals = ("Parameters", "trainable", "frozen", "Parameters and buffers", "Activations, forward", "Input")
    assert [cut[name] for name in totals] == [whole[name] for name in totals]


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
    def after_step(self, run):
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
        def train_start(self, run):
            self.model = deepcopy(run.model)

    average = Average()
    train(cnn(), Summary(), average)

    assert hooks(average.model) == 0


@pytest.mark.parametrize("plugins", [(), ("accumulate:every=4",)])
def test_one_micro_batch_counts(plugins):
    summary = Summary()
    train(cnn(), summary, *plugins)

    assert [layer.calls for layer in summary.layers] == [1] * 8
    assert sum(layer.activations for layer in summary.layers) == 4 * 2 * 1930
    assert summary.layers[0].inputs == 4 * 2 * 192


def test_a_model_run_in_parts_counts_once_too():
    """Where compute_loss is replaced, the model's own forward may never run."""

    class Parts:
        @hookimpl
        def compute_loss(self, run, batch):
            run.outputs = run.model[1](run.model[0](batch[0]))
            return nn.functional.cross_entropy(run.outputs, batch[1])

    summary = Summary()
    data = [(torch.randn(2, 4), torch.tensor([0, 1]))] * 4
    train(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), summary, Parts(), "accumulate:every=4", data=data)
    rows = text({layer.name: layer for layer in summary.layers})

    assert [layer.calls for layer in summary.layers] == [0, 1, 1]
    assert sum(layer.activations for layer in summary.layers) == 4 * 2 * (3 + 2)
    assert rows["model"][1] == rows["Input"][2] == "-"


def test_evaluation_before_the_first_step_does_not_count():
    class Baseline:
        @hookimpl
        def epoch_start(self, run):
            run.hook.evaluate(run=run)

    summary = Summary()
    train(cnn(), summary, Baseline(), valid=images(1, of=3))

    assert summary.layers[0].shape == "[2, 10]"


def test_frozen_by_a_plugin(capsys):
    class Freeze:
        @hookimpl
        def setup(self, run):
            run.model[0].requires_grad_(False)

    summary = Summary()
    train(cnn(), summary, Freeze())

    assert sum(layer.trainable for layer in summary.layers) == 1306


def test_compiled_model(capsys):
    def trained(*plugins):
        graphs = []

        def backend(graph, inputs):
            *nodes, output = (node for node in graph.graph.nodes if node.op != "placeholder")
            graphs.append(([str(node.target) for node in nodes], len(output.args[0])))
            return graph

        class Compile:
            @hookimpl
            def wrap_model(self, run):
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
    assert [layer.shape for layer in summary.layers] == ["[2, 10]", *["[2, 8, 8, 8]"] * 3, "[2, 8, 4, 4]",
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
    assert row.split() == [f"{name}_too", "Linear", "[2,", "2]", "10", "trainable"]
    assert next(line for line in lines if f"{name} " in line).split()[1:] == ["Linear", "used", "again:", "[bold]"]
    assert any(line.split()[:2] == ["[bold]", "Linear"] for line in lines)
    assert len(next(line for line in lines if "Output shape" in line)) > 80


def test_a_narrow_terminal_folds_and_cuts_nothing_off():
    layers = seen(nn.Sequential(nn.Linear(1000, 1000), nn.TransformerEncoderLayer(1000, 2, 16)), torch.randn(2, 1000))
    console = Console(width=50, file=StringIO())
    console.print(table(list(layers.values())))

    assert "…" not in console.file.getvalue()
    assert " 1,001,000 " in console.file.getvalue()
