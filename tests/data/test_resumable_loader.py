"""Resuming in the middle of an epoch, with every kind of data loader."""
import multiprocessing
import random
from contextlib import suppress
from functools import partial
from math import inf

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

from loopctl import Run, fit, hookimpl
from loopctl.data.batch import length_or_none

cross_entropy = nn.CrossEntropyLoss()
adam = partial(torch.optim.Adam, lr=1e-2)
generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(45, 6, generator=generator), torch.randint(0, 3, (45,), generator=generator)


def noisy(index):
    return X[index] + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * np.random.rand(), Y[index]


class Noisy(Dataset):
    """Samples with noise from the random numbers of Python, NumPy and torch. `reads` counts the samples read."""

    def __init__(self):
        self.reads = 0

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        self.reads += 1
        return noisy(index)


class Stream(IterableDataset):
    def __iter__(self):
        return map(noisy, range(45))


class Shuffled:
    """An iterable that is not a DataLoader: it shuffles in every pass and adds noise."""

    def __len__(self):
        return 6

    def __iter__(self):
        order = torch.randperm(45)
        return ((X[part] + torch.randn(len(part), 6), Y[part]) for part in order.split(8))


class ByEpoch:
    """A sampler with `set_epoch`, like torch's DistributedSampler. It keeps the epochs that were set."""

    def __init__(self):
        self.epoch, self.epochs = 0, []

    def __len__(self):
        return 45

    def __iter__(self):
        return iter(torch.randperm(45, generator=torch.Generator().manual_seed(self.epoch)).tolist())

    def set_epoch(self, epoch):
        self.epoch = epoch
        self.epochs.append(epoch)


def seeded():
    return torch.Generator().manual_seed(5)


LOADERS = {
    "list": lambda: [(X[i:i + 8], Y[i:i + 8]) for i in range(0, 45, 8)],
    "iterable": Shuffled,
    "shuffled": lambda: DataLoader(Noisy(), 8, shuffle=True),
    "with a generator": lambda: DataLoader(Noisy(), 8, shuffle=True, generator=seeded()),
    "with replacement": lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(range(45), True, 40), 7, False)),
    "sampler with a generator": lambda: DataLoader(Noisy(), 8, sampler=RandomSampler(range(45), generator=seeded())),
    "set_epoch": lambda: DataLoader(Noisy(), 8, sampler=ByEpoch()),
    "no batch size": lambda: DataLoader(TensorDataset(X.view(9, 5, 6), Y.view(9, 5)), None, shuffle=True),
    "stream": lambda: DataLoader(Stream(), 8),
    "workers": lambda: DataLoader(Noisy(), 8, shuffle=True, num_workers=2),
    "workers, with a generator": lambda: DataLoader(Noisy(), 8, shuffle=True, num_workers=2, generator=seeded()),
    "workers, no batch size": lambda: DataLoader(TensorDataset(X.view(9, 5, 6), Y.view(9, 5)), None, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(Noisy(), 8, shuffle=True, num_workers=2, persistent_workers=True),
    "stream, workers": lambda: DataLoader(Stream(), 8, num_workers=2),
}


class Kill:
    def __init__(self, at):
        self.at = at

    @hookimpl
    def safe_point(self, run: Run):
        if run.attempts >= self.at:
            raise KeyboardInterrupt


def train(net, make, out, kill=None, resume=False, **more):
    """Train `net` on the loader that `make` returns, until step `kill`. Start each run with other random numbers."""
    torch.manual_seed(3)                          # the same for each loader, which may draw a seed when it is made
    data, valid = make(), make()
    torch.manual_seed(kill or 0)
    random.seed(kill)
    settings = {"epochs": 3, "eval_every": 2, "seed": 1, "steps_per_epoch": 3 if length_or_none(data) is None else None,
                "metrics": {"accuracy": lambda output, target: (output.argmax(1) == target).float().mean()}} | more
    plugins = ["amp:dtype=float16", "accumulate:every=2", "ema:decay=0.9", "checkpoint:every_steps=1", Kill(kill or inf)]
    try:
        with suppress(KeyboardInterrupt):
            return fit(net, cross_entropy, adam, data, valid, out=out, resume=out if resume else None, plugins=plugins, **settings)
    finally:
        # A loader with a state of its own keeps its iterator and workers. If the garbage collector ended them, it would
        # wait five seconds for each, in some later test.
        for loader in (data, valid):
            if hasattr(loader, "load_state_dict"):
                loader.load_state_dict({})


def check(net, clone, same, out, make, kills):
    """Train once without interruption, and once killed after the steps `kills` and resumed; compare the two runs."""
    expected_net = clone(net)
    uninterrupted = train(expected_net, make, out / "whole")
    for number, kill in enumerate((*kills, None)):
        resumed_net = clone(net)
        resumed = train(resumed_net, make, out / "killed", kill, resume=number > 0)
    same(expected_net, resumed_net)
    assert repr(resumed.history) == repr(uninterrupted.history)
    assert uninterrupted.attempts == resumed.attempts >= 9


@pytest.mark.parametrize("kind", LOADERS)
def test_a_resumed_run_equals_an_uninterrupted_one(net, clone, same, tmp_path, kind):
    """It has the same batches in the same order, with the same noise. Killed early in an epoch, and after its last step."""
    check(net, clone, same, tmp_path, LOADERS[kind], (1, 3, 5))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_data_loader_resumes_by_itself(net, clone, same, tmp_path, workers):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    check(net, clone, same, tmp_path, lambda: loader(TensorDataset(X, Y), 8, shuffle=True, num_workers=workers), (1, 3, 4))


def test_a_loaded_state_is_returned_until_the_next_pass(net, batches, sgd):
    """A resumed run may be saved again before its first pass over the validation data."""
    class LoadsState:
        @hookimpl
        def safe_point(self, run: Run):
            before = run.loaders["valid"].state_dict()
            run.loaders["valid"].load_state_dict(before | {"workers": {0: "somewhere"}})
            assert run.loaders["valid"].state_dict() == before | {"workers": {0: "somewhere"}}
            run.loaders["valid"].load_state_dict({})

    fit(net, nn.CrossEntropyLoss(), sgd, batches, batches, plugins=[LoadsState()])


def test_consumed_samples_are_not_read_again(net, clone, tmp_path):
    train(clone(net), lambda: DataLoader(Noisy(), 8, shuffle=True), tmp_path, kill=2)
    loaders = []
    train(net, lambda: loaders.append(DataLoader(Noisy(), 8, shuffle=True)) or loaders[-1], tmp_path, resume=True, eval_every=None)
    assert loaders[0].dataset.reads == 45 - 4 * 8 + 2 * 45


def test_set_epoch_of_a_sampler_is_called_in_each_epoch(net, tmp_path):
    sampler = ByEpoch()
    fit(net, cross_entropy, adam, DataLoader(Noisy(), 8, sampler=sampler), epochs=3)
    assert sampler.epochs == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_does_not_change_the_users_loader(net, tmp_path, workers):
    loader = DataLoader(Noisy(), 8, shuffle=True, num_workers=workers)
    before = dict(vars(loader))
    fit(net, cross_entropy, adam, loader, plugins=["checkpoint:every_steps=1"], out=tmp_path)
    assert vars(loader) == before


class Broken(Noisy):
    def __getitem__(self, index):
        if index == 19:
            raise ValueError("image 19 is damaged")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_data_names_the_batch_and_ends_the_workers(net, batches, tmp_path, workers):
    before, loader = multiprocessing.active_children(), DataLoader(Broken(), 8, num_workers=workers)
    with pytest.raises(ValueError, match="image 19 is damaged") as caught:
        fit(net, cross_entropy, adam, loader)
    assert caught.value.__notes__ == ["raised by train in batch 3, epoch 1"]
    with pytest.raises(ValueError, match="image 19 is damaged") as caught:
        fit(net, cross_entropy, adam, batches, loader)
    assert caught.value.__notes__ == ["raised by valid in batch 3"]
    assert set(multiprocessing.active_children()) <= set(before)        # although the traceback still exists


@pytest.mark.parametrize("workers", [0, 2])
def test_a_plugin_may_replace_the_data(net, clone, same, tmp_path, workers):
    """As with image sizes that grow during training. The run is resumed in an epoch that has replaced data."""
    class ReplacesData:
        @hookimpl
        def epoch_start(self, run: Run):
            run.train = DataLoader(Noisy(), 15 - run.epoch, shuffle=True, num_workers=workers)

    def train(net, kill=inf, resume=None):
        with suppress(KeyboardInterrupt):
            loader = DataLoader(Noisy(), 15, shuffle=True)
            return fit(net, cross_entropy, adam, loader, epochs=3, seed=1, resume=resume, out=tmp_path / ("whole" if kill == inf and not resume else "killed"),
                       plugins=[ReplacesData(), "checkpoint:every_steps=1", Kill(kill)])

    whole, killed = clone(net), clone(net)
    train(whole)
    train(clone(net), 5)
    assert train(killed, resume=tmp_path / "killed").step == 3 + 4 + 4
    same(whole, killed)


def test_an_exception_in_training_ends_the_workers(net, tmp_path):
    """They end at once, although the traceback still holds references to the loader."""
    before = set(multiprocessing.active_children())

    class Fail:
        @hookimpl
        def before_step(self):
            self.workers = set(multiprocessing.active_children()) - before
            raise RuntimeError

    fail = Fail()
    with pytest.raises(RuntimeError):
        fit(net, cross_entropy, adam, DataLoader(Noisy(), 4, num_workers=2), plugins=["checkpoint", fail], out=tmp_path)
    assert len(fail.workers) == 2
    assert not any(worker.is_alive() for worker in fail.workers)
