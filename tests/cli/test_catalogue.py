"""`loopctl models`, `loopctl data`, `loopctl optimizers`: what they list, and the options of one."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import loopctl
from loopctl.cli import DATA, catalogue, main, models, optimizers
from loopctl.cli.source_reader import Unreadable

DOCS = Path(__file__).parents[2] / "docs"


def show(command, code=0):
    done = CliRunner().invoke(main, command.split())
    assert done.exit_code == code, done.output
    return done.stdout if not code else done.stderr


@pytest.mark.parametrize(("command", "names"), [
    ("models", models.known_names()), ("data", DATA), ("optimizers", optimizers.known_names())])
def test_every_name_is_listed_with_a_line(command, names):
    lines = [line.split(None, 1) for line in show(command).splitlines() if line and line not in ("loopctl", "torchvision")]
    assert sorted(name for name, _ in lines) == sorted(names)
    assert all(15 < len(text) <= 116 for _, text in lines)


@pytest.mark.parametrize("command", ["models", "data", "optimizers", "models resnet18", "data mnist", "optimizers adamw"])
def test_neither_torch_nor_torchvision_is_imported(command):
    code = ("import sys; from loopctl.cli import main\n"
            f"try: main({command.split()})\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "assert not {'torch', 'torchvision', 'sklearn'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_the_page_of_a_model_shows_types_defaults_and_how_to_use_it():
    assert show("models cnn").splitlines() == [
        "cnn: A convolutional network of four layers in two stages, for images of 8 to 32 pixels.", "",
        "options",
        "  width    number of channels of the first stage; the second has twice as many",
        "           a whole number; default 32",
        "  dropout  probability of dropping an input of the last layer",
        "           a number; default 0.0", "",
        "use      loopctl run --model cnn:width=32",
        f"from     loopctl {loopctl.__version__}, loopctl.cli.models:cnn"]


def test_the_page_of_an_optimizer_has_what_torch_says_of_its_arguments():
    page = show("optimizers sgd")
    assert "  momentum        momentum factor\n                  a number; default 0\n" in page
    assert "  weight_decay    weight decay (L2 penalty)\n                  a number; default 0\n" in page
    assert "loopctl run --optimizer sgd:lr=0.001" in page
    assert "params" not in re.findall(r"^  (\w+)", page, re.MULTILINE)


def test_the_page_of_a_torchvision_model_names_its_pretrained_weights():
    assert re.search(r"^  weights .*\n(.*\n)+? +IMAGENET1K_V1\|IMAGENET1K_V2\|DEFAULT; default none", show("models resnet50"), re.MULTILINE)


def test_the_page_of_data_has_the_options_of_all_data():
    page = show("data digits")
    assert re.findall(r"^  (\w+)  ", page, re.MULTILINE) == ["channels", "on_device"]


@pytest.mark.parametrize("command", ["models vit", "models resnet50", "data", "data fake", "optimizers sgd", "optimizers adamw"])
def test_what_the_source_does_not_say_is_imported_and_shown_in_the_same_way(command, monkeypatch):
    expected = show(command)

    def signature(*place):
        raise Unreadable
    monkeypatch.setattr(catalogue.SourceReader, "signature", signature)
    assert show(command) == expected


def test_a_function_of_the_user_has_a_page(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text('def net(num_classes, width: int = 3, **others):\n    """A net.\n\n    width: how wide\n    """\n')
    assert show(f"models {file}:net").splitlines() == [
        f"{file}:net: A net.", "", "options", "  width  how wide", "         a whole number; default 3",
        "  Other options are passed on as keyword arguments.", "", f"use      loopctl run --model {file}:net:width=3"]


@pytest.mark.parametrize(("command", "message"), [
    ("models cnnn", "no model is called 'cnnn'; did you mean 'cnn'?"),
    ("models cnn:widht=2", "model cnn: no option 'widht'; did you mean 'width'?"),
    ("data mnst", "no data is called 'mnst'; did you mean 'mnist'?"),
    ("data fake:size=many", "data fake: size takes a whole number, not 'many'"),
    ("optimizers adm", "no optimizer is called 'adm'; did you mean 'adam'?"),
    ("models nothing.py:net", "model nothing.py:net: there is no file nothing.py"),
])
def test_a_wrong_name_or_option_is_refused_as_in_a_run(command, message):
    assert show(command, code=2) == f"error: {message}\n"


@pytest.mark.parametrize("file", ["models.md", "data.md"])
def test_the_commands_on_the_page_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ loopctl (.*)$", (DOCS / file).read_text(), re.MULTILINE)
    assert len(commands) >= 3
    for command in commands:
        assert show(command)


@pytest.mark.parametrize(("kind", "file"), [("model", "models.md"), ("data", "data.md")])
def test_the_page_in_the_documentation_has_what_the_command_lists(kind, file):
    page = (DOCS / file).read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    listed = {name for name in catalogue.places(kind) if kind != "model" or name in models.SMALL}
    assert set(rows) == listed
    reader = catalogue.SourceReader()
    more = catalogue.more_options(kind, reader)
    for name, row in rows.items():
        factory = catalogue.stand_in(catalogue.places(kind)[name], reader)
        known = catalogue.options_of(kind, name, factory, more, reader)
        options = [key for key in known if key not in more]
        assert row == f"{catalogue.first_line(factory.__doc__)} | {', '.join(f'`{key}`' for key in options)}".rstrip()
