"""`loopctl why`: from two runs, tapes or scripts to the first difference, with updates made again where that tells more."""
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from loopctl.cli import main

# A model that multiplies the output of one of its layers by 1.01 in the update AT of training.
MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, at):
        super().__init__()
        self.at, self.first, self.act, self.last = at, nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        self.calls += self.training
        hidden = self.act(self.first(images.flatten(1)))
        if self.training and self.calls == self.at:
            hidden = hidden * 1.01
        return self.last(hidden)

def plain(): return Net(-1)
def planted(): return Net(17)
"""
SCRIPT = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=LR)
inputs, targets = torch.randn(24, 4), torch.randint(0, 2, (24,))
for start in range(0, 24, 8):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(inputs[start:start + 8]), targets[start:start + 8]).backward()
    optimizer.step()
"""
RUN = ["run", "--data", "digits", "--epochs", "4", "--limit-train", "6", "--limit-valid", "1", "--without", "progress",
       "--plugin", "checkpoint:every_steps=5,keep=9"]


def call(*words, status=0):
    result = CliRunner().invoke(main, list(map(str, words)))
    assert (result.exit_code, "Traceback" in result.output) == (status, False), result.output
    return result.stdout if not status else result.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Pairs of runs of 24 updates, made once, without a tape, with one of every fifth update and with one of each."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    (folder / "net.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, plugins in (("bare", []), ("coarse", ["--plugin", "tape:every_steps=5"]), ("fine", ["--plugin", "tape"])):
            for factory in ("plain", "planted"):
                call(*RUN, *plugins, "--model", f"net.py:{factory}", "--out", f"{name}-{factory}")
    return folder


@pytest.fixture(autouse=True)
def here(trained, tmp_path, monkeypatch):
    """The folder of the runs; what a test writes is in a copy."""
    monkeypatch.chdir(trained)


@pytest.mark.parametrize("kind", ["bare", "coarse", "fine"])
def test_the_update_and_the_module_are_found_by_making_updates_again(kind):
    text = call("why", f"{kind}-plain", f"{kind}-planted")
    assert "update 17 (epoch 3, update 5 of it): the gradient differs in all 4 tensors" in text
    assert "the first module whose output differs is last; the output of act, called before it, is equal" in text
    assert "The configurations differ: model net.py:plain in A, net.py:planted in B." in text


def test_updates_are_made_again_only_between_the_checkpoints_around_the_difference():
    assert "Found by making the updates 16 to 18 of both again." in call("why", "bare-plain", "bare-planted")
    assert "Found by making the updates 17 to 17 of both again." in call("why", "fine-plain", "fine-planted")


def test_without_tapes_and_without_making_updates_again_the_folders_are_compared():
    text = call("why", "bare-plain", "bare-planted", "--no-replay")
    assert "A: bare-plain (no tape)" in text
    assert "A and B have no tape." in text
    assert "The weights in their checkpoints are the same to the bit at update 15 and different at update 18." in text
    assert "Their curves part by update 18 (epoch 3): train_loss is " in text
    assert "record both: loopctl run with --plugin tape" in text


def test_a_fine_tape_names_the_update_without_making_it_again():
    text = call("why", "fine-plain", "fine-planted", "--no-replay")
    assert "update 17 (epoch 3, update 5 of it): the gradient differs in all 4 tensors" in text
    assert "Found by" not in text


def test_coarse_tapes_say_between_which_updates_it_lies():
    text = call("why", "coarse-plain", "coarse-planted", "--no-replay")
    assert "update 20 (epoch 4, update 2 of it): the weights differ before the update" in text
    assert "The tapes have nothing between the updates 15 and 20." in text
    assert "Equal before that: the recorded updates up to 15." in text


def test_equal_runs_are_the_same():
    shutil.copytree("fine-plain", "again", dirs_exist_ok=True)
    assert "The same to the bit: 24 updates." in call("why", "fine-plain", "again")
    assert "The weights in their checkpoints of update 24 are the same to the bit." in call("why", "bare-plain", "again")


def test_the_answer_is_an_object_for_scripts():
    found = json.loads(call("why", "fine-plain", "fine-planted", "--no-replay", "--json"))
    assert (found["same"], found["update"], found["plugins"]) == (False, 17, [])
    assert found["text"].startswith("update 17")


def test_the_folders_of_both_runs_are_left_as_they_are():
    files = {file: file.stat().st_mtime_ns for folder in ("bare-plain", "bare-planted") for file in Path(folder).rglob("*")}
    call("why", "bare-plain", "bare-planted")
    assert files == {file: file.stat().st_mtime_ns for folder in ("bare-plain", "bare-planted")
                     for file in Path(folder).rglob("*")}


def test_a_script_is_run_and_compared_with_another_one(tmp_path):
    for name, lr in (("a", 0.1), ("b", 0.2)):
        (tmp_path / f"{name}.py").write_text(SCRIPT.replace("LR", str(lr)))
    text = call("why", tmp_path / "a.py", tmp_path / "b.py")
    assert "update 1: the learning rate is 0.1 in A and 0.2 in B." in text
    assert "a.py (tape of 3 updates)" in text


@pytest.mark.parametrize(("paths", "message"), [
    (("fine-plain", "nothing"), "there is no nothing; name the folder of a run, a tape or a Python script"),
    (("fine-plain", "fine-plain"), "fine-plain is given twice; name two runs"),
    (("fine-plain", "fine-plain/run.toml"), "run.toml is no tape; one is written by the plugin tape"),
    (("fine-plain", "."), ". is not the folder of a run"),
])
def test_what_is_no_run_is_refused_in_a_line(paths, message):
    text = call("why", *paths, status=2)
    assert message in text
    assert len(text.splitlines()) == 1


def test_a_script_that_fails_is_refused_with_its_error(tmp_path):
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    assert "fails.py ended with status 3, so there is nothing to compare" in call(
        "why", "fine-plain", tmp_path / "fails.py", status=2)


def test_a_damaged_record_is_counted_and_the_others_are_compared(tmp_path):
    file = tmp_path / "damaged.tape"
    lines = Path("fine-plain/run.tape").read_text().splitlines(keepends=True)
    file.write_text("".join(line.replace('"update":9,', '"update":8,') for line in lines[:-3]) + lines[-3][:50])
    text = call("why", "fine-plain", file, "--no-replay")
    assert "damaged.tape (tape of 22 updates, 3 records damaged)" in text or "records damaged" in text
    assert "could not be read" in text


def test_where_the_code_of_a_run_is_gone_what_the_tapes_say_is_said(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                 # without net.py
    text = call("why", trained / "fine-plain", trained / "fine-planted")
    assert "update 17 (epoch 3, update 5 of it): the gradient differs in all 4 tensors" in text
    assert "Its updates could not be made again to look closer: " in text
    assert "net.py" in text


def test_what_the_code_of_a_run_prints_is_no_part_of_the_answer(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(MODEL + "print('made')")
    found = json.loads(call("why", trained / "fine-plain", trained / "fine-planted", "--json"))
    assert "Found by making the updates 17 to 17 of both again." in found["text"]
