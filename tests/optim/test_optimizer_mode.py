"""Optimizers with two sets of weights, such as schedule-free ones: which of them is trained, evaluated and saved."""
import copy
import logging
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import fit, hookimpl, load_weights
from loopctl.optim.several import by_kind
from loopctl.testing import tiny_run
from loopctl.testing.tiny import tiny_batches
from loopctl.trial_run import trial_run
from tests.conftest import ScheduleFree

TRAIN, VALID = tiny_batches(8, 8, 8, 8, 5), tiny_batches(8, 5, seed=1)
cross_entropy = nn.CrossEntropyLoss()


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def by_hand(make, steps, every=1, scale=None):
    """The loop that the authors describe, up to a step; evaluated after each epoch. Return the model in eval mode."""
    model = new_model()
    optimizers, done = make(model), 0
    switched = [optimizer for optimizer in optimizers if hasattr(optimizer, "train")]
    scaler = torch.amp.GradScaler("cpu", scale or 1.0, enabled=scale is not None)
    while done < steps:
        for optimizer in switched:
            optimizer.train()
        for start in range(0, len(TRAIN), every):
            group = TRAIN[start:start + every]
            samples = sum(len(x) for x, _ in group)
            for optimizer in optimizers:
                optimizer.zero_grad()
            for x, y in group:
                with torch.autocast("cpu", torch.float16, enabled=scale is not None):
                    loss = cross_entropy(model(x), y)
                scaler.scale(loss * (len(x) / samples) if every > 1 else loss).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            done += 1
            if done == steps:
                break
        for optimizer in switched:
            optimizer.eval()
    return model


def alone(model):
    return [ScheduleFree(model.parameters())]


def beside_sgd(model):
    """Hidden matrices by plain gradient descent, everything else by the schedule-free optimizer."""
    hidden = [model[0].weight, model[2].weight]
    others = [parameter for parameter in model.parameters() if all(parameter is not one for one in hidden)]
    return [torch.optim.SGD(hidden, lr=0.05), ScheduleFree(others)]


SETUPS = [(ScheduleFree, alone), (by_kind(hidden=partial(torch.optim.SGD, lr=0.05), rest=ScheduleFree), beside_sgd)]


@pytest.mark.parametrize(("optimizer", "make"), SETUPS, ids=["alone", "beside sgd"])
@pytest.mark.parametrize(("plugins", "arguments"), [
    ([], {}), (["accumulate:every=2"], {"every": 2}), (["amp:dtype=float16,init_scale=1024"], {"scale": 1024.0})])
def test_the_weights_of_every_checkpoint_are_those_that_are_used(optimizer, make, plugins, arguments, tmp_path):
    run = fit(new_model(), cross_entropy, optimizer, TRAIN, epochs=2, out=tmp_path,
              plugins=[*plugins, "checkpoint:every_steps=1,keep=99"])
    files = sorted((tmp_path / "checkpoints").glob("step-*.pt"))
    assert len(files) == run.step
    for steps, file in enumerate(files, 1):
        loaded = new_model()
        load_weights(loaded, file)
        assert equal(loaded, by_hand(make, steps, **arguments)), steps
    assert equal(run.model, loaded)


@pytest.mark.parametrize(("optimizer", "make"), SETUPS, ids=["alone", "beside sgd"])
def test_checkpoints_change_no_bit_and_a_run_is_resumed_from_the_trained_weights(optimizer, make, tmp_path):
    class Kill:
        observer_only = True

        @hookimpl
        def before_step(self, run):
            if run.step == 7:
                raise KeyboardInterrupt

    arguments = {"loss_fn": cross_entropy, "train": TRAIN, "valid": VALID, "epochs": 3}
    whole = fit(new_model(), optimizer=optimizer, **arguments)
    with pytest.raises(KeyboardInterrupt):
        fit(new_model(), optimizer=optimizer, **arguments, plugins=["checkpoint:every_steps=1", Kill()], out=tmp_path)
    resumed = fit(new_model(), optimizer=optimizer, **arguments, plugins=["checkpoint:every_steps=1"], out=tmp_path, resume=tmp_path)
    assert equal(resumed.model, whole.model)
    assert resumed.history == whole.history


def test_parameters_of_a_loss_function_are_saved_as_they_are_used(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, output, target):
            return cross_entropy(output * self.scale, target)

    loss_fn = Scaled()
    run = fit(new_model(), loss_fn, ScheduleFree, TRAIN, plugins=["checkpoint:every_steps=1,keep=9"], out=tmp_path)
    saved = torch.load(run.last_checkpoint, weights_only=True)
    assert torch.equal(saved["loss_fn"]["scale"], loss_fn.scale)
    saved = torch.load(tmp_path / "checkpoints" / "step-00000003.pt", weights_only=True)
    assert not torch.equal(saved["trained"]["loss_fn"]["scale"], saved["loss_fn"]["scale"])


def test_other_optimizers_have_one_set_of_weights_in_a_checkpoint(tmp_path):
    run = fit(new_model(), cross_entropy, partial(torch.optim.SGD, lr=0.1), TRAIN, plugins=["checkpoint"], out=tmp_path)
    assert torch.load(run.last_checkpoint, weights_only=True)["trained"] == {}


def test_steps_on_a_copy_of_the_run_are_made_in_training_mode():
    class Tries:
        @hookimpl
        def train_start(self, run):
            with trial_run(run) as trial:
                self.loss = trial.step([0.1])

    tries = Tries()
    tiny_run(tries, optimizer=ScheduleFree)
    assert tries.loss > 0


def test_what_a_state_dict_has_besides_is_saved_of_each_of_several(tmp_path):
    class Counts(torch.optim.SGD):
        calls = 0

        def step(self, closure=None):
            self.calls += 1
            return super().step(closure)

        def state_dict(self):
            return super().state_dict() | {"calls": self.calls}

        def load_state_dict(self, state_dict):
            self.calls = state_dict["calls"]
            super().load_state_dict({key: value for key, value in state_dict.items() if key != "calls"})

    for optimizer in (partial(Counts, lr=0.1), by_kind(a=partial(Counts, lr=0.1), b=ScheduleFree)):
        out = tmp_path / type(optimizer).__name__
        arguments = {"optimizer": optimizer, "train": TRAIN, "plugins": ["checkpoint"], "out": out}
        fit(new_model(), cross_entropy, **arguments)
        run = fit(new_model(), cross_entropy, **arguments, epochs=2, resume=out)
        assert getattr(run.optimizer, "named", {"a": run.optimizer})["a"].calls == 10


def test_a_state_dict_of_another_form_is_saved_of_one_of_several(tmp_path):
    class Wrapper(torch.optim.SGD):
        def state_dict(self):
            return {"wrapped": super().state_dict()}

        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict["wrapped"])

    arguments = {"optimizer": by_kind(a=partial(Wrapper, lr=0.1, momentum=0.9), b=partial(torch.optim.Adam, lr=0.01)),
                 "train": TRAIN, "plugins": ["checkpoint"]}
    whole = fit(new_model(), cross_entropy, **arguments, epochs=2, out=tmp_path / "whole")
    fit(new_model(), cross_entropy, **arguments, out=tmp_path / "cut")
    resumed = fit(new_model(), cross_entropy, **arguments, epochs=2, out=tmp_path / "cut", resume=tmp_path / "cut")
    assert equal(resumed.model, whole.model)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"plugins": ["ema"]}, ["ema averages the weights that ScheduleFree trains, whose own average is not used then; leave out ema"]),
    ({"model": nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))}, ["the statistics of BatchNorm are those of the weights"]),
    ({"plugins": ["cosine"]}, []),
    ({"plugins": ["ema"], "optimizer": partial(torch.optim.SGD, lr=0.1)}, []),
])
def test_what_does_not_go_well_with_such_an_optimizer_is_a_warning(arguments, words, caplog):
    with caplog.at_level(logging.WARNING):
        fit(**{"model": new_model(), "loss_fn": cross_entropy, "optimizer": ScheduleFree, "train": TRAIN} | arguments)
    assert len(caplog.messages) == len(words)
    assert all(word in message for word, message in zip(words, caplog.messages, strict=True))


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
@pytest.mark.compares(use="--optimizer schedulefree:AdamWScheduleFree", technique="averaged weights in evaluation and checkpoints (arXiv:2405.15682)", source="schedulefree, 1.4", tolerance="to the bit")
def test_the_optimizers_of_schedulefree_equal_the_loop_of_their_authors(name, tmp_path):
    schedulefree = pytest.importorskip("schedulefree")
    make = partial(getattr(schedulefree, name), lr=0.05)
    run = fit(new_model(), cross_entropy, make, TRAIN, VALID, epochs=2, out=tmp_path, plugins=["checkpoint:every_steps=1,keep=99"])
    expected, best = new_model(), None
    optimizer, losses = make(expected.parameters()), []
    for _ in range(2):
        optimizer.train()
        for x, y in TRAIN:
            optimizer.zero_grad()
            cross_entropy(expected(x), y).backward()
            optimizer.step()
        optimizer.eval()
        with torch.no_grad():
            losses.append(sum(nn.functional.cross_entropy(expected(x), y).item() * len(x) for x, y in VALID) / 13)
        best = copy.deepcopy(expected) if losses[-1] == min(losses) else best
    assert [row["val_loss"] for row in run.history] == pytest.approx(losses, rel=1e-6)      # another order of the sum
    loaded = new_model()
    load_weights(loaded, tmp_path / "checkpoints" / "best.safetensors")
    assert equal(loaded, best)
    assert equal(run.model, expected)
