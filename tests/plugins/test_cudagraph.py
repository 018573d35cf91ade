"""Captured steps. A machine without a GPU plays one: it notes every operation of torch and does them again."""
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loopctl import Run, UsageError, available, fit, hookimpl
from loopctl.plugins import cudagraph

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)


class Tape(TorchDispatchMode):
    """As a CUDA graph: operations on certain tensors, of which nothing is kept when it has been captured."""

    def __init__(self):
        super().__init__()
        self.operations, self.before, self.made, self.replays = [], {}, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in given:                # batch_norm changes tensors without saying so
            if id(tensor) not in self.made:
                self.before.setdefault(id(tensor), (tensor, tensor.clone()))
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a tensor"
        results = func(*args, **(kwargs or {}))
        self.made |= {id(leaf) for leaf in tree_leaves(results) if leaf is not None}
        self.operations.append((func, args, kwargs or {}, results))
        return results

    def __enter__(self):
        self.random = torch.get_rng_state()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.set_rng_state(self.random)
        with torch.no_grad():
            for tensor, was in self.before.values():
                tensor.copy_(was)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, results in self.operations:
            for held, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(held, torch.Tensor) and held is not new:
                    held.copy_(new)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass


@pytest.fixture
def tapes(monkeypatch):
    """What was captured, in order."""
    made = []

    @contextmanager
    def nothing(stream):
        yield

    def graph():
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(cudagraph, "GRAPHS", ("cpu",))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", nothing)
    return made


def accuracy(output, target):
    return (output.argmax(1) == target).float().mean()


COMPOSITIONS = [
    [],
    ["amp:dtype=bfloat16", "accumulate:every=2", "clip:max_norm=0.1", "warmup:length=2ep", "cosine:by=step"],
    ["accumulate:every=3", "ema:decay=0.9", "exponential:gamma=0.5", "freeze:patterns=0"],
    ["plateau:patience=0", "clip:value=0.01", "layerwise_lr:decay=0.5"],
]


@pytest.mark.parametrize("plugins", COMPOSITIONS, ids=lambda plugins: ",".join(plugins))
def test_bit_for_bit_the_usual_steps(net, batches, valid, clone, same, tapes, plugins):
    """Dropout, BatchNorm, momentum, a shorter last batch, metrics, a schedule."""
    one, other = clone(net), clone(net)
    runs = [fit(model, cross_entropy, sgd, batches, valid, epochs=6, plugins=[*plugins, *more], seed=1,
                metrics={"accuracy": accuracy}) for model, more in ((one, []), (other, ["cudagraph"]))]
    same(one, other)
    for expected, found in zip(runs[0].history, runs[1].history, strict=True):
        assert found.pop("lr") == pytest.approx(expected.pop("lr"), rel=1e-7)      # a float32 tensor
        assert repr(found) == repr(expected)
    assert len(tapes) == 1
    assert tapes[0].replays >= 5


REFUSED = {"amp", "cyclic", "ddp", "freeze", "fsdp", "nan_guard", "onecycle", "sam", "split"}      # with the options of `example`


@pytest.mark.parametrize("name", sorted({*available()} - {"cudagraph"}))
def test_with_every_other_bit_for_bit_or_refused(net, batches, valid, clone, same, tapes, example, tmp_path, name):
    one, other = clone(net), clone(net)
    batches = [*batches[:7], tuple(part[:6] for part in batches[6])]
    runs = [lambda model=model, more=more, number=number: fit(
        model, cross_entropy, sgd, batches, valid, epochs=3, plugins=[*more, example(name)], seed=1, out=tmp_path / str(number))
        for number, (model, more) in enumerate(((one, []), (other, ["cudagraph"])))]
    runs[0]()
    if name in REFUSED:
        with pytest.raises(UsageError, match=f"^cudagraph.* {name} .*(what it does there cannot be captured|both replace)"):
            runs[1]()
        return
    runs[1]()
    same(one, other)
    assert tapes[0].replays


def test_what_a_hook_sees(net, batches, clone, tapes):
    """Losses, outputs and gradients of every step, also after a step that took the usual way."""
    class Look:
        def __init__(self):
            self.seen = []

        @hookimpl
        def after_step(self, run: Run):
            gradients = [parameter.grad.clone() for parameter in run.model.parameters()]
            self.seen.append([run.loss, run.outputs.detach().clone(), run.weight, *gradients])

    looks = [Look(), Look()]
    fit(clone(net), cross_entropy, sgd, batches, epochs=2, plugins=[looks[0]], seed=1)
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[looks[1], "cudagraph"], seed=1)
    assert tapes[0].replays == 7 + 7 - 3
    torch.testing.assert_close(looks[0].seen, looks[1].seen, rtol=0, atol=0)


def test_metrics_of_plugins_go_on_after_an_evaluation(net, batches, valid, clone, tapes):
    runs = [fit(model, cross_entropy, sgd, batches[:7], valid, epochs=3, plugins=["clip", *more], seed=1)
            for model, more in ((clone(net), []), (net, ["cudagraph"]))]
    norms = [[row["grad_norm"] for row in run.history] for run in runs]
    assert norms[0] == norms[1]
    assert len(set(norms[1])) == 3


def test_a_rate_that_somebody_sets(net, batches, clone, same, tapes):
    class Sets:
        @hookimpl
        def after_step(self, run: Run):
            run.optimizer.param_groups[0]["lr"] = 0.1 / (1 + run.step)

    one, other = clone(net), clone(net)
    fit(one, cross_entropy, sgd, batches, epochs=2, plugins=[Sets()], seed=1)
    fit(other, cross_entropy, sgd, batches, epochs=2, plugins=[Sets(), "cudagraph"], seed=1)
    same(one, other)


def test_a_run_that_was_killed_goes_on_exactly(net, batches, clone, same, tapes, tmp_path):
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
    assert len(tapes) == 2
    same(whole, other)


def test_what_is_no_tensor_must_be_the_same(plain, clone, same, tapes):
    """A number in a batch is part of what was captured."""
    class Scales:
        capturable = True

        @hookimpl
        def compute_loss(self, run: Run, batch):
            run.outputs = run.network(batch["x"])
            return run.outputs.square().mean() * batch["scale"]

    data = [{"x": torch.randn(4, 6), "scale": 1.0 if i % 3 else 2.0} for i in range(12)]
    one, other = clone(plain), clone(plain)
    fit(one, None, sgd, data, epochs=2, plugins=[Scales()])
    fit(other, None, sgd, data, epochs=2, plugins=[Scales(), "cudagraph"])
    same(one, other)
    assert 0 < tapes[0].replays < 24 - 3


def test_the_host_reads_nothing_while_it_captures(net, batches, tapes):
    """The tape says so of a GPU's graph."""
    class Reads:
        capturable = True

        @hookimpl
        def grads_ready(self, run: Run):
            run.loss.item()

    with pytest.raises(AssertionError, match="the host reads a tensor") as error:
        fit(net, cross_entropy, sgd, batches, plugins=["cudagraph", Reads()])
    assert error.value.__notes__ == ["raised by plugin 'reads' in its hook grads_ready"]


@pytest.mark.parametrize(("plugins", "optimizer", "message"), [
    (["nan_guard"], sgd, "cudagraph: nan_guard joins before_step, and what it does there cannot be captured; leave one out"),
    (["freeze:patterns=0,until=1ep"], sgd, "cudagraph: freeze joins before_step"),
    (["onecycle:max_lr=0.1"], sgd, "cudagraph: onecycle joins before_step"),
    (["sam"], sgd, "cudagraph: sam joins optimizer_step"),
    (["split"], sgd, "cudagraph: split joins before_step"),
    (["compile:mode=reduce-overhead"], sgd, "cudagraph: compile joins wrap_model"),
    (["amp:dtype=float16"], sgd, "cudagraph and amp both replace optimizer_step; choose one"),
    ([], partial(torch.optim.SGD, lr=0.1), "cudagraph: SGD takes no tensor as learning rate; use one that is capturable"),
])
def test_refused(net, batches, tapes, plugins, optimizer, message):
    with pytest.raises(UsageError, match="^" + message):
        fit(net, cross_entropy, optimizer, batches, plugins=["cudagraph", *plugins])
    assert not tapes


def test_a_metric_with_a_state_is_refused(net, batches, tapes):
    torchmetrics = pytest.importorskip("torchmetrics")
    with pytest.raises(UsageError, match="^cudagraph: metric 'accuracy' keeps a state that cannot be captured; give a function"):
        fit(net, cross_entropy, sgd, batches, plugins=["cudagraph"],
            metrics={"accuracy": torchmetrics.Accuracy("multiclass", num_classes=3)})


def test_on_a_cpu_it_is_refused(net, batches):
    with pytest.raises(UsageError, match="^cudagraph: captures the work of a GPU, and this run is on cpu; leave it out"):
        fit(net, cross_entropy, sgd, batches, plugins=["cudagraph"])


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("optimizer", [
    sgd, partial(torch.optim.Adam, lr=1e-2), partial(torch.optim.AdamW, lr=1e-2, fused=True), partial(torch.optim.RMSprop, lr=1e-3)])
@pytest.mark.parametrize("plugins", COMPOSITIONS, ids=lambda plugins: ",".join(plugins))
def test_on_cuda_it_agrees_with_the_usual_steps(net, batches, valid, clone, same, plugins, optimizer):
    one, other = clone(net), clone(net)
    capturable = partial(optimizer, **({} if "fused" in optimizer.keywords else {"capturable": True}))
    runs = [fit(model, cross_entropy, factory, batches, valid, epochs=6, plugins=[*plugins, *more], seed=1,
                metrics={"accuracy": accuracy}, device="cuda")
            for model, factory, more in ((one, capturable, []), (other, optimizer, ["cudagraph"]))]
    same(one, other, tolerance=1e-5)       # the rate is a float32 tensor in a graph, and was a float64 number
    for a, b in zip(runs[0].history, runs[1].history, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-4)
