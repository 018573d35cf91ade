"""The plugin cudagraph. Without a GPU, a fake graph records the operations of a step on the CPU and repeats them."""
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loopctl import Run, UsageError, available, fit, hookimpl
from loopctl.plugins import cudagraph
from tests.conftest import data_for

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)


class FakeGraph(TorchDispatchMode):
    """Behaves like a CUDA graph: while capturing, it records operations on tensors, and then undoes their effects."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.created, self.replays = [], {}, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in inputs:               # save all inputs: batch_norm changes tensors without declaring it
            if id(tensor) not in self.created:
                self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        results = func(*args, **(kwargs or {}))
        self.created |= {id(leaf) for leaf in tree_leaves(results) if leaf is not None}
        self.operations.append((func, args, kwargs or {}, results))
        return results

    def __enter__(self):
        self.rng_state = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.rng_state)
        with torch.no_grad():
            for tensor, saved in self.before.values():
                tensor.copy_(saved)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, results in self.operations:
            for result, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(result, torch.Tensor) and result is not new:
                    result.copy_(new)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


class Streams:
    """The current stream, as torch keeps it: that of the innermost block, which a capture sets too."""

    def __init__(self):
        self.default, self.of_captures = Stream(), Stream()
        self.entered = [self.default]

    def current(self, device=None):
        return self.entered[-1]

    @contextmanager
    def use(self, stream):
        self.entered.append(stream)
        try:
            yield
        finally:
            self.entered.pop()

    @contextmanager
    def capture(self, graph, stream=None):
        with self.use(stream or self.of_captures), graph:
            yield


@pytest.fixture
def graphs(monkeypatch):
    """The captured graphs, in order."""
    captured, streams = [], Streams()

    def graph():
        captured.append(FakeGraph())
        return captured[-1]

    monkeypatch.setattr(cudagraph, "DEVICES", ("cpu",))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", streams.capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", streams.current)
    monkeypatch.setattr(torch.cuda, "stream", streams.use)
    return captured


def accuracy(output, target):
    return (output.argmax(1) == target).float().mean()


COMPOSITIONS = [
    [],
    ["amp:dtype=bfloat16", "accumulate:every=2", "clip:max_norm=0.1", "warmup:length=2ep", "cosine:by=step"],
    ["accumulate:every=3", "ema:decay=0.9", "exponential:gamma=0.5", "freeze:patterns=0"],
    ["plateau:patience=0", "clip:value=0.01", "layerwise_lr:decay=0.5"],
]


@pytest.mark.compares(use="cudagraph", technique="a step replayed as a CUDA graph",
                      source="the run without it", tolerance="to the bit")
@pytest.mark.parametrize("plugins", COMPOSITIONS, ids=lambda plugins: ",".join(plugins))
def test_equals_steps_without_a_graph_to_the_bit(net, batches, valid, clone, same, graphs, plugins):
    """With dropout, BatchNorm, momentum, a smaller last batch, metrics and a schedule."""
    one, other = clone(net), clone(net)
    runs = [fit(model, cross_entropy, sgd, batches, valid, epochs=6, plugins=[*plugins, *more], seed=1,
                metrics={"accuracy": accuracy}) for model, more in ((one, []), (other, ["cudagraph"]))]
    same(one, other)
    for expected, found in zip(runs[0].history, runs[1].history, strict=True):
        for name in [name for name in expected if name.startswith("lr")]:          # a rate is a float32 tensor
            assert found.pop(name) == pytest.approx(expected.pop(name), rel=1e-7)
        assert repr(found) == repr(expected)
    assert len(graphs) == 1
    assert graphs[0].replays >= 5


REFUSED = {
    "activation_checkpointing", "amp", "bf16", "cyclic", "ddp", "freeze", "fsdp", "grad_noise", "local_sgd", "nan_guard", "norms", "offload_activations",
    "onecycle", "sam", "spike", "split", "tape", "tensorboard",
}      # with the options that `example` passes


@pytest.mark.parametrize("name", sorted({*available()} - {"cudagraph"}))
def test_every_other_plugin_equals_a_run_without_a_graph_or_is_refused(net, batches, valid, clone, same, graphs, example, tmp_path, name):
    one, other = clone(net), clone(net)
    batches = [*batches[:7], tuple(part[:6] for part in batches[6])]
    data_for([example(name)], one)
    batches, valid = data_for([example(name)], other, batches, valid)
    runs = [lambda model=model, more=more, number=number: fit(
        model, cross_entropy, sgd, batches, valid, epochs=3, plugins=[*more, example(name)], seed=1, out=tmp_path / str(number))
        for number, (model, more) in enumerate(((one, []), (other, ["cudagraph"])))]
    runs[0]()
    if name in REFUSED:
        with pytest.raises(UsageError, match=f"^cudagraph.* {name} .*(cannot be captured|both replace)"):
            runs[1]()
        return
    runs[1]()
    same(one, other)
    assert graphs[0].replays


def test_hooks_see_loss_outputs_and_gradients_of_every_step(net, batches, clone, graphs):
    """Also after a step without the graph."""
    class Recorder:
        def __init__(self):
            self.seen = []

        @hookimpl
        def after_step(self, run: Run):
            gradients = [parameter.grad.clone() for parameter in run.model.parameters()]
            self.seen.append([run.loss, run.outputs.detach().clone(), run.weight, *gradients])

    recorders = [Recorder(), Recorder()]
    fit(clone(net), cross_entropy, sgd, batches, epochs=2, plugins=[recorders[0]], seed=1)
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[recorders[1], "cudagraph"], seed=1)
    assert graphs[0].replays == 7 + 7 - 3
    torch.testing.assert_close(recorders[0].seen, recorders[1].seen, rtol=0, atol=0)


def test_all_gradients_are_made_on_one_side_stream(net, batches, valid, graphs):
    """Before the capture, in it, and in steps of another shape after it: gradients remember the stream of their first pass."""
    class Recorder:
        capturable = True

        def __init__(self):
            self.streams = []

        @hookimpl
        def after_backward(self):
            self.streams.append(torch.cuda.current_stream())

    recorder, default = Recorder(), torch.cuda.current_stream()
    fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=["cudagraph", recorder], seed=1)
    assert len(recorder.streams) == 3 + 1 + 3           # in the steps that are replayed, Python is not called
    assert len(set(recorder.streams)) == 1
    assert recorder.streams[0] is not default
    assert torch.cuda.current_stream() is default


def test_no_autograd_graph_is_kept_after_the_run(net, batches, clone, graphs):
    """A later run of the model would find its accumulators of gradients on another stream."""
    plugin = cudagraph.Cudagraph()
    runs = [fit(clone(net), cross_entropy, sgd, batches[:7], epochs=2, plugins=plugins, seed=1) for plugins in ([], [plugin])]
    assert graphs[0].replays
    assert [run.outputs for run in runs] == [None, None]
    assert plugin.outputs.grad_fn is plugin.loss.grad_fn is None


def test_metrics_of_plugins_are_updated_after_an_evaluation(net, batches, valid, clone, graphs):
    runs = [fit(model, cross_entropy, sgd, batches[:7], valid, epochs=3, plugins=["clip", *more], seed=1)
            for model, more in ((clone(net), []), (net, ["cudagraph"]))]
    norms = [[row["grad_norm"] for row in run.history] for run in runs]
    assert norms[0] == norms[1]
    assert len(set(norms[1])) == 3


def test_a_learning_rate_set_by_other_code_is_used(net, batches, clone, same, graphs):
    class SetLr:
        @hookimpl
        def after_step(self, run: Run):
            run.optimizer.param_groups[0]["lr"] = 0.1 / (1 + run.step)

    one, other = clone(net), clone(net)
    fit(one, cross_entropy, sgd, batches, epochs=2, plugins=[SetLr()], seed=1)
    fit(other, cross_entropy, sgd, batches, epochs=2, plugins=[SetLr(), "cudagraph"], seed=1)
    same(one, other)


def test_a_resumed_run_equals_an_uninterrupted_one(net, batches, clone, same, graphs, tmp_path):
    class Kill:
        @hookimpl
        def safe_point(self, run: Run):
            if run.step == 13:
                raise KeyboardInterrupt

    plugins = ["cudagraph", "cosine:by=step", "checkpoint:every_steps=1"]
    whole, other = clone(net), clone(net)
    fit(whole, cross_entropy, sgd, batches, epochs=4, plugins=["cosine:by=step"], seed=1)
    with pytest.raises(KeyboardInterrupt):
        fit(clone(net), cross_entropy, sgd, batches, epochs=4, plugins=[*plugins, Kill()], seed=1, out=tmp_path)
    fit(other, cross_entropy, sgd, batches, epochs=4, plugins=plugins, seed=1, out=tmp_path, resume=tmp_path)
    assert len(graphs) == 2
    same(whole, other)


def test_a_batch_with_another_number_runs_without_the_graph(plain, clone, same, graphs):
    """Values that are not tensors are constants of the graph."""
    class ScaledLoss:
        capturable = True

        @hookimpl
        def compute_loss(self, run: Run, batch):
            run.outputs = run.network(batch["x"])
            return run.outputs.square().mean() * batch["scale"]

    data = [{"x": torch.randn(4, 6), "scale": 1.0 if i % 3 else 2.0} for i in range(12)]
    one, other = clone(plain), clone(plain)
    fit(one, None, sgd, data, epochs=2, plugins=[ScaledLoss()])
    fit(other, None, sgd, data, epochs=2, plugins=[ScaledLoss(), "cudagraph"])
    same(one, other)
    assert 0 < graphs[0].replays < 24 - 3


def test_reading_a_tensor_on_the_host_during_capture_is_an_error(net, batches, graphs):
    """The fake graph raises an error, as a CUDA graph does."""
    class ReadLoss:
        capturable = True

        @hookimpl
        def grads_ready(self, run: Run):
            run.loss.item()

    with pytest.raises(AssertionError, match="the host reads a tensor") as error:
        fit(net, cross_entropy, sgd, batches, plugins=["cudagraph", ReadLoss()])
    assert error.value.__notes__ == ["raised by plugin 'read_loss' in its hook grads_ready"]


@pytest.mark.parametrize(("plugins", "optimizer", "message"), [
    (["nan_guard"], sgd, "cudagraph: the hook before_step of nan_guard cannot be captured; leave out cudagraph or nan_guard"),
    (["freeze:patterns=0,until=1ep"], sgd, "cudagraph: the hook before_step of freeze cannot be captured"),
    (["onecycle:max_lr=0.1"], sgd, "cudagraph: the hook before_step of onecycle cannot be captured"),
    (["sam"], sgd, "cudagraph: the hook optimizer_step of sam cannot be captured"),
    (["split"], sgd, "cudagraph: the hook before_step of split cannot be captured"),
    (["compile:mode=reduce-overhead"], sgd, "cudagraph: the hook wrap_model of compile cannot be captured"),
    (["amp:dtype=float16"], sgd, "cudagraph and amp both replace optimizer_step; choose one"),
    ([], partial(torch.optim.SGD, lr=0.1), "cudagraph: SGD does not take a tensor as learning rate; use an optimizer that is capturable"),
])
def test_what_cannot_be_captured_is_refused(net, batches, graphs, plugins, optimizer, message):
    with pytest.raises(UsageError, match="^" + message):
        fit(net, cross_entropy, optimizer, batches, plugins=["cudagraph", *plugins])
    assert not graphs


def test_a_metric_with_a_state_is_refused(net, batches, graphs):
    torchmetrics = pytest.importorskip("torchmetrics")
    with pytest.raises(UsageError, match="^cudagraph: metric 'accuracy' keeps a state, which cannot be captured; pass a function"):
        fit(net, cross_entropy, sgd, batches, plugins=["cudagraph"],
            metrics={"accuracy": torchmetrics.Accuracy("multiclass", num_classes=3)})


def test_a_run_on_a_cpu_is_refused(net, batches):
    with pytest.raises(UsageError, match="^cudagraph: CUDA graphs need a GPU, and this run is on cpu; leave out cudagraph"):
        fit(net, cross_entropy, sgd, batches, plugins=["cudagraph"])


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def steady():
    """`net` without a bias before BatchNorm: such a bias has rounding noise for a gradient, which Adam divides by its size."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("optimizer", [
    sgd, partial(torch.optim.Adam, lr=1e-2), partial(torch.optim.AdamW, lr=1e-2, fused=True), partial(torch.optim.RMSprop, lr=1e-3)])
@pytest.mark.parametrize("plugins", COMPOSITIONS, ids=lambda plugins: ",".join(plugins))
def test_on_cuda_it_agrees_with_steps_without_a_graph(steady, batches, valid, clone, same, plugins, optimizer):
    one, other = clone(steady), clone(steady)
    capturable = partial(optimizer, **({} if "fused" in optimizer.keywords else {"capturable": True}))
    runs = [fit(model, cross_entropy, factory, batches, valid, epochs=6, plugins=[*plugins, *more], seed=1,
                metrics={"accuracy": accuracy}, device="cuda")
            for model, factory, more in ((one, capturable, []), (other, optimizer, ["cudagraph"]))]
    same(one, other, tolerance=1e-5)       # the learning rate is a float32 tensor instead of a float64 number
    for a, b in zip(runs[0].history, runs[1].history, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
