"""The plugin csv."""
import csv

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.metrics.host_copy import HostCopy
from loopctl.plugins.csv import Csv

cross_entropy = nn.CrossEntropyLoss()


def test_the_file_has_the_history_to_the_last_digit(net, batches, valid, sgd, tmp_path):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=["csv", "clip"], out=tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == run.history
    assert list(rows[0]) == ["epoch", "step", "train_loss", "val_loss", "grad_norm", "lr"]


def test_a_metric_that_first_appears_in_a_later_epoch_has_a_column(net, batches, sgd, tmp_path):
    class Late:
        @hookimpl
        def after_evaluate(self, run: Run):
            if run.epoch == 2:
                run.metrics["late"] = 5.0

    fit(net, cross_entropy, sgd, batches, epochs=3, plugins=["csv:path=a/log.csv", Late()], out=tmp_path)
    lines = (tmp_path / "a" / "log.csv").read_text().splitlines()
    assert lines[0] == "epoch,step,train_loss,lr,late"
    assert [line.split(",")[4] for line in lines[1:]] == ["", "5.0", "5.0"]


def test_an_existing_file_is_not_overwritten(net, batches, sgd, tmp_path):
    (tmp_path / "metrics.csv").write_text("precious")
    with pytest.raises(UsageError, match=r"csv: .*metrics.csv exists and is not overwritten"):
        fit(net, cross_entropy, sgd, batches, plugins=["csv"], out=tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "precious"


def rows(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


class Watch:
    """The loss, the rates and the position of each step, as they were."""

    def __init__(self):
        self.steps = []

    @hookimpl
    def after_step(self, run: Run):
        rates = [float(group["lr"]) for group in run.optimizer.param_groups]
        self.steps.append([float(run.attempts), run.epochs_done, run.loss.item(), rates[0], *rates])


def test_every_few_steps_a_row_has_the_loss_and_the_rates_to_the_last_digit(net, batches, sgd, tmp_path):
    watch = Watch()
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["csv:every_steps=3", "layerwise_lr:decay=0.5", "cosine:by=step", watch], out=tmp_path)
    found = rows(tmp_path / "steps.csv")
    assert list(found[0]) == ["step", "epoch", "loss", "lr", "lr_layer 2", "lr_layer 1"]
    assert [[float(value) for value in row.values()] for row in found] == [watch.steps[step - 1] for step in (1, 3, 6, 9, 12, 15)]
    assert len(rows(tmp_path / "metrics.csv")) == 2


def test_the_loss_of_a_step_is_the_mean_per_sample_also_where_the_loss_is_a_sum(plain, batches, tmp_path):
    def train(loss_fn, lr, out):
        fit(plain, loss_fn, lambda groups: torch.optim.SGD(groups, lr=lr), batches, plugins=["csv:every_steps=1"], out=out)
        return [float(row["loss"]) for row in rows(out / "steps.csv")]

    means, sums = (train(nn.CrossEntropyLoss(reduction=how), 0.0, tmp_path / how) for how in ("mean", "sum"))
    assert sums == pytest.approx(means, rel=1e-6)           # a mean of 8 rounds elsewhere than a sum of 8 divided by 8


class Kill:
    def __init__(self, at):
        self.at = at

    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("every", "at"), [(5, 7), (4, 11), (8, 13), (6, 6), (99, 3)])
def test_a_resumed_run_has_each_step_once(net, batches, clone, sgd, tmp_path, every, at):
    def train(model, out, *more, **settings):
        plugins = [f"checkpoint:every_epochs=9,every_steps={every}", "csv:every_steps=2", *more]
        return fit(model, cross_entropy, sgd, batches, epochs=3, plugins=plugins, seed=1, out=out, **settings)

    train(clone(net), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(clone(net), tmp_path / "cut", Kill(at))
    written = rows(tmp_path / "cut" / "steps.csv")
    assert int(written[-1]["step"]) in (at, at - 1)         # the steps since the checkpoint are there for whoever looks why it ended
    train(net, tmp_path / "cut", resume=tmp_path / "cut")
    assert (tmp_path / "cut" / "steps.csv").read_bytes() == (tmp_path / "whole" / "steps.csv").read_bytes()


def test_steps_are_logged_from_a_resume_on_and_may_end_with_one(net, batches, sgd, tmp_path):
    for epochs, spec in ((1, "csv"), (2, "csv:every_steps=4"), (3, "csv")):
        fit(net, cross_entropy, sgd, batches, epochs=epochs, plugins=["checkpoint", spec], out=tmp_path, resume=tmp_path if epochs > 1 else None)
    assert [row["step"] for row in rows(tmp_path / "steps.csv")] == ["12", "16"]
    assert len(rows(tmp_path / "metrics.csv")) == 3


def test_rows_wait_for_their_values_and_never_for_the_device(net, batches, sgd, tmp_path):
    """A tensor on the meta device never arrives; so its row, and those after it, are not written."""
    plugin, written = Csv(every_steps=1), []

    class Late:
        @hookimpl
        def after_step(self, run: Run):
            if run.attempts == 3:
                plugin.steps.coming.appendleft((3, {"loss": HostCopy(torch.empty((), device="meta"))}))
            written.append(len(rows(tmp_path / "steps.csv")))
            if run.attempts == 6:
                plugin.steps.coming.popleft()

    fit(net, cross_entropy, sgd, batches, plugins=[plugin, Late()], out=tmp_path)
    assert written == [1, 2, 3, 3, 3, 3, 7, 8]


def test_a_file_that_is_no_log_of_steps_is_not_overwritten(net, batches, sgd, tmp_path):
    (tmp_path / "steps.csv").write_text("precious\n1\n")
    with pytest.raises(UsageError, match=r"csv: .*steps.csv exists and is not overwritten; move it, or choose another steps_path"):
        fit(net, cross_entropy, sgd, batches, plugins=["csv:every_steps=2"], out=tmp_path)
    fit(net, cross_entropy, sgd, batches, plugins=["checkpoint"], out=tmp_path)
    with pytest.raises(UsageError, match=r"csv: .*steps.csv is not a log of steps .* and is not overwritten"):
        fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["csv:every_steps=2", "checkpoint"], out=tmp_path, resume=tmp_path)
    assert (tmp_path / "steps.csv").read_text() == "precious\n1\n"


@pytest.mark.parametrize(("plugins", "message"), [
    (["csv:every_steps=0"], "every_steps is at least 1, not 0"),
    (["csv:every_steps=1,steps_path=metrics.csv"], "csv: csv writes to metrics.csv too; choose another steps_path"),
    (["csv:every_steps=1", "csv:path=b.csv,every_steps=2"], "csv: csv.2 writes to steps.csv too; choose another steps_path"),
])
def test_wrong_options_are_refused(net, batches, sgd, tmp_path, plugins, message):
    with pytest.raises(UsageError) as error:
        fit(net, cross_entropy, sgd, batches, plugins=plugins, out=tmp_path)
    assert message in str(error.value)
