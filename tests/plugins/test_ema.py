"""ema against torch's AveragedModel updated by hand."""
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.amp import Amp
from loopctl.plugins.ema import Ema

cross_entropy = nn.CrossEntropyLoss()
adam = partial(torch.optim.Adam, lr=1e-2)


class Watch:
    """Keeps copies of the model as others see it."""

    def __init__(self):
        self.steps, self.evaluated, self.judged, self.safe = [], [], [], []

    def copy(self, run):
        return {name: value.clone() for name, value in run.model.state_dict().items()}

    @hookimpl
    def after_step(self, run: Run):
        self.steps.append(self.copy(run))

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run):
        self.evaluated.append(self.copy(run))
        return (yield)

    @hookimpl
    def after_evaluate(self, run: Run):
        self.judged.append(self.copy(run))

    @hookimpl
    def safe_point(self, run: Run):
        self.safe.append(self.copy(run))


def by_hand(model, optimizer, batches, epochs, decay=0.9):
    torch.manual_seed(1)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(epochs):
        model.train()
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            optimizer.step()
            averaged.update_parameters(model)
    return averaged.module


def equal(one, other, but=()):
    assert set(one) == set(other)
    for name, value in one.items():
        assert name.endswith(but or "-") or torch.equal(value, other[name]), name


@pytest.mark.compares(use="ema", technique="exponential moving average of the weights",
                      source="torch.optim.swa_utils.AveragedModel", tolerance="to the bit")
def test_bit_for_bit_the_recipe(net, batches, valid, clone, sgd):
    """Statistics of BatchNorm are averaged; torch averages and truncates their count too, here it stays the model's."""
    raw, watch = clone(net), Watch()
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=["loopctl.plugins.ema:Ema:decay=0.9,warmup=false", watch], seed=1)
    averaged = by_hand(raw, sgd(raw.parameters()), batches, 3)
    equal(net.state_dict(), averaged.state_dict(), but="num_batches_tracked")
    equal(watch.safe[-1], raw.state_dict())
    averaged.eval()
    with torch.no_grad():
        losses = [(cross_entropy(averaged(input), target), len(target)) for input, target in valid]
    assert run.history[-1]["val_loss"] == pytest.approx(sum(loss.item() * size for loss, size in losses) / 13, rel=1e-7)


def test_training_is_what_it_would_be_without(net, batches, valid, clone, sgd):
    with_it, without, other = Watch(), Watch(), clone(net)
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=2, eval_every=3, plugins=[Ema(0.9), with_it], seed=1)
    again = fit(other, cross_entropy, sgd, batches, valid, epochs=2, eval_every=3, plugins=[without], seed=1)
    for mine, theirs in zip(with_it.steps, without.steps, strict=True):
        equal(mine, theirs)
    assert [row["train_loss"] for row in run.history] == [row["train_loss"] for row in again.history]
    assert len(run.history) == len(with_it.evaluated) == 7         # after steps 3, 6, 8, 9, 12, 15, 16


def test_what_evaluates_and_what_judges_sees_the_average(net, batches, valid, sgd):
    inside, outside = Watch(), Watch()          # ema swaps for what comes after it in the list, and for plain hooks
    ema = Ema(0.9)
    fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=[outside, ema, inside], seed=1)
    equal(inside.evaluated[-1], inside.judged[-1])
    equal(outside.judged[-1], inside.judged[-1])
    equal(inside.judged[-1], net.state_dict())
    equal(outside.evaluated[-1], inside.safe[-1])
    assert not torch.equal(inside.safe[-1]["0.weight"], net.state_dict()["0.weight"])


def test_weights_come_back_and_the_optimizer_keeps_its_own_after_an_error(net, batches, valid, sgd):
    class Fails:
        @hookimpl
        def after_evaluate(self, run: Run):
            if run.epoch == 2:
                raise KeyboardInterrupt

    watch, pointers = Watch(), [weight.data_ptr() for weight in net.parameters()]
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=[Ema(0.9), watch, Fails()], seed=1)
    equal(net.state_dict(), watch.steps[-1])
    assert [weight.data_ptr() for weight in net.parameters()] == pointers


def test_checkpoint_and_early_stopping_keep_the_average(net, batches, valid, sgd, clone, tmp_path):
    watch = Watch()
    plugins = ["checkpoint", "early_stopping:restore_best=true", Ema(0.9), watch]
    for number, order in enumerate((plugins, plugins[::-1])):
        watch.judged.clear()
        order = [Ema(0.9) if isinstance(plugin, Ema) else plugin for plugin in order]
        model = clone(net)
        run = fit(model, cross_entropy, sgd, batches, valid, epochs=4, plugins=order, seed=1, out=tmp_path / str(number))
        best = min(range(4), key=lambda epoch: run.history[epoch]["val_loss"])
        assert best < 3, "else the last would pass for the best"
        equal(load_file(tmp_path / str(number) / "checkpoints" / "best.safetensors"), watch.judged[best])
        equal(model.state_dict(), watch.judged[best])


def loader():
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(50, 6, generator=generator), torch.randint(0, 3, (50,), generator=generator))
    return DataLoader(data, batch_size=8, shuffle=True)


@pytest.mark.parametrize("ends", [3, 5])
def test_a_run_that_went_on_equals_one_that_never_ended(net, clone, same, tmp_path, ends):
    """It resumes from the raw weights, not from the average, before and after averaging has started."""
    def plugins():
        return [Ema(0.9, start="4ep"), "amp:dtype=float16", "accumulate:every=2", "clip", "early_stopping:patience=3"]

    class CutOff:
        @hookimpl
        def safe_point(self, run: Run):
            if run.epoch == ends:
                raise KeyboardInterrupt

    other = clone(net)
    whole = fit(net, cross_entropy, adam, loader(), loader(), epochs=8, plugins=plugins(), seed=1)
    with pytest.raises(KeyboardInterrupt):
        fit(clone(other), cross_entropy, adam, loader(), loader(), epochs=8, plugins=[*plugins(), "checkpoint", CutOff()], seed=1, out=tmp_path)
    torch.rand(7)
    resumed = fit(other, cross_entropy, adam, loader(), loader(), epochs=8, plugins=[*plugins(), "checkpoint"], seed=1,
                  out=tmp_path, resume=tmp_path)
    same(net, other)
    assert repr(resumed.history) == repr(whole.history)


def test_it_counts_updates_not_micro_batches_and_not_skipped_steps(plain, batches, clone, sgd):
    """A scale of 2^40 makes float16 skip the first steps."""
    ema, watch = Ema(0.9), Watch()
    run = fit(plain, cross_entropy, sgd, batches, epochs=12, plugins=["accumulate:every=3", Amp("float16", 2.0**40), ema, watch])
    assert 0 < run.step < run.attempts == 36
    assert ema.count == run.step
    average = None
    for count, weights in enumerate(dict.fromkeys(weights["0.weight"] for weights in watch.steps[36 - run.step:])):
        decay = min(0.9, (1 + count) / (10 + count))
        average = weights.clone() if average is None else average.lerp(weights, 1 - decay)
    assert torch.equal(plain.state_dict()["0.weight"], average)


@pytest.mark.parametrize(("start", "count"), [(None, 16), ("4st", 13), ("1ep", 9), (1, 9), ("50%", 9)])
def test_start(plain, batches, sgd, start, count):
    """The weights where it starts are the first of the average."""
    ema = Ema(start=start)
    fit(plain, cross_entropy, sgd, batches, epochs=2, plugins=[ema])
    assert ema.count == count


def test_a_run_that_stops_before_start_ends_as_it_is(plain, batches, sgd, clone, same):
    class Stop:
        @hookimpl
        def after_evaluate(self, run: Run):
            run.stop = "enough"

    other = clone(plain)
    fit(plain, cross_entropy, sgd, batches, epochs=9, plugins=[Ema(start="5ep"), Stop()])
    fit(other, cross_entropy, sgd, batches)
    same(plain, other)


def test_an_infinite_buffer_and_tied_weights(batches, valid, sgd):
    """-inf, as in an attention mask, has no mean: inf - inf is not a number."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    net[1].weight = net[0].weight
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    fit(net, cross_entropy, sgd, batches, valid, plugins=[Ema()])
    assert net.mask.tolist() == [0.0, -torch.inf]
    assert net[1].weight is net[0].weight


def test_decay_out_of_range():
    with pytest.raises(ValueError, match="decay is between 0 and 1, not 2"):
        Ema(2)


def test_a_start_after_the_end_is_refused(plain, batches, sgd):
    fit(plain, cross_entropy, sgd, batches, epochs=5, plugins=[Ema(start="5ep")])
    with pytest.raises(UsageError, match="ema: start=41st is after the run's end, so nothing would be averaged"):
        fit(plain, cross_entropy, sgd, batches, epochs=5, plugins=[Ema(start="41st")])


def test_an_average_of_the_first_weights_is_warned_of(net, batches, sgd, caplog):
    fit(net, nn.CrossEntropyLoss(), sgd, batches, plugins=["ema:decay=0.999,warmup=false"])
    assert caplog.messages == ["ema: with decay=0.999 the average has 99% of the first weights at the end of the run, after 8 updates; use a smaller decay, or warmup=true"]
