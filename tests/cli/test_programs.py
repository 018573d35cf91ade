"""The three complete programs of docs/programs.md, end to end, on a few pictures in each data set's format on disk."""
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from loopctl.cli import main

PROGRAMS = re.findall(r"^\$ (loopctl run .*)$", (Path(__file__).parents[2] / "docs" / "programs.md").read_text(), re.MULTILINE)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run one of the programs on the data in the folder, with what makes it small said after it; returns its epochs."""
    monkeypatch.chdir(tmp_path)

    def call(number, *smaller, replace=("", "")):
        command = PROGRAMS[number].replace("DIR", str(tmp_path)).replace(*replace)
        result = CliRunner().invoke(main, [*shlex.split(command)[1:], "--workers", "0", "--out", "run", *smaller])
        assert result.exit_code == 0, result.output
        assert (tmp_path / "run" / "weights.safetensors").exists()
        assert (tmp_path / "run" / "checkpoints" / "best.safetensors").exists()
        heading, *rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
        return [dict(zip(heading.split(","), map(float, row.split(",")), strict=True)) for row in rows]
    return call


@pytest.mark.usefixtures("imagenet")
@pytest.mark.filterwarnings("default:Python 3.14 will, by default, filter:DeprecationWarning")    # in torchvision
def test_row_28_resnet50_on_imagenet(run):
    rows = run(0, "--epochs", "2", "--batch-size", "3", replace=("augment=false", "augment=false,size=64"))
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr"} <= set(rows[0])
    assert rows[1]["lr"] == pytest.approx(0.1 * (1 + 0.9510565162951535) / 2)      # cos(pi / 10)


def test_row_29_a_linear_model_on_mnist(run, grey):
    rows = run(1, "--epochs", "30", replace=("mnist", grey[0]) if grey[0] != "mnist" else ("", ""))
    assert len(rows) <= 30
    best = max(range(len(rows)), key=lambda epoch: rows[epoch]["val_accuracy"])
    assert len(rows) == min(30, best + 11)                                         # ten epochs without improvement


def test_row_30_a_vit_on_cifar(run, cifar):
    rows = run(2, "--epochs", "3", replace=("cifar10", cifar[0]))
    assert len(rows) == 3
    assert rows[0]["lr"] < rows[1]["lr"] < rows[2]["lr"]                           # still warming up
