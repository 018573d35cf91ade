"""The norms of gradients, weights and updates, against the same loop by hand."""
import csv
from math import hypot

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.norms import Norms

cross_entropy = nn.CrossEntropyLoss()


def rows(file):
    with file.open() as stream:
        return [(int(row["step"]), row["layer"], *(float(row[kind]) if row[kind] else None for kind in ("gradient", "weight", "update")))
                for row in csv.DictReader(stream)]


def layers(*norms):
    """The norms of the layers of `net`, of those of its parameters."""
    return [hypot(*norms[index:index + 2]) for index in (0, 2, 4)]


def by_hand(model, optimizer, batches, every, epochs=2):
    """The same loop: at each step that is measured, the norm of every parameter, of its gradient and of its change."""
    expected, step = [], 0
    for _ in range(epochs):
        for input, target in batches:
            step += 1
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            before = [parameter.detach().clone() for parameter in model.parameters()]
            gradients = layers(*[parameter.grad.norm().item() for parameter in model.parameters()])
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            weights = layers(*[old.norm().item() for old in before])
            updates = layers(*[(old - new.detach()).norm().item() for old, new in zip(before, model.parameters(), strict=True)])
            if step == 1 or step % every == 0:
                expected += [(step, *row) for row in zip("014", gradients, weights, updates, strict=True)]
    return expected


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.compares(use="norms", technique="norms of gradients, weights and updates by layer", source="the loop by hand", tolerance="to the bit")
def test_the_norms_are_those_of_a_plain_loop_bit_for_bit(net, batches, sgd, clone, same, tmp_path, order):
    """The gradient is that before clipping, whichever plugin is named first."""
    other = clone(net)
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["norms:every_steps=3", "clip:max_norm=0.1"][::order], seed=1, out=tmp_path)
    torch.manual_seed(1)
    assert rows(tmp_path / "norms.csv") == by_hand(other, sgd(other.parameters()), batches, 3)
    same(net, other)


def test_accumulated_gradients_are_those_of_the_whole_step(plain, batches, clone, tmp_path):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    other = clone(plain)
    fit(plain, cross_entropy, sgd, batches[:4], plugins=["norms:every_steps=1", "accumulate:every=4"], out=tmp_path)
    inputs, targets = (torch.cat(part) for part in zip(*batches[:4], strict=True))
    cross_entropy(other(inputs), targets).backward()
    found = {layer: gradient for _, layer, gradient, _, _ in rows(tmp_path / "norms.csv")}
    expected = [parameter.grad.norm().item() for parameter in other.parameters()]
    # Four micro-batches are added up in another order than one large batch.
    assert found == pytest.approx({"0": hypot(*expected[:2]), "2": hypot(*expected[2:])}, rel=1e-5)


def test_a_frozen_layer_and_one_without_a_gradient_are_told_apart(net, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches[:2], plugins=["norms:every_steps=1", "freeze:patterns=0", "freeze:patterns=4,until=1ep"], out=tmp_path)
    found = rows(tmp_path / "norms.csv")
    assert {row[1] for row in found} == {"1", "4"}                      # 0 is not trained in this run
    assert [row[2::2] for row in found if row[1] == "4"] == [(None, 0.0)] * 2


def test_half_precision_is_measured_in_single_precision(plain, batches, tmp_path):
    model = plain.to(torch.bfloat16)
    weight = model[0].weight.detach().clone()
    bias = model[0].bias.detach().clone()
    data = [(input.bfloat16(), target) for input, target in batches]
    fit(model, cross_entropy, lambda groups: torch.optim.SGD(groups, lr=0.1), data, plugins=["norms"], out=tmp_path)
    norms = [torch.linalg.vector_norm(each, dtype=torch.float32).item() for each in (weight, bias)]
    assert rows(tmp_path / "norms.csv")[0][3] == hypot(*norms)


def test_with_a_scaled_loss_the_gradient_is_unscaled(plain, batches, sgd, tmp_path):
    run = fit(plain, cross_entropy, sgd, batches[:1], plugins=["norms", "amp:dtype=float16", "clip:max_norm=inf"], out=tmp_path)
    found = hypot(*[row[2] for row in rows(tmp_path / "norms.csv")])
    assert found == pytest.approx(run.metrics["grad_norm"], rel=1e-6)          # which adds up in float32


def of_two_processes(spec, out):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(4)]
    fit(model, cross_entropy, lambda groups: torch.optim.SGD(groups, lr=0.1), data, plugins=[spec, "norms:every_steps=1"], out=out)


def test_of_sharded_weights_the_norms_are_those_of_the_whole(ranks, tmp_path):
    found = []
    for spec in ("ddp", "fsdp"):
        ranks(2, of_two_processes, spec, tmp_path / spec)
        found.append([value for row in rows(tmp_path / spec / "norms.csv") for value in row[2:]])
    assert len(found[0]) == 2 * 2 * 3
    assert found[1] == pytest.approx(found[0], rel=1e-5)           # sums of two shards


def test_a_step_that_is_not_measured_copies_no_weights(net, batches, sgd, tmp_path):
    plugin, copies = Norms(every_steps=4), []

    class Look:
        @hookimpl
        def grads_ready(self, run: Run):
            copies.append(len(plugin.before))

    fit(net, cross_entropy, sgd, batches, plugins=[plugin, Look()], out=tmp_path)
    assert copies == [6, 0, 0, 6, 0, 0, 0, 6]


class Kill:
    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == 11:
            raise KeyboardInterrupt


def test_a_resumed_run_has_each_step_once(net, batches, clone, sgd, tmp_path):
    def train(model, out, *more, **settings):
        plugins = ["checkpoint:every_steps=5", "norms:every_steps=2", *more]
        return fit(model, cross_entropy, sgd, batches, epochs=2, plugins=plugins, seed=1, out=out, **settings)

    train(clone(net), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(clone(net), tmp_path / "cut", Kill())
    train(net, tmp_path / "cut", resume=tmp_path / "cut")
    assert (tmp_path / "cut" / "norms.csv").read_bytes() == (tmp_path / "whole" / "norms.csv").read_bytes()


def test_loggers_get_the_norms_and_the_report_has_charts_of_them(net, batches, sgd, tmp_path):
    class Logger:
        seen = []

        @hookimpl
        def train_start(self):
            self.seen.clear()

        def log_values(self, run: Run, step, values):
            self.seen.append((step, values))

    fit(net, cross_entropy, sgd, batches, plugins=["report", "norms:every_steps=8", Logger()], out=tmp_path)
    assert [step for step, _ in Logger.seen] == [1, 8]
    assert Logger.seen[0][1] == {f"norm_{kind}/{row[1]}": value for row in rows(tmp_path / "norms.csv")[:3]
                                 for kind, value in zip(("gradient", "weight", "update"), row[2:], strict=True)}
    page = (tmp_path / "report.html").read_text()
    assert [title in page for title in ("Norms of layers", "gradient norm per epoch", "update norm / weight norm per epoch")] == [True] * 3


def test_of_many_layers_the_report_draws_some_and_says_so(batches, sgd, tmp_path):
    model = nn.Sequential(nn.Linear(6, 16), *[nn.Linear(16, 16) for _ in range(24)], nn.Linear(16, 3))
    fit(model, cross_entropy, sgd, batches[:1], plugins=["report", "norms"], out=tmp_path)
    assert "<p>12 of 26 layers; all of them are in norms.csv.</p>" in (tmp_path / "report.html").read_text()


def test_norms_of_a_gradient_that_is_not_finite_cost_no_training(plain, batches, sgd, tmp_path):
    data = [(torch.full_like(batches[0][0], torch.inf), batches[0][1]), *batches[1:]]
    fit(plain, cross_entropy, sgd, data, plugins=["norms:every_steps=1", "nan_guard:action=skip", "report"], out=tmp_path)
    first, second = rows(tmp_path / "norms.csv")[:2], rows(tmp_path / "norms.csv")[2:4]
    assert [row[2] == row[2] for row in first + second] == [False, False, True, True]
    assert [row[4] for row in first] == [0.0, 0.0]          # the step was skipped
    assert "Norms of layers" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("plugins", "message"), [
    (["norms:every_steps=0"], "every_steps is at least 1, not 0"),
    (["norms", "norms"], "norms: norms.2 writes to path=norms.csv too; choose another path in one of them"),
])
def test_wrong_options_are_refused(net, batches, sgd, tmp_path, plugins, message):
    with pytest.raises(UsageError) as error:
        fit(net, cross_entropy, sgd, batches, plugins=plugins, out=tmp_path)
    assert message in str(error.value)

