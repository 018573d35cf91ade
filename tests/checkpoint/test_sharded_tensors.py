"""Sharded tensors in a checkpoint: written and read without pickle, in any number of processes, and nothing is trusted."""
import json
import pickle
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loopctl import Run, UsageError, fit, hookimpl
from loopctl.checkpoint.atomic_files import DamagedCheckpoint, read_checkpoint, save_checkpoint
from loopctl.checkpoint.finding import checkpoints_in, find_checkpoint
from loopctl.checkpoint.sharded_tensors import MARK, check_sharded, load_sharded, sharded_files
from loopctl.distributed.process_group import OfThisRank

LOSS, SGD = nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))       # 7 and 3 rows, which no 2 processes divide


def data(number=4):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(number)]


def trained(out, **settings):
    run = fit(network(), LOSS, SGD, data(), epochs=settings.pop("epochs", 2), seed=0, out=out, plugins=["fsdp", "checkpoint:keep=3"], **settings)
    return {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in run.model.state_dict().items()}


@pytest.fixture
def made(ranks, tmp_path):
    """A run of two processes: its folder of checkpoints."""
    ranks(2, trained, tmp_path)
    return tmp_path / "checkpoints"


class Of:
    """What `load_sharded` needs of a run in a single process."""

    model, device = nn.Linear(1, 1), torch.device("cpu")


def tensors(file):
    """The model's tensors in a checkpoint, put together."""
    return load_sharded(Of, read_checkpoint(file), file.parent)["model"]


def test_shards_are_safetensors_and_hold_each_number_once(made):
    file = checkpoints_in(made)[0]
    folder, checksums = sharded_files(read_checkpoint(file), made)
    assert [*checksums] == ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert {path.name for path in folder.iterdir()} == {*checksums}
    held = sum(tensor.numel() for name in checksums for tensor in load_file(folder / name).values())
    assert held == 2 * sum(parameter.numel() for parameter in network().parameters())           # and their momentum


def test_one_process_reads_what_two_have_written(made, ranks, tmp_path):
    whole, _ = ranks(2, trained, tmp_path / "again")
    for name, value in tensors(checkpoints_in(made)[0]).items():
        assert torch.equal(value, whole[name])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_run_resumes_in_another_number_of_processes(made, ranks, tmp_path, number):
    shutil.copytree(tmp_path, tmp_path / "copy", ignore=shutil.ignore_patterns("copy"))
    found = ranks(number, resumed, tmp_path / "copy")
    expected = tensors(checkpoints_in(made)[0])
    for weights in found:
        assert {name: value.shape for name, value in weights.items()} == {name: value.shape for name, value in expected.items()}


def resumed(out):
    return trained(out, epochs=3, resume=out)


def change(file, edit):
    """Edit the content of a checkpoint, and give it a right checksum again."""
    content = read_checkpoint(file)
    edit(content)
    save_checkpoint(content, file)


def shard_file(file, number=0):
    folder, checksums = sharded_files(read_checkpoint(file), file.parent)
    return folder / [*checksums][number]


def rewrite(file, edit, number=0):
    """Edit a shard file and its checksum in the checkpoint, as somebody would who wants it to be believed."""
    from safetensors import safe_open

    from loopctl.checkpoint.sharded_tensors import file_checksum
    path = shard_file(file, number)
    with safe_open(path, "pt") as opened:
        places = json.loads(opened.metadata()["offsets"])
    found = load_file(path)
    edit(found, places)
    save_file(found, path, metadata={"offsets": json.dumps(places)})
    change(file, lambda content: content["sharded"]["checksums"].update({path.name: file_checksum(path)}))


class Trap:
    """A pickle that would leave a trace if it was loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (Path(self.file),))


NAMES = {
    "folder elsewhere": lambda sharded: sharded.update(folder="/tmp"),
    "folder above": lambda sharded: sharded.update(folder="../checkpoints"),
    "folder of another kind": lambda sharded: sharded.update(folder="step-x-1.sharded"),
    "folder with a line break": lambda sharded: sharded.update(folder="step-00000004-1.sharded\n"),
    "no folder": lambda sharded: sharded.pop("folder"),
    "folder is a number": lambda sharded: sharded.update(folder=3),
    "file elsewhere": lambda sharded: sharded.update(checksums={"/etc/passwd": 0}),
    "file above": lambda sharded: sharded.update(checksums={"../rank-00000.safetensors": 0}),
    "file of another kind": lambda sharded: sharded.update(checksums={"rank-0.pt": 0}),
    "no files": lambda sharded: sharded.update(checksums={}),
    "files are a list": lambda sharded: sharded.update(checksums=["rank-00000.safetensors"]),
    "checksum is text": lambda sharded: sharded.update(checksums={"rank-00000.safetensors": "0"}),
}


@pytest.mark.parametrize("edit", NAMES.values(), ids=NAMES)
def test_names_that_no_checkpoint_has_are_not_followed(made, edit):
    file = checkpoints_in(made)[0]
    change(file, lambda content: edit(content["sharded"]))
    with pytest.raises(DamagedCheckpoint, match="names of sharded tensors that no checkpoint has"):
        check_sharded(read_checkpoint(file), made)


@pytest.mark.parametrize("content", [None, [], "step-00000004-1.sharded", 1])
def test_an_entry_of_another_type_is_damage(made, content):
    file = checkpoints_in(made)[0]
    change(file, lambda saved: saved.update(sharded=content))
    assert find_checkpoint(made)[0] == checkpoints_in(made)[1]


def test_a_link_out_of_the_folder_is_not_followed(made, tmp_path):
    file = checkpoints_in(made)[0]
    path = shard_file(file)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="outside of its folder"):
        check_sharded(read_checkpoint(file), made)


def test_a_pickle_in_the_folder_is_not_loaded(made, tmp_path):
    """torch.distributed.checkpoint keeps a pickle called .metadata; nothing here looks at one."""
    file, trace = checkpoints_in(made)[0], tmp_path / "trace"
    folder = shard_file(file).parent
    for name in (".metadata", "rank-00000.pt", "metadata.pkl"):
        (folder / name).write_bytes(pickle.dumps(Trap(trace)))
    find_checkpoint(made)
    tensors(file)
    shard_file(file).write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(DamagedCheckpoint):
        check_sharded(read_checkpoint(file), made)
    assert not trace.exists()


FILES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "empty": lambda path: path.write_bytes(b""),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "gone": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "another's": lambda path: shutil.copy(path.with_name("rank-00001.safetensors"), path),
}


@pytest.mark.parametrize("damage", FILES.values(), ids=FILES)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_damaged_file_of_shards_is_noticed_and_the_one_before_is_resumed(made, damage, processes, ranks, tmp_path):
    last, before, *_ = checkpoints_in(made)
    damage(shard_file(last))
    assert ranks(processes, resumes_from, tmp_path) == [before.name] * processes


def resumes_from(out):
    names = []

    class Look:
        from loopctl import hookimpl

        @hookimpl
        def epoch_start(self, run):
            names.append(run.last_checkpoint.name)
    fit(network(), LOSS, SGD, data(), epochs=3, seed=0, out=out, resume=out, plugins=["fsdp", "checkpoint:keep=3", Look()])
    return names[0]


def test_where_the_best_one_is_damaged_training_goes_on(made, ranks, tmp_path):
    (made / "best.pt").write_bytes(b"no checkpoint")
    assert len(ranks(2, resumed, tmp_path)) == 2


def offsets(places, value):
    key = next(key for key in places if len(places[key]) == 2)
    places[key] = value


CONTENTS = {
    "a shard too few": lambda found, places: found.pop(next(iter(found))),
    "a shard of another type": lambda found, places: found.update({key: value.double() for key, value in found.items()}),
    "a shard of another shape": lambda found, places: found.update({key: value.new_zeros(1, *value.shape[1:]) for key, value in found.items()}),
    "a shard of other dimensions": lambda found, places: found.update({key: value.reshape(-1) for key, value in found.items()}),
    "offsets below zero": lambda found, places: offsets(places, [-1, 0]),
    "offsets beyond": lambda found, places: offsets(places, [1000, 0]),
    "offsets that overlap": lambda found, places: offsets(places, [1, 0]),
    "offsets of text": lambda found, places: offsets(places, ["a", "b"]),
    "offsets of too few dimensions": lambda found, places: offsets(places, [0]),
    "no offsets": lambda found, places: places.clear(),
}


@pytest.mark.parametrize("edit", CONTENTS.values(), ids=CONTENTS)
def test_shards_that_do_not_make_up_their_tensors_are_damage(made, edit):
    """With right checksums, as by somebody who wants it to be believed."""
    file = checkpoints_in(made)[0]
    rewrite(file, edit)
    with pytest.raises(DamagedCheckpoint):
        tensors(file)


DESCRIPTIONS = {
    "huge": lambda leaf: leaf.update(shape=[10**12, 10**6]), "negative": lambda leaf: leaf.update(shape=[-7, 6]), "text": lambda leaf: leaf.update(shape="x"),
    "no shape": lambda leaf: leaf.pop("shape"), "another type": lambda leaf: leaf.update(dtype=torch.int8), "no type": lambda leaf: leaf.update(dtype="float32"),
    "another name": lambda leaf: leaf.update({MARK: "nothing"}), "a name that is a list": lambda leaf: leaf.update({MARK: [1]}),
}


@pytest.mark.parametrize("edit", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_descriptions_that_do_not_fit_the_shards_are_damage(made, edit):
    file = checkpoints_in(made)[0]
    change(file, lambda content: edit(content["model"]["0.weight"]))
    with pytest.raises(DamagedCheckpoint):
        tensors(file)


def test_random_damage_is_noticed_or_harmless_and_runs_nothing(made, tmp_path):
    """Bytes of the shard files, changed at random: always found by the checksum."""
    file, generator = checkpoints_in(made)[0], random.Random(0)
    saved = read_checkpoint(file)
    for number in (0, 1):
        path = shard_file(file, number)
        good = path.read_bytes()
        for _ in range(100):
            bad = bytearray(good)
            for _ in range(generator.randint(1, 8)):
                bad[generator.randrange(len(bad))] ^= generator.randint(1, 255)
            path.write_bytes(bad)
            with pytest.raises(DamagedCheckpoint, match="checksum"):
                check_sharded(saved, made)
        path.write_bytes(good)
    check_sharded(saved, made)


def cannot_write(out):
    from loopctl.checkpoint import sharded_tensors
    real, rank = sharded_tensors.save_file, torch.distributed.get_rank if torch.distributed.is_initialized() else None

    def refuse(*arguments, **named):
        if torch.distributed.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return real(*arguments, **named)
    sharded_tensors.save_file = refuse
    try:
        run = fit(network(), LOSS, SGD, data(), epochs=1, seed=0, out=out, plugins=["fsdp", "checkpoint"])
    finally:
        sharded_tensors.save_file = real
    assert rank is None
    return str(run.last_checkpoint), run.step


def test_one_process_that_cannot_write_leaves_no_checkpoint_in_any(ranks, tmp_path):
    assert ranks(2, cannot_write, tmp_path) == [("None", 2)] * 2
    assert not checkpoints_in(tmp_path / "checkpoints")


def test_a_checkpoint_of_a_single_run_has_no_sharded_entry(tmp_path):
    fit(network(), LOSS, SGD, data(), seed=0, out=tmp_path, plugins=["checkpoint"])
    assert "sharded" not in find_checkpoint(tmp_path)[1]
    with pytest.raises(UsageError, match="no checkpoint"):
        find_checkpoint(tmp_path / "nowhere")


class Counts:
    """A plugin with a tensor that differs between processes, and one that is the same in all."""

    def __init__(self):
        self.own = self.loaded = None
        self.same = torch.zeros(())

    @hookimpl
    def after_step(self, run: Run):
        self.own = torch.full((2, 3), float(run.rank * 100 + run.attempts))
        self.same = self.same + 1

    def state_dict(self):
        return {"own": None if self.own is None else OfThisRank(self.own), "same": self.same}

    def load_state_dict(self, state):
        self.loaded, self.same = state["own"], state["same"]


def count(out, resume, epochs):
    counts = Counts()
    fit(network(), LOSS, SGD, data(), epochs=epochs, seed=0, out=out, plugins=["ddp", "checkpoint", counts], resume=resume)
    return counts.loaded, counts.same


def test_a_plugins_tensor_of_each_process_is_saved_and_given_back_to_its_own(ranks, tmp_path):
    ranks(2, count, tmp_path, None, 1)
    assert [path.name for path in (tmp_path / "checkpoints").glob("*.sharded")] == ["step-00000002-1.sharded"]
    for rank, (own, same) in enumerate(ranks(2, count, tmp_path, tmp_path, 2)):
        assert torch.equal(own, torch.full((2, 3), rank * 100 + 2.0))
        assert same == 4
    assert [own for own, _ in ranks(3, count, tmp_path, tmp_path, 3)] == [None] * 3          # they are those of two processes


def test_in_a_single_process_such_a_tensor_is_like_any_other(tmp_path):
    count(tmp_path, None, 1)
    assert not [*(tmp_path / "checkpoints").glob("*.sharded")]
    assert torch.equal(count(tmp_path, tmp_path, 2)[0], torch.full((2, 3), 4.0))
