"""nan_guard against the loop that leaves bad steps out by hand, and against a run that never meets them."""
import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint import step_guard
from loopctl.checkpoint.state import capture_state, roll_back
from loopctl.plugins.amp import Amp
from loopctl.plugins.nan_guard import NanGuard
from tests.conftest import sync_debug_mode

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2)
adam = partial(torch.optim.Adam, lr=1e-2)
adamw = partial(torch.optim.AdamW, lr=1e-2, amsgrad=True)
lbfgs = partial(torch.optim.LBFGS, lr=0.5, max_iter=4)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

# Numbers of calls of the loss, from 1: the first of all, two in a row, one in another epoch of 8 batches.
BAD = {1: "loss", 4: "gradient", 5: "loss", 10: "gradient"}


class Loss:
    """Cross-entropy; in the calls numbered in `bad` the loss, or the gradient alone, is `value`."""

    def __init__(self, bad=None, value=math.nan):
        self.bad, self.value, self.calls = bad or {}, value, 0

    def __call__(self, output, target):
        if not torch.is_grad_enabled():         # an evaluation
            return cross_entropy(output, target)
        self.calls += 1
        what = self.bad.get(self.calls)
        if what == "gradient":
            output = Times.apply(output, self.value)
        loss = cross_entropy(output, target)
        return loss * self.value if what == "loss" else loss


class Times(torch.autograd.Function):
    """Leaves what it is given, and multiplies its gradient."""

    @staticmethod
    def forward(ctx, input, factor):
        ctx.factor = factor
        return input.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class Counting(torch.optim.SGD):
    """An optimizer of one's own: counts its steps on the host, in a group and in a state, gradients or not."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.param_groups[0]["steps"] = 0

    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        group = self.param_groups[0]
        group["steps"] += 1
        for parameter in group["params"]:
            state = self.state[parameter]
            state["steps"] = state.get("steps", 0) + 1
            state.setdefault("seen", []).append(group["steps"])
            with torch.no_grad():
                parameter.mul_(1 - 0.01 / state["steps"])
        super().step()
        return loss


class Watch:
    """Sees that a skipped step changes nothing: at its end, at the safe point and in a checkpoint."""

    def __init__(self):
        self.skipped, self.losses, self.steps = [], [], []

    def all(self, run):
        return copy.deepcopy([list(run.model.state_dict().values()), list(run.optimizer.state_dict()["state"].items())])

    @hookimpl
    def before_step(self, run: Run):
        self.before = self.all(run)

    @hookimpl
    def after_step(self, run: Run):
        self.skipped.append(run.skipped)
        self.losses.append(run.loss.item())
        self.steps.append(run.step)
        if run.skipped:
            torch.testing.assert_close(self.all(run), self.before, rtol=0, atol=0)

    @hookimpl
    def safe_point(self, run: Run):
        if run.skipped:
            torch.testing.assert_close(self.all(run), self.before, rtol=0, atol=0)


def by_hand(model, optimizer, batches, epochs, loss_fn, every=1, max_norm=None):
    """Leaves out each step whose loss or gradient is not finite; returns the numbers of those, from 1."""
    torch.manual_seed(1)
    out, steps, statistics = [], 0, list(model.buffers())
    for _ in range(epochs):
        model.train()
        for start in range(0, len(batches), every):
            group, steps = batches[start:start + every], steps + 1
            size = sum(len(target) for _, target in group)
            before = [buffer.clone() for buffer in statistics]
            optimizer.zero_grad()
            total = 0.0
            for input, target in group:
                loss = loss_fn(model(input), target)
                if len(group) > 1:
                    loss = loss * (len(target) / size)
                loss.backward()
                total += loss.item()
            if not (math.isfinite(total) and all(p.grad.isfinite().all() for p in model.parameters())):
                out.append(steps)
                for buffer, was in zip(statistics, before, strict=True):
                    buffer.copy_(was)
                continue
            if max_norm:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
    return out


def skipped(watch):
    return [number for number, is_skipped in enumerate(watch.skipped, 1) if is_skipped]


def state_of(run):
    """The optimizer's state, of a run that may have been on other parameters."""
    return list(run.optimizer.state_dict()["state"].items())


class Slow:
    """Stands in for a CUDA event: what was sent arrives two steps later."""

    number = 0

    def __init__(self):
        Slow.number += 1
        self.due = Slow.number + 2

    def query(self):
        return Slow.number >= self.due

    def synchronize(self):
        pass


@pytest.fixture
def ahead(monkeypatch):
    """Have the CPU treated as a device that the host does not read."""
    send = NanGuard.send_verdict

    def sent(self, run):
        send(self, run)
        self.coming[-1][1].event = Slow()

    monkeypatch.setattr(step_guard, "ASYNCHRONOUS", ("cpu",))
    monkeypatch.setattr(NanGuard, "send_verdict", sent)


@pytest.mark.compares(use="nan_guard", technique="a step with a loss or gradient that is not finite is left out",
                      source="the loop by hand", tolerance="to the bit")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("factory", [sgd, adam, adamw, partial(torch.optim.RMSprop, momentum=0.9)], ids=lambda factory: factory.func.__name__)
def test_bit_for_bit_the_loop_that_leaves_bad_steps_out(net, batches, clone, same, factory, value):
    other, watch = clone(net), Watch()
    run = fit(net, Loss(BAD, value), factory, batches, epochs=2, plugins=[NanGuard("skip"), watch], seed=1)
    optimizer = factory(other.parameters())
    assert by_hand(other, optimizer, batches, 2, Loss(BAD, value)) == skipped(watch) == [1, 4, 5, 10]
    same(net, other)
    torch.testing.assert_close(state_of(run), list(optimizer.state_dict()["state"].items()), rtol=0, atol=0)
    assert (run.step, run.attempts, run.seen, run.metrics["skipped_steps"], run.stop) == (12, 16, 16, 4, "")
    assert watch.steps[:6] == [0, 1, 2, 2, 2, 3]
    assert [row["skipped_steps"] for row in run.history] == [3, 4]


@pytest.mark.parametrize("where", [0, 3, 7])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_batches(net, batches, clone, same, where, value):
    """The usual case: a number in the input that spoils loss, gradients and BatchNorm statistics at once."""
    other, spoilt = clone(net), [(input.clone(), target) for input, target in batches]
    spoilt[where][0][1, 2] = value
    run = fit(net, cross_entropy, sgd, spoilt, epochs=2, plugins=["nan_guard:action=skip"], seed=1)
    assert by_hand(other, sgd(other.parameters()), spoilt, 2, cross_entropy) == [where + 1, where + 9]
    same(net, other)
    assert net[1].running_var.isfinite().all()
    assert run.step == net[1].num_batches_tracked == 14


@pytest.mark.parametrize("order", [1, -1])
def test_one_bad_micro_batch_spoils_its_step(net, batches, clone, same, order):
    other, watch = clone(net), Watch()
    plugins = [NanGuard("skip"), "accumulate:every=3", "clip:max_norm=0.1", watch][::order]
    fit(net, Loss({5: "loss", 7: "gradient"}), sgd, batches, epochs=2, plugins=plugins, seed=1)
    optimizer = sgd(other.parameters())
    assert by_hand(other, optimizer, batches, 2, Loss({5: "loss", 7: "gradient"}), 3, 0.1) == skipped(watch) == [2, 3]
    same(net, other)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_clipping_hides_nothing(batches, clone, same, order, value):
    """An infinite gradient clipped to a value is finite, and one that was left out is not measured as 0."""
    model, watch = nn.Linear(6, 3), Watch()
    data, other = [tuple(part[:1] for part in batch) for batch in batches], clone(model)     # no inf - inf in one sample
    clips = ["clip:value=0.1", "loopctl.plugins.clip:Clip:max_norm=0.1"]
    run = fit(model, Loss({8: "gradient"}, value), sgd, data, plugins=[*[*clips, NanGuard("skip")][::order], watch])
    assert skipped(watch) == [8]
    assert not 0 <= run.metrics["grad_norm"] < 0.1
    fit(other, cross_entropy, sgd, data[:7], plugins=clips[::order])
    same(model, other)


@pytest.mark.parametrize("order", [1, -1])
def test_ema_averages_no_skipped_step(net, batches, valid, clone, same, order):
    other, bad = clone(net), Loss(BAD)
    plugins = [NanGuard("skip"), "ema:decay=0.9,warmup=false"][::order]
    run = fit(net, Loss(BAD), sgd, batches, valid, epochs=2, plugins=plugins, seed=1)
    optimizer = sgd(other.parameters())
    averaged = AveragedModel(other, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(other))
    by_hand(other, optimizer, batches, 2, bad)
    averaged.module[1].num_batches_tracked = other[1].num_batches_tracked       # torch averages the count too
    same(net, averaged.module)
    assert math.isfinite(run.metrics["val_loss"])


OTHERS = [
    (lbfgs, []), (partial(lbfgs, line_search_fn="strong_wolfe"), []), (partial(Counting, lr=0.1, momentum=0.9), []),
    (sgd, ["loopctl.plugins.sam:Sam:rho=0.5"]), (adam, ["loopctl.plugins.sam:Sam", "clip:max_norm=0.1"]),
    (sgd, ["split:into=3"]), (adam, ["amp:dtype=bfloat16", "layerwise_lr:decay=0.5", "ema"]),
    (partial(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True), []), (partial(adam, fused=True), ["clip"]),
    (partial(torch.optim.Adagrad, lr=0.1), []), (partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5), []),
]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("number", range(len(OTHERS)))
def test_as_if_the_bad_batches_had_never_been_there(net, batches, clone, same, number, order):
    """Where nothing is random; the first step of all is bad, and two in a row."""
    (factory, plugins), other, watch = OTHERS[number], clone(net), Watch()
    net[3].p = other[3].p = 0.0
    spoilt = [(input.clone(), target) for input, target in [*batches[:6], *batches[:6]]]
    for where, value in ((0, math.nan), (4, math.inf), (5, -math.inf), (10, math.nan)):
        spoilt[where][0][2, 1] = value
    run = fit(net, cross_entropy, factory, spoilt, plugins=[*[*plugins, NanGuard("skip")][::order], watch])
    assert skipped(watch) == [1, 5, 6, 11]
    good = [spoilt[place] for place in range(12) if place not in (0, 4, 5, 10)]
    left = fit(other, cross_entropy, factory, good, plugins=plugins[::order])
    same(net, other)
    torch.testing.assert_close(state_of(run), state_of(left), rtol=0, atol=0)
    assert (run.step, run.metrics["skipped_steps"]) == (8, 4)
    if factory.func is Counting:
        assert run.optimizer.param_groups[0]["steps"] == 8


class Twice:
    """Has gradients computed two times; the first are of no use to anybody."""

    @hookimpl(wrapper=True)
    def optimizer_step(self, closure):
        closure()
        return (yield)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("look", [3, 4])
@pytest.mark.parametrize("order", [1, -1])
def test_each_time_counts(plain, batches, clone, same, monkeypatch, look, late, order):
    if late:
        monkeypatch.setattr(step_guard, "ASYNCHRONOUS", ("cpu",))
    other = clone(plain)
    run = fit(plain, Loss({look: "gradient"}), sgd, batches, plugins=[Twice(), NanGuard("skip")][::order])
    fit(other, cross_entropy, sgd, [batches[0], *batches[2:]])
    same(plain, other)
    assert run.step == 7


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("look", [3, 4])
def test_each_look_of_sam_counts(net, batches, clone, same, monkeypatch, look, late):
    """The second step's first or second."""
    if late:
        monkeypatch.setattr(step_guard, "ASYNCHRONOUS", ("cpu",))
    other, sam = clone(net), "loopctl.plugins.sam:Sam"
    net[3].p = other[3].p = 0.0
    run = fit(net, Loss({look: "gradient"}), sgd, batches, plugins=[sam, NanGuard("skip")])
    fit(other, cross_entropy, sgd, [batches[0], *batches[2:]], plugins=[sam])
    same(net, other)
    assert run.step == 7


@pytest.mark.parametrize("late", [False, True])
def test_statistics_of_other_norms_and_double_precision(batches, clone, same, monkeypatch, late):
    if late:
        monkeypatch.setattr(step_guard, "ASYNCHRONOUS", ("cpu",))
    model = nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten(),
                          nn.Linear(8, 3))
    other, before = clone(model), clone(model)

    def precise(output, target):
        return cross_entropy(output.double(), target) * 1e300      # beyond float32

    run = fit(model, Loss(dict.fromkeys(range(1, 9), "loss")), sgd, batches, plugins=[NanGuard("skip")])
    same(model, before)
    assert run.step == 0
    assert fit(other, precise, partial(torch.optim.SGD, lr=1e-300), batches[:1], plugins=[NanGuard("skip")]).step == 0     # its gradient is not
    steady = fit(other, lambda output, target: (precise(output, target) - 1e301).detach() + cross_entropy(output, target),
                 sgd, batches, plugins=[NanGuard("skip")])
    assert steady.step == 8


def test_an_error_leaves_nothing_with_the_optimizer(net, batches, ahead):
    """Where it would stand still for ever."""
    class Fails(torch.optim.SGD):
        __module__ = "torch.optim.fails"

        def step(self, closure):
            super().step(closure)
            assert self.found_inf == 0
            raise KeyboardInterrupt

    optimizer = Fails(net.parameters(), lr=0.1, fused=True)
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, optimizer, batches, plugins=[NanGuard()])
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_of_float16_scaling_is_none(net, batches, clone, same, fused):
    other, factory = clone(net), partial(sgd, fused=fused, momentum=0.0)
    plugins = [Amp("float16", 2.0**40), "clip:max_norm=0.1"]
    run = fit(net, cross_entropy, factory, batches, epochs=4, plugins=[NanGuard("skip", limit=1), *plugins], seed=1)
    alone = fit(other, cross_entropy, factory, batches, epochs=4, plugins=[Amp("float16", 2.0**40), plugins[1]], seed=1)
    same(net, other)
    assert 5 < run.step == alone.step < run.attempts == 32
    assert run.metrics["skipped_steps"] == 0
    assert run.stop == ""


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_with_float16_scaling_a_bad_loss_is_bad(net, batches, value, fused):
    """Also where no gradient shows it, so that the scaler sees nothing to skip."""
    class Hides(Loss):
        def __call__(self, output, target):
            loss = super().__call__(output, target)
            return loss + math.inf if not value and self.calls in (3, 4) else loss

    watch, amp = Watch(), Amp("float16", 1024.0)
    loss_fn = Hides({3: "loss", 4: "loss"} if value else {})
    run = fit(net, loss_fn, partial(sgd, fused=fused), batches, plugins=[amp, NanGuard("skip"), watch], seed=1)
    assert skipped(watch) == [3, 4]
    assert (run.step, run.metrics["skipped_steps"]) == (6, 2)
    assert amp.scalers[""].get_scale() == (256.0 if value else 1024.0)


def test_no_optimizer_of_torch_does_anything_without_gradients(plain):
    """Which is how a step is left out; the one exception is known."""
    kinds = {kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)}
    assert torch.optim.Adam in kinds
    input, model = torch.randn(8, 6), nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    for kind in kinds - {torch.optim.Optimizer, torch.optim.LBFGS}:
        optimizer = kind(model.parameters())
        for _ in range(2):
            before = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
            optimizer.zero_grad()
            optimizer.step(lambda: None)
            torch.testing.assert_close([model.state_dict(), optimizer.state_dict()], before, rtol=0, atol=0)
            model(input).pow(2).mean().backward()
            for parameter in model.parameters():
                if kind is torch.optim.SparseAdam:
                    parameter.grad = parameter.grad.to_sparse()
            optimizer.step()


def test_sparse_gradients(clone, same):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3, bias=False))
    model[2].requires_grad_(False)
    batches = [(torch.randint(0, 10, (5, 3)), torch.randint(0, 3, (5,))) for _ in range(6)]
    other = clone(model)
    run = fit(model, Loss({1: "gradient", 3: "gradient"}), torch.optim.SparseAdam, batches, plugins=[NanGuard("skip")])
    fit(other, cross_entropy, torch.optim.SparseAdam, [batches[1], *batches[3:]])
    same(model, other)
    assert run.step == 4


def test_a_line_search_may_look_where_nothing_is_finite(clone, same):
    """torch's finds its way back; what it then ends with is finite, and so nobody's business."""
    torch.manual_seed(0)
    model, looks = nn.Linear(5, 1, bias=False), []
    batches = [(torch.randn(20, 5), torch.randn(20, 1) * 3)]

    def walled(output, target):
        loss = (output - target).pow(2).mean()
        if model.weight.abs().max() > 1:
            loss = loss / 0.0
        looks.append(loss.item())
        return loss

    search = partial(torch.optim.LBFGS, max_iter=10, line_search_fn="strong_wolfe")
    other, run = clone(model), fit(model, walled, search, batches, epochs=3, plugins=[NanGuard()])
    mine = looks.copy()
    assert math.isfinite(mine[0])
    assert not all(map(math.isfinite, mine))
    assert run.step == 3
    looks.clear()
    model, guarded = other, model
    fit(model, walled, search, batches, epochs=3)
    assert looks == mine
    same(guarded, model)


def test_what_lbfgs_ends_with_is_judged(plain, batches, clone, same):
    """The step's second look is bad, and so is where it leads."""
    other = clone(plain)
    run = fit(plain, Loss({6: "gradient"}), lbfgs, [batches[0]], epochs=2, plugins=[NanGuard()])
    fit(other, cross_entropy, lbfgs, [batches[0]])
    same(plain, other)
    assert (run.step, run.stop[:36]) == (1, "the update of step 2 is not finite; ")


@pytest.mark.parametrize("late", [False, True])
def test_large_is_not_infinite(batches, clone, same, monkeypatch, late):
    """Here the sum of the gradient is infinite, and so is its 2-norm."""
    if late:
        monkeypatch.setattr(step_guard, "ASYNCHRONOUS", ("cpu",))
    model = nn.Linear(6, 3)
    other, seen = clone(model), []

    class Look:
        @hookimpl
        def grads_ready(self, run: Run):
            seen.append(run.model.bias.grad.clone())

    def steep(output, target):
        return (1e38 * (output - output.detach())).sum(1).mean() * 2

    run = fit(model, steep, partial(torch.optim.SGD, lr=1e-39), batches, plugins=[NanGuard(), Look()])
    assert (run.step, run.stop) == (8, "")
    assert seen[0].sum().isinf()
    assert seen[0].norm().isinf()
    fit(other, steep, partial(torch.optim.SGD, lr=1e-39), batches)
    same(model, other)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stop_names_the_step_and_what_is_not_finite(net, batches, clone, same, what):
    other = clone(net)
    run = fit(net, Loss({12: what}), sgd, batches, epochs=5, plugins=["nan_guard"], seed=1)
    assert run.stop == f"the {what} of step 12 is not finite; the step was undone, and action=skip would continue"
    assert (run.step, run.attempts, run.epoch) == (11, 12, 2)
    assert "skipped_steps" not in run.metrics
    by_hand(other, sgd(other.parameters()), batches + batches[:4], 1, Loss({12: what}))
    same(net, other)


def test_limit_counts_steps_in_a_row(net, batches):
    bad = dict.fromkeys([2, 4, 5, 8, 9, 10, 11], "loss")
    run = fit(net, Loss(bad), sgd, batches, epochs=5, plugins=[NanGuard("skip", limit=3)])
    assert (run.attempts, run.step, run.metrics["skipped_steps"]) == (10, 4, 6)
    assert run.stop == "the loss of step 10 is not finite: 3 in a row, which is the limit"
    assert fit(net, Loss(bad), sgd, batches, epochs=2, plugins=[NanGuard("skip", limit=5)]).stop == ""
    assert fit(net, Loss(bad), sgd, batches, plugins=[NanGuard("skip", limit=1)]).attempts == 2


def test_a_resumed_run_goes_on_counting(net, batches, clone, tmp_path):
    plugins = ["nan_guard:action=skip,limit=3", "checkpoint"]
    fit(clone(net), Loss({7: "loss", 8: "loss"}), sgd, batches, plugins=plugins, out=tmp_path)
    run = fit(net, Loss({1: "loss"}), sgd, batches, epochs=2, plugins=plugins, out=tmp_path, resume=tmp_path)
    assert (run.attempts, run.metrics["skipped_steps"]) == (9, 3)
    assert run.stop == "the loss of step 9 is not finite: 3 in a row, which is the limit"


def test_a_resumed_run_may_act_otherwise(net, batches, clone, tmp_path):
    fit(clone(net), Loss(), sgd, batches, plugins=["nan_guard", "checkpoint"], out=tmp_path)
    plugins = ["nan_guard:action=skip", "checkpoint"]
    run = fit(net, Loss({2: "loss"}), sgd, batches, epochs=3, plugins=plugins, out=tmp_path, resume=tmp_path)
    assert run.history[-1]["skipped_steps"] == 1


def test_schedules_do_not_stretch(net, batches, clone):
    other = clone(net)
    run = fit(net, Loss(BAD), sgd, batches, epochs=2, plugins=[NanGuard("skip"), "cosine:by=step", "warmup:length=50%"])
    again = fit(other, cross_entropy, sgd, batches, epochs=2, plugins=["cosine:by=step", "warmup:length=50%"])
    assert [row["lr"] for row in run.history] == [row["lr"] for row in again.history]


@pytest.mark.parametrize("late", [False, True])
def test_max_steps_counts_updates(net, batches, clone, same, request, late):
    """Of a bad last step too: on a device it is waited for."""
    other, bad, given = clone(net), {4: "gradient", 6: "loss", 7: "gradient"}, torch.optim.SGD(net.parameters(), lr=0.1)
    if late:
        request.getfixturevalue("ahead")
    run = fit(net, Loss(bad), given, batches, epochs=2, max_steps=5, plugins=[NanGuard("skip"), watch := Watch()], seed=1)
    assert (run.step, run.attempts) == (5, 8)
    assert skipped(watch) == ([6, 7] if late else [4, 6, 7])
    by_hand(other, torch.optim.SGD(other.parameters(), lr=0.1), batches, 1, Loss(bad))
    same(net, other)


def test_what_is_reported(net, batches):
    """A bad loss shows in the mean of its epoch, a bad gradient does not, and the next epoch is clean."""
    watch = Watch()
    run = fit(net, Loss({3: "loss", 9: "gradient"}), sgd, batches, epochs=2, plugins=[NanGuard("skip"), watch])
    assert math.isnan(watch.losses[2])
    assert math.isnan(run.history[0]["train_loss"])
    assert math.isfinite(run.history[1]["train_loss"])
    assert [row["skipped_steps"] for row in run.history] == [1, 2]


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_saved_is_clean(net, batches, clone, same, tmp_path, order):
    fit(net, Loss({8: "loss"}), sgd, batches, plugins=[NanGuard("skip"), "checkpoint"][::order], out=tmp_path)
    saved = sorted((tmp_path / "checkpoints").glob("*.pt"))
    content = torch.load(saved[-1], weights_only=True)
    other = clone(net)
    other.load_state_dict(content["model"])
    same(net, other)
    assert all(value.isfinite().all() for value in content["model"].values())
    assert content["counters"]["step"] == 7


def test_options_refused(plain, batches):
    with pytest.raises(ValueError, match=r"^limit is at least 1, not 0$"):
        NanGuard(limit=0)
    with pytest.raises(UsageError, match=r"^nan_guard: action takes .*not 'ignore'$"):
        fit(plain, cross_entropy, sgd, batches, plugins=["nan_guard:action=ignore"])
    with pytest.raises(UsageError, match=r"^nan_guard: action=rollback needs checkpoints.*add checkpoint$"):
        fit(plain, cross_entropy, sgd, batches, plugins=["nan_guard:action=rollback"])


# Back to the last checkpoint


def back_by_hand(model, optimizer, batches, epochs, loss_fn):
    """Goes back to the end of the epoch before, and on with the next batches and random numbers."""
    torch.manual_seed(1)
    saved: list = []
    for _ in range(epochs):
        model.train()
        for input, target in batches:
            optimizer.zero_grad()
            loss = loss_fn(model(input), target)
            loss.backward()
            if all(p.grad.isfinite().all() for p in model.parameters()):
                optimizer.step()
            else:
                model.load_state_dict(saved[0])
                optimizer.load_state_dict(copy.deepcopy(saved[1]))       # which would go on with these very tensors
        saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])


@pytest.mark.compares(use="nan_guard:action=rollback", technique="back to a checkpoint, and over the batches, as in arXiv:2204.02311",
                      source="the loop by hand", tolerance="to the bit")
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("factory", [sgd, adam], ids=lambda factory: factory.func.__name__)
def test_rollback_bit_for_bit(net, batches, clone, same, tmp_path, order, factory):
    other, bad = clone(net), {11: "loss", 12: "loss", 21: "gradient", 24: "loss"}
    plugins = [NanGuard("rollback"), "checkpoint", "cosine:by=step"][::order]
    run = fit(net, Loss(bad), factory, batches, epochs=4, plugins=[*plugins, rates := Rates()], seed=1, out=tmp_path)
    optimizer = factory(other.parameters())
    optimizer.register_step_pre_hook(lambda *_: optimizer.param_groups[0].update(lr=rates.seen[loss_fn.calls - 1]))
    loss_fn = Loss(bad)
    back_by_hand(other, optimizer, batches, 4, loss_fn)
    same(net, other)
    assert (run.step, run.attempts, run.epoch, len(run.history), run.stop) == (28, 32, 4, 4, "")
    assert run.metrics["skipped_steps"] == 4


class Rates:
    """The learning rate of every step."""

    def __init__(self):
        self.seen = []

    @hookimpl
    def before_step(self, run: Run):
        self.seen.append(run.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("order", [1, -1])
def test_rollback_takes_the_plugins_along(net, batches, clone, same, tmp_path, order):
    """After a bad last step of an epoch ema's average is that of the epoch before."""
    other = clone(net)
    plugins = [NanGuard("rollback"), "ema:decay=0.9", "checkpoint"][::order]
    fit(net, Loss({16: "loss"}), sgd, batches, epochs=2, plugins=plugins, seed=1, out=tmp_path / "a")
    fit(other, cross_entropy, sgd, batches, epochs=1, plugins=["ema:decay=0.9"], seed=1)
    same(net, other)


def test_rollback_to_where_it_was_resumed(net, batches, clone, same, tmp_path):
    other, plugins = clone(net), [NanGuard("rollback"), "checkpoint"]
    fit(clone(net), cross_entropy, sgd, batches, plugins=plugins, seed=1, out=tmp_path)
    run = fit(net, Loss({8: "loss"}), sgd, batches, epochs=2, plugins=[NanGuard("rollback"), "checkpoint"], out=tmp_path, resume=tmp_path)
    fit(other, cross_entropy, sgd, batches, seed=1)
    same(net, other)
    assert (run.step, run.attempts, run.stop) == (15, 16, "")


def test_rollback_without_a_checkpoint_yet(net, batches, clone, same, tmp_path):
    other = clone(net)
    run = fit(net, Loss({3: "gradient"}), sgd, batches, epochs=2, plugins=[NanGuard("rollback"), "checkpoint"], seed=1, out=tmp_path)
    assert run.stop == "the gradient of step 3 is not finite, and there is no checkpoint yet to go back to"
    assert (run.step, run.attempts) == (2, 3)
    by_hand(other, sgd(other.parameters()), batches[:3], 1, Loss({3: "gradient"}))
    same(net, other)


def test_rollback_comes_to_its_limit(net, batches, tmp_path):
    bad = dict.fromkeys(range(12, 40), "loss")
    run = fit(net, Loss(bad), sgd, batches, epochs=5, plugins=[NanGuard("rollback", 3), "checkpoint"], out=tmp_path)
    assert run.stop == "the loss of step 14 is not finite: 3 in a row, which is the limit"
    assert (run.step, run.attempts) == (11, 14)


# On a device that the host does not read


FACTORIES = [sgd, partial(sgd, foreach=False), partial(sgd, fused=True), partial(sgd, fused=True, momentum=0.0),
             partial(sgd, dampening=0.5), partial(sgd, fused=True, dampening=0.5), adam, adamw, partial(adam, fused=True),
             partial(adamw, fused=True), partial(torch.optim.NAdam, lr=1e-2), partial(torch.optim.Adagrad, fused=True)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("number", range(len(FACTORIES)))
def test_undone_on_the_device(net, batches, clone, same, ahead, number, value):
    factory, other, watch = FACTORIES[number], clone(net), Watch()
    run = fit(net, Loss(BAD, value), factory, batches, epochs=2, plugins=[NanGuard("skip"), watch], seed=1)
    optimizer = factory(other.parameters())
    assert by_hand(other, optimizer, batches, 2, Loss(BAD, value)) == [1, 4, 5, 10]
    same(net, other)
    torch.testing.assert_close(state_of(run), list(optimizer.state_dict()["state"].items()), rtol=0, atol=0)
    assert (run.step, run.attempts, run.metrics["skipped_steps"], run.stop) == (12, 16, 4, "")
    assert [(row["step"], row["skipped_steps"]) for row in run.history] == [(5, 3), (12, 4)]
    assert not hasattr(run.optimizer, "found_inf")
    # It waits where state is new; of the others it hears later.
    assert skipped(watch) == ([1] if run.optimizer.state and factory.func is not torch.optim.Adagrad else [])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("plugins", [["accumulate:every=2", "clip:value=0.1"], ["loopctl.plugins.sam:Sam"], ["amp:dtype=bfloat16"]], ids=str)
@pytest.mark.parametrize("factory", [sgd, partial(adam, fused=True)], ids=["sgd", "fused"])
def test_undone_on_the_device_with_others(net, batches, clone, same, monkeypatch, ahead, factory, plugins, order):
    other, bad = clone(net), dict.fromkeys([1, 6, 7, 9, 10, 14], "gradient")
    run = fit(net, Loss(bad, math.inf), factory, batches, epochs=2, plugins=[*plugins, NanGuard("skip")][::order], seed=1)
    monkeypatch.setattr(step_guard, "ASYNCHRONOUS", ())
    at_once = fit(other, Loss(bad, math.inf), factory, batches, epochs=2, plugins=[*plugins, NanGuard("skip")], seed=1)
    same(net, other)
    assert (run.step, run.metrics["skipped_steps"]) == (at_once.step, at_once.metrics["skipped_steps"])
    assert 2 < run.step < run.attempts


@pytest.mark.parametrize("fused", [False, True])
def test_on_the_device_float16_scaling_skips_by_itself(net, batches, clone, same, ahead, fused):
    """2^40 overflows for some 20 steps; step 30 has a bad loss on top."""
    other, factory = clone(net), partial(adam, fused=fused)
    run = fit(net, Loss({30: "loss"}), factory, batches, epochs=4, plugins=[Amp("float16", 2.0**40), NanGuard("skip")], seed=1)
    alone = fit(other, Loss({30: "loss"}), factory, batches, epochs=4, plugins=[Amp("float16", 2.0**40)], seed=1)
    for mine, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert (run.step, run.metrics["skipped_steps"], run.stop) == (alone.step, 1, "")
    assert net[1].running_mean.isfinite().all()
    assert net[1].num_batches_tracked == other[1].num_batches_tracked - 1


def test_on_the_device_a_bad_loss_that_float16_scaling_cannot_see(net, batches, clone, same, ahead):
    """Fused optimizers are told what to leave alone by the scaler there."""
    class Adds(Loss):
        def __call__(self, output, target):
            return super().__call__(output, target) + (math.inf if self.calls in (2, 5) else 0.0)

    net[3].p = 0.0
    other, fused = clone(net), partial(adam, fused=True)
    run = fit(net, Adds(), fused, batches, plugins=[Amp("float16", 1024.0), NanGuard("skip")])
    fit(other, cross_entropy, fused, [batches[0], *batches[2:4], *batches[5:]], plugins=[Amp("float16", 1024.0)])
    same(net, other)
    assert (run.step, run.metrics["skipped_steps"]) == (6, 2)


def test_state_that_somebody_exchanged(net, batches, clone, same, ahead):
    """As loading a checkpoint does: what is put back is what is there now."""
    class Exchanges:
        @hookimpl
        def after_step(self, run: Run):
            run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))

    other, bad = clone(net), {3: "gradient", 6: "gradient"}
    run = fit(net, Loss(bad), sgd, batches, plugins=[NanGuard("skip"), Exchanges()], seed=1)
    by_hand(other, sgd(other.parameters()), batches, 1, Loss(bad))
    same(net, other)
    assert run.step == 6


def test_a_count_on_the_host_is_waited_for(clone, same, ahead):
    model = nn.Embedding(10, 3, sparse=True)
    batches = [(torch.randint(0, 10, (5,)), torch.randint(0, 3, (5,))) for _ in range(8)]
    other, watch = clone(model), Watch()
    bad = {1: "gradient", 2: "gradient", 4: "gradient", 6: "gradient"}
    run = fit(model, Loss(bad), torch.optim.SparseAdam, batches, plugins=[NanGuard("skip"), watch])
    assert skipped(watch) == [1, 2, 4, 6]
    fit(other, cross_entropy, torch.optim.SparseAdam, [batches[2], batches[4], *batches[6:]])
    same(model, other)
    assert run.step == 4


def test_parts_that_thaw_later(net, batches, clone, same, ahead):
    """Their state is new in a bad step; before that the host hears late."""
    other, bad = clone(net), {3: "gradient", 9: "gradient", 10: "loss", 13: "loss"}
    plugins, watch = ["freeze:patterns=0,until=1ep"], Watch()
    run = fit(net, Loss(bad), sgd, batches, epochs=2, plugins=[*plugins, NanGuard("skip"), watch], seed=1)
    assert skipped(watch) == [9, 10]
    step_guard.ASYNCHRONOUS = ()
    fit(other, Loss(bad), sgd, batches, epochs=2, plugins=[*plugins, NanGuard("skip")], seed=1)
    same(net, other)
    assert run.step == 12


def test_where_it_waits_it_hears_the_steps_in_their_order(net, batches, ahead):
    plugins = ["freeze:patterns=0,until=4st", NanGuard("skip", limit=2)]
    run = fit(net, Loss({4: "gradient", 5: "gradient"}), sgd, batches, plugins=plugins)
    assert run.stop == "the gradient of step 5 is not finite: 2 in a row, which is the limit"
    assert (run.step, run.attempts) == (3, 5)


def test_stop_comes_later_and_names_the_step(net, batches, ahead):
    run = fit(net, Loss({4: "gradient", 5: "loss"}), sgd, batches, epochs=2, plugins=["nan_guard"])
    assert run.stop.startswith("the gradient of step 4 is not finite; ")
    assert 4 < run.attempts < 8
    assert run.step == run.attempts - 2
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_the_last_verdicts_come_with_the_evaluation(net, batches, ahead):
    run = fit(net, Loss({8: "gradient"}), sgd, batches, epochs=2, plugins=["nan_guard"])
    assert run.stop.startswith("the gradient of step 8 is not finite; ")
    assert (run.attempts, run.step, run.history[-1]["step"]) == (8, 7, 7)


def test_limit_counts_in_the_order_of_the_steps(net, batches, ahead):
    bad = dict.fromkeys([2, 4, 5, 8, 9, 10], "loss")
    run = fit(net, Loss(bad), sgd, batches, epochs=5, plugins=[NanGuard("skip", limit=3)])
    assert run.stop == "the loss of step 10 is not finite: 3 in a row, which is the limit"
    assert run.step == run.attempts - 6


def test_what_is_saved_counts_right(net, batches, ahead):
    """A checkpoint within an epoch: the state of a plugin is asked for before the position is written."""
    seen, guard = [], NanGuard("skip")

    class Saves:
        @hookimpl
        def safe_point(self, run: Run):
            state = capture_state(run)
            seen.append((state["counters"]["step"], state["metrics"]["skipped_steps"], state["plugins"]["nan_guard"]))

    fit(net, Loss({4: "gradient", 5: "gradient"}), sgd, batches, plugins=[guard, Saves()])
    assert [step for step, _, _ in seen[:8]] == [1, 2, 3, 3, 3, 4, 5, 6]
    assert [count for _, count, _ in seen[:8]] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert [state["in_a_row"] for _, _, state in seen[:8]] == [0, 0, 0, 1, 2, 0, 0, 0]


@pytest.mark.parametrize("order", [1, -1])
def test_rollback_heard_of_in_an_evaluation(net, batches, clone, same, tmp_path, ahead, order):
    """Where an average stands in for the weights, which come back after it."""
    other, plugins = clone(net), [NanGuard("rollback"), "ema:decay=0.9", "checkpoint"][::order]
    run = fit(net, Loss({16: "loss"}), sgd, batches, valid=batches[:1], epochs=2, plugins=[*plugins, Raw()], seed=1, out=tmp_path)
    fit(other, cross_entropy, sgd, batches, epochs=1, plugins=["ema:decay=0.9", Raw()], seed=1)
    same(net, other)
    assert (run.step, run.metrics["skipped_steps"]) == (15, 1)


class Raw:
    """Has the run end with the raw weights, where others would have put an average."""

    @hookimpl
    def safe_point(self, run: Run):
        self.state = copy.deepcopy(run.model.state_dict())

    @hookimpl
    def train_end(self, run: Run):
        run.model.load_state_dict(self.state)


def test_rollback_undoes_the_steps_since(net, batches, clone, same, monkeypatch, tmp_path, ahead):
    """Steps 11 and 12 are bad; when that of 11 arrives, 13 is done, and once is enough for both."""
    calls, back, other = [], roll_back, clone(net)
    monkeypatch.setattr("loopctl.checkpoint.step_guard.roll_back", lambda run: back(run) or calls.append(run.attempts))
    plugins = [NanGuard("rollback"), "checkpoint"]
    run = fit(net, Loss({11: "loss", 12: "loss"}), sgd, batches, epochs=2, plugins=plugins, seed=1, out=tmp_path)
    assert calls == [12]
    assert (run.step, run.metrics["skipped_steps"], run.stop) == (14, 2, "")

    class Back:
        @hookimpl
        def after_step(self, run: Run):
            if run.attempts == 8:
                self.state = copy.deepcopy([run.model.state_dict(), run.optimizer.state_dict()])
            if run.attempts == 13:
                run.model.load_state_dict(self.state[0])
                run.optimizer.load_state_dict(self.state[1])

    fit(other, cross_entropy, sgd, batches, epochs=2, plugins=[Back()], seed=1)
    same(net, other)


def test_rollback_that_comes_to_its_limit_has_gone_back(net, batches, clone, same, tmp_path, ahead):
    other, bad = clone(net), dict.fromkeys(range(12, 40), "loss")
    run = fit(net, Loss(bad), sgd, batches, epochs=5, plugins=[NanGuard("rollback", 2), "checkpoint"], seed=1, out=tmp_path)
    assert run.stop == "the loss of step 13 is not finite: 2 in a row, which is the limit"
    fit(other, cross_entropy, sgd, batches, seed=1)
    same(net, other)


class NoReading(TorchDispatchMode):
    """Raises where the host reads a tensor, while it is told to."""

    def __init__(self):
        super().__init__()
        self.strict = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not (self.strict and func is torch.ops.aten._local_scalar_dense.default), "the host reads a value"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("factory", [sgd, partial(sgd, fused=True), adamw, partial(adamw, fused=True)], ids=["sgd", "fused sgd", "adamw", "fused adamw"])
def test_the_host_reads_nothing_in_a_step(net, batches, ahead, factory):
    """From the second step on; in the first the state is new. Plain Adam reads its own count, which is on the CPU there."""
    if factory is adamw:
        factory = partial(sgd, momentum=0.0)
    with NoReading() as mode:
        class Strict:
            @hookimpl
            def before_step(self, run: Run):
                mode.strict = run.attempts > 0

            @hookimpl
            def after_step(self, run: Run):
                mode.strict = False

        run = fit(net, Loss({3: "gradient"}), factory, batches, plugins=[Strict(), NanGuard("skip"), "accumulate:every=2"])
    assert run.step == 3


@pytest.mark.parametrize("fused", [False, True])
def test_the_host_could_not_read_anything_in_a_step(batches, monkeypatch, fused):
    """On the meta device no tensor has a value, so that reading one in whatever way is an error."""
    monkeypatch.setattr(step_guard, "ASYNCHRONOUS", ("meta",))
    sent = []

    class Deaf(NanGuard):
        def send_verdict(self, run):
            sent.append(self.bad)

    class Enough:
        @hookimpl
        def safe_point(self, run: Run):
            if run.attempts == 5:
                raise KeyboardInterrupt

    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)).to("meta")
    optimizer = sgd(model.parameters())
    model(batches[0][0].to("meta")).sum().backward()
    optimizer.step()
    if fused:                           # torch has none there
        optimizer._step_supports_amp_scaling, optimizer.step = True, lambda: optimizer.found_inf
    with pytest.raises(KeyboardInterrupt):
        fit(model, cross_entropy, optimizer, batches, plugins=[Deaf("skip"), Enough(), "clip"])
    assert [flags.device.type for flags in sent if flags.shape == (2,)] == ["meta"] * 5


# On CUDA


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("number", range(len(FACTORIES) - 1))      # torch has no fused Adagrad there
def test_on_cuda_bit_for_bit_the_loop_that_leaves_bad_steps_out(net, batches, clone, same, number, value):
    factory = FACTORIES[number]
    net[3].p = 0.0
    net, data = net.cuda(), [(input.cuda(), target.cuda()) for input, target in batches]
    other = clone(net)
    run = fit(net, Loss(BAD, value), factory, data, epochs=2, plugins=[NanGuard("skip")])
    assert by_hand(other, factory(other.parameters()), data, 2, Loss(BAD, value)) == [1, 4, 5, 10]
    same(net, other)
    assert (run.step, run.attempts, run.metrics["skipped_steps"]) == (12, 16, 4)


@pytest.mark.cuda
@cuda
@pytest.mark.parametrize("factory", [sgd, partial(sgd, fused=True), partial(adamw, fused=True), partial(adam, capturable=True)],
                         ids=["sgd", "fused sgd", "fused adamw", "capturable adam"])
def test_on_cuda_nothing_in_a_step_waits(net, batches, factory):
    class Strict:
        @hookimpl
        def before_step(self, run: Run):
            set_mode("error" if run.attempts else "default")

        @hookimpl
        def after_step(self, run: Run):
            set_mode("default")

    data = [(input.cuda(), target.cuda()) for input, target in batches]
    with sync_debug_mode() as set_mode:
        run = fit(net.cuda(), Loss({3: "gradient", 5: "loss"}), factory, data, epochs=3, plugins=[Strict(), NanGuard("skip")])
    assert (run.step, run.metrics["skipped_steps"]) == (22, 2)
