"""Damaged checkpoints: a run resumes from the last undamaged one, or stops with a one-line error; no code is executed."""
import io
import os
import pickle
import random
import re
import tarfile
import zipfile
import zlib
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save as safetensors
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loopctl import UsageError, fit
from loopctl.checkpoint.atomic_files import CHECKSUM_MARK, DamagedCheckpoint, read_checkpoint, save_checkpoint
from loopctl.checkpoint.finding import COUNTERS, find_candidates, find_checkpoint
from loopctl.plugins.checkpoint import Checkpoint

cross_entropy = nn.CrossEntropyLoss()
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
BEFORE, DAMAGED = "step-00000010.pt", "step-00000012.pt"
SEAL = len(CHECKSUM_MARK) + 8            # length in bytes of the comment at the end of a checkpoint


def small(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))


def train(model, out, keep=9, resume=None):
    """Two epochs of seven steps, shuffled; a checkpoint every two steps."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(50, 6, generator=generator), torch.randint(0, 3, (50,), generator=generator))
    return fit(model, cross_entropy, sgd, DataLoader(data, 8, shuffle=True), epochs=2, out=out, seed=1, resume=resume,
               plugins=[Checkpoint(every_steps=2, keep=keep)])


@dataclass
class Made:
    """The checkpoints from which the cases are made."""

    model: nn.Module                # at the end of an uninterrupted run
    history: str
    good: bytes                     # the checkpoint of that run after 12 of 14 steps
    before: bytes                   # its checkpoint after 10 steps
    state: dict[str, Any]           # the content of `good`
    foreign: bytes                  # the checkpoint of a run with a wider model
    marker: Path                    # a file that exists if code in a checkpoint was executed


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("made")
    model = small()
    history = repr(train(model, folder / "run").history)
    train(small(9), folder / "foreign")
    good, before, foreign = (folder / run / "checkpoints" / name for run, name in (
        ("run", DAMAGED), ("run", BEFORE), ("foreign", DAMAGED)))
    return Made(model, history, good.read_bytes(), before.read_bytes(), torch.load(good, weights_only=True),
                foreign.read_bytes(), folder / "executed")


def seal(content):
    """Return `content`, an archive or any other bytes, with a valid checksum as its comment."""
    start = content[:-2] if content[-22:-18] == b"PK\5\6" else content       # without the length of its empty comment
    digest = f"{zlib.crc32(start + bytes(2)):08x}".encode()
    return start + SEAL.to_bytes(2, "little") + CHECKSUM_MARK + digest


def sealed(content):
    """Return `content` as a checkpoint with a valid checksum."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return seal(stream.getvalue())


# Each case writes a file to `path`. Most change the bytes of an undamaged checkpoint.
CASES = {}


def case(name, make):
    """Add a case; `make` returns the bytes of the file."""
    assert name not in CASES
    CASES[name] = lambda path, made: path.write_bytes(make(made))


def edited(places, value=None):
    """Change the bytes at `places`: fractions of the file, or offsets from its start or (negative) from its end."""
    def edit(made):
        content = bytearray(made.good)
        for place in places:
            at = int(place * len(content)) if isinstance(place, float) else place
            content[at] = content[at] ^ 0x10 if value is None else value
        return bytes(content)
    return edit


for length in (0, 1, 2, 3, 4, 21, 22, 30, 64, 100, 512, 1000, 4096, 8192):
    case(f"cut to {length} bytes", lambda made, length=length: made.good[:length])
for part in range(1, 10):
    case(f"cut to {part} tenths", lambda made, part=part: made.good[:len(made.good) * part // 10])
for missing in (1, 2, 21, 64, 78, 79, 80, 81, 82, 100, 101, 103, 1000):
    case(f"{missing} bytes missing at its end", lambda made, missing=missing: made.good[:-missing])
    case(f"{missing} bytes missing at its start", lambda made, missing=missing: made.good[missing:])
for part in range(1, 6):
    case(f"a byte missing at {part} sixths", lambda made, at=part / 6: made.good[:int(at * len(made.good))]
         + made.good[int(at * len(made.good)) + 1:])
for number in range(48):
    case(f"a bit flipped at {number}/48", edited([number / 48]))
for number in range(24):
    chance = random.Random(number)
    case(f"bytes flipped, {number}", edited([chance.random() for _ in range(2 ** (number % 8 + 1))]))
for place in (0, 1, 2, 3, 10, 40):
    case(f"a bit flipped in its first header, {place}", edited([place]))
for place in (-1, -10, -8, -9, -SEAL, -SEAL - 3, -SEAL - 7, -SEAL - 11, -SEAL - 22, -SEAL - 40, -SEAL - 100, -SEAL - 500):
    case(f"a bit flipped before its end, {place}", edited([place]))
case("its checksum in capitals", lambda made: made.good[:-8] + b"ABCDEF01")
case("its checksum zero", lambda made: made.good[:-8] + b"0" * 8)
case("its checksum left out", lambda made: made.good[:-SEAL - 2] + b"\0\0")
case("the checksum of the one before", lambda made: made.good[:-8] + made.before[-8:])
for size in (1, 511, 4096):
    case(f"{size} bytes more at its end", lambda made, size=size: made.good + bytes(size))
    case(f"{size} bytes more at its start", lambda made, size=size: bytes(size) + made.good)
case("twice", lambda made: made.good * 2)
case("its end again", lambda made: made.good + made.good[-SEAL:])
for number in range(8):
    case(f"a block of zeros, {number}", edited(range(300 + 700 * number, 300 + 700 * number + 512), 0))
for part in (1, 5, 9):
    case(f"zeros from {part} tenths on", lambda made, part=part: made.good[:len(made.good) * part // 10].ljust(len(made.good), b"\0"))
case("zeros", lambda made: bytes(len(made.good)))
case("ones", lambda made: b"\xff" * len(made.good))
for number in range(3):
    case(f"random bytes, {number}", lambda made, number=number: random.Random(number).randbytes(len(made.good)))
    case(f"sealed random bytes, {number}", lambda made, number=number: seal(random.Random(number).randbytes(5000)))


def swapped(number):
    """Swap two blocks of 512 bytes."""
    def edit(made):
        blocks = [made.good[at:at + 512] for at in range(0, len(made.good), 512)]
        one, other = random.Random(number).sample([at for at, block in enumerate(blocks[:-1])], 2)
        assert blocks[one] != blocks[other]
        blocks[one], blocks[other] = blocks[other], blocks[one]
        return b"".join(blocks)
    return edit


for number in range(10):
    case(f"blocks swapped, {number}", swapped(number))
for part in (1, 3, 5, 7, 9):
    case(f"joined with the one before at {part} tenths", lambda made, part=part: made.good[:len(made.good) * part // 10]
         + made.before[len(made.good) * part // 10:])
case("joined with another run's", lambda made: made.good[:len(made.good) // 2] + made.foreign[len(made.foreign) // 2:])
case("behind another run's", lambda made: made.foreign + made.good)


# Files of other kinds


def archive(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    return stream.getvalue()


def picture():
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def torch_file(content, **settings):
    stream = io.BytesIO()
    torch.save(content, stream, **settings)
    return stream.getvalue()


FILES = {
    "a picture": lambda made: picture(),
    "a zip archive": lambda made: archive({"readme.txt": "hello"}),
    "an empty zip archive": lambda made: archive({}),
    "an archive that says it is TorchScript": lambda made: archive({"archive/constants.pkl": b"\x80\x02).", "archive/version": "3"}),
    "safetensors": lambda made: safetensors({"weight": torch.zeros(3)}),
    "text": lambda made: b"a checkpoint\n" * 99,
    "a pickle": lambda made: pickle.dumps({"loopctl": 1}),
    "a torch file": lambda made: torch_file({"loopctl": 1, "model": {}}),
    "an old torch file": lambda made: torch_file({"loopctl": 1, "model": {}}, _use_new_zipfile_serialization=False),
    "nothing": lambda made: b"\0\0",
}
for name, make in FILES.items():
    case(name, make)
    case(f"{name}, sealed", lambda made, make=make: seal(make(made)))
CASES["a folder"] = lambda path, made: path.mkdir()
CASES["a folder with something in it"] = lambda path, made: (path / "below").mkdir(parents=True)
CASES["a link to nothing"] = lambda path, made: path.symlink_to("nowhere")
CASES["a link to itself"] = lambda path, made: path.symlink_to(path.name)
CASES["a link to its folder"] = lambda path, made: path.symlink_to(".")


# Code


class Evil:
    """An object whose pickle calls a function when it is loaded; here, one that creates a file."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


CALLS = {
    "os.system": lambda marker: Evil(os.system, f"touch '{marker}'"),
    "eval": lambda marker: Evil(eval, f"open({str(marker)!r}, 'w').close()"),
    "exec": lambda marker: Evil(exec, f"open({str(marker)!r}, 'w').close()"),
    "os.mkdir": lambda marker: Evil(os.mkdir, str(marker)),
    "Path.touch": lambda marker: Evil(Path.touch, marker),
}


def within_an_archive(made, evil):
    """Return the undamaged checkpoint with another pickle in its archive."""
    with zipfile.ZipFile(io.BytesIO(made.good)) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    return archive({name: pickle.dumps(evil, 2) if name.endswith("data.pkl") else content for name, content in files.items()})


def old_tar(made, evil):
    """Return a file in the tar format of torch before 2018."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as packed:
        for name, parts in (("storages", (0, [])), ("tensors", (0,)), ("pickle", (evil,))):
            content = b"".join(pickle.dumps(part, 2) for part in parts)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
    return stream.getvalue()


CARRIERS = {
    "a pickle, protocol 0": lambda made, evil: pickle.dumps(evil, 0),
    "a pickle, protocol 4": lambda made, evil: pickle.dumps(evil, 4),
    "an old torch file": lambda made, evil: torch_file(evil, _use_new_zipfile_serialization=False),
    "an old tar": old_tar,
    "a torch file": lambda made, evil: torch_file(evil),
    "a checkpoint": lambda made, evil: torch_file({**made.state, "max_steps": evil}),
    "a plugin's state": lambda made, evil: torch_file({**made.state, "plugins": {"checkpoint": {"best": evil}}}),
    "the archive": within_an_archive,
}
for call in CALLS:
    for carrier, make in CARRIERS.items():
        case(f"{call} in {carrier}", lambda made, call=call, make=make: make(made, CALLS[call](made.marker)))
        case(f"{call} in {carrier}, sealed", lambda made, call=call, make=make: seal(make(made, CALLS[call](made.marker))))
case("eval beside the content, sealed", lambda made: seal(archive({"archive/data.pkl": pickle.dumps({}, 2), "constants.pkl":
                                                                     pickle.dumps(CALLS["eval"](made.marker), 2)})))


# Files with a valid checksum whose content is not that of a checkpoint


def without(*keys):
    """Return the undamaged checkpoint without the entry at `keys`."""
    def make(made):
        state = pickle.loads(pickle.dumps(made.state))
        inner = state
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return sealed(state)
    return make


def changed(value, *keys):
    """Return the undamaged checkpoint with `value` as the entry at `keys`."""
    def make(made):
        state = pickle.loads(pickle.dumps(made.state))
        inner = state
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        return sealed(state)
    return make


PARTS = ("config", "model", "optimizer", "plugins", "composition", "plan", "max_steps", "counters", "stop", "metrics", "history", "ranks")
for content in (None, 1, "text", [], {}, torch.zeros(3), {"loopctl": "2"}, {"loopctl": 2}, OrderedDict(weight=torch.zeros(3))):
    case(f"sealed {type(content).__name__} {content}", lambda made, content=content: sealed(content))
for version in (None, 0, 1, "2", [2]):
    case(f"version {version!r}", changed(version, "loopctl"))
case("no version", without("loopctl"))
for key in PARTS:
    case(f"without {key}", without(key))
    for wrong in {"config": ("text",), "max_steps": ("text",), "stop": (None, 2)}.get(key, (None, "text")):
        case(f"{key} {wrong}", changed(wrong, key))
for key in COUNTERS:
    case(f"without counters.{key}", without("counters", key))
    case(f"counters.{key} wrong", changed("text", "counters", key))

# Wrong entries deeper in the content stop the run. Damage by accident does not pass the checksum.
DEEP = {
    "optimizer.class": without("optimizer", "class"),
    "optimizer.state": without("optimizer", "state"),
    "optimizer.param_groups": without("optimizer", "param_groups"),
    "a parameter's optimizer state": without("optimizer", "param_groups", 0, "params"),
    "optimizer.state of a text": changed("text", "optimizer", "state"),
    "meters of nothing": changed({}, "ranks", 0, "meters"),
    "random.python": without("ranks", 0, "random", "python"),
    "random.numpy": without("ranks", 0, "random", "numpy"),
    "random.torch cut": changed(b"short", "ranks", 0, "random", "torch"),
    "random.python cut": changed((3, (1, 2), None), "ranks", 0, "random", "python"),
    "random.generators": without("ranks", 0, "random", "generators"),
    "a plugin's state": changed({"checkpoint": {}}, "plugins"),
    "a plugin's state of another type": changed({"checkpoint": 3}, "plugins"),
    "data without where it began": changed({"train": {}}, "ranks", 0, "data"),
    "a plan of three": changed([7, 7, 7], "plan"),
    "a plan of texts": changed(["7", "7"], "plan"),
    "a weight that is none": changed("text", "model", "0.weight"),
    "a weight less": without("model", "0.weight"),
    "a weight of another shape": changed(torch.zeros(6, 7), "model", "0.weight"),
    "another run's": lambda made: made.foreign,
}


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def place(folder, made, make):
    """Make a run's folder with an undamaged checkpoint and a later one made by `make`. Return the file of the latter."""
    folder = folder / "checkpoints"
    folder.mkdir(parents=True)
    (folder / BEFORE).write_bytes(made.before)
    make(folder / DAMAGED, made)
    return folder / DAMAGED


def refused(folder, **settings):
    """Return the message with which a run in `folder` is refused; check that nothing was written."""
    before = contents(folder)
    with pytest.raises(UsageError) as error:
        train(small(), folder, keep=1, **{"resume": folder} | settings)
    assert contents(folder) == before
    assert str(error.value).isprintable()
    return str(error.value)


def test_there_are_enough_cases():
    assert len(CASES) >= 300


# All cases are read below. Only one case of each kind is resumed from, because that takes ten times as long.
KINDS = {re.sub(r"[-\d./]+|^\S+ in ", "", name): name for name in CASES}


@pytest.mark.parametrize("name", KINDS.values())
def test_a_damaged_checkpoint_is_skipped_with_a_warning(name, made, tmp_path, caplog, same):
    damaged, model = place(tmp_path, made, CASES[name]), small()
    run = train(model, tmp_path, keep=1, resume=tmp_path)
    same(model, made.model)
    assert repr(run.history) == made.history
    messages = caplog.messages
    assert messages[0].startswith(f"{damaged} ")
    assert messages[0].endswith(f"; resuming from {BEFORE}")
    assert all(line.isprintable() for line in messages)
    if name.startswith("a folder"):         # which a checkpoint file cannot replace
        assert messages[1].startswith(f"checkpoint: {damaged} cannot be written (")
        assert len(messages) == 2
    else:
        assert len(messages) == 1
    assert find_checkpoint(tmp_path)[0].name == "step-00000014.pt"
    assert not made.marker.exists()


@pytest.mark.parametrize("name", CASES)
def test_finding_no_undamaged_checkpoint_raises_a_one_line_error(name, made, tmp_path, caplog):
    damaged = place(tmp_path, made, CASES[name])
    damaged.with_name(BEFORE).unlink()
    with pytest.raises(UsageError) as error:
        find_checkpoint(tmp_path)
    assert str(error.value).startswith(f"resume={tmp_path}: {damaged} ")
    assert str(error.value).endswith("; begin a new run")
    assert str(error.value).isprintable()
    assert not caplog.messages
    assert not made.marker.exists()


@pytest.mark.parametrize("name", ["zeros", "cut to 0 bytes", "a bit flipped at 24/48", "a zip archive", "a folder", "a link to nothing",
                                  "a link to itself", "eval in a checkpoint, sealed", "without model", "version 1"])
def test_a_run_without_an_undamaged_checkpoint_writes_nothing(name, made, tmp_path):
    damaged = place(tmp_path, made, CASES[name])
    damaged.with_name(BEFORE).unlink()
    assert refused(tmp_path).startswith(f"resume={tmp_path}: {damaged} ")


@pytest.mark.parametrize("name", DEEP)
def test_invalid_content_with_a_valid_checksum_is_refused_with_a_one_line_error(name, made, tmp_path):
    damaged = place(tmp_path, made, lambda path, made: path.write_bytes(DEEP[name](made)))
    assert refused(tmp_path).startswith(f"resume: {damaged} ")


@pytest.mark.parametrize(("name", "words"), [
    ("text", "is not a checkpoint, or is incomplete"), ("cut to 5 tenths", "is not a checkpoint, or is incomplete"),
    ("a bit flipped at 24/48", "is damaged: its checksum does not match"), ("a folder", "cannot be read: Is a directory"),
    ("eval in a checkpoint, sealed", "has content other than tensors and plain values, which was not loaded"),
    ("version 1", "is not a checkpoint that this version of loopctl reads"), ("without model", "has no valid 'model'"),
])
def test_the_warning_says_what_is_wrong_with_the_file(name, words, made, tmp_path, caplog):
    damaged = place(tmp_path, made, CASES[name])
    assert find_checkpoint(tmp_path)[0].name == BEFORE
    assert caplog.messages[0].startswith(f"{damaged} {words}")


def test_the_checkpoint_with_the_highest_step_number_is_the_latest(made, tmp_path):
    """The number decides, whatever its count of digits and its folder."""
    for folder, name in (("a", "step-99999999.pt"), ("b", "step-100000000.pt"), ("c", "step-00000012.pt")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(made.good)
        (tmp_path / folder / "step-9.pt").write_bytes(made.before)
    assert [str(file.relative_to(tmp_path)) for file in find_candidates(tmp_path)[:4]] == [
        "b/step-100000000.pt", "a/step-99999999.pt", "c/step-00000012.pt", "c/step-9.pt"]
    assert find_checkpoint(tmp_path)[0].name == "step-100000000.pt"


def test_each_of_several_damaged_checkpoints_has_a_warning(made, tmp_path, caplog, same):
    damaged = place(tmp_path, made, CASES["zeros"])
    (damaged.with_name("step-00000011.pt")).write_bytes(made.good[:1000])
    model = small()
    train(model, tmp_path, keep=1, resume=tmp_path)
    same(model, made.model)
    messages = caplog.messages
    assert [line.split()[0] for line in messages] == [str(damaged), str(damaged.with_name("step-00000011.pt"))]
    assert all(line.endswith(f"; resuming from {BEFORE}") for line in messages)


def test_the_error_counts_the_damaged_checkpoints(made, tmp_path):
    damaged = place(tmp_path, made, CASES["zeros"])
    for name in (BEFORE, "step-00000008.pt"):
        damaged.with_name(name).write_bytes(b"")
    message = refused(tmp_path)
    assert f"{damaged} " in message
    assert "the 2 before it cannot be used either" in message


def test_damaged_checkpoints_do_not_count_among_those_kept(made, tmp_path):
    """With keep=2, two undamaged checkpoints are kept, also if no new checkpoint replaces the damaged file."""
    damaged = place(tmp_path, made, lambda path, made: path.with_name("step-00000013.pt").write_bytes(b""))
    train(small(), tmp_path, keep=2, resume=tmp_path)
    for name in (DAMAGED, "step-00000014.pt"):
        read_checkpoint(damaged.with_name(name))


@pytest.mark.parametrize("name", ["a link to nothing", "zeros", "a folder"])
def test_resume_from_a_damaged_file_does_not_fall_back_to_an_earlier_one(name, made, tmp_path):
    damaged = place(tmp_path / "run", made, CASES[name])
    (tmp_path / "new").mkdir()
    assert str(damaged) in refused(tmp_path / "new", resume=damaged)


def test_an_unfinished_temporary_file_is_ignored_and_deleted(made, tmp_path, caplog, same):
    place(tmp_path, made, lambda path, made: path.with_name("step-00000011.pt.new").write_bytes(made.good[:2000]))
    model = small()
    train(model, tmp_path, keep=1, resume=tmp_path)
    same(model, made.model)
    assert not caplog.messages
    assert not list(tmp_path.rglob("*.new"))


@pytest.mark.parametrize("number", [11, 13, 14, 99999999, 100000000])
def test_a_checkpoint_renamed_to_another_step_resumes_to_the_same_weights(number, made, tmp_path, same):
    place(tmp_path, made, lambda path, made: path.with_name(f"step-{number:08}.pt").write_bytes(made.before))
    model = small()
    train(model, tmp_path, keep=1, resume=tmp_path)
    same(model, made.model)


@pytest.mark.parametrize("place", [-SEAL - 2, -SEAL - 1])
def test_a_changed_comment_length_does_not_change_the_content(place, made, tmp_path):
    """The length of the comment is not part of the checksum."""
    (tmp_path / DAMAGED).write_bytes(edited([place])(made))
    try:
        saved = read_checkpoint(tmp_path / DAMAGED)
    except DamagedCheckpoint:
        return
    torch.testing.assert_close(saved["model"], made.state["model"], rtol=0, atol=0)
    assert saved["counters"] == made.state["counters"]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_an_unsafe_load_executes_the_code_in_these_cases(carrier, made, tmp_path):
    """Loaded by pickle or with weights_only=False, each file creates the marker."""
    for name, call in CALLS.items():
        marker = tmp_path / name
        file = tmp_path / "evil"
        file.write_bytes(CARRIERS[carrier](made, call(marker)))
        with suppress(Exception):           # what is loaded may not be a checkpoint
            pickle.loads(file.read_bytes()) if "pickle" in carrier else torch.load(file, weights_only=False)
        assert marker.exists()


def test_torch_load_reads_a_checkpoint(made, tmp_path):
    """The checksum is the comment of the zip archive."""
    (tmp_path / "good").write_bytes(made.good)
    assert torch.load(tmp_path / "good", weights_only=True)["counters"]["step"] == 12
    (tmp_path / "sealed").write_bytes(sealed(made.state))           # the function that makes the cases above
    assert read_checkpoint(tmp_path / "sealed")["counters"] == made.state["counters"]
    with zipfile.ZipFile(tmp_path / "good") as packed:
        assert packed.testzip() is None
        assert packed.comment == made.good[-SEAL:]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc, which gives the path of an open file")
def test_save_checkpoint_syncs_the_file_before_the_replacement_and_the_folder_after(tmp_path, monkeypatch):
    """Otherwise a power cut could leave an empty file under the new name."""
    done, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(Path(f"/proc/self/fd/{handle}").resolve().name), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("replaced"), replace(old, new)))
    save_checkpoint({"a": torch.ones(2)}, tmp_path / "one.pt")
    assert done == ["one.pt.new", "replaced", tmp_path.name]
