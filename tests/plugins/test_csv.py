"""The plugin csv."""
import csv

import pytest
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl

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
