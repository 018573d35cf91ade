"""`loopctl run` from end to end, and the commands that print information."""
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from loopctl import available, fit
from loopctl.cli import data, main, models
from loopctl.metrics.named import accuracy


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call `loopctl` in a new folder. Return the result of click's CliRunner."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, status=0):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == status, result.output
        return result
    return call


def weights(folder):
    return load_file(folder / "weights.safetensors")


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_with_default_options_reaches_98_percent_on_digits(run, tmp_path):
    result = run("run", "--plugin", "amp", "--plugin", "cosine")
    (folder,) = (tmp_path / "runs").iterdir()
    lines = (folder / "metrics.csv").read_text().splitlines()
    assert len(lines) == 21
    assert float(dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))["val_accuracy"]) >= 0.98
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "run.toml", "data.json", "metrics.csv", "explain.txt", "weights.safetensors", "checkpoints/step-00000437.pt", "checkpoints/step-00000460.pt",
        "checkpoints/best.pt", "checkpoints/best.safetensors"}
    assert "finished: 20 epochs, 460 updates" in result.stdout
    assert f"run folder: runs/{folder.name}" in result.stdout
    assert result.stderr == ""


def test_a_run_from_the_run_toml_of_another_gives_the_same_metrics_and_weights(run, tmp_path):
    run("run", "--epochs", 3, "--plugin", "amp", "--plugin", "warmup:length=1ep", "--plugin", "clip:max_norm=0.5", "--plugin",
        "accumulate:every=3", "--model", "cnn:width=8,dropout=0.1", "--optimizer", "sgd:momentum=0.9", "--lr", 0.05, "--seed", 7,
        "--eval-every", 4, "--out", "a")
    run("run", "--config", "a/run.toml", "--out", "b")
    assert (tmp_path / "a" / "metrics.csv").read_text() == (tmp_path / "b" / "metrics.csv").read_text()
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    one, other = (tomllib.loads((tmp_path / name / "run.toml").read_text()) for name in "ab")
    assert one == other
    run("run", "--config", "a/run.toml", "--out", "c", "--seed", 8)
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_fit_in_python_gives_the_same_weights_and_metrics_as_the_command(run, tmp_path):
    plugins = ["amp:dtype=bfloat16", "accumulate:every=2", "clip:max_norm=1", "warmup:length=1ep", "cosine"]
    run("run", "--epochs", 3, "--model", "cnn:width=8", "--seed", 3, "--out", "a", "--without", "progress",
        *[part for plugin in plugins for part in ("--plugin", plugin)])
    from loopctl.plugins.accumulate import Accumulate
    from loopctl.plugins.amp import Amp
    from loopctl.plugins.clip import Clip
    from loopctl.plugins.cosine import Cosine
    from loopctl.plugins.warmup import Warmup
    instances = [Amp(dtype="bfloat16"), Accumulate(every=2), Clip(max_norm=1.0), Warmup(length="1ep"), Cosine()]
    for composition in (plugins, instances):
        torch.manual_seed(3)
        digits = data.digits()
        model = models.make("cnn:width=8", digits)
        train, valid = digits.loaders(64, 0, torch.device("cpu"))
        done = fit(model, nn.CrossEntropyLoss(), partial(torch.optim.AdamW, lr=1e-3), train, valid, epochs=3, plugins=composition,
                   metrics={"accuracy": accuracy}, seed=3)
        assert equal(dict(model.state_dict()), weights(tmp_path / "a"))
        rows = (tmp_path / "a" / "metrics.csv").read_text().splitlines()[1:]
        assert [list(map(str, row.values())) for row in done.history] == [row.split(",") for row in rows]


def test_the_default_plugins_can_be_left_out_or_configured(run, tmp_path):
    result = run("run", "--epochs", 1, "--model", "linear", "--without", "csv", "--without", "checkpoint", "--without", "progress",
                 "--out", "a")
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"run.toml", "data.json", "explain.txt", "weights.safetensors"}
    assert "val_loss" not in result.stdout
    run("run", "--epochs", 1, "--model", "linear", "--plugin", "csv:path=log.csv", "--out", "b")
    assert (tmp_path / "b" / "log.csv").exists()
    assert not (tmp_path / "b" / "metrics.csv").exists()
    run("run", "--config", "a/run.toml", "--out", "c")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {path.name for path in (tmp_path / "a").iterdir()}


def test_each_run_has_a_new_folder_in_runs(run, tmp_path):
    for _ in range(3):
        run("run", "--epochs", 1, "--model", "linear")
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_the_reason_for_stopping_is_the_last_but_one_line(run):
    result = run("run", "--model", "linear", "--plugin", "early_stopping:patience=2,min_delta=5")
    assert re.match(r"stopped early: val_loss has not improved on \S+ for 2 evaluations", result.stdout.splitlines()[-2])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_finished_run_is_resumed_for_more_epochs(run, tmp_path, workers):
    settings = ["--model", "cnn:width=8,dropout=0.1", "--workers", workers, "--plugin", "amp:dtype=float16", "--plugin", "ema",
                "--plugin", "accumulate:every=2", "--plugin", "plateau:patience=0", "--plugin", "freeze:patterns=0,until=2ep"]
    run("run", "--epochs", 2, "--out", "a", *settings)
    run("run", "--epochs", 4, "--out", "whole", *settings)
    run("run", "--resume", "a", "--epochs", 4)
    assert (tmp_path / "a" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "whole"))
    before = (tmp_path / "a" / "weights.safetensors").read_bytes()
    result = run("run", "--resume", "a", status=2)
    assert result.stderr.strip() == "error: a: this run is finished (4 epochs); use more --epochs to continue it"
    assert (tmp_path / "a" / "weights.safetensors").read_bytes() == before


def test_a_run_whose_time_is_over_says_how_to_go_on_and_goes_on_to_the_same_bits(run, tmp_path, monkeypatch):
    from loopctl.plugins import max_time
    settings = ["--model", "cnn:width=8,dropout=0.1", "--epochs", 2, "--plugin", "ema"]
    run("run", "--out", "whole", *settings)
    now = count()
    monkeypatch.setattr(max_time, "time", SimpleNamespace(monotonic=lambda: next(now)))         # a second at every look
    result = run("run", "--out", "a", "--max-time", "30s", *settings)
    assert result.stdout.splitlines()[-2:] == ["left at step 29, in epoch 2 of 2: the time of 30s is over", "to go on: loopctl run --resume a"]
    assert not (tmp_path / "a" / "weights.safetensors").exists()
    assert tomllib.loads((tmp_path / "a" / "run.toml").read_text())["max_time"] == "30s"
    assert "max_time" not in run("explain", "--config", "a/run.toml").stdout                    # which trains nothing
    assert "finished: 2 epochs" in run("run", "--resume", "a").stdout
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "whole"))
    assert (tmp_path / "a" / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    # The time is an option of the new run, not of what is trained.
    assert "left at step 1," in run("run", "--out", "b", "--max-time", "1s", *settings).stdout
    assert "left at step 6," in run("run", "--resume", "b", "--max-time", "5s").stdout
    assert "finished: 2 epochs" in run("run", "--config", "b/run.toml", "--max-time", "1d", "--out", "c").stdout


def test_a_run_left_without_a_checkpoint_ends_with_status_1(run, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("loopctl.plugins.checkpoint.save_checkpoint", full)
    result = run("run", "--out", "a", "--max-time", "0.0001s", status=1)
    assert result.stderr.splitlines()[-1] == "error: the checkpoint could not be written; there is none to resume from"


def test_limits_apply_to_the_run_its_resume_and_its_repetition(run, tmp_path):
    settings = ["--model", "cnn:width=8,dropout=0.1", "--limit-train", 3, "--limit-valid", "34%", "--plugin", "cosine:by=step"]
    assert "updates          6: 2 epochs of 3" in run("explain", "--epochs", 2, *settings).stdout
    for out, epochs in (("a", 2), ("whole", 4)):
        assert f"finished: {epochs} epochs, {3 * epochs} updates" in run("run", "--epochs", epochs, "--out", out, *settings).stdout
    result = run("run", "--resume", "a", "--limit-train", 4, "--epochs", 4, status=2)
    assert "limit_train is 3 in the checkpoint and 4 in this run" in result.stderr
    assert "finished: 4 epochs, 12 updates" in run("run", "--resume", "a", "--epochs", 4).stdout
    run("run", "--config", "whole/run.toml", "--out", "c")
    assert equal(weights(tmp_path / "whole"), weights(tmp_path / "c"))


def test_overfit_trains_and_validates_on_the_same_batches(run, tmp_path):
    run("run", "--overfit", 1, "--epochs", 30, "--model", "linear", "--out", "a", "--lr", 0.05)
    last = (tmp_path / "a" / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert last[1] == "30"
    assert (last[3], last[5]) == ("1.0", "1.0")


def test_fast_dev_run_tries_everything_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    result = run("run", "--fast-dev-run", "--out", "a", "--epochs", 100, "--model", "linear", "--plugin", "warmup:length=5ep", "--plugin",
                 "swa:start=50", "--plugin", "report", "--plugin", f"csv:path={tmp_path}/elsewhere/log.csv", "--limit-train", 9, "--max-time", "1s")
    assert result.stdout.splitlines()[-1] == "fast-dev-run: everything works: 6 updates in 2 epochs; nothing was kept"
    assert "report.html" not in result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]
    broken = run("run", "--fast-dev-run", "--optimizer", "sgd", "--lr", "1e30", status=1)
    assert "train_loss is nan since epoch 1, so weights.safetensors is of no use" in broken.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


def test_explain_shows_the_plugins_at_each_hook_and_the_plan(run):
    text = run("explain", "--plugin", "warmup", "--plugin", "accumulate:every=2", "--plugin", "cosine", "--epochs", 10).stdout
    assert re.search(r"^    lr_scale +warmup, cosine$", text, re.MULTILINE)
    assert re.search(r"^    group_batches +accumulate$", text, re.MULTILINE)
    assert "updates          120: 10 epochs of 12, 1.92 micro-batches each" in text
    assert "effective batch  128 samples" in text
    assert "learning rate    0.000333 at the start, 0.001 at its peak, 2.45e-05 at the end" in text


def test_the_description_of_a_plugin_has_options_hooks_and_origin(run):
    page = run("plugins", "clip").stdout
    for words in ("clip: Clip gradients before each update", "max_norm", "a number; default none", "hooks    setup, train_start, grads_ready",
                  "loopctl.plugins.clip:Clip"):
        assert words in page
    assert "compute_loss (wraps)" in run("plugins", "amp").stdout


def test_the_list_of_plugins_has_a_line_per_plugin(run):
    lines = run("plugins").stdout.splitlines()
    listed = [line.split() for line in lines if line.startswith("  ")]          # the others are topics
    assert sorted(words[0] for words in listed) == list(available())
    assert all(len(words) > 3 for words in listed)
    assert run("plugins", "--check").stdout.splitlines() == lines


def test_the_hooks_command_prints_the_tree_of_hooks(run):
    from loopctl import hooks
    assert run("hooks").stdout.strip() == hooks.__doc__.strip()


def test_after_ctrl_c_the_run_is_saved_and_how_to_go_on_is_printed(forked, tmp_path):
    process = forked("run", "--epochs", "500", "--model", "linear", "--out", "a")
    log = tmp_path / "a" / "metrics.csv"
    while not log.exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    saved, *last = errors.splitlines()
    assert re.fullmatch(r"checkpoint: stopped by SIGINT after \d+ updates, in epoch \d+; resume continues from a/checkpoints/step-\d+.pt", saved)
    assert last == ["interrupted; to go on:", "loopctl run --resume a"]
    assert log.exists()
    assert (tmp_path / "a" / "run.toml").read_text()


def test_the_shell_completes_plugin_names():
    environment = {**os.environ, "_LOOPCTL_COMPLETE": "bash_complete", "COMP_WORDS": "loopctl run --plugin c", "COMP_CWORD": "3"}
    command = [sys.executable, "-c", "from loopctl.cli import main; main(prog_name='loopctl')"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [f"plain,{name}" for name in available() if name.startswith("c")]
