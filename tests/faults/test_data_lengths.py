"""The length of the data, the order of its batches and its end are not taken on trust."""
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from loopctl import Run, fit, hookimpl

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1)


class Claims(list):
    """Batches with a length that is not theirs."""

    def __init__(self, batches, length):
        super().__init__(batches)
        self.length = length

    def __len__(self):
        return self.length


class Rates:
    def __init__(self):
        self.rates = []

    @hookimpl
    def before_step(self, run: Run):
        self.rates.append(run.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("length", [4, 16])
@pytest.mark.fault(row="H1", given="a loader that gives twice, or half, its length, with cosine by step", right="the epoch is what was given; said once; the rate follows the true length")
def test_the_epoch_is_what_the_loader_gives(plain, batches, caplog, length):
    rates = Rates()
    run = fit(plain, cross_entropy, sgd, Claims(batches, length), epochs=4, plugins=["cosine:by=step", rates])
    assert run.step == 4 * 8
    assert [record.message for record in caplog.records] == [
        f"train gave 8 batches in epoch 1, but its length is {length}; schedules count 8 steps per epoch from here on"]
    torch_rates = [0.1 * (1 + torch.cos(torch.tensor(torch.pi * step / 32)).item()) / 2 for step in range(32)]
    assert rates.rates[8:] == pytest.approx(torch_rates[8:], rel=1e-5)
    assert run.planned_steps == 32


@pytest.mark.fault(row="H", given="a loader with an untrue length, killed in the second epoch and resumed", right="the rates and weights of a run that was not killed")
def test_a_loader_with_an_untrue_length_is_resumed(plain, clone, batches, tmp_path):
    class Kill:
        @hookimpl
        def before_step(self, run: Run):
            if run.step == 11:
                raise KeyboardInterrupt

    whole, model, rates = clone(plain), clone(plain), Rates()
    train, plugins = Claims(batches, 5), ["cosine:by=step", "checkpoint:every_steps=1"]
    fit(whole, cross_entropy, sgd, train, epochs=3, plugins=["cosine:by=step", rates])
    with pytest.raises(KeyboardInterrupt):
        fit(clone(plain), cross_entropy, sgd, train, epochs=3, plugins=[*plugins, Kill()], out=tmp_path)
    resumed = Rates()
    fit(model, cross_entropy, sgd, train, epochs=3, plugins=[*plugins, resumed], out=tmp_path, resume=tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), model.parameters(), strict=True))
    assert resumed.rates == rates.rates[11:]


class Stops(Dataset):
    """Raises StopIteration for its 20th sample."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 20:
            raise StopIteration
        return torch.ones(6), index % 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("part", ["train", "valid"])
@pytest.mark.fault(row="H2", given="StopIteration raised inside a data set, with and without workers", right="an error that names the part and the batch")
def test_a_stop_iteration_within_a_data_set_is_an_error(plain, batches, workers, part):
    data = {"train": batches, "valid": batches} | {part: DataLoader(Stops(), 8, num_workers=workers)}
    with pytest.raises(RuntimeError, match="raised StopIteration, which would end the epoch here") as error:
        fit(plain, cross_entropy, sgd, **data)
    assert f"raised by {part} in batch 3" in error.value.__notes__[0]


# Further inputs


@pytest.mark.fault(row="H", given="a collate function that raises StopIteration", right="an error")
def test_a_stop_iteration_within_a_collate_function_is_an_error(plain):
    def collate(samples):
        return next(iter([]))

    with pytest.raises(RuntimeError, match="the data set or the collate function raised StopIteration"):
        fit(plain, cross_entropy, sgd, DataLoader(TensorDataset(torch.ones(8, 6)), 4, collate_fn=collate))


class Shorter(IterableDataset):
    def __iter__(self):
        return iter([(torch.ones(6), 1)] * 20)

    def __len__(self):
        return 40


@pytest.mark.fault(row="H", given="an IterableDataset shorter than its length", right="the epoch is what was given")
def test_an_iterable_data_set_shorter_than_its_length(plain, caplog):
    run = fit(plain, cross_entropy, sgd, DataLoader(Shorter(), 5), epochs=2)
    assert run.step == 8
    assert "train gave 4 batches in epoch 1, but its length is 8" in caplog.text


@pytest.mark.fault(row="H", given="an epoch that max_steps or a plugin cuts short", right="no word, for its length is not known")
def test_an_epoch_that_is_cut_short_is_not_compared(plain, batches, caplog):
    fit(plain, cross_entropy, sgd, batches, epochs=3, max_steps=11)
    fit(plain, cross_entropy, sgd, batches, epochs=3, steps_per_epoch=3)
    assert not caplog.records


@pytest.mark.fault(row="H", given="a loader with in_order=False and workers, killed and resumed", right="its batches come in order, which is said, so that it resumes exactly")
def test_batches_come_in_order_where_a_run_can_be_resumed(plain, clone, tmp_path, caplog):
    data = TensorDataset(torch.randn(40, 6, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3)
    def loader(in_order):
        return DataLoader(data, 8, shuffle=True, num_workers=2, in_order=in_order)

    models = clone(plain), clone(plain)
    for model, in_order in zip(models, (True, False), strict=True):
        fit(model, cross_entropy, sgd, loader(in_order), plugins=["checkpoint"], out=tmp_path / str(in_order), seed=0)
    assert all(torch.equal(one, other) for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert "train has in_order=False, which a run that can be resumed exactly does not use" in caplog.text


@pytest.mark.fault(row="I6", given="eval_every=1 in an epoch of several steps", right="a row in the history and in metrics.csv for each evaluation")
def test_each_evaluation_has_a_row(plain, batches, valid, tmp_path):
    run = fit(plain, cross_entropy, sgd, batches[:4], valid, epochs=2, eval_every=1, plugins=["csv"], out=tmp_path)
    assert [(row["epoch"], row["step"]) for row in run.history] == [
        (0.25, 1), (0.5, 2), (0.75, 3), (1, 4), (1.25, 5), (1.5, 6), (1.75, 7), (2, 8)]
    assert len({row["val_loss"] for row in run.history}) == 8
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 9


@pytest.mark.fault(row="I", given="eval_every=3, killed and resumed", right="the same rows")
def test_rows_of_evaluations_are_resumed(plain, clone, batches, valid, tmp_path):
    class Kill:
        @hookimpl
        def before_step(self, run: Run):
            if run.step == 7:
                raise KeyboardInterrupt

    arguments = {"epochs": 2, "eval_every": 3, "out": tmp_path}
    whole = fit(clone(plain), cross_entropy, sgd, batches, valid, **arguments)
    with pytest.raises(KeyboardInterrupt):
        fit(clone(plain), cross_entropy, sgd, batches, valid, **arguments, plugins=["checkpoint:every_steps=1", Kill()])
    resumed = fit(clone(plain), cross_entropy, sgd, batches, valid, **arguments, plugins=["checkpoint:every_steps=1"], resume=tmp_path)
    assert resumed.history == whole.history
    assert [row["step"] for row in whole.history] == [3, 6, 8, 9, 12, 15, 16]


class Drawing(Dataset):
    """Draws random numbers for each sample, and counts how many it has given."""

    given = 0

    def __len__(self):
        return 38

    def __getitem__(self, index):
        self.given += 1
        return torch.randn(6) + index, index % 3


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.fault(row="H5", given="accumulate, with data and dropout that draw random numbers", right="one batch is read at a time: the loop by hand, to the bit")
def test_accumulation_reads_one_batch_at_a_time(net, clone, drop_last):
    def loader():
        return DataLoader(Drawing(), 4, shuffle=True, drop_last=drop_last)

    by_hand, model = clone(net), clone(net)
    optimizer, batches = sgd(by_hand.parameters()), loader()
    sizes = [4] * 9 + [2] * (not drop_last)
    torch.manual_seed(0)
    for _ in range(2):
        for number, (input, target) in enumerate(batches):
            group = number // 4 * 4
            if number == group:
                optimizer.zero_grad()
            (cross_entropy(by_hand(input), target) * (len(input) / sum(sizes[group:group + 4]))).backward()
            if number % 4 == 3 or number == len(sizes) - 1:
                optimizer.step()
    given = []

    class Given:
        @hookimpl
        def before_step(self, run: Run):
            given.append(run.train.dataset.given)

    fit(model, cross_entropy, sgd, loader(), epochs=2, plugins=["accumulate:every=4", Given()], seed=0)
    assert all(torch.equal(one, other) for one, other in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True))
    assert given[:3] == [0, 16, 32]


@pytest.mark.parametrize("plugin", ["sam", "split:into=2", "clip"])
@pytest.mark.fault(row="H", given="accumulate with plugins that use the batches of a step again", right="the batches of the step")
def test_batches_that_are_read_one_at_a_time_can_be_used_again(plain, clone, plugin):
    data = TensorDataset(torch.randn(38, 6, generator=torch.Generator().manual_seed(0)), torch.arange(38) % 3)
    one_at_a_time, in_advance = clone(plain), clone(plain)
    fit(one_at_a_time, cross_entropy, sgd, DataLoader(data, 4), epochs=2, plugins=["accumulate:every=4", plugin])
    fit(in_advance, cross_entropy, sgd, list(DataLoader(data, 4)), epochs=2, plugins=["accumulate:every=4", plugin])
    assert all(torch.equal(one, other) for one, other in zip(one_at_a_time.parameters(), in_advance.parameters(), strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.fault(row="H", given="accumulate, killed in an epoch or at its end and resumed, with data that draws random numbers", right="the weights of a run that was not killed")
def test_batches_that_are_read_one_at_a_time_are_resumed(net, clone, tmp_path, step, workers):
    class Kill:
        @hookimpl(trylast=True)
        def safe_point(self, run: Run):
            if run.step == step:            # the third step is the last of its epoch, which is not counted yet
                raise KeyboardInterrupt

    arguments = {"epochs": 2, "seed": 0}
    whole, model, plugins = clone(net), clone(net), ["accumulate:every=4", "checkpoint:every_steps=1"]
    fit(whole, cross_entropy, sgd, DataLoader(Drawing(), 4, shuffle=True, num_workers=workers), plugins=plugins[:1], **arguments)
    arguments["out"] = tmp_path
    with pytest.raises(KeyboardInterrupt):
        fit(clone(net), cross_entropy, sgd, DataLoader(Drawing(), 4, shuffle=True, num_workers=workers), plugins=[*plugins, Kill()], **arguments)
    fit(model, cross_entropy, sgd, DataLoader(Drawing(), 4, shuffle=True, num_workers=workers), plugins=plugins, **arguments, resume=tmp_path)
    assert all(torch.equal(one, other) for one, other in zip(whole.state_dict().values(), model.state_dict().values(), strict=True))
