"""`record`: the tape of a plain loop, and that torch is as it was afterwards."""
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from loopctl import UsageError
from loopctl.tape import record
from loopctl.tape.reading import read_tape

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def train(model, batches, optimizer=sgd, loss_fn=cross_entropy):
    optimizer = optimizer(model.parameters())
    model.train()
    for input, target in batches:
        optimizer.zero_grad()
        loss_fn(model(input), target).backward()
        optimizer.step()


def patched():
    """What `record` replaces in torch."""
    return (nn.Module.__call__, torch.autograd.backward, torch.amp.GradScaler.step, [*_global_optimizer_pre_hooks], [*_global_optimizer_post_hooks])


@pytest.fixture(autouse=True)
def _torch_is_as_it_was():
    before = patched()
    yield
    assert patched() == before


def test_a_recorded_loop_trains_as_one_that_is_not(net, batches, clone, same, tmp_path):
    other = clone(net)
    for model, recorded in ((net, False), (other, True)):
        torch.manual_seed(1)
        if recorded:
            with record(tmp_path / "a.tape", modules=True):
                train(model, batches)
        else:
            train(model, batches)
    same(net, other)
    tape = read_tape(tmp_path / "a.tape")
    assert [*tape.updates] == [*range(1, 9)]
    assert tape.end["why"] == ""
    assert tape.header["model"] == "Sequential"
    for one, two in pairwise(tape):
        assert one.table("weights", "end") == two.table("weights", "start")


def test_torch_is_as_it_was_after_an_error_too(plain, batches, tmp_path):
    before = patched()
    with pytest.raises(RuntimeError, match="mat1"), record(tmp_path / "a.tape", modules=True):
        train(plain, [*batches[:3], (torch.randn(2, 5), torch.zeros(2).long())])
    assert patched() == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    tape = read_tape(tmp_path / "a.tape")
    assert [*tape.updates] == [1, 2, 3]
    assert tape.end["why"] == "RuntimeError"
    with record(tmp_path / "b.tape"):                   # another may follow
        train(plain, batches[:1])


def test_a_second_tape_at_the_same_time_is_refused(tmp_path):
    with record(tmp_path / "a.tape"), pytest.raises(UsageError, match=r"the tape .*a.tape is being recorded, .*leave one out"), \
            record(tmp_path / "b.tape"):
        pass


def test_a_tape_without_an_update_is_not_written_and_a_warning_says_so(tmp_path, caplog):
    with record(tmp_path / "a.tape"):
        pass
    assert not [*tmp_path.iterdir()]
    assert "no optimizer of torch has made an update" in caplog.text


def test_what_cannot_be_recorded_is_refused(tmp_path, plain, batches):
    with record(tmp_path / "a.tape"):
        train(plain, batches[:1])
    content = (tmp_path / "a.tape").read_bytes()
    for file, options, expected in ((tmp_path / "a.tape", {}, "exists and is not overwritten"), (tmp_path, {}, "is a folder"),
                                    (tmp_path / "a.tape" / "b", {}, "choose another file"), (tmp_path / "c.tape", {"every_steps": 0}, "at least 1, not 0")):
        with pytest.raises(UsageError, match=expected), record(file, **options):
            pass
    assert (tmp_path / "a.tape").read_bytes() == content


def test_a_tape_goes_on_with_resume(plain, batches, clone, tmp_path):
    other, numbers = clone(plain), partial(torch.optim.SGD, lr=0.1)
    with record(tmp_path / "whole.tape", every_steps=2):
        train(other, batches[:7], numbers)
    for part in (batches[:3], batches[3:7]):
        with record(tmp_path / "parts.tape", every_steps=2, resume=True):
            train(plain, part, numbers)
    whole, parts = read_tape(tmp_path / "whole.tape"), read_tape(tmp_path / "parts.tape")
    assert [*whole.updates] == [1, 2, 4, 6]
    assert [*whole] == [*parts]


def test_the_first_update_of_a_resumed_tape_has_the_state_that_the_optimizer_was_given(plain, batches, tmp_path):
    optimizer = sgd(plain.parameters())
    for part in (batches[:2], batches[2:4]):
        with record(tmp_path / "a.tape", resume=True):
            train(plain, part, lambda parameters: optimizer)
    two, three = list(read_tape(tmp_path / "a.tape"))[1:3]
    assert three.table("state", "start") == two.table("state", "end")
    assert three.table("state", "start").names == ("momentum_buffer",)


def test_the_modes_of_an_update_are_those_of_its_forward_pass(net, batches, tmp_path):
    optimizer, (input, target) = sgd(net.parameters()), batches[0]

    def closure():
        net.train()
        optimizer.zero_grad()
        loss = cross_entropy(net(input), target)
        loss.backward()
        return loss

    with record(tmp_path / "a.tape", net):
        net.eval()
        optimizer.step(closure)
        net.eval()
        cross_entropy(net(input), target).backward()
        net.train()
        optimizer.step()
    assert [bool(update.values["in_eval_mode"]) for update in read_tape(tmp_path / "a.tape")] == [False, True]


def test_a_file_that_cannot_be_written_is_a_warning_and_training_goes_on(plain, batches, tmp_path, caplog, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loopctl.tape.tape_file.atomic_write", full)
    with record(tmp_path / "a.tape"):
        train(plain, batches)
    (line,) = [line for line in caplog.messages if "a.tape" in line]
    assert "a.tape cannot be written (No space left on device); nothing more is" in line
    assert not (tmp_path / "a.tape").exists()


def recorded(tmp_path, function, **options):
    with record(tmp_path / "a.tape", **options):
        function()
    tape = read_tape(tmp_path / "a.tape")
    assert tape.damaged == 0
    return [*tape]


def test_accumulated_gradients_are_recorded_after_each_backward_pass(plain, batches, tmp_path):
    def accumulate():
        optimizer = sgd(plain.parameters())
        for number, (input, target) in enumerate(batches[:4], 1):
            (cross_entropy(plain(input), target) / 2).backward()
            if number % 2 == 0:
                optimizer.step()
                optimizer.zero_grad()

    updates = recorded(tmp_path, accumulate)
    assert len(updates) == 2
    for update in updates:
        assert update.points("gradients") == ["backward 1", "backward 2", "update"]
        assert update.points("batch") == ["1", "2"]
        assert update.table("gradients", "backward 2") == update.table("gradients", "update")
        assert update.values["micro_batches"] == 2
        assert update.number_of("backward", "1") == pytest.approx(update.number_of("loss of a batch", "1") / 2)


def test_very_many_micro_batches_are_counted_and_the_first_are_recorded(plain, batches, tmp_path):
    def accumulate():
        optimizer = sgd(plain.parameters())
        for _ in range(100):
            cross_entropy(plain(batches[0][0]), batches[0][1]).backward()
        optimizer.step()

    (update,) = recorded(tmp_path, accumulate, modules=True)
    assert update.values["micro_batches"] == 100
    assert len(update.points("batch")) == 16
    names = update.table("outputs", "").names
    assert [name for name in names if name.startswith("model")] == ["model", *(f"model call {number}" for number in range(2, 17))]


def test_a_skipped_step_of_a_grad_scaler_is_a_skipped_update(plain, batches, tmp_path):
    def scaled():
        optimizer, scaler = sgd(plain.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0 ** 15)
        for number, (input, target) in enumerate(batches[:3]):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = cross_entropy(plain(input * (1e30 if number == 1 else 1)), target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()

    updates = recorded(tmp_path, scaled)
    assert [update.skipped for update in updates] == [False, True, False]
    assert updates[1].values["loss_scale"] == 2.0 ** 15
    assert updates[1].table("weights", "start") == updates[1].table("weights", "end")
    assert updates[0].values["outputs"] == "float16"
    first = updates[0]
    assert first.table("gradients", "backward 1").norm > 100 * first.table("gradients", "update").norm
    assert first.table("gradients", "update").norm == pytest.approx(0.1, rel=1e-3)


def test_a_closure_that_is_called_several_times_is_one_update(plain, batches, tmp_path):
    def steps():
        optimizer = torch.optim.LBFGS(plain.parameters(), max_iter=3)
        for input, target in batches[:2]:
            def closure(input=input, target=target):
                optimizer.zero_grad()
                loss = cross_entropy(plain(input), target)
                loss.backward()
                return loss.detach()
            optimizer.step(closure)

    updates = recorded(tmp_path, steps)
    assert [update.number for update in updates] == [1, 2]
    assert updates[0].values["micro_batches"] >= 3
    assert updates[0].table("gradients", "backward 1") != updates[0].table("gradients", "backward 2")


def test_an_optimizer_that_steps_another_one_or_extends_one_makes_one_update(plain, batches, tmp_path):
    class Extended(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    class Around(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner, self.fail = inner, False

        def step(self):
            self.inner.step()
            if self.fail:
                raise ValueError

    def steps():
        optimizer = Around(Extended(plain.parameters(), lr=0.1))
        for optimizer.fail in (False, True, False):
            cross_entropy(plain(batches[0][0]), batches[0][1]).backward()
            try:
                optimizer.step()
            except ValueError:
                plain.zero_grad()

    updates = recorded(tmp_path, steps)
    assert [update.number for update in updates] == [1, 2]
    assert len(updates[0].values["points"]) == len(updates[0].observed)         # each is there once


def test_several_optimizers_make_an_update_each(plain, batches, tmp_path):
    def steps():
        optimizers = [sgd(plain[0].parameters()), torch.optim.Adam(plain[2].parameters(), lr=0.01)]
        for input, target in batches[:2]:
            cross_entropy(plain(input), target).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    updates = recorded(tmp_path, steps)
    assert len(updates) == 4
    for one, two in pairwise(updates):
        assert one.table("weights", "end") == two.table("weights", "start")
    assert [group["numbers"]["lr"] for group in updates[-1].values["groups"]] == [0.1, 0.01]
    # Each changes its own weights.
    for update, changed in zip(updates, ({0, 1}, {2, 3}) * 2, strict=True):
        start, end = update.table("weights", "start").checksums, update.table("weights", "end").checksums
        assert {index for index in range(4) if start[index] != end[index]} == changed


def test_arguments_by_name_a_functional_loss_and_a_model_that_returns_its_loss(plain, batches, tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain

        def forward(self, x, labels=None, scale=1.0):
            logits = self.inner(x) * scale
            return logits if labels is None else {"loss": functional.cross_entropy(logits, labels), "logits": logits}

    def steps():
        model = Named()
        optimizer = sgd(model.parameters())
        input, target = batches[0]
        for loss in (lambda: functional.cross_entropy(model(input), target), lambda: model(x=input, labels=target)["loss"],
                     lambda: model(input, labels=target)["loss"]):
            loss().backward()
            optimizer.step()

    one, two, three = recorded(tmp_path, steps)
    assert one.table("batch", "1").names == ("input",)
    assert two.table("batch", "1").names == ("x", "labels")
    assert three.table("batch", "1").names == ("input", "labels")
    assert two.table("batch", "1").checksums == three.table("batch", "1").checksums
    assert one.table("batch", "1").checksums == two.table("batch", "1").checksums[:1]
    assert two.number_of("loss of a batch", "1") == two.number_of("backward", "1")


def test_evaluation_between_updates_is_not_recorded(net, batches, tmp_path):
    def steps():
        optimizer = sgd(net.parameters())
        for input, target in batches[:2]:
            net.eval()
            with torch.no_grad():
                cross_entropy(net(input + 1), target)
            net.train()
            cross_entropy(net(input), target).backward()
            net.eval()
            with torch.no_grad():
                cross_entropy(net(input + 1), target)
            optimizer.step()

    for update in recorded(tmp_path, steps, modules=True):
        assert update.points("batch") == ["1"]
        assert not [name for name in update.table("outputs", "").names if "call" in name]


def test_updates_that_no_optimizer_makes_are_recorded_by_hand(plain, batches, tmp_path):
    def steps():
        for input, target in batches[:2]:
            plain.zero_grad()
            cross_entropy(plain(input), target).backward()
            with recording.update(lr=0.5), torch.no_grad():
                for parameter in plain.parameters():
                    parameter -= 0.5 * parameter.grad

    with record(tmp_path / "a.tape", plain) as recording:
        steps()
    updates = [*read_tape(tmp_path / "a.tape")]
    assert [update.values["groups"] for update in updates] == [[{"group": 0, "numbers": {"lr": 0.5}}]] * 2
    assert all(update.table("weights", "start") != update.table("weights", "end") for update in updates)


def test_activation_checkpointing_by_hand_adds_no_calls_and_no_backward_passes(plain, batches, tmp_path):
    from torch.utils.checkpoint import checkpoint

    def steps():
        optimizer = sgd(plain.parameters())
        for reentrant in (False, True):
            inner = checkpoint(plain[:2], batches[0][0].clone().requires_grad_(), use_reentrant=reentrant)
            cross_entropy(plain[2](inner), batches[0][1]).backward()
            optimizer.step()

    for update in recorded(tmp_path, steps, model=plain, modules=True):
        assert update.points("gradients") == ["backward 1", "update"]
        assert not [name for name in update.table("outputs", "").names if "call" in name]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_model_is_recorded_under_its_own_names_and_compiled_once(plain, batches, clone, tmp_path):
    other, counted = clone(plain), []

    def counting(graph, inputs):
        counted.append(graph)
        return graph.forward

    compiled = torch.compile(other, backend=counting)
    for model, name in ((plain, "a"), (compiled, "b")):
        with record(tmp_path / f"{name}.tape"):
            train(model, batches[:3])
    assert len(counted) == 1
    one, two = read_tape(tmp_path / "a.tape"), read_tape(tmp_path / "b.tape")
    for number in (1, 2, 3):
        for what, point in (("weights", "start"), ("weights", "end"), ("batch", "1"), ("gradients", "update")):
            assert one.updates[number].table(what, point) == two.updates[number].table(what, point)


def test_a_sparse_gradient_is_recorded(tmp_path):
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(8, 3))

    def steps():
        train(model, [(torch.randint(0, 10, (4, 2)), torch.randint(0, 3, (4,)))] * 2, partial(torch.optim.SGD, lr=0.1))

    updates = recorded(tmp_path, steps)
    assert updates[1].table("gradients", "update").norms[0] == pytest.approx(model[0].weight.grad.to_dense().norm().item())


def test_each_process_writes_a_tape_of_its_own(plain, batches, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with record(tmp_path / "a.tape"):
        train(plain, batches[:1])
    assert [file.name for file in tmp_path.iterdir()] == ["a.1.tape"]
    assert read_tape(tmp_path / "a.1.tape").header["rank"] == 1


def test_a_tape_takes_kilobytes_at_any_size_of_the_model(tmp_path):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(300)))
    (update,) = recorded(tmp_path, lambda: train(model, [(torch.randn(4, 8), torch.zeros(4).long())]))
    names = update.table("weights", "start").names
    assert len(names) <= 64
    assert names[0] == "0.weight to 4.bias"
    assert max(len(line) for line in (tmp_path / "a.tape").read_text().splitlines() if '"update"' in line) < 16_000


def test_a_step_that_calls_the_one_it_overrides_is_one_update(tmp_path):
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = nn.Linear(2, 2)
    torch.optim.SGD(model.parameters(), lr=0.1)         # whose step has torch's hooks from now on
    optimizer = Own(model.parameters(), lr=0.1)
    with record(tmp_path / "a.tape", model):
        for _ in range(3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert [*read_tape(tmp_path / "a.tape").updates] == [1, 2, 3]


@pytest.mark.parametrize(("factor", "skipped"), [(1.0, [False, False]), (float("inf"), [True, True])])
def test_a_scaler_may_be_given_something_that_makes_the_update_later(factor, skipped, tmp_path):
    class Later:                        # as callbacks of fastai do
        step_later = False

        def __init__(self, optimizer):
            self.param_groups = optimizer.param_groups

        def step(self):
            self.step_later = True

    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler, later = torch.amp.GradScaler("cpu"), Later(optimizer)
    with record(tmp_path / "a.tape", model):
        for _ in range(2):
            optimizer.zero_grad()
            scaler.scale(model(torch.ones(1, 2)).sum() * factor).backward()
            later.step_later = False
            scaler.step(later)
            scaler.update()
            if later.step_later:
                optimizer.step()
    assert [update.skipped for update in read_tape(tmp_path / "a.tape")] == skipped
    assert "step" not in vars(later)


def test_weights_that_are_loaded_after_a_first_call_are_what_the_update_starts_from(tmp_path):
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with record(tmp_path / "a.tape", model, modules=True):
        model(torch.ones(1, 2))                         # as libraries do that build a model by a call
        model.load_state_dict(other.state_dict())
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    update = read_tape(tmp_path / "a.tape").updates[1]
    assert update.table("weights", "start").norms == pytest.approx([float(each.detach().norm()) for each in other.parameters()])
    assert update.table("outputs", "").names == ("model",)
