"""SIGTERM and SIGUSR1, which batch systems send: the run saves at the next safe point, exits, and resumes exactly."""
import json
import os
import random
import re
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
from torch.utils.data import DataLoader, Dataset

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint.atomic_files import ChecksumWriter
from loopctl.checkpoint.finding import find_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no such signals")
SIGNALS = [signal.SIGTERM, signal.SIGUSR1]
cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


# In this process, to which a plugin or the data set sends the signal


class Data(Dataset):
    """Samples with noise. Reading a sample calls `read`, which may send a signal."""

    def __init__(self, read=lambda: None):
        self.read = read

    def __len__(self):
        return 40

    def __getitem__(self, index):
        self.read()
        return torch.randn(6) + index % 3, index % 3


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def run(out, *plugins, read=lambda: None, epochs=3, **settings):
    """Train for three epochs of five steps, with two evaluations in each."""
    return fit(small(), cross_entropy, sgd, DataLoader(Data(read), 8, shuffle=True), DataLoader(Data(read), 20), epochs=epochs, out=out,
               eval_every=3, seed=1, **{"plugins": ["checkpoint", *plugins]} | settings)


def send(number):
    """Send this process a signal, which must have a handler."""
    assert signal.getsignal(number) is not signal.SIG_DFL
    signal.raise_signal(number)


class Send:
    """Sends a signal in the hook `moment`, the first time after so many steps."""

    def __init__(self, number, moment, steps=7, times=1):
        self.number, self.moment, self.steps, self.times = number, moment, steps, times

    def at(self, moment, run):
        if moment == self.moment and run.attempts >= self.steps and self.times:
            self.times -= 1
            send(self.number)

    @hookimpl(tryfirst=True)
    def epoch_start(self, run: Run):
        self.run = run
        self.at("epoch_start", run)

    @hookimpl
    def before_step(self, run: Run):
        self.at("before_step", run)

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run):
        self.at("compute_loss" if torch.is_grad_enabled() else "evaluate", run)
        return (yield)

    @hookimpl
    def grads_ready(self, run: Run):
        self.at("grads_ready", run)

    @hookimpl
    def after_step(self, run: Run):
        self.at("after_step", run)

    @hookimpl
    def safe_point(self, run: Run):
        self.at("safe_point", run)

    @hookimpl
    def after_evaluate(self, run: Run):
        self.at("after_evaluate", run)

    @hookimpl
    def epoch_end(self, run: Run):
        self.at("epoch_end", run)

    def read(self):
        if hasattr(self, "run"):
            self.at("read", self.run)


# The hook, or reading of data, in which the signal is sent after seven steps; and the step after which the run exits.
MOMENTS = {"read": 8, "before_step": 8, "compute_loss": 8, "grads_ready": 8, "after_step": 7, "safe_point": 8, "evaluate": 10,
           "after_evaluate": 10, "epoch_end": 10, "epoch_start": 11}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    torch.set_num_threads(1)
    return run(tmp_path_factory.mktemp("whole"), Send(0, ""))


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("number", SIGNALS)
def test_it_saves_at_the_next_safe_point_and_resumes_to_the_same_bits(number, moment, whole, tmp_path, same, caplog):
    sender = Send(number, moment)
    with pytest.raises(SystemExit) as end:
        run(tmp_path, sender, read=sender.read)
    assert end.value.code == 128 + number
    file, saved = find_checkpoint(tmp_path)
    assert saved["counters"]["step"] == MOMENTS[moment]
    (line,) = caplog.messages
    assert re.fullmatch(rf"checkpoint: stopped by {number.name} after {MOMENTS[moment]} updates, in epoch [23]; resume continues from {re.escape(str(file))}", line)
    assert signal.getsignal(number) == signal.SIG_DFL
    resumed = run(tmp_path, Send(0, ""), resume=tmp_path)
    same(resumed.model, whole.model)
    assert repr(resumed.history) == repr(whole.history)


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("moment", ["compute_loss", "evaluate", "read"])
def test_a_second_signal_ends_the_run_at_once(moment, second, tmp_path, caplog):
    """Without a checkpoint and without a message."""
    sender, second_sender = Send(signal.SIGTERM, moment), Send(second, moment)

    def read():
        sender.read()
        second_sender.read()

    with pytest.raises(SystemExit) as end:
        run(tmp_path, sender, second_sender, read=read)
    assert end.value.code == 128 + second
    assert find_checkpoint(tmp_path)[1]["counters"]["step"] == 7           # the best checkpoint, written before
    assert not caplog.messages
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2


@pytest.mark.parametrize("write", [1, 5, 10, 15, 25])
@pytest.mark.parametrize("kind", ["a second signal", "ctrl-c"])
def test_an_interruption_while_saving_leaves_no_partial_file(kind, write, tmp_path, monkeypatch, caplog, same, whole):
    """torch calls Python code to write, and raises an error of its own if that code raises one."""
    writes, real_write = [], ChecksumWriter.write

    def interrupted(self, data):
        writes.append(len(data))
        if len(writes) == write:
            if kind == "ctrl-c":
                raise KeyboardInterrupt
            send(signal.SIGUSR1)
        return real_write(self, data)

    class Patch:
        @hookimpl
        def safe_point(self, run: Run):
            if run.attempts == 8:
                monkeypatch.setattr(ChecksumWriter, "write", interrupted)

    with pytest.raises(SystemExit if kind == "a second signal" else KeyboardInterrupt) as end:
        run(tmp_path, plugins=[Patch(), Send(signal.SIGTERM, "before_step"), "checkpoint"])
    monkeypatch.undo()
    assert len(writes) >= write
    if kind == "a second signal":
        assert end.value.code == 128 + signal.SIGUSR1
    assert not caplog.messages
    assert {file.name for file in (tmp_path / "checkpoints").iterdir()} <= {
        "best.safetensors", "best.pt", "step-00000005.pt", "step-00000007.pt"}
    resumed = run(tmp_path, plugins=[Send(0, ""), "checkpoint"], resume=tmp_path)
    same(resumed.model, whole.model)


@pytest.mark.parametrize("moment", ["after_step", "evaluate", "epoch_end", "safe_point"])
def test_a_signal_at_the_end_of_the_run_changes_nothing(moment, whole, tmp_path, same, caplog):
    """The run is finished before the next safe point."""
    sender = Send(signal.SIGTERM, moment, steps=15)
    if moment == "after_step":          # the safe point of the step comes before the end of the epoch
        with pytest.raises(SystemExit):
            run(tmp_path, sender)
        caplog.clear()
        done = run(tmp_path, Send(0, ""), resume=tmp_path)
    else:
        done = run(tmp_path, sender)
    same(done.model, whole.model)
    assert repr(done.history) == repr(whole.history)
    assert not caplog.messages
    assert find_checkpoint(tmp_path)[1]["counters"]["epoch"] == 3
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_in_another_thread_installs_no_handlers(tmp_path, whole, same):
    seen, done = [], []

    class Recorder:
        @hookimpl
        def before_step(self, run: Run):
            seen.append([signal.getsignal(number) for number in SIGNALS])

    torch.manual_seed(1)
    thread = threading.Thread(target=lambda: done.append(run(tmp_path, Recorder())))
    thread.start()
    thread.join()
    same(done[0].model, whole.model)
    assert seen == [[signal.SIG_DFL] * 2] * 15
    assert find_checkpoint(tmp_path)[1]["counters"]["step"] == 15


class Raise:
    """Raises an error in the hook `moment`."""

    def __init__(self, moment):
        self.moment = moment

    @hookimpl
    def train_start(self, run: Run):
        if self.moment == "train_start":
            raise UsageError("no")

    @hookimpl
    def grads_ready(self, run: Run):
        if self.moment == "grads_ready":
            raise ArithmeticError("no")
        if self.moment == "ctrl-c":
            raise KeyboardInterrupt


@pytest.mark.parametrize("moment", ["train_start", "grads_ready", "ctrl-c", "never"])
def test_handlers_are_restored_after_the_run_and_after_an_error(moment, tmp_path):
    if moment == "never":
        run(tmp_path, Raise(moment), epochs=1)
    else:
        with pytest.raises((UsageError, ArithmeticError, KeyboardInterrupt)):
            run(tmp_path, Raise(moment), epochs=1)
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("kind", ["a function", "ignored"])
def test_an_existing_handler_is_not_replaced(kind, number, tmp_path, whole, same):
    received = []
    handler = signal.SIG_IGN if kind == "ignored" else lambda number, frame: received.append(number)
    before = signal.signal(number, handler)
    try:
        done = run(tmp_path, Send(number, "compute_loss", times=2))
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, before)
    assert received == ([] if kind == "ignored" else [number] * 2)
    same(done.model, whole.model)


def test_with_two_checkpoint_plugins_the_run_exits_once(whole, tmp_path, same, caplog):
    plugins = [f"checkpoint:dir={folder}" for folder in "ab"]
    with pytest.raises(SystemExit) as end:
        run(tmp_path, plugins=[*plugins, Send(signal.SIGTERM, "compute_loss")])
    assert end.value.code == 128 + signal.SIGTERM
    assert len(caplog.messages) == 1
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2
    assert find_checkpoint(tmp_path)[1]["counters"]["step"] == 8
    resumed = run(tmp_path, plugins=[*plugins, Send(0, "")], resume=tmp_path)
    same(resumed.model, whole.model)


def test_without_the_plugin_no_handlers_are_installed(tmp_path):
    class AssertDefault:
        @hookimpl
        def before_step(self, run: Run):
            assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2

    run(tmp_path, plugins=[AssertDefault()], epochs=1)


# In a separate process


FORK_SERVER = """
import atexit, gc, json, os, runpy, sys
import torch._dynamo, torch.utils.data._utils.worker, torchvision.models
import loopctl.cli.data, loopctl.cli.train, loopctl.plugins.checkpoint, loopctl.plugins.csv

torch.set_num_threads(1)
torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2       # seconds until a worker notices that its parent has ended; default 5
gc.freeze()
for line in sys.stdin:
    folder, *words = json.loads(line)
    child = os.fork()
    if not child:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
# The child runs the arguments as `python` would.
os.setsid()
os.chdir(folder)
for number, name in enumerate((os.devnull, "out", "err")):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
sys.argv, status = words, 0
try:
    if words[0] == "loopctl":
        loopctl.cli.main(words[1:])
    else:
        runpy.run_path(words[0], run_name="__main__")
except SystemExit as end:
    status = end.code or 0
# Exit as usual, but without the teardown of imported modules, which takes longer than the test.
atexit._run_exitfuncs()
sys.stdout.flush()
os._exit(status)
"""

# The plugin creates the file "reached" in a hook, and waits there for the file "continue", so that the test can send a
# signal at exactly that moment.
PAUSE = """
import time
from dataclasses import dataclass
from pathlib import Path
import torch
from loopctl import hookimpl

@dataclass(eq=False)
class Pause:
    moment: str = ""
    slow: float = 0.0

    def at(self, moment, run):
        if moment == self.moment and run.attempts >= 7 and not run.resume and not Path("reached").exists():
            Path("reached").touch()
            until = time.monotonic() + 200          # the test that should continue it may have been killed
            while not Path("continue").exists() and time.monotonic() < until:
                time.sleep(0.01)

    @hookimpl
    def grads_ready(self, run):
        self.at("train", run)
        time.sleep(self.slow)

    @hookimpl(wrapper=True)
    def compute_loss(self, run):
        if not torch.is_grad_enabled():
            self.at("evaluate", run)
        return (yield)
"""

# A script that trains on samples with random noise, drawn in loader workers if there are any.
SCRIPT = """
import json, sys
from functools import partial
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from loopctl import fit
from pause import Pause

class Noisy(Dataset):
    def __len__(self):
        return 40
    def __getitem__(self, index):
        return torch.randn(6) + index % 3, index % 3

moment, workers, persist, out, resume = json.loads(sys.argv[1])
loaders = [DataLoader(Noisy(), size, shuffle, num_workers=workers, persistent_workers=persist) for size, shuffle in ((4, True), (4, False))]
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))
fit(model, nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1, momentum=0.9), *loaders, epochs=2, seed=1, out=out,
    resume=resume, plugins=["checkpoint", "csv", Pause(moment)])
torch.save(model.state_dict(), f"{out}/final")
"""


@pytest.fixture(scope="module")
def fork_server():
    """A process that has imported everything, and forks a child for each command line that it reads."""
    process = subprocess.Popen([sys.executable, "-c", FORK_SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.stdin.close()
    assert process.wait(60) == 0
    process.stdout.close()


def process_status(process):
    """The state, parent, process group and session of a process."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:                     # the process has ended
        return "X", 0, 0, 0


class Child:
    """A forked process, which is the leader of its own session."""

    def __init__(self, fork_server, folder, *words):
        self.fork_server, self.folder, self.status = fork_server, folder, None
        for name in ("reached", "continue"):
            (folder / name).unlink(missing_ok=True)
        fork_server.stdin.write(json.dumps([str(folder), *map(str, words)]) + "\n")
        fork_server.stdin.flush()
        self.pid = int(fork_server.stdout.readline())
        self.limit = threading.Timer(200, os.kill, (self.pid, signal.SIGKILL))
        self.limit.start()

    def session(self):
        """The running processes of its session, including itself. They include workers whose parent has ended."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            state, _, _, session = process_status(folder.name)
            if int(session) == self.pid and state not in "ZX":
                found.append(int(folder.name))
        return found

    def wait_for(self, condition):
        """Wait until `condition()` is true; fail if the process ends before."""
        while not condition() and process_status(self.pid)[0] not in "ZX":
            time.sleep(0.01)
        assert condition(), self.errors()

    def end(self):
        """Wait for the end of the process; return its exit status. All processes that it started must end, too."""
        self.status = int(self.fork_server.stdout.readline())
        self.limit.cancel()
        for _ in range(2000):
            if not self.session():
                return self.status
            time.sleep(0.01)
        left = self.session()
        self.kill()
        raise AssertionError(f"{len(left)} processes are still running")

    def kill(self):
        for process in self.session():
            os.kill(process, signal.SIGKILL)

    def errors(self):
        return (self.folder / "err").read_text()


@pytest.fixture
def start(fork_server, tmp_path):
    """Start a child process with the given arguments."""
    write_files(tmp_path)
    children = []

    def start_child(*words):
        children.append(Child(fork_server, tmp_path, *words))
        return children[-1]

    yield start_child
    for child in children:
        if child.status is None:        # the test failed before the end of the child
            os.kill(child.pid, signal.SIGKILL)
            child.end()


def write_files(folder):
    """Write the plugin and the script."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    (folder / "pause.py").write_text(PAUSE)
    (folder / "script.py").write_text(f"import sys\nsys.path.insert(0, {str(folder)!r})\n{SCRIPT}")


def command(out, workers=0, moment="none", more=""):
    return ["loopctl", "run", "--model", "linear", "--epochs", 2, "--workers", workers, "--without", "progress", "--plugin",
            f"pause.py:Pause:moment={moment}{more}", "--plugin", "checkpoint:every_steps=3", "--out", out]


def script(out, workers, persist, moment="none", resume=None):
    return ["script.py", json.dumps([moment, workers, persist, out, resume])]


@pytest.fixture(scope="module")
def uninterrupted(fork_server, tmp_path_factory):
    """The folder of an uninterrupted run with the given arguments."""
    known = {}

    def find(*words):
        if words not in known:
            folder = tmp_path_factory.mktemp("uninterrupted")
            write_files(folder)
            assert Child(fork_server, folder, *words).end() == 0
            known[words] = folder / "whole"
        return known[words]
    return find


def assert_same_files(folder, whole, *names):
    for name in names:
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def assert_stopped_by(number, child, out, last=""):
    """Assert that the child saved and exited, with one line on stderr; `last`: what follows it."""
    assert child.end() == 128 + number
    assert re.fullmatch(rf"checkpoint: stopped by {number.name} after \d+ updates, in epoch [12]; resume continues from "
                        rf"{out}/checkpoints/step-\d+\.pt\n{last}", child.errors())
    assert not list(child.folder.rglob("*.new"))


@pytest.mark.parametrize(("number", "workers", "moment", "group"), [
    (signal.SIGTERM, 0, "train", False), (signal.SIGUSR1, 2, "train", False), (signal.SIGTERM, 2, "train", True),
    (signal.SIGTERM, 2, "evaluate", True),
])
def test_loopctl_run_saves_exits_and_resumes(number, workers, moment, group, start, uninterrupted, tmp_path):
    """The signal is sent to the process, or to its process group, as batch systems do."""
    child = start(*command("part", workers, moment))
    child.wait_for((tmp_path / "reached").exists)
    assert len(child.session()) >= 1 + workers
    (os.killpg if group else os.kill)(child.pid, number)
    time.sleep(0.3 if group else 0)                 # time for a worker to end if it does not ignore the signal
    (tmp_path / "continue").touch()
    assert_stopped_by(number, child, "part", "interrupted; to go on:\nloopctl run --resume part\n")
    assert not (tmp_path / "part" / "weights.safetensors").exists()
    resumed = start("loopctl", "run", "--resume", "part")
    assert resumed.end() == 0
    assert resumed.errors() == ""
    assert_same_files(tmp_path / "part", uninterrupted(*command("whole")), "weights.safetensors", "metrics.csv")


@pytest.mark.parametrize(("number", "workers", "persist", "moment"), [
    (signal.SIGTERM, 0, False, "train"), (signal.SIGTERM, 2, False, "evaluate"), (signal.SIGUSR1, 2, True, "train"),
    (signal.SIGTERM, 2, True, "evaluate"),
])
def test_fit_in_a_script_saves_exits_and_resumes(number, workers, persist, moment, start, uninterrupted, tmp_path):
    """The signal is sent to the process group."""
    child = start(*script("part", workers, persist, moment))
    child.wait_for((tmp_path / "reached").exists)
    assert len(child.session()) >= 1 + workers
    os.killpg(child.pid, number)
    time.sleep(0.3)
    (tmp_path / "continue").touch()
    assert_stopped_by(number, child, "part")
    assert start(*script("part", workers, persist, resume="part")).end() == 0
    assert_same_files(tmp_path / "part", uninterrupted(*script("whole", workers, persist)), "metrics.csv", "final")


@pytest.mark.parametrize(("workers", "moment"), [(0, "train"), (2, "train"), (2, "evaluate")])
def test_a_second_signal_to_all_processes_ends_them_at_once(workers, moment, start, tmp_path):
    """While the run is paused in a hook."""
    child = start(*command("part", workers, moment))
    child.wait_for((tmp_path / "reached").exists)
    locks = {tmp_path / "part" / ".lock", tmp_path / "part" / "checkpoints" / ".checkpoints.lock"}      # which the run holds until it ends
    assert all(lock.exists() for lock in locks)
    before = set(tmp_path.rglob("*"))
    os.killpg(child.pid, signal.SIGTERM)
    os.killpg(child.pid, signal.SIGUSR1)            # another signal, because two pending signals of a kind count as one
    assert child.end() in (128 + signal.SIGTERM, 128 + signal.SIGUSR1)
    assert child.errors() == "interrupted; to go on:\nloopctl run --resume part\n"
    assert set(tmp_path.rglob("*")) == before - locks


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_killed_repeatedly_ends_with_the_same_bits(workers, start, uninterrupted, tmp_path):
    """With SIGKILL, each time at a random moment after a new checkpoint. Its workers notice and end."""
    generator, killed, words = random.Random(workers), 0, command("part", workers, more=",slow=0.02")

    def saved():
        return {file.name for file in tmp_path.glob("part/checkpoints/step-*.pt")}

    while killed < 3:
        before, child = saved(), start(*words)
        child.wait_for(lambda before=before: saved() - before)
        time.sleep(generator.random() * 0.1)
        os.kill(child.pid, signal.SIGKILL)
        assert child.end() == -signal.SIGKILL
        killed, words = killed + 1, ["loopctl", "run", "--resume", "part"]
    child = start(*words)
    assert child.end() == 0, child.errors()
    assert not list(tmp_path.rglob("*.new"))
    assert_same_files(tmp_path / "part", uninterrupted(*command("whole")), "weights.safetensors", "metrics.csv")


# Signals in loader workers


class SignalState(Dataset):
    """Samples with the number of blocked signals in the process that reads them, and of signals with a handler."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        own = [number for number in SIGNALS if signal.getsignal(number) not in (signal.SIG_DFL, None)]
        return torch.tensor([len(signal.pthread_sigmask(signal.SIG_BLOCK, [])), len(own)]), index


@pytest.mark.parametrize(("plugins", "expected"), [([], [0, 0]), (["checkpoint"], [0, 2])], ids=["without checkpoint", "with checkpoint"])
def test_loader_workers_ignore_signals_only_with_the_plugin(plugins, expected, tmp_path):
    """Without it, signals must still end a worker that hangs."""
    class Recorder:
        @hookimpl
        def compute_loss(self, run: Run, batch):
            seen.append(batch[0].tolist())
            run.outputs = batch[0]
            return run.model.weight.sum()

    seen, loader = [], DataLoader(SignalState(), 4, num_workers=1)
    fit(nn.Linear(1, 1), None, sgd, loader, loader, out=tmp_path, plugins=[Recorder(), *plugins])
    assert seen == [[expected] * 4] * 3             # of train, of the rehearsal of valid, of valid
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
