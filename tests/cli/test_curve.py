"""Learning rates drawn without training, and a model's layers shown without a run."""
import re
import sys

import pytest
import torch
from click.testing import CliRunner

from loopctl.cli import main
from loopctl.cli.curve import chart


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments, status=0):
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == status, result.output
        return result
    return call


def test_a_chart_has_a_column_per_value_filled_to_its_height():
    rows = chart([0, 1, 2, 4], "all", width=4, height=2).splitlines()
    assert rows == ["        4 │   █", "        0 │ ▄██", "          └────", "           start 0, end 4; all"]


def test_the_rate_of_a_composition_in_the_terminal(run, tmp_path):
    text = run("lr", "--plugin", "warmup:length=10%,start_factor=0.1", "--plugin", "cosine:by=step", "--lr", "0.1", "--epochs", "10").stdout
    rows = text.splitlines()
    assert rows[-1].strip() == "start 0.01, end 4.66e-06; 10 epochs, 230 steps"
    highest = rows[0].split("│")[1]
    assert 6 <= len(highest) - len(highest.lstrip()) <= 9            # the peak is a tenth of the way
    assert list(tmp_path.iterdir()) == []                            # nothing was trained


def test_row_24_the_rate_over_a_hundred_epochs_drawn(run):
    """By hand: torch's schedule stepped a hundred times without training, its rates listed."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule, rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50), []
    for _ in range(100):
        rates += [optimizer.param_groups[0]["lr"]] * 23              # steps of an epoch
        optimizer.step()
        schedule.step()
    drawn = run("lr", "--epochs", "100", "--optimizer", "sgd", "--lr", "0.1", "--plugin", "cosine:t_max=50").stdout
    assert drawn.rstrip("\n") == chart(rates, "100 epochs, 2,300 steps")


def test_the_picture_is_what_its_name_says(run, tmp_path):
    run("lr", "--plugin", "cosine", "--out", "lr.png")
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"
    run("lr", "--plugin", "cosine", "--out", "lr.svg")
    assert "learning rate" in (tmp_path / "lr.svg").read_text()
    assert "error: --out lr.xyz cannot be written" in run("lr", "--out", "lr.xyz", status=2).stderr
    assert "error: --out nowhere/lr.png cannot be written" in run("lr", "--out", "nowhere/lr.png", status=2).stderr


def test_without_matplotlib_it_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("lr", "--out", "lr.png", status=2).stderr == (
        "error: --out needs matplotlib; install it with: pip install 'loopctl[plot]'\n")


def test_the_layers_of_a_model(run, tmp_path):
    text = run("summary", "--model", "mlp:width=16", "--batch-size", "8").stdout
    assert re.search(r"Linear +\[8, 16\] +1,040 +70\.2% +8\.19 k +trainable", text)
    assert re.search(r"Parameters +1,482", text)
    assert re.search(r"Multiply-adds, forward +11\.5 k", text)
    assert list(tmp_path.iterdir()) == []
