"""One trial: what it measures, and that it ends."""
import contextlib
import sys
import time
from functools import partial
from math import isnan

import pytest
import torch
from torch import nn

from loopctl import Run, fit, hookimpl
from loopctl.tuning import trial
from loopctl.tuning.choices import Choice
from loopctl.tuning.trial import OutOfTime, Repeated, middle_half, run_trial, time_limit

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1)
CPU = torch.device("cpu")


def arguments(model, batches, **more):
    return {"model": model, "loss_fn": cross_entropy, "optimizer": sgd, "train": batches, "valid": None, "plugins": []} | more


def test_it_has_the_losses_of_the_run(plain, batches, clone):
    class Losses:
        @hookimpl
        def after_step(self, run: Run):
            found.append(float(run.loss))

    found = []
    fit(clone(plain), cross_entropy, sgd, batches[:7], plugins=[Losses(), "clip:max_norm=0.1"], epochs=9)
    result = run_trial(arguments(plain, batches, plugins=["clip:max_norm=0.1"]), (), Repeated(batches[:7], 1000), CPU, 0.0, 60.0)
    assert result.losses == found[:len(result.losses)]
    assert len(result.losses) >= trial.LEAST_STEPS
    assert result.rate > 0
    assert not result.reason
    assert not result.draws
    assert 0.05 < result.memory / 2**30 < 50


def test_the_choices_act(plain, batches):
    class Seen:
        @hookimpl
        def before_step(self, run: Run):
            seen.append((torch.get_num_threads(), run.optimizer.defaults["fused"], [*run.hook.plugins]))

    seen = []
    composition = (Choice("a", ("clip:max_norm=1",)), Choice("b", optimizer=(("fused", True),)), Choice("c", settings=(("threads", 2),)))
    run_trial(arguments(plain, batches, plugins=[Seen(), "csv"]), composition, Repeated(batches[:7], 1000), CPU, 0.0, 60.0)
    assert seen == []               # plugins are copied, and those that only observe are left out

    class Acting(Seen):
        @hookimpl
        def grads_ready(self): ...

        def __deepcopy__(self, memo):
            return self

    run_trial(arguments(plain, batches, plugins=[Acting(), "csv"]), composition, Repeated(batches[:7], 1000), CPU, 0.0, 60.0)
    assert seen[0] == (2, True, ["acting", "clip", "clock"])
    assert torch.get_num_threads() == 1


def test_a_run_with_random_numbers_in_its_steps_is_recognised(net, batches):
    assert run_trial(arguments(net, batches), (), Repeated(batches[:7], 1000), CPU, 0.0, 60.0).draws


def test_every_trial_starts_with_the_same_random_numbers(net, batches):
    """Also without a seed, so that losses can be compared."""
    before = torch.get_rng_state()
    one, other = (run_trial(arguments(net, batches), (), Repeated(batches[:7], 1000), CPU, 0.0, 60.0) for _ in range(2))
    assert one.losses[:8] == other.losses[:8]
    assert torch.equal(torch.get_rng_state(), before)


def test_rounding_the_weights_otherwise_changes_the_loss_a_little(plain, batches):
    weights = {name: value.clone() for name, value in plain.state_dict().items()}
    losses = [run_trial(arguments(plain, batches), (), Repeated(batches[:7], 1000), CPU, 0.0, 60.0, noise=noise).losses[5]
              for noise in (0.0, 2**-23, 2**-8)]
    assert 0 < abs(losses[1] - losses[0]) < 1e-5 < abs(losses[2] - losses[0]) < 1e-2
    assert all(torch.equal(value, weights[name]) for name, value in plain.state_dict().items())


def test_the_data_is_read_in_whole_epochs_with_their_evaluations_left_out(plain, batches):
    class Slow(list):
        def __init__(self, batches, seconds):
            super().__init__(batches)
            self.seconds = seconds

        def __iter__(self):
            time.sleep(self.seconds)
            return super().__iter__()

    # What happens in the first epoch, such as compiling for the last batch, does not count.
    delays = iter([2.0])
    plain.register_forward_hook(lambda module, inputs, output: time.sleep(next(delays, 0) if len(inputs[0]) == 3 else 0))
    data = Slow([*batches[:4], batches[7]], 0.02)
    result = run_trial(arguments(plain, batches, valid=Slow(batches[:1], 0.3)), (), data, CPU, 0.1, 60.0)
    assert 32 / 0.2 < result.rate < 32 / 0.02           # an epoch of 32 samples takes 20 ms and more, its evaluation 300 ms


def test_a_slow_trial_ends_early(plain, batches):
    result = run_trial(arguments(plain, batches), (), Repeated(batches[:7], 1000), CPU, 60.0, 60.0, slowest=1e9)
    assert len(result.losses) == 2 + trial.LEAST_STEPS // 2


def test_a_trial_that_hangs_is_given_up(plain, batches):
    plain.register_forward_hook(lambda module, inputs, output: time.sleep(20))
    result = run_trial(arguments(plain, batches), (), Repeated(batches[:7], 1000), CPU, 0.1, 0.2)
    assert isnan(result.rate)
    assert result.reason == "gave no result within 0 s"
    assert result.seconds < 10


@pytest.mark.parametrize(("plugin", "reason"), [
    ("clip:max_norm=-1", "clip: max_norm is above 0"), ("cudagraph", "cudagraph: CUDA graphs need a GPU"),
])
def test_a_composition_that_cannot_be_has_a_reason_in_place_of_a_rate(plain, batches, plugin, reason):
    result = run_trial(arguments(plain, batches), (Choice("a", (plugin,)),), Repeated(batches[:7], 1000), CPU, 0.0, 60.0)
    assert isnan(result.rate)
    assert result.reason.startswith(reason)


def test_an_error_of_any_type_is_a_reason(plain, batches):
    plain.register_forward_hook(lambda module, inputs, output: 1 / 0)
    result = run_trial(arguments(plain, batches), (), Repeated(batches[:7], 1000), CPU, 0.0, 60.0)
    assert result.reason == "ZeroDivisionError: division by zero"


def test_the_middle_half_leaves_out_the_fastest_and_the_slowest_quarter():
    assert middle_half([10] * 8, [1, 1, 2, 2, 2, 2, 50, 99]) == 5
    assert middle_half([10, 20], [1, 2]) == 10
    assert middle_half([10, 10, 40], [1, 1, 1]) == pytest.approx(20)


def test_a_trial_is_left_after_a_step_when_its_time_is_over(plain, batches):
    plain.register_forward_hook(lambda module, inputs, output: time.sleep(0.1))
    result = run_trial(arguments(plain, batches), (), Repeated(batches[:7], 1000), CPU, 60.0, 0.5)
    assert result.rate > 0
    assert len(result.losses) < 10


def test_an_exception_that_python_drops_is_raised_again(monkeypatch):
    """As in a destructor."""
    class Slow:
        def __del__(self):
            time.sleep(0.2)

    def wait():
        Slow()
        time.sleep(5)

    dropped = []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    monkeypatch.setattr(trial, "RETRY", 0.2)
    with pytest.raises(OutOfTime), time_limit(0.1):
        wait()
    assert len(dropped) == 1


def test_code_that_catches_every_exception_cannot_catch_the_end_of_the_time():
    def try_again():                    # as torch.compile does, to go on without compiling
        for _ in range(2):
            with contextlib.suppress(Exception):
                time.sleep(1)

    with pytest.raises(OutOfTime), time_limit(0.05):
        try_again()
    time.sleep(0.06)                    # the timer is off
