"""The folders of runs: two processes in one, what is missing on resume, Ctrl-C, disks and terminals that fail."""
import errno
import multiprocessing
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint import atomic_files
from loopctl.checkpoint.atomic_files import atomic_write, save_weights
from loopctl.checkpoint.finding import checkpoints_in, find_checkpoint
from loopctl.checkpoint.folder_lock import FolderLock, LostLock
from loopctl.cli import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the signals and devices of Linux")
sgd = partial(torch.optim.SGD, lr=0.1)
LINEAR = ["run", "--model", "linear", "--without", "progress", "--out", "a"]

# Plugins of the command line. `Wait` makes the file `waiting` in a hook, then waits for the file `go`; `Interrupt` ends
# the run as a second Ctrl-C does; `Poison` makes losses NaN.
PLUGINS = """
import time
from dataclasses import dataclass
from math import nan
from pathlib import Path
import torch
from loopctl import hookimpl

@dataclass(eq=False)
class Wait:
    moment: str = ""
    observer_only = True

    def at(self, moment):
        if moment == self.moment and not Path("go").exists():
            Path("waiting").touch()
            end = time.monotonic() + 100        # the test that should end the wait may have been killed
            while not Path("go").exists() and time.monotonic() < end:
                time.sleep(0.01)

    @hookimpl
    def train_start(self, run):
        self.at("train_start")

    @hookimpl
    def epoch_start(self, run):
        self.at(f"epoch {run.epoch + 1}")

@dataclass(eq=False)
class Interrupt:
    step: int = 30
    observer_only = True

    @hookimpl(trylast=True)
    def safe_point(self, run):
        if run.attempts == self.step and not run.resume:
            raise KeyboardInterrupt

@dataclass(eq=False)
class Poison:
    part: str = "train"
    epoch: int = 2

    @hookimpl(wrapper=True)
    def compute_loss(self, run):
        loss = yield
        part, epoch = ("train", run.epoch + 1) if torch.is_grad_enabled() else ("val", run.epoch)
        return loss * nan if (part, epoch) == (self.part, self.epoch) else loss
"""


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    """Each test runs in a folder of its own, with the plugins above; Ctrl-C is not ignored, as in background processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(atomic_files, "warned", set())
    Path("own.py").write_text(PLUGINS)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def loopctl(capsys):
    """Call `loopctl` in this process. Return its exit status and the lines of stderr."""
    def call(*words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        return end.value.code, capsys.readouterr().err.splitlines()
    return call


@pytest.fixture(scope="session")
def forks():
    """A server that forks processes which have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "sklearn.datasets", "loopctl.cli.train", "loopctl.plugins.csv"])
    return context


@pytest.fixture
def start(forks):
    """Call `loopctl` in a new process, which is killed at the end of the test. Return the process."""
    processes = []

    def started(*words):
        code = ("import os, signal, torch; from loopctl.cli import main\n"
                f"os.chdir({os.getcwd()!r}); os.dup2(os.open('errors', os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)\n"
                f"torch.set_num_threads(1); main({[str(word) for word in words]})")
        processes.append(forks.Process(target=exec, args=(code, {})))
        processes[-1].start()
        return processes[-1]
    yield started
    for process in processes:
        process.kill()
        process.join()


def wait_for(name, process):
    end = time.monotonic() + 300
    while not Path(name).exists():
        assert process.is_alive(), Path("errors").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)


def finish(process):
    """Let a waiting process go on, and return its exit status."""
    Path("go").touch()
    process.join(300)
    return process.exitcode


def kill(process):
    process.kill()
    process.join()
    Path("go").touch()


def small():
    torch.manual_seed(0)
    return nn.Linear(6, 3)


def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(5)]


class At:
    """Calls a function of the run in a hook, once, after so many steps."""

    def __init__(self, hook, function, steps=0):
        self.hook, self.function, self.steps = hook, function, steps

    def reach(self, hook, run):
        if hook == self.hook and run.attempts >= self.steps and self.function:
            function, self.function = self.function, None
            function(run)

    @hookimpl
    def train_start(self, run: Run):
        self.reach("train_start", run)

    @hookimpl(tryfirst=True)
    def epoch_start(self, run: Run):
        self.reach("epoch_start", run)

    @hookimpl
    def before_step(self, run: Run):
        self.reach("before_step", run)


def train(out="a", *plugins, epochs=3, dir="checkpoints", every=1, **settings):
    """Train from Python, three epochs of five steps."""
    return fit(small(), nn.CrossEntropyLoss(), sgd, batches(), epochs=epochs, out=out, **settings,
               plugins=[f"checkpoint:dir={dir},every_steps={every}", "csv", *plugins])


def files(folder="."):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def refused(call, match):
    """A function that asserts that `call()` is refused, and that it changes no file."""
    def check(run=None):
        before = files()
        with pytest.raises(UsageError, match=match):
            call()
        assert files() == before
    return check


def trained_alone(run, same):
    """Assert that a run has the weights and files of one that had its folder for itself."""
    alone = train("alone")
    same(run.model, alone.model)
    assert (run.out / "metrics.csv").read_bytes() == Path("alone/metrics.csv").read_bytes()
    assert find_checkpoint(run.out)[1]["counters"]["step"] == 15
    assert not list(Path().rglob("*.lock"))


# D. Two processes, one folder


@pytest.mark.fault(row="D1", given="two runs with the same --out; the second begins when the first has made the folder, and the first fails",
                   right="the second is refused while the first lives; nobody removes what another made")
def test_a_second_run_is_refused_before_the_first_has_written_anything(loopctl):
    Path("second.py").write_text(
        "from pathlib import Path\nfrom loopctl import UsageError, hookimpl\nfrom loopctl.cli import main\nclass Second:\n    @hookimpl\n    def setup(self, run):\n"
        f"        try:\n            main({[*LINEAR, '--epochs', '1']})\n        except SystemExit as end:\n            Path('second').write_text(f'second: {{end.code}}')\n"
        "    @hookimpl\n    def train_start(self, run):\n        raise UsageError('fails')\n")
    status, errors = loopctl(*LINEAR, "--plugin", "second.py:Second")
    assert Path("second").read_text() == "second: 2"
    assert f"a is in use by process {os.getpid()}" in errors[0]
    assert (status, errors[1:]) == (2, ["error: second: fails"])
    assert not Path("a").exists()


@pytest.mark.fault(row="D", given="two runs with the same --out; while the first builds its model, the second trains to its end",
                   right="the first is refused and removes nothing of the second")
def test_a_run_that_comes_late_to_its_folder_removes_nothing(loopctl):
    Path("late.py").write_text(
        "from torch import nn\nfrom loopctl.cli import main\ndef model():\n    try:\n"
        f"        main({[*LINEAR, '--epochs', '1']})\n    except SystemExit as end:\n        assert end.code == 0\n"
        "    open('trained', 'w').close()\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n")
    status, errors = loopctl(*LINEAR, "--model", "late.py:model")
    assert (status, len(errors), Path("trained").exists()) == (2, 1, True)
    assert errors[0].startswith("error: --out a exists and is not overwritten")
    assert {path.name for path in files("a")} == {
        "run.toml", "data.json", "explain.txt", "metrics.csv", "weights.safetensors", "best.pt", "best.safetensors", "step-00000023.pt"}


@pytest.mark.fault(row="D2", given="a resumed run, stopped by SIGSTOP; two more resumes of its folder; the first continues",
                   right="both are refused while the first lives, and it ends with all its files")
def test_a_run_that_is_stopped_keeps_its_folder(loopctl, start):
    loopctl(*LINEAR, "--epochs", 1)
    process = start("run", "--resume", "a", "--epochs", 3, "--plugin", "own.py:Wait:moment=epoch 3")
    wait_for("waiting", process)
    os.kill(process.pid, signal.SIGSTOP)
    before = files()
    for words in (["--resume", "a"], ["--resume", Path("a").absolute(), "--epochs", 9]):
        status, errors = loopctl("run", *words)
        assert (status, len(errors)) == (2, 1)
        assert f"is in use by process {process.pid} on " in errors[0]
    assert files() == before
    os.kill(process.pid, signal.SIGCONT)
    assert finish(process) == 0, Path("errors").read_text()
    assert len(Path("a/metrics.csv").read_text().splitlines()) == 4
    assert not list(Path("a").rglob("*.lock"))


@pytest.mark.parametrize("again", ["a", "absolute", "link", "b/../a"])
@pytest.mark.fault(row="D", given="fit twice at once in one folder; the second names it alike, absolutely, by a link, or by a detour",
                   right="the second is refused; the first ends as if alone")
def test_of_two_runs_from_python_the_second_is_refused(again, same):
    Path("b").mkdir()
    Path("link").symlink_to("a")
    out = Path("a").absolute() if again == "absolute" else again
    trained_alone(train("a", At("before_step", refused(partial(train, out, resume=out), "in use by process"), 7)), same)


@pytest.mark.parametrize("out", ["b", "a/checkpoints/b"])
@pytest.mark.fault(row="D", given="two runs with folders of their own, and one folder for the checkpoints of both",
                   right="the second is refused, and leaves nothing behind")
def test_two_runs_do_not_write_checkpoints_to_one_folder(out, same):
    other = partial(train, out, dir=Path("a/checkpoints").absolute())
    trained_alone(train("a", At("before_step", refused(other, "in use|exists and is not overwritten"), 7)), same)
    assert not Path(out).exists()


@pytest.mark.fault(row="D", given="fit in the folder of a loopctl run that trains", right="refused; the run ends with its files")
def test_a_run_from_python_does_not_resume_a_run_of_the_command_line(loopctl, start):
    process = start(*LINEAR, "--epochs", 3, "--plugin", "own.py:Wait:moment=epoch 2")
    wait_for("waiting", process)
    refused(partial(train, "a"), "exists and is not overwritten")()
    refused(partial(train, "a", dir="checkpoints"), "exists and is not overwritten")()
    assert loopctl(*LINEAR)[0] == 2
    with pytest.raises(UsageError, match="in use by process"), FolderLock(Path("a")):
        pass
    assert finish(process) == 0, Path("errors").read_text()
    assert len(Path("a/metrics.csv").read_text().splitlines()) == 4
    assert not list(Path("a").rglob("*.lock"))


@pytest.mark.fault(row="D", given="loopctl run in the folder of a fit that trains", right="refused; fit ends as if alone")
def test_a_run_of_the_command_line_does_not_use_the_folder_of_one_from_python(loopctl, same):
    def check(run):
        before = files()
        for words in (LINEAR, [*LINEAR[:-1], "a/checkpoints"], ["run", "--resume", "a"]):
            assert loopctl(*words)[0] == 2
        assert files() == before
    trained_alone(train("a", At("before_step", check, 7)), same)


@pytest.mark.fault(row="D", given="a run in a folder within that of another run, which fails to start",
                   right="it is removed, and nothing of the other")
def test_a_run_within_the_folder_of_another_removes_only_its_own(loopctl, same):
    def check(run):
        before = files()
        assert loopctl(*LINEAR[:-1], "a/b/c", "--plugin", "clip:max_norm=-1")[0] == 2
        assert files() == before
        assert not Path("a/b").exists()
    trained_alone(train("a", At("before_step", check, 7)), same)


@pytest.mark.parametrize("epochs", [2, 3])
@pytest.mark.fault(row="D", given="two resumes of one run; the second has read its checkpoint when the first trains to the end",
                   right="the second is refused, and the later results stay")
def test_a_run_that_resumes_from_what_has_become_old_is_refused(epochs, same):
    train("a", epochs=1)
    first = []
    with pytest.raises(UsageError, match="another run has written checkpoints there since this one began"):
        train("a", At("epoch_start", lambda run: first.append(train("a", resume="a"))), epochs=epochs, resume="a")
    trained_alone(first[0], same)


@pytest.mark.fault(row="D", given="fit, killed by SIGKILL; its lock file remains", right="it is resumed at once")
def test_a_run_from_python_that_was_killed_is_resumed(forks, same):
    code = ("import os, signal, torch\nfrom functools import partial\nfrom torch import nn\nfrom loopctl import fit, hookimpl\n"
            f"os.chdir({os.getcwd()!r})\nclass Kill:\n    @hookimpl\n    def before_step(self, run):\n"
            "        if run.attempts == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
            "torch.set_num_threads(1); torch.manual_seed(0); model = nn.Linear(6, 3); generator = torch.Generator().manual_seed(0)\n"
            "data = [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(5)]\n"
            "fit(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), data, epochs=3, out='a',\n"
            "    plugins=['checkpoint:every_steps=1', 'csv', Kill()])")
    process = forks.Process(target=exec, args=(code, {}))
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert Path("a/checkpoints/.checkpoints.lock").exists()
    trained_alone(train("a", resume="a"), same)


@pytest.mark.parametrize("lose", [lambda folder: (folder / ".checkpoints.lock").unlink(),
                                  lambda folder: (folder.rename("moved"), folder.mkdir())], ids=["removed", "folder replaced"])
@pytest.mark.fault(row="D", given="fit with checkpoint and report, whose lock is removed or whose folder is replaced",
                   right="it ends without writing a checkpoint, best weights or a page")
def test_a_run_from_python_that_loses_its_lock_writes_no_more(lose):
    after = []

    def take(run):
        lose(run.out / "checkpoints")
        after.append(files("a"))
    with pytest.raises(LostLock, match="another process may use the folder"):
        train("a", "report", At("before_step", take, 7))
    assert files("a") == after[0]


@pytest.mark.fault(row="D", given="a run that fails before it trains, when its folder has been replaced by that of another run",
                   right="what is in the folder stays")
def test_a_run_that_fails_removes_nothing_from_a_folder_that_it_lost(loopctl):
    Path("fails.py").write_text(
        "from pathlib import Path\nfrom loopctl import UsageError, hookimpl\nclass Fails:\n    @hookimpl\n    def train_start(self, run):\n"
        "        run.out.rename('moved')\n        run.out.mkdir()\n        (run.out / 'run.toml').write_text('of another')\n"
        "        raise UsageError('no')\n")
    assert loopctl(*LINEAR, "--plugin", "fails.py:Fails")[0] == 2
    assert Path("a/run.toml").read_text() == "of another"


@pytest.mark.fault(row="D", given="fit that a plugin refuses when the first epoch begins", right="no folder and no lock is left")
def test_a_run_from_python_that_is_refused_leaves_nothing():
    class Refuse:
        @hookimpl
        def epoch_start(self):
            assert Path("a/b/checkpoints/.checkpoints.lock").exists()
            raise UsageError("no")
    with pytest.raises(UsageError, match="no"):
        train("a/b", Refuse())
    assert not Path("a").exists()


@pytest.mark.fault(row="D", given="checkpoint:dir=. with loopctl run, which locks the same folder", right="the run trains")
def test_a_run_does_not_refuse_itself(loopctl):
    status, errors = loopctl(*LINEAR, "--epochs", 1, "--plugin", "checkpoint:dir=.")
    assert (status, errors) == (0, [])
    assert Path("a/step-00000023.pt").exists()


@pytest.mark.fault(row="D", given="the folder of a run that saves every step is deleted while it trains",
                   right="it is made and locked again, and the run ends")
def test_a_run_whose_folder_is_deleted_makes_it_and_its_locks_again(loopctl):
    Path("deletes.py").write_text(
        "import shutil\nfrom loopctl import hookimpl\nclass Deletes:\n    @hookimpl\n    def before_step(self, run):\n"
        "        if run.attempts == 30: shutil.rmtree(run.out)\n")
    words = ["--epochs", 2, "--plugin", "checkpoint:every_steps=1", "--plugin", "deletes.py:Deletes"]
    assert loopctl(*LINEAR, *words) == (0, [])
    assert {path.name for path in files("a")} >= {"weights.safetensors", "metrics.csv", "step-00000046.pt"}
    assert not list(Path("a").rglob("*.lock"))


# C. Saved, and not readable or not right again


@pytest.fixture
def killed(start):
    """Kill a run of the linear model while a plugin is at work in the hook `moment`."""
    def kill_at(moment, *words):
        process = start(*LINEAR, "--epochs", 2, "--plugin", f"own.py:Wait:moment={moment}", *words)
        wait_for("waiting", process)
        kill(process)
    return kill_at


@pytest.mark.parametrize("moment", ["train_start", "epoch 1"])
@pytest.mark.fault(row="C4", given="killed in train_start, or in epoch_start, before training; then --resume",
                   right="what was asked for is trained")
def test_a_run_that_is_killed_before_it_trains_resumes_as_what_it_was(moment, killed, loopctl, caplog):
    killed(moment)
    assert loopctl("run", "--resume", "a") == (0, [])
    assert caplog.messages == ["a has no checkpoint yet; training from the beginning"]
    assert 'model = "linear"' in Path("a/run.toml").read_text()
    loopctl(*LINEAR[:-1], "b", "--epochs", 2, "--plugin", "own.py:Wait")
    assert Path("a/weights.safetensors").read_bytes() == Path("b/weights.safetensors").read_bytes()
    assert Path("a/explain.txt").read_text() == Path("b/explain.txt").read_text()


@pytest.mark.parametrize("text", ["", "# loopctl 0.2.0\n"])
@pytest.mark.fault(row="C", given="--resume of a folder whose run.toml is empty", right="refused in one line")
def test_an_empty_configuration_is_not_resumed_as_the_default(text, loopctl):
    Path("a").mkdir()
    Path("a/run.toml").write_text(text)
    status, errors = loopctl("run", "--resume", "a")
    assert status == 2
    assert errors == ["error: --resume: a/run.toml is empty, so what to train is unknown; start a new run"]
    assert files("a") == {Path("a/run.toml"): text.encode()}


@pytest.fixture
def interrupted_and_resumed(loopctl, caplog):
    """Interrupt a run after 30 steps, resume it, and compare it with an uninterrupted one."""
    return partial(interrupt_and_resume, loopctl, caplog)


def interrupt_and_resume(loopctl, caplog, *words):
    loopctl(*LINEAR[:-1], "whole", "--epochs", 2)
    assert loopctl(*LINEAR, "--epochs", 2, *words, "--plugin", "own.py:Interrupt")[0] == 130
    assert loopctl("run", "--resume", "a") == (0, [])
    assert not caplog.messages              # nothing of a beginning
    for name in ("weights.safetensors", "metrics.csv"):
        assert Path("a", name).read_bytes() == Path("whole", name).read_bytes()


@pytest.mark.parametrize("folder", ["ck/a", "/abs", "../ck", "."])
@pytest.mark.fault(row="C5", given="checkpoint with dir=ck/a, an absolute folder, or ../ck; interrupted; --resume",
                   right="it resumes from them")
def test_a_run_resumes_from_wherever_its_checkpoints_are(folder, interrupted_and_resumed, loopctl, tmp_path):
    interrupted_and_resumed("--plugin", f"checkpoint:every_steps=10,dir={folder.replace('/abs', str(tmp_path / 'abs'))}")
    assert loopctl("run", "--resume", "a")[1][0].startswith("error: a: this run is finished")


@pytest.mark.parametrize("every", [(10, 7), (7, 10), (7, 99)])
@pytest.mark.fault(row="C", given="two checkpoint plugins, one of which has saved later than the other, or not at all",
                   right="it resumes from the later one, and both go on")
def test_a_run_with_two_checkpoint_plugins_resumes_from_the_later_one(every, interrupted_and_resumed):
    interrupted_and_resumed(*(word for folder, steps in zip(("ck/a", "../ck"), every, strict=True)
                              for word in ("--plugin", f"checkpoint:every_steps={steps},dir={folder}")))
    assert [checkpoints_in(Path(folder))[0].name for folder in ("a/ck/a", "ck")] == ["step-00000046.pt"] * 2


@pytest.mark.parametrize("folder", ["ck/a", "../ck"])
@pytest.mark.fault(row="C", given="fit with dir=ck/a or dir=../ck, interrupted; fit with resume", right="it resumes from them")
def test_a_run_from_python_resumes_from_wherever_its_checkpoints_are(folder, same):
    with pytest.raises(ZeroDivisionError):
        train("a", At("before_step", lambda run: 1 / 0, 7), dir=folder)
    steps = []
    run = train("a", At("epoch_start", lambda run: steps.append(run.attempts)), dir=folder, resume="a")
    assert steps == [7]
    same(run.model, train("whole").model)


@pytest.mark.fault(row="C", given="two plugins, killed when one has written its first best weights but no checkpoint",
                   right="resumed from those of the other")
def test_best_weights_alone_do_not_hinder_a_resume(same):
    train("a", "checkpoint:dir=two", epochs=1)
    for file in Path("a/two").glob("*.pt"):
        file.unlink()
    run = train("a", "checkpoint:dir=two", resume="a")
    same(run.model, train("whole").model)


@pytest.mark.fault(row="C", given="a resume with dir= the folder of another run's checkpoints", right="refused, nothing overwritten")
def test_checkpoints_of_another_run_are_not_taken_for_ones_own():
    train("a", epochs=1)
    train("b", epochs=2)
    refused(partial(train, "a", dir="../b/checkpoints", resume="a"), "exists and is not overwritten")()


# L. Resuming in another world


@pytest.mark.parametrize("how", ["gone", "dangling link"])
@pytest.mark.fault(row="L1", given="checkpoints/ is gone, or a link to a disk that is not mounted; metrics.csv has 2 epochs; --resume",
                   right="refused: the run has been further than what is there")
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(how, loopctl):
    loopctl(*LINEAR, "--epochs", 2)
    Path("a/weights.safetensors").unlink()
    Path("a/checkpoints").rename("moved")
    if how == "dangling link":
        Path("a/checkpoints").symlink_to("nowhere")
    before = files("a")
    status, errors = loopctl("run", "--resume", "a")
    assert (status, len(errors)) == (2, 1)
    assert ("a/metrics.csv has 2 epochs, but a/checkpoints has no checkpoint" if how == "gone" else
            "a/checkpoints is a link to nowhere, which does not exist") in errors[0]
    assert files("a") == before


@pytest.mark.fault(row="L", given="checkpoints/ is empty, as where a disk is not mounted; the log has 3 epochs", right="refused")
def test_a_run_whose_checkpoint_folder_is_empty_does_not_begin_anew():
    train("a")
    shutil.rmtree("a/checkpoints")
    Path("a/checkpoints").mkdir()
    Path("a/metrics.csv").rename("a/log.csv")
    log = partial(fit, small(), nn.CrossEntropyLoss(), sgd, batches(), epochs=9, out="a", plugins=["checkpoint", "csv:path=log.csv"])
    refused(partial(log, resume="a"), "a/log.csv has 3 epochs, but a/checkpoints has no checkpoint to resume from")()


@pytest.mark.fault(row="L", given="a new run whose checkpoint folder is a link to nowhere", right="refused before training")
def test_a_new_run_does_not_train_without_a_place_for_its_checkpoints():
    Path("a").mkdir()
    Path("a/checkpoints").symlink_to("/nowhere/at/all")
    refused(partial(train, "a"), "is a link to /nowhere/at/all, which does not exist")()


def press(times=1):
    """A function that presses Ctrl-C."""
    def pressed(run):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
    return pressed


@pytest.mark.fault(row="L4", given="Ctrl-C within an epoch", right="saved at the next safe point, as after SIGTERM; fit raises KeyboardInterrupt")
def test_ctrl_c_saves_the_run(same, caplog):
    with pytest.raises(KeyboardInterrupt):
        train("a", At("before_step", press(), 7), every=99)
    file, saved = find_checkpoint(Path("a"))
    assert saved["counters"]["step"] == 8
    assert caplog.messages == [f"checkpoint: stopped by SIGINT after 8 updates, in epoch 2; resume continues from {file}"]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    same(train("a", every=99, resume="a").model, train("whole").model)


@pytest.mark.fault(row="L", given="Ctrl-C twice", right="the run ends at once; the last checkpoint stays")
def test_a_second_ctrl_c_ends_the_run_at_once(caplog):
    with pytest.raises(KeyboardInterrupt):
        train("a", At("before_step", press(2), 7))
    assert find_checkpoint(Path("a"))[1]["counters"]["step"] == 7
    assert not caplog.messages


@pytest.mark.parametrize("hook", ["train_start", "epoch_start"])
@pytest.mark.fault(row="L", given="Ctrl-C before the first step, such as in lr_finder", right="the run ends at once and leaves nothing")
def test_ctrl_c_before_training_ends_the_run_at_once(hook, loopctl):
    Path("press.py").write_text(f"import signal\nfrom loopctl import hookimpl\nclass Press:\n    @hookimpl(tryfirst=True)\n    def {hook}(self, run):\n"
                                "        signal.raise_signal(signal.SIGINT)\n")
    assert loopctl(*LINEAR, "--plugin", "press.py:Press") == (130, ["interrupted"])
    assert not Path("a").exists()


@pytest.mark.fault(row="L", given="Ctrl-C where the program has a handler of its own", right="that handler is called; training goes on")
def test_a_handler_of_ctrl_c_is_not_replaced(same):
    pressed = []
    signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    run = train("a", At("before_step", press(2), 7))
    assert pressed == [signal.SIGINT] * 2
    trained_alone(run, same)


@pytest.mark.fault(row="L", given="KeyboardInterrupt in a fit in another thread", right="fit raises it; handlers are not touched")
def test_an_interruption_in_another_thread_ends_fit():
    ended = []

    def interrupt(run):
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
        raise KeyboardInterrupt

    def target():
        try:
            train("a", At("before_step", interrupt, 7))
        except KeyboardInterrupt:
            ended.append(find_checkpoint(Path("a"))[1]["counters"]["step"])
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert ended == [7]


@pytest.mark.fault(row="L", given="Ctrl-C at the terminal of a run of two processes", right="saved, status 130, one last line that says how to go on")
def test_ctrl_c_saves_a_run_of_several_processes():
    words = [*LINEAR, "--epochs", "500", "--devices", "0,1", "--device", "cpu", "--workers", "1"]
    process = subprocess.Popen([sys.executable, "-m", "loopctl", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        end = time.monotonic() + 300
        while not Path("a/metrics.csv").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 130, errors
    saved, *last = errors.splitlines()
    assert saved.startswith("checkpoint: stopped by SIGINT after ")
    assert last == ["interrupted; to go on:", "loopctl run --resume a"]
    assert find_checkpoint(Path("a"))[1]["counters"]["step"] > 0


@pytest.mark.parametrize("part", ["train", "val"])
@pytest.mark.fault(row="L5", given="losses that are NaN to the end, without nan_guard", right="the end says so, names nan_guard, and has status 1")
def test_a_run_that_ends_with_nan_says_so(part, loopctl):
    status, errors = loopctl(*LINEAR, "--epochs", 2, "--plugin", f"own.py:Poison:part={part}")
    assert status == 1
    assert errors[-1] == (f"error: {part}_loss is nan since epoch 2, so a/weights.safetensors is of no use; begin a new run with a "
                          "lower --lr, or --plugin nan_guard, which skips such steps")
    assert Path("a/weights.safetensors").exists()


@pytest.mark.fault(row="L", given="losses that are NaN in one epoch and finite at the end", right="an ordinary end")
def test_a_run_that_recovers_from_nan_ends_as_any(loopctl):
    status, errors = loopctl(*LINEAR, "--epochs", 3, "--plugin", "own.py:Poison:part=val")
    assert (status, errors) == (0, [])


# F. Losing a run to something beside it


SHOWN = ["run", "--model", "linear", "--epochs", "2", "--out"]


def trained(out):
    """Whether the folder has all the files of a run of two epochs."""
    return Path(out, "weights.safetensors").exists() and len(Path(out, "metrics.csv").read_text().splitlines()) == 3 \
        and Path(out, "checkpoints/step-00000046.pt").exists()


@pytest.mark.fault(row="F1", given="stdout goes to a full disk", right="training goes on, all files are written, and the end says it on stderr")
def test_a_full_disk_of_the_log_does_not_end_the_run(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "loopctl", *SHOWN, "a"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0
    assert done.stderr == ("stdout could not be written (No space left on device); what was printed is incomplete, the files of the run are not\n")
    assert trained("a")


@pytest.mark.fault(row="F", given="stdout and stderr go to a full disk", right="training goes on, all files are written, status 0")
def test_a_full_disk_of_all_output_does_not_end_the_run(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "loopctl", *SHOWN, "a"], stdout=full, stderr=full, timeout=300)
    assert done.returncode == 0
    assert trained("a")


@pytest.mark.fault(row="F", given="the terminal is closed during the run, and SIGHUP is ignored", right="training goes on, all files are written")
def test_a_closed_terminal_does_not_end_the_run(monkeypatch, capsys):
    ours, theirs = pty.openpty()
    Path("hangup.py").write_text(f"import os\nfrom loopctl import hookimpl\nclass Hangup:\n    @hookimpl\n    def epoch_end(self, run):\n"
                                 f"        if run.epoch == 1: os.close({ours})\n")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        with pytest.raises(SystemExit) as end:
            main([*SHOWN, "a", "--plugin", "hangup.py:Hangup"])
    signal.signal(signal.SIGHUP, before)
    assert end.value.code == 0
    assert capsys.readouterr().err.startswith("stdout could not be written (Input/output error)")
    assert trained("a")


@pytest.mark.fault(row="F", given="the reader of stdout has gone, as with head", right="training goes on; commands that only print end as before")
def test_a_reader_that_has_gone_does_not_end_the_run():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "loopctl", *SHOWN, "a"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=300)
    listed = subprocess.run([sys.executable, "-m", "loopctl", "plugins"], stdout=write, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write)
    assert (done.returncode, listed.returncode, listed.stderr) == (0, 1, "")
    assert done.stderr.startswith("stdout could not be written (Broken pipe)")
    assert trained("a")


def failing(number, *, folders=True, data=True):
    """os.fsync for a file system that answers with an error."""
    real = os.fsync

    def fsync(handle):
        is_folder = os.path.isdir(f"/proc/self/fd/{handle}")
        if folders if is_folder else data:
            raise OSError(number, os.strerror(number))
        real(handle)
    return fsync


def not_permitted(*arguments, **settings):
    raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
@pytest.mark.fault(row="F2", given="a file system without fsync of folders, and without chmod", right="a run with all its files, a warning for each once")
def test_a_file_system_without_sync_and_modes_is_a_warning(number, loopctl, monkeypatch, caplog):
    monkeypatch.setattr(os, "fsync", failing(number, data=False))
    monkeypatch.setattr(Path, "chmod", not_permitted)
    assert loopctl(*LINEAR, "--epochs", 2) == (0, [])
    assert [line.split(" ", 1)[1] for line in caplog.messages] == [
        f"cannot be synced to the disk ({os.strerror(number)}); a power cut may damage what is in it",
        "has files whose mode cannot be set (Operation not permitted); others cannot read them"]
    assert trained("a")


@pytest.mark.fault(row="F", given="a file system that syncs neither files nor folders", right="a warning once")
def test_a_file_system_without_any_sync_is_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(os, "fsync", failing(errno.ENOSYS))
    train("a")
    assert len(caplog.messages) == 1
    assert find_checkpoint(Path("a"))[1]["counters"]["step"] == 15


@pytest.mark.fault(row="F", given="a folder that can be written to but not read, so that it cannot be opened", right="a warning once")
def test_a_folder_that_cannot_be_opened_is_a_warning(monkeypatch, caplog):
    real = os.open

    def closed(path, flags, *arguments, **settings):
        if os.path.isdir(path) and flags == os.O_RDONLY:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *arguments, **settings)
    monkeypatch.setattr(os, "open", closed)
    for _ in range(2):
        save_weights(small(), Path("weights.safetensors").absolute())
    assert len(caplog.messages) == 1


@pytest.mark.fault(row="F", given="a disk that fails while it syncs", right="still an error: the file may not be on the disk")
def test_a_disk_that_fails_is_no_warning(monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), atomic_write(Path("file").absolute()) as aside:
        aside.touch()
    assert not Path("file").exists()
