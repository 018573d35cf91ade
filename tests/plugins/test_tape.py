"""The tape of a run: equal to that of a plain loop, of a resumed run and of the ranks; it changes nothing."""
import json
import os
import signal
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from loopctl import Run, UsageError, available, fit, hookimpl
from loopctl.plugins.tape import Tape
from loopctl.tape import record
from loopctl.tape.reading import read_tape
from loopctl.tape.tape_file import records
from tests.conftest import data_for, make_batches

cross_entropy = nn.CrossEntropyLoss()
pytestmark = pytest.mark.usefixtures("undrawn")


def run_tape(folder, model, batches, *plugins, optimizer, valid=None, loss_fn=cross_entropy, epochs=2, spec="tape", **options):
    """The tape of a run of loopctl."""
    fit(model, loss_fn, optimizer, batches, valid, epochs=epochs, plugins=[spec, *plugins], seed=1, out=folder, **options)
    return read_tape(folder / "run.tape")


def by_hand(folder, model, loop, **options):
    """The tape of a loop without loopctl."""
    torch.manual_seed(1)
    model.train()
    with record(folder / "plain.tape", model, **options):
        loop(model)
    return read_tape(folder / "plain.tape")


def assert_alike(run, plain, *gradients, every=1, loss=True):
    """Each update of a run has what every `every`-th of the loop has. gradients: pairs of points."""
    assert (run.damaged, plain.damaged) == (0, 0)
    assert [number * every for number in run.updates] == [*plain.updates][every - 1::every]
    for number, one in run.updates.items():
        two, first = plain.updates[number * every], plain.updates[number * every - every + 1]
        for what in ("weights", "buffers", "state"):
            assert one.table(what, "start") == first.table(what, "start"), f"update {number}: {what}"
            assert one.table(what, "end") == two.table(what, "end"), f"update {number}: {what}"
        assert one.values["random"]["start"] == first.values["random"]["start"]
        assert one.values["random"]["end"] == two.values["random"]["end"]
        assert one.values["groups"] == two.values["groups"]
        assert one.skipped == two.skipped
        for point in one.points("batch") if every == 1 else ():
            rows, others = (dict(zip(table.names, zip(table.checksums, table.norms, strict=True), strict=True))
                            for table in (one.table("batch", point), two.table("batch", point)))
            assert others.items() <= rows.items()
            assert rows.keys() - others.keys() <= {"target", "labels"}
            assert one.observed["samples", point] == two.observed["samples", point]
        for own, other in gradients:
            assert one.table("gradients", own) == two.table("gradients", other.format(last=two.values["micro_batches"])), f"update {number}: {own}"


@pytest.mark.parametrize("every_steps", [1, 3])
def test_it_equals_the_tape_of_a_plain_loop(net, batches, valid, sgd, clone, same, tmp_path, every_steps):
    other = clone(net)
    run = run_tape(tmp_path, net, batches, "clip:max_norm=0.1", optimizer=sgd, valid=valid, spec=f"tape:modules=true,every_steps={every_steps}")

    def loop(model):
        optimizer = sgd(model.parameters())
        for _ in range(2):
            model.train()
            for input, target in batches:
                optimizer.zero_grad()
                cross_entropy(model(input), target).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
            model.eval()
            with torch.no_grad():
                for input, _ in valid:
                    model(input)

    plain = by_hand(tmp_path, other, loop, modules=True, every_steps=every_steps)
    same(net, other)
    assert [*run.updates] == ([*range(1, 17)] if every_steps == 1 else [1, 3, 6, 9, 12, 15])
    assert [*run.updates] == [*plain.updates]
    run.updates = {number: run.updates[number] for number in plain.updates}
    for number in run.updates:
        one, two = run.updates[number], plain.updates[number]
        single = SimpleNamespace(updates={1: one}, damaged=0), SimpleNamespace(updates={1: two}, damaged=0)
        assert_alike(*single, ("backward", "backward 1"), ("grads_ready clip", "update"))
        assert one.points("gradients") == ["backward", "grads_ready clip"]
        assert one.number_of("loss") == two.number_of("loss of a batch", "1") == two.number_of("backward", "1")
        for what in ("outputs", "output gradients"):
            assert one.table(what, "") == two.table(what, "")
        assert {"model", "0", "1", "4"} <= {*one.table("outputs", "").names}
        assert one.values["modes"] == two.values["modes"]
        assert one.values["in_eval_mode"] == []
    assert [record["update"] for record in run.evaluations] == [8, 16]
    assert run.end["update"] == 16
    assert run.header["config"]


def test_it_equals_that_of_accumulation_by_hand(net, batches, sgd, clone, tmp_path):
    other = clone(net)
    run = run_tape(tmp_path, net, batches, "accumulate:every=3", optimizer=sgd)

    def loop(model):
        optimizer = sgd(model.parameters())
        for _ in range(2):
            for start in range(0, 8, 3):
                group = batches[start:start + 3]
                optimizer.zero_grad()
                for input, target in group:
                    (cross_entropy(model(input), target) * (len(input) / sum(len(each[0]) for each in group))).backward()
                optimizer.step()

    plain = by_hand(tmp_path, other, loop)
    assert_alike(run, plain, ("backward", "backward {last}"), ("backward", "update"))
    assert [update.values["micro_batches"] for update in run] == [3, 3, 2] * 2
    assert [update.values["in_epoch"] for update in run] == [1, 2, 3] * 2


def test_it_equals_that_of_float16_with_a_skipped_step_by_hand(plain, batches, clone, tmp_path):
    other, sgd = clone(plain), partial(torch.optim.SGD, lr=0.1)
    batches = [(input * (1e30 if number == 2 else 1), target) for number, (input, target) in enumerate(batches[:5])]
    run = run_tape(tmp_path, plain, batches, "amp:dtype=float16,init_scale=32768", optimizer=sgd, epochs=1)

    def loop(model):
        optimizer, scaler = sgd(model.parameters()), torch.amp.GradScaler("cpu", init_scale=32768)
        for input, target in batches:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = cross_entropy(model(input), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    hand = by_hand(tmp_path, other, loop)
    assert [update.skipped for update in run] == [False, False, True, False, False]
    assert_alike(run, hand, ("backward", "backward 1"))
    for number in (1, 2, 4, 5):
        assert run.updates[number].table("gradients", "after_backward amp") == hand.updates[number].table("gradients", "update")
    assert run.updates[1].values["outputs"] == hand.updates[1].values["outputs"] == "float16"


def test_it_equals_that_of_a_closure_by_hand(plain, batches, clone, tmp_path):
    other, lbfgs = clone(plain), partial(torch.optim.LBFGS, lr=0.5, max_iter=3)
    run = run_tape(tmp_path, plain, batches[:3], optimizer=lbfgs, epochs=1)

    def loop(model):
        optimizer = lbfgs(model.parameters())
        for input, target in batches[:3]:
            def closure(input=input, target=target):
                optimizer.zero_grad()
                loss = cross_entropy(model(input), target)
                loss.backward()
                return loss.detach()
            optimizer.step(closure)

    hand = by_hand(tmp_path, other, loop)
    for update in hand:                 # micro-batches are counted in all calls there
        assert run.updates[update.number].values["calls"] == update.values["micro_batches"]
    assert_alike(run, hand, ("backward", "backward 1"), ("backward (call 2)", "backward 2"))


def test_it_equals_that_of_several_optimizers_by_hand(plain, batches, clone, tmp_path):
    other = clone(plain)
    factories = {"0": partial(torch.optim.SGD, lr=0.1, momentum=0.9), "*": partial(torch.optim.SGD, lr=0.02)}
    run = run_tape(tmp_path, plain, batches[:3], optimizer=factories, epochs=1)

    def loop(model):
        one, two = factories["0"](model[0].parameters()), factories["*"](model[2].parameters())
        for optimizer, name in ((one, "0"), (two, "*")):
            optimizer.param_groups[0]["name"] = name
        for input, target in batches[:3]:
            one.zero_grad()
            two.zero_grad()
            cross_entropy(model(input), target).backward()
            one.step()
            two.step()

    hand = by_hand(tmp_path, other, loop)
    assert_alike(run, hand, ("backward", "update"), every=2)


def test_it_equals_that_of_a_dict_batch_and_a_model_called_by_name(plain, batches, sgd, clone, tmp_path):
    class Named(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids, mask, labels=None):
            logits = self.inner(ids * mask)
            return functional.cross_entropy(logits, labels) if labels is not None else logits

    batches = [{"ids": input, "mask": input > 0, "labels": target} for input, target in batches]
    one, two = Named(plain), Named(clone(plain))

    def loop(model):
        optimizer = sgd(model.parameters())
        for batch in batches:
            optimizer.zero_grad()
            model(**batch).backward()
            optimizer.step()

    run = run_tape(tmp_path, one, batches, optimizer=sgd, epochs=1, loss_fn=None)
    hand = by_hand(tmp_path, two, loop)
    assert_alike(run, hand, ("backward", "update"))
    assert run.updates[1].table("batch", "1") == hand.updates[1].table("batch", "1")
    assert run.updates[1].table("batch", "1").names == ("ids", "mask", "labels")
    assert run.updates[1].number_of("loss") == hand.updates[1].number_of("loss of a batch", "1")


def test_it_equals_that_of_a_functional_loss_by_hand(plain, batches, sgd, clone, tmp_path):
    other = clone(plain)

    def loop(model):
        optimizer = sgd(model.parameters())
        for input, target in batches:
            optimizer.zero_grad()
            functional.cross_entropy(model(input), target).backward()
            optimizer.step()

    run = run_tape(tmp_path, plain, batches, optimizer=sgd, epochs=1, loss_fn=functional.cross_entropy)
    hand = by_hand(tmp_path, other, loop)
    assert_alike(run, hand, ("backward", "update"))
    assert hand.updates[1].table("batch", "1").names == ("input",)


def test_each_turn_of_several_optimizers_has_its_gradients(plain, batches, tmp_path):
    def forward(model, batch):
        output = model(batch[0])
        return functional.cross_entropy(output, batch[1]), output

    optimizers = {"0": partial(torch.optim.SGD, lr=0.1), "2": partial(torch.optim.SGD, lr=0.2)}
    run = run_tape(tmp_path, plain, batches[:2], "clip:max_norm=0.01", optimizer=optimizers, loss_fn=None, forward={"0": forward, "2": forward}, epochs=1)
    for update in run:
        assert update.points("gradients") == ["0: backward", "0: grads_ready clip", "2: backward", "2: grads_ready clip"]
        assert update.points("batch") == ["1"]
        for turn, own in (("0", slice(0, 2)), ("2", slice(2, 4))):
            before, after = (update.table("gradients", f"{turn}: {point}").norms[own] for point in ("backward", "grads_ready clip"))
            assert sum(norm ** 2 for norm in before) ** 0.5 > 0.011
            assert sum(norm ** 2 for norm in after) ** 0.5 == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("name", sorted({*available()} - {"cudagraph", "tape"}))
def test_it_changes_no_bit_of_a_run_with_another_plugin(net, batches, valid, sgd, clone, same, example, tmp_path, name):
    spec = example(name)
    if name == "distill":
        spec = "distill:teacher=tests.conftest:tiny_model"
    images = data_for([spec], net, batches, valid)
    images[0][7:] = []
    other = clone(net)
    for model, more in ((net, []), (other, ["tape" if name == "compile" else "tape:modules=true"])):
        run = fit(model, cross_entropy, sgd, images[0], images[1], epochs=2, plugins=[*more, spec], seed=1, out=tmp_path / str(len(more)))
    same(net, other)
    tape = read_tape(tmp_path / "1" / "run.tape")
    assert [*tape.updates] == [*range(1, run.attempts + 1)]
    assert tape.damaged == 0
    if name not in ("local_sgd", "prune", "sam"):
        assert not any(update.values["changed_by"] for update in tape)


class Scale:
    """A plugin that changes the weights at a hook of its choice."""

    def __new__(cls, hook, at, counted=True):
        def act(self, run: Run):
            if run.attempts == at:
                for parameter in run.model.parameters():
                    with torch.no_grad():
                        (parameter if counted else parameter.data).mul_(0.5)
        return type("Scale", (), {hook: hookimpl(act), "__init__": lambda self: None})()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("hook", ["before_step", "grads_ready", "after_step", "safe_point", "after_evaluate", "epoch_end", "epoch_start"])
def test_a_plugin_that_changes_the_weights_is_named_with_its_hook(plain, batches, valid, sgd, tmp_path, hook, first):
    """In the update that starts from what it has changed, whatever the order of the plugins, with plugins that do not change them."""
    at = 8 if hook.startswith("epoch") or hook == "after_evaluate" else 3
    plugins = [Scale(hook, at), "swa" if hook == "after_evaluate" else "ema:decay=0.9", "clip:max_norm=1", "early_stopping"]
    fit(plain, cross_entropy, sgd, batches, valid, epochs=2, plugins=[*plugins, "tape"] if first else ["tape", *plugins], seed=1, out=tmp_path)
    tape = read_tape(tmp_path / "run.tape")
    assert {update.number: update.values["changed_by"] for update in tape if update.values["changed_by"]} == {at + 1: [[hook, "scale"]]}
    same_weights = tape.updates[at].table("weights", "end") == tape.updates[at + 1].table("weights", "start")
    assert same_weights == (hook in ("before_step", "grads_ready"))


def test_a_plugin_that_changes_only_the_average_is_not_named(plain, batches, valid, sgd, tmp_path):
    tape = run_tape(tmp_path, plain, batches, "ema:decay=0.9", Scale("after_evaluate", 8), optimizer=sgd, valid=valid)
    assert not any(update.values["changed_by"] for update in tape)


def test_a_plugin_is_not_named_for_what_the_optimizer_does_between_closures(plain, batches, tmp_path):
    tape = run_tape(tmp_path, plain, batches[:2], "clip:max_norm=0.1", optimizer=partial(torch.optim.LBFGS, lr=0.5, max_iter=3), epochs=1)
    assert [update.values["changed_by"] for update in tape] == [[], []]
    assert tape.updates[1].values["calls"] > 1


def test_a_change_that_torch_does_not_count_is_in_the_weights_all_the_same(plain, batches, sgd, tmp_path):
    tape = run_tape(tmp_path, plain, batches, Scale("after_step", 3, counted=False), optimizer=sgd, epochs=1)
    for number in range(1, 8):
        assert (tape.updates[number].table("weights", "end") == tape.updates[number + 1].table("weights", "start")) == (number != 3)


def test_a_plugin_that_prunes_after_steps_is_named(net, batches, sgd, tmp_path):
    tape = run_tape(tmp_path, net, batches, "prune:amount=0.5", optimizer=sgd)
    assert {plugin for update in tape for _, plugin in update.values["changed_by"]} <= {"prune"}


def test_gradients_are_recorded_after_each_plugin_that_may_change_them(net, batches, sgd, tmp_path):
    """Also of a wrapper before and after what it wraps, and not of one that only observes."""
    class Around:
        @hookimpl(wrapper=True)
        def grads_ready(self, run: Run):
            yield
            for parameter in run.model.parameters():
                parameter.grad.mul_(2)

    tape = run_tape(tmp_path, net, batches[:2], "norms:every_steps=1", "clip:max_norm=0.1", Around(), "agc", optimizer=sgd, epochs=1)
    for update in tape:
        assert update.points("gradients") == ["backward", "grads_ready around (before)", "grads_ready clip", "grads_ready agc", "grads_ready around"]
        assert update.table("gradients", "grads_ready around (before)") == update.table("gradients", "backward")
        assert update.table("gradients", "grads_ready clip").norm == pytest.approx(0.1, rel=1e-3)


def test_two_tapes_in_one_run_record_both(net, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, plugins=["tape", "tape:path=b.tape,every_steps=4"], seed=1, out=tmp_path)
    one, two = read_tape(tmp_path / "run.tape"), read_tape(tmp_path / "b.tape")
    assert [*two.updates] == [1, 4, 8]
    assert all(two.updates[number] == one.updates[number] for number in two.updates)


def test_what_cannot_be_recorded_is_refused_before_training(net, batches, sgd, tmp_path):
    (tmp_path / "run.tape").write_text("mine")
    for plugins, expected in ((["tape"], "run.tape exists and is not overwritten"), (["tape:path="], "is a folder"),
                              (["tape:path=a.tape", "tape:path=a.tape"], "writes to path=a.tape too"),
                              (["tape:path=a.tape,modules=true", "compile:backend=eager"], "the model is compiled")):
        with pytest.raises(UsageError, match=expected):
            fit(net, cross_entropy, sgd, batches, plugins=plugins, seed=1, out=tmp_path)
    with pytest.raises(ValueError, match="every_steps is at least 1"):
        Tape(every_steps=0)
    assert (tmp_path / "run.tape").read_text() == "mine"
    assert len([*tmp_path.iterdir()]) == 1


class Kill:
    observer_only = True

    def __init__(self, at):
        self.at = at

    @hookimpl
    def safe_point(self, run: Run):
        if run.attempts == self.at:
            raise KeyboardInterrupt


def content(folder):
    """The records of a tape without its header."""
    return [found for found in records(folder / "run.tape") if found["kind"] != "tape"]


@pytest.mark.parametrize("spec", ["tape:modules=true", "tape:every_steps=3"])
@pytest.mark.parametrize("at", [5, 8, 11])
def test_the_tape_of_a_resumed_run_is_that_of_one_that_was_never_interrupted(net, batches, valid, sgd, clone, tmp_path, spec, at):
    """Killed within an epoch and at its end, some steps after the last checkpoint. Record for record, except for the header."""
    plugins = ["checkpoint:every_steps=2,every_epochs=1", Scale("after_step", 6), "ema:decay=0.9", spec]
    other = clone(net)
    fit(other, cross_entropy, sgd, batches, valid, epochs=2, plugins=plugins, seed=1, eval_every=3, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(clone(net), cross_entropy, sgd, batches, valid, epochs=2, plugins=[*plugins, Kill(at)], seed=1, eval_every=3, out=tmp_path / "parts")
    assert read_tape(tmp_path / "parts" / "run.tape").end["why"] == "KeyboardInterrupt"
    fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=plugins, seed=1, eval_every=3, out=tmp_path / "parts", resume=tmp_path / "parts")
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_run_that_is_resumed_with_a_tape_for_the_first_time_begins_one_there(net, batches, sgd, clone, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(clone(net), cross_entropy, sgd, batches, plugins=["checkpoint:every_steps=2", Kill(5)], seed=1, out=tmp_path)
    fit(net, cross_entropy, sgd, batches, plugins=["checkpoint:every_steps=2", "tape"], seed=1, out=tmp_path, resume=tmp_path)
    assert [*read_tape(tmp_path / "run.tape").updates] == [5, 6, 7, 8]
    assert read_tape(tmp_path / "run.tape").header["model"] == "Sequential"


def test_a_killed_process_leaves_a_tape_that_is_readable_to_its_last_checkpoint(net, batches, sgd, tmp_path):
    class KillHard:
        @hookimpl
        def before_step(self, run: Run):
            if run.attempts == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        fit(net, cross_entropy, sgd, batches, plugins=["checkpoint:every_steps=2", "tape", KillHard()], seed=1, out=tmp_path)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    tape = read_tape(tmp_path / "run.tape")
    assert {1, 2, 3, 4} <= tape.updates.keys()
    assert tape.end is None


def test_a_full_disk_is_a_warning_and_training_goes_on(net, batches, sgd, clone, same, tmp_path, caplog):
    other = clone(net)

    class Full:
        @hookimpl
        def before_step(self, run: Run):
            if run.attempts == 3:
                tape.writer.close()
                tape.writer.opened = open("/dev/full", "w", buffering=64)        # noqa: SIM115  closed by the plugin

    tape = Tape()
    fit(net, cross_entropy, sgd, batches, plugins=[tape, Full()], seed=1, out=tmp_path)
    fit(other, cross_entropy, sgd, batches, seed=1)
    same(net, other)
    assert [line for line in caplog.messages if "run.tape" in line] == [
        f"tape: {tmp_path / 'run.tape'} cannot be written (No space left on device); nothing more is"]
    assert [*read_tape(tmp_path / "run.tape").updates] == [1, 2, 3]


def test_batches_of_all_kinds_are_described(net, sgd, tmp_path):
    """Nested, with text, arrays of NumPy, scalars, many samples, sparse, and without samples."""
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 1)

        def forward(self, **batch):
            return self.inner(torch.ones(3, 2)).mean()

    one = {"a": {"b": [torch.ones(3), (torch.zeros(2), "text")], "c": 3}, "array": np.arange(4), "scalar": torch.tensor(2.0),
           "sparse": torch.eye(3).to_sparse(), "none": None, "words": [f"word {number}" for number in range(100)]}
    run = run_tape(tmp_path / "1", Any(), [one], optimizer=sgd, loss_fn=None, epochs=1, forward=lambda model, batch: (model(**batch), None))
    update = run.updates[1]
    assert update.table("batch", "1").names == ("a.0", "a.1", "array", "scalar", "sparse")
    described = update.values["batches"]["1"]
    assert described["leaves"][:3] == [["a.0", "3", "float32"], ["a.1", "2", "float32"], ["array", "4", "int64"]]
    assert described["others"][:2] == ["a.2 'text'", "a.3 3"]
    assert len(described["others"]) == 65
    assert described["samples"] == 3
    changed = one | {"words": [*one["words"][:-1], "another"]}
    other = run_tape(tmp_path / "2", Any(), [changed], optimizer=sgd, loss_fn=None, epochs=1, forward=lambda model, batch: (model(**batch), None))
    assert other.updates[1].values["batches"]["1"]["others"] != described["others"]

    many = [(torch.randn(600, 6), torch.randint(0, 3, (600,)))]
    run = run_tape(tmp_path / "3", net, many, optimizer=sgd, epochs=1)
    assert run.updates[1].points("samples") == []
    parts = [OrderedDict(list=[torch.ones(1) for _ in range(200)])]
    run = run_tape(tmp_path / "4", Any(), parts, optimizer=sgd, loss_fn=None, epochs=1, forward=lambda model, batch: (model(), None))
    assert len(run.updates[1].table("batch", "1").names) <= 64


def test_a_step_without_samples_is_recorded_as_skipped(plain, sgd, tmp_path):
    batches = [*make_batches([4]), (torch.zeros(0, 6), torch.zeros(0).long()), *make_batches([4])]
    tape = run_tape(tmp_path, plain, batches, optimizer=sgd, epochs=1)
    assert [update.skipped for update in tape] == [False, True, False]
    assert tape.updates[2].points("gradients") == []


def test_very_many_micro_batches_take_a_limited_record(plain, sgd, tmp_path):
    tape = run_tape(tmp_path, plain, make_batches([2] * 100), "accumulate:every=100", optimizer=sgd, epochs=1, spec="tape:modules=true")
    (update,) = tape
    assert update.values["micro_batches"] == 100
    assert len(update.points("batch")) == 64
    assert len(json.dumps(update.values)) < 60_000


def test_split_records_the_batch_as_it_comes(net, batches, sgd, tmp_path):
    tape = run_tape(tmp_path, net, batches[:3], "split:into=2", optimizer=sgd, epochs=1)
    assert [update.points("batch") for update in tape] == [["1"]] * 3
    assert [update.values["batches"]["1"]["samples"] for update in tape] == [8, 8, 8]


def test_the_calls_of_modules_are_told_apart(batches, sgd, tmp_path):
    """A module that is called twice or shared, one that works in place, outputs that are no tensor, one that is a parameter."""
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self):
            return self.weight

    class Pair(nn.Module):
        def forward(self, x):
            return {"text": "no tensor", "both": (x + 1, x * 2)}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.act, self.pair, self.own, self.last = nn.Linear(6, 6), nn.ReLU(inplace=True), Pair(), Own(), nn.Linear(6, 3)
            self.again = self.shared
            self.nothing = nn.Identity()

        def forward(self, x):
            one, two = self.pair(self.act(self.shared(x)))["both"]
            with torch.no_grad():
                self.nothing(x)
            return self.last(self.again(one + two) * self.own())

    torch.manual_seed(0)
    model = Model()
    tape = run_tape(tmp_path, model, batches, optimizer=sgd, epochs=1, valid=batches[:1], spec="tape:modules=true")
    for update in tape:
        table = update.table("outputs", "")
        assert table.names == ("shared", "act", "pair", "pair output 1", "nothing", "shared call 2", "own", "last", "model")
        assert table.checksums[0] != table.checksums[1]
        assert {*update.table("output gradients", "").names} == {*table.names} - {"nothing"}
    assert not model.own.weight._backward_hooks
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_pass_that_is_repeated_in_the_backward_pass_is_recorded_once(net, batches, sgd, clone, tmp_path):
    run = run_tape(tmp_path / "1", clone(net), batches, optimizer=sgd, spec="tape:modules=true")
    again = run_tape(tmp_path / "2", net, batches, "activation_checkpointing:modules=*", optimizer=sgd, spec="tape:modules=true")
    for number, update in run.updates.items():
        one, two = (each.table("outputs", "") for each in (update, again.updates[number]))
        assert dict(zip(one.names, one.checksums, strict=True)) == dict(zip(two.names, two.checksums, strict=True))
        one, two = (each.table("output gradients", "") for each in (update, again.updates[number]))
        assert dict(zip(two.names, two.checksums, strict=True)).items() <= dict(zip(one.names, one.checksums, strict=True)).items()


def test_the_hooks_of_modules_are_removed_after_an_error(net, batches, sgd, tmp_path):
    with pytest.raises(RuntimeError, match="mat1"):
        fit(net, cross_entropy, sgd, [*batches[:2], (torch.randn(2, 5), torch.zeros(2).long())], plugins=["tape:modules=true"], out=tmp_path)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert read_tape(tmp_path / "run.tape").end["why"] == "RuntimeError"


def test_a_model_that_is_compiled_has_the_tape_of_one_that_is_not(net, batches, sgd, clone, tmp_path):
    one = run_tape(tmp_path / "1", clone(net), batches, optimizer=sgd)
    two = run_tape(tmp_path / "2", net, batches, "compile:backend=eager", optimizer=sgd)
    assert [update.observed for update in one] == [update.observed for update in two]


def test_a_tape_in_half_precision_and_with_frozen_parameters(net, batches, sgd, tmp_path):
    net[0].requires_grad_(False)
    batches = [(input.bfloat16(), target) for input, target in batches]
    update = run_tape(tmp_path, net.bfloat16(), batches, optimizer=sgd, epochs=1).updates[1]
    gradients = update.table("gradients", "backward")
    assert gradients.missing == {0, 1}
    assert gradients.norms[0] == -1 < gradients.norms[2]
    assert read_tape(tmp_path / "run.tape").header["parameters"][0] == ["0.weight", "16x6", "bfloat16", False]
