"""`loopctl runs`, `--name` and `--tag`."""
import json
import tomllib

import pytest
from click.testing import CliRunner

from loopctl.checkpoint.folder_lock import CHECKPOINTS, RUN, FolderLock
from loopctl.cli import main

CONFIG = 'model = "cnn"\ndata = "digits"\nepochs = 5\nlr = 0.1\nseed = {seed}\ntag = ["night"]\nplugin = ["clip:max_norm=1.0", {checkpoint}]\n'
METRICS = "epoch,step,val_loss,val_accuracy\n1,10,0.5,0.8\n2,20,0.25,0.7\n3,30,0.75,0.9\n"


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call `loopctl` in a new folder, with words as on the command line. Return its result."""
    monkeypatch.chdir(tmp_path)

    def called(*words, status=0):
        result = CliRunner().invoke(main, [str(word) for word in words])
        assert result.exit_code == status, result.output
        return result
    return called


def make(folder, checkpoint='"checkpoint:every_epochs=1,monitor=,mode=auto"', seed=0, checkpoints="checkpoints", weights=False):
    """The files of a run, without its training."""
    folder.mkdir(parents=True)
    (folder / "run.toml").write_text(CONFIG.format(checkpoint=checkpoint, seed=seed))
    (folder / "metrics.csv").write_text(METRICS)
    if checkpoints:
        (folder / checkpoints).mkdir(parents=True)
        (folder / checkpoints / "step-00000030.pt").touch()
    if weights:
        (folder / "weights.safetensors").touch()


def listed(call, *words):
    return {run["name"]: run for run in json.loads(call("runs", "--json", *words).stdout)}


def test_the_state_of_a_run_is_that_of_its_files_and_its_lock(call, tmp_path):
    make(tmp_path / "runs" / "finished", weights=True)
    make(tmp_path / "runs" / "stopped")
    make(tmp_path / "runs" / "elsewhere", '"checkpoint:dir=far/away"', checkpoints="far/away")
    make(tmp_path / "runs" / "broken", checkpoints="")
    make(tmp_path / "runs" / "running", checkpoints="")
    make(tmp_path / "runs" / "resumed", weights=True)
    make(tmp_path / "runs" / "killed")
    (tmp_path / "runs" / "killed" / RUN).write_text("{}")               # left behind; no process holds it
    (tmp_path / "runs" / "notes").mkdir()                               # not a run
    (tmp_path / "runs" / "file").touch()
    with FolderLock(tmp_path / "runs" / "running"), FolderLock(tmp_path / "runs" / "resumed" / "checkpoints", CHECKPOINTS):
        found = {name: run["state"] for name, run in listed(call).items()}
    assert found == {"finished": "finished", "stopped": "stopped", "elsewhere": "stopped", "broken": "broken", "running": "running",
                     "resumed": "running", "killed": "stopped"}
    assert listed(call)["resumed"]["state"] == "finished"


@pytest.mark.parametrize(("checkpoint", "metric", "value"), [
    ('"checkpoint:monitor=,mode=auto"', "val_loss", 0.25), ('"checkpoint:every_epochs=1,monitor=val_accuracy,mode=auto"', "val_accuracy", 0.9),
    ('"checkpoint:monitor=val_accuracy,mode=min"', "val_accuracy", 0.7), ('"csv"', "val_loss", 0.25)])
def test_the_best_value_is_that_of_the_monitored_metric(call, tmp_path, checkpoint, metric, value):
    make(tmp_path / "runs" / "a", checkpoint)
    run = listed(call)["a"]
    assert (run["metric"], run["best"], run["epochs"], run["of"]) == (metric, value, 3, 5)


def test_a_line_says_how_it_went_and_a_second_one_what_it_is(call, tmp_path):
    make(tmp_path / "runs" / "2026-01-02_03-04-05", seed=7)
    lines = call("runs").stdout.splitlines()
    assert lines[1].split() == ["2026-01-02_03-04-05", "2026-01-02", "03:04", "stopped", "3/5", "val_loss", "0.25"]
    assert lines[2] == "  #night, cnn on digits, seed=7, clip"
    assert max(map(len, lines)) <= 80
    assert call("runs", "runs/2026-01-02_03-04-05").stdout.splitlines()[1:] == lines[1:]


@pytest.mark.parametrize("damage", [
    ("run.toml", b"model = ["), ("run.toml", b"\xff\x00"), ("run.toml", b'plugin = 3\ntag = 4\nwithout = 1\nepochs = "\\u001b[31m"'),
    ("metrics.csv", b"\x00\xff\xfe"), ("metrics.csv", b"epoch,val_loss\nx,y\n,\n1"), ("metrics.csv", b""), ("run.toml", None), ("metrics.csv", None)])
def test_a_damaged_run_does_not_break_the_table(call, tmp_path, damage):
    make(tmp_path / "runs" / "damaged")
    make(tmp_path / "runs" / "whole")
    name, content = damage
    file = tmp_path / "runs" / "damaged" / name
    file.unlink()
    file.mkdir() if content is None else file.write_bytes(content)
    text = call("runs").stdout
    assert len(text.splitlines()) == 5
    assert text.replace("\n", "").isprintable()
    assert set(listed(call)) == {"damaged", "whole"}


def test_a_folder_without_runs_says_so_and_one_that_is_not_there_is_refused(call, tmp_path):
    assert call("runs", status=2).stderr == "error: there is no folder runs; name the folder that holds the folders of runs\n"
    (tmp_path / "runs").mkdir()
    assert call("runs").stdout == "no runs in runs\n"
    assert json.loads(call("runs", "--json").stdout) == []


def test_a_run_has_its_name_and_its_tags(call, tmp_path):
    settings = ["--model", "linear", "--limit-train", 1, "--limit-valid", 1]
    call("run", "--name", "first", "--epochs", 1, "--tag", "a b", "--tag", "c", *settings)
    assert tomllib.loads((tmp_path / "runs" / "first" / "run.toml").read_text())["tag"] == ["a b", "c"]
    assert call("runs").stdout.splitlines()[2].startswith("  #a b #c, linear on digits, ")
    call("run", "--resume", "runs/first", "--epochs", 2)                        # keeps them
    assert listed(call)["first"]["tags"] == ["a b", "c"]
    call("run", "--resume", "runs/first", "--epochs", 3, "--tag", "d")
    assert listed(call)["first"]["tags"] == ["d"]
    call("explain", "--config", "runs/first/run.toml")                          # has no tags
    call("run", "--config", "runs/first/run.toml", "--name", "second", "--tag", "e")
    assert (listed(call)["second"]["tags"], listed(call)["second"]["state"]) == (["e"], "finished")
    assert "e" in call("compare", "runs/first", "runs/second").stdout.split("tag")[1].split("\n")[0]


@pytest.mark.parametrize(("words", "message"), [
    (["--name", "taken"], "--name taken: runs/taken exists and is not overwritten; choose another name, or use --resume runs/taken"),
    (["--name", "a/b"], "--name a/b: the name is that of a folder in runs/"), (["--name", ".."], "--name ..: the name is that of a folder"),
    (["--name", "a", "--out", "b"], "--name a with --out: both name the run's folder; leave out one of the two"),
    (["--name", "a", "--resume", "runs/taken"], "--name a with --resume: both name the run's folder")])
def test_a_wrong_name_is_refused(call, tmp_path, words, message):
    make(tmp_path / "runs" / "taken", '"checkpoint"')
    assert message in call("run", *words, status=2).stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["taken"]
