"""The training loop of `fit`: it does exactly what a loop written by hand in plain PyTorch does."""
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from loopctl import Run, UsageError, fit, hookimpl
from tests.conftest import sync_debug_mode

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
    """Train with a minimal loop in plain PyTorch. Returns the loss of every step."""
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
    """Records the loss of every step."""

    def __init__(self):
        self.seen = []

    @hookimpl
    def after_step(self, run: Run):
        self.seen.append(run.loss.item())


@pytest.mark.parametrize("factory", OPTIMIZERS, ids=lambda factory: factory.func.__name__)
def test_weights_and_losses_equal_those_of_a_loop_by_hand(net, batches, factory, clone, same):
    other, losses = clone(net), Losses()
    torch.manual_seed(1)
    fit(net, cross_entropy, factory, batches, epochs=3, plugins=[losses])
    torch.manual_seed(1)
    expected = by_hand(other, factory(other.parameters()), batches, 3)
    same(net, other)
    assert losses.seen == expected


def test_a_model_passed_in_eval_mode_is_trained_in_training_mode(net, batches, valid, clone, same, sgd):
    other = clone(net)
    fit(net.eval(), cross_entropy, sgd, batches, valid, epochs=2, seed=1)
    fit(other, cross_entropy, sgd, batches, valid, epochs=2, seed=1)
    same(net, other)


def test_lbfgs_gets_a_closure_that_it_can_call_repeatedly(plain, batches, clone, same):
    other = clone(plain.double())
    data = [(input.double(), target) for input, target in batches]
    lbfgs = partial(torch.optim.LBFGS, lr=0.5, max_iter=5)
    fit(plain, cross_entropy, lbfgs, data, epochs=2)
    optimizer = lbfgs(other.parameters())
    for _ in range(2):
        for input, target in data:
            def closure(input=input, target=target):
                optimizer.zero_grad()
                loss = cross_entropy(other(input), target)
                loss.backward()
                return loss.detach()
            optimizer.step(closure)
    same(plain, other)


def test_an_optimizer_may_be_passed_in_place_of_a_factory(plain, batches, clone, same, sgd):
    other = clone(plain)
    fit(plain, cross_entropy, sgd(plain.parameters()), batches)
    fit(other, cross_entropy, sgd, batches)
    same(plain, other)


def test_training_loss_and_metrics_are_means_over_samples(net, batches, sgd):
    steps = []

    class Recorder:
        @hookimpl
        def after_step(self, run: Run):
            target = run.batches[0][1]
            steps.append((run.loss.item(), accuracy(run.outputs, target).item(), len(target)))

    run = fit(net, cross_entropy, sgd, batches, metrics={"accuracy": accuracy}, plugins=[Recorder()])
    total = sum(size for *_, size in steps)
    row = run.history[0]
    # 1e-12: the loop sums in float64, in another order.
    assert row["train_loss"] == pytest.approx(sum(loss * size for loss, _, size in steps) / total, rel=1e-12)
    assert row["train_accuracy"] == pytest.approx(sum(part * size for _, part, size in steps) / total, rel=1e-12)


def test_evaluation_weights_batches_by_size_and_restores_the_mode_of_each_module(net, batches, valid, sgd):
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


def test_training_and_evaluation_get_separate_torchmetrics_objects(net, batches, valid, sgd):
    """A torchmetrics object keeps its own state and resets it for each epoch."""

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
    assert [(row["train_count"], row["val_count"]) for row in run.history if row["epoch"] in (1, 2)] == [(59, 13), (59, 13)]


def test_eval_every_evaluates_within_epochs_and_once_at_the_end_of_each(net, batches, valid, sgd):
    at = []

    class Recorder:
        @hookimpl
        def after_evaluate(self, run: Run):
            assert all(isinstance(value, float) for value in run.metrics.values())
            at.append(run.step)

    fit(net, cross_entropy, sgd, batches, valid, epochs=2, eval_every=4, plugins=[Recorder()])
    assert at == [4, 8, 12, 16]                     # steps 8 and 16 end an epoch too, and are evaluated once
    at.clear()
    fit(net, cross_entropy, sgd, batches, valid, epochs=2, eval_every=3, plugins=[Recorder()])
    assert at == [3, 6, 8, 9, 12, 15, 16]


def test_max_steps_ends_the_run(net, batches, sgd):
    run = fit(net, cross_entropy, sgd, batches, epochs=5, max_steps=11)
    assert (run.step, run.epoch, len(run.history), run.stop) == (11, 2, 2, "")
    assert run.progress == 1.0


def test_setting_stop_ends_the_run_after_the_step_and_completes_the_row_of_the_epoch(net, batches, valid, sgd):
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
def test_data_without_a_length_requires_steps_per_epoch(net, train, sgd):
    with pytest.raises(UsageError, match="steps_per_epoch"):
        fit(net, cross_entropy, sgd, train)


def test_steps_per_epoch_ends_the_epochs_of_an_endless_loader(net, sgd):
    run = fit(net, cross_entropy, sgd, DataLoader(Endless(), batch_size=4), epochs=3, steps_per_epoch=5,
              plugins=["accumulate:every=2"])
    assert (run.step, run.seen, run.epochs_done, run.planned_steps) == (15, 30, 3.0, 15)


def test_an_iterator_is_refused_in_the_second_epoch(net, batches, sgd):
    with pytest.raises(UsageError, match="no batches in epoch 2"):
        fit(net, cross_entropy, sgd, iter(batches), epochs=2, steps_per_epoch=8)


def test_a_plugin_may_compute_the_loss_of_other_batches(plain, batches, sgd):
    mappings = [{"x": input, "y": target} for input, target in batches]
    with pytest.raises(UsageError, match=r"entries x and y, and the model takes input; name them alike, or pass forward"):
        fit(plain, cross_entropy, sgd, mappings)

    class Mapping:
        @hookimpl
        def compute_loss(self, run: Run, batch):
            run.outputs = run.network(batch["x"])
            return cross_entropy(run.outputs, batch["y"])

    run = fit(plain, None, sgd, mappings, plugins=[Mapping()])
    assert run.step == 8


@pytest.mark.parametrize(("option", "value"), [("epochs", 0), ("epochs", -1), ("epochs", 1.5), ("max_steps", 0), ("eval_every", 0)])
def test_numbers_out_of_range_are_refused(net, batches, sgd, option, value):
    with pytest.raises(UsageError, match=option):
        fit(net, cross_entropy, sgd, batches, **{option: value})


def test_wrong_arguments_are_refused_before_training(net, batches, sgd):
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
    with pytest.raises(UsageError, match="no parameter of the model has requires_grad=True; leave at least one trainable"):
        fit(net.requires_grad_(False), cross_entropy, sgd, batches)


def test_equal_seeds_give_equal_weights_and_other_seeds_do_not(net, batches, clone, same, sgd):
    first, second, third = net, clone(net), clone(net)
    fit(first, cross_entropy, sgd, batches, seed=3)
    torch.rand(5)
    fit(second, cross_entropy, sgd, batches, seed=3)
    fit(third, cross_entropy, sgd, batches, seed=4)
    same(first, second)
    assert not torch.equal(first[0].weight, third[0].weight)


def test_after_an_error_train_end_is_not_called_and_wrappers_restore_global_state(net, batches, sgd):
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


def test_without_a_schedule_the_learning_rate_is_not_changed(net, batches, sgd):
    class SetLearningRate:
        @hookimpl
        def train_start(self, run: Run):
            run.optimizer.param_groups[0]["lr"] = 0.05

    assert fit(net, cross_entropy, sgd, batches, plugins=[SetLearningRate()]).history[0]["lr"] == 0.05


def test_a_tensor_learning_rate_is_filled_in_place(net, batches):
    rate = torch.tensor(0.1)
    run = fit(net, cross_entropy, partial(torch.optim.SGD, lr=rate), batches, epochs=2, plugins=["cosine"])
    assert run.optimizer.param_groups[0]["lr"].data_ptr() == run.optimizer.param_groups[0]["lr"].data_ptr()
    assert run.history[1]["lr"] == pytest.approx(0.05)
    assert isinstance(run.optimizer.param_groups[0]["lr"], torch.Tensor)


def test_factors_of_schedules_are_multiplied_and_a_wrapper_may_replace_them(net, batches, sgd):
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


def test_a_learning_rate_of_zero_stays_zero(plain, batches):
    plugins = ["cosine:eta_min=0.001", "warmup"]
    run = fit(plain, cross_entropy, partial(torch.optim.SGD, lr=0.0), batches, plugins=plugins)
    assert run.history[0]["lr"] == 0.0


def test_a_skipped_step_counts_as_an_attempt_and_consumes_data_but_makes_no_update(net, batches, clone, same, sgd):
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


def test_the_loss_of_a_step_is_that_of_the_first_call_of_the_closure(plain, batches, sgd):
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


def test_the_mean_loss_of_many_steps_includes_every_step(plain, sgd):
    """A Mean sums its values 256 at a time."""
    losses = Losses()
    batch = (torch.randn(4, 6), torch.tensor([0, 1, 2, 0]))
    run = fit(plain, cross_entropy, sgd, [batch] * 600, plugins=[losses])
    assert run.history[0]["train_loss"] == pytest.approx(sum(losses.seen) / 600, rel=1e-12)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_step_on_cuda_does_not_synchronize_with_the_device(net, batches, valid, sgd):
    class Strict:
        @hookimpl
        def before_step(self):
            set_mode("error")

        @hookimpl
        def safe_point(self):
            set_mode("default")

    pinned = [(input.pin_memory(), target.pin_memory()) for input, target in batches] * 50
    with sync_debug_mode() as set_mode:
        run = fit(net, cross_entropy, sgd, pinned, valid, device="cuda", metrics={"accuracy": accuracy},
                  plugins=[Strict(), "amp:dtype=bfloat16", "accumulate:every=2", "clip", "warmup", "cosine:by=step"])
    assert run.step == 200


class LoseLoss:
    """Makes the validation loss NaN in these epochs."""

    def __init__(self, *epochs):
        self.epochs = epochs

    @hookimpl
    def after_evaluate(self, run):
        if run.epoch in self.epochs:
            run.metrics["val_loss"] = math.nan


@pytest.mark.parametrize("guard", [[], ["nan_guard:action=skip"]], ids=["alone", "with nan_guard"])
def test_losses_that_are_nan_to_the_end_are_said_once_at_the_end(guard, net, batches, valid, sgd, caplog):
    fit(net, cross_entropy, sgd, batches, valid, epochs=4, plugins=[LoseLoss(1, 3, 4), *guard])
    assert caplog.messages == ["val_loss is nan since epoch 3, so the model is of no use; train again with a lower learning rate"
                               + ", or add the plugin nan_guard, which skips such steps" * (not guard)]


def test_a_run_whose_losses_are_finite_at_the_end_says_nothing(net, batches, valid, sgd, caplog):
    fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=[LoseLoss(1, 2)])
    assert not caplog.messages
