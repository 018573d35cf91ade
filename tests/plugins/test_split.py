"""The plugin split: the gradient of the whole batch, and what happens when memory runs out."""
from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.split import Split, split_batch

cross_entropy = nn.CrossEntropyLoss()
FACTORIES = [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.Adam, lr=1e-2),
             partial(torch.optim.LBFGS, lr=0.5, max_iter=4)]


class LimitedMemory(nn.Module):
    """A model that runs out of memory with more than `max_samples` samples, in the pass that `where` names."""

    def __init__(self, model, max_samples, where="forward"):
        super().__init__()
        self.model, self.max_samples, self.where, self.sizes = model, max_samples, where, []

    def forward(self, input):
        self.sizes.append(len(input))
        output = self.model(input)          # before it fails, it draws random numbers and changes statistics
        if self.training and len(input) > self.max_samples:
            if self.where == "forward":
                raise torch.OutOfMemoryError("simulated")
            output.register_hook(self.fail)
        return output

    def fail(self, gradient):
        raise torch.OutOfMemoryError("simulated")


def doubles(batches):
    return [(input.double(), target) for input, target in batches]


def accuracy(output, target):
    return (output.argmax(1) == target).float().mean()


@pytest.mark.compares(use="split", technique="the gradient of a batch from its parts",
                      source="the run without it", tolerance="1e-12: sums are in another order")
@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.func.__name__)
@pytest.mark.parametrize("into", [2, 3, 5, 100])
def test_parts_give_the_gradient_of_the_whole_batch(plain, batches, clone, same, factory, into):
    """To 1e-12 in float64, because sums are in another order. Parts differ in size, and the last batch has 3 samples."""
    other, data = clone(plain.double()), doubles(batches)
    if factory.func is torch.optim.LBFGS:       # one batch: over several, a rounding error grows to 1e-2 in 16 steps
        data = [tuple(torch.cat(parts) for parts in zip(*data, strict=True))]
    run = fit(plain, cross_entropy, factory, data, epochs=2, metrics={"accuracy": accuracy},
              plugins=[f"loopctl.plugins.split:Split:into={into}"])
    whole = fit(other, cross_entropy, factory, data, epochs=2, metrics={"accuracy": accuracy})
    same(plain, other, 1e-12)
    for row, expected in zip(run.history, whole.history, strict=True):
        assert row == pytest.approx(expected, rel=1e-12)
    assert (run.step, run.seen, run.epochs_done) == (whole.step, whole.seen, 2.0)


@pytest.mark.parametrize("into", [1, "auto"])
def test_without_splitting_the_run_equals_one_without_the_plugin(net, batches, clone, same, sgd, into):
    other = clone(net)
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[Split(into), "accumulate:every=3"], seed=1)
    fit(other, cross_entropy, sgd, batches, epochs=2, plugins=["accumulate:every=3"], seed=1)
    same(net, other)


@pytest.mark.parametrize("order", [1, -1])
def test_with_accumulate_counters_and_schedules_are_those_of_whole_batches(plain, batches, clone, same, sgd, order):
    seen = []

    class Recorder:
        @hookimpl
        def after_step(self, run: Run):
            seen.append((run.seen, run.epochs_done, run.progress, run.planned_steps, run.optimizer.param_groups[0]["lr"]))

    other, plugins = clone(plain.double()), ["accumulate:every=3", "cosine:by=step"]
    fit(plain, cross_entropy, sgd, doubles(batches), epochs=2, plugins=[*[*plugins, Split(4)][::order], Recorder()])
    with_split = seen.copy()
    seen.clear()
    fit(other, cross_entropy, sgd, doubles(batches), epochs=2, plugins=[*plugins, Recorder()])
    assert with_split == seen
    same(plain, other, 1e-12)


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("every", [1, 3])
def test_auto_finds_a_number_of_parts_that_fits_and_repeats_the_step(plain, batches, clone, same, sgd, where, every):
    """The second of three accumulated batches fails. The gradient of the first must not be lost or counted twice."""
    data = [(input[:size], target[:size]) for (input, target), size in zip(doubles(batches), [2, 8, 8, 2, 8, 3, 8, 3], strict=True)]
    other, small, split = clone(plain.double()), LimitedMemory(plain, 3, where), Split("auto")
    plugins = [f"accumulate:every={every}", "clip:max_norm=0.5"]
    run = fit(small, cross_entropy, sgd, data, epochs=2, plugins=[split, *plugins], metrics={"accuracy": accuracy})
    whole = fit(other, cross_entropy, sgd, data, epochs=2, plugins=plugins, metrics={"accuracy": accuracy})
    same(plain, other, 1e-12)
    assert split.parts == 4
    assert small.sizes[:4] == [2, 8, 1, 1] if every == 3 else [2, 8, 4, 2]
    for row, expected in zip(run.history, whole.history, strict=True):
        assert row == pytest.approx(expected, rel=1e-12)


def test_a_repeated_step_equals_one_split_from_the_start(net, batches, clone, same, sgd):
    """Dropout draws the same numbers, and BatchNorm statistics are restored after failed attempts."""
    other = clone(net)
    fit(LimitedMemory(net, 2), cross_entropy, sgd, batches[:-1], epochs=2, plugins=[Split("auto"), "accumulate:every=2"], seed=1)
    fit(other, cross_entropy, sgd, batches[:-1], epochs=2, plugins=[Split(4), "accumulate:every=2"], seed=1)
    same(net, other)


def test_float16_unscales_once_in_a_repeated_step(plain, batches, clone, same, sgd):
    other, plugins = clone(plain), ["amp:dtype=float16", "clip"]
    run = fit(LimitedMemory(plain, 2, "backward"), cross_entropy, sgd, batches[:-1], plugins=[Split("auto"), *plugins])
    fit(other, cross_entropy, sgd, batches[:-1], plugins=[*plugins, Split(4)])
    same(plain, other)
    assert run.step == 7


def test_it_works_with_sam_which_computes_gradients_twice(plain, batches, clone, same, sgd):
    other, sam = clone(plain.double()), "loopctl.plugins.sam:Sam"
    fit(LimitedMemory(plain, 2), cross_entropy, sgd, doubles(batches), plugins=[Split("auto"), sam])
    fit(other, cross_entropy, sgd, doubles(batches), plugins=[sam])
    same(plain, other, 1e-12)


def test_running_out_of_memory_in_the_second_pass_of_sam_repeats_only_that_pass(plain, batches, clone, same, sgd):
    class FailOnce:
        calls = 0

        @hookimpl(wrapper=True)
        def compute_loss(self):
            self.calls += 1
            if self.calls == 2:
                raise torch.OutOfMemoryError("simulated")
            return (yield)

    other, sam = clone(plain.double()), "loopctl.plugins.sam:Sam"
    fit(plain, cross_entropy, sgd, doubles(batches), plugins=[Split("auto"), sam, FailOnce()])
    fit(other, cross_entropy, sgd, doubles(batches), plugins=[sam])
    same(plain, other, 1e-12)


def test_the_batches_of_an_aborted_step_are_not_repeated_in_the_next(plain, batches, sgd):
    class SkipOnError:
        calls = 0

        @hookimpl(wrapper=True)
        def compute_loss(self):
            self.calls += 1
            if self.calls == 2:
                raise ValueError
            return (yield)

        @hookimpl(wrapper=True)
        def optimizer_step(self, run: Run):
            try:
                return (yield)
            except ValueError:
                run.skipped = True

    small = LimitedMemory(plain, 4)
    data = [(input[:size], target[:size]) for (input, target), size in zip(batches, [2, 2, 8, 8], strict=False)]
    fit(small, cross_entropy, sgd, data, plugins=["accumulate:every=2", Split("auto"), SkipOnError()])
    assert small.sizes == [2, 8, 4, 4, 4, 4]


def test_a_single_sample_that_does_not_fit_is_an_error(plain, batches, sgd):
    small = LimitedMemory(plain, 0)
    with pytest.raises(torch.OutOfMemoryError, match="simulated"):
        fit(small, cross_entropy, sgd, batches, plugins=[Split("auto")])
    assert small.sizes == [8, 4, 2, 1]
    with pytest.raises(torch.OutOfMemoryError):
        fit(LimitedMemory(plain, 2), cross_entropy, sgd, batches, plugins=[Split(2)])


def test_the_number_of_parts_is_saved_in_checkpoints(plain, batches, sgd, tmp_path):
    plugins = [Split("auto"), "checkpoint"]
    fit(LimitedMemory(plain, 3), cross_entropy, sgd, batches, plugins=plugins, out=tmp_path)
    split, small = Split("auto"), LimitedMemory(plain, 3)
    fit(small, cross_entropy, sgd, batches, epochs=2, plugins=[split, "checkpoint"], out=tmp_path, resume=tmp_path)
    assert max(small.sizes) == 2


def test_parts_are_weighted_by_batch_weight(plain, batches, clone, same, sgd):
    """Weighted by tokens, as tensors on the device. They are integers, whose quotients torch rounds to float32."""
    class Tokens:
        @hookimpl
        def batch_weight(self, batch):
            return (batch[1] != 0).sum()

    loss_fn, data = nn.CrossEntropyLoss(ignore_index=0), [(input, target.clone()) for input, target in doubles(batches)]
    for _, target in data:
        target[::3] = 1             # each part has a token, because a mean over none is NaN
    other = clone(plain.double())
    fit(plain, loss_fn, sgd, data, plugins=[Split(3), Tokens()])
    fit(other, loss_fn, sgd, data, plugins=[Tokens()])
    same(plain, other, 1e-6)


@dataclass
class Item:
    input: torch.Tensor
    name: str


Pair = namedtuple("Pair", "x y")


def test_nested_batches_are_split():
    x, y = torch.arange(10).reshape(5, 2), torch.arange(5)
    batch = {"a": [x, (y, 7)], "pair": Pair(x, torch.tensor(3)), "item": Item(y, "name")}
    parts = split_batch(batch, 2)
    assert [len(part["a"][0]) for part in parts] == [2, 3]
    for part in parts:
        assert part["a"][1][1] == 7
        assert part["pair"].y == 3
        assert part["item"].name == "name"
    for get in (lambda part: part["a"][0], lambda part: part["pair"].x):
        assert torch.equal(torch.cat([get(part) for part in parts]), x)
    for get in (lambda part: part["a"][1][0], lambda part: part["item"].input):
        assert torch.equal(torch.cat([get(part) for part in parts]), y)
    assert parts[0]["a"][0].data_ptr() == x.data_ptr()


def test_wrong_options_and_unequal_lengths_are_refused(plain, batches, sgd):
    with pytest.raises(ValueError, match="into is at least 1, or auto, not 0"):
        Split(0)
    with pytest.raises(UsageError, match=r"into takes a whole number or auto, not 'half'"):
        fit(plain, cross_entropy, sgd, batches, plugins=["loopctl.plugins.split:Split:into=half"])
    with pytest.raises(UsageError, match="split: cannot split a batch of 8 samples that has a tensor of length 5"):
        fit(plain, cross_entropy, sgd, [(torch.rand(8, 6), torch.zeros(5, dtype=torch.long))], plugins=[Split()])
