"""The plugin clip, compared with a plain loop that uses torch.nn.utils."""
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from loopctl import fit
from loopctl.metrics.percentile import RunningPercentile
from loopctl.plugins.clip import Clip
from loopctl.testing import plugin_checks

cross_entropy = nn.CrossEntropyLoss()


@pytest.mark.compares(use="clip", technique="gradient clipping by norm and by value",
                      source="torch.nn.utils.clip_grad_norm_, torch.nn.utils.clip_grad_value_", tolerance="to the bit")
@pytest.mark.parametrize(("spec", "clip"), [
    ("clip", lambda parameters: nn.utils.clip_grad_norm_(parameters, 1.0)),
    ("clip:max_norm=0.05", lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05)),
    ("clip:max_norm=20,norm_type=2", lambda parameters: nn.utils.clip_grad_norm_(parameters, 20, 2)),
    ("clip:max_norm=0.02,norm_type=inf", lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.02, float("inf"))),
    ("clip:value=0.01", lambda parameters: nn.utils.clip_grad_value_(parameters, 0.01)),
])
def test_equals_a_plain_loop_to_the_bit(net, batches, clone, same, sgd, spec, clip):
    other = clone(net)
    run = fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[spec], seed=1)
    torch.manual_seed(1)
    optimizer, norms = sgd(other.parameters()), []
    other.train()
    for _ in range(2):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(other(input), target).backward()
            norms.append(clip(other.parameters()))
            optimizer.step()
    same(net, other)
    if "value" in spec:
        assert "grad_norm" not in run.history[0]
    else:
        assert [row["grad_norm"] for row in run.history] == [norms[7].item(), norms[15].item()]


@pytest.mark.parametrize(("specs", "said"), [
    (["clip", "clip:max_norm=0.5"], ["clip and clip.2 clip the same norm of type 2, so the smaller limit counts; leave one of them out"]),
    (["clip:value=1", "clip:value=2"], ["clip and clip.2 clip the same value, so the smaller limit counts; leave one of them out"]),
    (["clip", "clip:value=1"], []), (["clip", "clip:max_norm=1,norm_type=inf"], []), (["clip:max_norm=inf", "clip", "clip:value=1"], []),
    (["clip:max_norm=inf", "clip:max_norm=inf"], []),
], ids=str)
def test_two_that_clip_the_same_are_said(specs, said, net, batches, sgd, caplog):
    fit(net, cross_entropy, sgd, batches[:1], plugins=specs)
    assert caplog.messages == said


def percentile_of(values, percent):
    """Interpolated linearly between the two values that are nearest to the rank."""
    ordered, rank = torch.stack(values).sort().values, percent / 100 * (len(values) - 1)
    found = torch.lerp(ordered[math.floor(rank)], ordered[math.ceil(rank)], rank - math.floor(rank))
    torch.testing.assert_close(found, torch.quantile(ordered, percent / 100), rtol=1e-6, atol=0)      # it rounds the rank
    return found


def autoclip(percent, history):
    """Clips by the percentile of the norms in `history` and of this one, as the paper's code does."""
    def clip(parameters):
        parameters = list(parameters)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        history.append(norm)
        limit = percentile_of(history, percent)
        for parameter in parameters:
            parameter.grad.mul_((limit / (norm + 1e-6)).clamp(max=1))
    return clip


def by_hand(model, optimizer, batches, clip, epochs):
    torch.manual_seed(1)
    model.train()
    for _ in range(epochs):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(model(input), target).backward()
            clip(model.parameters())
            optimizer.step()


@pytest.mark.parametrize("percent", [0, 10, 37.5, 100])
def test_auto_equals_a_plain_loop_that_sorts_all_norms_to_the_bit(net, batches, clone, same, sgd, percent):
    other, norms = clone(net), []
    run = fit(net, cross_entropy, sgd, batches, epochs=5, plugins=[f"clip:auto={percent}"], seed=1)
    by_hand(other, sgd(other.parameters()), batches, autoclip(percent, norms), epochs=5)
    same(net, other)
    assert [row["grad_norm"] for row in run.history] == [norm.item() for norm in norms[7::8]]


@pytest.mark.compares(use="clip:auto", technique="clipping at a percentile of past norms", source="arXiv:2007.14469", tolerance="1e-6: NumPy computes the percentile in double precision")
def test_auto_equals_the_loop_of_the_paper_with_numpy(plain, batches, clone, same, sgd):
    """Within a tolerance: numpy interpolates in double precision, and torch multiplies the limit by a reciprocal."""
    other, history = clone(plain), []

    def clip(parameters):
        parameters = list(parameters)
        history.append(nn.utils.get_total_norm([parameter.grad for parameter in parameters]).item())
        nn.utils.clip_grad_norm_(parameters, np.percentile(history, 10))

    fit(plain, cross_entropy, sgd, batches, epochs=5, plugins=["clip:auto=10"], seed=1)
    by_hand(other, sgd(other.parameters()), batches, clip, epochs=5)
    same(plain, other, tolerance=1e-6)


def test_norms_that_are_not_finite_do_not_count():
    """float16 scaling skips such steps all the time: an infinite norm would be in the history for ever."""
    percentile, finite, found = RunningPercentile(60), [], []
    values = [math.inf, math.nan, 3.0, 1.0, math.inf, 1.0, 2.5, math.nan, 1e-20, 1e20, 7.0, 0.0]
    for value in values:
        found.append(percentile.add(torch.tensor(value)))
        if math.isfinite(value):
            finite.append(torch.tensor(value))
            assert found[-1] == percentile_of(finite, 60)
    assert all(value.isnan() for value in found[:2])
    assert found[4] == found[3]
    assert percentile.ordered[:len(finite)].tolist() == sorted(torch.stack(finite).tolist())


def test_a_value_can_replace_the_last_one():
    percentile = RunningPercentile(50)
    found = [percentile.add(torch.tensor(value), replace=replace).item() for value, replace in
             [(9.0, False), (1.0, True), (3.0, False), (5.0, True), (8.0, True), (2.0, False), (4.0, False)]]
    assert found == [9.0, 1.0, 2.0, 3.0, 4.5, 2.0, 3.0]


def test_auto_counts_one_norm_per_step_with_an_optimizer_that_computes_several(plain, batches):
    clip = Clip(auto=50)
    fit(plain, cross_entropy, partial(torch.optim.LBFGS, lr=0.1, max_iter=3), batches, plugins=[clip], seed=1)
    assert clip.state_dict()[""]["count"] == 8


def test_auto_keeps_the_norms_of_several_optimizers_apart(plain, batches, sgd):
    def loss(model, batch):
        output = model(batch[0])
        return cross_entropy(output, batch[1]), output

    clip = Clip(auto=50)
    fit(plain, None, {"0": sgd, "2": sgd}, batches, forward={"0": loss, "2": loss}, plugins=[clip], seed=1)
    one, other = clip.state_dict().values()
    assert one["count"] == other["count"] == 8
    assert not torch.equal(one["ordered"], other["ordered"])


def test_auto_of_half_precision_counts_beyond_256(batches):
    percentile = RunningPercentile(100)
    for value in range(300):
        found = percentile.add(torch.tensor(float(value), dtype=torch.bfloat16))
    assert (percentile.count, found) == (300, 300)


@pytest.mark.parametrize(("options", "message"), [
    ({"auto": -1}, "auto is a percentile, 0 to 100, not -1"), ({"auto": 101}, "auto is a percentile"), ({"auto": math.nan}, "auto is a percentile"),
    ({"auto": 10, "max_norm": 1.0}, "pass max_norm or auto; for both, use clip twice"),
    ({"value": 10, "max_norm": 1.0}, "pass max_norm or value; for both, use clip twice")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Clip(**options)


def test_auto_is_not_captured_in_a_graph():
    assert Clip().capturable
    assert not Clip(auto=10).capturable


@pytest.mark.parametrize("check", ["options_are_documented", "repeats", "resumes", "runs_twice", "shares_nothing", "never_waits"])
def test_auto_passes_the_check(check):
    """Of those that all plugins pass; test_conformance.py has them for a fixed norm."""
    next(one for one in plugin_checks("clip:auto=30") if one.__name__ == check)()


@pytest.mark.parametrize("plugins", [["accumulate:every=2"], ["amp:dtype=float16,init_scale=1e30"], ["sam"]], ids=str)
def test_auto_in_either_order_gives_the_same_weights(net, batches, clone, same, sgd, plugins):
    """With float16, the first steps overflow: their norms are infinite."""
    other, counts = clone(net), []
    for model, both in ((net, ["clip:auto=30", *plugins]), (other, [*plugins, "clip:auto=30"])):
        run = fit(model, cross_entropy, sgd, batches, epochs=20, plugins=both, seed=1)
        counts.append(run.hook.plugins["clip"].state_dict()[""]["count"])
    same(net, other)
    assert counts == [run.step] * 2
    assert (run.step < run.attempts) == ("amp" in plugins[0])
