"""A CSV file of steps: what is in it after a resume, a power cut or a full disk."""
import errno
from pathlib import Path

import pytest

from loopctl import UsageError
from loopctl.checkpoint.step_file import StepFile


def made(tmp_path, *rows):
    file = StepFile(tmp_path / "steps.csv", "csv")
    file.claim(False, "path")
    file.begin(0)
    for row in rows:
        file.add([row])
    return file


def test_rows_are_in_the_file_as_soon_as_they_are_added(tmp_path):
    file = made(tmp_path, {"step": 1, "loss": 0.1})
    assert file.file.read_text() == "step,loss\n1,0.1\n"
    file.add([{"step": 2, "loss": 0.2}, {"step": 3}])
    assert file.file.read_text() == "step,loss\n1,0.1\n2,0.2\n3,\n"


def test_a_column_that_comes_later_is_empty_before(tmp_path):
    file = made(tmp_path, {"step": 1, "a": 1}, {"step": 2, "b": 2})
    assert file.file.read_text() == "step,a,b\n1,1,\n2,,2\n"


@pytest.mark.parametrize(("content", "kept"), [
    ("step,loss\n1,0.1\n2,0.2\n3,0.3\n", "step,loss\n1,0.1\n2,0.2\n"),
    ("step,loss\n1,0.1\n2,0.2\n3,0.", "step,loss\n1,0.1\n2,0.2\n"),             # a power cut
    ("step,loss\n1,0.1\n2,0.", "step,loss\n1,0.1\n"),
])
def test_a_resumed_file_has_the_rows_up_to_the_checkpoint(tmp_path, content, kept):
    (tmp_path / "steps.csv").write_text(content)
    file = StepFile(tmp_path / "steps.csv", "csv")
    file.claim(True, "path")
    file.begin(2)
    assert file.file.read_text() == kept
    file.add([{"step": 4, "loss": 0.4}])
    assert file.file.read_text() == kept + "4,0.4\n"


def test_a_resumed_file_without_such_rows_begins_anew(tmp_path):
    (tmp_path / "steps.csv").write_text("step,loss\n4,0.1\n")
    file = StepFile(tmp_path / "steps.csv", "csv")
    file.claim(True, "path")
    file.begin(2)
    file.add([{"step": 3, "other": 1}])
    assert file.file.read_text() == "step,other\n3,1\n"


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "step\nlong ago\n", "step,a\n1,2,3\n", "step,a\n1\n", b"\xff\xfe"])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    path = tmp_path / "steps.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    file = StepFile(path, "csv")
    if not content:
        return file.claim(True, "path")             # empty: nothing is lost
    with pytest.raises(UsageError, match="is not a log of steps"):
        file.claim(True, "path")


def test_rows_that_a_full_disk_refuses_are_written_later(tmp_path, monkeypatch, caplog):
    file = made(tmp_path, {"step": 1, "loss": 0.1})
    full = {"now": True}
    real = Path.open

    def opened(self, mode="r", *more, **others):
        stream = real(self, mode, *more, **others)
        if full["now"] and mode == "r+b":
            stream.seek(0, 2)
            stream.write(b"2,0")                    # a part of the row fits
            stream.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return stream

    monkeypatch.setattr(Path, "open", opened)
    file.add([{"step": 2, "loss": 0.2}])
    file.add([{"step": 3, "loss": 0.3}])
    assert caplog.messages == [f"csv: {file.file} cannot be written (No space left on device); trying again later"]
    full["now"] = False
    file.add([{"step": 4, "loss": 0.4}])
    assert file.file.read_text() == "step,loss\n1,0.1\n2,0.2\n3,0.3\n4,0.4\n"
