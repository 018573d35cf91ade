"""`loopctl rewind`: steps of a run made again, with observers added, in a folder of their own, and proved to be the same."""
import csv
import hashlib
import re
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from loopctl.cli import main
from loopctl.cli.rewind import replay
from loopctl.errors import UsageError
from loopctl.tape.reading import read_tape

RUN = ["run", "--epochs", "4", "--limit-train", "6", "--limit-valid", "1", "--model", "mlp", "--plugin",
       "onecycle:max_lr=0.01", "--plugin", "ema", "--plugin", "early_stopping:patience=3", "--without", "progress"]
SAVING = ["--plugin", "checkpoint:every_steps=4,keep=9"]
OBSERVERS = ["--plugin", "norms", "--plugin", "tape", "--plugin", "csv"]


def call(*words, status=0):
    result = CliRunner().invoke(main, list(map(str, words)))
    assert (result.exit_code, "Traceback" in result.output) == (status, False), result.output
    return result.stdout if not status else result.output


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of 24 steps, made once: `a` with checkpoints and a tape, and `observed`, the same with observers too."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs")
    call(*RUN, *SAVING, "--plugin", "tape:every_steps=5", "--out", folder / "a")
    call(*RUN, *SAVING, "--plugin", "norms:every_steps=1", "--plugin", "tape", "--plugin", "csv:every_steps=1", "--out",
         folder / "observed")
    return folder


@pytest.fixture
def a(trained, tmp_path, monkeypatch):
    """A copy of the run `a`, in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(trained / "a", "a"))


def hashes(folder):
    return {str(file): hashlib.md5(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()}


def rows(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def test_the_observers_of_a_rewind_write_what_they_would_have_written_in_the_run(a, trained):
    before = hashes(a)
    text = call("rewind", a, "--to", 20, *OBSERVERS)
    assert "a is entered after step 18, in a/checkpoints/step-00000018.pt" in text
    assert "steps 19 to 21 were made again" in text
    assert "the same run: 1 checkpoint and 1 update of its tape are equal to the bit" in text
    assert "folder: rewinds/a-step-20 with norms.csv, run.tape and steps.csv" in text
    assert hashes(a) == before                                  # the run's folder is as it was, to the byte
    found, there = Path("rewinds/a-step-20"), trained / "observed"
    for name in ("norms.csv", "steps.csv"):
        expected = [row for row in rows(there / name) if row["step"] in ("19", "20", "21")]
        assert rows(found / name) == expected
        assert {row["step"] for row in expected} == {"19", "20", "21"}
    tape, expected = read_tape(found / "run.tape").updates, read_tape(there / "run.tape").updates
    assert list(tape) == [19, 20, 21]
    assert all(tape[number].observed == expected[number].observed for number in tape)
    assert (found / "rewind.txt").read_text().splitlines() == text.splitlines()[:3]


def test_checkpoints_and_evaluations_that_are_passed_are_compared(a):
    text = call("rewind", a, "--to", 17, "--steps", 6)
    assert "entered after step 16" in text
    assert "the same run: 2 checkpoints, 1 evaluation and 1 update of its tape are equal to the bit" in text
    assert text.endswith("folder: rewinds/a-step-17\n")
    again = call("rewind", a, "--to", 17, "--steps", 0)
    assert "steps 17 to 17 were made again" in again
    assert ("not proved to be the same run: between these steps it left no checkpoint, evaluation or tape to compare with; "
            "--steps 2 goes beyond its checkpoint of step 18, and a run with the plugin tape can be compared at each") in again
    assert "the same run: 1 checkpoint and 1 evaluation are equal" in call("rewind", a, "--to", 17, "--steps", 2)
    assert again.endswith("folder: rewinds/a-step-17_2\n")


def test_the_last_step_of_a_run_is_the_last_that_is_made(a):
    found = replay(a, 24, 30)
    assert (found.entered, found.last, found.proved) == (20, 24, True)
    assert found.compared == {"checkpoint": 1, "evaluation": 1, "update of its tape": 0}         # those at its end
    text = call("rewind", a, "--to", 25, status=2)
    assert "step 25 is beyond the end of a, which has 24 steps; choose an earlier one" in text


def test_a_run_without_checkpoints_is_entered_at_its_beginning_and_compared_with_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(*RUN, "--without", "checkpoint", "--out", "plain")
    text = call("rewind", "plain", "--to", 14, "--plugin", "norms:every_steps=7")
    assert "plain is entered at its beginning: it has no checkpoint before step 14, so 13 steps before it are made" in text
    assert "the same run: 2 evaluations are equal to the bit" in text
    assert {row["step"] for row in rows(Path("rewinds/plain-step-14/norms.csv"))} == {"1", "7", "14"}
    text = call("rewind", "plain", "--to", 25, status=2)
    assert "step 25 is beyond the end of plain, which is planned for 24 steps; choose an earlier one" in text
    assert [folder.name for folder in Path("rewinds").iterdir()] == ["plain-step-14"]


def test_a_damaged_checkpoint_is_left_out(a, caplog):
    file = a / "checkpoints" / "step-00000018.pt"
    file.write_bytes(file.read_bytes()[:-9])
    assert "entered after step 16" in call("rewind", a, "--to", 19)
    assert re.search(r"step-00000018.pt .*; it is left out", caplog.text)


def test_the_best_checkpoint_is_a_place_to_enter_too(a):
    folder = a / "checkpoints"
    shutil.copy(folder / "step-00000012.pt", folder / "best.pt")
    for file in folder.glob("step-*.pt"):
        file.unlink()
    assert "a is entered after step 12, in a/checkpoints/best.pt" in call("rewind", a, "--to", 14)


def test_a_damaged_tape_or_log_is_left_out(a, caplog):
    for name in ("run.tape", "metrics.csv"):
        (a / name).write_bytes(b"\xff\n")
    assert "the same run: 1 checkpoint is equal to the bit" in call("rewind", a, "--to", 17, "--steps", 2)
    assert re.findall(r"a/(run.tape|metrics.csv) .*it is left out", caplog.text) == ["run.tape", "metrics.csv"]


def test_a_step_after_an_early_end_is_refused_when_the_end_is_reached(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(*RUN[:-3], "early_stopping:patience=1,min_delta=9", "--without", "progress", "--without", "checkpoint", "--out", "f")
    text = call("rewind", "f", "--to", 20, "--plugin", "norms", status=2)
    assert "step 20 was not reached: f ends at step 12 (val_loss has not improved on" in text
    assert not Path("rewinds").exists()


def test_a_checkpoint_of_the_end_of_an_epoch_is_compared_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("""
from loopctl import hookimpl

class Shrink:
    @hookimpl
    def epoch_end(self, run):
        for parameter in run.model.parameters():
            parameter.data.mul_(0.99)
""")
    call(*RUN, *SAVING, "--plugin", "mine.py:Shrink", "--out", "g")
    assert "the same run: 1 checkpoint and 1 evaluation are equal to the bit" in call("rewind", "g", "--to", 18)


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """A run whose loss is in a file that was changed since."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("from torch.nn.functional import cross_entropy\ndef loss(output, target):\n"
                               "    return cross_entropy(output, target)\n")
    call(*RUN, *SAVING, "--plugin", "tape", "--loss", "mine.py:loss", "--out", "b")
    file = Path("mine.py")
    file.write_text(file.read_text().replace("target)\n", "target) * 1.5\n").replace("loss(output, target) * 1.5", "loss(output, target)"))
    return Path("b")


def test_a_run_that_is_not_the_same_is_named_with_the_first_step_that_differs(changed):
    text = call("rewind", changed, "--to", 19, "--plugin", "norms", status=1)
    assert ("not the same run: at step 19, the weights on its tape are other values: no version or setting is known to be "
            "another one; look at the data, at code of your own") in text
    assert "error: what is in rewinds/b-step-19 is not of the run b" in text
    assert "not the same run" in Path("rewinds/b-step-19/rewind.txt").read_text()


@pytest.mark.parametrize(("gone", "step", "differs"), [
    (["run.tape"], 20, "the weights of its checkpoint"), (["run.tape", "checkpoints"], 6, "train_loss")])
def test_without_a_tape_checkpoints_or_the_log_tell_it(changed, gone, step, differs):
    for name in gone:
        (changed / name).rename(f"{name}.elsewhere")
    found = replay(changed, 19, 20)
    assert not found.proved
    assert found.differs[0] == step
    assert differs in found.differs[1]


def test_what_differs_in_the_environment_is_named(changed, monkeypatch):
    here = read_tape(changed / "run.tape").header
    monkeypatch.setattr("loopctl.cli.replay_proof.environment", lambda device: here | {"torch": "1.0", "threads": 64})
    text = call("rewind", changed, "--to", 19, status=1)
    assert f"other values: torch was {torch.__version__} and is 1.0; threads was 1 and is 64\n" in text
    (changed / "run.tape").unlink()
    text = call("rewind", changed, "--to", 19, status=1)
    assert f"other values: torch was {torch.__version__} and is 1.0\n" in text             # from the heading of run.toml


def test_a_run_that_was_resumed_with_more_epochs_says_so(a):
    config = (a / "run.toml").read_text()
    (a / "run.toml").write_text(config.replace("epochs = 4", "epochs = 9"))
    text = call("rewind", a, "--to", 19, "--steps", 2, status=1)
    assert "the run was resumed with another epochs (4, then 9)" in text


def test_what_a_run_writes_elsewhere_is_not_written_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("""
from pathlib import Path
from loopctl import hookimpl

class Remote:
    topic = "logging and reports"
    number = 0
    @hookimpl
    def after_step(self, run):
        self.number += 1
        with Path(__file__).with_name("remote.txt").open("a") as file:
            file.write(f"{run.attempts}\\n")
    def state_dict(self):
        return {"number": self.number}
    def load_state_dict(self, state):
        self.number = state["number"]
""")
    call(*RUN, "--plugin", f"checkpoint:every_steps=4,keep=9,dir={tmp_path}/saved", "--plugin", "mine.py:Remote", "--plugin",
         f"spike:path={tmp_path}/spikes.csv,deviations=1,warmup=2", "--max-time", "1h", "--out", "c")
    assert Path("spikes.csv").exists()
    before = hashes(tmp_path)
    text = call("rewind", "c", "--to", 18, "--steps", 3, "--out", "found")
    assert "entered after step 16, in" in text
    assert "the same run: 2 checkpoints and 1 evaluation are equal to the bit" in text
    assert "folder: found with spikes.csv" in text
    after = hashes(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {Path(name).parent.name for name in after.keys() - before.keys()} <= {"found", "__pycache__"}


def test_a_plugin_that_goes_back_to_checkpoints_finds_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(*RUN, *SAVING, "--plugin", "tape", "--plugin", "spike:action=rollback,deviations=0.5,warmup=2,limit=9", "--out", "d")
    spikes = [int(row["step"]) for row in rows(Path("d/spikes.csv"))]
    before = hashes(Path("d"))
    assert any(13 <= step < 16 for step in spikes), spikes            # back to step 12
    assert any(step >= 17 for step in spikes), spikes
    text = call("rewind", "d", "--to", 13, "--steps", 9)
    assert "entered after step 12" in text
    assert "the same run: 3 checkpoints, 1 evaluation and 10 updates of its tape are equal to the bit" in text
    assert hashes(Path("d")) == before


def test_a_replay_leaves_the_settings_of_torch_as_they_were_and_prints_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        call(*RUN, "--deterministic", "--without", "csv", "--out", "e")
    finally:
        torch.use_deterministic_algorithms(False)
    found = replay(Path("e"), 20, 22, ["tape:modules=true", "csv"], tmp_path / "fine")
    assert not torch.are_deterministic_algorithms_enabled()
    assert capsys.readouterr() == ("", "")
    assert (found.entered, found.last, found.out) == (18, 22, tmp_path / "fine")
    assert read_tape(found.out / "run.tape").header["deterministic"]
    assert [int(row["step"]) for row in rows(found.out / "steps.csv")] == [19, 20, 21, 22]


@pytest.mark.parametrize(("words", "parts"), [
    (["absent", "--to", "3"], ["there is no folder absent; name the folder of a run, such as runs/a"]),
    (["b", "--to", "3"], ["there is no folder b; did you mean runs/b?"]),
    ([".", "--to", "3"], [". has no run.toml that says what it trained; name the folder of a run of `loopctl run`"]),
    (["a"], ["Missing option '--to'"]),
    (["a", "--to", "0"], ["'--to'", "0 is not in the range x>=1"]),
    (["a", "--to", "3", "--steps", "-1"], ["'--steps'"]),
    (["a", "--to", "9", "--plugin", "clip"], ["--plugin clip: clip acts in training, so it would be another run; add observers only"]),
    (["a", "--to", "9", "--plugin", "early_stopping:patience=2"], ["early_stopping has a state"]),
    (["a", "--to", "9", "--plugin", "checkpoint"], ["checkpoint has a state"]),
    (["a", "--to", "9", "--plugin", "normz"], ["no plugin is called 'normz'; did you mean 'norms'?"]),
    (["a", "--to", "9", "--plugin", "norms:every=3"], ["norms: no option 'every'"]),
    (["a", "--to", "9", "--out", "a/inside"], ["--out a/inside is in a, which is left as it is; choose another folder"]),
    (["a", "--to", "9", "--out", "full"], ["--out full exists and is not overwritten; choose another folder"]),
    (["a", "--to", "9", "--out", "runs/b"], ["--out runs/b is the folder of a run and is not overwritten; choose another folder"]),
    (["a", "--to", "9", "--plugin", "norms:path={tmp}/a/norms.csv"], ["a/norms.csv is in a, which is left as it is"]),
    (["runs/b", "--to", "3"], ["no data is called 'digitz'"]),
    (["odd", "--to", "3"], ["odd/run.toml: 'epoch' is not a key of a configuration; did you mean 'epochs'?"]),
    (["two", "--to", "3"], ["two is a run of 2 processes; only a run of one process can be replayed"]),
])
def test_wrong_input_is_refused_in_one_line_and_leaves_nothing_behind(a, tmp_path, words, parts):
    for name, old, new in (("odd", "epochs =", "epoch ="), ("runs/b", '"digits"', '"digitz"'), ("two", "epochs =", 'devices = "0,1"\nepochs =')):
        Path(name).mkdir(parents=True)
        Path(name, "run.toml").write_text((a / "run.toml").read_text().replace(old, new, 1))
    Path("full").mkdir()
    Path("full/file").touch()
    before = sorted(tmp_path.rglob("*")), hashes(a)
    text = call("rewind", *(word.format(tmp=tmp_path) for word in words), status=2)
    assert all(part in text for part in parts), text
    assert len(text.splitlines()) == 1
    assert (sorted(tmp_path.rglob("*")), hashes(a)) == before


def test_a_folder_of_another_trainer_is_refused_in_python_too(tmp_path):
    with pytest.raises(UsageError, match=r"has no run.toml that says what it trained"):
        replay(tmp_path, 1, 2)
