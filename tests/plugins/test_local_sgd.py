"""The plugin local_sgd: post-local SGD and DiLoCo give the weights of plain loops, to the bit."""
import shutil
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

from loopctl import Run, UsageError, fit, hookimpl

LOSS = nn.CrossEntropyLoss()
ADAMW = partial(torch.optim.AdamW, lr=0.01)
POST_LOCAL, DILOCO = "local_sgd:period=3,warmup_steps=2", "local_sgd:period=3,warmup_steps=2,outer_lr=0.7"


def network(norm=nn.Identity):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), norm(16), nn.Tanh(), nn.Linear(16, 3))


def batches(number, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 6, generator=random), torch.randint(0, 3, (8,), generator=random)) for _ in range(number)]


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(spec, plugins=(), epochs=3, out=".", resume=None, norm=nn.Identity):
    run = fit(network(norm), LOSS, ADAMW, batches(8), batches(4, seed=1), epochs=epochs, plugins=[spec, *plugins], seed=0, out=out, resume=resume)
    return weights(run.model), run.history


def post_local_by_hand(steps):
    """torch's own parts: its hook for the gradients until step 2, and after that its averager, every third step."""
    model = DistributedDataParallel(network())
    model.register_comm_hook(PostLocalSGDState(None, None, 2, post_local_gradient_allreduce=False), post_localSGD_hook)
    optimizer, averager = ADAMW(model.parameters()), PeriodicModelAverager(3, warmup_steps=2 + 3 - 1)       # first after three local steps
    for step in range(steps):
        input, target = batches(8)[(2 * step + dist.get_rank()) % 8]
        optimizer.zero_grad()
        LOSS(model(input), target).backward()
        optimizer.step()
        averager.average_parameters(model.parameters())
    return model.module


def diloco_by_hand(steps):
    """Algorithm 1 of arXiv:2311.08105, after two steps with averaged gradients."""
    model = network()
    optimizer, outer = ADAMW(model.parameters()), None
    for step in range(steps):
        input, target = batches(8)[(2 * step + dist.get_rank()) % 8]
        optimizer.zero_grad()
        LOSS(model(input), target).backward()
        if step < 2:
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad.div_(2))
        optimizer.step()
        if step == 1:
            before = [parameter.detach().clone() for parameter in model.parameters()]
            outer = torch.optim.SGD(before, lr=0.7, momentum=0.9, nesterov=True)
        elif step > 1 and (step - 1) % 3 == 0:
            for start, parameter in zip(before, model.parameters(), strict=True):
                mean = parameter.detach() / 2
                dist.all_reduce(mean)
                start.grad = start - mean
            outer.step()
            for start, parameter in zip(before, model.parameters(), strict=True):
                parameter.data.copy_(start)
    return model


def by_hand(loop, steps):
    """The weights of each process after the loop, averaged, as at the end of a run."""
    dist.init_process_group("gloo")
    model = loop(steps)
    for parameter in model.parameters():
        dist.all_reduce(parameter.data.div_(2))
    dist.destroy_process_group()
    return weights(model)


@pytest.mark.parametrize(("spec", "loop"), [(POST_LOCAL, post_local_by_hand), (DILOCO, diloco_by_hand)], ids=["post-local", "DiLoCo"])
@pytest.mark.compares(use="local_sgd", technique="weights averaged every few steps (arXiv:1808.07217), DiLoCo (arXiv:2311.08105)", source="torch.distributed.algorithms.model_averaging.averagers.PeriodicModelAverager", tolerance="to the bit")
def test_the_weights_are_those_of_a_plain_loop(ranks, spec, loop):
    for (found, _), expected in zip(ranks(2, train, spec), ranks(2, by_hand, loop, 12), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_until_the_end_of_the_warmup_it_is_ddp(ranks):
    for (found, history), (expected, rows) in zip(ranks(2, train, "local_sgd:warmup_steps=12"), ranks(2, train, "ddp"), strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert history == rows


class Evaluated:
    """The weights that are evaluated and judged, and those that are trained."""

    def __init__(self):
        self.seen = []

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        if run.evaluating:
            self.seen.append(weights(run.model))
        return (yield)

    @hookimpl
    def after_evaluate(self, run: Run):
        self.seen.append(weights(run.model))

    @hookimpl
    def epoch_end(self, run: Run):
        self.seen.append(weights(run.model))


def seen(norm):
    evaluated = Evaluated()
    found = train("local_sgd:period=3", [evaluated], 1, norm=norm)
    return evaluated.seen, found


def test_the_mean_of_the_weights_and_statistics_is_evaluated_and_training_goes_on_with_each_process_s_own(ranks):
    (first, (final, history)), (second, (final2, history2)) = ranks(2, seen, nn.BatchNorm1d)
    own, own2 = first[-1], second[-1]
    mean = {name: own[name] / 2 + own2[name] / 2 if own[name].is_floating_point() else own[name] for name in own}
    assert not torch.equal(own["0.weight"], own2["0.weight"])
    for name, value in mean.items():
        assert all(torch.equal(one[name], value) for one in (*first[:-1], *second[:-1], final, final2)), name
    assert history == history2


class LeaveAfter:
    @hookimpl
    def after_step(self, run: Run):
        if run.attempts == 7:                   # in the middle of a round and of an epoch
            run.leave = "on purpose"


@pytest.mark.parametrize("spec", [POST_LOCAL, DILOCO], ids=["post-local", "DiLoCo"])
def test_a_run_resumes_with_the_same_bits_and_only_with_as_many_processes(ranks, tmp_path, spec):
    whole = ranks(2, train, spec, ["checkpoint"], 3, tmp_path / "whole")
    ranks(2, train, spec, ["checkpoint", LeaveAfter()], 3, tmp_path / "part")
    shutil.copytree(tmp_path / "part", tmp_path / "other")
    for (found, history), (expected, rows) in zip(ranks(2, train, spec, ["checkpoint"], 3, tmp_path / "part", tmp_path / "part"), whole, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert history == rows
    with pytest.raises(UsageError, match="each process has weights of its own in the checkpoint"):
        ranks(3, train, spec, ["checkpoint"], 3, tmp_path / "other", tmp_path / "other")


@pytest.mark.parametrize("plugins", [["accumulate:every=2"], ["split"], ["clip:max_norm=0.1", "amp:dtype=bfloat16", "nan_guard"], ["freeze:patterns=0,until=1ep"],
                                     ["early_stopping:restore_best=true"]], ids=lambda plugins: plugins[0])
def test_it_works_with_other_plugins_and_ends_with_the_same_weights_everywhere(ranks, plugins):
    (found, history), (other, rows) = ranks(2, train, POST_LOCAL, plugins)
    assert all(torch.equal(found[name], other[name]) for name in found)
    assert history == rows


@pytest.mark.parametrize(("plugins", "reason"), [(["ema"], "ema would average other weights in each process"), (["amp:dtype=float16"], "amp scales the loss")],
                         ids=["ema", "float16"])
def test_plugins_that_would_differ_between_processes_are_refused(ranks, plugins, reason):
    with pytest.raises(UsageError, match=reason):
        ranks(2, train, POST_LOCAL, plugins)


@pytest.mark.parametrize(("option", "reason"), [("period=0", "period is at least 1"), ("warmup_steps=-1", "warmup_steps is at least 0"), ("outer_lr=0", "outer_lr is above 0"),
                                                ("outer_momentum=1", "outer_momentum at least 0 and below 1")])
def test_options_that_make_no_sense_are_refused(option, reason):
    with pytest.raises(UsageError, match=reason):
        train(f"local_sgd:{option}")
