"""What holds for a run of several processes, whichever plugin it is made of."""
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
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from loopctl import Run, UsageError, available, fit, hookimpl
from loopctl.distributed import process_group as world
from loopctl.distributed.process_group import claim_error_report

LOSS = nn.CrossEntropyLoss()
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3)).double()


def noisy():
    """A network whose state and random numbers a wrong loop disturbs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)).double()


def batches(*sizes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 6, generator=random, dtype=torch.float64), torch.randint(0, 3, (size,), generator=random))
            for size in sizes]


UNEVEN = [8, 8, 8, 3, 8, 8, 5]


def numbered(samples, batch_size=4, **settings):
    """A loader of samples that know their number."""
    random = torch.Generator().manual_seed(3)
    input = torch.randn(samples, 6, generator=random, dtype=torch.float64)
    input[:, 0] = torch.arange(samples)
    return DataLoader(TensorDataset(input, torch.randint(0, 3, (samples,), generator=random)), batch_size, **settings)


class Seen:
    """Notes the samples of each epoch, by their number, and the loss and rate of each step."""

    def __init__(self):
        self.samples, self.losses, self.rates, self.shown = {}, [], [], []

    @hookimpl
    def before_step(self, run: Run):
        counted = [run.hook.batch_weight(run=run, batch=batch) for batch in run.batches]
        for (input, _), weight in zip(run.batches, counted, strict=True):
            if weight:
                self.samples.setdefault(run.epoch, []).extend(input[:, 0].int().tolist())

    @hookimpl
    def after_step(self, run: Run):
        self.losses.append(run.loss.item())
        self.rates.append(run.optimizer.param_groups[0]["lr"])


def outcome(run):
    return {name: getattr(value, "full_tensor", value.clone)() for name, value in run.model.state_dict().items()}


def same(there, here, tolerance=0.0):
    for name, value in here.items():
        torch.testing.assert_close(there[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# Hard cases: bugs that other training loops shipped


class Tokens:
    """A batch counts by its largest number of something."""

    @hookimpl
    def batch_weight(self, batch):
        return batch[0][:, 0].abs().sum()


def weighed(weights, sizes, plugins):
    run = fit(network(), LOSS, SGD, batches(*sizes), plugins=["ddp", *plugins, *[Tokens()] * weights], seed=0, epochs=3)
    return outcome(run), run.history


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("weights", [0, 1], ids=["samples", "tokens"])
def test_a2_the_normalisation_has_one_owner_the_number_of_processes_included(ranks, number, weights):
    """huggingface/transformers#35203, huggingface/transformers#34373"""
    net = network()
    optimizer = SGD(net.parameters())
    data = batches(*UNEVEN)
    for _ in range(3):
        for start in range(0, len(data), number):
            group = data[start:start + number]
            counts = [input[:, 0].abs().sum() if weights else len(input) for input, _ in group]
            optimizer.zero_grad()
            for (input, target), count in zip(group, counts, strict=True):
                (LOSS(net(input), target) * count / sum(counts)).backward()
            optimizer.step()
    for weights_there, _ in ranks(number, weighed, weights, UNEVEN, []):
        same(weights_there, net.state_dict(), 1e-12)


class Flags:
    """Notes whether gradients would meet, around each forward and each backward pass."""

    def __init__(self):
        self.forward, self.backward_ = [], []

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        if torch.is_grad_enabled():
            self.forward.append(run.network.require_backward_grad_sync)
        return (yield)

    @hookimpl(wrapper=True)
    def backward(self, run: Run):
        self.backward_.append(run.network.require_backward_grad_sync)
        return (yield)


class Pieces:
    """Notes after each backward pass whether gradients have met: only then has a process its piece of them."""

    def __init__(self):
        self.met = []

    @hookimpl(wrapper=True)
    def backward(self, run: Run):
        result = yield
        self.met.append(all(parameter.grad is not None for parameter in run.model.parameters()))
        return result


def in_pieces(plugins, sizes):
    pieces = Pieces()
    fit(network(), LOSS, SGD, batches(*sizes), plugins=["fsdp", *plugins, pieces], seed=0)
    return pieces.met


def flagged(plugins, sizes):
    flags = Flags()
    run = fit(network(), LOSS, SGD, batches(*sizes), batches(4, 4), plugins=["ddp", *plugins, flags], seed=0)
    return flags.forward, flags.backward_, outcome(run)


MEET = pytest.mark.parametrize(("plugins", "expected"), [
    (["accumulate:every=3"], [False, False, True, True]),               # four micro-batches: a step of three, one of one
    (["split:into=2"], [False, True] * 4),
    (["accumulate:every=2", "split:into=2"], [False, False, False, True] * 2),
], ids=["accumulate", "split", "both"])


@MEET
def test_a8_gradients_meet_in_the_last_micro_batch_forward_and_backward(ranks, plugins, expected):
    """modelscope/FunASR#3472, karpathy/build-nanogpt#30, huggingface/transformers#7742"""
    found = ranks(2, flagged, plugins, [8] * 8)
    for forward, backward, weights in found:
        assert forward == backward == expected
        same(weights, found[0][2])


@MEET
def test_a8_gradients_of_pieces_meet_in_the_last_micro_batch(ranks, plugins, expected):
    assert ranks(2, in_pieces, plugins, [8] * 8) == [expected, expected]


def scheduled(plugins):
    seen = Seen()
    run = fit(network(), LOSS, SGD, batches(*UNEVEN), plugins=["ddp", *plugins, seen], seed=0, epochs=4)
    return seen.rates, run.step, run.attempts


def test_c2_a_schedule_is_stepped_once_per_update_however_many_processes_there_are(ranks):
    """huggingface/transformers#24088, huggingface/accelerate#2318"""
    optimizer = SGD(network().parameters())
    torch_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
    expected = []
    for _ in range(16):                             # seven batches make four steps of two processes
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        torch_schedule.step()
    for rates, step, attempts in ranks(2, scheduled, ["cosine:by=step"]):
        assert rates == pytest.approx(expected, abs=1e-12)
        assert step == attempts == 16


class StopsAlone:
    """Wants to end the run, in one process."""

    def __init__(self, rank, hook, at):
        self.rank, self.hook, self.at = rank, hook, at

    def stop(self, run, hook):
        if hook == self.hook and run.rank == self.rank and run.attempts >= self.at:
            run.stop = f"process {self.rank} has had enough"

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


def stopped(rank, hook, out):
    run = fit(network(), LOSS, SGD, batches(*[8] * 20), batches(8, 8), epochs=400,
              plugins=["ddp", "checkpoint:every_epochs=3", StopsAlone(rank, hook, 33)], seed=0, out=out)
    return run.attempts, run.stop, outcome(run), len(run.history)


@pytest.mark.parametrize("hook", ["after_step", "epoch_end", "safe_point", "after_evaluate"])
@pytest.mark.parametrize("rank", [0, 1])
def test_e6_one_process_stops_and_all_end_at_the_same_step(ranks, tmp_path, rank, hook):
    """Lightning-AI/pytorch-lightning#379, talmolab/sleap-nn#471"""
    found = ranks(2, stopped, rank, hook, tmp_path)
    assert found[0][:2] == found[1][:2]
    assert found[0][1] == f"process {rank} has had enough"
    assert 33 <= found[0][0] < 4000
    same(found[1][2], found[0][2])


def stopped_within(rank):
    run = fit(network(), LOSS, SGD, batches(8) * 8000, plugins=["ddp", StopsAlone(rank, "after_step", 33)], seed=0)
    return run.attempts


def test_e6_nobody_waits_for_the_end_of_an_epoch(ranks):
    one, other = ranks(2, stopped_within, 1)
    assert one == other
    assert 33 <= one < 4000                     # about a second later


def judged(out):
    """Each process would judge its own part of the validation data differently."""
    run = fit(network(), LOSS, SGD, batches(*UNEVEN), batches(8, 1, 8, 1, 5, seed=1), epochs=60, out=out,
              plugins=["ddp", "early_stopping:patience=1,restore_best=true", "plateau:patience=0", "checkpoint"], seed=0)
    return run.history, run.stop, outcome(run)


def test_e6_what_is_judged_is_the_same_everywhere(ranks, tmp_path):
    found = ranks(2, judged, tmp_path)
    assert found[0][:2] == found[1][:2]
    assert "has not improved" in found[0][1]
    same(found[1][2], found[0][2])


MESSAGES = ("all_reduce", "broadcast", "all_gather", "all_gather_object", "broadcast_object_list", "barrier")


@contextmanager
def counted(count):
    """Count what processes say to each other, but for what DistributedDataParallel itself says."""
    with mock.patch.multiple(dist, **{name: counting(count, name) for name in MESSAGES}):
        yield


def counting(count, name):
    real = getattr(dist, name)

    def call(*arguments, **named):
        count[name] += 1
        return real(*arguments, **named)
    return call


class Messages:
    """Notes what is said in each step."""

    def __init__(self):
        self.count, self.steps = Counter(), []

    @hookimpl(wrapper=True)
    def train(self):
        with counted(self.count):
            return (yield)

    @hookimpl
    def before_step(self):
        self.count.clear()

    @hookimpl
    def after_step(self):
        self.steps.append(dict(self.count))


def said(sizes, plugins):
    messages = Messages()
    fit(network(), LOSS, SGD, batches(*sizes), plugins=[messages, "ddp", *plugins, "accumulate:every=2", "clip", "cosine"], seed=0)
    return messages.steps


@pytest.mark.parametrize("plugins", [[], ["split:into=2"]], ids=["", "split"])
def test_f6_steps_send_no_message_but_the_gradients(ranks, plugins):
    """Lightning-AI/pytorch-lightning#21487: the weights of the samples are known without asking."""
    for steps in ranks(2, said, [8] * 16 + [5], plugins):
        assert steps[:-1] == [{}] * 4
        assert steps[-1] == {"all_reduce": 1}               # the last one is uneven, and its loss a mean over both


# Data


def read(loader, plugins, epochs, settings):
    seen = Seen()
    run = fit(network(), LOSS, SGD, loader() if callable(loader) else loader, plugins=["ddp", *plugins, seen], seed=0, epochs=epochs, **settings)
    return seen.samples, outcome(run), run.epochs_done


LOADERS = {
    "in order": partial(numbered, 30), "shuffled": partial(numbered, 30, shuffle=True), "drop_last": partial(numbered, 30, shuffle=True, drop_last=True),
    "workers": partial(numbered, 30, shuffle=True, num_workers=2), "few": partial(numbered, 5, shuffle=True),
    "list": partial(list, numbered(30)),
}


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("loader", LOADERS)
def test_every_sample_is_seen_once_in_each_epoch(ranks, loader, number):
    found = ranks(number, read, LOADERS[loader], [], 3, {})
    total = {"drop_last": 28, "few": 5}.get(loader, 30)
    orders = []
    for epoch in range(3):
        parts = [samples.get(epoch, []) for samples, *_ in found]
        everything = sorted(chain.from_iterable(parts))
        assert len(everything) == len(set(everything)) == total
        orders.append(parts)
    assert (orders[0] != orders[1]) == (loader not in ("in order", "list"))         # the shuffle is another in each epoch
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


def test_a_stream_is_divided_too(ranks):
    found = ranks(2, read, streamed, [], 2, {"steps_per_epoch": 4})
    for epoch in range(2):
        assert sorted(chain(*(samples[epoch] for samples, *_ in found))) == list(range(30))
    single = fit(network(), LOSS, SGD, streamed(), plugins=["accumulate:every=2"], seed=0, epochs=2, steps_per_epoch=4)
    for _, weights, _ in found:
        same(weights, outcome(single), 1e-12)


def of_parts():
    rank, size = dist.get_rank(), dist.get_world_size()
    return batches(*UNEVEN[:6])[rank::size]


def read_parts():
    dist.init_process_group("gloo")                     # the user's own, which the run joins
    run = fit(network(), LOSS, SGD, of_parts(), plugins=["ddp:shard=false"], seed=0, epochs=3)
    assert dist.is_initialized()
    return outcome(run)


def test_data_that_is_in_parts_already_counts_the_same(ranks):
    single = fit(network(), LOSS, SGD, batches(*UNEVEN[:6]), plugins=["accumulate:every=2"], seed=0, epochs=3)
    for weights in ranks(2, read_parts):
        same(weights, outcome(single), 1e-12)


def begun_differently(spec, rank=None):
    model = noisy()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor += int(os.environ["RANK"]) if rank is None else rank
    run = fit(model, LOSS, partial(torch.optim.SGD, lr=0.0), batches(8, 8), plugins=[spec], seed=0)
    return {name: value for name, value in outcome(run).items() if "running" not in name}, run.history[0]["train_loss"]


@pytest.mark.parametrize("spec", ["ddp", "fsdp"])
def test_all_begin_with_the_model_of_the_first(ranks, spec):
    found, expected = ranks(2, begun_differently, spec), ranks(2, begun_differently, spec, 0)
    for there, here in zip(found, expected, strict=True):
        same(there[0], here[0])
        assert there[1] == here[1]


def noise():
    fit(network(), LOSS, SGD, batches(8, 8), plugins=["ddp"], seed=0)
    return float(torch.rand(1))


def test_each_process_has_noise_of_its_own(ranks):
    assert len({*ranks(3, noise)}) == 3


def in_parts(plugins):
    messages = Messages()
    data = numbered(32).dataset
    loader = DataLoader(data, 4, sampler=DistributedSampler(data, 2, int(os.environ["RANK"])))
    run = fit(network(), LOSS, SGD, loader, plugins=[messages, "ddp", *plugins], seed=0)
    return messages.steps, outcome(run)


def test_a_loader_of_parts_sends_no_message_either(ranks):
    for steps, weights in (found := ranks(2, in_parts, [])):
        assert steps == [{}] * 4
        same(weights, found[0][1])


def measured(number):
    from torchmetrics.classification import MulticlassAccuracy
    right = MulticlassAccuracy(3, average="micro")
    run = fit(network(), LOSS, SGD, batches(*UNEVEN), batches(8, 1, 8, 1, 5, seed=1), metrics={"accuracy": accuracy, "torchmetrics": right},
              plugins=[f"accumulate:every={number}" if number else "ddp"], seed=0)
    return run.history


def accuracy(output, target):
    return (output.argmax(1) == target).double().mean()


@pytest.mark.parametrize("number", [2, 3])
def test_metrics_are_those_of_all_samples_once(ranks, number):
    """Functions and objects that collect by themselves, in training and validation; a filler counts for neither."""
    expected = measured(number)
    for history in ranks(number, measured, 0):
        for there, here in zip(history, expected, strict=True):
            assert there == pytest.approx(here, abs=1e-6)           # torchmetrics counts in float32


def evaluated(spec, workers):
    valid = numbered(18, num_workers=workers)                   # five batches, the last one of two samples
    return fit(network(), LOSS, SGD, batches(8, 8), valid, metrics={"accuracy": accuracy}, plugins=spec, seed=0, epochs=2).history


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("spec", ["ddp", "fsdp"])
def test_validation_data_of_a_loader_counts_once_too(ranks, spec, workers):
    expected = evaluated(["accumulate:every=2"], 0)
    for history in ranks(2, evaluated, [spec], workers):
        for there, here in zip(history, expected, strict=True):
            assert there == pytest.approx(here, abs=1e-10)


# Going on


class Kill:
    def __init__(self, at):
        self.at = at

    @hookimpl
    def safe_point(self, run: Run):
        if run.attempts == self.at:
            raise KeyboardInterrupt


def part(spec, make, loader, epochs, out, at=None, resume=None, plugins=()):
    """A run that is killed after step `at`, or goes on."""
    seen = Seen()
    arguments = {"plugins": [spec, *plugins, "checkpoint:every_steps=1", seen, *([Kill(at)] if at else [])], "seed": 1, "epochs": epochs, "out": out}
    if at is None:
        run = fit(make(), LOSS, partial(torch.optim.AdamW, lr=0.01), loader(), batches(8, 5, seed=1), resume=resume, **arguments)
        return seen.samples, seen.losses, outcome(run), run.history, run.planned_steps, run.epochs_done
    with pytest.raises(KeyboardInterrupt):
        fit(make(), LOSS, partial(torch.optim.AdamW, lr=0.01), loader(), batches(8, 5, seed=1), **arguments)
    return seen.samples


SHUFFLED = partial(numbered, 30, shuffle=True)
WORKERS = partial(numbered, 30, shuffle=True, num_workers=2)


@pytest.mark.parametrize("loader", [SHUFFLED, WORKERS], ids=["loader", "workers"])
@pytest.mark.parametrize("at", [3, 4, 6])
@pytest.mark.parametrize("spec", ["ddp", "fsdp"])
def test_a_killed_run_ends_with_the_same_bits(ranks, tmp_path, spec, at, loader):
    """In the middle of an epoch and at its end; each process has noise of its own, which goes on as well."""
    whole = ranks(2, part, spec, noisy, loader, 3, tmp_path / "whole")
    ranks(2, part, spec, noisy, loader, 3, tmp_path / "cut", at)
    rest = ranks(2, part, spec, noisy, loader, 3, tmp_path / "cut", None, tmp_path / "cut")
    for there, here in zip(rest, whole, strict=True):
        assert there[1] == here[1][at:]
        same(there[2], here[2])
        assert there[3] == here[3]


@pytest.mark.parametrize("spec", ["ddp:find_unused_parameters=true", "fsdp"])
def test_so_does_one_of_three_where_gradients_keep_their_order(ranks, tmp_path, spec):
    whole = ranks(3, part, spec, noisy, SHUFFLED, 3, tmp_path / "whole")
    ranks(3, part, spec, noisy, SHUFFLED, 3, tmp_path / "cut", 4)
    rest = ranks(3, part, spec, noisy, SHUFFLED, 3, tmp_path / "cut", None, tmp_path / "cut")
    for there, here in zip(rest, whole, strict=True):
        same(there[2], here[2])


@pytest.mark.parametrize(("before", "after"), [(2, 3), (2, 1), (3, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("at", [2, 6], ids=["within", "later"])
@pytest.mark.parametrize("spec", ["ddp", "fsdp"])
def test_a_run_goes_on_in_another_number_of_processes(ranks, tmp_path, spec, before, after, at):
    """The epoch goes on with the first batch that nobody had; every sample is seen once in each epoch."""
    first = ranks(before, part, spec, network, SHUFFLED, 3, tmp_path, at)
    rest = ranks(after, part, spec, network, SHUFFLED, 3, tmp_path, None, tmp_path)
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
    """With a rate of 0 nothing changes, so that the mean must be the one of a single process."""
    ranks(2, still, tmp_path, 2, None)
    (there, *_) = ranks(3, still, tmp_path, None, tmp_path)
    single = fit(network(), LOSS, partial(torch.optim.SGD, lr=0.0), numbered(30), seed=0)
    assert there[0]["train_loss"] == pytest.approx(single.history[0]["train_loss"], abs=1e-12)


def still(out, at, resume):
    plugins = ["ddp", "checkpoint:every_steps=1", *([Kill(at)] if at else [])]
    try:
        return fit(network(), LOSS, partial(torch.optim.SGD, lr=0.0), numbered(30), plugins=plugins, seed=0, out=out, resume=resume).history
    except KeyboardInterrupt:
        return None


# Signals, and who speaks


def test_the_first_that_asks_speaks_for_all_and_after_a_restart_another(monkeypatch):
    store = dist.HashStore()
    monkeypatch.setattr(world, "board", lambda: store)
    monkeypatch.setattr(world, "sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for count in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        assert claim_error_report(waits=True)                     # nobody else has
        assert not claim_error_report(waits=False)
        assert not claim_error_report(waits=True)


@pytest.mark.parametrize(("error", "raised"), [(dist.DistBackendError("gone"), SystemExit), (ValueError("its own"), ValueError)])
def test_a_signal_that_comes_with_the_loss_of_another_process_ends_this_one(tmp_path, error, raised):
    """It is torchrun's, which has said by then, or will say, why all end."""
    class Loses:
        @hookimpl
        def after_step(self, run: Run):
            os.kill(os.getpid(), signal.SIGTERM)
            raise error

    with pytest.raises(raised) as caught:
        fit(network(), LOSS, SGD, batches(8, 8), plugins=["checkpoint", Loses()], out=tmp_path)
    assert getattr(caught.value, "code", 143) == 143


@pytest.mark.parametrize(("rank", "alone"), [(0, True), (1, False)])
def test_the_first_process_speaks_where_torchrun_has_gone(monkeypatch, rank, alone):
    def gone():
        raise dist.DistNetworkError("connection refused")
    monkeypatch.setattr(world, "board", gone)
    monkeypatch.setattr(world, "rank", lambda: rank)
    assert claim_error_report(waits=False) == alone


class Signals:
    def __init__(self, rank, *at):
        self.rank, self.at = rank, at

    @hookimpl
    def after_step(self, run: Run):
        if run.rank == self.rank and run.attempts in self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def signalled(rank, out, *more):
    try:
        fit(network(), LOSS, SGD, batches(*[8] * 20), epochs=500, seed=0, out=out,
            plugins=["ddp", "checkpoint:every_epochs=1000", Signals(rank, 35, *more), "progress", "csv"])
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_has_all_leave_at_the_same_step(ranks, tmp_path, rank):
    assert ranks(2, signalled, rank, tmp_path) == [128 + signal.SIGTERM] * 2
    last = max((tmp_path / "checkpoints").glob("step-*.pt"))
    assert 35 <= int(last.stem.removeprefix("step-")) < 5000


def test_torchrun_passes_a_signal_on_that_was_there_already(ranks, tmp_path):
    assert ranks(2, signalled, 1, tmp_path, 36) == [128 + signal.SIGTERM] * 2
    assert int(max((tmp_path / "checkpoints").glob("step-*.pt")).stem.removeprefix("step-")) >= 36


def unwritten(out):
    from loopctl.checkpoint.atomic_files import save_checkpoint
    rank, real = int(os.environ["RANK"]), save_checkpoint

    def save(*arguments):
        raise OSError(28, "No space left on device")
    save_checkpoint = save if rank == 0 else real
    try:
        return fit(network(), LOSS, SGD, batches(8, 8), plugins=["ddp", "checkpoint"], seed=0, out=out).last_checkpoint
    finally:
        save_checkpoint = real


def test_what_one_process_could_not_write_none_goes_back_to(ranks, tmp_path):
    assert ranks(2, unwritten, tmp_path) == [None, None]


def signalled_in_a_short_run(out):
    try:
        fit(network(), LOSS, SGD, batches(*[8] * 8), epochs=8, seed=0, out=out, plugins=["ddp", "checkpoint", Signals(1, 6)])
    except SystemExit as end:
        return end.code


def test_a_signal_is_heard_of_where_an_epoch_ends(ranks, tmp_path):
    """Though it took a second until they ask each other, and the run is over by then."""
    assert ranks(2, signalled_in_a_short_run, tmp_path) == [128 + signal.SIGTERM] * 2
    assert max((tmp_path / "checkpoints").glob("step-*.pt")).stem == "step-00000008"


def spoken(out):
    import contextlib
    import io
    with contextlib.redirect_stdout(io.StringIO()) as text:
        run = fit(network(), LOSS, SGD, batches(*UNEVEN), batches(8, 5), seed=0, out=out,
                  plugins=["ddp", "progress", "summary", "csv", "report", "tensorboard", "profile:start=1,steps=1", "lr_finder:num_steps=4", "throughput"])
    return text.getvalue(), run.metrics


def test_one_process_prints_and_writes(ranks, tmp_path):
    (first, metrics), (second, others) = ranks(2, spoken, tmp_path)
    assert "epoch 1/1" in first
    assert "parameters" in first.lower()
    assert second == ""
    assert metrics == others
    assert (tmp_path / "metrics.csv").exists()


def bad(rank, what, action):
    """One process has a loss that is no number."""
    data = batches(*[8] * 8)
    data[4 + rank][0][:] = what             # the third step's batch of that process
    run = fit(network(), LOSS, SGD, data, plugins=["ddp", f"nan_guard:action={action}"], seed=0)
    return run.step, run.attempts, run.stop, outcome(run)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_loss_that_is_no_number_in_one_process_is_undone_in_all(ranks, rank, action):
    found = ranks(2, bad, rank, float("nan"), action)
    assert found[0][:3] == found[1][:3]
    assert found[0][0] == (2 if action == "stop" else 3)
    assert bool(found[0][2]) == (action == "stop")
    same(found[1][3], found[0][3])


# Every plugin


REFUSED = {"cudagraph": "captures the work of a GPU"}


def with_plugin(spec, out):
    run = fit(noisy().float(), LOSS, SGD, [(input.float(), target) for input, target in batches(8, 8, 8, 8, 8, 8, 8)],
              [(input.float(), target) for input, target in batches(8, 5, 7, seed=1)], plugins=["ddp", *spec], epochs=2, seed=0, out=out)
    return outcome(run), [{key: value for key, value in row.items() if value == value} for row in run.history]


@pytest.mark.parametrize("name", sorted({*available()} - {"ddp", "fsdp"}))
def test_every_plugin_trains_with_ddp_and_the_processes_stay_alike(ranks, example, tmp_path, name):
    if name in REFUSED:
        with pytest.raises(UsageError, match=REFUSED[name]):
            ranks(2, with_plugin, [example(name)], tmp_path)
        return
    found = ranks(2, with_plugin, [example(name)], tmp_path)
    same(found[1][0], found[0][0])
    assert found[0][1] == found[1][1]


# What is refused


def refused(case, out):
    plugins, settings = ["ddp"], {"device": "cpu"}
    optimizer = SGD
    if case == "nobody joins":
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
    elif case == "copy":
        plugins = ["fsdp", "lr_finder"]
    model = network()
    if case == "optimizer":
        plugins, optimizer = ["fsdp"], SGD(model.parameters())
    fit(model, LOSS, optimizer, batches(*UNEVEN), plugins=plugins, seed=0, out=out, **settings)


CASES = {
    "nobody joins": "torchrun has started 2 processes, and nobody has them train together; add ddp",
    "both": "ddp: fsdp has the processes train together already; choose one",
    "sync_batchnorm": "sync_batchnorm=true needs GPUs",
    "auto": "into=auto: a process cannot do a step over while others wait",
    "cut": "a batch of 8 samples is not cut into 9 parts",
    "offload": "offload=true is for GPUs",
    "for a while": "part of the model is frozen for a while only",
    "copy": "cannot be copied",
    "optimizer": "pass a factory",
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_is_refused_with_a_reason(ranks, tmp_path, case):
    with pytest.raises(UsageError, match=CASES[case]):
        ranks(2, refused, case, tmp_path)


def thawed(until):
    model = network()
    run = fit(model, LOSS, SGD, batches(*[8] * 8), plugins=["ddp", f"freeze:patterns=0,until={until}"], seed=0, epochs=4)
    return outcome(run)


@pytest.mark.parametrize("until", ["2ep", "6st"])
def test_what_thaws_is_trained_alike(ranks, until):
    single = fit(network(), LOSS, SGD, batches(*[8] * 8), plugins=["accumulate:every=2", f"freeze:patterns=0,until={until}"], seed=0, epochs=4)
    for weights in ranks(2, thawed, until):
        same(weights, outcome(single), 1e-12)
