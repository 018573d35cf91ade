"""load_weights reads every common kind of file, says by name what does not fit, and runs no code."""
import argparse
import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loopctl import UsageError, fit, load_weights
from loopctl.checkpoint.weights_file import find_weights


def net(outputs=3):
    return nn.Sequential(OrderedDict(body=nn.Linear(6, 4), norm=nn.BatchNorm1d(4), head=nn.Linear(4, outputs)))


@pytest.fixture
def state():
    torch.manual_seed(1)
    return net().state_dict()


# What training programs put into a file, made from a state dict.
CONTENTS = {
    "the state dict": lambda state: state,
    "an entry state_dict": lambda state: {"epoch": 3, "optimizer": {"state": {}}, "state_dict": state},
    "an entry model_state_dict": lambda state: {"epoch": 3, "model_state_dict": state},
    "an entry model": lambda state: {"model": state, "optimizer": {}},
    "DataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compile of DDP": lambda state: {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()},
    "DDP of compile": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "a compiled part": lambda state: {name.replace("body.", "body._orig_mod."): tensor for name, tensor in state.items()},
    "a Lightning module": lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "epoch": 1},
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_weights_in_a_file_of_torch_are_loaded(state, content, legacy, tmp_path):
    torch.save(CONTENTS[content](state), tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    model = net()
    assert load_weights(model, tmp_path / "w.pth") == []
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin"])
def test_safetensors_are_recognised_by_content_too(state, name, tmp_path):
    save_file(state, tmp_path / name)
    model = net()
    assert load_weights(model, tmp_path / name) == []
    assert torch.equal(model.head.weight, state["head.weight"])


def test_a_prefix_that_the_model_itself_has_is_kept(state, tmp_path):
    model, wrapped = nn.ModuleDict({"module": net()}), nn.ModuleDict({"module": net()})
    torch.save(wrapped.state_dict(), tmp_path / "w.pt")
    assert load_weights(model, tmp_path / "w.pt") == []
    assert torch.equal(model["module"].head.weight, wrapped["module"].head.weight)


def test_a_checkpoint_and_a_runs_folder_are_read(batches, valid, sgd, tmp_path):
    model = net()
    fit(model, nn.CrossEntropyLoss(), sgd, batches, valid, plugins=["checkpoint"], out=tmp_path)
    best, (last,) = tmp_path / "checkpoints" / "best.safetensors", (tmp_path / "checkpoints").glob("step-*.pt")
    assert find_weights(tmp_path) == find_weights(tmp_path / "checkpoints") == best
    for path in (tmp_path, last):
        loaded = net()
        assert load_weights(loaded, path) == []
        assert torch.equal(loaded.head.weight, model.head.weight)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    assert find_weights(tmp_path) == best
    best.unlink()
    assert find_weights(tmp_path) == tmp_path / "weights.safetensors"
    (tmp_path / "weights.safetensors").unlink()
    assert find_weights(tmp_path) == last
    last.write_bytes(last.read_bytes()[:-40] + b"x" * 5 + last.read_bytes()[-35:])
    with pytest.raises(UsageError, match=f"{last.name} cannot be read as weights: it is damaged"):
        load_weights(net(), last)


DIFFERENT = OrderedDict(body=nn.Linear(6, 4), neck=nn.Linear(4, 4), head=nn.Linear(4, 5))


def test_what_does_not_fit_is_said_by_name_and_refused_and_the_model_stays_as_it_was(state, tmp_path):
    save_file(state, tmp_path / "w.safetensors")
    model = nn.Sequential(DIFFERENT)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError) as refused:
        load_weights(model, tmp_path / "w.safetensors")
    assert str(refused.value) == (
        f"{tmp_path}/w.safetensors does not fit the model: it has no neck.weight and neck.bias; the model has no norm.bias, "
        "norm.num_batches_tracked, norm.running_mean and 2 more; head.weight is 3x4 and 5x4 in the model and head.bias is 3 and 5 in the "
        "model; --init FILE:strict=false, in Python strict=False, loads what fits")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_without_strict_what_fits_is_loaded_and_the_rest_is_returned_and_warned_of(state, tmp_path, caplog):
    torch.save(state, tmp_path / "w.pt")
    model = nn.Sequential(DIFFERENT)
    head = model.head.weight.clone()
    left_out = load_weights(model, tmp_path / "w.pt", strict=False)
    assert set(left_out) == {"neck.weight", "neck.bias", "head.weight", "head.bias",
                             *(f"norm.{name}" for name in nn.BatchNorm1d(4).state_dict())}
    assert torch.equal(model.body.weight, state["body.weight"])
    assert torch.equal(model.head.weight, head)
    (line,) = caplog.messages
    assert "w.pt: 2 of the model's 6 tensors are loaded; it has no neck.weight and neck.bias; the model has no norm" in line


@pytest.mark.parametrize("strict", [True, False])
def test_weights_of_another_model_are_refused_in_any_case(state, strict, tmp_path):
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UsageError, match="does not fit the model: .*; it is of another model"):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt", strict)


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


def cut(file):
    file.write_bytes(file.read_bytes()[:-200])


@pytest.mark.parametrize(("name", "make", "words"), [
    ("w.pt", lambda file, state: torch.save(Harmful(), file), r"it has a \w+\.mkdir, which could run code and is not loaded; save the state dict alone"),
    ("w.pt", lambda file, state: torch.save({"model": state, "args": argparse.Namespace(lr=1)}, file), "it has a argparse.Namespace, which"),
    ("w.pt", lambda file, state: torch.save(net(), file), "which could run code and is not loaded"),
    ("w.pt", lambda file, state: (torch.save(state, file), cut(file)), "it is damaged, or is neither"),
    ("w.pt", lambda file, state: file.write_text("no weights"), "it is damaged, or is neither"),
    ("w.pt", lambda file, state: file.touch(), "it is damaged, or is neither"),
    ("w.safetensors", lambda file, state: (save_file(state, file), cut(file)), "cannot be read as weights: Error while deserializing"),
    ("w.safetensors", lambda file, state: file.touch(), "cannot be read as weights: Error while deserializing"),
    ("w.pt", lambda file, state: torch.save([1, 2], file), "has no weights: it holds a list, not tensors by name"),
    ("w.pt", lambda file, state: torch.save({"epoch": 3, "ema": state}, file), "it holds the entries epoch and ema, not tensors"),
    ("w.pt", lambda file, state: torch.save({}, file), "it holds nothing"),
    ("w.pt", lambda file, state: None, "there is no file .*w.pt"),
    ("w.pt", lambda file, state: file.mkdir(), "w.pt has no weights: neither best.safetensors, weights.safetensors nor a checkpoint"),
])
def test_a_file_that_cannot_be_read_is_refused_in_one_line(state, name, make, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / name, state)
    with pytest.raises(UsageError, match=words) as refused:
        load_weights(net(), tmp_path / name)
    assert "\n" not in str(refused.value)
    assert name in str(refused.value)
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "made_by_a_pickle").exists()
