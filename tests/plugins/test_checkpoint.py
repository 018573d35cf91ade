"""Checkpoints, and going on from them."""
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import UsageError, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()
adam = partial(torch.optim.Adam, lr=1e-2)


def loader():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(50, 6, generator=generator), torch.randint(0, 3, (50,), generator=generator))
    return DataLoader(data, batch_size=8, shuffle=True)


PLUGINS = ["amp:dtype=float16", "accumulate:every=2", "clip", "warmup:length=2ep", "cosine:t_max=8", "early_stopping:patience=3"]


def test_a_run_that_went_on_equals_one_that_never_ended(net, clone, same, tmp_path):
    """Shuffled data, dropout, momentum, loss scaling: the same bits."""
    whole, other = net, clone(net)
    undisturbed = fit(whole, cross_entropy, adam, loader(), loader(), epochs=8, plugins=PLUGINS, seed=1)
    fit(clone(other), cross_entropy, adam, loader(), loader(), epochs=3, plugins=[*PLUGINS, "checkpoint"], seed=1, out=tmp_path)
    torch.rand(7)
    resumed = fit(other, cross_entropy, adam, loader(), loader(), epochs=8, plugins=[*PLUGINS, "checkpoint"], seed=1,
                  out=tmp_path, resume=tmp_path)
    same(whole, other)
    assert repr(resumed.history) == repr(undisturbed.history)      # a norm may be NaN, which equals nothing
    assert (resumed.step, resumed.seen, resumed.stop) == (undisturbed.step, undisturbed.seen, undisturbed.stop)


def test_patience_goes_on_too(net, clone, tmp_path):
    class Scores:
        @hookimpl
        def evaluate(self, run):
            return {"val_loss": 1.0 + run.epoch}

    plugins = ["early_stopping:patience=4", Scores(), "checkpoint"]
    fit(clone(net), cross_entropy, adam, loader(), loader(), epochs=3, plugins=plugins, out=tmp_path)
    resumed = fit(net, cross_entropy, adam, loader(), loader(), epochs=9, out=tmp_path, resume=tmp_path / "checkpoints" / "last.pt",
                  plugins=["early_stopping:patience=4", Scores(), "checkpoint"])
    assert resumed.epoch == 5


def test_best_and_last(net, batches, valid, sgd, tmp_path, clone, same):
    kept = []

    class Scores:
        values = [3, 1, 2, 2]

        @hookimpl
        def evaluate(self, run):
            kept.append(clone(run.model))
            return {"val_loss": self.values[run.epoch - 1]}

    fit(net, cross_entropy, sgd, batches, valid, epochs=4, plugins=["checkpoint:every_epochs=3", Scores()], out=tmp_path)
    other = clone(net)
    other.load_state_dict(load_file(tmp_path / "checkpoints" / "best.safetensors"))
    same(other, kept[1])
    saved = torch.load(tmp_path / "checkpoints" / "last.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    same(other, net)
    assert saved["position"]["epoch"] == 4            # the last epoch, though it was not due
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"best.safetensors", "last.pt"}


def test_the_best_of_an_evaluation_within_an_epoch_is_saved_as_it_was_judged(net, batches, valid, sgd, tmp_path, clone, same):
    kept = []

    class Scores:
        @hookimpl
        def evaluate(self, run):
            kept.append(clone(run.model))
            return {"val_loss": 0.5 if run.step == 3 else 1.0}

    fit(net, cross_entropy, sgd, batches, valid, eval_every=3, plugins=["checkpoint", Scores()], out=tmp_path)
    other = clone(net)
    other.load_state_dict(load_file(tmp_path / "checkpoints" / "best.safetensors"))
    same(other, kept[0])


def test_it_overwrites_nothing(net, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, plugins=["checkpoint"], out=tmp_path)
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    with pytest.raises(UsageError, match="checkpoint: .* exists and is not overwritten"):
        fit(net, cross_entropy, sgd, batches, plugins=["checkpoint"], out=tmp_path)
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before


def test_another_run_is_refused(net, plain, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, plugins=["checkpoint"], out=tmp_path)
    with pytest.raises(UsageError, match="does not fit this model"):
        fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint"], out=tmp_path, resume=tmp_path)
    with pytest.raises(UsageError, match=r"was saved with the plugins \['checkpoint'\], this run has"):
        fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint", "early_stopping"], out=tmp_path, resume=tmp_path)
    with pytest.raises(UsageError, match="no checkpoint there"):
        fit(net, cross_entropy, sgd, batches, epochs=2, resume=tmp_path / "nowhere")


def test_a_finished_run_trains_no_more(net, batches, sgd, tmp_path, clone, same):
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint"], out=tmp_path)
    before = clone(net)
    run = fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint"], out=tmp_path, resume=tmp_path)
    same(net, before)
    assert (run.epoch, len(run.history)) == (2, 2)
