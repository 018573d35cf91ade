"""The plugin bf16, compared with plain loops, to the bit: stochastic rounding and float32 master weights."""
import copy
from functools import partial

import pytest
import torch
from torch import nn

from loopctl import UsageError, fit, hookimpl
from loopctl.checkpoint.state import capture_state
from loopctl.optim.stand_ins import round_stochastically
from loopctl.testing import tiny_run
from loopctl.testing.comparison import first_difference, run_result
from loopctl.testing.tiny import tiny_batches, tiny_model

BOTH = pytest.mark.parametrize("plugin", ["bf16", "bf16:master_weights=true"])
OPTIMIZERS = [partial(torch.optim.SGD, lr=0.1, momentum=0.9), partial(torch.optim.AdamW, lr=0.01), partial(torch.optim.Adam, lr=0.01, foreach=False)]


def plain_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 3))


def by_hand(net, make_optimizer, batches, epochs, masters, max_norm=None, per_step=1):
    """Weights in bfloat16; an optimizer of float32 copies, from which the weights are rounded."""
    random = torch.Generator().manual_seed(0)           # the seed of the run
    net.to(torch.bfloat16)
    weights = list(net.parameters())
    wide = [master.clone() for master in masters] if masters else [weight.detach().float() for weight in weights]
    optimizer = make_optimizer(wide)
    for _ in range(epochs):
        for start in range(0, len(batches), per_step):
            net.zero_grad()
            group = batches[start:start + per_step]
            total = sum(len(y) for _, y in group)
            for x, y in group:
                (nn.functional.cross_entropy(net(x.bfloat16()).float(), y) * (len(y) / total)).backward()
            if max_norm:
                nn.utils.clip_grad_norm_(weights, max_norm)
            for weight, copied in zip(weights, wide, strict=True):
                if not masters:
                    copied.copy_(weight.detach())
                copied.grad = weight.grad.float()
            optimizer.step()
            for weight, copied in zip(weights, wide, strict=True):
                weight.data.copy_(copied if masters else round_stochastically(copied, random))
    return net.float()


@BOTH
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw", "adam"])
@pytest.mark.compares(use="bf16", technique="weights in bfloat16 with stochastic rounding (arXiv:2010.06192) or master weights", source="the loop by hand", tolerance="to the bit")
def test_it_is_the_loop_by_hand(plugin, optimizer, same):
    batches, net = tiny_batches(8, 8, 5), plain_net()
    masters = [weight.detach().clone() for weight in net.parameters()] if "master" in plugin else []
    expected = by_hand(copy.deepcopy(net), optimizer, batches, 3, masters)
    run = tiny_run(plugin, model=net, optimizer=optimizer, train=batches, epochs=3)
    same(run.model, expected)


@BOTH
def test_with_clipping_and_accumulation_it_is_the_loop_by_hand(plugin, same):
    batches, net = tiny_batches(8, 8, 8, 8), plain_net()
    masters = [weight.detach().clone() for weight in net.parameters()] if "master" in plugin else []
    expected = by_hand(copy.deepcopy(net), OPTIMIZERS[0], batches, 2, masters, max_norm=0.1, per_step=2)
    same(tiny_run(plugin, "clip:max_norm=0.1", "accumulate:every=2", model=net, train=batches).model, expected)


def test_rounding_is_right_on_average_and_between_the_two_neighbours():
    """Stochastic rounding as in arXiv:2010.06192: up with the probability of the distance from below."""
    random = torch.Generator().manual_seed(0)
    low, step = 1.0, 2 ** -7                    # neighbours of bfloat16 above 1
    value = torch.full((100_000,), low + 0.3 * step)
    rounded = round_stochastically(value, random).float()
    assert set(rounded.tolist()) == {low, low + step}
    assert abs((rounded == low + step).float().mean().item() - 0.3) < 0.01         # seven standard deviations
    assert torch.equal(round_stochastically(-value, random).float().unique(), torch.tensor([-low - step, -low]))


def test_what_bfloat16_has_stays_and_what_is_not_finite_too():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)          # all numbers of bfloat16
    rounded = round_stochastically(every.float(), torch.Generator())
    assert torch.equal(rounded.nan_to_num(7.0), every.nan_to_num(7.0))
    assert torch.equal(rounded.isnan(), every.isnan())
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)                # adding to it would make it 0
    assert round_stochastically(nan, torch.Generator()).isnan().all()


@BOTH
def test_updates_that_bfloat16_would_lose_are_not_lost(plugin):
    """A thousand updates of 1/1000 of what separates 1 from its neighbour: plain bfloat16 stays at 1."""
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x):
            return self.weight.sum() * 2 ** -7 * x

    run = fit(One(), lambda output, target: -output.mean(), partial(torch.optim.SGD, lr=0.001), [(torch.ones(1), torch.ones(1))] * 1000,
              plugins=[plugin], seed=0)
    assert abs(run.model.weight.mean().item() - (1 + 2 ** -7)) < 0.001


@BOTH
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_same(plugin, tmp_path):
    class Leave:
        @hookimpl
        def after_step(self, run):
            run.leave = "enough" if run.attempts == 7 else ""

    adam = partial(torch.optim.Adam, lr=0.01)
    whole = tiny_run(plugin, "ema:decay=0.9", optimizer=adam)
    tiny_run(plugin, "ema:decay=0.9", "checkpoint", Leave(), optimizer=adam, out=tmp_path)
    resumed = tiny_run(plugin, "ema:decay=0.9", "checkpoint", optimizer=adam, out=tmp_path, resume=tmp_path)
    assert not first_difference(run_result(whole, ()), run_result(resumed, ()))


class Look:
    """Looks at the dtypes of everything in a step."""

    def __init__(self):
        self.found = {}

    @hookimpl
    def grads_ready(self, run):
        self.found |= {"weights": {p.dtype for p in run.model[0].parameters()}, "grads": {p.grad.dtype for p in run.model[0].parameters()},
                       "norm": run.model[1].weight.dtype, "statistics": run.model[1].running_mean.dtype, "outputs": run.outputs.dtype}

    @hookimpl
    def safe_point(self, run):
        saved = capture_state(run)
        self.found |= {"saved": saved["model"]["0.weight"].dtype, "momentum": saved["optimizer"]["state"][0]["momentum_buffer"].dtype,
                       "names": saved["parameters"], "masters": {t.dtype for t in saved["plugins"]["bf16"]["masters"].values()}}


@BOTH
def test_weights_and_gradients_are_bfloat16_and_the_state_of_the_optimizer_is_float32(plugin):
    look, net = Look(), tiny_model()
    tiny_run(plugin, look, model=net)
    half, single = torch.bfloat16, torch.float32
    assert look.found == {"weights": {half}, "grads": {half}, "norm": single, "statistics": single, "outputs": single, "saved": half,
                          "momentum": single, "names": [[name for name, _ in net.named_parameters()]],
                          "masters": {single} if "master" in plugin else set()}
    assert {tensor.dtype for tensor in net.parameters()} == {single}            # after the run
    assert not net._forward_hooks
    assert not net._forward_pre_hooks


def test_a_table_in_a_buffer_is_as_before_after_the_run():
    """RoPE's frequencies in bfloat16 were reported to spoil a model for good."""
    net = plain_net()
    table = torch.rand(9)
    net.register_buffer("frequencies", table.clone())
    tiny_run("bf16", model=net)
    assert torch.equal(net.frequencies, table)


def test_a_ready_made_optimizer_holds_the_parameters_of_the_model_after_the_run_and_after_an_error():
    net = plain_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    tiny_run("bf16", model=net, optimizer=optimizer)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [*map(id, net.parameters())]
    assert {id(p) for p in optimizer.state} == {*map(id, net.parameters())}

    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise KeyError("in the step")

    failing = Fails(net.parameters(), lr=0.1)
    with pytest.raises(KeyError):
        tiny_run("bf16", model=net, optimizer=failing)
    assert [id(p) for group in failing.param_groups for p in group["params"]] == [*map(id, net.parameters())]


def in_two_processes(plugin):
    run = fit(plain_net(), nn.CrossEntropyLoss(), lambda groups: torch.optim.SGD(groups, lr=0.1), tiny_batches(8, 8, 8, 8), epochs=2, seed=0,
              plugins=["ddp", plugin])
    return run.model.state_dict()


def test_two_processes_with_ddp_have_equal_weights(ranks):
    for plugin in ("bf16", "bf16:master_weights=true"):
        first, second = ranks(2, in_two_processes, plugin)
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        assert not torch.equal(first["0.weight"], plain_net()[0].weight.bfloat16().float())


class TwoGradients(torch.optim.SGD):
    """An optimizer that changes the weights and calls the closure again."""

    def step(self, closure):
        super().step()
        return closure()


@pytest.mark.parametrize(("arguments", "message"), [
    ({"plugins": ["amp"]}, "amp computes in half precision too"),
    ({"plugins": ["fsdp"]}, "use fsdp:param_dtype=bfloat16"),
    ({"optimizer": torch.optim.LBFGS}, "LBFGS computes gradients several times per step; use another optimizer"),
    ({"optimizer": partial(TwoGradients, lr=0.1)}, "the optimizer computes gradients again within its step; use another optimizer"),
])
def test_what_cannot_be_done_is_refused(arguments, message):
    with pytest.raises(UsageError, match="bf16: ") as caught:
        tiny_run("bf16", **arguments)
    assert message in str(caught.value)
