"""The plugin compile: the same weights as the plain loop, the model's own parameter names, few recompilations."""
import logging
import shutil
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.backends import registry
from torch._dynamo.utils import counters

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.model.summary import repeated_blocks
from loopctl.plugins.compile import Compile

cross_entropy = nn.CrossEntropyLoss()
needs_compiler = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="needs a C++ compiler")
# While it compiles a block, torch reads the .grad of the block's input. It hides that warning, but not in tests.
reads_grad = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """Discard what earlier tests have compiled."""
    torch._dynamo.reset()
    counters.clear()


def graph_count():
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def batches(batches):
    """Eight batches, the last of which is smaller."""
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


def deep_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Sequential(*(Block(16) for _ in range(4))), nn.Linear(16, 3))


@pytest.mark.compares(use="compile", technique="compiled forward and backward passes",
                      source="torch.compile", tolerance="to the bit with backend=eager")
@pytest.mark.parametrize("plugins", [
    [], ["amp:dtype=bfloat16"], ["amp:dtype=float16", "clip"], ["freeze:patterns=0,until=2ep"], ["accumulate:every=3"],
    ["ema:decay=0.9", "cosine:by=step", "clip"], ["sam"], ["split"], ["summary"], ["swa:start=50%"]], ids="+".join)
def test_equals_the_plain_loop_to_the_bit(net, batches, valid, clone, same, sgd, plugins):
    other = clone(net)
    runs = [fit(model, cross_entropy, sgd, batches, valid, epochs=3, plugins=[*plugins, *more], seed=1)
            for model, more in ((net, ["compile:backend=eager,fullgraph=true"]), (other, []))]
    same(net, other)
    assert runs[0].history == runs[1].history
    assert graph_count() > 0


@needs_compiler
def test_with_inductor_it_equals_the_plain_loop_except_for_rounding(plain, batches, valid, clone, same, sgd):
    other = clone(plain)
    run = fit(plain, cross_entropy, sgd, batches * 7, valid, plugins=["compile"], seed=1)
    fit(other, cross_entropy, sgd, batches * 7, valid, seed=1)
    assert run.step == 56
    same(plain, other, tolerance=1e-5)


class GraphCounts:
    """Records the number of compiled graphs after each step."""

    def __init__(self):
        self.graphs = []

    @hookimpl
    def after_step(self):
        self.graphs.append(graph_count())


@pytest.mark.parametrize("order", [1, -1])
def test_changing_learning_rates_and_averages_do_not_recompile(net, batches, valid, sgd, order):
    """Training and evaluation compile once each, and once more for the second batch size, then never again."""
    count = GraphCounts()
    batches = [*batches[:6], *(tuple(part[:size] for part in batches[6]) for size in (7, 6))]
    valid = [*valid, tuple(part[:4] for part in valid[0])]
    plugins = ["cosine:by=step", "ema:decay=0.9", "clip", "compile:backend=eager", "channels_last", count][::order]
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=7, eval_every=3, plugins=plugins)
    assert run.step == 56
    # Training and evaluation both have batches of three sizes, all of them in the first epoch.
    assert count.graphs[0] == 1
    assert 2 <= count.graphs[7] <= 4
    assert count.graphs[8:] == [count.graphs[8]] * 48
    assert count.graphs[-1] <= 4


def test_dynamic_from_the_start_compiles_once_for_all_sizes(net, batches, sgd):
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["compile:backend=eager,dynamic=true"])
    assert graph_count() == 1


def test_many_runs_in_one_process_are_all_compiled(batches, sgd):
    """By default torch compiles at most eight versions of a forward method, and all Sequentials share one."""
    compiled = []
    for width in range(4, 14):
        model = nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3), *(nn.Identity() for _ in range(width)))
        fit(model, cross_entropy, sgd, batches[:1], plugins=["compile:backend=eager,dynamic=false"])
        compiled.append(graph_count())
    assert compiled == list(range(1, 11))


@reads_grad
def test_blocks_of_the_same_class_share_compiled_code(batches, valid, clone, same, sgd):
    model, other = deep_model(), deep_model()
    fit(model, cross_entropy, sgd, batches, valid, epochs=3, plugins=["compile:backend=eager,per_block=true"])
    fit(other, cross_entropy, sgd, batches, valid, epochs=3)
    same(model, other)
    assert 2 <= graph_count() <= 4                  # not one or more per block
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_blocks_are_the_outermost_repeated_modules_that_have_parts():
    import torchvision
    resnet = torchvision.models.resnet18()
    assert repeated_blocks(resnet) == [block for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4) for block in layer]
    model = deep_model()
    assert repeated_blocks(model) == list(model[1])
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), Block(2))) == []
    pairs = nn.Sequential(Pair(), Pair())
    assert repeated_blocks(pairs) == list(pairs)


@reads_grad
def test_blocks_are_restored_after_an_error(batches, sgd):
    class Fail:
        @hookimpl
        def after_step(self, run: Run):
            raise RuntimeError("simulated failure")

    model = deep_model()
    with pytest.raises(RuntimeError, match="simulated failure"):
        fit(model, cross_entropy, sgd, batches, plugins=["compile:backend=eager,per_block=true", Fail()])
    assert graph_count() > 0
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_the_model_keeps_its_own_parameter_names(net, batches, clone, same, sgd, tmp_path):
    """In checkpoints, weight averages and patterns, and after a resume."""
    whole, resumed = clone(net), clone(net)
    plugins = ["compile:backend=eager", "ema:decay=0.9", "freeze:patterns=0.*", "checkpoint"]
    fit(whole, cross_entropy, sgd, batches, epochs=4, plugins=plugins, seed=1, out=tmp_path / "whole")
    run = fit(net, cross_entropy, sgd, batches, epochs=2, plugins=plugins, seed=1, out=tmp_path / "a")
    assert run.network is not run.model is net
    saved = torch.load(tmp_path / "a" / "checkpoints" / "step-00000016.pt", weights_only=True)
    assert list(saved["model"]) == list(resumed.state_dict())
    assert set(saved["plugins"]["ema"]["average"]) <= set(resumed.state_dict())
    fit(resumed, cross_entropy, sgd, batches, epochs=4, plugins=plugins, seed=1, out=tmp_path / "a", resume=tmp_path / "a")
    same(resumed, whole)


class GraphBreak(nn.Module):
    """A model with a graph break."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.layer(x)


@pytest.mark.parametrize(("spec", "make", "words"), [
    ("backend=foo", deep_model, r"^compile: no backend is called 'foo'; choose one of aot_eager, eager, .*inductor"),
    ("backend=eager,mode=max-autotune", deep_model, r"^compile: mode is an option of inductor, not of eager; leave out mode or backend$"),
    ("backend=eager,fullgraph=true", GraphBreak, r"^compile: Call to .*graph_break.*; use fullgraph=false$"),
    ("backend=eager,per_block=true", GraphBreak, r"^compile: per_block: the model has no repeated blocks; leave out per_block$"),
    ("backend=tvm", GraphBreak, r"^compile: backend='tvm' raised: .*; leave out compile to see whether the model itself fails$"),
])
def test_what_cannot_be_compiled_is_refused_in_one_line_without_training(batches, clone, same, sgd, spec, make, words):
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
    """torch would accumulate wrong gradients over micro-batches, see pytorch/pytorch#169545 and #96693."""
    words = rf"^compile: .* uses CUDA graphs, .*, and {other.partition(':')[0]} makes several backward passes; use mode=max-autotune-no-cudagraphs$"
    for order in (1, -1):
        with pytest.raises(UsageError, match=words):
            fit(plain, cross_entropy, sgd, batches, plugins=[f"compile:{options}", other][::order])


def test_a_model_with_a_graph_break_is_compiled(batches, clone, same, sgd):
    model = GraphBreak()
    other = clone(model)
    fit(model, cross_entropy, sgd, batches, plugins=[Compile(backend="eager")])
    fit(other, cross_entropy, sgd, batches)
    same(model, other)


def test_a_missing_compiler_is_reported(plain, batches, sgd, monkeypatch, tmp_path):
    import torch._inductor.config
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))         # an empty cache
    words = r"^compile: .*No working C\+\+ compiler found.*; install g\+\+, or use backend=aot_eager, which needs none$"
    with torch._inductor.config.patch({"cpp.cxx": ("/nowhere/g++",)}), pytest.raises(UsageError, match=words):
        fit(plain, cross_entropy, sgd, batches, plugins=["compile"])


class AssertSilenced:
    """Asserts in each step that torch's warnings about the CUDA toolkit are suppressed."""

    @hookimpl
    def after_step(self):
        assert not logging.getLogger("torch.utils.cpp_extension").isEnabledFor(logging.WARNING)


def test_warnings_about_the_cuda_toolkit_are_suppressed_during_the_run(plain, batches, sgd):
    log = logging.getLogger("torch.utils.cpp_extension")
    before = log.level
    fit(plain, cross_entropy, sgd, batches, plugins=["compile:backend=eager", AssertSilenced()])
    assert log.level == before


POWER = "failed while executing %s(%s)", "pow_by_natural", ["VR[2, int_oo]", "VR[-1, -1]"]
DEPRECATED = "`torch.jit.script_method` is deprecated. Please switch to `torch.compile` or `torch.export`."


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])      # of torch 2.9 to 2.12, and of later ones
def test_what_the_compiler_says_of_itself_is_suppressed_during_the_run(plain, batches, sgd, monkeypatch, category):
    """A backend that warns and logs what inductor does. All else is still said, in the run and after it."""
    log = logging.getLogger("torch.utils._sympy.interp")

    def talks(graph, inputs):
        warnings.warn(DEPRECATED, category, stacklevel=2)
        log.warning(*POWER)
        log.warning("failed while executing %s(%s)", "floordiv", [])
        with pytest.warns(category, match="of another kind"):
            warnings.warn("`torch.jit.script` is of another kind", category, stacklevel=2)
        compiled.append(graph)
        return graph.forward

    compiled, said, handler = [], [], logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: said.append(record.getMessage()))
    monkeypatch.setattr(log, "handlers", [handler])
    monkeypatch.setattr(log, "propagate", False)
    talks._tags = ()                    # as torch 2.8 expects
    monkeypatch.setitem(registry._BACKENDS, "talks", None)
    monkeypatch.setitem(registry._COMPILER_FNS, "talks", talks)
    fit(plain, cross_entropy, sgd, batches, plugins=["compile:backend=talks"])
    assert compiled
    assert set(said) == {"failed while executing floordiv([])"}
    log.warning(*POWER)
    assert "pow_by_natural" in said[-1]
    with pytest.warns(category, match="script_method"):
        warnings.warn(DEPRECATED, category, stacklevel=2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")        # of some versions of torch; --matmul switches them on
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_cuda_it_equals_the_plain_loop_except_for_rounding(plain, batches, valid, clone, same, sgd, mode):
    other = clone(plain)
    plugins = ["ema:decay=0.9", "clip", "cosine:by=step"]
    fit(plain, cross_entropy, sgd, batches, valid, epochs=7, plugins=[*plugins, f"compile:mode={mode}"], device="cuda")
    fit(other, cross_entropy, sgd, batches, valid, epochs=7, plugins=plugins, device="cuda")
    same(plain, other, tolerance=1e-4)


def test_hooks_of_a_model_run_although_a_like_model_was_compiled_before(plain, batches, sgd, clone):
    """torch would use the code of the model before, which has no hooks."""
    calls = []
    for hooked in (False, True, False):
        model, before = clone(plain), len(calls)
        if hooked:
            model[1].register_forward_hook(lambda module, inputs, output: calls.append(1))
        fit(model, nn.CrossEntropyLoss(), sgd, batches, plugins=["compile:backend=eager"])
        assert len(calls) - before == hooked * len(batches)
