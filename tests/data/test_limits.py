"""`limited` and `overfit`: the first batches of a pass, alone, in a run that is resumed, and shared by processes."""
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint.finding import find_checkpoint
from loopctl.data.limits import find_limit, limited, overfit
from loopctl.data.sharding import shard_data

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
LOSS = nn.CrossEntropyLoss()
INPUTS, TARGETS = torch.randn(80, 6, generator=torch.Generator().manual_seed(1)), torch.arange(80) % 3


class Stream(IterableDataset):
    """Shuffled samples in a new order in each pass, without a length."""

    def __iter__(self):
        return iter([(INPUTS[index], TARGETS[index]) for index in torch.randperm(80)])


def loader(**settings):
    return DataLoader(TensorDataset(INPUTS, TARGETS), 8, **{"shuffle": True} | settings)


def listed():
    return list(zip(INPUTS.split(8), TARGETS.split(8), strict=True))


SOURCES = {"loader": loader, "loader with workers": partial(loader, num_workers=1), "list": listed,
           "stream": lambda: DataLoader(Stream(), 8), "own generator": lambda: loader(generator=torch.Generator().manual_seed(5))}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))


def passed(data):
    """The batches of a pass over `data`, as one seed gives them."""
    torch.manual_seed(3)
    return [input.tolist() for input, _ in data]


@pytest.mark.parametrize("source", SOURCES)
def test_they_are_the_first_batches_of_a_full_pass(source):
    full = passed(SOURCES[source]())
    assert len(full) == 10
    for number in (1, 4, 10, 11):
        data = limited(SOURCES[source](), number)
        assert passed(data) == full[:number]
        assert len(data) == (number if source == "stream" else min(10, number))


def test_the_loader_itself_is_not_changed():
    data = loader()
    few = limited(data, 2)
    assert (len(few), len(data), len(passed(data))) == (2, 10, 10)
    assert (few.batch_size, few.dataset) == (8, data.dataset)


@pytest.mark.parametrize(("limit", "number"), [("1%", 1), ("29%", 2), ("30%", 3), ("99.9%", 9), ("100%", 10), ("3", 3), (3, 3)])
def test_a_percentage_is_rounded_down_to_at_least_one(limit, number):
    assert len(limited(loader(), limit)) == len(limited(listed(), limit)) == number


@pytest.mark.parametrize("limit", [0, -1, "0%", "101%", "", "x", "1.5", 2.5, "1e3", True, None, "\u0663", "5 %"])
def test_other_limits_are_refused(limit):
    with pytest.raises(UsageError, match="^a limit is a number of batches, at least 1, or a percentage of them, such as 10%, not "):
        limited(listed(), limit)


def test_a_percentage_of_an_unknown_length_is_refused():
    with pytest.raises(UsageError, match="^limit 10%: the length of the data is unknown; pass a number of batches$"):
        limited(DataLoader(Stream(), 8), "10%")


def test_an_iterator_is_refused():
    with pytest.raises(UsageError, match="^limited: the data is a list_iterator, which can be read once only; pass a DataLoader or a list"):
        limited(iter(listed()), 2)


def test_training_equals_a_plain_loop_over_the_first_batches(same):
    model, other = network(), network()
    run = fit(model, LOSS, SGD, limited(loader(), 4), limited(listed(), 2), epochs=3, plugins=["linear:by=step,end_factor=0,total_iters=none"], seed=7)
    torch.manual_seed(7)
    optimizer, data = SGD(other.parameters()), loader()
    for step in range(12):
        if step % 4 == 0:
            batches = iter(data)
        input, target = next(batches)
        optimizer.param_groups[0]["lr"] = 0.1 * (1 / 3 + (0 - 1 / 3) * (step / 12))       # planned with the limited length
        optimizer.zero_grad()
        LOSS(other(input), target).backward()
        optimizer.step()
    same(model, other)
    model.eval()
    with torch.no_grad():
        losses = [LOSS(model(input), target).item() for input, target in listed()[:2]]
    assert run.history[-1]["val_loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("time", ["2s", "5s", "8s"])
def test_a_limited_run_that_is_left_resumes_to_the_same_bits(source, time, tmp_path, same, monkeypatch):
    def train(out, *plugins, **settings):
        model = network()
        run = fit(model, LOSS, SGD, limited(SOURCES[source](), 4), limited(loader(), "30%"), epochs=3, seed=1, out=out,
                  plugins=["checkpoint", *plugins], **settings)
        return model, run

    whole, _ = train(tmp_path / "whole")
    _, left = train(tmp_path / "a", LeaveAt(int(time[0])))
    assert left.attempts == int(time[0])
    done, run = train(tmp_path / "a", resume=tmp_path / "a")
    assert (run.epoch, run.step) == (3, 12)
    same(done, whole)


class LeaveAt:
    """Leaves the run after a step."""

    observer_only = True

    def __init__(self, step):
        self.step = step

    @hookimpl
    def after_step(self, run: Run):
        if run.attempts == self.step:
            run.leave = "a test"


@pytest.mark.parametrize(("train", "valid", "message"), [
    (5, 3, "an epoch has 4 steps of 4 batches in the checkpoint and 5 steps of 5 batches"),
    ("40%", 3, "the training data is limited to 4 in the checkpoint and limited to 40% in this run"),
    (4, 2, "the validation data is limited to 3 in the checkpoint and limited to 2 in this run"),
    (4, None, "the validation data is limited to 3 in the checkpoint and not limited in this run")])
def test_a_run_is_not_resumed_with_another_limit(train, valid, message, tmp_path):
    def start(train, valid, **settings):
        fit(network(), LOSS, SGD, limited(listed(), train), limited(listed(), valid) if valid else listed(), out=tmp_path,
            plugins=["checkpoint"], **settings)

    start(4, 3)
    assert find_checkpoint(tmp_path)[1]["data"]["train"]["limit"] == "4"
    with pytest.raises(UsageError, match=message):
        start(train, valid, epochs=2, resume=tmp_path)


class Seen:
    """Records the first feature of the samples, in training and in evaluation."""

    def __init__(self):
        self.train, self.valid = [], []

    @hookimpl
    def compute_loss(self, run: Run, batch):
        (self.train if torch.is_grad_enabled() else self.valid).append(batch[0][:, 0].tolist())
        return LOSS(run.network(batch[0]), batch[1])


@pytest.mark.parametrize("source", ["loader", "loader with workers", "list"])
def test_overfit_gives_the_same_batches_in_each_epoch_and_in_order(source):
    data, seen = overfit(SOURCES[source](), 2), Seen()
    fit(network(), LOSS, SGD, data, data, epochs=3, plugins=[seen], seed=0)
    first = [INPUTS[:8, 0].tolist(), INPUTS[8:16, 0].tolist()]
    assert seen.train == first * 3
    assert seen.valid[-6:] == first * 3


def test_overfit_refuses_a_batch_sampler_of_the_users_own():
    class Own(BatchSampler):
        pass

    data = loader()
    with pytest.raises(UsageError, match="^overfit: the loader has a batch sampler of its own, Own, whose order is unknown; pass a DataLoader"):
        overfit(DataLoader(data.dataset, batch_sampler=Own(data.sampler, 8, False)), 2)


@pytest.mark.parametrize("source", ["loader", "list"])
def test_a_number_counts_for_each_of_several_processes(source):
    for rank in range(3):
        data, shard = shard_data(limited(SOURCES[source](), 2), rank, 3, seed=3)
        assert len(data) == 2
        assert find_limit(data).limit == 2
        shard.start_pass(0, 0)
        assert passed(data) == passed(shard_data(SOURCES[source](), rank, 3, seed=3)[0])[:2]
        assert not any(shard.is_filler(index) for index in range(2))
    assert len(shard_data(limited(SOURCES[source](), "50%"), 0, 3, seed=3)[0]) == 2      # of the five in all, with a filler
    assert len(shard_data(limited(SOURCES[source](), 9), 0, 3, seed=3)[0]) == 4          # all ten


def test_a_last_batch_of_one_sample_is_not_refused_where_the_limit_leaves_it_out(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from loopctl.cli import main
    monkeypatch.chdir(tmp_path)
    (tmp_path / "norm.py").write_text("from torch import nn\ndef model(num_classes):\n"
                                      "    return nn.Sequential(nn.Flatten(), nn.Linear(192, num_classes), nn.BatchNorm1d(num_classes))\n")
    command = ["run", "--data", "fake:size=33,image=8", "--model", "norm.py:model", "--batch-size", "8", "--epochs", "1"]
    assert "the last batch of an epoch has 1 sample" in CliRunner().invoke(main, command).output
    assert CliRunner().invoke(main, [*command, "--limit-train", "4"]).exit_code == 0
    assert "the last batch of an epoch has 1 sample" in CliRunner().invoke(main, [*command, "--limit-train", "5"]).output
