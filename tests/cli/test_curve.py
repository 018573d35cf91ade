"""`loopctl lr`, which draws the learning rate, `loopctl summary`, and the commands of docs/gallery.md."""
import math
import os
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from loopctl import Run, available, load
from loopctl.cli import main
from loopctl.cli.curve import active_spans, chart, schedule_factors
from loopctl.composition.compose import compose
from loopctl.loop import DEFAULTS
from loopctl.optim.learning_rate import lr_curve
from loopctl.prepare import prepare
from loopctl.report import plots

ROOT = Path(__file__).parents[2]
GALLERY = re.findall(r"^loopctl lr .*$", (ROOT / "docs" / "gallery.md").read_text(), re.MULTILINE)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments, status=0):
        result = CliRunner().invoke(main, list(arguments))
        assert result.exit_code == status, result.output
        return result
    return call


def test_a_chart_has_a_column_of_matching_height_per_value():
    rows = chart([0, 1, 2, 4], "all", width=4, height=2).splitlines()
    assert rows == ["        4 │   █", "        0 │ ▄██", "          └────", "           start 0, end 4; all"]


def test_the_learning_rate_of_several_schedules_is_drawn_in_the_terminal(run, tmp_path):
    text = run("lr", "--plugin", "warmup:length=10%,start_factor=0.1", "--plugin", "cosine:by=step", "--lr", "0.1", "--epochs", "10").stdout
    rows = text.splitlines()
    assert rows[-1].strip() == "start 0.01, end 4.66e-06; 10 epochs, 230 steps"
    highest = rows[0].split("│")[1]
    assert 6 <= len(highest) - len(highest.lstrip()) <= 9            # the peak is at a tenth of the run
    assert list(tmp_path.iterdir()) == []                            # no run folder was made


def test_row_24_the_learning_rate_over_a_hundred_epochs_is_drawn(run):
    """The chart equals one of the rates of torch's scheduler, stepped a hundred times without training."""
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule, rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50), []
    for _ in range(100):
        rates += [optimizer.param_groups[0]["lr"]] * 23              # 23 steps per epoch
        optimizer.step()
        schedule.step()
    drawn = run("lr", "--epochs", "100", "--optimizer", "sgd", "--lr", "0.1", "--plugin", "cosine:t_max=50").stdout
    assert drawn.rstrip("\n") == chart(rates, "100 epochs, 2,300 steps")


def test_the_image_format_is_that_of_the_file_extension(run, tmp_path):
    run("lr", "--plugin", "cosine", "--out", "lr.png")
    assert (tmp_path / "lr.png").read_bytes()[:4] == b"\x89PNG"
    run("lr", "--plugin", "cosine", "--out", "lr.svg")
    assert "learning rate" in (tmp_path / "lr.svg").read_text()
    assert "error: --out lr.xyz cannot be written" in run("lr", "--out", "lr.xyz", status=2).stderr
    assert "error: --out nowhere/lr.png cannot be written" in run("lr", "--out", "nowhere/lr.png", status=2).stderr


def test_without_matplotlib_the_error_says_how_to_install_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("lr", "--out", "lr.png", status=2).stderr == (
        "error: --out needs matplotlib; install it with: pip install 'loopctl[plot]'\n")


def test_the_same_curve_gives_the_same_bytes(run, tmp_path):
    for kind in ("svg", "png", "pdf"):
        for name in ("one", "two"):
            run("lr", "--plugin", "cosine", "--out", f"{name}.{kind}")
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()
    assert len((tmp_path / "one.svg").read_bytes()) < 30_000


def labels(file):
    """The texts in an SVG image."""
    return re.findall(r">([^<>\n]+)</text>", file.read_text())


def test_the_axes_and_the_bars_of_the_schedules_are_labelled(run, tmp_path):
    run("lr", "--plugin", "warmup", "--plugin", "cosine", "--plugin", "plateau", "--out", "lr.svg")
    words = labels(tmp_path / "lr.svg")
    assert {"epoch", "step", "learning rate", "warmup", "cosine"} < {*words}
    assert "plateau" not in words                               # without a metric it does not change the rate
    assert not [word for word in words if word.startswith("group")]


def test_parameter_groups_have_a_curve_each_and_share_equal_ones(run, tmp_path):
    run("lr", "--model", "mlp", "--optimizer", "sgd", "--lr", "0.1", "--plugin", "layerwise_lr:decay=0.5,no_decay=true", "--out", "lr.svg")
    words = [word for word in labels(tmp_path / "lr.svg") if word.startswith("group")]
    assert len(words) >= 2
    assert words[0].startswith("groups layer 3 and layer 3 (no decay): ")      # with weight decay and without


@pytest.mark.parametrize(("plugins", "expected"), [
    (["warmup:length=2ep"], {"warmup": (0, 6)}),
    (["constant:total_iters=4"], {"constant": (0, 12)}),
    (["multistep:milestones=2,5"], {"multistep": (5, 15)}),
    (["cosine:by=step"], {"cosine": (0, 29)}),
    (["step:step_size=50", "plateau"], {}),
    (["warmup:length=50%", "step:step_size=3"], {"warmup": (0, 15), "step": (8, 27)}),
    (["swa:start=50%,swa_lr=0.01,anneal_epochs=2", "warmup:length=1ep"], {"swa": (17, 21), "warmup": (0, 3)}),
], ids=str)
def test_the_steps_at_which_each_schedule_changes_the_rate(plugins, expected):
    """Ten epochs of three steps. A span begins with the last step before the rate changes."""
    batches = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))] * 3
    hooks = compose(plugins, DEFAULTS)
    run = Run(torch.nn.Linear(2, 2), torch.nn.CrossEntropyLoss(), lambda groups: torch.optim.SGD(groups, lr=0.1), batches, epochs=10, hook=hooks)
    prepare(run, {}, None, None)
    points = [(step, schedule_factors(run), lrs) for step, lrs in lr_curve(run)]
    assert active_spans([step for step, _, _ in points], [factors for _, factors, _ in points]) == expected
    for _, factors, lrs in points:
        assert lrs[0] == pytest.approx(0.1 * math.prod(factors.values()))


def test_the_chart_fits_the_terminal(monkeypatch):
    for columns, width in ((200, 72), (60, 48), (30, 18), (5, 8)):
        monkeypatch.setenv("COLUMNS", str(columns))
        rows = chart([1.0] * 300, "all").splitlines()
        assert len(rows[0]) == width + 11
        assert columns < 20 or len(rows[0]) <= columns


def test_the_colours_have_enough_contrast_on_light_and_dark_pages():
    """The contrast is at least 3, as WCAG 2.1 requires for graphics, with white and with GitHub's dark background."""
    def luminance(colour):
        parts = [int(colour[at:at + 2], 16) / 255 for at in (1, 3, 5)]
        return sum(weight * (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4)
                   for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    for colour in (*plots.COLOURS, plots.GREY):
        for page in ("#ffffff", "#0d1117"):
            low, high = sorted([luminance(colour), luminance(page)])
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, page)
    assert len({str(plots.stroke(number)) for number in range(20)}) == 20


# docs/gallery.md


SHOWN = {  # the texts in each image: the ticks of step, learning rate and epoch, and the schedules
    name: ("0 100 200 300 400", "0.00 0.02 0.04 0.06 0.08 0.10", "0 5 10 15 20", [name])
    for name in ("constant", "cosine_restarts", "cyclic", "exponential", "linear", "multistep", "onecycle", "polynomial", "step", "trapezoidal", "warmup")}
USUAL = SHOWN["step"][:3]
SHOWN |= {
    "cosine": (*USUAL, ["warmup", "cosine"]),
    "inverse_sqrt": (*USUAL, ["warmup", "inverse_sqrt"]),
    "groups": (*USUAL, ["warmup", "cosine", "group layer 5: 16.weight, 16.bias", "group layer 4: 10.weight, 11.weight, 11.bias", "group layer 3: 7.weight, 8.weight, 8.bias",
                        "group layer 2: 3.weight, 4.weight, 4.bias", "group layer 1: 0.weight, 1.weight, 1.bias"]),
    "lambda": ("0 20 40 60 80", USUAL[1], "0 1 2 3 4", ["lambda"]),
    "multiplicative": ("0 25 50 75 100 125 150 175", USUAL[1], "0 1 2 3 4 5 6 7 8", ["multiplicative"]),
    "swa": (*USUAL, ["swa", "step"]),
    "torch_scheduler": (USUAL[0], "0.00 0.02 0.04 0.06", USUAL[2], ["torch_scheduler"]),
}


def test_the_gallery_shows_every_schedule():
    page = (ROOT / "docs" / "gallery.md").read_text()
    for name in available():
        if hasattr(getattr(load(name), "lr_scale", None), "loopctl_impl"):
            assert f"## `{name}`\n" in page
    pictures = set(re.findall(r"!\[\w+\]\((gallery/\w+\.svg)\)", page))
    assert pictures == {f"gallery/{name}.svg" for name in SHOWN}
    assert {f"docs/{picture}" for picture in pictures} == {command.split()[-1] for command in GALLERY}


@pytest.mark.parametrize("command", GALLERY, ids=lambda command: command.split("/")[-1])
def test_a_command_of_the_gallery_draws_its_image(run, tmp_path, command):
    (tmp_path / "docs" / "gallery").mkdir(parents=True)
    words = command.split()
    run(*words[1:])
    drawn = tmp_path / words[-1]
    steps, rates, epochs, rest = SHOWN[drawn.stem]
    expected = [*steps.split(), "step", *rates.split(), "learning rate", *epochs.split(), "epoch", *rest]
    assert labels(drawn) == expected                # the paths depend on matplotlib's version
    assert "<svg" in drawn.read_text()


def test_the_gallery_is_drawn_where_it_is_missing_or_older_than_the_page(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    gallery = import_module("gallery")
    assert [["loopctl", *words] for words in gallery.commands()] == [command.split() for command in GALLERY]
    monkeypatch.setattr(gallery, "commands", lambda: [GALLERY[0].split()[1:]])
    picture = tmp_path / GALLERY[0].split()[-1]
    assert gallery.draw(tmp_path, outdated_only=True) == [picture]
    content = picture.read_bytes()
    assert gallery.draw(tmp_path, outdated_only=True) == []
    os.utime(picture, (0, 0))
    assert gallery.draw(tmp_path, outdated_only=True) == [picture]
    assert gallery.draw(tmp_path) == [picture]
    assert picture.read_bytes() == content
    monkeypatch.setattr(gallery, "commands", lambda: [["lr", "--epochs", "none", "--out", "docs/gallery/no.svg"]])
    with pytest.raises(RuntimeError, match="docs/gallery/no.svg cannot be drawn: error: .*none"):
        gallery.draw(tmp_path)


def test_summary_shows_the_layers_of_a_model(run, tmp_path):
    text = run("summary", "--model", "mlp:width=16", "--batch-size", "8").stdout
    assert re.search(r"Linear +\[8, 16\] +1,040 +70\.2% +8\.19 k +trainable", text)
    assert re.search(r"Parameters +1,482", text)
    assert re.search(r"Multiply-adds, forward +11\.5 k", text)
    assert list(tmp_path.iterdir()) == []
