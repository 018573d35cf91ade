"""What a run shows."""
import os
import pty
import re
import subprocess
import sys

from torch import nn

from loopctl import fit
from loopctl.plugins.progress import shown, table

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


def test_a_pipe_gets_a_line_per_epoch_and_a_table(net, batches, valid, sgd, capsys):
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=["progress"])
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"epoch 2/3  step 16  train_loss \S+  val_loss \S+  lr 0.1000  [\d,]+ samples/s", lines[1])
    assert f"val_loss {run.history[1]['val_loss']:.4f}" in lines[1]
    heading, _, *rows = [line.split() for line in lines[3:] if line.strip()]
    assert heading == ["epoch", "step", "train_loss", "val_loss", "lr"]
    assert [row[:2] for row in rows] == [["1", "8"], ["2", "16"], ["3", "24"]]
    assert "\x1b" not in "".join(lines)


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
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1        # the cursor is hidden, and shown again
    assert errors == ""


def test_a_bar_that_is_broken_off_leaves_the_terminal_as_it_was():
    text, errors = on_a_terminal(15)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1
    assert errors.strip() == "broken off"


def test_numbers():
    assert [shown(value) for value in (3, 0.5, 0.0, 1e-4, 0.00962, 12345.678, float("nan"), "x")] == [
        "3", "0.5000", "0.0000", "0.0001", "0.00962", "1.23e+04", "nan", "x"]


def test_the_table_of_a_long_run_shows_its_ends():
    rows = [str(cell) for cell in table([{"epoch": epoch, "loss": 0.5} for epoch in range(1, 101)]).columns[0].cells]
    assert rows[:6] == ["1", "2", "3", "4", "5", "..."]
    assert rows[6:] == [str(epoch) for epoch in range(81, 101)]
