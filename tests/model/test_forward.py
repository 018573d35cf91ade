"""How a batch reaches model, loss and metrics: pairs, dicts, losses of the model, and the function `forward`."""
import copy
import os
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.plugins.ddp import Ddp

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def regression_batches(sizes=(8, 8, 5)):
    torch.manual_seed(1)
    return [(torch.randn(size, 4), torch.randn(size, 1)) for size in sizes]


def dicts(batches, target="labels", **more):
    return [{"x": x, target: y, **more} for x, y in batches]


def plain_loop(model, batches, loss_of, epochs=2):
    model = copy.deepcopy(model)
    optimizer = SGD(model.parameters())
    for _ in range(epochs):
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
    return model


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


class Model(nn.Module):
    """A model that is called with named arguments, and returns `kind` of output."""

    def __init__(self, kind="tensor"):
        super().__init__()
        torch.manual_seed(2)
        self.layer, self.kind = nn.Linear(4, 1), kind

    def forward(self, x, labels=None, scale=1.0):
        output = self.layer(x) * scale
        if labels is None:
            return output
        loss = nn.functional.mse_loss(output, labels)
        return {"tensor": output, "tuple": (loss, output), "loss last": (output, loss), "loss": loss,
                "dict": {"loss": loss, "logits": output}, "object": SimpleNamespace(loss=loss, logits=output),
                "model output": ModelOutput(loss, output)}[self.kind]


class ModelOutput(OrderedDict):
    """As transformers.utils.ModelOutput: a dict whose entries are attributes too."""

    def __init__(self, loss, logits):
        super().__init__(loss=loss, logits=logits)
        self.loss, self.logits = loss, logits


def mse_of_dict(model, batch):
    return nn.functional.mse_loss(model.layer(batch["x"]), batch["labels"])


@pytest.mark.parametrize("target", ["labels", "label", "targets", "target"])
def test_a_dict_gives_the_model_its_arguments_and_the_loss_its_target(target):
    model, batches = Model(), regression_batches()
    expected = plain_loop(model, batches, lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1]))
    fit(model, nn.MSELoss(), SGD, dicts(batches, target, index=torch.arange(3)), epochs=2)     # index is no argument
    assert equal(model, expected)


@pytest.mark.parametrize("kind", ["tuple", "loss last", "loss", "dict", "object", "model output"])
@pytest.mark.parametrize("form", ["pair", "dict"])
def test_a_model_may_return_its_own_loss(kind, form):
    model, pairs = Model(kind), regression_batches()
    expected = plain_loop(model, dicts(pairs), mse_of_dict)
    fit(model, None, SGD, pairs if form == "pair" else dicts(pairs), epochs=2)
    assert equal(model, expected)


@pytest.mark.parametrize("kind", ["tuple", "loss last", "dict", "object", "model output"])
def test_metrics_get_the_logits_of_the_model_and_the_target_of_the_dict(kind):
    seen = []
    batches = dicts(regression_batches())
    run = fit(Model(kind), None, SGD, batches, valid=batches,
              metrics={"error": lambda output, target: seen.append((output, target)) or (output - target).abs().mean()})
    assert all(output.shape == target.shape for output, target in seen)
    model = run.model.eval()
    model.kind = "tensor"
    weights = [len(batch["x"]) for batch in batches]
    errors = [(model(batch["x"]) - batch["labels"]).abs().mean().item() for batch in batches]
    mean = sum(w * e for w, e in zip(weights, errors, strict=True)) / sum(weights)
    assert run.history[-1]["val_error"] == pytest.approx(mean, rel=1e-6)        # another order of the sum


def test_a_model_with_any_keyword_argument_is_given_the_whole_dict():
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, **entries):
            assert set(entries) == {"x", "index"}
            return self.layer(entries["x"])

    fit(Any(), nn.MSELoss(), SGD, dicts(regression_batches(), index=torch.arange(3)))


def test_forward_computes_the_loss_of_batches_of_any_kind():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.encoder, self.decoder = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(model, batch):
        hidden = model.encoder(batch["deep"][0])
        output = model.decoder(hidden)
        return nn.functional.mse_loss(output, batch["deep"][0]) + hidden.square().mean(), output

    batches = [{"deep": [x]} for x, _ in regression_batches()]
    model = Pair()
    expected = plain_loop(model, batches, lambda model, batch: forward(model, batch)[0])
    outputs = []
    run = fit(model, None, SGD, batches, valid=batches, epochs=2, forward=forward,
              metrics={"shape": lambda output, batch: outputs.append(batch) or float(output.shape[1])})
    assert equal(model, expected)
    assert run.history[-1]["val_shape"] == 4
    assert outputs[0] is batches[0]


def test_forward_may_return_the_loss_alone():
    model, batches = Model(), regression_batches()
    expected = plain_loop(model, batches, lambda model, batch: model(batch[0]).square().mean())
    fit(model, None, SGD, batches, epochs=2, forward=lambda model, batch: model(batch[0]).square().mean())
    assert equal(model, expected)


@pytest.mark.parametrize("plugins", [["accumulate:every=2"], ["split:into=2"], ["amp:dtype=bfloat16"], ["compile"], ["ema"],
                                     ["sam"], ["swa:start=1ep"], ["ddp"]])
def test_forward_composes_as_a_loss_function_does(plugins):
    def run(**loss):
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))
        return fit(model, optimizer=SGD, train=regression_batches((8, 8, 6)), epochs=2, plugins=plugins, **loss).model

    backend = {"plugins": ["compile:backend=eager"]} if plugins == ["compile"] else {}
    plugins = backend.get("plugins", plugins)
    one = run(loss_fn=nn.MSELoss())
    other = run(loss_fn=None, forward=lambda model, batch: (nn.functional.mse_loss(model(batch[0]), batch[1]), None))
    assert equal(one, other)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"train": dicts(regression_batches()), "model": nn.Linear(4, 1)},
     "a batch has the entries x and labels, and the model takes input; name them alike"),
    ({"train": [{"x": torch.zeros(2, 4), "y": torch.zeros(2, 1)}]}, "loss_fn needs a target, and a batch has the entries"),
    ({"train": [torch.zeros(2, 4)]}, "a batch is a pair (input, target) or a dict, but train gave a Tensor"),
    ({"train": [(1, 2, 3)]}, "train gave a tuple of 3; pass forward=..."),
    ({"loss_fn": None, "model": nn.Bilinear(4, 1, 1)}, "returned a Tensor without one; pass a function of"),
    ({"loss_fn": None, "forward": lambda model, batch: (1, 2, {}, 3)}, "forward returned a tuple of 4; return loss, outputs"),
    ({"loss_fn": None, "forward": "f"}, "forward is 'f'; pass a function"),
    ({"forward": lambda model, batch: None}, "forward computes the loss itself, so loss_fn would not be used"),
])
def test_batches_and_losses_that_do_not_fit_together_are_refused(arguments, message):
    defaults = {"model": Model(), "loss_fn": nn.MSELoss(), "optimizer": SGD, "train": regression_batches()}
    with pytest.raises(UsageError) as refused:
        fit(**defaults | arguments)
    assert message in str(refused.value)


@pytest.mark.parametrize("loss_fn", [nn.MSELoss(), nn.L1Loss(), nn.SmoothL1Loss(), nn.HuberLoss(),
                                     nn.functional.mse_loss])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_would_be_broadcast_are_refused_with_both_shapes(loss_fn):
    batches = [(x, y.squeeze(1)) for x, y in regression_batches()]
    model = Model()
    before = copy.deepcopy(model)
    with pytest.raises(UsageError, match=r"outputs have shape \(8, 1\) and the targets \(8,\)"):
        fit(model, loss_fn, SGD, batches)
    assert equal(model, before)


@pytest.mark.parametrize("targets", [torch.rand(8, 1), torch.zeros(8, dtype=torch.long)])
def test_a_cross_entropy_over_a_single_class_is_refused(targets):
    with pytest.raises(UsageError, match=r"a single class, which is 0 for every output: the outputs have shape \(8, 1\)"):
        fit(Model(), nn.CrossEntropyLoss(), SGD, [(torch.randn(8, 4), targets)])


# forward(model, batch, state)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.cell, self.head = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 1)

    def forward(self, x, state):
        hidden, state = self.cell(x, state)
        return self.head(hidden), state


def recurrent_loss(model, batch, state):
    output, state = model(batch[0], state)
    return nn.functional.mse_loss(output, batch[1]), output, {"size": output.square().mean()}, {"hidden": state}


def unpacked(model, batch, state):
    """As `recurrent_loss`, for the state that it returns."""
    return recurrent_loss(model, batch, None if state is None else state["hidden"])


def sequences(number=6, samples=3):
    torch.manual_seed(1)
    return [(torch.randn(samples, 7, 4), torch.randn(samples, 7, 1)) for _ in range(number)]


def recurrent_loop(model, batches, valid, epochs=2, every=1):
    """Return the model, and the mean validation loss of the last epoch."""
    model = copy.deepcopy(model)
    optimizer = SGD(model.parameters())
    for _ in range(epochs):
        state = None
        for start in range(0, len(batches), every):
            optimizer.zero_grad()
            group = batches[start:start + every]
            for batch in group:
                loss, _, _, state = recurrent_loss(model, batch, state)
                state = state["hidden"].detach()
                (loss / len(group)).backward()
            optimizer.step()
        state, losses = None, []
        with torch.no_grad():
            for batch in valid:
                loss, _, _, state = recurrent_loss(model, batch, state)
                state = state["hidden"]
                losses.append(loss.double())
    return model, torch.stack(losses).mean().item()


@pytest.mark.parametrize("every", [1, 3])
def test_a_state_is_carried_between_batches_and_each_pass_begins_without_one(every):
    batches, valid, model = sequences(), sequences(2, samples=2), Recurrent()
    expected, val_loss = recurrent_loop(model, batches, valid, every=every)
    run = fit(model, None, SGD, batches, valid, forward=unpacked, epochs=2, eval_every=1, plugins=[f"accumulate:every={every}"])
    assert equal(run.model, expected)
    assert run.history[-1]["val_loss"] == pytest.approx(val_loss, rel=1e-12)
    assert {"train_size", "val_size"} <= run.history[-1].keys()
    assert not run.carried["hidden"].requires_grad


class Kill:
    """Ends training at the first safe point with this many steps, in place of a signal that kills the process."""

    def __init__(self, step):
        self.step = step

    @hookimpl
    def safe_point(self, run: Run):
        if run.step == self.step:
            raise KeyboardInterrupt


def killed_and_resumed(out, plugins=(), batches=None):
    batches, valid = batches or sequences(), sequences(2, samples=2)
    arguments = {"forward": unpacked, "epochs": 2, "seed": 0, "out": out}
    plugins = [*plugins, "checkpoint:every_steps=1"]
    with pytest.raises(KeyboardInterrupt):
        fit(Recurrent(), None, SGD, batches, valid, plugins=[*plugins, Kill(9)], **arguments)
    return fit(Recurrent(), None, SGD, batches, valid, plugins=plugins, resume=out, **arguments)


def test_a_run_killed_within_an_epoch_goes_on_with_the_state_of_its_last_batch(tmp_path):
    valid = sequences(2, samples=2)
    whole = fit(Recurrent(), None, SGD, sequences(), valid, forward=unpacked, epochs=2)
    resumed = killed_and_resumed(tmp_path)
    assert equal(resumed.model, whole.model)
    assert resumed.history == whole.history


def own_sequences(rank):
    """What a process of two trains on: sequences of its own."""
    return [(x[rank::2], y[rank::2]) for x, y in sequences(samples=4)]


def in_two_processes(out):
    batches = own_sequences(int(os.environ["RANK"]))
    whole = fit(Recurrent(), None, SGD, batches, sequences(2, samples=2), forward=unpacked, epochs=2, seed=0, plugins=["ddp:shard=false"])
    resumed = killed_and_resumed(out, [Ddp(shard=False)], batches)
    return {name: value.clone() for name, value in whole.model.state_dict().items()}, equal(resumed.model, whole.model)


def test_two_processes_carry_the_states_of_their_own_sequences_and_resume_with_them(ranks, tmp_path):
    (one, resumed), (other, _) = ranks(2, in_two_processes, tmp_path)
    assert resumed
    expected, _ = recurrent_loop(Recurrent(), sequences(samples=4), sequences(2, samples=2))
    for name, value in expected.state_dict().items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=1e-6)      # a mean of two halves is rounded twice


class SameState:
    """Checks that each call of the closure begins with the same state, and that the first one's is carried on."""

    def __init__(self):
        self.given, self.states = [], []

    def forward(self, model, batch, state):
        self.given.append(state)
        loss, output, logged, state = unpacked(model, batch, state)
        self.states.append(state["hidden"].detach())
        return loss, output, logged, state


def test_each_call_of_the_closure_begins_with_the_state_at_the_start_of_the_step():
    seen = SameState()
    fit(Recurrent(), None, SGD, sequences(3), forward=seen.forward, plugins=["sam"])
    assert len(seen.given) == 6
    for first, second in zip(seen.given[::2], seen.given[1::2], strict=True):
        assert first is second
    assert seen.given[0] is None
    assert torch.equal(seen.given[2]["hidden"], seen.states[0])
    assert torch.equal(seen.given[4]["hidden"], seen.states[2])


def test_a_learning_rate_range_test_leaves_no_state_behind(tmp_path):
    one, other = (fit(Recurrent(), None, SGD, sequences(), forward=unpacked, plugins=plugins, out=tmp_path)
                  for plugins in ([], ["lr_finder:num_steps=5"]))
    assert equal(one.model, other.model)


def test_a_forward_with_a_state_that_does_not_return_one_is_refused():
    with pytest.raises(UsageError, match="forward takes a state and returned a tuple of 2; return loss, outputs, a dict of values to log"):
        fit(Recurrent(), None, SGD, sequences(), forward=lambda model, batch, state: recurrent_loss(model, batch, state)[:2])


def test_split_is_refused_where_a_state_is_carried():
    with pytest.raises(UsageError, match="split: forward carries a state from batch to batch, which has no parts; use smaller batches"):
        fit(Recurrent(), None, SGD, sequences(), forward=unpacked, plugins=["split"])


def shared_out():
    with pytest.raises(UsageError, match="ddp: forward carries a state from each batch to the next, which would be another process's; give "
                                         "each process a sequence of its own, with shard=false"):
        fit(Recurrent(), None, SGD, sequences(), forward=unpacked, plugins=["ddp"])


def test_batches_that_follow_each_other_are_not_shared_out_among_processes(ranks):
    ranks(2, shared_out)


def test_one_of_several_losses_cannot_carry_a_state():
    with pytest.raises(UsageError, match="forward is a dict, and one of its functions takes a state"):
        fit(Recurrent(), None, {"cell": SGD, "head": SGD}, sequences(), forward={"cell": unpacked, "head": unpacked})
