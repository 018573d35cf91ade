"""`loopctl tune`: the command line that it prints, and the file that it writes. Trials are replaced by a table."""
import shlex
import tomllib

import pytest
from click.testing import CliRunner

from loopctl.cli import main
from loopctl.tuning import choices, search
from loopctl.tuning.choices import described
from loopctl.tuning.trial import Result


@pytest.fixture
def tune(tmp_path, monkeypatch):
    """Call `loopctl tune` where what has one of the names, or all of them, is the faster for it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choices.os, "cpu_count", lambda: 2)

    def call(*arguments, faster=(), status=0):
        def trial(arguments, composition, train, device, seconds, limit, slowest=0.0, noise=0.0):
            rate = 2.0 ** sum(name in described(composition) for name in faster)
            return Result(rate=rate, losses=[1.0], seconds=0.1)

        monkeypatch.setattr(search, "run_trial", trial)
        monkeypatch.setattr(search.Search, "read_batches", lambda self, train: ([next(iter(train))], 20.0))
        result = CliRunner().invoke(main, ["tune", *map(str, arguments)])
        assert result.exit_code == status, result.output
        return result.output
    return call


@pytest.fixture
def command(tune):
    return lambda *arguments, faster=(): tune(*arguments, faster=faster).splitlines()[-1]


@pytest.mark.parametrize(("arguments", "faster", "expected"), [
    ("", "", "loopctl run"), ("--plugin cosine --lr 0.1", "", "loopctl run --plugin cosine --lr 0.1"),
    ("--plugin cosine", "channels_last amp", "loopctl run --plugin cosine --plugin amp:dtype=bfloat16 --plugin channels_last"),
    ("--seconds 5 --tolerance=0.1 --epochs 3", "", "loopctl run --epochs 3"),
    ("--optimizer sgd --epochs 3", "fused", "loopctl run --epochs 3 --optimizer sgd:fused=true"),
    ("--optimizer=sgd:momentum=0.9,nesterov=true", "foreach", "loopctl run --optimizer sgd:momentum=0.9,nesterov=true,foreach=true"),
    ("--optimizer sgd:fused=true", "fused", "loopctl run --optimizer sgd:fused=true"),
    ("--optimizer muon,adamw", "fused", "loopctl run --optimizer muon,adamw"),
    ("", "threads=2", "loopctl run --threads 2"), ("--batch-size 32", "workers=2", "loopctl run --batch-size 32 --workers 2"),
    ("", "on_device", "loopctl run --data digits:on_device=true"),
    ("--data digits:channels=3", "on_device compile", "loopctl run --plugin compile --data digits:channels=3,on_device=true"),
    ("--workers 1", "on_device", "loopctl run --workers 1"),
    ("--out a --tag b --max-time 2h", "compile", "loopctl run --out a --tag b --max-time 2h --plugin compile"),
])
def test_it_ends_with_the_command_line_to_use(command, arguments, faster, expected):
    assert command(*shlex.split(arguments), faster=faster.split()) == expected


def test_quotes_are_kept(command):
    assert command("--plugin", "freeze:patterns='0.*'") == """loopctl run --plugin 'freeze:patterns='"'"'0.*'"'"''"""


def test_plugins_of_a_file_stay(command, tmp_path):
    """Those of the command line take the place of those of the file, so all are named."""
    (tmp_path / "a.toml").write_text('plugin = ["cosine"]\nepochs = 3\n')
    assert command("--config", "a.toml", faster=["compile"]) == "loopctl run --config a.toml --plugin cosine --plugin compile"
    assert command("--config", "a.toml") == "loopctl run --config a.toml"


def test_it_writes_a_configuration_for_run(tune, tmp_path):
    out = tune("--plugin", "cosine", "--max-steps", 1, "--write", "fast.toml", faster=["channels_last", "fused", "threads=2"])
    assert out.splitlines()[-1] == "loopctl run --plugin cosine --max-steps 1 --plugin channels_last --threads 2 --optimizer adamw:fused=true"
    found = tomllib.loads((tmp_path / "fast.toml").read_text())
    assert (found["optimizer"], found["threads"], found["max_steps"]) == ("adamw:fused=true", 2, 1)
    assert [text.partition(":")[0] for text in found["plugin"]] == ["cosine", "channels_last", "csv", "checkpoint", "progress"]
    result = CliRunner().invoke(main, ["run", "--config", "fast.toml", "--out", "a"])
    assert result.exit_code == 0, result.output
    assert 'optimizer = "adamw:fused=true"' in (tmp_path / "a" / "run.toml").read_text()


def test_it_leaves_no_trace_and_shows_no_progress_in_a_pipe(tune, tmp_path):
    assert "\r" not in tune()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("arguments", "message"), [
    ("--write a.toml", "--write a.toml exists and is not overwritten; choose another file"),
    ("--seconds 0", "tune: seconds is above 0, not 0"), ("--devices 0,1", "tune --devices 0,1: it works in one process; name one device"),
    ("--batch-size auto", "--batch-size auto: `loopctl run` finds it before it trains; pass a number here"),
    ("--cudnn-benchmark --deterministic", "--cudnn-benchmark with --deterministic: cuDNN would choose its algorithms by their time"),
])
def test_wrong_options_are_refused_before_any_trial(tune, tmp_path, arguments, message):
    (tmp_path / "a.toml").write_text("")
    assert f"error: {message}" in tune(*arguments.split(), status=2)
    assert (tmp_path / "a.toml").read_text() == ""
