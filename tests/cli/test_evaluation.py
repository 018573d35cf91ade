"""`loopctl evaluate`, and `--test`, `--eval-first` and several validation sets of `loopctl run`."""
import csv
import json
from pathlib import Path

import pytest

QUICK = ["--model", "mlp:width=8", "--epochs", "2", "--without", "progress", "--out", "a"]
OWN = """
import torch
from torch.utils.data import TensorDataset

def numbers(count, noise):
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + noise * torch.randn(count, 1, generator=generator))

def data():
    return numbers(64, 0.0), {"clean": numbers(20, 0.0), "noisy": numbers(30, 1.0)}

def other():
    return numbers(10, 0.0)

def model():
    return torch.nn.Linear(4, 1)
"""


@pytest.fixture(autouse=True)
def own_code(command):
    Path("own.py").write_text(OWN)


def last_row(folder="a"):
    with Path(folder, "metrics.csv").open() as file:
        return list(csv.DictReader(file))[-1]


def test_evaluate_prints_what_the_run_has_reported(command):
    command("run", *QUICK)
    found = json.loads(command("evaluate", "a", "--weights", "last", "--json"))
    assert found == {"loss": float(last_row()["val_loss"]), "accuracy": float(last_row()["val_accuracy"])}
    text = command("evaluate", "a").splitlines()
    assert text[0] == "a (best.safetensors) on digits (360 samples), cpu"
    assert text[1] == f"loss {found['loss']:.6g}  accuracy {found['accuracy']:.6g}"
    assert [*json.loads(command("evaluate", "a", "--metric", "top5", "--json"))] == ["loss", "top5"]


def test_mixed_precision_is_that_of_the_run(command):
    command("run", *QUICK, "--plugin", "amp:dtype=bfloat16", "--plugin", "clip")
    found = json.loads(command("evaluate", "a", "--weights", "last", "--json"))
    assert found["loss"] == float(last_row()["val_loss"])


def test_several_validation_sets_have_metrics_by_name(command):
    command("run", *QUICK, "--data", "own.py:data", "--model", "own.py:model", "--loss", "mse", "--metric", "r2")
    found = json.loads(command("evaluate", "a", "--weights", "last", "--json"))
    assert found == {name: float(last_row()[f"val_{name}"]) for name in ("clean_loss", "clean_r2", "noisy_loss", "noisy_r2")}
    other = json.loads(command("evaluate", "a", "--data", "own.py:other", "--json"))        # training data only: that
    assert [*other] == ["loss", "r2"]


def test_a_test_set_is_evaluated_at_the_end_and_changes_no_bit_of_the_run(command):
    plain = command("run", *QUICK)
    tested = command("run", *QUICK[:-1], "b", "--test", "digits").splitlines()
    assert "test:" not in plain
    assert Path("a/weights.safetensors").read_bytes() == Path("b/weights.safetensors").read_bytes()
    found = json.loads(Path("b/test.json").read_text())
    assert found == {"loss": float(last_row("b")["val_loss"]), "accuracy": float(last_row("b")["val_accuracy"])}
    assert f"test: loss {found['loss']:.6g}  accuracy {found['accuracy']:.6g}" in tested


def test_the_run_is_evaluated_before_its_first_step(command):
    command("run", *QUICK, "--eval-first")
    with Path("a/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert rows[0]["train_loss"] == ""
    assert float(rows[0]["val_accuracy"]) < 0.5


@pytest.mark.parametrize(("words", "message"), [
    (("evaluate", "b"), "there is no folder b"),
    (("evaluate", "a", "--data", "nope"), "no data is called 'nope'"),
    (("evaluate", "a", "--data", "fake"), "data fake has inputs of shape (3, 32, 32), and the run was trained on (1, 8, 8)"),
    (("evaluate", "a", "--metric", "nope"), "no metric is called 'nope'"),
    (("evaluate", "a", "--weights", "nope"), "there is no such file"),
    (("run", *QUICK, "--test", "nope"), "--test: no data is called 'nope'"),
])
def test_what_cannot_be_evaluated_is_refused(command, words, message):
    if words[0] == "evaluate":
        command("run", *QUICK)
    assert message in command(*words, refused=True)
    assert not Path("runs").exists()
