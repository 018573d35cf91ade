"""What differs between runs, in the terminal and on a page."""
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner

from loopctl.cli import main

CONFIG = {"a": "epochs = 3\nlr = 0.1\nmodel = 'cnn'\nplugin = ['clip:max_norm=1.0', 'csv:path=metrics.csv']\n",
          "b": "epochs = 3\nlr = 0.2\nmodel = 'cnn'\nplugin = ['csv:path=metrics.csv']\n"}
LOG = {"a": "epoch,step,train_loss,val_loss,val_accuracy,lr\n1,10,2.0,1.6,0.5,0.1\n2,20,1.0,1.25,0.75,0.1\n3,30,0.5,1.8,0.5,0.1\n",
       "b": "epoch,step,train_loss,val_loss,val_accuracy,heat,lr\n1,10,2.0,2.0,0.5,4,0.2\n2,20,1.0,1.6,0.875,5,0.2\n"}


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    """Two runs in a and b, of which b is not at its end."""
    monkeypatch.chdir(tmp_path)
    for name in CONFIG:
        made(name, CONFIG[name], LOG[name])
    (tmp_path / "a" / "weights.safetensors").touch()
    return tmp_path


def made(name, config=None, log=None):
    folder = Path(name)
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in (("run.toml", config), ("metrics.csv", log)):
        if content is not None:
            (folder / file).write_text(content)


def compare(*arguments, status=0):
    result = CliRunner().invoke(main, ["compare", *arguments])
    assert (result.exit_code, "Traceback" in result.output) == (status, False), result.output
    return result.stdout if not status else result.stderr


def rows(text):
    """The rows of the tables by their first cell. Cells are at least two spaces apart."""
    found = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return {first: cells for first, *cells in found}


def lines(text):
    """Per chart of a page and per line in it, the points of its curves."""
    found = {}
    for svg in map(ElementTree.fromstring, re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL)):
        found[svg.find("title").text] = [[[tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
                                          for line in group.findall("polyline")] for group in svg.findall("g")]
    return found


def test_what_differs_and_what_came_of_it():
    found = rows(compare("a", "b"))
    assert found["Configuration"] == ["a", "b"]
    assert found["lr"] == ["0.1", "0.2"]
    assert found["plugin"] == ["clip:max_norm=1.0"]
    assert "epochs" in found
    assert "model" not in found
    assert found["end"] == ["finished", "unfinished"]
    assert found["epochs"] == ["3 of 3", "2 of 3"]
    assert found["updates"] == ["30", "20"]
    assert found["train_loss last"] == ["0.5 *", "1"]
    assert found["val_loss last"] == ["1.8", "1.6 *"]
    assert found["val_loss best"] == ["1.25 * in epoch 2", "1.6 in epoch 2"]
    assert found["val_accuracy last"] == ["0.5", "0.875 *"]
    assert found["val_accuracy best"] == ["0.75 in epoch 2", "0.875 * in epoch 2"]
    assert found["heat last"] == ["5"]
    assert found["lr last"] == ["0.1", "0.2"]
    assert "lr best" not in found
    assert "heat best" not in found


def test_what_is_alike_has_no_mark_and_no_row():
    made("c", CONFIG["a"], LOG["a"])
    found = rows(compare("a", "c"))
    assert "Configuration: no difference" in found
    assert found["val_loss best"] == ["1.25 in epoch 2"] * 2


def test_plugins_in_another_order_are_a_difference():
    made("c", CONFIG["a"].replace("['clip:max_norm=1.0', 'csv:path=metrics.csv']", "['csv:path=metrics.csv', 'clip:max_norm=1.0']"))
    text = compare("a", "c")
    assert rows(text)["plugin"] == ["clip:max_norm=1.0", "csv:path=metrics.csv"]
    assert rows(text)["csv:path=metrics.csv"] == ["clip:max_norm=1.0"]


def test_runs_of_all_kinds(runs):
    made("python", log="epoch,val_loss\n1,nan\nnan,\n3,oops\n4,7\n")         # of fit(), which writes no configuration
    made("young", "epochs = 3\nlr = 0.1\n")                                # no epoch is complete
    made("elsewhere", "plugin = ['csv:path=logs/my.csv']\nepochs = 9\n")
    (runs / "elsewhere" / "logs").mkdir()
    (runs / "elsewhere" / "logs" / "my.csv").write_text("epoch,val_loss\n1,1.125\n")
    made("headless", "epochs = 3", "")
    text = compare("python", "young", "elsewhere", "headless", "--out", "page.html")
    found = rows(text)
    assert found["Result"] == ["python", "young", "elsewhere", "headless"]
    assert found["end"] == ["unfinished"] * 3
    assert found["val_loss last"] == ["7", "1.125 *"]
    assert found["val_loss best"] == ["7 in epoch 4", "1.125 * in epoch 1"]
    assert re.search(r"^ *epochs +4 +0 of 3 +1 of 9 +0 of 3$", text, re.MULTILINE)
    assert re.search(r"^ *lr +unknown +0\.1$", text, re.MULTILINE)
    assert {*lines((runs / "page.html").read_text())} == {"val_loss per epoch"}


def test_runs_without_a_single_number():
    made("c", "epochs = 1")
    made("d", "epochs = 2")
    text = compare("c", "d", "--out", "page.html")
    assert rows(text)["end"] == ["unfinished"] * 2
    assert "<svg" not in Path("page.html").read_text()


def test_runs_of_the_same_name_are_called_by_their_paths():
    made("x/a", CONFIG["b"], LOG["b"])
    assert rows(compare("a", "x/a"))["Result"] == ["a", "x/a"]


def test_the_page_has_the_tables_and_the_curves_over_each_other():
    compare("a", "b", "--out", "page.html")
    text = Path("page.html").read_text()
    found = lines(text)
    assert [*found] == [f"{name} per epoch" for name in ("train_loss", "val_loss", "val_accuracy", "learning rate", "heat")]
    # Epochs 1 to 3 go from 72 to 400. Values 1.25 to 2.0: ticks at 1.2, 1.4 ... 2.0, from 212 at the bottom to 26 at the top.
    assert found["val_loss per epoch"] == [[[(72.0, 119.0), (236.0, 200.4), (400.0, 72.5)]], [[(72.0, 26.0), (236.0, 119.0)]]]
    assert '<li class="line0">' in text
    assert '<li class="line1">' in text
    assert "<b>1.25\u00a0* in epoch 2</b>" in text
    assert "prefers-color-scheme: dark" in text
    assert "http:" not in text
    assert "https:" not in text
    assert len(text) < 40_000


def test_text_is_never_markup():
    made("<b>", "epochs = 3\nmodel = '<script>'\n", "epoch,<i>_loss\n1,2\n2,1\n")
    shown = compare("<b>", "a", "--out", "page.html")
    assert "<script>" in shown
    assert "<i>_loss last" in shown
    text = Path("page.html").read_text()
    assert text.count("<script>") == 1
    assert "<i>" not in text
    assert "&lt;b&gt;" in text
    made("[red]", "lr = 1", "epoch,[i]_loss\n1,2\n")
    shown = compare("a", "[red]")
    assert "[red]" in shown
    assert "[i]_loss last" in shown


def test_a_page_is_replaced_and_nothing_else_is(runs):
    (runs / "page.html").write_text("precious")
    said = compare("a", "b", "--out", "page.html", status=2)
    assert said == "error: --out page.html exists, is no page of loopctl's, and is not overwritten; choose another file\n"
    assert (runs / "page.html").read_text() == "precious"
    compare("a", "b", "--out", "other.html")
    first = (runs / "other.html").read_text()
    made("b", log=LOG["b"] + "3,30,0.5,1.0,1.0,6,0.2\n")
    compare("a", "b", "--out", "other.html")
    assert (runs / "other.html").read_text() != first


@pytest.mark.parametrize(("content", "words"), [
    (b"epochs = = 1", "c/run.toml cannot be read: Invalid value"), (b"\xff\xfe", "c/run.toml cannot be read: 'utf-8' codec"),
    (b"epochs = 0x" + b"f" * 5000, "c/run.toml cannot be read: Exceeds the limit"),
    (b"plugin = " + b"[" * 3000 + b"]" * 3000, "c/run.toml cannot be read: maximum recursion"),
])
def test_a_configuration_that_cannot_be_read(runs, content, words):
    made("c")
    (runs / "c" / "run.toml").write_bytes(content)
    said = compare("a", "c", status=2)
    assert said.startswith(f"error: {words}")
    assert said.count("\n") == 1


def test_a_log_that_cannot_be_read(runs):
    made("c", "epochs = 1")
    (runs / "c" / "metrics.csv").write_bytes(b"epoch\n\xff\n")
    assert compare("a", "c", status=2).startswith("error: c/metrics.csv cannot be read: 'utf-8' codec")
    (runs / "c" / "metrics.csv").write_bytes(b"epoch\n" + b"1" * 200_000)
    assert compare("a", "c", status=2).startswith("error: c/metrics.csv cannot be read: field larger than")
    (runs / "c" / "metrics.csv").unlink()
    (runs / "c" / "metrics.csv").mkdir()
    assert "c/metrics.csv cannot be read: " in compare("a", "c", status=2)


def test_what_a_hand_wrote_into_a_configuration_is_shown_not_obeyed():
    made("c", 'plugin = 5\nepochs = [1]\nmodel = "\\u001b[31mred"\n[lr]\nx = 1\n')
    text = compare("a", "c")
    assert "\x1b" not in text
    assert "\\x1b[31mred" in text


def test_it_needs_no_torch():
    code = ("import sys; from loopctl.cli import main\n"
            "try: main(['compare', 'a', 'b', '--out', 'page.html'])\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "sys.exit('imports torch' if 'torch' in sys.modules else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "val_loss best" in done.stdout


def test_two_real_runs(runs):
    for name, rate in (("one", "0.01"), ("two", "0.1")):
        result = CliRunner().invoke(main, ["run", "--model", "linear", "--epochs", "2", "--lr", rate, "--out", name, "--plugin", "clip"])
        assert result.exit_code == 0
    found = rows(compare("one", "two", "--out", "page.html"))
    assert found["lr"] == ["0.01", "0.1"]
    assert found["end"] == ["finished", "finished"]
    assert "grad_norm last" in found
    assert [len(line[0]) for line in lines((runs / "page.html").read_text())["val_loss per epoch"]] == [2, 2]
