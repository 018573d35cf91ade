"""Data-parallel training in several processes, with ddp, with fsdp, and with the other plugins."""
import os
import signal
from collections import Counter
from contextlib import contextmanager
from functools import partial
from itertools import chain
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, TensorDataset

from loopctl import Run, UsageError, available, fit, hookimpl
from loopctl.data.limits import limited
from loopctl.distributed import process_group
from loopctl.distributed.process_group import claim_error_report

LOSS = nn.CrossEntropyLoss()
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)).double()


def noisy():
    """A network with buffers and random numbers, which a wrong loop would change."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)).double()


def batches(*sizes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 6, generator=random, dtype=torch.float64), torch.randint(0, 3, (size,), generator=random))
            for size in sizes]


UNEVEN = [8, 8, 8, 3, 8, 8, 5]


def numbered(samples, batch_size=4, **settings):
    """A loader of samples whose first feature is their number."""
    random = torch.Generator().manual_seed(3)
    input = torch.randn(samples, 6, generator=random, dtype=torch.float64)
    input[:, 0] = torch.arange(samples)
    return DataLoader(TensorDataset(input, torch.randint(0, 3, (samples,), generator=random)), batch_size, **settings)


class Recorder:
    """Records the numbers of the samples in each epoch, and the loss and the learning rate of each step."""

    def __init__(self):
        self.samples, self.losses, self.rates = {}, [], []

    @hookimpl
    def before_step(self, run: Run):
        weights = [run.hook.batch_weight(run=run, batch=batch) for batch in run.batches]
        for (input, _), weight in zip(run.batches, weights, strict=True):
            if weight:
                self.samples.setdefault(run.epoch, []).extend(input[:, 0].int().tolist())

    @hookimpl
    def after_step(self, run: Run):
        self.losses.append(run.loss.item())
        self.rates.append(run.optimizer.param_groups[0]["lr"])


def weights_of(run):
    """Return the state dict of the model, with full tensors in place of sharded ones."""
    return {name: getattr(value, "full_tensor", value.clone)() for name, value in run.model.state_dict().items()}


def same(weights, expected, tolerance=0.0):
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# Bugs that other training loops have had; each test names their reports


class Tokens:
    """Weighs a batch by a value that is not its number of samples, as a number of tokens would be."""

    @hookimpl
    def batch_weight(self, batch):
        return batch[0][:, 0].abs().sum()


def train_weighted(tokens, sizes, plugins):
    run = fit(network(), LOSS, SGD, batches(*sizes), plugins=["ddp", *plugins, *[Tokens()] * tokens], seed=0, epochs=3)
    return weights_of(run), run.history


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("tokens", [0, 1], ids=["samples", "tokens"])
def test_uneven_batches_are_weighted_once_over_all_processes(ranks, number, tokens):
    """huggingface/transformers#35203, huggingface/transformers#34373"""
    net = network()
    optimizer = SGD(net.parameters())
    data = batches(*UNEVEN)
    for _ in range(3):
        for start in range(0, len(data), number):
            group = data[start:start + number]
            counts = [input[:, 0].abs().sum() if tokens else len(input) for input, _ in group]
            optimizer.zero_grad()
            for (input, target), count in zip(group, counts, strict=True):
                (LOSS(net(input), target) * count / sum(counts)).backward()
            optimizer.step()
    for weights, _ in ranks(number, train_weighted, tokens, UNEVEN, []):
        same(weights, net.state_dict(), 1e-12)


class SyncFlags:
    """Records at each forward and each backward pass whether DistributedDataParallel would reduce gradients."""

    def __init__(self):
        self.in_forward, self.in_backward = [], []

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        if torch.is_grad_enabled():
            self.in_forward.append(run.network.require_backward_grad_sync)
        return (yield)

    @hookimpl(wrapper=True)
    def backward(self, run: Run):
        self.in_backward.append(run.network.require_backward_grad_sync)
        return (yield)


class ShardedGradients:
    """Records after each backward pass whether gradients were reduced: only then fsdp sets the sharded ones."""

    def __init__(self):
        self.reduced = []

    @hookimpl(wrapper=True)
    def backward(self, run: Run):
        result = yield
        self.reduced.append(all(parameter.grad is not None for parameter in run.model.parameters()))
        return result


def record_sharded_gradients(plugins, sizes):
    recorder = ShardedGradients()
    fit(network(), LOSS, SGD, batches(*sizes), plugins=["fsdp", *plugins, recorder], seed=0)
    return recorder.reduced


def record_flags(plugins, sizes):
    flags = SyncFlags()
    run = fit(network(), LOSS, SGD, batches(*sizes), batches(4, 4), plugins=["ddp", *plugins, flags], seed=0)
    return flags.in_forward, flags.in_backward, weights_of(run)


LAST = pytest.mark.parametrize(("plugins", "expected"), [
    (["accumulate:every=3"], [False, False, True, True]),               # four micro-batches: a step of three, one of one
    (["split:into=2"], [False, True] * 4),
    (["accumulate:every=2", "split:into=2"], [False, False, False, True] * 2),
], ids=["accumulate", "split", "both"])


@LAST
def test_ddp_reduces_gradients_only_in_the_last_micro_batch(ranks, plugins, expected):
    """modelscope/FunASR#3472, karpathy/build-nanogpt#30, huggingface/transformers#7742"""
    found = ranks(2, record_flags, plugins, [8] * 8)
    for forward, backward, weights in found:
        assert forward == backward == expected
        same(weights, found[0][2])


@LAST
def test_fsdp_reduces_gradients_only_in_the_last_micro_batch(ranks, plugins, expected):
    assert ranks(2, record_sharded_gradients, plugins, [8] * 8) == [expected, expected]


def train_scheduled(plugins):
    recorder = Recorder()
    run = fit(network(), LOSS, SGD, batches(*UNEVEN), plugins=["ddp", *plugins, recorder], seed=0, epochs=4)
    return recorder.rates, run.step, run.attempts


def test_a_schedule_advances_once_per_update_with_several_processes(ranks):
    """huggingface/transformers#24088, huggingface/accelerate#2318"""
    optimizer = SGD(network().parameters())
    torch_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
    expected = []
    for _ in range(16):                             # four epochs; seven batches are four steps of two processes
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torch_schedule.step()
    for rates, step, attempts in ranks(2, train_scheduled, ["cosine:by=step"]):
        assert rates == pytest.approx(expected, abs=1e-12)
        assert step == attempts == 16


class StopsInOneProcess:
    """Sets `run.stop` in one process, in one hook, from step `at` on."""

    def __init__(self, rank, hook, at):
        self.rank, self.hook, self.at = rank, hook, at

    def stop(self, run, hook):
        if hook == self.hook and run.rank == self.rank and run.attempts >= self.at:
            run.stop = f"process {self.rank} stops"

    @hookimpl
    def after_step(self, run: Run):
        self.stop(run, "after_step")

    @hookimpl
    def epoch_end(self, run: Run):
        self.stop(run, "epoch_end")

    @hookimpl
    def safe_point(self, run: Run):
        self.stop(run, "safe_point")

    @hookimpl
    def after_evaluate(self, run: Run):
        self.stop(run, "after_evaluate")


def stop_in_one_process(rank, hook, out):
    run = fit(network(), LOSS, SGD, batches(*[8] * 20), batches(8, 8), epochs=400,
              plugins=["ddp", "checkpoint:every_epochs=3", StopsInOneProcess(rank, hook, 33)], seed=0, out=out)
    return run.attempts, run.stop, weights_of(run), len(run.history)


@pytest.mark.parametrize("hook", ["after_step", "epoch_end", "safe_point", "after_evaluate"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stop_in_one_process_ends_all_processes_at_the_same_step(ranks, tmp_path, rank, hook):
    """Lightning-AI/pytorch-lightning#379, talmolab/sleap-nn#471"""
    found = ranks(2, stop_in_one_process, rank, hook, tmp_path)
    assert found[0][:2] == found[1][:2]
    assert found[0][1] == f"process {rank} stops"
    assert 33 <= found[0][0] < 4000
    same(found[1][2], found[0][2])


def stop_in_a_long_epoch(rank):
    run = fit(network(), LOSS, SGD, batches(8) * 8000, plugins=["ddp", StopsInOneProcess(rank, "after_step", 33)], seed=0)
    return run.attempts


def test_a_stop_in_one_process_does_not_wait_for_the_end_of_the_epoch(ranks):
    first, second = ranks(2, stop_in_a_long_epoch, 1)
    assert first == second
    assert 33 <= first < 4000                   # about a second later


def train_with_decisions(out):
    """On its own part of the validation data, each process would have another loss, and stop at another epoch."""
    run = fit(network(), LOSS, SGD, batches(*UNEVEN), batches(8, 1, 8, 1, 5, seed=1), epochs=60, out=out,
              plugins=["ddp", "early_stopping:patience=1,restore_best=true", "plateau:patience=0", "checkpoint"], seed=0)
    return run.history, run.stop, weights_of(run)


def test_plugins_make_the_same_decisions_in_all_processes(ranks, tmp_path):
    found = ranks(2, train_with_decisions, tmp_path)
    assert found[0][:2] == found[1][:2]
    assert "has not improved" in found[0][1]
    same(found[1][2], found[0][2])


COLLECTIVES = ("all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list", "barrier")


@contextmanager
def count_collectives(count):
    """Count the collectives by name, without those in DistributedDataParallel's own C++ code."""
    with mock.patch.multiple(dist, **{name: counting(count, name) for name in COLLECTIVES}):
        yield


def counting(count, name):
    real = getattr(dist, name)

    def call(*arguments, **keywords):
        count[name] += 1
        return real(*arguments, **keywords)
    return call


class CollectiveCounter:
    """Records how often each collective is called in each step."""

    def __init__(self):
        self.count, self.steps = Counter(), []

    @hookimpl(wrapper=True)
    def train(self):
        with count_collectives(self.count):
            return (yield)

    @hookimpl
    def before_step(self):
        self.count.clear()

    @hookimpl
    def after_step(self):
        self.steps.append(dict(self.count))


def collectives_per_step(sizes, plugins):
    counter = CollectiveCounter()
    fit(network(), LOSS, SGD, batches(*sizes), plugins=[counter, "ddp", *plugins, "accumulate:every=2", "clip", "cosine"], seed=0)
    return counter.steps


@pytest.mark.parametrize("plugins", [[], ["split:into=2"]], ids=["", "split"])
def test_a_step_has_no_collective_but_the_reduction_of_gradients(ranks, plugins):
    """Lightning-AI/pytorch-lightning#21487: every process knows the sample counts of all without a collective."""
    for steps in ranks(2, collectives_per_step, [8] * 16 + [5], plugins):
        assert steps[:-1] == [{}] * 4
        assert steps[-1] == {"all_reduce": 1}               # the last step is uneven: its loss is averaged over the processes


# Data


def read_samples(loader, plugins, epochs, settings):
    recorder = Recorder()
    run = fit(network(), LOSS, SGD, loader() if callable(loader) else loader, plugins=["ddp", *plugins, recorder], seed=0, epochs=epochs, **settings)
    return recorder.samples, weights_of(run), run.epochs_done


LOADERS = {
    "in order": partial(numbered, 30), "shuffled": partial(numbered, 30, shuffle=True), "drop_last": partial(numbered, 30, shuffle=True, drop_last=True),
    "workers": partial(numbered, 30, shuffle=True, num_workers=2), "few": partial(numbered, 5, shuffle=True),
    "list": partial(list, numbered(30)),
}


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_sample_is_trained_on_once_per_epoch(ranks, loader, number):
    found = ranks(number, read_samples, LOADERS[loader], [], 3, {})
    total = {"drop_last": 28, "few": 5}.get(loader, 30)
    orders = []
    for epoch in range(3):
        parts = [samples.get(epoch, []) for samples, *_ in found]
        everything = sorted(chain.from_iterable(parts))
        assert len(everything) == len(set(everything)) == total
        orders.append(parts)
    assert (orders[0] != orders[1]) == (loader not in ("in order", "list"))         # reshuffled in each epoch
    assert all(done == 3 for *_, done in found)
    for _, weights, _ in found:
        same(weights, found[0][1])


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        for number in range(self.samples):
            yield torch.full((6,), float(number), dtype=torch.float64), number % 3


def streamed():
    return DataLoader(Stream(30), 4)


def test_an_iterable_dataset_is_sharded(ranks):
    found = ranks(2, read_samples, streamed, [], 2, {"steps_per_epoch": 4})
    for epoch in range(2):
        assert sorted(chain(*(samples[epoch] for samples, *_ in found))) == list(range(30))
    single = fit(network(), LOSS, SGD, streamed(), plugins=["accumulate:every=2"], seed=0, epochs=2, steps_per_epoch=4)
    for _, weights, _ in found:
        same(weights, weights_of(single), 1e-12)


def train_on_sharded_batches():
    dist.init_process_group("gloo")                     # the user's own process group, which the run uses
    data = batches(*UNEVEN[:6])[dist.get_rank()::dist.get_world_size()]
    run = fit(network(), LOSS, SGD, data, plugins=["ddp:shard=false"], seed=0, epochs=3)
    assert dist.is_initialized()
    return weights_of(run)


def test_data_that_the_user_has_sharded_is_weighted_the_same(ranks):
    single = fit(network(), LOSS, SGD, batches(*UNEVEN[:6]), plugins=["accumulate:every=2"], seed=0, epochs=3)
    for weights in ranks(2, train_on_sharded_batches):
        same(weights, weights_of(single), 1e-12)


def start_with_different_weights(spec, rank=None):
    model = noisy()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += int(os.environ["RANK"]) if rank is None else rank
    run = fit(model, LOSS, partial(torch.optim.SGD, lr=0.0), batches(8, 8), plugins=[spec], seed=0)
    return {name: value for name, value in weights_of(run).items() if "running" not in name}, run.history[0]["train_loss"]


@pytest.mark.parametrize("spec", ["ddp", "fsdp"])
def test_all_processes_start_with_the_weights_of_rank_0(ranks, spec):
    found, expected = ranks(2, start_with_different_weights, spec), ranks(2, start_with_different_weights, spec, 0)
    for (weights, loss), (expected_weights, expected_loss) in zip(found, expected, strict=True):
        same(weights, expected_weights)
        assert loss == expected_loss


def draw_after_training():
    fit(network(), LOSS, SGD, batches(8, 8), plugins=["ddp"], seed=0)
    return float(torch.rand(1))


def test_each_process_draws_other_random_numbers(ranks):
    assert len({*ranks(3, draw_after_training)}) == 3


def collectives_with_a_distributed_sampler(plugins):
    counter = CollectiveCounter()
    data = numbered(32).dataset
    loader = DataLoader(data, 4, sampler=DistributedSampler(data, 2, int(os.environ["RANK"])))
    run = fit(network(), LOSS, SGD, loader, plugins=[counter, "ddp", *plugins], seed=0)
    return counter.steps, weights_of(run)


def test_a_step_with_a_distributed_sampler_has_no_collective_but_the_reduction_of_gradients(ranks):
    for steps, weights in (found := ranks(2, collectives_with_a_distributed_sampler, [])):
        assert steps == [{}] * 4
        same(weights, found[0][1])


def train_with_metrics(number):
    from torchmetrics.classification import MulticlassAccuracy
    metric = MulticlassAccuracy(3, average="micro")
    run = fit(network(), LOSS, SGD, batches(*UNEVEN), batches(8, 1, 8, 1, 5, seed=1), metrics={"accuracy": accuracy, "torchmetrics": metric},
              plugins=[f"accumulate:every={number}" if number else "ddp"], seed=0)
    return run.history


def accuracy(output, target):
    return (output.argmax(1) == target).double().mean()


@pytest.mark.parametrize("number", [2, 3])
def test_metrics_count_every_sample_once(ranks, number):
    """Functions and torchmetrics objects, in training and validation; fillers count in neither."""
    expected = train_with_metrics(number)
    for history in ranks(number, train_with_metrics, 0):
        for row, expected_row in zip(history, expected, strict=True):
            assert row == pytest.approx(expected_row, abs=1e-6)     # torchmetrics counts in float32


def evaluate_on_a_loader(spec, workers):
    valid = numbered(18, num_workers=workers)                   # five batches, the last one of two samples
    return fit(network(), LOSS, SGD, batches(8, 8), valid, metrics={"accuracy": accuracy}, plugins=spec, seed=0, epochs=2).history


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("spec", ["ddp", "fsdp"])
def test_samples_of_a_validation_loader_are_counted_once(ranks, spec, workers):
    expected = evaluate_on_a_loader(["accumulate:every=2"], 0)
    for history in ranks(2, evaluate_on_a_loader, [spec], workers):
        for row, expected_row in zip(history, expected, strict=True):
            assert row == pytest.approx(expected_row, abs=1e-10)


# Resuming


class Kill:
    def __init__(self, at):
        self.at = at

    @hookimpl
    def safe_point(self, run: Run):
        if run.attempts == self.at:
            raise KeyboardInterrupt


def train_part(spec, make, loader, epochs, out, at=None, resume=None, plugins=()):
    """Train until the run is killed after step `at`, or to its end."""
    recorder = Recorder()
    arguments = {"plugins": [spec, *plugins, "checkpoint:every_steps=1", recorder, *([Kill(at)] if at else [])], "seed": 1, "epochs": epochs, "out": out}
    if at is None:
        run = fit(make(), LOSS, partial(torch.optim.AdamW, lr=0.01), loader(), batches(8, 5, seed=1), resume=resume, **arguments)
        return recorder.samples, recorder.losses, weights_of(run), run.history, run.planned_steps, run.epochs_done
    with pytest.raises(KeyboardInterrupt):
        fit(make(), LOSS, partial(torch.optim.AdamW, lr=0.01), loader(), batches(8, 5, seed=1), **arguments)
    return recorder.samples


SHUFFLED = partial(numbered, 30, shuffle=True)
WORKERS = partial(numbered, 30, shuffle=True, num_workers=2)


@pytest.mark.parametrize("loader", [SHUFFLED, WORKERS], ids=["loader", "workers"])
@pytest.mark.parametrize("at", [3, 4, 6])
@pytest.mark.parametrize("spec", ["ddp", "fsdp"])
def test_a_killed_and_resumed_run_is_bitwise_equal_to_an_uninterrupted_one(ranks, tmp_path, spec, at, loader):
    """Killed in the middle of an epoch and at its end. Each process resumes with its own random-number state."""
    whole = ranks(2, train_part, spec, noisy, loader, 3, tmp_path / "whole")
    ranks(2, train_part, spec, noisy, loader, 3, tmp_path / "killed", at)
    rest = ranks(2, train_part, spec, noisy, loader, 3, tmp_path / "killed", None, tmp_path / "killed")
    for (_, losses, weights, history, *_), (_, all_losses, expected, expected_history, *_) in zip(rest, whole, strict=True):
        assert losses == all_losses[at:]
        same(weights, expected)
        assert history == expected_history


@pytest.mark.parametrize("at", [4, 7])
def test_a_run_that_freezes_within_an_epoch_is_resumed_before_and_after_it(ranks, tmp_path, at):
    freeze = (f"freeze:patterns={next(noisy().named_parameters())[0]},start=6st",)
    whole = ranks(2, train_part, "ddp", noisy, SHUFFLED, 3, tmp_path / "whole", None, None, freeze)
    ranks(2, train_part, "ddp", noisy, SHUFFLED, 3, tmp_path / "killed", at, None, freeze)
    rest = ranks(2, train_part, "ddp", noisy, SHUFFLED, 3, tmp_path / "killed", None, tmp_path / "killed", freeze)
    for (_, losses, weights, history, *_), (_, all_losses, expected, expected_history, *_) in zip(rest, whole, strict=True):
        assert losses == all_losses[at:]
        same(weights, expected)
        assert history == expected_history


@pytest.mark.parametrize("spec", ["ddp:find_unused_parameters=true", "fsdp"])
def test_a_resumed_run_of_three_processes_is_bitwise_equal_if_gradients_are_summed_in_the_same_order(ranks, tmp_path, spec):
    whole = ranks(3, train_part, spec, noisy, SHUFFLED, 3, tmp_path / "whole")
    ranks(3, train_part, spec, noisy, SHUFFLED, 3, tmp_path / "killed", 4)
    rest = ranks(3, train_part, spec, noisy, SHUFFLED, 3, tmp_path / "killed", None, tmp_path / "killed")
    for (_, _, weights, *_), (_, _, expected, *_) in zip(rest, whole, strict=True):
        same(weights, expected)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 1), (3, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("at", [2, 6], ids=["within", "later"])
@pytest.mark.parametrize("spec", ["ddp", "fsdp"])
def test_a_run_resumes_with_another_number_of_processes(ranks, tmp_path, spec, before, after, at):
    """The epoch resumes with the first batch that no process has consumed: every sample is used once per epoch."""
    first = ranks(before, train_part, spec, network, SHUFFLED, 3, tmp_path, at)
    rest = ranks(after, train_part, spec, network, SHUFFLED, 3, tmp_path, None, tmp_path)
    for epoch in range(3):
        seen = [*chain.from_iterable(samples.get(epoch, []) for samples in first),
                *chain.from_iterable(samples.get(epoch, []) for samples, *_ in rest)]
        assert sorted(seen) == list(range(30))
    for _, losses, weights, history, planned, done in rest:
        same(weights, rest[0][2])
        assert [row["epoch"] for row in history] == [1, 2, 3]
        assert planned == at + len(losses)
        assert done == 3


def test_the_loss_of_an_epoch_is_the_mean_over_the_processes_before_and_after(ranks, tmp_path):
    """With a learning rate of 0 the weights do not change, so the mean must be that of a single process."""
    ranks(2, train_with_rate_0, tmp_path, 2, None)
    (history, *_) = ranks(3, train_with_rate_0, tmp_path, None, tmp_path)
    single = fit(network(), LOSS, partial(torch.optim.SGD, lr=0.0), numbered(30), seed=0)
    assert history[0]["train_loss"] == pytest.approx(single.history[0]["train_loss"], abs=1e-12)


def train_with_rate_0(out, at, resume):
    plugins = ["ddp", "checkpoint:every_steps=1", *([Kill(at)] if at else [])]
    try:
        return fit(network(), LOSS, partial(torch.optim.SGD, lr=0.0), numbered(30), plugins=plugins, seed=0, out=out, resume=resume).history
    except KeyboardInterrupt:
        return None


# Signals, and which process reports an error


def test_only_the_first_process_that_asks_reports_an_error_and_again_after_a_restart(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(process_group, "torchrun_store", lambda: store)
    monkeypatch.setattr(process_group, "sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert claim_error_report(wait=True)                     # no other process has asked
        assert not claim_error_report(wait=False)
        assert not claim_error_report(wait=True)


@pytest.mark.parametrize(("error", "raised"), [(dist.DistBackendError("gone"), SystemExit), (ValueError("its own"), ValueError)])
def test_a_signal_together_with_a_lost_peer_exits_with_the_signal(tmp_path, error, raised):
    """torchrun sends the signal when another process has failed, whose error is the one to report."""
    class LosesPeer:
        @hookimpl
        def after_step(self, run: Run):
            os.kill(os.getpid(), signal.SIGTERM)
            raise error

    with pytest.raises(raised) as caught:
        fit(network(), LOSS, SGD, batches(8, 8), plugins=["checkpoint", LosesPeer()], out=tmp_path)
    assert getattr(caught.value, "code", 143) == 143


@pytest.mark.parametrize(("rank", "reports"), [(0, True), (1, False)])
def test_rank_0_reports_an_error_if_torchrun_has_ended(monkeypatch, rank, reports):
    def refuse():
        raise dist.DistNetworkError("connection refused")
    monkeypatch.setattr(process_group, "torchrun_store", refuse)
    monkeypatch.setattr(process_group, "rank", lambda: rank)
    assert claim_error_report(wait=False) == reports


class Signals:
    """Sends SIGTERM to one process, in the steps `at`."""

    def __init__(self, rank, *at):
        self.rank, self.at = rank, at

    @hookimpl
    def after_step(self, run: Run):
        if run.rank == self.rank and run.attempts in self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def train_with_signals(rank, out, *more):
    try:
        fit(network(), LOSS, SGD, batches(*[8] * 20), epochs=500, seed=0, out=out,
            plugins=["ddp", "checkpoint:every_epochs=1000", Signals(rank, 35, *more), "progress", "csv"])
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_ends_all_at_the_same_step(ranks, tmp_path, rank):
    assert ranks(2, train_with_signals, rank, tmp_path) == [128 + signal.SIGTERM] * 2
    last = max((tmp_path / "checkpoints").glob("step-*.pt"))
    assert 35 <= int(last.stem.removeprefix("step-")) < 5000


def test_a_second_signal_passed_on_by_torchrun_does_not_prevent_the_checkpoint(ranks, tmp_path):
    assert ranks(2, train_with_signals, 1, tmp_path, 36) == [128 + signal.SIGTERM] * 2
    assert int(max((tmp_path / "checkpoints").glob("step-*.pt")).stem.removeprefix("step-")) >= 36


class LeavesInOneProcess:
    """Sets `run.leave` in one process, from step 23 on."""

    def __init__(self, rank):
        self.rank = rank

    @hookimpl
    def after_step(self, run: Run):
        if run.rank == self.rank and run.attempts >= 23:
            run.leave = f"process {self.rank} leaves"


def leave_and_resume(rank, out):
    settings = {"epochs": 6, "seed": 0, "out": out, "valid": batches(8, 5)}
    data = batches(*[8] * 20)
    left = fit(noisy(), LOSS, SGD, data, plugins=["ddp", "checkpoint:every_epochs=1000", LeavesInOneProcess(rank)], **settings)
    done = fit(noisy(), LOSS, SGD, data, plugins=["ddp", "checkpoint:every_epochs=1000"], resume=out, **settings)
    whole = fit(noisy(), LOSS, SGD, data, plugins=["ddp"], **settings)
    return (left.attempts, left.leaving, left.leave), weights_of(done), weights_of(whole), done.history == whole.history


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_leaves_takes_all_with_it_and_the_run_resumes_to_the_same_bits(ranks, tmp_path, rank):
    found = ranks(2, leave_and_resume, rank, tmp_path)
    assert found[0][0] == found[1][0]
    attempts, leaving, leave = found[0][0]
    assert 23 <= attempts <= 30             # the end of the epoch at the latest
    assert (leaving, leave) == (True, f"process {rank} leaves")
    assert found[0][3]
    assert found[1][3]
    same(found[0][1], found[0][2])
    same(found[1][1], found[0][2])


class PlansInOneProcess:
    """Asks for the plan of the run in one process only, as what only rank 0 prints may."""

    @hookimpl
    def epoch_start(self, run: Run):
        if run.rank == 0:
            run._plan = None
            run.plan()


class OwnSampler(BatchSampler):
    """Has the length of a BatchSampler, which is not known to be right."""


def train_limited(own):
    data = numbered(40, shuffle=True)
    if own:
        data = DataLoader(data.dataset, batch_sampler=OwnSampler(data.sampler, 4, False))
    recorder = Recorder()
    run = fit(network(), LOSS, SGD, limited(data, 3), limited(batches(*[8] * 9), 2), epochs=2, seed=0,
              plugins=["ddp", recorder, PlansInOneProcess()])
    return run.step, recorder.samples, weights_of(run)


@pytest.mark.parametrize("own", [False, True])
def test_each_process_has_as_many_batches_as_the_limit_says(ranks, own):
    found = ranks(2, train_limited, own)
    assert [steps for steps, *_ in found] == [6, 6]
    for epoch in (0, 1):
        samples = [sample for _, by_epoch, _ in found for sample in by_epoch[epoch]]
        assert len(samples) == len(set(samples)) == 24
    same(found[1][2], found[0][2])


def fail_to_write_on_rank_0(out):
    from loopctl.plugins import checkpoint
    rank, real = int(os.environ["RANK"]), checkpoint.save_checkpoint

    def fail(*arguments):
        raise OSError(28, "No space left on device")
    with mock.patch.object(checkpoint, "save_checkpoint", fail if rank == 0 else real):
        return fit(network(), LOSS, SGD, batches(8, 8), plugins=["ddp", "checkpoint"], seed=0, out=out).last_checkpoint


def test_a_checkpoint_that_rank_0_cannot_write_is_the_last_one_in_no_process(ranks, tmp_path):
    assert ranks(2, fail_to_write_on_rank_0, tmp_path) == [None, None]


def train_briefly_with_a_signal(out):
    try:
        fit(network(), LOSS, SGD, batches(*[8] * 8), epochs=8, seed=0, out=out, plugins=["ddp", "checkpoint", Signals(1, 6)])
    except SystemExit as end:
        return end.code


def test_processes_exchange_signals_at_the_end_of_an_epoch(ranks, tmp_path):
    """Otherwise they exchange once a second, and this run is over by then."""
    assert ranks(2, train_briefly_with_a_signal, tmp_path) == [128 + signal.SIGTERM] * 2
    assert max((tmp_path / "checkpoints").glob("step-*.pt")).stem == "step-00000008"


def train_with_output(out):
    import contextlib
    import io
    with contextlib.redirect_stdout(io.StringIO()) as text:
        run = fit(network(), LOSS, SGD, batches(*UNEVEN), batches(8, 5), seed=0, out=out,
                  plugins=["ddp", "progress", "summary", "csv", "report", "tensorboard", "profile:start=1,steps=1", "lr_finder:num_steps=4", "throughput"])
    return text.getvalue(), run.metrics


def test_only_rank_0_prints_and_writes(ranks, tmp_path):
    (first, metrics), (second, other_metrics) = ranks(2, train_with_output, tmp_path)
    assert "epoch 1/1" in first
    assert "parameters" in first.lower()
    assert second == ""
    assert metrics == other_metrics
    assert (tmp_path / "metrics.csv").exists()


def train_with_bad_input(rank, value, action):
    """Train on data where one process has a loss that is not finite, in the third step."""
    data = batches(*[8] * 8)
    data[4 + rank][0][:] = value
    run = fit(network(), LOSS, SGD, data, plugins=["ddp", f"nan_guard:action={action}"], seed=0)
    return run.step, run.attempts, run.stop, weights_of(run)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_nan_loss_in_one_process_is_undone_in_all_processes(ranks, rank, action):
    found = ranks(2, train_with_bad_input, rank, float("nan"), action)
    assert found[0][:3] == found[1][:3]
    assert found[0][0] == (2 if action == "stop" else 3)
    assert bool(found[0][2]) == (action == "stop")
    same(found[1][3], found[0][3])


def train_with_spike(rank, out):
    """Train on data where one process has a loss that is far above its mean, in the ninth step."""
    data = batches(*[8] * 24)
    data[16 + rank][0][:] *= 1000
    run = fit(nn.Linear(6, 3).double(), LOSS, SGD, data, plugins=["ddp", "spike:warmup=4"], seed=0, out=out)
    return run.step, run.attempts, run.hook.plugins["spike"].rows, weights_of(run)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_spike_in_one_process_is_undone_in_all_processes(ranks, rank, tmp_path):
    first, second = ranks(2, train_with_spike, rank, tmp_path)
    assert first[:3] == second[:3]
    assert first[:2] == (11, 12)
    assert [row["step"] for row in first[2]] == [9]
    assert (tmp_path / "spikes.csv").exists()
    same(second[3], first[3])


# Every plugin


REFUSED = {"cudagraph": "CUDA graphs need a GPU", "local_sgd": "choose one"}
PATTERN = torch.linspace(0.5, 1.5, 64).view(8, 8)           # makes an image of each input


def mean_of_images(module, arguments):
    return (arguments[0].mean((2, 3)),)


def train_with_plugin(spec, out):
    model, images = noisy().float(), spec[0].partition(":")[0] in ("cutmix", "progressive_resizing")
    if images:
        model.register_forward_pre_hook(mean_of_images)

    def data(*sizes, **options):
        return [(input.float()[..., None, None] * PATTERN if images else input.float(), target) for input, target in batches(*sizes, **options)]

    run = fit(model, LOSS, SGD, data(8, 8, 8, 8, 8, 8, 8), data(8, 5, 7, seed=1), plugins=["ddp", *spec], epochs=2, seed=0, out=out)
    return weights_of(run), [{key: value for key, value in row.items() if value == value} for row in run.history]


@pytest.mark.parametrize("name", sorted({*available()} - {"ddp", "fsdp"}))
def test_every_plugin_trains_with_ddp_and_the_weights_are_equal_in_all_processes(ranks, example, tmp_path, name):
    if name in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[name]):
            ranks(2, train_with_plugin, [example(name)], tmp_path)
        return
    found = ranks(2, train_with_plugin, [example(name)], tmp_path)
    same(found[1][0], found[0][0])
    assert found[0][1] == found[1][1]


# Refused configurations


def train_refused(case, out):
    plugins, settings = ["ddp"], {"device": "cpu"}
    optimizer = SGD
    if case == "no plugin":
        plugins = []
    elif case == "both":
        plugins = ["ddp", "fsdp"]
    elif case == "sync_batchnorm":
        plugins = ["ddp:sync_batchnorm=true"]
    elif case == "auto":
        plugins = ["ddp", "split:into=auto"]
    elif case == "cut":
        plugins = ["ddp", "split:into=9"]
    elif case == "offload":
        plugins = ["fsdp:offload=true"]
    elif case == "for a while":
        plugins = ["fsdp", "freeze:patterns=0,until=50%"]
    elif case == "later on":
        plugins = ["fsdp", "freeze:patterns=0,start=50%"]
    elif case == "copy":
        plugins = ["fsdp", "lr_finder"]
    model = network()
    if case == "optimizer":
        plugins, optimizer = ["fsdp"], SGD(model.parameters())
    fit(model, LOSS, optimizer, batches(*UNEVEN), plugins=plugins, seed=0, out=out, **settings)


CASES = {
    "no plugin": "torchrun has started 2 processes, but no plugin makes them train together; add ddp or fsdp",
    "both": "ddp: fsdp trains in several processes already; choose one",
    "sync_batchnorm": "sync_batchnorm=true needs GPUs",
    "auto": "into=auto: a process cannot repeat a step while the others wait",
    "cut": "cannot split a batch of 8 samples into 9 parts",
    "offload": "offload=true needs GPUs",
    "for a while": "part of the model is frozen for a while, which fully_shard does not support",
    "later on": "part of the model is frozen for a while, which fully_shard does not support",
    "copy": "cannot be copied",
    "optimizer": "pass a factory",
}


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_that_cannot_work_is_refused_with_a_reason(ranks, tmp_path, case):
    with pytest.raises(UsageError, match=CASES[case]):
        ranks(2, train_refused, case, tmp_path)


def train_frozen(when):
    model = network()
    run = fit(model, LOSS, SGD, batches(*[8] * 8), plugins=["ddp", f"freeze:patterns=0,{when}"], seed=0, epochs=4)
    return weights_of(run)


@pytest.mark.parametrize("when", ["until=2ep", "until=6st", "start=2ep", "start=6st", "start=3st,until=9st"])
def test_a_part_that_is_frozen_or_unfrozen_during_training_is_trained_as_in_one_process(ranks, when):
    single = fit(network(), LOSS, SGD, batches(*[8] * 8), plugins=["accumulate:every=2", f"freeze:patterns=0,{when}"], seed=0, epochs=4)
    for weights in ranks(2, train_frozen, when):
        same(weights, weights_of(single), 1e-12)
