"""Processes of one run that are not alike, that stop, or that are left behind."""
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint.finding import find_checkpoint
from loopctl.checkpoint.folder_lock import FolderLock

ROOT = Path(__file__).parents[2]
LOSS = nn.CrossEntropyLoss()
SGD = partial(torch.optim.SGD, lr=0.1)
ADVICE = "start all processes with the same options"


def network(width=8, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 3))


def batches(number, size=4):
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(size, 6, generator=random), torch.randint(0, 3, (size,), generator=random)) for _ in range(number)]


def loader(samples, **settings):
    random = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(samples, 6, generator=random), torch.randint(0, 3, (samples,), generator=random))
    return DataLoader(data, **{"batch_size": 4} | settings)


class Steps:
    """Counts the steps."""

    def __init__(self):
        self.steps = 0

    @hookimpl
    def before_step(self, run: Run):
        self.steps += 1


def refusal(change, plugins):
    """Train with the arguments that `change` returns for the rank. Return the error and the number of steps begun."""
    steps = Steps()
    arguments = {"model": network(), "loss_fn": LOSS, "optimizer": SGD, "train": batches(8), "plugins": plugins, "seed": 0}
    arguments |= change(int(os.environ["RANK"]))
    try:
        fit(**arguments | {"plugins": [*arguments["plugins"], steps]})
    except UsageError as error:
        return str(error), steps.steps
    return "", steps.steps


@pytest.fixture
def refused(ranks):
    """Assert that all processes refuse the run before its first step, and return the message, which is the same in all."""
    def check(change, number=2, plugins=("ddp",)):
        (message, steps), *others = ranks(number, refusal, change, plugins)
        assert all(other == (message, steps) for other in others)
        assert steps == 0
        return message
    return check


# Something that should be equal is not


def other_lr(rank):
    return {"optimizer": partial(torch.optim.SGD, lr=0.2 if rank else 0.1)}


@pytest.mark.fault(row="M1", given="rank 1 started with another learning rate", right="refused before training, with both values and their ranks")
def test_another_learning_rate_in_one_process_is_refused(refused):
    assert refused(other_lr) == f"ddp: process 1 has lr 0.2 and process 0 has lr 0.1; {ADVICE}"


def other_epochs(rank):
    return {"epochs": 2 + rank}


def other_batch_size(rank):
    return {"train": loader(32, batch_size=8 if rank else 4)}


@pytest.mark.fault(row="M3", given="rank 1 started with other epochs, or another batch size", right="refused before training, with both values and their ranks")
def test_other_epochs_or_another_batch_size_in_one_process_are_refused(refused):
    assert refused(other_epochs) == f"ddp: process 1 has epochs 3 and process 0 has epochs 2; {ADVICE}"
    assert refused(other_batch_size) == ("ddp: process 1 has train batches 4 and process 0 has train batches 8 (other differences: "
                                         f"train batch size); {ADVICE}")


def other_optimizer(rank):
    return {"optimizer": partial(torch.optim.AdamW, lr=0.1) if rank else SGD}


@pytest.mark.fault(row="M", given="rank 1 started with another optimizer", right="refused before training")
def test_another_optimizer_in_one_process_is_refused(refused):
    assert "process 1 has optimizer AdamW and process 0 has optimizer SGD" in refused(other_optimizer)


def other_clip(rank):
    return {"plugins": ["ddp", f"clip:max_norm={rank + 1}"]}


@pytest.mark.fault(row="M", given="rank 1 started with another option of a plugin", right="refused before training")
def test_another_option_of_a_plugin_in_one_process_is_refused(refused):
    assert "process 1 has clip:max_norm 2.0 and process 0 has clip:max_norm 1.0" in refused(other_clip)


def one_more_plugin(rank):
    return {"plugins": ["ddp", *["accumulate:every=2"] * rank]}


@pytest.mark.fault(row="M", given="rank 1 started with one plugin more", right="refused before training")
def test_one_plugin_more_in_one_process_is_refused(refused):
    assert "process 1 has plugins ddp, accumulate, steps and process 0 has plugins ddp, steps" in refused(one_more_plugin)


def other_width(rank):
    return {"model": network(8 + rank)}


@pytest.mark.fault(row="M", given="rank 1 has a wider model, with ddp and fsdp", right="refused before training, naming the module")
@pytest.mark.parametrize("plugin", ["ddp", "fsdp"])
def test_a_model_of_another_shape_in_one_process_is_refused(refused, plugin):
    message = refused(other_width, plugins=(plugin,))
    assert "process 1 has module 0 Linear(in_features=6, out_features=9, bias=True) and process 0 has module 0 Linear(" in message
    assert "parameter 0.weight" in message


def other_dropout(rank):
    return {"model": network(dropout=0.1 * rank)}


@pytest.mark.fault(row="M", given="rank 1 has another dropout probability", right="refused before training, naming the module")
def test_another_dropout_probability_in_one_process_is_refused(refused):
    assert "process 1 has module 2 Dropout(p=0.1, inplace=False) and process 0 has module 2 Dropout(p=0.0" in refused(other_dropout)


def other_loss(rank):
    return {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1 * rank)}


@pytest.mark.fault(row="M", given="rank 1 has another label smoothing", right="refused before training")
def test_another_label_smoothing_in_one_process_is_refused(refused):
    assert "process 1 has loss_fn label_smoothing 0.1 and process 0 has loss_fn label_smoothing 0.0" in refused(other_loss)


def other_seed(rank):
    return {"seed": 5 + rank}


@pytest.mark.fault(row="M", given="rank 1 started with another seed", right="refused before training")
def test_another_seed_in_one_process_is_refused(refused):
    assert "process 1 has seed 6 and process 0 has seed 5" in refused(other_seed)


def no_seed(rank):
    torch.manual_seed(5 + rank)
    return {"seed": None}


def test_processes_without_a_seed_are_not_refused(ranks):
    """Their generators may be in any state; the seed of rank 0 is the one by which data is dealt out."""
    assert ranks(2, refusal, no_seed, ["ddp"]) == [("", 4)] * 2


def frozen_in_one(rank):
    model = network()
    model[0].weight.requires_grad_(not rank)
    return {"model": model}


@pytest.mark.fault(row="M", given="a parameter is frozen in rank 1 only", right="refused before training, naming the parameter")
def test_a_parameter_frozen_in_one_process_is_refused(refused):
    assert "process 1 has parameter 0.weight (8, 6) float32 frozen and process 0 has parameter 0.weight" in refused(frozen_in_one)


def no_valid(rank):
    return {"valid": None if rank else batches(2)}


@pytest.mark.fault(row="M", given="rank 1 has no validation data", right="refused before training")
def test_no_validation_data_in_one_process_is_refused(refused):
    assert "process 1 has no valid and process 0 has valid list" in refused(no_valid)


def other_of_three(rank):
    return {"epochs": 2 if rank == 1 else 5}


@pytest.mark.fault(row="M", given="one of three processes differs", right="refused, naming the ranks of each value")
def test_the_ranks_of_each_value_are_named(refused):
    assert refused(other_of_three, number=3) == f"ddp: process 1 has epochs 2 and processes 0 and 2 have epochs 5; {ADVICE}"


def allowed(rank):
    return {"plugins": ["ddp", *["progress"] * rank], "out": f"rank {rank}", "train": loader(32, num_workers=rank)}


def test_what_only_one_process_needs_may_differ(ranks, tmp_path, monkeypatch):
    for message, steps in ranks(2, refusal, allowed, ["ddp"]):
        assert message == ""
        assert steps == 4


# Some have fewer batches


def half(rank):
    return {"train": batches(8 - 4 * rank)}


def half_of_a_sampler(rank):
    data = loader(32 - 16 * rank).dataset
    return {"train": DataLoader(data, 4, sampler=DistributedSampler(data, 2, rank))}


@pytest.mark.fault(row="M2", given="rank 1 has half of the batches, sharded by the user or by a DistributedSampler", right="refused before training, with both lengths")
@pytest.mark.parametrize(("change", "plugin", "lengths"), [(half, "ddp:shard=false", (4, 8)), (half, "fsdp:shard=false", (4, 8)),
                                                          (half_of_a_sampler, "ddp", (2, 4))])
def test_fewer_batches_in_one_process_are_refused(refused, change, plugin, lengths):
    message = refused(change, plugins=(plugin,))
    assert "process 1 has train batches {} and process 0 has train batches {}".format(*lengths) in message


def same_part(rank):
    data = loader(32).dataset
    return {"train": DataLoader(data, 4, sampler=DistributedSampler(data, 2, 0))}


def part_of_four(rank):
    data = loader(32).dataset
    return {"train": DataLoader(data, 4, sampler=DistributedSampler(data, 4, rank))}


@pytest.mark.fault(row="M", given="both ranks have the DistributedSampler of rank 0, or those of four processes", right="refused before training: some samples would be used twice, or never")
def test_samplers_for_other_parts_of_the_data_are_refused(refused):
    assert "train has a DistributedSampler for rank 0 of 2 and rank 0 of 2 in the processes of the run, by rank" in refused(same_part)
    assert "train has a DistributedSampler for rank 0 of 4 and rank 1 of 4 in the processes" in refused(part_of_four)


def one_sample_fewer(rank):
    return {"train": loader(32 - rank, shuffle=True)}


@pytest.mark.fault(row="M", given="rank 1 has one sample fewer, in equally many batches", right="refused: the shuffle would not deal out each sample once")
def test_one_sample_fewer_in_one_process_is_refused(refused):
    assert "process 1 has train samples 31 and process 0 has train samples 32" in refused(one_sample_fewer)


class Endless:
    """Batches without a length, or with a wrong one."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        return iter(batches(self.number))


class Estimated(Endless):
    def __len__(self):
        return 8


class Stream(IterableDataset):
    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter([(torch.ones(6), 1)] * self.samples)


class Drops:
    """A sampler of batches whose length is an estimate."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        return iter([[0, 1]] * self.number)

    def __len__(self):
        return 8


FEWER = {
    "no length": (lambda rank: Endless(8 - 3 * rank), "ddp:shard=false"),
    "wrong length": (lambda rank: Estimated(8 - 3 * rank), "ddp:shard=false"),
    "fsdp": (lambda rank: Estimated(8 - 3 * rank), "fsdp:shard=false"),
    "stream": (lambda rank: DataLoader(Stream(32 - 12 * rank), 4), "ddp:shard=false"),
    "accumulated": (lambda rank: Endless(8 - 4 * rank), "ddp:shard=false"),
    "own sampler": (lambda rank: DataLoader(loader(32).dataset, batch_sampler=Drops(8 - 3 * rank)), "ddp:shard=false"),
    "sharded": (lambda rank: Endless(16 - 6 * rank), "ddp"),
    "sharded stream": (lambda rank: DataLoader(Stream(64 - 24 * rank), 4), "ddp"),
}


def run_out_of_batches(case):
    data, plugin = FEWER[case]
    plugins = [plugin, *["accumulate:every=2"] * (case == "accumulated")]
    return refusal(lambda rank: {"train": data(rank), "steps_per_epoch": 4 if case == "accumulated" else 8}, plugins)


@pytest.mark.fault(row="M", given="rank 1 has fewer batches, and their number is unknown, estimated, or a wrong length", right="ended within seconds, naming rank 1")
@pytest.mark.parametrize("case", FEWER)
def test_a_process_that_runs_out_of_batches_is_named(ranks, case):
    expected = 2 if case == "accumulated" else 5
    for message, steps in ranks(2, run_out_of_batches, case):
        assert f"process 1 has no batches left after {expected} steps of a pass over train, and the others have" in message
        assert steps == expected


def fewer_in_valid(rank):
    return {"valid": batches(3 - rank), "epochs": 2}


@pytest.mark.fault(row="M", given="rank 1 has fewer validation batches, sharded by the user", right="fsdp refuses it, as its forward pass needs all processes; ddp trains")
def test_fewer_validation_batches_are_refused_only_where_the_forward_pass_needs_all_processes(refused, ranks):
    message = refused(fewer_in_valid, plugins=("fsdp:shard=false",))
    assert "process 1 has valid batches 2 and process 0 has valid batches 3" in message
    assert ranks(2, refusal, fewer_in_valid, ["ddp:shard=false"]) == [("", 16)] * 2


def equal_streams(rank):
    return {"train": DataLoader(Stream(32), 4), "steps_per_epoch": 8, "epochs": 3}


def test_streams_of_equal_length_are_read_to_their_end(ranks):
    """They end before steps_per_epoch, in each epoch."""
    assert ranks(2, refusal, equal_streams, ["ddp"]) == [("", 12)] * 2
    assert ranks(2, refusal, equal_streams, ["ddp:shard=false"]) == [("", 24)] * 2


# A process does not answer


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


class Pauses:
    """Stops one process with SIGSTOP, or only its main thread, in the third step or in `setup`, until all others have failed."""

    def __init__(self, rank, how, failed):
        self.rank, self.how, self.failed = rank, how, failed        # failed: a folder with a file for each process that has

    def pause(self, run, hook):
        if run.rank == self.rank and self.how == f"{hook} stopped":
            others_failed = f"[ $(ls {self.failed} | wc -l) -eq {run.world_size - 1} ]"
            subprocess.Popen(["sh", "-c", f"until {others_failed}; do sleep 0.05; done; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        elif run.rank == self.rank and self.how == f"{hook} sleeps":
            wait_until(lambda: len(os.listdir(self.failed)) == run.world_size - 1)

    @hookimpl
    def setup(self, run: Run):
        self.pause(run, "setup")

    @hookimpl
    def before_step(self, run: Run):
        if run.attempts == 2:
            self.pause(run, "step")


def wait_for_a_process(spec, rank, how, failed):
    try:
        fit(network(), LOSS, SGD, batches(16), plugins=[f"{spec}:timeout=5", Pauses(rank, how, failed)], seed=0)
    except Exception as error:
        (failed / os.environ["RANK"]).touch()
        return f"{type(error).__name__}: {error}"


NAMED = "TimeoutError: process {} did not answer for 5 seconds; see whether it is stopped or slow, or pass a larger timeout"


@pytest.mark.fault(row="F3", given="one rank is stopped with SIGSTOP", right="the others end after ddp:timeout or fsdp:timeout, naming the rank")
@pytest.mark.parametrize("plugin", ["ddp", "fsdp"])
def test_a_process_that_is_stopped_is_named_by_the_others(ranks, tmp_path, plugin):
    assert ranks(2, wait_for_a_process, plugin, 1, "step stopped", tmp_path)[0] == NAMED.format(1)


@pytest.mark.fault(row="F", given="one of three ranks hangs in its code, or is stopped before training; rank 0, which serves the store, is stopped", right="that rank is named by the others")
@pytest.mark.parametrize(("number", "rank", "how"), [(3, 1, "step sleeps"), (2, 1, "setup stopped"), (3, 0, "step stopped")])
def test_a_process_that_hangs_is_named_by_the_others(ranks, tmp_path, number, rank, how):
    answers = ranks(number, wait_for_a_process, "ddp", rank, how, tmp_path)
    for other in {*range(number)} - {rank}:
        assert answers[other] == NAMED.format(rank)


@pytest.mark.parametrize("timeout", ["0", "1e30"])
def test_a_timeout_that_torch_cannot_wait_for_is_refused(timeout):
    with pytest.raises(UsageError, match="ddp: timeout is from 0.001 to 1e9 seconds, not"):
        fit(network(), LOSS, SGD, batches(2), plugins=[f"ddp:timeout={timeout}"])


# Parameters that are not used


class Partly(nn.Module):
    """Uses its second layer only where `uses` says so for the number of the forward pass and the rank."""

    def __init__(self, uses):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.calls, self.uses = nn.Linear(6, 3), nn.Linear(6, 3), 0, uses

    def forward(self, input):
        self.calls += 1
        return self.first(input) + (self.second(input) if self.uses(self.calls, int(os.environ["RANK"])) else 0)


USES = {
    "never": lambda call, rank: False, "later": lambda call, rank: call < 3, "in one process": lambda call, rank: rank == 0,
    "accumulated": lambda call, rank: call % 2 == 1,
}


def leave_unused(case, spec="ddp"):
    return refusal(lambda rank: {"model": Partly(USES[case])}, [spec, *["accumulate:every=2"] * (case == "accumulated")])


MISSING = "(second.weight, second.bias got no gradient)"
WAY_OUT = "; pass ddp:find_unused_parameters=true, or freeze what is not used"


@pytest.mark.fault(row="I4", given="ddp with parameters that no step uses", right="ended in the first step, naming the parameters and find_unused_parameters=true")
def test_parameters_that_are_not_used_are_named(ranks):
    for message, steps in ranks(2, leave_unused, "never"):
        assert message == f"ddp: a step did not use all parameters {MISSING}{WAY_OUT}"
        assert steps == 1                       # without an update, whose gradients would not have been reduced
    assert ranks(2, leave_unused, "never", "ddp:find_unused_parameters=true") == [("", 4)] * 2


@pytest.mark.fault(row="I", given="parameters that are not used from the third step on, in one process only, or in the last of accumulated batches", right="named, as before")
@pytest.mark.parametrize(("case", "steps"), [("later", 3), ("in one process", 1), ("accumulated", 2)])
def test_parameters_that_are_not_used_in_some_steps_are_named(ranks, case, steps):
    answers = ranks.answers(2, leave_unused, case)
    told = [answer for answer, error in answers if not error]
    assert told
    for message, begun in told:
        assert MISSING in message
        assert message.endswith(WAY_OUT)
        assert begun == steps
    assert len(told) == (1 if case == "in one process" else 2)      # the other process loses its connection


# The launcher ends, in a working directory with modules that nobody should import


BIN = Path(sys.executable).parent
LAUNCHERS = {
    "devices": [BIN / "loopctl", "run", "--devices", "0,1"],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python", BIN / "loopctl", "run", "--plugin", "ddp"],
}
WAYS = {"killed": ("devices", "SIGKILL"), "told": ("devices", "SIGUSR1"), "torchrun": ("torchrun", "SIGUSR1")}


def running(pid):
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Start a run, send its launcher a signal; return folder, status and text of the launcher, and processes left after that."""
    known = {}

    def end(way):
        if way not in known:
            launcher, name = WAYS[way]
            folder = tmp_path_factory.mktemp(way)
            for stray in ("loopctl", "random", "secrets", "torch"):
                (folder / f"{stray}.py").write_text("open('imported', 'a')\nraise SystemExit('a stray file')\n")
            command = [*LAUNCHERS[launcher], "--model", "linear", "--epochs", "100000", "--plugin", "checkpoint:every_steps=5", "--out", "a"]
            with (folder / "text").open("w") as text:
                process = subprocess.Popen(command, cwd=folder, stdout=text, stderr=text, env=os.environ | {"OMP_NUM_THREADS": "1"})
            try:
                wait_until(lambda: process.poll() is not None or any((folder / "a").glob("checkpoints/step-*.pt")))
                processes = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                process.send_signal(getattr(signal, name))
                status = process.wait(100)
                wait_until(lambda: not any(map(running, processes)))
            finally:
                process.kill()
            left = [pid for pid in processes if running(pid)]
            for pid in left:
                os.kill(int(pid), signal.SIGKILL)
            known[way] = folder, status, (folder / "text").read_text(), len(processes), left
        return known[way]
    return end


linux = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the processes from Linux's /proc")


def check_saved(folder):
    """Assert that nobody holds the folder, and that its last checkpoint can be read."""
    with FolderLock(folder / "a"):
        assert find_checkpoint(folder / "a")[1]["counters"]["step"] > 0


@linux
@pytest.mark.fault(row="M4", given="the launcher of --devices is killed with SIGKILL", right="the processes save and end; the folder is free")
def test_the_processes_end_with_their_launcher(ended):
    folder, status, text, number, left = ended("killed")
    assert (status, number, left) == (-signal.SIGKILL, 2, [])
    assert "stopped by SIGTERM after" in text
    check_saved(folder)


@linux
@pytest.mark.fault(row="M5", given="SIGUSR1 to the launcher of --devices", right="passed on: saved and ended with status 138")
def test_a_signal_to_the_launcher_is_passed_on(ended):
    folder, status, text, number, left = ended("told")
    assert (status, number, left) == (128 + signal.SIGUSR1, 2, [])
    assert "stopped by SIGUSR1 after" in text
    assert "error" not in text
    check_saved(folder)


@linux
@pytest.mark.fault(row="M", given="SIGUSR1 to torchrun, at which it dies", right="the processes save and end")
def test_the_processes_end_with_torchrun(ended):
    folder, status, text, number, left = ended("torchrun")
    assert (status, number, left) == (-signal.SIGUSR1, 2, [])
    assert "stopped by SIGTERM after" in text
    check_saved(folder)


@linux
@pytest.mark.fault(row="E3", given="loopctl.py, random.py, secrets.py and torch.py in the working directory, --devices 0,1", right="not imported")
def test_processes_of_devices_import_nothing_from_the_working_directory(ended):
    assert not (ended("told")[0] / "imported").exists()


@linux
@pytest.mark.fault(row="E", given="the same files, torchrun --no-python loopctl, as in the docs", right="not imported")
def test_processes_of_torchrun_import_nothing_from_the_working_directory(ended):
    assert not (ended("torchrun")[0] / "imported").exists()
    for page in ("README.md", "docs/plugins.md"):
        lines = [line for line in (ROOT / page).read_text().splitlines() if "torchrun -" in line]
        assert lines
        assert all("--no-python" in line and "-m loopctl" not in line for line in lines)
