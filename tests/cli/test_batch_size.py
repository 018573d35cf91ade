"""`--batch-size auto`: the largest batch that fits, with a model that raises the error of a full memory."""
import tomllib

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from loopctl import UsageError
from loopctl.cli import batch_size, main
from loopctl.cli.batch_size import largest_that_fits

MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    '''Full with more than MOST samples in training, from its second step on, as where the optimizer has a state.'''
    most = MOST
    def __init__(self):
        super().__init__()
        self.layer, self.steps = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 0

    def forward(self, x):
        self.steps += self.training
        if self.training and len(x) > self.most and self.steps == 2:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return self.layer(x)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call `loopctl run --batch-size auto` with a model for at most so many samples, as if the CPU were a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batch_size, "DEVICES", ("cpu",))

    def call(most, *arguments, status=0, size="auto"):
        (tmp_path / f"model{most}.py").write_text(MODEL.replace("MOST", str(most)))
        result = CliRunner().invoke(main, ["run", "--model", f"model{most}.py:Model", "--epochs", "1", "--device", "cpu", "--batch-size",
                                           size, "--limit-train", "2", *arguments])
        assert result.exit_code == status, result.output
        return result
    return call


@pytest.mark.parametrize(("most", "start", "limit", "found"), [
    (500, 64, None, 256), (64, 64, None, 64), (63, 64, None, 32), (1, 64, None, 1), (10**9, 64, 1000, 1000), (900, 64, 1000, 512), (7, 64, 5, 5)])
def test_it_is_doubled_until_memory_is_full_or_halved_until_it_fits(most, start, limit, found):
    tried = []
    assert largest_that_fits(lambda size: tried.append(size) or size <= most, start, limit) == found
    assert len(set(tried)) == len(tried)


def test_where_not_even_one_sample_fits_the_message_says_what_helps():
    with pytest.raises(UsageError, match="not even one sample fits"):
        largest_that_fits(lambda size: False, 64, None)


def test_the_run_is_that_with_the_number_and_its_configuration_has_it(run, tmp_path):
    result = run(300, "--out", "auto", "--plugin", "ema", "--plugin", "lr_finder:num_steps=3", "--plugin", "report")
    assert "--batch-size auto: 256\n" in result.stdout
    assert tomllib.loads((tmp_path / "auto" / "run.toml").read_text())["batch_size"] == 256
    run(10**6, "--out", "given", "--plugin", "ema", size="256")
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("auto", "given"))
    assert all(one[name].equal(other[name]) for name in one)
    assert {path.name for path in tmp_path.iterdir()} >= {"auto", "given"}


def test_less_than_the_default_is_found(run):
    assert "--batch-size auto: 16\n" in run(17, "--fast-dev-run").stdout


def test_an_error_that_is_not_of_the_memory_is_reported(run, tmp_path):
    assert "error: " in run("'many'", status=1).stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("arguments", "message"), [
    (["--plugin", "split:into=auto"], "--batch-size auto with split:into=auto: every batch fits where it may be split"),
    (["--resume", "a"], "--batch-size auto with --resume: a resumed run keeps its batch size; leave it out"),
])
def test_what_cannot_be_done_is_refused(run, tmp_path, arguments, message):
    run(300, "--out", "a", "--plugin", "checkpoint", size="64")
    assert message in run(300, *arguments, status=2).stderr


def test_on_a_cpu_it_is_refused(run, monkeypatch):
    monkeypatch.undo()
    result = CliRunner().invoke(main, ["run", "--batch-size", "auto", "--device", "cpu"])
    assert "--batch-size auto needs a GPU, and this run is on cpu" in result.stderr


@pytest.mark.parametrize("command", ["explain", "lr", "summary"])
def test_commands_that_do_not_train_need_a_number(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, [command, "--batch-size", "auto"])
    assert "--batch-size auto: `loopctl run` finds it before it trains; pass a number here" in result.stderr


def test_other_text_is_refused():
    result = CliRunner().invoke(main, ["run", "--batch-size", "automatic"])
    assert "'automatic' is not a valid whole number" in result.stderr
