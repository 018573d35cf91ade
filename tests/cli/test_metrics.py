"""Metrics on the command line, and the metric by which plugins judge."""
import csv
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from loopctl import Monitor
from loopctl.cli import main, metrics
from loopctl.errors import UsageError
from loopctl.metrics import named

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def data(noise=1.0):
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 8, generator=random)
    targets = inputs.sum(1, keepdim=True) + noise * torch.randn(50, 1, generator=random)
    return TensorDataset(inputs[:40], targets[:40]), TensorDataset(inputs[40:], targets[40:])

def model():
    return nn.Linear(8, 1)

def forward(model, batch):
    return nn.functional.mse_loss(model(batch[0]), batch[1])

def worst(output, target, power=1):
    return ((output - target).abs() ** power).max()

class Count:
    def __init__(self, of=1):
        self.of = of
        self.reset()
    def reset(self): self.count = 0
    def update(self, output, target): self.count += len(output)
    def compute(self): return self.count / self.of

class Neither:
    pass

counted = Count()
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a command in a folder with the file task.py, and returns the result."""
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)

    def call(*arguments, status=0):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == status, result.output
        return result
    return call


def train(run, *arguments, out="a", status=0):
    return run("run", "--data", "task.py:data", "--model", "task.py:model", "--loss", "mse", "--epochs", 2, "--without", "progress",
               "--batch-size", 16, "--out", out, *arguments, status=status)


def rows(folder="a"):
    with Path(folder, "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_the_metrics_are_reported_by_their_names_and_agree(run):
    train(run, "--metric", "rmse", "--metric", "mae", "--metric", "r2", "--metric", "task.py:worst:power=2", "--metric", "task.py:Count:of=2",
          "--metric", "MeanSquaredError:squared=false,name=theirs", "--metric", "R2Score", "--metric", "torchmetrics:MeanAbsoluteError")
    for row in rows():
        assert row["val_rmse"] == pytest.approx(row["val_loss"] ** 0.5, rel=1e-6)
        assert row["val_rmse"] == pytest.approx(row["val_theirs"], rel=1e-5)
        assert row["val_mae"] == pytest.approx(row["val_mean_absolute_error"], rel=1e-5)
        assert row["val_r2"] == pytest.approx(row["val_r2_score"], rel=1e-4)
        assert row["val_worst"] > row["val_loss"]
        assert (row["train_count"], row["val_count"]) == (20, 5)
    assert tomllib.loads(Path("a/run.toml").read_text())["metric"][3] == "task.py:worst:power=2"


def test_without_the_option_it_is_the_accuracy_where_the_data_has_classes(run):
    run("run", "--model", "linear", "--max-steps", 2, "--epochs", 1, "--without", "progress", "--out", "a")
    train(run, out="b")
    run("run", "--model", "linear", "--max-steps", 2, "--epochs", 1, "--without", "progress", "--out", "c", "--metric", "top3", "--metric",
        "F1Score:task=multiclass")
    names = [[name for name in rows(folder)[0] if name.startswith("val_")] for folder in "abc"]
    assert names == [["val_loss", "val_accuracy"], ["val_loss"], ["val_loss", "val_top3", "val_f1_score"]]


def test_a_run_is_repeated_from_its_run_toml_and_resumed_with_the_same_metrics(run):
    task = ["--metric", "r2", "--metric", "MeanSquaredError", "--metric", "task.py:Count", "--monitor", "val_r2"]
    train(run, *task)
    run("run", "--config", "a/run.toml", "--epochs", 4, "--out", "b")
    run("run", "--resume", "a", "--epochs", 4)
    assert rows("a") == rows("b")
    assert len(rows("a")) == 4
    message = run("run", "--resume", "a", "--epochs", 5, "--metric", "mae", "--monitor", "val_mae", status=2).stderr
    assert "metric is ['r2', 'MeanSquaredError', 'task.py:Count'] in the checkpoint and ['mae'] in this run" in message
    assert "monitor" in run("run", "--resume", "a", "--epochs", 5, "--monitor", "val_loss", status=2).stderr


def test_the_metric_of_a_class_is_passed_the_number_of_classes():
    found = metrics.make(["Accuracy:task=multiclass", "Accuracy:task=multiclass,num_classes=7,name=seven"], 5)
    assert (found["accuracy"].num_classes, found["seven"].num_classes) == (5, 7)


def test_an_object_by_its_path_is_used_as_it_is(tmp_path):
    (tmp_path / "mine.py").write_text("from torchmetrics import MeanSquaredError\nmse = MeanSquaredError()\n")
    found = metrics.make([f"{tmp_path}/mine.py:mse"], None)
    assert type(found["mse"]).__name__ == "MeanSquaredError"
    assert [*metrics.make([f"{tmp_path}/mine.py:mse:name=it"], None)] == ["it"]
    with pytest.raises(UsageError, match="mine.py:mse: no option 'args'; it has: name"):
        metrics.make([f"{tmp_path}/mine.py:mse:args=1"], None)


def test_top_takes_any_number_and_perplexity_its_dimension():
    found = metrics.make(["top2", "top5", "perplexity:dim=-1"], 5)
    assert (found["top2"].keywords["k"], found["top5"].keywords["k"], found["perplexity"].dim) == (2, 5, -1)
    assert isinstance(found["perplexity"], named.Perplexity)


def test_the_names_are_completed_without_importing_torch():
    code = "import sys; from loopctl.cli.options import metric_names; print(*metric_names()); assert not {'torch', 'torchmetrics'} & {*sys.modules}"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert names == metrics.known_names()
    import torchmetrics
    assert {*names} == {*metrics.OWN, *(name for name in torchmetrics.__all__ if name[0].isupper())}


@pytest.mark.parametrize(("arguments", "words"), [
    (["--metric", "acuracy"], "no metric is called 'acuracy'; did you mean 'accuracy'?"),
    (["--metric", "F2Score"], "no metric is called 'F2Score'"),
    (["--metric", "top0"], "no metric is called 'top0'; did you mean 'top5'?"),
    (["--metric", "r2:dim=1"], "metric r2: no option 'dim'"),
    (["--metric", "mae", "--metric", "mae"], "--metric mae: there is another metric called mae; give this one a name of its own, as in mae:name=second"),
    (["--metric", "loss:name=x"], "no metric is called 'loss'"),
    (["--metric", "mae:name=loss"], "a metric is called 'loss'; use another name"),
    (["--metric", "F1Score"], "metric F1Score: F1Score.__new__() missing 1 required positional argument: 'task'"),
    (["--metric", "F1Score:task=multi"], "metric F1Score: "),
    (["--metric", "task.py:model"], "metric task.py:model is called with (output, target): too many positional arguments"),
    (["--metric", "task.py:Neither"], "metric task.py:Neither: an instance of it is no metric; define __call__(output, target), or update"),
    (["--metric", "task.py:worst:pow=2"], "metric task.py:worst: no option 'pow'; did you mean 'power'?"),
    (["--metric", "torchmetrics"], "no metric is called 'torchmetrics'"),
    (["--metric", "accuracy"], "accuracy: the output has shape (16, 1) and the target (16, 1), which is one class"),
    (["--monitor", "r2"], "checkpoint: monitor=r2: the run has no such metric; it has: train_loss, val_loss"),
    (["--metric", "r2", "--monitor", "r2"], "checkpoint: monitor=r2: the run has no such metric; it has: train_loss, train_r2, val_loss, val_r2"),
    (["--metric", "task.py:worst", "--monitor", "val_worst"], "monitor=val_worst: whether higher is better is unclear; pass mode=min or mode=max"),
])
def test_a_wrong_metric_or_monitor_is_refused_in_one_line(run, arguments, words):
    message = train(run, *arguments, status=2).stderr
    assert words in message
    assert message.count("\n") == 1


def test_a_metric_of_torchmetrics_is_refused_with_how_to_install_it_where_that_is_missing(monkeypatch):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    monkeypatch.setattr(metrics, "torchmetrics_names", list)
    with pytest.raises(UsageError, match="no metric is called 'F1Score'; .*; after pip install torchmetrics there are its classes too"):
        metrics.make(["F1Score"], 3)


def test_a_metric_for_a_forward_function_that_returns_no_outputs_is_refused(run):
    arguments = ["--data", "task.py:data", "--model", "task.py:model", "--forward", "task.py:forward", "--metric", "mae", "--epochs", 1]
    assert "mae: the output is a NoneType, not a tensor" in run("run", *arguments, status=2).stderr


def test_the_plugins_judge_by_the_monitor_unless_they_have_another(run, monkeypatch):
    monitors = {}
    start = Monitor.start

    def recorded(monitor, run):
        given = monitor.metric
        start(monitor, run)
        monitors[given] = monitor.metric, monitor.mode
    monkeypatch.setattr(Monitor, "start", recorded)
    train(run, "--metric", "r2", "--metric", "MeanAbsoluteError", "--monitor", "val_mean_absolute_error", "--plugin",
          "plateau:monitor=train_loss", "--plugin", "early_stopping:monitor=val_r2")
    assert monitors == {"": ("val_mean_absolute_error", "min"), "train_loss": ("train_loss", "min"), "val_r2": ("val_r2", "max")}
    assert tomllib.loads(Path("a/run.toml").read_text())["monitor"] == "val_mean_absolute_error"
