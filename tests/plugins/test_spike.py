"""The plugin spike, compared with a plain loop that leaves out the steps whose loss or norm is far above its running mean."""
import csv
import math
import shutil
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint import step_guard
from loopctl.plugins.spike import Spike

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-2)
adam = partial(torch.optim.Adam, lr=1e-2)
OPTIONS = {"deviations": 3.0, "decay": 0.9, "warmup": 5}
BAD = {3: 20.0, 11: 30.0, 12: 30.0, 18: 25.0}       # calls of the loss, from 1; the first is in the warmup and counts


class Loss:
    """Cross-entropy, times a factor in the calls in `bad`; of the loss alone, or of the gradient alone, if told so."""

    def __init__(self, bad=BAD, only=""):
        self.bad, self.only, self.calls = bad, only, 0

    def __call__(self, output, target):
        loss = cross_entropy(output, target)
        if not torch.is_grad_enabled():
            return loss
        self.calls += 1
        factor = self.bad.get(self.calls, 1.0)
        if self.only == "loss":
            return loss + (loss * (factor - 1)).detach()
        return loss * factor - ((loss * (factor - 1)).detach() if self.only == "gradient" else 0)


def by_hand(model, optimizer, batches, loss_fn, epochs=3, every=1, monitor="both", deviations=3.0, decay=0.9, warmup=5):
    """Return the numbers of the steps that were left out, from 1."""
    torch.manual_seed(1)
    out, step, steps, mean, variance = [], 0, torch.zeros(2), torch.zeros(2), torch.zeros(2)
    for _ in range(epochs):
        model.train()
        for start in range(0, len(batches), every):
            group, step = batches[start:start + every], step + 1
            size, total = sum(len(target) for _, target in group), torch.zeros(())
            buffers = [buffer.clone() for buffer in model.buffers()]
            optimizer.zero_grad()
            for input, target in group:
                loss = loss_fn(model(input), target)
                if len(group) > 1:
                    loss = loss * (len(target) / size)
                loss.backward()
                total += loss.detach()
            values = torch.stack((total, nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])))
            limit = mean + deviations * torch.maximum(variance.sqrt(), 0.01 * mean)
            judged = slice({"both": 0, "loss": 0, "norm": 1}[monitor], {"both": 2, "loss": 1, "norm": 2}[monitor])
            if not values.isfinite().all() or (steps[0] >= warmup and (values > limit)[judged].any()):
                out.append(step)
                for buffer, was in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(was)
                continue
            share = torch.maximum(1 / (steps + 1), torch.tensor(1 - decay))
            change = values - mean
            steps, mean, variance = steps + 1, mean + share * change, (1 - share) * (variance + share * change**2)
            optimizer.step()
    return out


class Skipped:
    """The numbers of the steps that were skipped, as plugins see them after the step."""

    def __init__(self):
        self.steps = []

    @hookimpl
    def after_step(self, run: Run):
        self.steps += [run.attempts] * run.skipped


class Late:
    """Stands in for a CUDA event: what was sent arrives two steps later."""

    def __init__(self, guard):
        self.guard, self.due = guard, guard.run.attempts + 2

    def query(self):
        return self.guard.run.attempts >= self.due

    def synchronize(self):
        pass


@pytest.fixture
def ahead(monkeypatch):
    """Treat the CPU as a device whose values the host does not read."""
    send = Spike.send_verdict

    def sent(self, run):
        send(self, run)
        self.coming[-1][1].event = Late(self)

    monkeypatch.setattr(step_guard, "ASYNCHRONOUS", ("cpu",))
    monkeypatch.setattr(Spike, "send_verdict", sent)


def rows(folder):
    with (folder / "spikes.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("factory", [sgd, adam], ids=["sgd", "adam"])
@pytest.mark.parametrize(("monitor", "only", "seen"), [
    ("both", "", True), ("loss", "", True), ("norm", "", True), ("both", "loss", True), ("both", "gradient", True),
    ("loss", "gradient", False), ("norm", "loss", False)])
@pytest.mark.compares(use="spike", technique="steps far above the running mean are left out", source="the loop by hand", tolerance="to the bit")
def test_equals_the_loop_that_leaves_spikes_out_to_the_bit(net, batches, clone, same, tmp_path, factory, monitor, only, seen):
    other, skipped = clone(net), Skipped()
    run = fit(net, Loss(only=only), factory, batches, epochs=3, plugins=[Spike(**OPTIONS, monitor=monitor), skipped], seed=1, out=tmp_path)
    assert by_hand(other, factory(other.parameters()), batches, Loss(only=only), monitor=monitor) == skipped.steps
    same(net, other)
    assert (11 in skipped.steps) == seen
    assert (run.step, run.attempts, run.metrics["skipped_steps"]) == (24 - len(skipped.steps), 24, len(skipped.steps))
    assert skipped.steps == ([int(row["step"]) for row in rows(tmp_path)] if skipped.steps else [])


@pytest.mark.parametrize("factory", [sgd, partial(sgd, momentum=0)], ids=["momentum", "plain"])
def test_equals_that_loop_too_where_the_host_does_not_wait(net, batches, clone, same, tmp_path, ahead, factory):
    other = clone(net)
    run = fit(net, Loss(), factory, batches, epochs=3, plugins=[Spike(**OPTIONS)], seed=1, out=tmp_path)
    assert by_hand(other, factory(other.parameters()), batches, Loss()) == [int(row["step"]) for row in rows(tmp_path)] == [11, 12, 18]
    same(net, other)
    assert (run.step, run.metrics["skipped_steps"]) == (21, 3)


@pytest.mark.parametrize("order", [1, -1])
def test_with_accumulation_the_spike_is_that_of_a_step_before_clipping(net, batches, clone, same, tmp_path, order):
    other, bad = clone(net), {16: 200.0}
    plugins = ["clip:value=0.01", Spike(**OPTIONS), "accumulate:every=2"][::order]
    fit(net, Loss(bad), partial(sgd, momentum=0.0), batches, epochs=3, plugins=plugins, seed=1, out=tmp_path)

    class Clipped(torch.optim.SGD):
        def step(self):
            nn.utils.clip_grad_value_(self.param_groups[0]["params"], 0.01)
            super().step()

    optimizer = Clipped(other.parameters(), lr=0.05, weight_decay=1e-2)
    assert by_hand(other, optimizer, batches, Loss(bad), every=2) == [8]
    same(net, other)
    row, = rows(tmp_path)
    assert {name: row[name] for name in ("step", "epoch", "first_batch", "last_batch", "spike")} == {
        "step": "8", "epoch": "2", "first_batch": "7", "last_batch": "8", "spike": "loss"}
    assert float(row["loss"]) > float(row["loss_mean"]) + 3 * float(row["loss_deviation"])
    assert float(row["norm"]) > float(row["norm_mean"])


def test_what_is_not_finite_is_a_spike_in_the_warmup_too(net, batches, clone, same, tmp_path):
    other, bad = clone(net), {1: math.nan, 4: math.inf}
    run = fit(net, Loss(bad), sgd, batches, plugins=[Spike(monitor="norm")], seed=1, out=tmp_path)
    assert by_hand(other, sgd(other.parameters()), batches, Loss(bad), epochs=1) == [1, 4]
    same(net, other)
    assert run.hook.plugins["spike"].running[0].tolist() == [6, 6]


def test_a_loss_that_falls_or_no_longer_changes_has_no_spikes(sgd, tmp_path):
    losses = iter([*[2 - 0.01 * step for step in range(60)], *[1.0] * 200, 1.001, 1.002, *[1.0] * 40])

    def loss(output, target):
        return output.sum() * 0 + next(losses)

    run = fit(nn.Linear(6, 3), loss, sgd, [(torch.zeros(2, 6), torch.zeros(2))] * 300, plugins=["spike:decay=0.9"], out=tmp_path)
    assert run.step == 300


def test_an_overflow_that_float16_scaling_skips_is_no_spike(plain, batches, tmp_path):
    run = fit(plain, cross_entropy, sgd, batches, epochs=8, plugins=["spike", "amp:dtype=float16,init_scale=1e30"], seed=1, out=tmp_path)
    assert run.metrics["skipped_steps"] == 0 < run.attempts - run.step
    assert run.hook.plugins["spike"].running[0].tolist() == [run.step] * 2


@pytest.mark.parametrize("late", [False, True])
def test_stop_says_what_it_has_found(net, batches, tmp_path, late, request):
    if late:
        request.getfixturevalue("ahead")
    run = fit(net, Loss({9: 30.0}), sgd, batches, epochs=3, plugins=[Spike("stop", **OPTIONS)], seed=1, out=tmp_path)
    start, _, end = run.stop.partition(" standard deviations above its mean of ")
    assert start.startswith("the loss of step 9 is ")
    assert float(start.split(", ")[1]) > 3
    assert end.endswith("; the step was undone, and action=skip would continue")
    assert run.step == run.attempts - 1 == (10 if late else 8)


def test_another_level_ends_the_run_at_the_limit(net, batches, tmp_path):
    run = fit(net, Loss(dict.fromkeys(range(10, 99), 30.0)), sgd, batches, epochs=3, plugins=[Spike(**OPTIONS, limit=4)], seed=1, out=tmp_path)
    assert run.stop.endswith(": 4 in a row, which is the limit")
    assert (run.step, run.attempts, len(rows(tmp_path))) == (9, 13, 4)


def test_rollback_goes_back_to_the_last_checkpoint_and_keeps_the_rows(net, batches, clone, same, tmp_path):
    class Compare:
        @hookimpl
        def safe_point(self, run: Run):
            if run.attempts == 8:
                self.at_checkpoint = clone(run.model)
            if run.attempts == 12:
                same(run.model, self.at_checkpoint)
                assert run.hook.plugins["spike"].running[0].tolist() == [8, 8]

    run = fit(net, Loss({12: 30.0}), sgd, batches, epochs=2, plugins=[Spike("rollback", **OPTIONS), "checkpoint", Compare()], seed=1, out=tmp_path)
    assert (run.attempts, run.metrics["skipped_steps"]) == (16, 1)
    assert [row["step"] for row in rows(tmp_path)] == ["12"] == [str(row["step"]) for row in run.hook.plugins["spike"].rows]


def test_a_resumed_run_has_the_rows_of_both_parts(net, batches, clone, same, tmp_path):
    other, plugins = clone(net), lambda: [Spike(**OPTIONS), "checkpoint"]
    fit(net, Loss(), sgd, batches, epochs=3, plugins=plugins(), seed=1, out=tmp_path / "whole")
    part = Loss()
    fit(clone(other), part, sgd, batches, epochs=2, plugins=plugins(), seed=1, out=tmp_path / "parts")
    shutil.copy(tmp_path / "parts" / "spikes.csv", tmp_path / "of the first part.csv")
    fit(other, part, sgd, batches, epochs=3, plugins=plugins(), seed=1, out=tmp_path / "parts", resume=tmp_path / "parts")
    same(net, other)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert len((tmp_path / "of the first part.csv").read_text().splitlines()) == 3


def test_a_file_of_an_earlier_run_is_not_overwritten(net, batches, tmp_path):
    (tmp_path / "spikes.csv").write_text("mine")
    with pytest.raises(UsageError, match=r"^spike: .*spikes.csv exists and is not overwritten; move it, or choose another path"):
        fit(net, cross_entropy, sgd, batches, plugins=["spike"], out=tmp_path)


def test_a_second_guard_is_refused(net, batches, tmp_path):
    with pytest.raises(UsageError, match="nan_guard and spike would undo the same steps; leave out all but one: each of them undoes those that are not finite"):
        fit(net, cross_entropy, sgd, batches, plugins=["nan_guard", "spike"], out=tmp_path)


@pytest.mark.parametrize(("options", "message"), [
    ({"deviations": 0}, "deviations is above 0, not 0"), ({"decay": 1.0}, "decay is at least 0 and below 1"), ({"decay": -0.1}, "decay is at least 0"),
    ({"warmup": 1}, "warmup is at least 2, not 1"), ({"limit": 0}, "limit is at least 1, not 0"), ({"deviations": math.nan}, "deviations is above 0")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Spike(**options)


def test_the_host_could_not_read_anything_in_a_step(batches, monkeypatch, tmp_path):
    """On the meta device no tensor has a value, so that reading one in whatever way is an error."""
    monkeypatch.setattr(step_guard, "ASYNCHRONOUS", ("meta",))
    monkeypatch.setattr(Spike, "send_verdict", lambda self, run: sent.append(self.evidence.shape))
    sent = []

    class Enough:
        @hookimpl
        def safe_point(self, run: Run):
            if run.attempts == 5:
                raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).to("meta")
    optimizer = sgd(model.parameters())
    model(batches[0][0].to("meta")).sum().backward()
    optimizer.step()            # so that it has state
    with pytest.raises(KeyboardInterrupt):
        fit(model, cross_entropy, optimizer, batches, plugins=[Spike(monitor="loss"), Enough(), "clip"], out=tmp_path)
    assert sent == [(6,)] * 5
