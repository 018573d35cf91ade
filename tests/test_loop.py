"""The loop against the loop that one would write by hand."""
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from loopctl import Run, UsageError, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()
OPTIMIZERS = [
    partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    partial(torch.optim.Adam, lr=1e-2),
    partial(torch.optim.AdamW, lr=1e-2),
    partial(torch.optim.RMSprop, lr=1e-3),
    partial(torch.optim.Adagrad, lr=1e-2),
]


def accuracy(output, target):
    return (output.argmax(1) == target).float().mean()


def by_hand(model, optimizer, batches, epochs):
    """The plainest loop; returns the loss of every step."""
    losses = []
    for _ in range(epochs):
        model.train()
        for input, target in batches:
            optimizer.zero_grad()
            loss = cross_entropy(model(input), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


class Losses:
    """Collects the loss of every step."""

    def __init__(self):
        self.seen = []

    @hookimpl
    def after_step(self, run: Run):
        self.seen.append(run.loss.item())


@pytest.mark.parametrize("factory", OPTIMIZERS, ids=lambda factory: factory.func.__name__)
def test_bit_for_bit_the_loop_by_hand(net, batches, factory, clone, same):
    mine, theirs, losses = net, clone(net), Losses()
    torch.manual_seed(1)
    fit(mine, cross_entropy, factory, batches, epochs=3, plugins=[losses])
    torch.manual_seed(1)
    expected = by_hand(theirs, factory(theirs.parameters()), batches, 3)
    same(mine, theirs)
    assert losses.seen == expected


def test_a_model_given_in_evaluation_mode_is_trained_in_training_mode(net, batches, valid, clone, same, sgd):
    other = clone(net)
    fit(net.eval(), cross_entropy, sgd, batches, valid, epochs=2, seed=1)
    fit(other, cross_entropy, sgd, batches, valid, epochs=2, seed=1)
    same(net, other)


def test_lbfgs_gets_a_repeatable_closure(plain, batches, clone, same):
    mine, theirs = plain.double(), clone(plain)
    data = [(input.double(), target) for input, target in batches]
    lbfgs = partial(torch.optim.LBFGS, lr=0.5, max_iter=5)
    fit(mine, cross_entropy, lbfgs, data, epochs=2)
    optimizer = lbfgs(theirs.parameters())
    for _ in range(2):
        for input, target in data:
            def closure(input=input, target=target):
                optimizer.zero_grad()
                loss = cross_entropy(theirs(input), target)
                loss.backward()
                return loss
            optimizer.step(closure)
    same(mine, theirs)


def test_a_finished_optimizer_may_be_given(plain, batches, clone, same, sgd):
    other = clone(plain)
    fit(plain, cross_entropy, sgd(plain.parameters()), batches)
    fit(other, cross_entropy, sgd, batches)
    same(plain, other)


def test_train_loss_and_metrics_are_means_over_samples(net, batches, sgd):
    steps = []

    class Look:
        @hookimpl
        def after_step(self, run: Run):
            target = run.batches[0][1]
            steps.append((run.loss.item(), accuracy(run.outputs, target).item(), len(target)))

    run = fit(net, cross_entropy, sgd, batches, metrics={"accuracy": accuracy}, plugins=[Look()])
    total = sum(size for *_, size in steps)
    row = run.history[0]
    # 1e-12: the loop sums in float64, in another order.
    assert row["train_loss"] == pytest.approx(sum(loss * size for loss, _, size in steps) / total, rel=1e-12)
    assert row["train_accuracy"] == pytest.approx(sum(part * size for _, part, size in steps) / total, rel=1e-12)


def test_evaluation_weighs_batches_by_size_and_leaves_modes_alone(net, batches, valid, sgd):
    net[1].eval()                                   # a frozen BatchNorm
    modes = []

    class Freeze:
        @hookimpl
        def epoch_start(self, run: Run):
            run.model[1].eval()

        @hookimpl(wrapper=True)
        def evaluate(self, run: Run):
            before = [module.training for module in run.model.modules()]
            result = yield
            modes.append((before, [module.training for module in run.model.modules()]))
            return result

    run = fit(net, cross_entropy, sgd, batches, valid, metrics={"accuracy": accuracy}, plugins=[Freeze()])
    net.eval()
    with torch.no_grad():
        parts = [(cross_entropy(net(x), y).item(), accuracy(net(x), y).item(), len(y)) for x, y in valid]
    size = sum(part[2] for part in parts)
    assert run.history[0]["val_loss"] == pytest.approx(sum(loss * n for loss, _, n in parts) / size, rel=1e-12)
    assert run.history[0]["val_accuracy"] == pytest.approx(sum(right * n for _, right, n in parts) / size, rel=1e-12)
    assert modes == [([True, True, False, True, True, True],) * 2]


def test_metrics_with_their_own_state(net, batches, valid, sgd):
    """torchmetrics objects collect by themselves; training and evaluation get one each."""

    class Count:
        def __init__(self):
            self.reset()

        def __call__(self, output, target):
            raise AssertionError

        def reset(self):
            self.total = torch.tensor(0)

        def update(self, output, target):
            self.total = self.total + len(target)

        def compute(self):
            return self.total

        def to(self, device):
            return self

    run = fit(net, cross_entropy, sgd, batches, valid, epochs=2, eval_every=3, metrics={"count": Count()})
    assert [(row["train_count"], row["val_count"]) for row in run.history] == [(59, 13), (59, 13)]


def test_evaluate_every_so_many_steps_and_once_at_the_end(net, batches, valid, sgd):
    at = []

    class Look:
        @hookimpl
        def after_evaluate(self, run: Run):
            assert all(isinstance(value, float) for value in run.metrics.values())
            at.append(run.step)

    fit(net, cross_entropy, sgd, batches, valid, epochs=2, eval_every=4, plugins=[Look()])
    assert at == [4, 8, 12, 16]                     # 8 and 16 end an epoch too: once each
    at.clear()
    fit(net, cross_entropy, sgd, batches, valid, epochs=2, eval_every=3, plugins=[Look()])
    assert at == [3, 6, 8, 9, 12, 15, 16]


def test_max_steps_ends_the_run(net, batches, sgd):
    run = fit(net, cross_entropy, sgd, batches, epochs=5, max_steps=11)
    assert (run.step, run.epoch, len(run.history), run.stop) == (11, 2, 2, "")
    assert run.progress == 1.0


def test_stop_ends_the_run_after_the_step_with_its_row(net, batches, valid, sgd):
    ended = []

    class Stop:
        @hookimpl
        def after_step(self, run: Run):
            if run.step == 10:
                run.stop = "enough"

        @hookimpl
        def train_end(self, run: Run):
            ended.append(run.step)

    run = fit(net, cross_entropy, sgd, batches, valid, epochs=5, plugins=[Stop()])
    assert (run.step, run.stop, ended) == (10, "enough", [10])
    assert run.history[-1]["epoch"] == 2
    assert math.isfinite(run.history[-1]["val_loss"])


class Endless(IterableDataset):
    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        while True:
            yield torch.randn(6, generator=generator), torch.tensor(1)


@pytest.mark.parametrize("train", [DataLoader(Endless(), batch_size=4), (batch for batch in [1])], ids=["loader", "generator"])
def test_without_a_length_it_asks_for_steps_per_epoch(net, train, sgd):
    with pytest.raises(UsageError, match="steps_per_epoch"):
        fit(net, cross_entropy, sgd, train)


def test_steps_per_epoch_cuts_an_endless_loader(net, sgd):
    run = fit(net, cross_entropy, sgd, DataLoader(Endless(), batch_size=4), epochs=3, steps_per_epoch=5,
              plugins=["accumulate:every=2"])
    assert (run.step, run.seen, run.epochs_done, run.planned_steps) == (15, 30, 3.0, 15)


def test_data_that_can_be_read_once_is_refused_at_the_second_epoch(net, batches, sgd):
    with pytest.raises(UsageError, match="no batches in epoch 2"):
        fit(net, cross_entropy, sgd, iter(batches), epochs=2, steps_per_epoch=8)


def test_batches_that_are_no_pairs_need_a_plugin(plain, batches, sgd):
    mappings = [{"x": input, "y": target} for input, target in batches]
    with pytest.raises(UsageError, match=r"gave a dict.*replace compute_loss"):
        fit(plain, cross_entropy, sgd, mappings)

    class Mapping:
        @hookimpl
        def compute_loss(self, run: Run, batch):
            run.outputs = run.network(batch["x"])
            return cross_entropy(run.outputs, batch["y"])

    run = fit(plain, None, sgd, mappings, plugins=[Mapping()])
    assert run.step == 8


@pytest.mark.parametrize(("option", "value"), [("epochs", 0), ("epochs", -1), ("epochs", 1.5), ("max_steps", 0), ("eval_every", 0)])
def test_numbers_no_run_can_have(net, batches, sgd, option, value):
    with pytest.raises(UsageError, match=option):
        fit(net, cross_entropy, sgd, batches, **{option: value})


def test_refusals_before_training(net, batches, sgd):
    with pytest.raises(UsageError, match="train has no batches"):
        fit(net, cross_entropy, sgd, [])
    with pytest.raises(UsageError, match="valid has no batches"):
        fit(net, cross_entropy, sgd, batches, [])
    with pytest.raises(UsageError, match="not an iterable"):
        fit(net, cross_entropy, sgd, batches, 3)
    with pytest.raises(UsageError, match="not a torch.nn.Module"):
        fit("resnet18", cross_entropy, sgd, batches)
    with pytest.raises(UsageError, match="not a torch.optim.Optimizer"):
        fit(net, cross_entropy, lambda groups: "sgd", batches)
    with pytest.raises(UsageError, match="device 'gpu' is unknown"):
        fit(net, cross_entropy, sgd, batches, device="gpu")
    with pytest.raises(UsageError, match="metric 'accuracy' is a str"):
        fit(net, cross_entropy, sgd, batches, metrics={"accuracy": "accuracy"})
    with pytest.raises(UsageError, match="nothing is left to train"):
        fit(net.requires_grad_(False), cross_entropy, sgd, batches)


def test_the_seed_decides_everything_random(net, batches, clone, same, sgd):
    first, second, third = net, clone(net), clone(net)
    fit(first, cross_entropy, sgd, batches, seed=3)
    torch.rand(5)
    fit(second, cross_entropy, sgd, batches, seed=3)
    fit(third, cross_entropy, sgd, batches, seed=4)
    same(first, second)
    assert not torch.equal(first[0].weight, third[0].weight)


def test_train_end_is_not_called_after_an_error_and_nothing_stays_on(net, batches, sgd):
    ended = []

    class End:
        @hookimpl
        def train_end(self):
            ended.append(1)

        @hookimpl(wrapper=True)
        def train(self):
            try:
                return (yield)
            finally:
                ended.append("cleaned")

    def broken(output, target):
        assert torch.is_autocast_enabled("cpu")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(net, broken, sgd, batches, plugins=["amp:dtype=bfloat16", End()])
    assert ended == ["cleaned"]
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_grad_enabled()


def test_the_rate_is_left_alone_without_a_schedule(net, batches, sgd):
    class Mine:
        @hookimpl
        def train_start(self, run: Run):
            run.optimizer.param_groups[0]["lr"] = 0.05

    assert fit(net, cross_entropy, sgd, batches, plugins=[Mine()]).history[0]["lr"] == 0.05


def test_a_tensor_rate_is_filled_in_place(net, batches):
    rate = torch.tensor(0.1)
    run = fit(net, cross_entropy, partial(torch.optim.SGD, lr=rate), batches, epochs=2, plugins=["cosine"])
    assert run.optimizer.param_groups[0]["lr"].data_ptr() == run.optimizer.param_groups[0]["lr"].data_ptr()
    assert run.history[1]["lr"] == pytest.approx(0.05)
    assert isinstance(run.optimizer.param_groups[0]["lr"], torch.Tensor)


def test_factors_of_schedules_multiply_and_a_wrapper_may_replace_them(net, batches, sgd):
    class Half:
        @hookimpl
        def lr_scale(self):
            return 0.5

    class Only:
        @hookimpl(wrapper=True)
        def lr_scale(self, initial_lr):
            factors = yield
            assert factors == [0.5, 0.5]
            return [initial_lr * 20]

    assert fit(net, cross_entropy, sgd, batches, plugins=[Half(), Half()]).history[0]["lr"] == 0.1 * 0.25
    assert fit(net, cross_entropy, sgd, batches, plugins=[Half(), Only(), Half()]).history[0]["lr"] == pytest.approx(0.2)


def test_a_rate_of_zero_stays_zero(plain, batches):
    plugins = ["cosine:eta_min=0.001", "warmup"]
    run = fit(plain, cross_entropy, partial(torch.optim.SGD, lr=0.0), batches, plugins=plugins)
    assert run.history[0]["lr"] == 0.0


def test_a_skipped_step_moves_data_but_not_the_step(net, batches, clone, same, sgd):
    before = clone(net)
    positions = []

    class Skip:
        @hookimpl
        def optimizer_step(self, run: Run, closure):
            run.skipped = True
            with torch.random.fork_rng():
                run.model.eval()
                return closure()

        @hookimpl
        def after_step(self, run: Run):
            positions.append((run.step, run.attempts, run.epochs_done))

    run = fit(net, cross_entropy, sgd, batches, plugins=[Skip()])
    same(net, before)
    assert (run.step, run.attempts, run.seen) == (0, 8, 8)
    assert positions[3] == (0, 4, 0.5)


def test_only_the_first_look_of_an_optimizer_counts(plain, batches, sgd):
    losses = Losses()

    class Twice:
        @hookimpl(wrapper=True)
        def optimizer_step(self, run: Run, closure):
            self.first = closure().item()
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.mul_(2)
            return (yield)

    twice = Twice()
    run = fit(plain, cross_entropy, sgd, batches[:1], metrics={"accuracy": accuracy}, plugins=[twice, losses])
    assert losses.seen == [twice.first]
    assert run.history[0]["train_loss"] == pytest.approx(twice.first, rel=1e-12)


def test_many_steps_are_folded_without_losing_any(plain, sgd):
    """Means fold their values 256 at a time."""
    losses = Losses()
    batch = (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    run = fit(plain, cross_entropy, sgd, [batch] * 600, plugins=[losses])
    assert run.history[0]["train_loss"] == pytest.approx(sum(losses.seen) / 600, rel=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_nothing_in_a_step_waits_for_the_device(net, batches, valid, sgd):
    class Strict:
        @hookimpl
        def before_step(self):
            torch.cuda.set_sync_debug_mode("error")

        @hookimpl
        def safe_point(self):
            torch.cuda.set_sync_debug_mode("default")

    pinned = [(input.pin_memory(), target.pin_memory()) for input, target in batches] * 50
    run = fit(net, cross_entropy, sgd, pinned, valid, device="cuda", metrics={"accuracy": accuracy},
              plugins=[Strict(), "amp:dtype=bfloat16", "accumulate:every=2", "clip", "warmup", "cosine:by=step"])
    assert run.step == 200
