"""Several optimizers in one run, with one loss together or with a loss each, equal the loop by hand to the bit."""
import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import mse_loss

from loopctl import UsageError, fit, hookimpl
from loopctl.composition.explain import describe_shares
from loopctl.model.hidden_matrices import hidden_matrices
from loopctl.optim.several import Optimizers, by_kind

ADAM, SGD = partial(torch.optim.Adam, lr=0.01, betas=(0.5, 0.999)), partial(torch.optim.SGD, lr=0.1, momentum=0.9)
BATCHES = list(torch.randn(5, 8, 4, generator=torch.Generator().manual_seed(1)))
BATCHES[-1] = BATCHES[-1][:5]


class Gan(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 6), nn.LeakyReLU(0.2), nn.Linear(6, 1))


def discriminator_loss(model, real):
    fake = model.generator(torch.randn(len(real), 2)).detach()
    right, wrong = model.discriminator(real), model.discriminator(fake)
    return bce(right, torch.ones_like(right)) + bce(wrong, torch.zeros_like(wrong)), None


def generator_loss(model, real):
    judged = model.discriminator(model.generator(torch.randn(len(real), 2)))
    return bce(judged, torch.ones_like(judged)), judged


FORWARD = {"discriminator": discriminator_loss, "generator": generator_loss}
OPTIMIZERS = {"discriminator": SGD, "generator": ADAM}


def train_gan(model=None, **more):
    arguments = {"train": BATCHES, "optimizer": OPTIMIZERS, "forward": FORWARD, "epochs": 2, "seed": 3, **more}
    return fit(model or Gan(), None, **arguments)


def by_hand(every=1, epochs=2, dtype=None, scale=1024.0, max_norm=None, rate=None):
    """The loop for a GAN that a careful person writes: each network's update before the other's."""
    model = Gan()
    torch.manual_seed(3)
    parts = {name: (OPTIMIZERS[name](getattr(model, name).parameters()),
                    torch.amp.GradScaler("cpu", scale, enabled=dtype == torch.float16)) for name in FORWARD}
    steps = 0
    for _ in range(epochs):
        for start in range(0, len(BATCHES), every):
            group = BATCHES[start:start + every]
            samples = sum(map(len, group))
            for name, (optimizer, scaler) in parts.items():
                if rate and name == "generator":
                    optimizer.param_groups[0]["lr"] = 0.01 * rate(steps)
                optimizer.zero_grad()
                for batch in group:
                    with torch.autocast("cpu", dtype, enabled=dtype is not None):
                        loss = FORWARD[name](model, batch)[0]
                    scaler.scale(loss * (len(batch) / samples) if every > 1 else loss).backward()
                scaler.unscale_(optimizer)
                if max_norm:
                    nn.utils.clip_grad_norm_(getattr(model, name).parameters(), max_norm)
                scaler.step(optimizer)
                scaler.update()
            steps += 1
    return model


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.compares(use="fit(optimizer={...})", technique="a loss for each of several optimizers, in turn",
                      source="the loop by hand", tolerance="to the bit")
@pytest.mark.parametrize(("plugins", "arguments"), [
    ([], {}),
    (["accumulate:every=2"], {"every": 2}),
    (["clip:max_norm=0.1"], {"max_norm": 0.1}),
    (["amp:dtype=bfloat16"], {"dtype": torch.bfloat16}),
    (["amp:dtype=float16,init_scale=1024", "clip:max_norm=0.1", "accumulate:every=2"],
     {"dtype": torch.float16, "max_norm": 0.1, "every": 2}),
    (["linear:start_factor=1,end_factor=0.5,total_iters=4st,by=step,optimizer=generator"],
     {"rate": lambda step: 1 - 0.5 * min(step, 4) / 4}),
    (["csv", "ddp"], {}),
])
def test_a_gan_equals_the_loop_by_hand(plugins, arguments, tmp_path):
    assert equal(train_gan(plugins=plugins, out=tmp_path).model, by_hand(**arguments))


def test_the_scale_of_each_loss_is_its_own():
    """An overflow in the loss of one optimizer skips its update only."""
    def overflows(model, real):
        loss, judged = generator_loss(model, real)
        return loss * 1e4, judged

    scales = {}

    class Look:
        @hookimpl
        def train_end(self, run):
            scales.update(run.hook.plugins["amp"].scales)

    train_gan(forward=FORWARD | {"generator": overflows}, plugins=["amp:dtype=float16", Look()], epochs=1)
    assert scales["discriminator"] == 65536
    assert scales["generator"] < 65536


@pytest.mark.parametrize("plugins", [[], ["sam"]])         # sam computes each loss twice
def test_each_loss_has_its_mean_and_the_loss_is_their_sum(plugins):
    run = train_gan(plugins=plugins, valid=BATCHES[:2], metrics={"judged": lambda outputs, batch: outputs.mean()})
    for row in run.history:
        for part in ("train", "val"):
            parts = row[f"{part}_discriminator_loss"] + row[f"{part}_generator_loss"]
            assert row[f"{part}_loss"] == pytest.approx(parts, rel=1e-6)        # a float32 sum
            assert row[f"{part}_judged"] == row[f"{part}_judged"]


def test_a_gan_is_resumed_exactly_within_an_epoch(tmp_path):
    class Stops:
        observer_only = True

        @hookimpl
        def safe_point(self, run):
            if run.attempts == 7:
                raise KeyboardInterrupt

    plugins = ["amp:dtype=float16,init_scale=4e8", "ema", "cosine:by=step,optimizer=discriminator",
               "checkpoint:every_steps=1"]
    whole = train_gan(plugins=plugins, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train_gan(plugins=[*plugins, Stops()], out=tmp_path / "cut")
    resumed = train_gan(plugins=plugins, out=tmp_path / "cut", resume=tmp_path / "cut")
    assert equal(resumed.model, whole.model)
    assert resumed.history == whole.history
    state, other = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert state["param_groups"] == other["param_groups"]
    assert all(torch.equal(value, other["state"][number][key])
               for number, values in state["state"].items() for key, value in values.items())


def train_in_processes():
    return train_gan(plugins=["ddp"], forward={name: without_noise(function) for name, function in FORWARD.items()},
                     train=BATCHES[:4], optimizer={"discriminator": SGD, "generator": SGD}).model.state_dict()


def without_noise(function):
    """The function with the same noise in every process and batch, so that one process computes the same."""
    def forward(model, batch):
        state = torch.get_rng_state()
        torch.manual_seed(11)
        result = function(model, batch)
        torch.set_rng_state(state)
        return result
    return forward


def test_a_gan_in_two_processes_equals_one_process_that_accumulates(ranks):
    for norm in (module for module in Gan().modules() if isinstance(module, nn.BatchNorm1d)):
        assert norm.track_running_stats         # its running statistics are those of rank 0 and not compared
    one = train_gan(plugins=["accumulate:every=2"], train=BATCHES[:4], optimizer={"discriminator": SGD, "generator": SGD},
                    forward={name: without_noise(function) for name, function in FORWARD.items()}).model.state_dict()
    for other in ranks(2, train_in_processes):
        for name, tensor in one.items():
            if "running" not in name and "num_batches" not in name:
                torch.testing.assert_close(other[name], tensor, rtol=1e-5, atol=1e-6)   # another order of the sum


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


PAIRS = [(batch, batch.sum(1, keepdim=True)) for batch in BATCHES]


def pair_by_hand(epochs=2, every=1, max_norm=None):
    model = Body()
    optimizers = [ADAM(model.body.parameters()), SGD(model.head.parameters())]
    for _ in range(epochs):
        for start in range(0, len(PAIRS), every):
            group = PAIRS[start:start + every]
            samples = sum(len(x) for x, _ in group)
            for optimizer in optimizers:
                optimizer.zero_grad()
            for x, y in group:
                loss = mse_loss(model(x), y)
                (loss * (len(x) / samples) if every > 1 else loss).backward()
            if max_norm:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            for optimizer in optimizers:
                optimizer.step()
    return model


@pytest.mark.compares(use="fit(optimizer={...})", technique="several optimizers with one loss",
                      source="the loop by hand", tolerance="to the bit")
@pytest.mark.parametrize("names", [("body", "head"), ("body", "*"), ("/^body/", "head.*")])
@pytest.mark.parametrize(("plugins", "arguments"), [
    ([], {}), (["accumulate:every=2", "clip:max_norm=0.1"], {"every": 2, "max_norm": 0.1}), (["nan_guard"], {})])
def test_two_optimizers_with_one_loss_equal_the_loop_by_hand(names, plugins, arguments):
    run = fit(Body(), nn.MSELoss(), dict(zip(names, [ADAM, SGD], strict=True)), PAIRS, epochs=2, plugins=plugins)
    assert equal(run.model, pair_by_hand(**arguments))
    assert [group["optimizer"] for group in run.optimizer.param_groups] == [*names]


def test_ready_made_optimizers_may_be_given():
    model = Body()
    run = fit(model, nn.MSELoss(), {"a": ADAM(model.body.parameters()), "b": SGD(model.head.parameters())}, PAIRS, epochs=2)
    assert equal(run.model, pair_by_hand())


def test_joined_state_dicts_can_be_loaded_into_others():
    def both(model):
        return Optimizers({"a": ADAM(model.body.parameters()), "b": SGD(model.head.parameters())})

    model = Body()
    first = both(model)
    for x, y in PAIRS:
        first.zero_grad()
        mse_loss(model(x), y).backward()
        first.step()
    other_model = copy.deepcopy(model)
    other = both(other_model)
    other.load_state_dict(copy.deepcopy(first.state_dict()))       # torch shares the tensors of a state dict
    for optimizer, net in ((first, model), (other, other_model)):
        optimizer.zero_grad()
        mse_loss(net(PAIRS[0][0]), PAIRS[0][1]).backward()
        optimizer.step()
    assert equal(model, other_model)
    assert len(first.state) == len(other.state) == 4
    assert set(first.state) == set(model.parameters())
    assert Body().body.weight not in first.state


@pytest.mark.parametrize(("arguments", "message"), [
    ({"optimizer": {"body": SGD}}, "no optimizer has the parameters head.weight and head.bias; add one under the name '*'"),
    ({"optimizer": {"*": SGD, "head": SGD}}, "the optimizer 'head' has no parameters"),
    ({"optimizer": {"tail": SGD, "*": SGD}}, "no parameter matches 'tail'"),
    ({"optimizer": {"body": SGD, "head": 1}}, "optimizer is a int"),
    ({"optimizer": {"body": SGD, "head": torch.optim.LBFGS}}, "computes the loss several times in a step"),
    ({"optimizer": {"body": SGD, "*": SGD}, "plugins": ["layerwise_lr:decay=0.5"]}, "leave it out, and set groups"),
    ({"optimizer": {"body": SGD, "*": SGD}, "plugins": ["cosine:optimizer=haed"]}, "the run has no such optimizer; it has: *, body"),
    ({"optimizer": {"body": SGD, "*": SGD}, "plugins": ["onecycle:max_lr=1,optimizer=body"]}, "every optimizer would be cycled"),
    ({"optimizer": {"body": SGD, "*": torch.optim.Adagrad}, "plugins": ["onecycle:max_lr=1"]}, "Adagrad has no momentum"),
    ({"optimizer": SGD, "plugins": ["cosine:optimizer=head"]}, "the run has no such optimizer; it has only one"),
    ({"optimizer": SGD, "loss_fn": None, "forward": {"a": generator_loss}}, "pass a dict of optimizers with the same names"),
    ({"optimizer": {"head": SGD, "body": SGD}, "loss_fn": None, "forward": {"body": 1, "head": 2}}, "forward is a int"),
    ({"optimizer": {"head": SGD, "body": SGD}, "loss_fn": None,
      "forward": {"body": generator_loss, "head": generator_loss}}, "with the same names, in the same order"),
    ({"optimizer": {"body": SGD, "head": SGD}, "loss_fn": None, "plugins": ["nan_guard"],
      "forward": {"body": generator_loss, "head": generator_loss}}, "leave out nan_guard"),
])
def test_optimizers_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UsageError) as refused:
        fit(**{"model": Body(), "loss_fn": nn.MSELoss(), "train": PAIRS} | arguments)
    assert message in str(refused.value)


class Tied(nn.Module):
    """A language model as GPT has it: the output layer has the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.pos_embed = nn.Embedding(9, 4), nn.Parameter(torch.zeros(5, 4))
        self.block = nn.TransformerEncoderLayer(4, 2, 6)
        self.norm, self.lm_head = nn.LayerNorm(4), nn.Linear(4, 9, bias=False)
        self.lm_head.weight = self.tokens.weight


ATTENTION = ["in_proj_weight", "out_proj.weight"]


@pytest.mark.parametrize(("model", "expected"), [
    (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.Linear(3, 2)), ["0.weight", "2.weight"]),
    (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 2)), ["3.weight"]),
    (nn.Sequential(nn.Linear(4, 3), nn.Conv1d(3, 2, 1)), ["0.weight"]),         # the last layer is a convolution
    (Tied(), [*(f"block.self_attn.{name}" for name in ATTENTION), "block.linear1.weight", "block.linear2.weight"]),
    (nn.Sequential(nn.Embedding(5, 4), nn.LSTM(4, 3), nn.Linear(3, 5)), ["1.weight_ih_l0", "1.weight_hh_l0"]),
    (nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 2), nn.LayerNorm((2, 2)))), ["0.weight", "1.0.weight"]),
])
def test_hidden_matrices_are_without_embeddings_output_layer_norms_and_biases(model, expected):
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[parameter] for parameter in hidden_matrices(model)] == expected


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        return self.layers(x)


MATRICES = ["layers.0.weight", "layers.2.weight"]
MUON = partial(torch.optim.Muon, lr=0.02, weight_decay=0.1) if hasattr(torch.optim, "Muon") else None
needs_muon = pytest.mark.skipif(MUON is None, reason="torch has no Muon before 2.9")


def kinds_by_hand(first, second, epochs=2, every=1, max_norm=None, scale=None, rates=None):
    """The loop with two optimizers that a careful person writes."""
    model = Deep()
    named = dict(model.named_parameters())
    optimizers = [first([named[name] for name in MATRICES]),
                  second([parameter for name, parameter in named.items() if name not in MATRICES])]
    scaler, steps = torch.amp.GradScaler("cpu", scale or 1.0, enabled=scale is not None), 0
    for _ in range(epochs):
        for start in range(0, len(PAIRS), every):
            if rates:
                for optimizer, rate in zip(optimizers, rates(steps), strict=True):
                    optimizer.param_groups[0]["lr"] = rate
            group = PAIRS[start:start + every]
            samples = sum(len(x) for x, _ in group)
            for optimizer in optimizers:
                optimizer.zero_grad()
            for x, y in group:
                with torch.autocast("cpu", torch.float16, enabled=scale is not None):
                    loss = mse_loss(model(x), y)
                scaler.scale(loss * (len(x) / samples) if every > 1 else loss).backward()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            if max_norm:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            steps += 1
    return model


@pytest.mark.parametrize("first", [pytest.param(MUON, marks=needs_muon), SGD], ids=["muon", "sgd"])
@pytest.mark.parametrize(("plugins", "arguments"), [
    ([], {}),
    (["accumulate:every=2", "clip:max_norm=0.1"], {"every": 2, "max_norm": 0.1}),
    (["amp:dtype=float16,init_scale=1024", "clip:max_norm=0.1"], {"scale": 1024.0, "max_norm": 0.1}),
    (["nan_guard", "ema:decay=0"], {}),
    (["linear:start_factor=1,end_factor=0.5,total_iters=4st,by=step,optimizer=matrices",
      "linear:start_factor=0.5,total_iters=8st,by=step,optimizer=rest"],
     {"rates": lambda step, of: (of * (1 - 0.5 * min(step, 4) / 4), 0.01 * (0.5 + 0.5 * min(step, 8) / 8))}),
])
@pytest.mark.compares(use="--optimizer muon,adamw", technique="Muon for hidden matrices, AdamW for the rest", source="torch.optim.Muon", tolerance="to the bit")
def test_a_split_by_kind_equals_the_loop_with_two_optimizers(first, plugins, arguments):
    if rates := arguments.get("rates"):
        arguments = {"rates": lambda step: rates(step, first.keywords["lr"])}
    run = fit(Deep(), nn.MSELoss(), by_kind(matrices=first, rest=ADAM), PAIRS, epochs=2, plugins=plugins)
    assert equal(run.model, kinds_by_hand(first, ADAM, **arguments))
    assert run.history[-1].keys() >= {"lr_matrices", "lr_rest"}


@needs_muon
def test_a_split_by_kind_is_resumed_exactly_within_an_epoch(tmp_path):
    class Kill:
        observer_only = True

        @hookimpl
        def before_step(self, run):
            if run.step == 7:
                raise KeyboardInterrupt

    plugins = ["cosine:by=step,optimizer=muon", "clip:max_norm=0.1", "checkpoint:every_steps=1"]
    arguments = {"optimizer": by_kind(muon=MUON, adamw=ADAM), "train": PAIRS, "epochs": 2}
    whole = fit(Deep(), nn.MSELoss(), **arguments, plugins=plugins, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(Deep(), nn.MSELoss(), **arguments, plugins=[*plugins, Kill()], out=tmp_path / "cut")
    resumed = fit(Deep(), nn.MSELoss(), **arguments, plugins=plugins, out=tmp_path / "cut", resume=tmp_path / "cut")
    assert equal(resumed.model, whole.model)
    assert resumed.history == whole.history


def test_parameters_of_the_loss_function_are_trained_by_the_second():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(2, 2))

        def forward(self, output, target):
            return mse_loss(output, target) * self.factor.square().mean()

    run = fit(Deep(), Weighted(), by_kind(matrices=SGD, rest=ADAM), PAIRS)
    assert not torch.equal(run.loss_fn.factor, torch.ones(2, 2))
    assert describe_shares(run) == [
        "matrices: SGD with 42 numbers, layers.0.weight and layers.2.weight",
        "rest: Adam with 29 numbers, layers.0.bias, layers.1.weight, layers.1.bias and 4 more"]


def linear():
    return nn.Linear(4, 1)


@pytest.mark.parametrize(("model", "make", "message"), [
    (linear, lambda model: by_kind(a=SGD, b=ADAM), "the optimizer 'a' has no parameters: the model has no trainable weight of two"),
    (lambda: nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 1).requires_grad_(False)), lambda model: by_kind(a=SGD, b=ADAM),
     "the optimizer 'b' has no parameters: only hidden matrices are trained"),
    (linear, lambda model: by_kind(a=SGD), "by_kind takes two optimizers, not 1"),
    (linear, lambda model: by_kind(a=SGD, b=ADAM, c=ADAM), "by_kind takes two optimizers, not 3"),
    (linear, lambda model: by_kind(a=SGD(model.parameters()), b=ADAM), "by_kind: a is SGD; pass a factory"),
    (linear, lambda model: by_kind(a=SGD, b="adam"), "by_kind: b is str; pass a factory"),
])
def test_a_split_by_kind_that_does_not_fit_is_refused(model, make, message):
    model = model()
    with pytest.raises(UsageError) as refused:
        fit(model, nn.MSELoss(), make(model), PAIRS)
    assert message in str(refused.value)
