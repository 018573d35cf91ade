"""Communication hooks of ddp: torch's own, and those that a plugin registers, also where the model is wrapped again."""
import logging
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.distributed.process_group import leave_process_group

LOSS = nn.CrossEntropyLoss()
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
POWER_SGD = "ddp:comm_hook=powersgd,matrix_approximation_rank=2,start_powerSGD_iter=3"


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def batches(number, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 6, generator=random), torch.randint(0, 3, (8,), generator=random)) for _ in range(number)]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def bf16_under_another_name(state, bucket):
    """The hook that DistributedDataParallel refuses without a GPU."""
    return default_hooks.bf16_compress_hook(state, bucket)


def power_sgd_waited_for(state, bucket):
    """Otherwise gloo's threads may be the last to hold the process group, and torch aborts the process."""
    result = powerSGD_hook(state, bucket)
    result.wait()
    return result


HOOKS = {"fp16": default_hooks.fp16_compress_hook, "bf16": bf16_under_another_name, "powersgd": power_sgd_waited_for}


def train_by_hand(name, epochs):
    dist.init_process_group("gloo")
    model = DistributedDataParallel(network())
    model.register_comm_hook(PowerSGDState(None, 2, 3) if name == "powersgd" else None, HOOKS[name])
    optimizer = SGD(model.parameters())
    for _ in range(epochs):
        for input, target in batches(8)[dist.get_rank()::2]:
            optimizer.zero_grad()
            LOSS(model(input), target).backward()
            optimizer.step()
    found = weights(model.module)
    time.sleep(0.3)         # until gloo's threads hold the process group no more; the last to do so would wait for itself
    del model, optimizer
    leave_process_group()
    return found


def train(spec, plugins=(), epochs=3, **settings):
    run = fit(network(), LOSS, SGD, batches(8), epochs=epochs, plugins=[spec, *plugins], seed=0, **settings)
    return weights(run.model)


@pytest.mark.parametrize("name", HOOKS)
@pytest.mark.compares(use="ddp:comm_hook", technique="compressed gradients between processes", source="the loop by hand", tolerance="to the bit")
def test_a_hook_of_torch_gives_the_weights_of_a_plain_loop_with_it(ranks, name):
    spec = POWER_SGD if name == "powersgd" else f"ddp:comm_hook={name}"
    found, expected, without = ranks(2, train, spec), ranks(2, train_by_hand, name, 3), ranks(2, train, "ddp")
    for own, by_hand, whole in zip(found, expected, without, strict=True):
        assert all(torch.equal(own[key], by_hand[key]) for key in own)
        assert not all(torch.equal(own[key], whole[key]) for key in own)


class Register:
    """A hook of a plugin, with a state: the number of its calls and of the times that it was registered."""

    def __init__(self):
        self.state = {"calls": 0, "registered": 0}

    @hookimpl
    def train_start(self, run: Run):
        def halved(state, bucket):
            state["calls"] += 1
            return default_hooks.allreduce_hook(None, bucket).then(lambda done: done.value().mul_(0.5))
        self.networks = [run.network]
        run.network.register_comm_hook(self.state, halved)

    @hookimpl
    def epoch_end(self, run: Run):
        self.networks.append(run.network)


def train_with_a_hook_of_a_plugin(plugins):
    register = Register()
    run = fit(network(), LOSS, partial(torch.optim.SGD, lr=0.1), batches(8), epochs=3, plugins=["ddp", *plugins, register], seed=0)
    return weights(run.model), register.state["calls"], len({*map(id, register.networks)})


def train_at_half_the_rate(plugins):
    run = fit(network(), LOSS, partial(torch.optim.SGD, lr=0.05), batches(8), epochs=3, plugins=["ddp", *plugins], seed=0)
    return weights(run.model)


def test_a_hook_that_a_plugin_registers_stays_with_its_state_where_the_model_is_wrapped_again(ranks):
    frozen = ["freeze:patterns=0,until=1ep"]
    for (found, calls, wrapped), expected in zip(ranks(2, train_with_a_hook_of_a_plugin, frozen), ranks(2, train_at_half_the_rate, frozen), strict=True):
        assert wrapped == 3
        assert calls >= 12
        assert all(torch.equal(found[key], expected[key]) for key in found)


class LeaveAfter:
    def __init__(self, steps):
        self.steps = steps

    @hookimpl
    def after_step(self, run: Run):
        if run.attempts == self.steps:
            run.leave = "on purpose"


def leave(spec, plugins, steps, out):
    train(spec, [*plugins, "checkpoint", LeaveAfter(steps)], out=out)


# After its first step, so after a resume as well, DistributedDataParallel has other buckets.
@pytest.mark.parametrize("plugins", [[], ["accumulate:every=2", "ema"]], ids=["plain", "accumulate"])
def test_powersgd_resumes_with_the_same_bits(ranks, tmp_path, plugins):
    whole = ranks(2, train, POWER_SGD, plugins, 4)
    ranks(2, leave, POWER_SGD, plugins, 6, tmp_path)
    resumed = ranks(2, train_on, POWER_SGD, plugins, tmp_path)
    for one, (other, warned) in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert not warned


def train_on(spec, plugins, out):
    with Warned() as warned:
        found = train(spec, [*plugins, "checkpoint"], 4, out=out, resume=out)
    return found, warned.lines


class Warned(logging.Handler):
    """The lines that loopctl logs meanwhile."""

    def __enter__(self):
        self.lines = []
        logging.getLogger("loopctl").addHandler(self)
        return self

    def emit(self, record):
        self.lines.append(record.getMessage())

    def __exit__(self, *error):
        logging.getLogger("loopctl").removeHandler(self)


def test_with_another_number_of_processes_powersgd_says_that_its_errors_begin_at_zero(ranks, tmp_path):
    ranks(2, leave, POWER_SGD, [], 6, tmp_path)
    for _, warned in ranks(3, train_on, POWER_SGD, [], tmp_path):
        assert any("the errors that powersgd has left in each process are not those of this run" in line for line in warned)


class NotFinite:
    """A batch that is not finite from the second epoch on, of which nan_guard makes no update."""

    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == 4:
            run.batches[0][0].fill_(float("nan"))


def updates():
    return fit(network(), LOSS, SGD, batches(8), epochs=3, plugins=[POWER_SGD, NotFinite(), "nan_guard:action=skip"], seed=0).step


def test_gradients_that_are_not_finite_leave_no_error_behind(ranks):
    assert ranks(2, updates) == [12 - 2] * 2            # of twelve steps, those with this batch made no update


REFUSED = {
    "ddp:start_powerSGD_iter=3": "options of comm_hook=powersgd",
    "ddp:comm_hook=powersgd,start_powerSGD_iter=1": "start_powerSGD_iter is at least 2, not 1",
    "ddp:comm_hook=powersgd,matrix_approximation_rank=0": "matrix_approximation_rank is at least 1, not 0",
}


@pytest.mark.parametrize("spec", REFUSED)
def test_options_that_make_no_sense_are_refused(spec):
    with pytest.raises(UsageError, match=REFUSED[spec]):
        train(spec)


@pytest.mark.parametrize(("spec", "plugins", "reason"), [
    ("ddp:comm_hook=powersgd", [], "start_powerSGD_iter=1000 is not before the run's end, after 12 steps"),
    (POWER_SGD, ["amp:dtype=float16"], "amp scales them by a factor that changes"),
    (POWER_SGD, ["freeze:patterns=4,until=1ep"], "without a gradient"),
], ids=["never", "float16", "frozen"])
def test_runs_in_which_powersgd_cannot_work_are_refused(ranks, spec, plugins, reason):
    with pytest.raises(UsageError, match=reason):
        ranks(2, train, spec, plugins)
