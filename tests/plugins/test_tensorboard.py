"""What TensorBoard reads back from what a run has written."""
import builtins
import math
import time

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.composition.compose import compose
from loopctl.metrics.host_copy import HostCopy
from loopctl.plugins.tensorboard import rate_tags

pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'loopctl[tensorboard]'")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

cross_entropy = nn.CrossEntropyLoss()


def read(folder):
    """All that is in the events of one folder, as TensorBoard has it."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "histograms": 0})
    events.Reload()
    return events


def points(folder, tag):
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def single(value):
    """As it is in 32 bits."""
    return torch.tensor(value, dtype=torch.float32).item()


class Watch:
    def __init__(self):
        self.losses, self.rates = [], []

    @hookimpl
    def after_step(self, run: Run):
        self.losses.append(run.loss.item())
        self.rates.append([float(group["lr"]) for group in run.optimizer.param_groups])


def right(output, target):
    return (output.argmax(1) == target).float().mean()


def test_train_and_valid_of_a_metric_share_a_chart(net, batches, valid, sgd, tmp_path):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=["tensorboard", "clip"], metrics={"right": right},
              out=tmp_path)
    for where, prefix in (("train", "train_"), ("valid", "val_")):
        for tag in ("loss", "right"):
            expected = [(row["step"], single(row[prefix + tag])) for row in run.history]
            assert points(tmp_path / "tensorboard" / where, tag) == expected
    assert points(tmp_path / "tensorboard" / "train", "grad_norm") == [(row["step"], single(row["grad_norm"])) for row in run.history]
    assert set(read(tmp_path / "tensorboard" / "train").Tags()["scalars"]) == {"loss", "right", "grad_norm"}
    assert set(read(tmp_path / "tensorboard" / "valid").Tags()["scalars"]) == {"loss", "right"}


@pytest.mark.parametrize(("names", "tags"), [
    ((None,), ["lr"]), ((None, None), ["lr/group_0", "lr/group_1"]), (("fc.*", "a/b"), ["lr/group_fc._", "lr/group_a_b"]),
    (("a*", "a?"), ["lr/group_0", "lr/group_1"]),
], ids=str)
def test_the_tags_of_learning_rates_are_names_that_stay_apart(names, tags):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "name": name} for name in names]
    assert rate_tags(torch.optim.SGD(groups, lr=0.1)) == tags


def test_losses_and_rates_of_steps(net, batches, sgd, tmp_path):
    watch = Watch()
    fit(net, cross_entropy, sgd, batches, epochs=2, out=tmp_path,
        plugins=["tensorboard:every_steps=3", "layerwise_lr:decay=0.5", "cosine:by=step", watch])
    steps = [1, 3, 6, 9, 12, 15]
    steps_of = tmp_path / "tensorboard"
    assert points(steps_of, "step_loss") == [(step, single(watch.losses[step - 1])) for step in steps]
    for group in range(len(watch.rates[0])):
        assert points(steps_of, f"lr/group_layer_{2 - group}") == [(step, single(watch.rates[step - 1][group])) for step in steps]
    assert not (tmp_path / "tensorboard" / "valid").exists()


def test_histograms_of_weights_and_gradients(net, batches, sgd, tmp_path):
    """A gradient is that before clipping; a weight that after the step."""
    class Look:
        seen = {}

        @hookimpl
        def after_step(self, run: Run):
            self.seen[run.attempts] = run.model[0].weight.detach().clone()

    fit(net, cross_entropy, sgd, batches, plugins=["clip:max_norm=1e-3", "tensorboard:histogram_steps=4", Look()], out=tmp_path)
    events = read(tmp_path / "tensorboard")
    names = [name for name, _ in net.named_parameters()]
    assert events.Tags()["histograms"] == [f"{kind}/{name}" for kind in ("weights", "gradients") for name in names]
    found = events.Histograms("weights/0.weight")
    assert [event.step for event in found] == [1, 4, 8]
    for event in found:
        weight = Look.seen[event.step]
        value = event.histogram_value
        assert (value.min, value.max, value.num) == (weight.min().item(), weight.max().item(), weight.numel())
        assert sum(value.bucket) == weight.numel()
    assert max(abs(event.histogram_value.max) for event in events.Histograms("gradients/4.weight")) > 1e-3


def test_histograms_continue_after_a_resume(net, batches, sgd, tmp_path):
    plugins = ["checkpoint:every_steps=5", "tensorboard:histogram_steps=3"]
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, sgd, batches, plugins=[*plugins, Kill(7)], out=tmp_path)
    time.sleep(1.01 - time.time() % 1)
    fit(net, cross_entropy, sgd, batches, plugins=plugins, out=tmp_path, resume=tmp_path)
    assert [event.step for event in read(tmp_path / "tensorboard").Histograms("gradients/0.weight")] == [1, 3, 6]


def test_evaluations_within_an_epoch(net, batches, valid, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, valid, eval_every=3, plugins=["tensorboard"], out=tmp_path)
    assert [step for step, _ in points(tmp_path / "tensorboard" / "valid", "loss")] == [3, 6, 8]


def test_values_on_another_device_wait_for_the_evaluation(net, batches, sgd, tmp_path):
    """A rate that is a tensor, and filled in place, is written as it was; and what is not on the host yet, later."""
    plugin = compose(["tensorboard:every_steps=1"]).plugins["tensorboard"]

    class Late:
        seen = []

        @hookimpl
        def before_step(self, run: Run):
            run.optimizer.param_groups[0]["lr"].fill_(0.1 / (1 + run.attempts))

        @hookimpl
        def after_step(self, run: Run):
            plugin.steps.coming.appendleft((run.attempts, {"late": HostCopy(torch.empty((), device="meta"))}))
            Late.seen.append([name for _, values in plugin.steps.coming for name in values])

        @hookimpl(wrapper=True)
        def evaluate(self, run: Run):
            for entry in [*plugin.steps.coming]:
                if "late" in entry[1]:
                    plugin.steps.coming.remove(entry)
            return (yield)

    fit(net, cross_entropy, lambda groups: torch.optim.SGD(groups, lr=torch.tensor(0.1)), batches[:3], plugins=[plugin, Late()], out=tmp_path)
    assert Late.seen == [["late"], ["late", "late", "lr", "step_loss"], ["late", "late", "late", *["lr", "step_loss"] * 2]]
    assert points(tmp_path / "tensorboard", "lr") == [(step, single(0.1 / step)) for step in (1, 2, 3)]
    assert [step for step, _ in points(tmp_path / "tensorboard", "step_loss")] == [1, 2, 3]


def text(events, name):
    return events.Tensors(f"{name}/text_summary")[-1].tensor_proto.string_val[0].decode()


def test_configuration_and_hyperparameters(net, batches, valid, sgd, tmp_path):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=["tensorboard", "clip:max_norm=0.5"], out=tmp_path)
    events = read(tmp_path / "tensorboard")
    assert "| epochs | 2 |" in text(events, "configuration")
    assert "clip:max_norm=0.5" in text(events, "configuration")
    assert "    grads_ready     clip\n" in text(events, "composition")
    assert [(event.step, event.value) for event in events.Scalars("final/val_loss")] == [(16, single(run.metrics["val_loss"]))]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    told = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert (told["optimizer"].string_value, told["lr"].number_value, told["epochs"].number_value) == ("SGD", 0.1, 2)
    assert "clip:max_norm=0.5" in told["plugin"].string_value


def test_bit_for_bit_by_hand(net, batches, valid, clone, same, sgd, tmp_path):
    other = clone(net)
    fit(net, cross_entropy, sgd, batches, valid, epochs=2, plugins=["tensorboard:every_steps=1"], seed=1, out=tmp_path)
    here = torch.get_rng_state()
    torch.manual_seed(1)
    optimizer = sgd(other.parameters())
    for _ in range(2):
        for input, target in batches:
            optimizer.zero_grad()
            cross_entropy(other(input), target).backward()
            optimizer.step()
    same(net, other)
    assert torch.equal(here, torch.get_rng_state())


class Kill:
    def __init__(self, at):
        self.at = at

    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("every", "at"), [(5, 7), (4, 11), (8, 13), (6, 6), (8, 8)])
def test_a_run_that_goes_on_repeats_no_point_and_loses_none(net, batches, valid, clone, sgd, tmp_path, every, at):
    def train(model, out, *more, **settings):
        plugins = [f"checkpoint:every_epochs=9,every_steps={every}", "tensorboard:every_steps=2", *more]
        return fit(model, cross_entropy, sgd, batches, valid, epochs=3, eval_every=4, plugins=plugins, seed=1, out=out, **settings)

    train(clone(net), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(clone(net), tmp_path / "cut", Kill(at))
    time.sleep(1.01 - time.time() % 1)  # into the next second: the files of one folder are in the order of theirs
    train(net, tmp_path / "cut", resume=tmp_path / "cut")
    for where, tags in {"train": ("loss",), "valid": ("loss",), ".": ("lr", "step_loss", "final/val_loss")}.items():
        for tag in tags:
            assert points(tmp_path / "cut" / "tensorboard" / where, tag) == points(tmp_path / "whole" / "tensorboard" / where, tag), (where, tag)
    begun = [event.step for event in read(tmp_path / "cut" / "tensorboard").Tensors("configuration/text_summary")]
    assert begun == [0, at // every * every]


def test_what_a_checkpoint_counts_as_done_is_on_disk(net, batches, sgd, tmp_path):
    """Else a run that is killed outright would go on after points that were never written."""
    class Look:
        found = []

        @hookimpl
        def before_step(self, run: Run):
            if run.attempts == 7:
                self.found += [step for step, _ in points(tmp_path / "tensorboard", "step_loss")]

    fit(net, cross_entropy, sgd, batches, plugins=["checkpoint:every_steps=6", "tensorboard:every_steps=1", Look()], out=tmp_path)
    assert Look.found == [1, 2, 3, 4, 5, 6, 7]


def test_it_comes_and_goes_when_a_run_goes_on(net, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, epochs=1, plugins=["checkpoint"], out=tmp_path)
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["checkpoint", "tensorboard"], out=tmp_path, resume=tmp_path)
    run = fit(net, cross_entropy, sgd, batches, epochs=3, plugins=["checkpoint"], out=tmp_path, resume=tmp_path)
    assert len(run.history) == 3
    assert [step for step, _ in points(tmp_path / "tensorboard" / "train", "loss")] == [16]


def test_after_an_accident_the_files_are_closed(net, batches, sgd, tmp_path):
    plugin = compose(["tensorboard:every_steps=1"]).plugins["tensorboard"]
    closed = []

    class Fail:
        @hookimpl
        def before_step(self, run: Run):
            if run.attempts == 3:
                closed.extend(writer.file_writer.event_writer._async_writer for writer in plugin.writers.values())
                raise RuntimeError("an accident")

    with pytest.raises(RuntimeError, match="an accident"):
        fit(net, cross_entropy, sgd, batches, plugins=[plugin, Fail()], out=tmp_path)
    assert [writer._closed for writer in closed] == [True, True]
    assert [step for step, _ in points(tmp_path / "tensorboard", "step_loss")] == [1, 2, 3]


def test_metrics_that_are_no_numbers_are_left_out(net, batches, sgd, tmp_path):
    class Odd:
        @hookimpl(wrapper=True)
        def evaluate(self, run: Run):
            return (yield) | {"confusion": [[1, 2], [3, 4]], "hope": math.nan}

    fit(net, cross_entropy, sgd, batches, plugins=["tensorboard", Odd()], out=tmp_path)
    assert {"loss", "hope"} == set(read(tmp_path / "tensorboard" / "train").Tags()["scalars"])
    assert math.isnan(points(tmp_path / "tensorboard" / "train", "hope")[0][1])


def test_a_disk_that_refuses_stops_nothing(net, batches, sgd, tmp_path, caplog):
    class Full:
        @hookimpl
        def before_step(self, run: Run):
            if run.attempts == 2:
                def refuse(*arguments):
                    raise OSError(28, "No space left on device")
                plugin.writers["."].add_scalar = refuse

    plugin = compose(["tensorboard:every_steps=1"]).plugins["tensorboard"]
    run = fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[plugin, Full()], out=tmp_path)
    assert run.epoch == 2
    assert caplog.messages == [f"tensorboard: {tmp_path / 'tensorboard'} cannot be written (No space left on device); nothing more is"]
    plugin.refused = False
    plugin.end(run, None)


def refused(message, plugins, net, batches, sgd, tmp_path):
    with pytest.raises(UsageError) as error:
        fit(net, cross_entropy, sgd, batches, plugins=plugins, out=tmp_path)
    assert str(error.value) == message


def test_without_tensorboard_it_says_how_to_get_it(net, batches, sgd, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *more):
        if name.startswith(("tensorboard", "torch.utils.tensorboard")):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *more)
    monkeypatch.setattr(builtins, "__import__", without)
    refused("tensorboard: tensorboard is not installed; install it with: pip install 'loopctl[tensorboard]'",
            ["tensorboard"], net, batches, sgd, tmp_path)


def test_it_does_not_mix_runs(net, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, plugins=["tensorboard"], out=tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("events*")}
    folder = tmp_path / "tensorboard"
    refused(f"tensorboard: {folder} exists and is not overwritten; move it, or choose another dir", ["tensorboard"], net, batches, sgd, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.rglob("events*")} == before
    refused("tensorboard: tensorboard.2 writes to dir=x too; choose another dir in one of them",
            ["tensorboard:dir=x", "tensorboard:dir=x,every_steps=1"], net, batches, sgd, tmp_path)


@pytest.mark.parametrize("plugin", ["tensorboard", "csv:every_steps=2", "norms:every_steps=2"])
def test_a_run_that_was_killed_when_only_its_end_was_missing_is_resumed(net, batches, sgd, tmp_path, plugin):
    class Killed(Exception):
        pass

    class Kill:
        @hookimpl
        def train_end(self):
            raise Killed

    arguments = {"epochs": 2, "out": tmp_path}
    with pytest.raises(Killed):
        fit(net, nn.CrossEntropyLoss(), sgd, batches, plugins=["checkpoint", Kill(), plugin], **arguments)
    run = fit(net, nn.CrossEntropyLoss(), sgd, batches, plugins=["checkpoint", plugin], resume=tmp_path, **arguments)
    assert run.epoch == 2
