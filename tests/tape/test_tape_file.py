"""The file of a tape: what was written is read, damage costs a record, a full disk only the tape."""
import json
import random
import zlib

import pytest
import torch
from torch import nn

from loopctl import UsageError
from loopctl.tape.reading import read_tape
from loopctl.tape.tape_file import TapeWriter, encoded, packed, records, unpacked

NAMES = ("0.weight", "0.bias")


def update(writer, number, names=NAMES):
    writer.add_update(number, [number] * 3 * len(names) + [7, 8], [["weights", "start", names, 3], ["samples", "1", 2, 1], ["loss", "", 0.5, 0]],
                      {"epoch": 0, "skipped": False})


def write(file, updates=5, attempts=0, **options):
    writer = TapeWriter(file)
    writer.begin({"torch": "2"}, attempts, **options)
    for number in range(attempts + 1, attempts + updates + 1):
        update(writer, number, NAMES if number % 2 else ("other",))
    writer.close()
    return file


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "run.tape")


def test_what_was_written_is_read(file):
    tape = read_tape(file)
    assert [*tape.updates] == [1, 2, 3, 4, 5]
    assert tape.header["torch"] == "2"
    assert (tape.damaged, tape.end) == (0, None)
    third = tape.updates[3]
    table = third.table("weights", "start")
    assert (table.names, table.checksums) == (NAMES, (3, 3))
    assert third.observed["samples", "1"] == (7, 8)
    assert third.number_of("loss") == 0.5
    assert third.points("weights") == ["start"]


def test_numbers_of_32_bits_survive():
    numbers = [0, 1, -1, 2**31 - 1, -(2**31)]
    assert unpacked(packed(numbers)).tolist() == numbers


def readable(content, file):
    file.write_bytes(content)
    return read_tape(file)


def test_a_flipped_byte_costs_one_record_at_most(file, tmp_path):
    """Also where it is the end of a line, which then are two in one."""
    content, chosen = file.read_bytes(), random.Random(0)
    ends = {0, len(content) - 1, *(place for place, byte in enumerate(content) if byte == 10), *chosen.sample(range(len(content)), 200)}
    for place in ends:
        changed = bytearray(content)
        changed[place] ^= 1 << chosen.randrange(8)
        tape = readable(bytes(changed), tmp_path / "damaged")
        lost = {*range(1, 6)} - tape.updates.keys()
        assert len(lost) <= (content[place] != 10)
        assert tape.damaged >= 1
        for each in tape:
            assert each.table("weights", "start").checksums == (each.number,) * (2 if each.number % 2 else 1)


def test_a_tape_that_was_cut_off_anywhere_is_read_to_there(file, tmp_path):
    content, seen = file.read_bytes(), 0
    first = content.index(b"\n") + 1
    for length in range(first, len(content), 7):
        tape = readable(content[:length], tmp_path / "damaged")
        assert [*tape.updates] == [*range(1, len(tape.updates) + 1)]
        assert len(tape.updates) >= seen
        seen = len(tape.updates)
        assert all(each.observed for each in tape)
    assert seen == 4
    for length in range(first - 1):
        with pytest.raises(UsageError, match="is no tape"):
            readable(content[:length], tmp_path / "damaged")


def test_the_header_may_be_damaged(file, tmp_path):
    tape = readable(file.read_bytes().replace(b'"', b"'", 1), tmp_path / "damaged")
    assert (len(tape.updates), tape.header, tape.damaged) == (5, {}, 1)


def test_bytes_at_random_raise_a_usage_error(tmp_path):
    for seed in range(20):
        with pytest.raises(UsageError, match="is no tape"):
            readable(random.Random(seed).randbytes(300), tmp_path / "damaged")


CRAFTED = [
    "[1]", "null", "3", "{}", '{"kind": 3}', '{"kind": "update"}', '{"kind": "unknown"}', "[" * 100_000, '{"kind": []}',
    '{"kind":"update","update":"2","points":[],"data":""}',
    *(json.dumps({"kind": "update", "update": 2, "points": points, "data": data}) for points, data in (
        ([[]], ""), ([["weights", "start", 9, 3]], ""), ([["weights", "start", 0, 3]], "AAAA"), ([["weights", "start", 0, 3]], "?"),
        ([["a", "b", -5, 1]], ""), ([["a", "b", "c", 1]], ""), ([[["a"], "b", 1.0, 0]], ""), (3 * [None], ""), ([["a", "b", 1, 0]], ""), ([], "AAA"))),
]


@pytest.mark.parametrize("text", CRAFTED, ids=lambda text: text[:60])
def test_a_record_that_was_made_on_purpose_is_damage(file, text):
    """Its checksum is right. It is read as JSON, and nothing in it can run."""
    before = read_tape(file)
    with file.open("a") as lines:
        lines.write(f"{text}\t{zlib.crc32(text.encode()):08x}\n")
    tape = read_tape(file)
    assert tape.damaged >= 1
    assert before.updates.keys() - {2} == tape.updates.keys() - {2}
    assert all(each.observed for each in tape)


def test_another_file_and_another_version_are_refused(tmp_path):
    for name, content, expected in (("empty", b"", "is no tape"), ("text", b"loss,1\n2,3\n", "is no tape"),
                                    ("later", encoded({"kind": "tape", "format": 99}).encode(), "is a tape of another version")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match=f"{name} {expected}"):
            read_tape(tmp_path / name)
    with pytest.raises(UsageError, match="missing cannot be read: No such file"):
        read_tape(tmp_path / "missing")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_tape(tmp_path)


def test_a_tape_goes_on_after_an_update_and_what_follows_it_is_removed(file):
    expected = [record for record in records(write(file.with_name("whole"), 8)) if record["kind"] != "tape"]
    write(file, 5, attempts=3)
    assert [record for record in records(file) if record["kind"] != "tape"] == expected
    assert [*read_tape(file).updates] == [*range(1, 9)]


def test_names_of_a_tape_that_goes_on_keep_their_numbers_where_one_was_damaged(file):
    lines = file.read_bytes().splitlines(keepends=True)
    names = [line for line in lines if b'"id":0' in line]
    assert len(names) == 2
    file.write_bytes(b"".join(line[1:] if line in names else line for line in lines))
    assert [*read_tape(file).updates] == [2, 4]
    write(file, 2, attempts=5)
    tape = read_tape(file)
    assert [*tape.updates] == [2, 4, 6, 7]
    assert tape.updates[7].table("weights", "start").names == NAMES
    assert tape.updates[4].table("weights", "start").names == ("other",)


def test_an_evaluation_that_is_made_again_after_a_resume_is_there_once(file):
    writer = TapeWriter(file)
    writer.begin({})
    update(writer, 1)
    update(writer, 2)
    for record in ({"kind": "evaluation", "update": 2}, {"kind": "changed", "update": 2, "by": ["after_step", "a"]},
                   {"kind": "changed", "update": 2, "by": ["epoch_end", "b"]}, {"kind": "changed", "update": 2, "by": ["epoch_start", "c"]},
                   {"kind": "end", "update": 2}):
        writer.add(record)
    writer.close()

    def kinds(**options):
        writer = TapeWriter(file)
        writer.begin({}, 2, **options)
        writer.close()
        return [record["kind"] if record["kind"] != "changed" else record["by"][1] for record in records(file)][5:]

    assert kinds(evaluated=2) == ["evaluation", "a", "b"]
    assert kinds(evaluated=0) == ["a"]


def test_what_is_changed_between_two_updates_belongs_to_the_later_one(file):
    writer = TapeWriter(file)
    writer.begin({})
    for number in (1, 5):
        update(writer, number)
        writer.add({"kind": "changed", "update": number, "by": ["after_step", f"one{number}"]})
        writer.add({"kind": "changed", "update": number, "by": ["epoch_end", f"two{number}"]})
    writer.close()
    tape = read_tape(file)
    assert "changed_by" not in tape.updates[1].values
    assert tape.updates[5].values["changed_by"] == [["after_step", "one1"], ["epoch_end", "two1"]]


def test_a_tape_of_torch_values_holds_no_code(file):
    """A value that JSON does not know is text."""
    writer = TapeWriter(file)
    writer.begin({"dtype": torch.float16, "loss": nn.MSELoss()})
    writer.close()
    assert read_tape(file).header["dtype"] == "torch.float16"
