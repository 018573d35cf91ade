"""compile against the plain loop: the same weights, under the model's own names, and compiled as seldom as can be."""
import logging
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.model.summary import repeated_blocks
from loopctl.plugins.compile import Compile

cross_entropy = nn.CrossEntropyLoss()
needs_compiler = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
# In a block within a model, torch looks at its input's gradient while compiling; outside of tests it keeps that quiet.
looks = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """No test finds what another one compiled."""
    torch._dynamo.reset()
    counters.clear()


def graphs():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def batches(batches):
    """Fifty steps are seven epochs and one; the last batch is smaller."""
    return [*batches[:7], tuple(part[:6] for part in batches[6])]


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

    def forward(self, x):
        return x + torch.relu(self.norm(self.inner(x)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = Block(4), Block(4)


def deep():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Sequential(*(Block(16) for _ in range(4))), nn.Linear(16, 3))


@pytest.mark.parametrize("plugins", [
    [], ["amp:dtype=bfloat16"], ["amp:dtype=float16", "clip"], ["freeze:patterns=0,until=2ep"], ["accumulate:every=3"],
    ["ema:decay=0.9", "cosine:by=step", "clip"], ["sam"], ["split"], ["summary"], ["swa:start=50%"]], ids="+".join)
def test_bit_for_bit_the_plain_loop(net, batches, valid, clone, same, sgd, plugins):
    other = clone(net)
    runs = [fit(model, cross_entropy, sgd, batches, valid, epochs=3, plugins=[*plugins, *more], seed=1)
            for model, more in ((net, ["compile:backend=eager,fullgraph=true"]), (other, []))]
    same(net, other)
    assert runs[0].history == runs[1].history
    assert graphs() > 0


@needs_compiler
def test_with_inductor_the_same_but_for_rounding(plain, batches, valid, clone, same, sgd):
    other = clone(plain)
    run = fit(plain, cross_entropy, sgd, batches * 7, valid, plugins=["compile"], seed=1)
    fit(other, cross_entropy, sgd, batches * 7, valid, seed=1)
    assert run.step == 56
    same(plain, other, tolerance=1e-5)


class Count:
    """The number of graphs after each step."""

    def __init__(self):
        self.graphs = []

    @hookimpl
    def after_step(self):
        self.graphs.append(graphs())


@pytest.mark.parametrize("order", [1, -1])
def test_nothing_compiles_anew_while_rates_and_averages_move(net, batches, valid, sgd, order):
    """Training and evaluation compile once each, and once more for another size of batch, then never again."""
    count = Count()
    batches = [*batches[:6], *(tuple(part[:size] for part in batches[6]) for size in (7, 6))]
    valid = [*valid, tuple(part[:4] for part in valid[0])]
    plugins = ["cosine:by=step", "ema:decay=0.9", "clip", "compile:backend=eager", "channels_last", count][::order]
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=7, eval_every=3, plugins=plugins)
    assert run.step == 56
    # Each has batches of three sizes, in the first epoch already.
    assert count.graphs[0] == 1
    assert 2 <= count.graphs[7] <= 4
    assert count.graphs[8:] == [count.graphs[8]] * 48
    assert count.graphs[-1] <= 4


def test_dynamic_from_the_start_compiles_once_for_all_sizes(net, batches, sgd):
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["compile:backend=eager,dynamic=true"])
    assert graphs() == 1


def test_many_runs_in_one_process_are_all_compiled(batches, sgd):
    """Torch compiles no more than eight versions of one forward, and Sequential has but one for all models."""
    compiled = []
    for width in range(4, 14):
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3), *(nn.Identity() for _ in range(width)))
        fit(model, cross_entropy, sgd, batches[:1], plugins=["compile:backend=eager,dynamic=false"])
        compiled.append(graphs())
    assert compiled == list(range(1, 11))


@looks
def test_blocks_of_a_class_share_what_is_compiled(batches, valid, clone, same, sgd):
    model, other = deep(), deep()
    fit(model, cross_entropy, sgd, batches, valid, epochs=3, plugins=["compile:backend=eager,per_block=true"])
    fit(other, cross_entropy, sgd, batches, valid, epochs=3)
    same(model, other)
    assert 2 <= graphs() <= 4                  # and not four times as many
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_blocks_are_the_outermost_repeated_modules_that_have_parts():
    import torchvision
    resnet = torchvision.models.resnet18()
    assert repeated_blocks(resnet) == [block for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4) for block in layer]
    model = deep()
    assert repeated_blocks(model) == list(model[1])
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Block(2))) == []
    pairs = nn.Sequential(Pair(), Pair())
    assert repeated_blocks(pairs) == list(pairs)


@looks
def test_blocks_are_as_they_were_after_an_error_too(batches, sgd):
    class Fail:
        @hookimpl
        def after_step(self, run: Run):
            raise RuntimeError("enough")

    model = deep()
    with pytest.raises(RuntimeError, match="enough"):
        fit(model, cross_entropy, sgd, batches, plugins=["compile:backend=eager,per_block=true", Fail()])
    assert graphs() > 0
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_the_model_keeps_its_own_names(net, batches, clone, same, sgd, tmp_path):
    """In checkpoints, averages and patterns; and a run goes on."""
    whole, again = clone(net), clone(net)
    plugins = ["compile:backend=eager", "ema:decay=0.9", "freeze:patterns=0.*", "checkpoint"]
    fit(whole, cross_entropy, sgd, batches, epochs=4, plugins=plugins, seed=1, out=tmp_path / "whole")
    run = fit(net, cross_entropy, sgd, batches, epochs=2, plugins=plugins, seed=1, out=tmp_path / "a")
    assert run.network is not run.model is net
    saved = torch.load(tmp_path / "a" / "checkpoints" / "step-00000016.pt", weights_only=True)
    assert list(saved["model"]) == list(again.state_dict())
    assert set(saved["plugins"]["ema"]["average"]) <= set(again.state_dict())
    fit(again, cross_entropy, sgd, batches, epochs=4, plugins=plugins, seed=1, out=tmp_path / "a", resume=tmp_path / "a")
    same(again, whole)


class Asks(nn.Module):
    """A model that asks for a value on its way, where a compiled one breaks in two."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.layer(x)


@pytest.mark.parametrize(("spec", "make", "words"), [
    ("backend=foo", deep, r"^compile: no backend is called 'foo'; there are aot_eager, eager, .*inductor"),
    ("backend=eager,mode=max-autotune", deep, r"^compile: mode is inductor's, not eager's; leave out one of the two$"),
    ("backend=eager,fullgraph=true", Asks, r"^compile: Call to .*graph_break.*; use fullgraph=false$"),
    ("backend=eager,per_block=true", Asks, r"^compile: per_block: no block of layers is in the model twice; leave out per_block$"),
    ("backend=tvm", Asks, r"^compile: backend='tvm' raised: .*; leave compile out, which shows whether the model itself fails$"),
])
def test_what_cannot_be_is_refused_in_one_line_and_trains_nothing(batches, clone, same, sgd, spec, make, words):
    model = make()
    before = clone(model)
    with pytest.raises(UsageError, match=words) as refused:
        fit(model, cross_entropy, sgd, batches, plugins=[f"compile:{spec}"])
    assert len(str(refused.value)) < 450
    assert "\n" not in str(refused.value)
    same(model, before)


@pytest.mark.parametrize("options", ["mode=reduce-overhead", "mode=max-autotune", "backend=cudagraphs"])
@pytest.mark.parametrize("other", ["accumulate:every=2", "split"])
def test_cuda_graphs_allow_one_backward_pass_per_step(plain, batches, sgd, options, other):
    """Torch would add the gradients of micro-batches up wrongly, pytorch/pytorch#169545 and #96693."""
    words = rf"^compile: with CUDA graphs, as .*, and {other.partition(':')[0]} makes several; use mode=max-autotune-no-cudagraphs$"
    for order in (1, -1):
        with pytest.raises(UsageError, match=words):
            fit(plain, cross_entropy, sgd, batches, plugins=[f"compile:{options}", other][::order])


def test_a_model_in_pieces_is_compiled_in_pieces(batches, clone, same, sgd):
    model = Asks()
    other = clone(model)
    fit(model, cross_entropy, sgd, batches, plugins=[Compile(backend="eager")])
    fit(other, cross_entropy, sgd, batches)
    same(model, other)


def test_without_a_compiler_it_says_so(plain, batches, sgd, monkeypatch, tmp_path):
    import torch._inductor.config
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))         # where nothing is compiled already
    words = r"^compile: .*No working C\+\+ compiler found.*; install g\+\+, or use backend=aot_eager, which needs none$"
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}), pytest.raises(UsageError, match=words):
        fit(plain, cross_entropy, sgd, batches, plugins=["compile"])


class Listen:
    """How much torch says of CUDA's tools while the run lasts."""

    @hookimpl
    def after_step(self):
        assert not logging.getLogger("torch.utils.cpp_extension").isEnabledFor(logging.WARNING)


def test_tools_of_cuda_without_a_gpu_are_no_matter_while_it_runs(plain, batches, sgd):
    log = logging.getLogger("torch.utils.cpp_extension")
    before = log.level
    fit(plain, cross_entropy, sgd, batches, plugins=["compile:backend=eager", Listen()])
    assert log.level == before


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_cuda_the_same_but_for_rounding(plain, batches, valid, clone, same, sgd, mode):
    other = clone(plain)
    plugins = ["ema:decay=0.9", "clip", "cosine:by=step"]
    fit(plain, cross_entropy, sgd, batches, valid, epochs=7, plugins=[*plugins, f"compile:mode={mode}"], device="cuda")
    fit(other, cross_entropy, sgd, batches, valid, epochs=7, plugins=plugins, device="cuda")
    same(plain, other, tolerance=1e-4)
