"""swa against torch's AveragedModel, SWALR and update_bn used by hand."""
import random
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_swa_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.composition.compose import compose
from loopctl.loop import DEFAULTS
from loopctl.optim.learning_rate import lr_curve
from loopctl.plugins.ema import Ema
from loopctl.plugins.swa import Swa

cross_entropy = nn.CrossEntropyLoss()
adam = partial(torch.optim.Adam, lr=1e-2)


def loader(generator=None):
    data = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(50, 6, generator=data), torch.randint(0, 3, (50,), generator=data))
    return DataLoader(data, batch_size=8, shuffle=True, generator=generator)


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


def by_hand(model, optimizer, data, epochs, start, swa_lr=None, **anneal):
    """Returns the averages of each epoch from `start` on. With swa_lr the rate goes along a cosine until then."""
    torch.manual_seed(1)
    averaged, found = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn()), []
    schedule, swa_schedule = CosineAnnealingLR(optimizer, epochs), None
    for epoch in range(epochs):
        model.train()
        for input, target in data:
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            optimizer.step()
        if epoch < start:
            if swa_lr:
                schedule.step()
            continue
        averaged.update_parameters(model)
        with torch.random.fork_rng():
            update_bn(data, averaged)
        found.append({name: value.clone() for name, value in averaged.module.state_dict().items()})
        if swa_lr:
            swa_schedule = swa_schedule or SWALR(optimizer, swa_lr, **anneal)
            swa_schedule.step()
    return found


def equal(one, other, tolerance=0.0):
    assert set(one) == set(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.compares(use="swa", technique="stochastic weight averaging, BatchNorm statistics of the average",
                      source="arXiv:1803.05407; torch.optim.swa_utils.AveragedModel, torch.optim.swa_utils.update_bn", tolerance="to the bit")
def test_bit_for_bit_the_recipe(net, clone, valid):
    """Dropout and shuffled data: the pass for BatchNorm sees other random numbers than training, as by hand."""
    raw, watch, swa = clone(net), Watch(), Swa("50%")
    run = fit(net, cross_entropy, adam, loader(), valid, epochs=8, plugins=[watch, swa], seed=1)
    expected = by_hand(raw, adam(raw.parameters()), loader(), 8, 4)
    equal(watch.safe[-1], raw.state_dict())
    for mine, theirs in zip(watch.judged[4:], expected, strict=True):
        equal(mine, theirs)
    equal(net.state_dict(), expected[-1])
    assert swa.count == 4
    net.eval()
    with torch.no_grad():
        losses = [(cross_entropy(net(input), target).item(), len(target)) for input, target in valid]
    assert run.history[-1]["val_loss"] == pytest.approx(sum(loss * size for loss, size in losses) / 13, rel=1e-7)


@pytest.mark.compares(use="swa:swa_lr", technique="the learning rate while averaging",
                      source="torch.optim.swa_utils.SWALR", tolerance="1e-12: torch computes each rate from the one before")
@pytest.mark.parametrize(("strategy", "epochs"), [("cos", 3), ("linear", 3), ("cos", 10), ("linear", 1)])
def test_with_a_rate_of_its_own(net, batches, clone, sgd, strategy, epochs):
    """1e-12 in float64: torch computes each rate from the one before and gathers rounding; ours is the closed form."""
    data = [(input.double(), target) for input, target in batches]
    raw, watch = clone(net.double()), Watch()
    swa = f"loopctl.plugins.swa:Swa:start=4,swa_lr=0.03,anneal_epochs={epochs},anneal_strategy={strategy}"
    fit(net, cross_entropy, sgd, data, epochs=12, plugins=["cosine", swa, watch], seed=1)
    # SWALR's average weighs by 1 / (n + 1) in float32, which float64 would notice; so average by hand.
    rates = []
    optimizer = sgd(raw.parameters())
    optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    by_hand(raw, optimizer, data, 12, 4, 0.03, anneal_epochs=epochs, anneal_strategy=strategy)
    equal(watch.safe[-1], raw.state_dict(), 1e-12)
    ends = [weights["0.weight"] for weights in watch.steps[4 * 8 + 7::8]]
    torch.testing.assert_close(net[0].weight, torch.stack(ends).mean(0), rtol=1e-12, atol=1e-12)
    assert rates[-1] == pytest.approx(0.03) or epochs == 10


def test_it_replaces_what_other_schedules_say_from_start_on():
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[0], "lr": 0.1}, {"params": weights[1], "lr": 0.3}])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]

    def rates(*plugins):
        run = Run(None, None, optimizer, range(7), epochs=20, hook=compose(plugins, DEFAULTS))
        return [rates for _, rates in lr_curve(run)]

    others = ["cosine:by=step", "warmup:length=30"]
    alone, mine = rates(*others), rates(*others, Swa("50%", 0.05, 4))
    assert mine[:71] == alone[:71]                       # the first epoch from start on has the rate found there
    assert mine == rates(Swa("50%", 0.05, 4), *others)   # in either order
    assert mine[70] == mine[76] != mine[77]
    assert all(rate == pytest.approx(0.05) for rates in mine[7 * 14:] for rate in rates)
    halfway = [(alone[70][group] + 0.05) / 2 for group in range(2)]
    assert mine[7 * 12] == pytest.approx(halfway)
    assert rates(Swa("50%"), *others) == alone
    assert rates(Swa("50%", 0.05, 0))[70] == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("generator", [None, 3])
def test_training_is_what_it_would_be_without(net, clone, generator):
    """The pass for BatchNorm draws from every kind of random number: dropout, shuffling, the loader's own generator."""
    def data():
        return loader(generator and torch.Generator().manual_seed(generator))

    class Draws:
        @hookimpl
        def compute_loss(self, run: Run, batch):
            seen.append((random.random(), np.random.rand(), batch[1].tolist()) if run.model.training and torch.is_grad_enabled() else 0)
            run.outputs = run.network(batch[0])
            return cross_entropy(run.outputs, batch[1])

        @hookimpl
        def after_step(self, run: Run):
            seen.append(run.outputs.sum().item())       # still the step's own

    traces = []
    for plugins in ([Swa("1ep"), Watch()], [Watch()]):
        seen = []
        run = fit(clone(net), cross_entropy, adam, data(), epochs=4, plugins=[*plugins, Draws()], seed=1)
        traces.append((plugins[-1].steps, [draw for draw in seen if draw], [row["train_loss"] for row in run.history]))
    for mine, theirs in zip(traces[0][0], traces[1][0], strict=True):
        equal(mine, theirs)
    assert traces[0][1:] == traces[1][1:]


def test_batchnorm_collects_over_all_data_and_keeps_its_momentum(net, batches, sgd):
    """With a momentum of 0 in place of None the statistics would stay what they were."""
    net[1].momentum = 0.3
    net[3].p = 0.0
    fit(net, cross_entropy, sgd, batches, epochs=4, plugins=[Swa("50%")])
    with torch.no_grad():
        inputs = [net[0](input) for input, _ in batches]
    mean = torch.stack([input.mean(0) for input in inputs]).mean(0)
    torch.testing.assert_close(net[1].running_mean, mean, rtol=1e-5, atol=1e-6)
    assert net[1].momentum == 0.3
    assert net[1].num_batches_tracked == len(batches)


def test_frozen_batchnorm_keeps_its_statistics(net, batches, sgd):
    class Freeze:
        @hookimpl
        def epoch_start(self, run: Run):
            run.model[1].eval()

    net[1].running_mean.fill_(0.5)
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[Freeze(), Swa("50%")])
    assert torch.equal(net[1].running_mean, torch.full((16,), 0.5))
    assert net[1].num_batches_tracked == 0


def test_a_model_without_batchnorm_reads_the_data_once(plain, batches, sgd):
    class Counts(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    data = Counts(batches)
    fit(plain, cross_entropy, sgd, data, epochs=3, plugins=[Swa("1ep")])
    assert data.passes == 3


def test_weights_come_back_after_an_error(net, batches, valid, sgd):
    class Fails:
        @hookimpl(wrapper=True)
        def compute_loss(self, run: Run):
            if run.epoch == 3 and not torch.is_grad_enabled():
                raise KeyboardInterrupt
            return (yield)

    watch, pointers = Watch(), [weight.data_ptr() for weight in net.parameters()]
    momentum = net[1].momentum
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, sgd, batches, valid, epochs=5, plugins=[watch, Swa("50%"), Fails()], seed=1)
    equal(net.state_dict(), watch.steps[-1])
    assert [weight.data_ptr() for weight in net.parameters()] == pointers
    assert net[1].momentum == momentum


@pytest.mark.parametrize("eval_every", [None, 3, 4])
def test_within_an_epoch_the_last_average_is_evaluated(net, batches, valid, sgd, eval_every):
    """Also where an evaluation falls on an epoch's last step, which it then is the epoch's evaluation of."""
    watch, swa = Watch(), Swa("2ep")
    fit(net, cross_entropy, sgd, batches, valid, epochs=4, eval_every=eval_every, plugins=[watch, swa], seed=1)
    assert swa.count == 2
    equal(watch.judged[-1], net.state_dict())
    if eval_every == 3:
        equal(watch.judged[-2], watch.judged[-3])        # steps 30 and 27 judged what step 24 had made
        assert not torch.equal(watch.judged[-1]["0.weight"], watch.judged[-2]["0.weight"])


def test_checkpoint_and_early_stopping_keep_the_average(net, batches, valid, sgd, clone, tmp_path):
    for number in range(2):
        watch = Watch()
        plugins = ["checkpoint", "early_stopping:restore_best=true", Swa("1ep"), watch][::-1 if number else 1]
        model = clone(net)
        run = fit(model, cross_entropy, sgd, batches, valid, epochs=5, plugins=plugins, seed=1, out=tmp_path / str(number))
        best = min(range(5), key=lambda epoch: run.history[epoch]["val_loss"])
        assert 0 < best < 4, "else nothing is shown"
        equal(load_file(tmp_path / str(number) / "checkpoints" / "best.safetensors"), watch.judged[best])
        equal(model.state_dict(), watch.judged[best])


@pytest.mark.parametrize("ends", [3, 6])
def test_a_run_that_went_on_equals_one_that_never_ended(net, clone, same, tmp_path, ends):
    """It resumes from the raw weights, not from the average, before and after averaging has started."""
    def plugins():
        return [Swa(4, 0.02, 3), "amp:dtype=float16", "accumulate:every=2", "clip", "cosine", "early_stopping:patience=9"]

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


@pytest.mark.parametrize(("start", "epochs", "count"), [("75%", 1, 1), ("75%", 4, 1), ("75%", 10, 3), (3, 5, 2), ("16st", 5, 3)])
def test_start(plain, batches, sgd, start, epochs, count):
    swa = Swa(start)
    fit(plain, cross_entropy, sgd, batches, epochs=epochs, plugins=[swa])
    assert swa.count == count


def test_a_part_of_the_run_that_is_whole_epochs_is_not_rounded_below_them():
    """29 / 100 * 800 is 231.99999999999997."""
    assert Swa("29%").first(Run(None, None, None, range(8), epochs=100, hook=compose([], DEFAULTS))) == 29


def test_max_steps_and_fewer_batches_than_promised(plain, batches, sgd, clone, same):
    swa, watch = Swa("50%"), Watch()
    fit(plain, cross_entropy, sgd, batches, epochs=9, max_steps=13, plugins=[watch, swa])
    assert swa.count == 2
    equal(watch.judged[-1], plain.state_dict())         # what was judged last is what it ends with

    class Short(list):
        def __len__(self):
            return 20

    swa = Swa("1ep")
    fit(plain, cross_entropy, sgd, Short(batches), epochs=3, plugins=[swa])
    assert swa.count == 2


def test_beside_ema_it_averages_the_raw_weights(net, batches, sgd, clone, valid):
    """Of two averages the one given last is evaluated and kept; neither takes the other for the weights."""
    alone = {}
    for plugin in (Swa("50%"), Ema(0.9)):
        alone[type(plugin)] = clone(net)
        fit(alone[type(plugin)], cross_entropy, sgd, batches, valid, epochs=4, plugins=[plugin], seed=1)
    for plugins in ([Swa("50%"), Ema(0.9)], [Ema(0.9), Swa("50%")]):
        model = clone(net)
        fit(model, cross_entropy, sgd, batches, valid, epochs=4, plugins=plugins, seed=1)
        for (name, mine), theirs in zip(model.named_parameters(), alone[type(plugins[-1])].parameters(), strict=True):
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize(("plugin", "message"), [
    (partial(Swa, swa_lr=-1), "swa_lr is at least 0, not -1"),
    (partial(Swa, anneal_epochs=-1), "anneal_epochs is at least 0, not -1"),
])
def test_options_out_of_range(plugin, message):
    with pytest.raises(ValueError, match=message):
        plugin()


def test_refusals(net, plain, batches, sgd):
    with pytest.raises(UsageError, match="swa: start=5 is not before the run's end, so nothing"):
        fit(plain, cross_entropy, sgd, batches, epochs=5, plugins=[Swa(5)])

    class Once:
        def __init__(self):
            self.batches = iter(batches)

        def __iter__(self):
            return self.batches

        def __len__(self):
            return 8

    with pytest.raises(UsageError, match="swa: train cannot be read a second time"):
        fit(net, cross_entropy, sgd, Once(), plugins=[Swa()])
