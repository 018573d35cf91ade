"""Evaluation: of several validation sets, before the first step, of raw and averaged weights, and without a run."""
import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import loopctl
from loopctl import UsageError, fit, hookimpl

SGD = partial(torch.optim.SGD, lr=0.1)


def data(*sizes, seed=0):
    torch.manual_seed(seed)
    return [(torch.randn(size, 3), torch.randn(size, 1)) for size in sizes]


TRAIN, CLEAN, NOISY = data(4, 4, 2), data(4, 3, seed=1), data(5, seed=2)


def model():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))


def absolute(output, target):
    return (output - target).abs().mean()


@torch.no_grad()
def by_hand(net, batches, function=mse_loss):
    net = copy.deepcopy(net).eval()
    values = [function(net(x), y).double() for x, y in batches]
    sizes = torch.tensor([len(x) for x, _ in batches], dtype=torch.float64)
    return (torch.stack(values) @ sizes / sizes.sum()).item()


def test_several_validation_sets_are_evaluated_by_name():
    run = fit(model(), nn.MSELoss(), SGD, TRAIN, {"clean": CLEAN, "noisy": NOISY}, epochs=2, metrics={"mae": absolute})
    row = run.history[-1]
    assert [name for name in row if name.startswith("val_")] == ["val_clean_loss", "val_clean_mae", "val_noisy_loss",
                                                                 "val_noisy_mae"]
    for name, batches in (("clean", CLEAN), ("noisy", NOISY)):
        assert row[f"val_{name}_loss"] == by_hand(run.model, batches)
        assert row[f"val_{name}_mae"] == by_hand(run.model, batches, absolute)


def test_one_of_several_sets_may_be_monitored_and_the_first_is_by_default(tmp_path):
    seen = []

    class Look:
        @hookimpl
        def train_end(self, run):
            seen.append([run.hook.plugins[name].watch.metric for name in ("early_stopping", "checkpoint")])

    fit(model(), nn.MSELoss(), SGD, TRAIN, {"clean": CLEAN, "noisy": NOISY}, metrics={"mae": absolute}, out=tmp_path,
        plugins=["early_stopping:monitor=val_noisy_mae", "checkpoint", Look()])
    assert seen == [["val_noisy_mae", "val_clean_loss"]]


def test_a_run_with_several_sets_resumes_exactly_and_refuses_other_sets(tmp_path):
    class Stops:
        observer_only = True

        @hookimpl
        def safe_point(self, run):
            if run.attempts == 4:
                raise KeyboardInterrupt

    def train(plugins=(), valid=None, **more):
        loaders = {name: torch.utils.data.DataLoader(list(zip(*batches[0], strict=True)), 2, shuffle=True)
                   for name, batches in (valid or {"clean": CLEAN, "noisy": NOISY}).items()}
        return fit(model(), nn.MSELoss(), SGD, TRAIN, loaders, epochs=3, seed=1,
                   plugins=["checkpoint:every_steps=1", *plugins], **more)

    whole = train(out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train([Stops()], out=tmp_path / "cut")
    assert train(out=tmp_path / "cut", resume=tmp_path / "cut").history == whole.history
    with pytest.raises(UsageError, match="validation data noisy in the checkpoint but not in this run"):
        train(valid={"clean": CLEAN}, resume=tmp_path / "cut", out=tmp_path / "other")


@pytest.mark.parametrize(("valid", "message"), [
    ({}, "valid is a dict without names"), ({"": CLEAN}, "valid is a dict without names"), ({1: CLEAN}, "without names"),
    ({"a": []}, "valid.a has no batches"), ({"a": CLEAN, "b": 3}, "valid.b is a int, not an iterable of batches"),
    ({"a": CLEAN, "b": [(torch.zeros(2, 4), torch.zeros(2, 1))]}, "mat1 and mat2"),
])
def test_wrong_validation_sets_are_refused_by_name(valid, message):
    with pytest.raises((UsageError, RuntimeError)) as refused:
        fit(model(), nn.MSELoss(), SGD, TRAIN, valid)
    assert message in str(refused.value)
    assert message != "mat1 and mat2" or "raised by the first batch of valid.b" in refused.value.__notes__[-1]


def test_the_run_is_evaluated_before_the_first_step_if_asked():
    net = model()
    before = by_hand(net, CLEAN)
    run = fit(net, nn.MSELoss(), SGD, TRAIN, CLEAN, epochs=2, eval_first=True, metrics={"mae": absolute})
    assert [(row["epoch"], row["step"]) for row in run.history] == [(0, 0), (1, 3), (2, 6)]
    assert run.history[0]["val_loss"] == before
    assert "train_loss" not in run.history[0]          # there was no step
    again = fit(model(), nn.MSELoss(), SGD, TRAIN, CLEAN, epochs=2, metrics={"mae": absolute})
    assert again.history == run.history[1:]


@pytest.mark.parametrize("plugin", ["ema:evaluate_raw=true", "swa:start=1ep,evaluate_raw=true"])
def test_raw_and_averaged_weights_are_evaluated_side_by_side(plugin):
    raw = []

    class Look:
        observer_only = True

        @hookimpl
        def epoch_end(self, run):
            raw.append(by_hand(run.model, CLEAN))

    run = fit(model(), nn.MSELoss(), SGD, TRAIN, CLEAN, epochs=3, plugins=[plugin, Look()])
    assert [row["val_raw_loss"] for row in run.history] == raw
    assert run.history[-1]["val_loss"] == by_hand(run.model, CLEAN) != raw[-1]


def test_raw_weights_are_evaluated_by_one_plugin_and_with_validation_data():
    with pytest.raises(UsageError, match="there is no validation data"):
        fit(model(), nn.MSELoss(), SGD, TRAIN, plugins=["ema:evaluate_raw=true"])
    with pytest.raises(UsageError, match="another plugin does so already"):
        fit(model(), nn.MSELoss(), SGD, TRAIN, CLEAN, plugins=["ema:evaluate_raw=true", "swa:start=1ep,evaluate_raw=true"], epochs=2)


def test_evaluate_returns_what_a_run_reports():
    run = fit(model(), nn.MSELoss(), SGD, TRAIN, CLEAN, metrics={"mae": absolute}, plugins=["amp:dtype=bfloat16"])
    run.model.train()
    found = loopctl.evaluate(run.model, CLEAN, nn.MSELoss(), metrics={"mae": absolute}, plugins=["amp:dtype=bfloat16"])
    assert found == {"loss": run.history[-1]["val_loss"], "mae": run.history[-1]["val_mae"]}
    assert run.model.training


def test_evaluate_takes_several_sets_a_forward_function_and_a_frozen_model():
    net = model().requires_grad_(False)
    found = loopctl.evaluate(net, {"clean": CLEAN, "noisy": iter(NOISY)},
                             forward=lambda model, batch: (mse_loss(model(batch[0]), batch[1]), None, {"one": 1}))
    assert found == {"clean_loss": by_hand(net, CLEAN), "clean_one": 1, "noisy_loss": by_hand(net, NOISY), "noisy_one": 1}


def evaluate_in_processes():
    batches = {"clean": CLEAN + data(2, seed=5), "noisy": NOISY}
    run = fit(model(), nn.MSELoss(), partial(torch.optim.SGD, lr=0.0), TRAIN[:2], batches, metrics={"mae": absolute}, plugins=["ddp"])
    return run.history[-1], loopctl.evaluate(model(), batches, nn.MSELoss(), metrics={"mae": absolute})


def test_several_processes_evaluate_their_parts_of_each_set(ranks):
    for row, found in ranks(2, evaluate_in_processes):
        for name, batches in (("clean", CLEAN + data(2, seed=5)), ("noisy", NOISY)):        # noisy has one batch
            assert found[f"{name}_loss"] == pytest.approx(by_hand(model(), batches), rel=1e-6)
            assert found[f"{name}_mae"] == pytest.approx(by_hand(model(), batches, absolute), rel=1e-6)
            assert row[f"val_{name}_mae"] != row[f"val_{name}_loss"]
