"""The page about a run: what is in it, where its curves are, and that the run does not notice it."""
import json
import logging
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from loopctl import Run, UsageError, explain, fit, hookimpl
from loopctl.checkpoint.state import run_config
from loopctl.cli import main
from loopctl.model import summary
from loopctl.report import charts, html

cross_entropy = nn.CrossEntropyLoss()


class Reader(HTMLParser):
    """What a browser sees: the elements still open, the text by heading, the tables as lists of rows."""

    ALONE = {"meta", "wbr"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.tables, self.attributes = [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *one) for one in attributes]
        if tag not in self.ALONE:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"{tag} closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)
        if {"th", "td"} & {*self.open}:
            self.tables[-1][-1][-1] += data


def pages(path):
    text = path.read_text(encoding="utf-8")
    read = Reader(text)
    assert not read.open
    return text, read


def drawings(text):
    """The charts of a page by their titles, as XML."""
    found = [ElementTree.fromstring(svg) for svg in re.findall(r'<svg class="chart".*?</svg>', text, re.DOTALL)]
    return {svg.find("title").text: svg for svg in found}


def drawn(svg):
    """Per line: the stretches of its curve, and its marks, each as points."""
    lines = []
    for group in svg.findall("g"):
        curves = [[tuple(map(float, pair.split(","))) for pair in line.get("points").split()] for line in group.findall("polyline")]
        marks = [tuple(map(float, re.findall(r"[-\d.]+", path.get("transform")))) for path in group.findall("path")]
        lines.append((curves, marks))
    return lines


def figure(metric, *lines):
    return charts.figure(0, metric, [charts.Line(name, points) for name, points in lines])


def chart(metric, *lines):
    return next(iter(drawings(figure(metric, *lines)).values()))


# Where a curve is


def test_points_are_where_a_calculation_by_hand_has_them():
    svg = chart("loss", ("train", [(1, 2.0), (2, 1.0), (3, 0.5)]), ("valid", [(1, 1.5), (2, 1.5), (3, 0.0)]))
    # Epochs 1 to 3 go from 64 + 8 to 408 - 8; values 0 to 2, which are ticks, from 212 at the bottom to 26 at the top.
    (train, train_marks), (valid, _) = drawn(svg)
    assert train == [[(72.0, 26.0), (236.0, 119.0), (400.0, 165.5)]]
    assert valid == [[(72.0, 72.5), (236.0, 72.5), (400.0, 212.0)]]
    assert train_marks == train[0]


def test_ticks_are_at_their_values():
    svg = chart("loss", ("", [(1, 2.0), (2, 0.0), (3, 0.5)]))
    labels = {kind: [(text.text, text.get("x" if kind == "x" else "y")) for text in svg.findall("text") if text.get("class") == kind]
              for kind in ("x", "y")}
    assert labels["y"] == [("0", "216.0"), ("0.5", "169.5"), ("1.0", "123.0"), ("1.5", "76.5"), ("2.0", "30.0")]
    assert labels["x"] == [("1", "72.0"), ("2", "236.0"), ("3", "400.0"), ("epoch", "236.0")]
    assert [text.text for text in svg.findall("text") if text.get("class") == "name"] == ["loss"]


@pytest.mark.parametrize(("values", "ticks"), [
    ((0.0, 2.0), ["0", "0.5", "1.0", "1.5", "2.0"]),
    ((0.981, 0.9823), ["0.9810", "0.9815", "0.9820", "0.9825"]),
    ((12000.0, 31000.0), ["10,000", "15,000", "20,000", "25,000", "30,000", "35,000"]),
    ((-3.0, 4.0), ["-4", "-2", "0", "2", "4"]),
    ((5.0, 5.0), ["4.4", "4.6", "4.8", "5.0", "5.2", "5.4", "5.6"]),
    ((0.0, 0.0), ["-1.0", "-0.5", "0", "0.5", "1.0"]),
    ((0.0, 3e-5), ["0", "1e-5", "2e-5", "3e-5"]),
    ((-2e7, 2e7), ["-2e7", "-1e7", "0", "1e7", "2e7"]),
    ((1e-4, 0.1), ["0.0001", "0.001", "0.01", "0.1"]),
    ((2e-9, 30.0), ["1e-9", "1e-7", "1e-5", "0.001", "0.1", "10", "1000"]),
    ((0.0, 1.0000000001), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ((5e-324, 1.0), ["1e-324", "1e-270", "1e-216", "1e-162", "1e-108", "1e-54", "1"]),
    ((-9e299, 9e299), ["-1.0e300", "-5e299", "0", "5e299", "1.0e300"]),
    ((1e16, 1e16 + 2), ["9.0e15", "9.5e15", "1.00e16", "1.05e16", "1.10e16"]),
], ids=str)
def test_ticks_are_round_and_hold_all_values(values, ticks):
    scale, marks = charts.over_values([*values])
    assert [label for _, label in marks] == ticks
    places = [place for place, _ in marks]
    assert places[0] == 212
    assert places[-1] == 26
    assert all(26 <= scale.at(value) <= 212 for value in values)


def test_what_spans_powers_of_ten_is_logarithmic_and_says_so():
    svg = chart("lr", ("", [(1, 1e-4), (2, 1e-3), (3, 0.1)]))
    assert drawn(svg)[0][0] == [[(72.0, 212.0), (236.0, 150.0), (400.0, 26.0)]]
    assert "learning rate (log scale)" in [text.text for text in svg.findall("text")]


@pytest.mark.parametrize("gap", [nan, inf, -inf, None, 1e301, "text"])
def test_what_is_no_number_is_a_gap_and_a_point_alone_a_dot(gap):
    svg = chart("loss", ("", [(1, 1.0), (2, 0.5), (3, gap), (4, 0.0), (5, gap), (6, 1.0), (7, 0.0)]))
    (curves, marks), = drawn(svg)
    assert [len(curve) for curve in curves] == [2, 2]
    assert (236.0, 212.0) in marks
    assert {x for x, _ in marks} == {round(72 + (epoch - 1) / 6 * 328, 1) for epoch in (1, 2, 4, 6, 7)}


def test_one_epoch_is_a_dot_in_the_middle():
    (curves, marks), = drawn(chart("loss", ("", [(1, 2.0)])))
    assert (curves, marks) == ([], [(236.0, 119.0)])


def test_a_chart_without_any_number_is_still_one():
    svg = chart("loss", ("", [(1, nan), (2, None)]))
    assert drawn(svg) == [([], [])]
    assert svg.find("desc").text == "loss: no numbers"


def test_lines_differ_in_more_than_colour():
    looks = {(charts.style(index), charts.marker(index, 0, 0)) for index in range(28)}
    assert len({(colour, dash) for (colour, dash), _ in looks}) == 28
    colour, dash, mark = ({part(index) for index in range(4)} for part in (
        lambda index: charts.style(index)[0], lambda index: charts.style(index)[1], lambda index: charts.marker(index, 0, 0)))
    assert len(colour) == len(dash) == len(mark) == 4


def test_of_many_points_no_peak_is_lost_and_the_page_stays_small():
    points = [(epoch, 1.0 + epoch % 7 / 10) for epoch in range(1, 100_001)]
    points[777], points[55_555], points[70_000] = (778, 9.0), (55_556, -3.0), (70_001, nan)
    text = figure("loss", ("train", points))
    assert len(text) < 100_000
    svg = next(iter(drawings(text).values()))
    assert "lowest -3 in epoch 55556, highest 9 in epoch 778" in svg.find("desc").text
    (curves, _), = drawn(svg)
    assert len(curves) == 2
    scale, _ = charts.over_values([-3.0, 9.0])
    assert {scale.at(-3.0), scale.at(9.0)} < {y for curve in curves for _, y in curve}
    assert curves[1][-1][0] == 400.0


def test_the_pointer_is_told_what_is_there():
    svg = chart("loss", ("train", [(1, 2.0), (2, 0.12345678)]), ("valid", [(1, nan), (2, None)]))
    assert json.loads(svg.get("data-at")) == [[72.0, "epoch 1\ntrain 2\nvalid nan"], [400.0, "epoch 2\ntrain 0.12346"]]


def test_a_chart_says_in_words_and_in_a_table_what_it_shows():
    text = figure("loss", ("train", [(1, 2.0), (2, 0.5), (3, 1.0)]), ("valid", [(1, 3.0), (2, None), (3, nan)]))
    svg = next(iter(drawings(text).values()))
    assert svg.get("role") == "img"
    named = [svg.find(f"*[@id='{name}']").tag for name in svg.get("aria-labelledby").split()]
    assert named == ["title", "desc"]
    assert svg.find("desc").text == (
        "train: first 2 in epoch 1, last 1 in epoch 3, lowest 0.5 in epoch 2, highest 2 in epoch 1. "
        "valid: first 3 in epoch 1, last 3 in epoch 1, lowest 3 in epoch 1, highest 3 in epoch 1")
    assert Reader(text).tables == [[["epoch", "train", "valid"], ["1", "2", "3"], ["2", "0.5", ""], ["3", "1", "nan"]]]


def test_which_charts_a_history_gives():
    history = [{"epoch": 1, "step": 5, "train_loss": 2.0, "val_loss": 3.0, "train_b": 1, "note": "text", "good": True, "lr": 0.1},
               {"epoch": 2, "step": 9, "train_loss": 1.0, "lr": 0.1, "late": 4.0}]
    assert {name: [(line.name, line.points) for line in lines] for name, lines in charts.curves(history).items()} == {
        "loss": [("train", [(1, 2.0), (2, 1.0)]), ("valid", [(1, 3.0), (2, None)])],
        "b": [("train", [(1, 1), (2, None)])], "lr": [("", [(1, 0.1), (2, 0.1)])], "late": [("", [(1, None), (2, 4.0)])]}


@pytest.mark.parametrize(("metric", "found"), [("val_loss", (2, 1.0)), ("val_accuracy", (1, 3.0)), ("heat", None), ("grad_norm", None)])
def test_the_best_is_the_first_of_the_best(metric, found):
    assert charts.best(metric, [(0, nan), (1, 3.0), (2, 1.0), (3, 1.0), (4, None), (5, 3.0)]) == found


# The page


@pytest.fixture
def reported(net, batches, valid, sgd, tmp_path):
    """A run with a report, its page's text and what a browser sees of it."""
    def accuracy(output, target):
        return (output.argmax(1) == target).float().mean()
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=["clip", "throughput", "cosine", "report"], out=tmp_path,
              metrics={"<b>": accuracy, "accuracy": accuracy})
    return run, *pages(tmp_path / "report.html")


def test_everything_is_on_the_page(reported):
    run, text, read = reported
    assert [*drawings(text)] == [f"{name} per epoch" for name in (
        "loss", "<b>", "accuracy", "gradient norm", "samples per second", "wait for data", "memory", "learning rate")]
    rows = {row[0]: row[1:] for table in read.tables for row in table}
    assert rows["Epochs"] == ["3 of 3"]
    assert rows["Updates"] == ["24"]
    assert ["Parameters", f"{sum(parameter.numel() for parameter in run.model.parameters()):,}"] in read.tables[0]
    assert rows["torch"] == [torch.__version__]
    assert rows["Device"] == ["cpu"]
    assert rows["plugin"][0].splitlines() == run_config(run)["plugin"]
    losses = [row["val_loss"] for row in run.history]
    assert rows["val_loss"] == [f"{losses[-1]:.5g}", f"{min(losses):.5g}", str(losses.index(min(losses)) + 1)]
    seen = "".join(read.texts)
    assert explain(run.hook.plugins.values()) in seen
    assert "Sequential on" not in seen
    assert "\nfinished\n" in seen


def test_the_layers_are_those_of_the_summary(reported, batches):
    run, _, read = reported
    with summary.record_forward(run.model) as found:
        run.model(batches[0][0])
    report = summary.table(found)
    rows = [[str(cell) for cell in cells] for cells in zip(*(column.cells for column in report.columns), strict=True)]
    assert [[str(column.header) for column in report.columns], *rows] in read.tables


def test_it_observer_only_at_the_first_step_only(net, batches, sgd, tmp_path):
    class Look:
        hooks = []

        @hookimpl
        def grads_ready(self, run: Run):
            self.hooks.append(sum(len(module._forward_hooks) for module in run.model.modules()))

    fit(net, cross_entropy, sgd, batches, plugins=["report", Look()], out=tmp_path)
    assert Look.hooks == [6] + [0] * 7


def test_curves_are_those_of_the_history(reported):
    run, text, _ = reported
    svg = drawings(text)["loss per epoch"]
    expected = [[row[name] for row in run.history] for name in ("train_loss", "val_loss")]
    scale, _ = charts.over_values([*expected[0], *expected[1]])
    for (curves, _), values in zip(drawn(svg), expected, strict=True):
        assert curves == [[*zip((72.0, 236.0, 400.0), map(scale.at, values), strict=True)]]


def test_text_is_never_markup(reported, net, batches, sgd, tmp_path):
    _, text, read = reported
    assert "b" not in read.tags
    assert "<b>" in read.texts
    run = fit(net, cross_entropy, sgd, batches, plugins=["report:path=x.html", Stop("</p><script>alert(1)</script>\ud800 \"'&")], out=tmp_path)
    text, read = pages(tmp_path / "x.html")
    assert read.tags.count("script") == 1
    assert unescape(text).count(run.stop.replace("\ud800", "\\ud800")) == 1


class Stop:
    def __init__(self, reason):
        self.reason = reason

    @hookimpl
    def after_evaluate(self, run: Run):
        run.stop = self.reason


def test_the_page_asks_nobody_and_is_small(reported):
    _, text, read = reported
    assert "http:" not in text
    assert "https:" not in text
    assert not {"link", "img", "iframe", "object", "base"} & {*read.tags}
    assert not [one for one in read.attributes if one[1] in ("src", "href", "onload", "onclick")]
    assert "@import" not in text
    assert "url(" not in text
    assert ("meta", "content", html.POLICY) in read.attributes
    assert html.POLICY.startswith("default-src 'none'")
    assert len(text) < 40_000


def test_the_page_is_light_and_dark_narrow_and_wide(reported):
    _, text, read = reported
    assert "@media (prefers-color-scheme: dark)" in text
    assert "color-scheme: light dark" in text
    assert ("meta", "content", "width=device-width, initial-scale=1") in read.attributes
    assert ("html", "lang", "en") in read.attributes


def test_one_epoch_without_validation(net, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, plugins=["report"], out=tmp_path)
    text, _ = pages(tmp_path / "report.html")
    assert {title: [len(marks) for _, marks in drawn(svg)] for title, svg in drawings(text).items()} == {
        "loss per epoch": [1], "learning rate per epoch": [1]}


def test_it_says_why_the_run_ended(net, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, epochs=5, plugins=["report", Stop("it is late")], out=tmp_path)
    _, read = pages(tmp_path / "report.html")
    assert "stopped early: it is late" in read.texts
    assert ["Epochs", "1 of 5"] in read.tables[0]


class Fail:
    def __init__(self, seen):
        self.seen = seen

    @hookimpl
    def after_step(self, run: Run):
        if run.seen == self.seen:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("seen", "there"), [(3, False), (11, True)])
def test_a_run_that_is_broken_off_has_one_once_an_epoch_is_complete(net, batches, sgd, tmp_path, seen, there):
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, sgd, batches, epochs=5, plugins=["report", Fail(seen)], out=tmp_path)
    assert (tmp_path / "report.html").exists() == there
    if there:
        _, read = pages(tmp_path / "report.html")
        assert "broken off: KeyboardInterrupt" in read.texts
        assert ["Epochs", "1 of 5"] in read.tables[0]


def test_the_run_is_the_same_to_the_last_bit(net, batches, valid, sgd, clone, same, tmp_path):
    other = clone(net)
    runs = [fit(model, cross_entropy, sgd, batches, valid, epochs=2, plugins=["amp", *plugins], seed=3, out=tmp_path)
            for model, plugins in ((net, ()), (other, ("report",)))]
    same(net, other)
    assert runs[0].history == runs[1].history


def test_it_overwrites_nothing(net, batches, sgd, tmp_path):
    file = tmp_path / "report.html"
    file.write_text("precious")
    for settings in ({}, {"resume": kept(net, batches, sgd, tmp_path)}):
        with pytest.raises(UsageError, match=r"report: .*report.html exists and is not overwritten"):
            fit(net, cross_entropy, sgd, batches, epochs=3, plugins=["report"], out=tmp_path, **settings)
    assert file.read_text() == "precious"


def kept(net, batches, sgd, tmp_path):
    return fit(net, cross_entropy, sgd, batches, plugins=["checkpoint"], out=tmp_path / "kept").last_checkpoint


def test_what_came_to_be_meanwhile_is_not_overwritten(net, batches, sgd, tmp_path, caplog):
    class Other:
        @hookimpl
        def train_end(self, run: Run):
            (tmp_path / "report.html").write_text("precious")

    with caplog.at_level(logging.WARNING):
        fit(net, cross_entropy, sgd, batches, plugins=["report", Other()], out=tmp_path)
    assert (tmp_path / "report.html").read_text() == "precious"
    assert "was made by another program and is not overwritten" in caplog.text


def test_a_page_that_cannot_be_written_costs_no_training(net, batches, sgd, tmp_path, caplog):
    class Away:
        @hookimpl
        def train_end(self, run: Run):
            (tmp_path / "report.html").mkdir()

    assert fit(net, cross_entropy, sgd, batches, plugins=["report", Away()], out=tmp_path).epoch == 1
    assert "report.html cannot be written (Is a directory); there is no report" in caplog.text


def test_a_metric_that_no_page_can_show_costs_no_training(net, batches, sgd, tmp_path, caplog):
    class Odd:
        @hookimpl
        def after_evaluate(self, run: Run):
            run.metrics["odd"] = 10**400

    assert fit(net, cross_entropy, sgd, batches, plugins=["report", Odd()], out=tmp_path).epoch == 1
    assert "report.html cannot be written (OverflowError: " in caplog.text
    assert not [*tmp_path.iterdir()]


def test_a_resumed_run_replaces_its_own(net, batches, valid, sgd, clone, same, tmp_path):
    plugins, other = ["checkpoint:every_steps=1", "report"], clone(net)
    with pytest.raises(KeyboardInterrupt):
        fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=[*plugins, Fail(13)], seed=1, out=tmp_path)
    run = fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=plugins, seed=1, out=tmp_path, resume=tmp_path)
    text, read = pages(tmp_path / "report.html")
    assert "finished" in read.texts
    assert ["Epochs", "3 of 3"] in read.tables[0]
    assert "Resumed at" in [row[0] for row in read.tables[0]]
    assert [len(curves[0]) for curves, _ in drawn(drawings(text)["loss per epoch"])] == [3, 3]
    fit(other, cross_entropy, sgd, batches, valid, epochs=3, plugins=plugins, seed=1, out=tmp_path / "whole")
    same(run.model, other)
    before = (tmp_path / "report.html").read_bytes()
    fit(net, cross_entropy, sgd, batches, valid, epochs=3, plugins=plugins, seed=1, out=tmp_path, resume=tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before        # nothing was trained, so nothing is new


def test_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["run", "--model", "linear", "--epochs", "2", "--plugin", "report", "--out", "a"])
    assert (result.exit_code, result.stderr) == (0, "")
    text, read = pages(Path("a/report.html"))
    assert "<title>linear on digits</title>" in text
    rows = {row[0]: row[1:] for table in read.tables for row in table}
    assert rows["optimizer"] == ["adamw"]
    assert not {"without", "max_steps"} & {*rows}          # which nobody asked for
    tree = "\n".join(Path("a/explain.txt").read_text().splitlines()[:-4])
    assert tree in "".join(read.texts)


@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="needs chromium on this machine")
def test_a_browser_draws_it_without_a_complaint(reported, tmp_path):
    """As the browser has it after the script ran; CSP refusals and errors are on its console."""
    import subprocess

    program = shutil.which("chromium") or shutil.which("google-chrome")
    done = subprocess.run([program, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}/user",
                           "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "report.html").as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert done.stdout.count("<figure>") == 8
    assert "CONSOLE" not in done.stderr


def test_a_layer_that_was_thawed_is_trainable_and_frozen_at_first(net, batches, sgd, tmp_path):
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=["freeze:patterns=0,until=1ep", "freeze:patterns=1", "report"], out=tmp_path)
    _, page = pages(tmp_path / "report.html")
    states = {row[0].strip(): row[-1] for table in page.tables for row in table if "Linear" in row or "BatchNorm1d" in row}
    assert states == {"0": "trainable, frozen at first", "1": "frozen", "4": "trainable"}
