"""The plugin ddp: several processes make the same updates as one process with all their batches."""
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import Run, fit, hookimpl
from loopctl.composition.compose import compose
from loopctl.loop import DEFAULTS
from loopctl.prepare import prepare

LOSS = nn.CrossEntropyLoss()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def batches(*sizes, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 6, generator=random, dtype=torch.float64), torch.randint(0, 3, (size,), generator=random))
            for size in sizes]


def accuracy(output, target):
    return (output.argmax(1) == target).double().mean()


def train_with_ddp(plugins, optimizer, sizes, epochs, settings):
    """Runs in every process: train with ddp, and return the weights, the history and run.stop."""
    run = fit(network(), LOSS, optimizer, batches(*sizes), batches(8, 5, 7, seed=1), epochs=epochs, plugins=["ddp", *plugins],
              metrics={"accuracy": accuracy}, seed=0, **settings)
    return {name: value.clone() for name, value in run.model.state_dict().items()}, run.history, run.stop


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
EVEN, UNEVEN = [8] * 6, [8, 8, 8, 3, 8, 8, 5]
CASES = {
    "plain": ([], SGD, EVEN), "uneven": ([], SGD, UNEVEN), "accumulate": (["accumulate:every=2"], SGD, UNEVEN),
    "agc": (["agc"], SGD, UNEVEN), "clip auto": (["clip:auto=50"], SGD, UNEVEN), "noise": (["grad_noise:eta=1e-4", "grad_centralize"], SGD, UNEVEN),
    "clip": (["clip:max_norm=0.1"], SGD, UNEVEN), "amp": (["amp:dtype=bfloat16"], SGD, UNEVEN),
    "ema": (["ema:decay=0.9"], SGD, UNEVEN), "swa": (["swa:start=50%"], SGD, UNEVEN),
    "adamw": ([], partial(torch.optim.AdamW, lr=0.01), UNEVEN),
    "lbfgs": ([], partial(torch.optim.LBFGS, lr=0.1, max_iter=2), UNEVEN),
    "plateau": (["plateau:patience=0,threshold=0.5"], SGD, UNEVEN), "split": (["split:into=2"], SGD, UNEVEN),
}


@pytest.mark.compares(use="ddp", technique="the weights of one process with the batches of all",
                      source="the run of one process", tolerance="1e-10: sums are in another order")
@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_weights_equal_those_of_one_process_with_the_same_global_batches(ranks, case, number):
    plugins, optimizer, sizes = CASES[case]
    steps = -(-len(sizes) // number)
    epochs = -(-50 // steps)
    found = ranks(number, train_with_ddp, plugins, optimizer, sizes, epochs, {})
    every = 2 * number if case == "accumulate" else number
    others = [plugin for plugin in plugins if case != "accumulate"]
    run = fit(network(), LOSS, optimizer, batches(*sizes), batches(8, 5, 7, seed=1), epochs=epochs,
              plugins=[f"accumulate:every={every}", *others], metrics={"accuracy": accuracy}, seed=0)
    for weights, history, _ in found:
        for name, value in run.model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-10, atol=1e-10)
            assert torch.equal(weights[name], found[0][0][name])
        assert history == found[0][1]
        for row, expected in zip(history, run.history, strict=True):
            assert row == pytest.approx(expected, abs=1e-10)


def train_with_lbfgs(number):
    """LBFGS compares losses. With the loss of its own shard only, each process would stop at another point."""
    optimizer = partial(torch.optim.LBFGS, lr=0.3, max_iter=20, tolerance_change=0.01)
    run = fit(network(), LOSS, optimizer, batches(*[8] * 2 * number), plugins=["ddp"], seed=0)
    return {name: value.clone() for name, value in run.model.state_dict().items()}, [len(run.optimizer.state), run.step]


@pytest.mark.parametrize("number", [2, 3])
def test_an_optimizer_that_uses_the_loss_gets_the_same_loss_in_every_process(ranks, number):
    found = ranks(number, train_with_lbfgs, number)
    single = fit(network(), LOSS, partial(torch.optim.LBFGS, lr=0.3, max_iter=20, tolerance_change=0.01), batches(*[8] * 2 * number),
                 plugins=[f"accumulate:every={number}"], seed=0)
    for weights, _ in found:
        for name, value in single.model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=1e-8, atol=1e-8)


class Fail:
    @hookimpl
    def after_step(self, run: Run):
        raise ValueError("on purpose")


def network_before_and_after(plugins):
    """The class of run.network before training, and whether it is the plain model after training."""
    run = Run(network(), LOSS, SGD, batches(*EVEN), hook=compose(["ddp", *plugins], DEFAULTS))
    prepare(run, {}, None, 0)
    wrapper = type(run.network)
    with nullcontext() if not plugins else pytest.raises(ValueError, match="on purpose"):
        run.hook.train(run=run)
    return wrapper.__name__, run.network is run.model


@pytest.mark.parametrize("plugins", [[], [Fail()]], ids=["ended", "failed"])
def test_the_model_is_unwrapped_after_training(ranks, plugins):
    assert ranks(2, network_before_and_after, plugins) == [("DistributedDataParallel", True)] * 2
