"""What a run shows."""
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest
from torch import nn

from loopctl import fit, hookimpl
from loopctl.plugins.progress import fitted, fitting_columns, shown

cross_entropy = nn.CrossEntropyLoss()
PROGRAM = """
import sys, time, torch
from functools import partial
from loopctl import fit, hookimpl
class Slow:
    @hookimpl
    def before_step(self, run):
        time.sleep(0.02)
        if run.step == int(sys.argv[1]):
            raise SystemExit("broken off")
batches = [(torch.randn(8, 6), torch.randint(0, 3, (8,))) for _ in range(10)]
fit(torch.nn.Linear(6, 3), torch.nn.CrossEntropyLoss(), partial(torch.optim.SGD, lr=0.1), batches, batches, epochs=3,
    plugins=["progress:unit=images,interval=0.01", Slow()])
"""


def test_a_pipe_gets_a_line_per_evaluation_with_all_values(net, batches, valid, sgd, capsys):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=3, max_steps=22, eval_every=18, plugins=["progress"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 2.25/3", "epoch 3/3"]
    assert re.fullmatch(r"epoch 2/3  step 16  train_loss \S+  val_loss \S+  lr 0.1000  [\d,]+ samples/s", lines[1])
    assert f"val_loss {run.history[1]['val_loss']:.4f}" in lines[1]
    assert "\x1b" not in "".join(lines)


def test_a_row_is_printed_when_its_epoch_ends(net, batches, sgd, capsys):
    class Look:
        seen = []

        @hookimpl
        def safe_point(self, run):
            if not run.seen_in_epoch:
                self.seen += [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()] + [run.epoch]
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["progress", Look()])
    assert Look.seen == ["epoch 1/2", 1, "epoch 2/2", 2]


# What a terminal shows. rich takes FORCE_COLOR for one


class End(Exception):
    pass


class Ending:
    """Ends the run after its second epoch, in one of the ways in which a run ends."""

    def __init__(self, how):
        self.how = how

    @hookimpl
    def epoch_start(self, run):
        if run.epoch == 2 and self.how == "stop":
            run.stop = "enough"
        elif run.epoch == 2 and self.how:
            raise self.how


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Call a function with a terminal of so many columns; return the rows of the table that it prints, as words."""
    def rows(columns, call):
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("COLUMNS", str(columns))
        call()
        lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out).replace("\r", "\n").splitlines()
        assert all(len(line) <= columns for line in lines)
        return [line.split() for line in lines if line.strip() and "━" not in line]
    return rows


@pytest.mark.parametrize("how", [None, "stop", KeyboardInterrupt(), SystemExit(143), End()], ids=repr)
def test_a_terminal_has_a_row_per_epoch_once_however_the_run_ends(how, net, batches, valid, sgd, terminal):
    def train():
        with suppress(KeyboardInterrupt, SystemExit, End):
            fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=["progress:interval=0", Ending(how)])
    heading, *rows = terminal(100, train)
    assert heading == ["epoch", "step", "train_loss", "val_loss", "lr"]
    assert [row[:2] for row in rows] == [["1", "8"], ["2", "16"], ["3", "24"]][:2 if how else 3]


def test_an_evaluation_within_an_epoch_has_a_row_which_the_end_of_the_epoch_does_not_repeat(net, batches, valid, sgd, terminal):
    def train():
        with pytest.raises(End):
            fit(net, cross_entropy, sgd, batches, valid, epochs=3, eval_every=4, plugins=["progress", Ending(End())])
    assert [row[:2] for row in terminal(100, train)[1:]] == [["0.50", "4"], ["1", "8"], ["1.50", "12"], ["2", "16"]]


def test_the_row_of_an_evaluation_just_before_an_exception_is_shown(net, batches, valid, sgd, terminal):
    class Raising:
        @hookimpl
        def before_step(self, run):
            if run.step == 4:
                raise End

    def train():
        with pytest.raises(End):
            fit(net, cross_entropy, sgd, batches, valid, eval_every=4, plugins=["progress", Raising()])
    assert [row[:2] for row in terminal(100, train)] == [["epoch", "step"], ["0.50", "4"]]


def test_a_resumed_run_shows_the_rows_before_it_on_a_terminal_and_not_in_a_pipe(net, batches, valid, sgd, terminal, tmp_path, capsys):
    def train(epochs, **settings):
        fit(net, cross_entropy, sgd, batches, valid, epochs=epochs, plugins=["progress", "checkpoint"], out=tmp_path, **settings)
    train(2)
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert [row[0] for row in terminal(100, lambda: train(3, resume=tmp_path))] == ["epoch", "1", "2", "3"]
    os.environ.pop("FORCE_COLOR")
    train(4, resume=tmp_path)
    assert [line.split("/")[0] for line in capsys.readouterr().out.splitlines()] == ["epoch 4"]


def test_a_metric_that_appears_later_gets_a_new_heading(net, batches, sgd, terminal):
    class Late:
        @hookimpl
        def after_evaluate(self, run):
            if run.epoch == 2:
                run.metrics["late"] = 7
    rows = terminal(100, lambda: fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["progress", Late()]))
    assert [row[0] for row in rows] == ["epoch", "1", "epoch", "2"]
    assert rows[3][rows[2].index("late")] == "7"


ROW = {"epoch": 1, "step": 23, "train_loss": 1.107, "train_accuracy": 0.8184, "val_loss": 1.1914, "val_accuracy": 0.8083,
       "memory_gb": 1.5, "lr": 0.001, "lr_fc.*": 0.01}


def test_a_narrow_terminal_leaves_out_the_least_important_columns():
    def left(width, monitored=()):
        columns = fitting_columns(ROW, {}, width, monitored)
        assert sum(columns.values()) + 2 * (len(columns) - 1) <= width
        return [column for column in ROW if column not in columns]
    assert left(100) == []
    assert left(99) == ["step"]
    assert left(91) == ["step", "lr_fc.*"]
    assert left(80) == ["step", "lr", "lr_fc.*"]
    assert left(60) == ["step", "train_accuracy", "lr", "lr_fc.*"]
    assert left(60, {"train_accuracy"}) == ["step", "memory_gb", "lr", "lr_fc.*"]
    assert left(30) == [column for column in ROW if column not in ("epoch", "train_loss", "val_loss")]


def test_a_column_grows_with_its_values_and_a_long_text_is_cut():
    columns = fitting_columns({"epoch": 1, "loss": 1e300, "words": "x" * 100}, {"epoch": 9}, 80, ())
    assert columns == {"epoch": 9, "loss": 9, "words": 24}
    assert fitting_columns({"n": 1234567890123}, columns, 80, ()) == {"n": 13}
    assert (fitted("12", 4), fitted("x" * 9, 4), fitted("日本語", 4)) == ("  12", "xxx…", "日 …")


def on_a_terminal(stop):
    """What the program writes to a terminal, and to stderr."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(stop)], stdout=slave, stderr=subprocess.PIPE, env=environment)
    os.close(slave)
    written = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:              # the other side has closed
            break
        if not part:
            break
        written += part
    _, errors = process.communicate()
    os.close(master)
    return written.decode(), errors.decode()


def test_a_terminal_gets_a_live_bar():
    text, errors = on_a_terminal(-1)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)
    assert re.search(r"epoch 2/3 \S* *step 1\d/30 loss \d\.\d{4} lr 0.1 [\d,]+ images/s \d+:\d\d left", plain)
    assert re.search(r"epoch +step +train_loss +val_loss +lr", plain)
    assert re.search(r" 2 +20 +\d\.\d{4} +\d\.\d{4} +0\.1000.*epoch 3/3", plain, re.DOTALL)          # before the end
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1        # the cursor is hidden, and shown again
    assert errors == ""


def test_a_bar_that_is_broken_off_leaves_the_terminal_as_it_was():
    text, errors = on_a_terminal(15)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert errors.strip() == "broken off"


def test_numbers():
    assert [shown(value) for value in (3, 0.5, 0.0, 1e-4, 0.00962, 12345.678, float("nan"), "x")] == [
        "3", "0.5000", "0.0000", "0.0001", "0.00962", "1.23e+04", "nan", "x"]
