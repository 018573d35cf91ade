"""`loopctl compare`: the tables in the terminal and the HTML page."""
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
    """Two runs in the folders a and b; b is unfinished."""
    monkeypatch.chdir(tmp_path)
    for name in CONFIG:
        make_run(name, CONFIG[name], LOG[name])
    (tmp_path / "a" / "weights.safetensors").touch()
    return tmp_path


def make_run(name, config=None, log=None):
    """Write a run's configuration and its csv file to the folder `name`."""
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
    """The rows of all tables, by their first cell. Cells are at least two spaces apart."""
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines() if line.strip()]
    return {first: others for first, *others in cells}


def lines(text):
    """The points of each polyline of each curve, by the title of the chart."""
    points = {}
    for svg in map(ElementTree.fromstring, re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL)):
        points[svg.find("title").text] = [[[tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
                                          for line in group.findall("polyline")] for group in svg.findall("g")]
    return points


def test_the_tables_show_different_options_and_the_results():
    table = rows(compare("a", "b"))
    assert table["Configuration"] == ["a", "b"]
    assert table["lr"] == ["0.1", "0.2"]
    assert table["plugin"] == ["clip:max_norm=1.0"]
    assert "epochs" in table
    assert "model" not in table
    assert table["end"] == ["finished", "unfinished"]
    assert table["epochs"] == ["3 of 3", "2 of 3"]
    assert table["updates"] == ["30", "20"]
    assert table["train_loss last"] == ["0.5 *", "1"]
    assert table["val_loss last"] == ["1.8", "1.6 *"]
    assert table["val_loss best"] == ["1.25 * in epoch 2", "1.6 in epoch 2"]
    assert table["val_accuracy last"] == ["0.5", "0.875 *"]
    assert table["val_accuracy best"] == ["0.75 in epoch 2", "0.875 * in epoch 2"]
    assert table["heat last"] == ["5"]
    assert table["lr last"] == ["0.1", "0.2"]
    assert "lr best" not in table
    assert "heat best" not in table


def test_equal_options_have_no_row_and_equal_results_no_mark():
    make_run("c", CONFIG["a"], LOG["a"])
    table = rows(compare("a", "c"))
    assert "Configuration: no difference" in table
    assert table["val_loss best"] == ["1.25 in epoch 2"] * 2


def test_the_same_plugins_in_another_order_are_shown():
    make_run("c", CONFIG["a"].replace("['clip:max_norm=1.0', 'csv:path=metrics.csv']", "['csv:path=metrics.csv', 'clip:max_norm=1.0']"))
    text = compare("a", "c")
    assert rows(text)["plugin"] == ["clip:max_norm=1.0", "csv:path=metrics.csv"]
    assert rows(text)["csv:path=metrics.csv"] == ["clip:max_norm=1.0"]


def test_runs_from_python_without_epochs_or_with_another_csv_file(runs):
    make_run("python", log="epoch,val_loss\n1,nan\nnan,\n3,oops\n4,7\n")         # a run by fit() has no run.toml
    make_run("young", "epochs = 3\nlr = 0.1\n")                                # no epoch was completed
    make_run("elsewhere", "plugin = ['csv:path=logs/my.csv,every_steps=50']\nepochs = 9\n")
    (runs / "elsewhere" / "logs").mkdir()
    (runs / "elsewhere" / "logs" / "my.csv").write_text("epoch,val_loss\n1,1.125\n")
    make_run("headless", "epochs = 3", "")
    text = compare("python", "young", "elsewhere", "headless", "--out", "page.html")
    table = rows(text)
    assert table["Result"] == ["python", "young", "elsewhere", "headless"]
    assert table["end"] == ["unfinished"] * 3
    assert table["val_loss last"] == ["7", "1.125 *"]
    assert table["val_loss best"] == ["7 in epoch 4", "1.125 * in epoch 1"]
    assert re.search(r"^ *epochs +4 +0 of 3 +1 of 9 +0 of 3$", text, re.MULTILINE)
    assert re.search(r"^ *lr +unknown +0\.1$", text, re.MULTILINE)
    assert {*lines((runs / "page.html").read_text())} == {"val_loss per epoch"}


def test_runs_without_any_metric_make_a_page_without_charts():
    make_run("c", "epochs = 1")
    make_run("d", "epochs = 2")
    text = compare("c", "d", "--out", "page.html")
    assert rows(text)["end"] == ["unfinished"] * 2
    assert "<svg" not in Path("page.html").read_text()


def test_runs_whose_folders_have_the_same_name_are_named_by_path():
    make_run("x/a", CONFIG["b"], LOG["b"])
    assert rows(compare("a", "x/a"))["Result"] == ["a", "x/a"]


def test_the_page_has_the_tables_and_a_chart_per_metric():
    compare("a", "b", "--out", "page.html")
    text = Path("page.html").read_text()
    charts = lines(text)
    assert [*charts] == [f"{name} per epoch" for name in ("train_loss", "val_loss", "val_accuracy", "learning rate", "heat")]
    # Epochs 1 to 3 go from 72 to 400. Values 1.25 to 2.0: ticks at 1.2, 1.4 ... 2.0, from 212 at the bottom to 26 at the top.
    assert charts["val_loss per epoch"] == [[[(72.0, 119.0), (236.0, 200.4), (400.0, 72.5)]], [[(72.0, 26.0), (236.0, 119.0)]]]
    assert '<li class="line0">' in text
    assert '<li class="line1">' in text
    assert "<b>1.25\u00a0* in epoch 2</b>" in text
    assert "prefers-color-scheme: dark" in text
    assert "http:" not in text
    assert "https:" not in text
    assert len(text) < 40_000


def test_in_a_narrow_window_every_cell_of_the_page_names_its_run():
    make_run("c", CONFIG["b"], LOG["b"])
    compare("a", "b", "c", "--out", "page.html")
    text = Path("page.html").read_text()
    tables = re.findall(r'<table class="(?:wide|results) stacked">(.*?)</table>', text, re.DOTALL)
    assert len(tables) == 2
    for row in re.findall(r"<tr><th scope=.row.>.*", "".join(tables)):
        assert re.findall(r'<td data-of="(\w+)">', row) == ["a", "b", "c"]
    assert "content: attr(data-of)" in text


def test_text_of_a_run_is_escaped_in_html_and_in_the_terminal():
    make_run("<b>", "epochs = 3\nmodel = '<script>'\n", "epoch,<i>_loss\n1,2\n2,1\n")
    shown = compare("<b>", "a", "--out", "page.html")
    assert "<script>" in shown
    assert "<i>_loss last" in shown
    text = Path("page.html").read_text()
    assert text.count("<script>") == 1
    assert "<i>" not in text
    assert "&lt;b&gt;" in text
    make_run("[red]", "lr = 1", "epoch,[i]_loss\n1,2\n")
    shown = compare("a", "[red]")
    assert "[red]" in shown
    assert "[i]_loss last" in shown


def test_only_a_page_written_by_loopctl_is_overwritten(runs):
    (runs / "page.html").write_text("precious")
    message = compare("a", "b", "--out", "page.html", status=2)
    assert message == "error: --out page.html exists and was not written by loopctl, so it is not overwritten; choose another file\n"
    assert (runs / "page.html").read_text() == "precious"
    compare("a", "b", "--out", "other.html")
    first = (runs / "other.html").read_text()
    make_run("b", log=LOG["b"] + "3,30,0.5,1.0,1.0,6,0.2\n")
    compare("a", "b", "--out", "other.html")
    assert (runs / "other.html").read_text() != first


@pytest.mark.parametrize(("content", "words"), [
    (b"epochs = = 1", "c/run.toml cannot be read: Invalid value"), (b"\xff\xfe", "c/run.toml cannot be read: 'utf-8' codec"),
    (b"epochs = 0x" + b"f" * 5000, "c/run.toml cannot be read: Exceeds the limit"),
    (b"plugin = " + b"[" * 3000 + b"]" * 3000, "c/run.toml cannot be read: maximum recursion"),
])
def test_a_configuration_that_cannot_be_read_is_an_error(runs, content, words):
    make_run("c")
    (runs / "c" / "run.toml").write_bytes(content)
    message = compare("a", "c", status=2)
    assert message.startswith(f"error: {words}")
    assert message.count("\n") == 1


def test_a_csv_file_that_cannot_be_read_is_an_error(runs):
    make_run("c", "epochs = 1")
    (runs / "c" / "metrics.csv").write_bytes(b"epoch\n\xff\n")
    assert compare("a", "c", status=2).startswith("error: c/metrics.csv cannot be read: 'utf-8' codec")
    (runs / "c" / "metrics.csv").write_bytes(b"epoch\n" + b"1" * 200_000)
    assert compare("a", "c", status=2).startswith("error: c/metrics.csv cannot be read: field larger than")
    (runs / "c" / "metrics.csv").unlink()
    (runs / "c" / "metrics.csv").mkdir()
    assert "c/metrics.csv cannot be read: " in compare("a", "c", status=2)


def test_wrong_types_and_control_characters_in_a_configuration_are_shown():
    make_run("c", 'plugin = 5\nepochs = [1]\nmodel = "\\u001b[31mred"\n[lr]\nx = 1\n')
    text = compare("a", "c")
    assert "\x1b" not in text
    assert "\\x1b[31mred" in text


def test_comparing_runs_does_not_import_torch():
    code = ("import sys; from loopctl.cli import main\n"
            "try: main(['compare', 'a', 'b', '--out', 'page.html'])\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "sys.exit('imports torch' if 'torch' in sys.modules else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "val_loss best" in done.stdout


def test_two_runs_of_the_command_line_are_compared(runs):
    for name, rate in (("one", "0.01"), ("two", "0.1")):
        result = CliRunner().invoke(main, ["run", "--model", "linear", "--epochs", "2", "--lr", rate, "--out", name, "--plugin", "clip"])
        assert result.exit_code == 0
    table = rows(compare("one", "two", "--out", "page.html"))
    assert table["lr"] == ["0.01", "0.1"]
    assert table["end"] == ["finished", "finished"]
    assert "grad_norm last" in table
    assert [len(line[0]) for line in lines((runs / "page.html").read_text())["val_loss per epoch"]] == [2, 2]


@pytest.mark.parametrize("second", ["", CONFIG["a"]], ids=["two from Python", "one from Python"])
def test_a_run_from_python_is_said_to_have_no_configuration(second):
    make_run("c", log=LOG["b"])
    make_run("d", second, log=LOG["b"])
    text = compare("c", "d", "--out", "page.html")
    none = "none, as of a run in Python"
    assert re.search(rf"^ *run\.toml +{none}{'' if second else f' +{none}'}$", text, re.MULTILINE)
    assert "no difference" not in text
    assert "No difference" not in Path("page.html").read_text()
