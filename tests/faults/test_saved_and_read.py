"""What a checkpoint has saved can be read back, is what was saved, and fits the run that reads it."""
import datetime
import io
import json
import shutil
import subprocess
import sys
from collections import defaultdict, deque
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchmetrics import MeanMetric

from loopctl import Run, UsageError, fit, hookimpl, load_weights
from loopctl.checkpoint.plain_values import describe, restore_value

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


class Killed(Exception):
    pass


class KillAt:
    """Ends the run after a number of updates, in place of a killed process."""

    def __init__(self, step):
        self.step = step

    @hookimpl
    def before_step(self, run: Run):
        if run.step == self.step:
            raise Killed


def killed(step, **arguments):
    with pytest.raises(Killed):
        fit(**arguments, plugins=[*PLUGINS, KillAt(step)])


PLUGINS = ["checkpoint:every_steps=1,keep=3"]


class Remembers:
    """A plugin with any state. `change(plugin, run)` changes it after a step."""

    observer_only = True

    def __init__(self, state, change=lambda plugin, run: None):
        self.state, self.change = state, change

    @hookimpl
    def after_step(self, run: Run):
        self.change(self, run)

    def state_dict(self):
        return {"state": self.state}

    def load_state_dict(self, state):
        self.state = state["state"]


STATES = [np.float64(0.1), np.int8(3), np.bool_(True), np.arange(6.0).reshape(2, 3), np.datetime64("2020-01-01"), deque([1, (2, "x")], maxlen=3),
          Path("a/b"), defaultdict(list, a=[1]), frozenset({1, 2}), range(3, 9, 2), {np.int64(3): "x"}, {"a": {1, 2}}, 2**80, b"\0\1", 1j,
          np.array(["a", "bc"]), [torch.ones(2).to_sparse(), torch.float16]]


def same(one, other):
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other) and one.dtype == other.dtype
    if isinstance(one, list) and isinstance(one[0], torch.Tensor):
        return torch.equal(one[0].to_dense(), other[0].to_dense()) and one[1] == other[1]
    return one == other and type(one) is type(other) and getattr(one, "maxlen", 0) == getattr(other, "maxlen", 0)


@pytest.mark.parametrize("state", STATES, ids=lambda state: type(state).__name__)
@pytest.mark.fault(row="C1", given="a plugin's state that is, or becomes during the run, a value of numpy, a deque, a path", right="it is the same after a resume")
def test_a_state_of_numpy_or_a_container_comes_back_as_it_was(plain, batches, tmp_path, state):
    def change(plugin, run):
        plugin.state = state

    fit(plain, cross_entropy, sgd, batches, plugins=["checkpoint", Remembers(0.0, change)], out=tmp_path)
    plugin = Remembers(0.0)
    fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint", plugin], out=tmp_path, resume=tmp_path)
    assert same(plugin.state, state)


class WithHistory(torch.optim.SGD):
    """An optimizer whose state has what torch.save writes and torch.load does not read."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].setdefault("steps", deque()).append(np.float32(len(self.state)))


@pytest.mark.fault(row="C", given="an optimizer whose state has a deque of numpy numbers", right="it is the same after a resume")
def test_the_state_of_an_optimizer_comes_back_as_it_was(plain, clone, batches, tmp_path):
    whole, resumed = clone(plain), clone(plain)
    optimizer = partial(WithHistory, lr=0.1)
    expected = fit(whole, cross_entropy, optimizer, batches, epochs=2)
    fit(resumed, cross_entropy, optimizer, batches, plugins=["checkpoint"], out=tmp_path)
    run = fit(resumed, cross_entropy, optimizer, batches, epochs=2, plugins=["checkpoint"], out=tmp_path, resume=tmp_path)
    assert equal(whole, resumed)
    state = list(run.optimizer.state.values())
    assert [one["steps"] for one in state] == [one["steps"] for one in expected.optimizer.state.values()]
    assert type(state[0]["steps"]) is deque


@pytest.mark.fault(row="C", given="a state that no checkpoint can hold, from the beginning", right="refused before the first update, by name")
def test_a_state_that_cannot_be_saved_is_refused_before_training(plain, batches, tmp_path):
    with pytest.raises(UsageError, match="plugin remembers: its state has a fractions.Fraction; a checkpoint holds tensors"):
        fit(plain, cross_entropy, sgd, batches, plugins=["checkpoint", Remembers(Fraction(1, 3))], out=tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


@pytest.mark.fault(row="C", given="an optimizer state that no checkpoint can hold", right="refused after the first step, by name")
def test_an_optimizer_state_that_cannot_be_saved_is_refused_after_the_first_step(plain, batches, tmp_path):
    class Dated(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["when"] = datetime.date(2020, 1, 1)
            return loss

    with pytest.raises(UsageError, match=r"optimizer: its state has a datetime.date"):
        fit(plain, cross_entropy, partial(Dated, lr=0.1), batches, plugins=["checkpoint"], out=tmp_path)


@pytest.mark.fault(row="C", given="a state that becomes unreadable in the second epoch", right="said at that save; the checkpoint before it stays")
def test_a_state_that_becomes_unreadable_is_said_at_the_save(plain, batches, tmp_path, caplog):
    def change(plugin, run):
        if run.step > 8:
            plugin.state = datetime.date(2020, 1, 1)

    fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint", Remembers(0, change)], out=tmp_path)
    assert "step-00000016.pt cannot be written (plugin remembers: its state has a datetime.date" in caplog.text
    assert [file.name for file in tmp_path.rglob("step-*.pt")] == ["step-00000008.pt"]


class Buffers(nn.Module):
    """A model with buffers that safetensors refuses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 3)
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("expanded", torch.ones(1).expand(3))

    def forward(self, input):
        return torch.sparse.mm(self.sparse, self.layer(input).T).T * self.expanded


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.fault(row="C2", given="a sparse buffer and an expanded one, with checkpoint", right="saved, resumed and loaded")
def test_sparse_and_overlapping_buffers_are_saved(batches, valid, tmp_path):
    whole, resumed = Buffers(), Buffers()
    fit(whole, cross_entropy, sgd, batches, valid, epochs=2)
    fit(resumed, cross_entropy, sgd, batches, valid, plugins=["checkpoint"], out=tmp_path)
    resumed = Buffers()
    fit(resumed, cross_entropy, sgd, batches, valid, epochs=2, plugins=["checkpoint"], out=tmp_path, resume=tmp_path)
    assert torch.equal(whole.layer.weight, resumed.layer.weight)
    assert torch.equal(resumed.sparse.to_dense(), torch.eye(3))
    loaded = Buffers()
    loaded.layer.weight.data.zero_()
    loaded.sparse = torch.zeros(3, 3).to_sparse()
    loaded.expanded = torch.zeros(3)
    assert load_weights(loaded, tmp_path / "checkpoints" / "best.safetensors") == []
    assert torch.equal(loaded.sparse.to_dense(), torch.eye(3))
    assert torch.equal(loaded.expanded, torch.ones(3))


class Scaled(nn.Module):
    """A loss function with a parameter and a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("calls", torch.zeros(()))
        self.modes = set()

    def forward(self, output, target):
        self.modes.add(self.training)
        self.calls += torch.is_grad_enabled()
        return cross_entropy(output * self.scale, target)


@pytest.mark.fault(row="C3", given="a loss function with a parameter and a buffer, killed and resumed", right="trained by a factory, saved, in the mode of the model")
def test_a_loss_function_belongs_to_the_run(plain, clone, batches, valid, tmp_path):
    by_hand, loss_by_hand = clone(plain), Scaled()
    optimizer = sgd([*by_hand.parameters(), *loss_by_hand.parameters()])
    for input, target in batches * 2:
        optimizer.zero_grad()
        loss_by_hand(by_hand(input), target).backward()
        optimizer.step()

    killed(11, model=clone(plain), loss_fn=Scaled(), optimizer=sgd, train=batches, valid=valid, epochs=2, out=tmp_path)
    model, loss = clone(plain), Scaled()
    fit(model, loss, sgd, batches, valid, epochs=2, plugins=PLUGINS, out=tmp_path, resume=tmp_path)
    assert equal(model, by_hand)
    assert equal(loss, loss_by_hand)
    assert loss.calls == 16
    assert loss.modes == {True, False}


@pytest.mark.parametrize("plugin", ["ema:decay=0.9,warmup=false", "swa:start=1ep"])
@pytest.mark.fault(row="C", given="ema or swa with a loss function that has a parameter", right="its average too is evaluated, and the run ends with it")
def test_averages_include_the_parameters_of_a_loss_function(plain, clone, batches, valid, plugin):
    by_hand, loss_by_hand = clone(plain), Scaled()
    tensors = [*by_hand.parameters(), *loss_by_hand.parameters()]
    optimizer, averages = sgd(tensors), []
    for number, (input, target) in enumerate(batches * 3, 1):
        optimizer.zero_grad()
        loss_by_hand(by_hand(input), target).backward()
        optimizer.step()
        with torch.no_grad():
            if "ema" in plugin:
                averages = averages or [tensor.detach().clone() for tensor in tensors]
                for average, tensor in zip(averages, tensors, strict=True):
                    average.lerp_(tensor, 1 - 0.9 if number > 1 else 0.0)
            elif number in (16, 24):
                averages = averages or [tensor.detach().clone() for tensor in tensors]
                for average, tensor in zip(averages, tensors, strict=True):
                    average.lerp_(tensor, 0.5 if number == 24 else 0.0)
    loss = Scaled()
    run = fit(plain, loss, sgd, batches, valid, epochs=3, plugins=[plugin])
    assert torch.equal(loss.scale, averages[-1])
    with torch.no_grad():
        for tensor, average in zip(tensors, averages, strict=True):
            tensor.copy_(average)
        expected = sum(loss_by_hand(by_hand(input), target).item() * len(input) for input, target in valid) / 13
    assert run.history[-1]["val_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.fault(row="C", given="a loss function with parameters that the given optimizer does not hold", right="said in one line; they stay")
def test_parameters_of_a_loss_function_that_are_not_trained_are_named(plain, batches, caplog):
    loss = Scaled()
    fit(plain, loss, torch.optim.SGD(plain.parameters(), lr=0.1), batches)
    assert loss.scale == 2
    assert "loss_fn has parameters that the optimizer does not hold, so they are not trained: scale" in caplog.text


@pytest.mark.fault(row="C", given="a loss function that holds the model, as sentence-transformers' do", right="the model is saved and trained once")
def test_a_loss_function_may_hold_the_model(plain, clone, batches, tmp_path):
    class Holding(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.scale = model, nn.Parameter(torch.tensor(2.0))

        def forward(self, output, target):
            return cross_entropy(output * self.scale, target)

    by_hand, model = clone(plain), clone(plain)
    held = Holding(by_hand)
    optimizer = sgd(held.parameters())
    for input, target in batches:
        optimizer.zero_grad()
        held(by_hand(input), target).backward()
        optimizer.step()
    run = fit(model, Holding(model), sgd, batches, plugins=["checkpoint"], out=tmp_path)
    assert equal(model, by_hand)
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == 5
    saved = torch.load(next(tmp_path.rglob("step-*.pt")), weights_only=True)
    assert list(saved["loss_fn"]) == ["scale"]


def trained_in_processes(model, loss, batches, folder):
    fit(model, loss, sgd, batches, batches[:2], epochs=2, plugins=["ddp", "checkpoint"], out=folder, seed=0)
    return model.state_dict(), loss.state_dict()


@pytest.mark.fault(row="C", given="a loss function with a parameter and a buffer, with two processes", right="equal in both, and that of one process over both batches")
def test_a_loss_function_is_the_same_in_all_processes(ranks, plain, clone, batches, tmp_path):
    results = ranks(2, trained_in_processes, plain, Scaled(), batches[:6], tmp_path)
    alone, loss = clone(plain), Scaled()
    fit(alone, loss, sgd, batches[:6], epochs=2, plugins=["accumulate:every=2"], seed=0)
    for weights, own in results:
        assert torch.equal(own["scale"], results[0][1]["scale"])
        assert torch.equal(own["calls"], results[0][1]["calls"])
        torch.testing.assert_close(own["scale"], loss.scale.detach())       # averaged over processes: other rounding
        torch.testing.assert_close(weights, alone.state_dict())


@pytest.mark.fault(row="C", given="a loss function with a parameter, with fsdp", right="refused before training, with the way out")
def test_fsdp_refuses_a_loss_function_with_parameters(plain, batches):
    with pytest.raises(UsageError, match="fsdp: loss_fn has parameters, which would not be sharded .*; use ddp"):
        fit(plain, Scaled(), sgd, batches, plugins=["fsdp"])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.out = nn.Linear(6, 3)

    def forward(self, input):
        return self.out(self.head(torch.tanh(self.embedding(input))))


@pytest.mark.fault(row="C7", given="tied weights, loaded from best.safetensors", right="loopctl.load_weights fills them in")
def test_tied_weights_are_loaded_under_all_their_names(batches, valid, tmp_path):
    model, loaded = Tied(), Tied()
    fit(model, cross_entropy, sgd, batches, valid, plugins=["checkpoint"], out=tmp_path)
    file = tmp_path / "checkpoints" / "best.safetensors"
    with pytest.raises(RuntimeError, match="Missing key"):
        loaded.load_state_dict(load_file(file))
    assert load_weights(loaded, file) == []
    assert equal(model, loaded)
    with pytest.raises(UsageError, match="does not fit the model"):
        load_weights(nn.Linear(2, 2), file)
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(UsageError, match="cannot be read as weights"):
        load_weights(loaded, tmp_path / "text")


@pytest.mark.fault(row="C8", given="cosine resumed with more epochs", right="the jump of the rate is said in one line")
def test_a_jump_of_the_learning_rate_on_resume_is_said(plain, batches, tmp_path, caplog):
    arguments = {"plugins": ["checkpoint", "cosine:by=step"], "out": tmp_path}
    fit(plain, cross_entropy, sgd, batches, epochs=2, **arguments)
    fit(plain, cross_entropy, sgd, batches, epochs=4, **arguments, resume=tmp_path)
    assert ("the run was planned for 2 epochs and is now for 4 epochs, so schedules of the whole run go on elsewhere: "
            "the learning rate is 0.05 in place of 0") in caplog.text


@pytest.mark.fault(row="C", given="a schedule without a length, resumed with more epochs", right="no word, for nothing jumps")
def test_a_schedule_that_does_not_follow_the_run_is_not_said_to_jump(plain, batches, tmp_path, caplog):
    arguments = {"plugins": ["checkpoint", "step:step_size=1"], "out": tmp_path}
    fit(plain, cross_entropy, sgd, batches, epochs=2, **arguments)
    fit(plain, cross_entropy, sgd, batches, epochs=4, **arguments, resume=tmp_path)
    assert "go on elsewhere" not in caplog.text


VALUES = st.recursive(
    st.none() | st.booleans() | st.builds(bytearray, st.binary()) | st.builds(np.array, st.lists(st.integers(0, 9))) | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.complex_numbers(allow_nan=False)
    | st.builds(np.float32, st.floats(width=32, allow_nan=False)) | st.builds(Path, st.text("ab/", min_size=1)),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text() | st.integers(), inner) | st.builds(deque, st.lists(inner)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(VALUES)
@pytest.mark.fault(row="C", given="any nesting of values that Python and numpy users keep", right="restored as it was")
def test_any_described_value_is_restored(value):
    def kinds(value):
        inner = value.items() if isinstance(value, dict) else value if isinstance(value, list | tuple | deque) else ()
        return type(value), [kinds(item) for item in inner]

    stream = io.BytesIO()
    torch.save(describe(value, "test"), stream)
    stream.seek(0)
    restored = restore_value(torch.load(stream, weights_only=True))
    assert repr(restored) == repr(value)            # numpy arrays have no single truth value
    assert kinds(restored) == kinds(value)


# Resuming in another world


def loader(classes, samples=40):
    data = TensorDataset(torch.randn(samples, 6, generator=torch.Generator().manual_seed(0)), torch.arange(samples) % 3)
    if classes:
        data.classes = classes
    return DataLoader(data, 8)


@pytest.mark.parametrize("classes", [["cat", "bird", "dog"], ["cat", "dog", "fish"]])
@pytest.mark.parametrize("wrap", [lambda loader: loader, lambda loader: DataLoader(Subset(loader.dataset, range(40)), 8)])
@pytest.mark.fault(row="L", given="classes that are renamed or in another order", right="refused with both lists")
def test_other_classes_are_refused_with_both_lists(plain, tmp_path, classes, wrap):
    fit(plain, cross_entropy, sgd, wrap(loader(["bird", "cat", "dog"])), plugins=["checkpoint"], out=tmp_path)
    with pytest.raises(UsageError, match=f"the classes of the training data are bird, cat, dog in the checkpoint and {', '.join(classes)} in"):
        fit(plain, cross_entropy, sgd, wrap(loader(classes)), epochs=2, plugins=["checkpoint"], out=tmp_path, resume=tmp_path)


@pytest.mark.fault(row="L2", given="a validation set of another size", right="refused, for best values of two sets cannot be compared")
def test_validation_data_of_another_size_is_refused(plain, batches, tmp_path):
    fit(plain, cross_entropy, sgd, batches, loader(None), plugins=["checkpoint"], out=tmp_path)
    with pytest.raises(UsageError, match="the validation data has 40 samples in batches of 8 in the checkpoint and 24 samples"):
        fit(plain, cross_entropy, sgd, batches, loader(None, 24), epochs=2, plugins=["checkpoint"], out=tmp_path, resume=tmp_path)


@pytest.mark.fault(row="L3", given="a plugin upgraded with new state", right="the plugin is named")
def test_a_plugin_that_cannot_load_its_state_is_named(plain, batches, tmp_path):
    fit(plain, cross_entropy, sgd, batches, plugins=["checkpoint", Remembers(1)], out=tmp_path)

    class Upgraded(Remembers):
        def load_state_dict(self, state):
            self.more = state["more"]

    Upgraded.__name__ = "Remembers"
    with pytest.raises(UsageError, match=r"plugin remembers cannot load its state \(KeyError: 'more'\); use the version that"):
        fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint", Upgraded(1)], out=tmp_path, resume=tmp_path)


class Peak:
    """A metric object that remembers, over all evaluations, how many samples it has seen, and its best value."""

    def __init__(self):
        self.seen, self.best, self.right, self.count = 0, 0.0, torch.zeros(()), 0

    def __call__(self, output, target):
        raise AssertionError

    def reset(self):
        self.right, self.count = torch.zeros(()), 0

    def update(self, output, target):
        self.seen += len(target)
        self.right, self.count = self.right + (output.argmax(1) == target).sum(), self.count + len(target)

    def compute(self):
        self.best = max(self.best, (self.right / max(self.count, 1)).item())
        return {"best": self.best, "seen": float(self.seen)}


class PeakAccuracy(MeanMetric):
    """A torchmetrics object that does the same."""

    def __init__(self):
        super().__init__()
        self.best, self.evaluations = 0.0, 0

    def update(self, output, target):
        super().update((output.argmax(1) == target).float())

    def compute(self):
        self.evaluations += 1
        self.best = max(self.best, super().compute().item())
        return torch.tensor(self.best + self.evaluations)


@pytest.mark.parametrize("step", [3, 8, 11, 16])
@pytest.mark.fault(row="L", given="two validation metrics that keep state, killed and resumed", right="the history of a run that was not killed")
def test_metrics_that_keep_state_go_on_exactly(net, clone, batches, valid, tmp_path, step):
    def arguments(folder):
        return {"loss_fn": Scaled(), "optimizer": sgd, "train": batches, "valid": valid, "epochs": 3, "eval_every": 5, "seed": 0,
                "metrics": {"peak": Peak(), "accuracy": PeakAccuracy()}, "out": folder}

    whole = fit(clone(net), plugins=PLUGINS, **arguments(tmp_path / "whole"))
    killed(step, model=clone(net), **arguments(tmp_path / "killed"))
    resumed = fit(clone(net), plugins=PLUGINS, **arguments(tmp_path / "killed"), resume=tmp_path / "killed")
    assert resumed.history == whole.history
    assert equal(resumed.model, whole.model)


# Sharded checkpoints: the folder of a checkpoint is data too


@pytest.mark.fault(row="E1", given="a sharded part with a crafted .metadata, which is a pickle", right="nothing runs; the checkpoint is refused")
def test_a_pickle_in_a_sharded_checkpoint_is_not_run(plain, batches, tmp_path):
    checkpoint = crafted(plain, batches, tmp_path, {"folder": "step-00000008-1.sharded", "checksums": {"rank-00000.safetensors": 0}})
    folder = tmp_path / "checkpoints" / "step-00000008-1.sharded"
    folder.mkdir()
    ran = tmp_path / "ran"
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.")
    shutil.copy(folder / ".metadata", folder / "rank-00000.safetensors")
    with pytest.raises(UsageError, match="is damaged: the checksum of"):
        fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint"], out=tmp_path, resume=checkpoint)
    assert not ran.exists()


@pytest.mark.parametrize("folder", ["/etc", "../other.sharded", "step-00000008-1.sharded/..", "", None, 3])
@pytest.mark.fault(row="E2", given="a sharded part that names an absolute path or one with ..", right="refused")
def test_a_sharded_part_outside_of_the_folder_is_refused(plain, batches, tmp_path, folder):
    checkpoint = crafted(plain, batches, tmp_path, {"folder": folder, "checksums": {"rank-00000.safetensors": 0}})
    with pytest.raises(UsageError, match="has names of sharded tensors that no checkpoint has"):
        fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint"], out=tmp_path, resume=checkpoint)


@pytest.mark.parametrize("content", [{"loopctl value": "numpy", "dtype": "O", "shape": [1], "data": b"12345678", "scalar": False},
                                     {"loopctl value": "os.system", "items": ["true"]}, {"loopctl value": "range", "bounds": "ls"},
                                     {"loopctl value": "numpy", "dtype": "<f8", "shape": [2**40], "data": b"1", "scalar": False}])
@pytest.mark.fault(row="E", given="a description of a value that loopctl does not make", right="refused as damaged")
def test_a_crafted_description_of_a_value_is_refused(plain, batches, tmp_path, content):
    checkpoint = crafted(plain, batches, tmp_path, None, metrics={"x": content})
    with pytest.raises(UsageError, match="has values that cannot be restored"):
        fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint"], out=tmp_path, resume=checkpoint)


@pytest.mark.fault(row="E", given="weights with a name that leads to an attribute of a module", right="refused; the model stays")
def test_weights_with_other_names_do_not_change_the_model(plain, clone, tmp_path):
    from safetensors.torch import save_file

    model = clone(plain)
    save_file({"__class__": torch.ones(1), "0.weight": torch.ones(16, 6)}, tmp_path / "weights.safetensors", metadata={"code": json.dumps("x")})
    with pytest.raises(UsageError, match="does not fit the model"):
        load_weights(model, tmp_path / "weights.safetensors")
    assert type(model) is type(plain)


def crafted(model, batches, folder, sharded, **changed):
    """Train an epoch, and write its checkpoint again with a sharded part and other entries; return the file."""
    from loopctl.checkpoint.atomic_files import read_checkpoint, save_checkpoint

    fit(model, cross_entropy, sgd, batches, plugins=["checkpoint"], out=folder)
    file = next((folder / "checkpoints").glob("step-*.pt"))
    content = read_checkpoint(file) | changed | ({"sharded": sharded} if sharded else {})
    for other in (folder / "checkpoints").iterdir():
        other.unlink()
    save_checkpoint(content, file)
    return file


@pytest.mark.fault(row="C6", given="the last fsdp checkpoint damaged, an older one whole", right="it goes on from the older one, and saves again")
def test_a_damaged_sharded_checkpoint_is_passed_over(plain, clone, batches, tmp_path, caplog):
    arguments = {"train": batches, "seed": 0, "plugins": ["fsdp", "checkpoint:keep=3"]}
    whole = fit(clone(plain), cross_entropy, sgd, epochs=3, **arguments, out=tmp_path / "whole")
    fit(clone(plain), cross_entropy, sgd, epochs=2, **arguments, out=tmp_path / "damaged")
    file = next((tmp_path / "damaged").rglob("step-00000016-*.sharded/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    run = fit(clone(plain), cross_entropy, sgd, epochs=3, **arguments, out=tmp_path / "damaged", resume=tmp_path / "damaged")
    assert "is damaged: the checksum of" in caplog.text
    assert run.last_checkpoint.name == "step-00000024.pt"
    for one, other in zip(whole.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(one.full_tensor(), other.full_tensor())


@pytest.mark.fault(row="E", given="checkpoints changed at random or with intent, sharded ones too, with a tripwire", right="no code runs, and no file is opened outside of the folder")
def test_nothing_runs_when_a_changed_checkpoint_is_read():
    script = Path(__file__).parents[2] / "benchmarks" / "fuzz_checkpoints.py"
    done = subprocess.run([sys.executable, script, "--cases", "60"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "60 cases, noticed: 0" in done.stdout


@pytest.mark.fault(row="E", given="a loader, a device and a lambda in a plugin's state", right="refused by name; nothing of it is written")
@pytest.mark.parametrize("state", [DataLoader([1]), lambda: None, torch.nn.Linear(1, 1), open], ids=["loader", "lambda", "module", "function"])
def test_objects_that_run_code_when_they_are_loaded_are_refused(plain, batches, tmp_path, state):
    with pytest.raises(UsageError, match="plugin remembers: its state has"):
        fit(plain, cross_entropy, sgd, batches, plugins=["checkpoint", Remembers(state)], out=tmp_path)
    assert not list(tmp_path.rglob("*.pt"))
