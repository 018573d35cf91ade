"""Words and letters: encodings without a letter, names of Python objects, texts from others, values written as text."""
import io
import json
import math
import operator
import sys
import tomllib
from collections.abc import Callable
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from loopctl import Duration, UsageError, available, explain, fit, hookimpl, load
from loopctl.cli import main
from loopctl.cli.parameters import TextType
from loopctl.composition.discovery import build_plugin, split_spec
from loopctl.composition.importing import IMPORTED, run_file
from loopctl.composition.option_types import format_value, parse_value
from loopctl.composition.options import parse_options, plugin_options, to_spec

cross_entropy = nn.CrossEntropyLoss()


class Written:
    """What is written to a text stream of an encoding, as sys.stdout of a run."""

    def __init__(self, monkeypatch, encoding):
        self.bytes, self.encoding = io.BytesIO(), encoding
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(self.bytes, encoding=encoding))

    def text(self):
        sys.stdout.flush()
        return self.bytes.getvalue().decode(self.encoding)


def first_class(output, target):
    return output[:, 0].mean()


# Encodings


@pytest.mark.parametrize("encoding", ["cp1252", "cp932", "ascii", "utf-8"])
@pytest.mark.fault(row="I1", given="loopctl lr with stdout in cp1252, cp932 or ASCII", right="a chart in plain letters")
def test_the_rate_is_drawn_with_the_letters_that_the_terminal_has(encoding):
    done = CliRunner(charset=encoding).invoke(main, ["lr", "--model", "linear", "--epochs", "2", "--device", "cpu", "--plugin", "cosine"])
    assert done.exit_code == 0, done.output
    chart = done.stdout_bytes.decode(encoding).splitlines()
    assert "start 0.001, end 0.0005; 2 epochs" in chart[-1]
    assert ("█" if encoding == "utf-8" else "#") in chart[-3]


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")           # of torch 2.11
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-16"])
@pytest.mark.parametrize("plugin", ["progress", "lr_finder:num_steps=5", "summary", "profile:start=1,steps=2"])
@pytest.mark.fault(row="I", given="fit in Python with progress, lr_finder, summary or profile and a stdout in cp1252", right="it trains, and shows plain letters")
def test_a_plugin_shows_what_the_encoding_has(encoding, plugin, net, batches, sgd, tmp_path, monkeypatch):
    written = Written(monkeypatch, encoding)
    net.add_module("größe─Ł", nn.Linear(3, 3))
    fit(net, cross_entropy, sgd, batches, epochs=2, plugins=[plugin], metrics={"größe─Ł": first_class}, out=tmp_path)
    text = written.text()
    assert text
    if plugin == "progress":
        assert ("train_größe─Ł" if encoding == "utf-16" else "gr\\xf6\\xdfe-\\u0141" if encoding == "ascii" else "größe-\\u0141") in text


@pytest.mark.fault(row="I", given="a metric with a Polish name, csv, and a locale in ASCII", right="the file is UTF-8")
def test_the_log_is_utf_8_in_every_locale(net, batches, sgd, tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    monkeypatch.setattr("io.text_encoding", lambda encoding, *_: encoding or "ascii")
    run = fit(net, cross_entropy, sgd, batches, plugins=["csv"], metrics={"dokładność": first_class, "\ud800": first_class}, out=tmp_path)
    heading = (tmp_path / "metrics.csv").read_bytes().decode("utf-8").splitlines()[0]
    assert heading == "epoch,step,train_loss,train_dokładność,train_\\ud800,lr"
    assert "train_dokładność" in run.history[0]


# Names of Python objects


FILE = """
from functools import partial
from torch.optim.lr_scheduler import StepLR

halve = lambda epoch: 0.5 ** epoch
scheduler = partial(StepLR, step_size=1)

def slower(epoch):
    return 1 / (1 + epoch)

class Nested:
    @staticmethod
    def slower(epoch):
        return 1 / (1 + epoch)
"""


@pytest.fixture
def file(tmp_path):
    folder = tmp_path / "with blanks, commas: and = signs"
    folder.mkdir()
    (folder / "mine.py").write_text(FILE)
    return folder / "mine.py"


def rebuilt(spec, monkeypatch, tmp_path):
    """The plugin built from its own spec by another process in another folder, as far as these matter."""
    name, plugin = build_plugin(spec)
    written = to_spec(name, plugin)
    monkeypatch.chdir(tmp_path)
    run_file.cache_clear()
    IMPORTED.clear()
    return build_plugin(written)[1]


@pytest.mark.parametrize("name", ["slower", "Nested.slower"])
@pytest.mark.fault(row="I3", given="lambda:lr_lambda=file.py:name, a function of a file", right="the function, also from run.toml")
def test_an_option_takes_a_function_from_a_file(name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(file.parent)
    plugin = rebuilt(f"lambda:lr_lambda=mine.py:{name},by=step", monkeypatch, tmp_path)
    assert (plugin.lr_lambda(3), plugin.by) == (0.25, "step")


@pytest.mark.fault(row="I3", given="torch_scheduler:cls=file.py:name, a partial of a scheduler", right="the scheduler, also from run.toml")
def test_an_option_takes_a_class_from_a_file(file, tmp_path, monkeypatch):
    monkeypatch.chdir(file.parent)
    plugin = rebuilt("torch_scheduler:cls=./mine.py:scheduler,gamma=0.5", monkeypatch, tmp_path)
    assert plugin.cls.func is torch.optim.lr_scheduler.StepLR
    assert plugin.options == {"gamma": 0.5}


@pytest.mark.fault(row="I", given="lr_lambda=mine.py:halve, where halve is a lambda", right="the function, also from run.toml, where it is by its name")
def test_a_lambda_of_a_file_is_written_by_its_name(file, tmp_path, monkeypatch):
    monkeypatch.chdir(file.parent)
    plugin = rebuilt("lambda:lr_lambda=mine.py:halve", monkeypatch, tmp_path)
    assert plugin.lr_lambda(3) == 0.125


@pytest.mark.fault(row="I", given="a list of functions of a file whose path has blanks, commas, colons and equals signs", right="the functions in order, also from run.toml")
def test_a_list_of_functions_from_a_quoted_path(file, tmp_path, monkeypatch):
    plugin = rebuilt(f'multiplicative:lr_lambda="{file}:slower","{file}:halve",by=step', monkeypatch, tmp_path)
    assert [function(1) for function in plugin.lr_lambda] == [0.5, 0.5]
    assert [function(2) for function in plugin.lr_lambda] == [1 / 3, 0.25]


@pytest.mark.fault(row="I", given="a plugin class in a file whose path has a colon and a comma", right="the class")
def test_a_class_in_a_folder_with_a_colon(file):
    assert split_spec(f"{str(file).replace('=', '')}:Nested:a=1") == (f"{str(file).replace('=', '')}:Nested", "a=1")


@pytest.mark.fault(row="I", given="--model and --data in one file", right="the file is executed once, and again when it has changed")
def test_a_file_is_executed_once_as_long_as_it_is_the_same(tmp_path):
    file = tmp_path / "one.py"
    file.write_text("class First: pass\nclass Second: pass")
    assert load(f"{file}:First").__module__ == load(f"{file}:Second").__module__
    assert load(f"{file}:First") is load(f"{file}:First")
    file.write_text("class First: changed = True")
    assert load(f"{file}:First").changed


@pytest.mark.parametrize(("path", "message"), [
    ("nowhere.py:f", "there is no file nowhere.py"), ("{file}:slowr", "has no 'slowr'; did you mean 'slower'"), ("{file}:__doc__", "takes a function or class"),
    ("{file}", "an import path, package.module:name or file.py:name, not"), ("{file}:f.g", "has no 'f.g'"), ("a\0.py:f", "there is no file")])
@pytest.mark.fault(row="I", given="lr_lambda=nowhere.py:f and other names that lead to nothing", right="one line that says what is missing")
def test_a_name_that_leads_to_nothing_is_refused(path, message, tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    with pytest.raises(UsageError) as refused:
        build_plugin(f"lambda:lr_lambda={path.format(file=tmp_path / 'mine.py')}")
    assert message in str(refused.value)


# Texts from others


ESCAPES = "\x1b]0;title\x07\x1b[2J\x08\r\x9b31m"
EVIL = f"""
from dataclasses import dataclass
from loopctl import hookimpl

@dataclass(eq=False)
class Evil:
    \"\"\"Do {ascii(ESCAPES)[1:-1]} nothing.

    text: help {ascii(ESCAPES)[1:-1]} of it
    \"\"\"
    text: str = {ESCAPES!a}

    def __post_init__(self):
        if self.text == "wrong":
            raise ValueError({ESCAPES!a})

    @hookimpl
    def before_step(self):
        pass
"""


def is_harmless(text):
    return all(char.isprintable() or char == "\n" for char in text)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Install packages without pip: by name, the content of entry_points.txt; other files by path."""
    def installed(metadata=True, **entry_points):
        site = tmp_path / "site"
        for name, text in entry_points.items():
            info = site / f"{name}-1.0.dist-info"
            info.mkdir(parents=True)
            if metadata:
                (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        monkeypatch.syspath_prepend(site)
        return site
    return installed


@pytest.fixture
def evil(packages):
    site = packages(evil="[loopctl]\nevil = evil_plugin:Evil\n")
    (site / "evil_plugin.py").write_text(EVIL)
    yield "evil"
    sys.modules.pop("evil_plugin", None)


@pytest.mark.parametrize("command", ["plugins", "plugins --check", "plugins evil", "explain --model linear --device cpu --plugin evil", "run --plugin evil:text=wrong"])
@pytest.mark.fault(row="K1", given="a plugin whose docstring, help, default and error have terminal escapes", right="the escapes are shown, not obeyed")
def test_what_a_plugin_says_is_shown_harmless(command, evil):
    done = CliRunner().invoke(main, command.split())
    assert done.exit_code == (2 if "wrong" in command else 0)
    assert is_harmless(done.output)
    assert "\\x1b]0;title\\x07\\x1b[2J" in done.output or "explain" in command


@pytest.mark.fault(row="K", given="a metric and a unit with terminal escapes and markup, progress in a pipe", right="the escapes are shown")
def test_a_metric_is_shown_harmless_in_a_pipe(net, batches, sgd, capsys):
    names = [f"a{ESCAPES}", "[red]b[/red]", "[/c]", ":smile:"]
    plugin = build_plugin("progress")[1]
    plugin.unit = ESCAPES
    fit(net, cross_entropy, sgd, batches, plugins=[plugin], metrics=dict.fromkeys(names, first_class))
    shown = capsys.readouterr().out
    assert is_harmless(shown)
    for name in ("a\\x1b]0;title", *names[1:]):
        assert shown.count(f"train_{name}") == 1


@pytest.mark.fault(row="K", given="a metric and a unit with terminal escapes, progress on a terminal", right="the escapes are shown")
def test_a_metric_is_shown_harmless_on_a_terminal(net, batches, sgd, monkeypatch):
    written = Written(monkeypatch, "utf-8")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    plugin = build_plugin("progress:interval=0")[1]
    plugin.unit = ESCAPES
    fit(net, cross_entropy, sgd, batches, plugins=[plugin], metrics={ESCAPES: first_class})
    text = written.text()
    assert "\x1b[?25l" in text                              # the bar was drawn
    assert not {"\x1b]0;", "\x07", "\x1b[2J", "\x08", "\x9b"} & {part for part in ("\x1b]0;", "\x07", "\x1b[2J", "\x08", "\x9b") if part in text}


@pytest.mark.fault(row="K", given="a layer whose name and class have terminal escapes, summary", right="the escapes are shown")
def test_a_layer_is_shown_harmless(net, batches, sgd, capsys):
    net.add_module(f"[/x]{ESCAPES}".replace(".", ""), type(f"[/x]{ESCAPES}", (nn.Identity,), {})())
    fit(net, cross_entropy, sgd, batches, plugins=["summary"], max_steps=1)
    shown = capsys.readouterr().out
    assert is_harmless(shown)
    assert "[/x]" in shown


@pytest.mark.fault(row="K", given="a plugin class whose name has terminal escapes, explain", right="the escapes are shown")
def test_the_name_of_a_class_is_harmless():
    cls = type(f"Name{ESCAPES}", (), {"before_step": hookimpl(lambda self: None)})
    cls.before_step.__name__ = "before_step"
    assert is_harmless(explain([cls()]))


# Broken packages


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(("text", "message"), [
    ("[loopctl]\nbad = !!!\ngood = good_one:Good\n", "broken 1.0: its plugin 'bad' is declared as '!!!', not as name = package.module:Class; it is left out"),
    ("[console_scripts]\nno equals sign\n", "broken 1.0: its entry_points.txt cannot be read (TypeError: ")])
@pytest.mark.fault(row="K2", given="an installed package whose entry point is three exclamation marks, or a line without an equals sign", right="the package is named once, and everything else works")
def test_a_broken_package_is_named_once(text, message, packages, caplog):
    packages(broken=text, fine="[loopctl]\nfine = fine_one:Fine\n")
    for _ in range(2):
        assert {"clip", "fine"} <= set(available())
        assert "bad" not in available()
        assert load("clip").__name__ == "Clip"
    with pytest.raises(UsageError, match="no plugin is called 'bad'"):
        load("bad")
    (line,) = warnings_of(caplog)
    assert line.startswith(message)
    assert CliRunner().invoke(main, ["plugins"]).exit_code == 0


@pytest.mark.parametrize("line", ["x = ", "x = module", "x = a:b:c", "x = a b:C", " = a:B", "a.b = a:B", "a:b = a:B", "a,b = a:B", f"{ESCAPES[:4]}x = a:B", "x = a-b:C"])
@pytest.mark.fault(row="K", given="an entry point without a class, or with a name that no option could have", right="the package is named once, and everything else works")
def test_an_entry_point_that_cannot_be_used_is_named(line, packages, caplog):
    packages(broken=f"[loopctl]\n{line}\n")
    assert "clip" in available()
    (warning,) = warnings_of(caplog)
    assert warning.startswith("broken 1.0: its plugin")
    assert warning.isprintable()
    assert CliRunner().invoke(main, ["plugins"]).exit_code == 0


@pytest.mark.fault(row="K", given="an entry_points.txt that is not UTF-8", right="the package is named once, and everything else works")
def test_entry_points_in_another_encoding(packages, caplog):
    packages(broken=b"[loopctl]\n\xff\xfe = a:B\n")
    assert "clip" in available()
    assert warnings_of(caplog)[0].startswith("broken 1.0: its entry_points.txt cannot be read (UnicodeDecodeError")


@pytest.mark.fault(row="K", given="a package without METADATA", right="its plugins are listed with the name of its folder")
def test_a_package_without_metadata(packages, caplog):
    packages(metadata=False, bare="[loopctl]\nbare = bare_one:Bare\n")
    done = CliRunner().invoke(main, ["plugins"])
    assert done.exit_code == 0
    assert "[bare-1.0.dist-info]" in next(line for line in done.stdout.splitlines() if line.split()[:1] == ["bare"])
    assert not warnings_of(caplog)


@pytest.mark.fault(row="K", given="an entry point with blanks and an extra: math : cos [fast]", right="the object that it names")
def test_an_entry_point_with_an_extra(packages):
    packages(extra="[loopctl]\nextra = json.decoder : JSONDecoder [fast]\n")
    assert load("extra") is json.JSONDecoder


# Values as text


TEXTS = st.text(max_size=8) | st.text(" ,=\"\\[](){}\t\x1b\x7fab'", max_size=8) | st.sampled_from(
    ["none", "true", "1", "1e3", "[0]", '["a"]', "x{1,2}", "flag", "a,flag=1", "10%", "inf", '"', '"a"', "\u2028", "\ud800"])
WHOLE, NUMBER = st.integers(-2**63 + 1, 2**63 - 1), st.floats(width=32, allow_nan=False, allow_infinity=False)
FUNCTIONS = st.sampled_from([math.cos, str, operator.add, json.JSONDecoder, torch.optim.lr_scheduler.StepLR])
DURATIONS = st.integers(1, 10**15) | st.floats(1e-9, 1e15) | st.sampled_from(["5ep", " 10% ", "500st", "7"])
ANY = st.recursive(st.none() | st.booleans() | WHOLE | NUMBER | TEXTS, lambda inner: (
    st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=5)
TYPES = {
    bool: st.booleans(), int: WHOLE, float: NUMBER, str: TEXTS, Path: TEXTS.map(Path), Any: ANY, Duration: DURATIONS,
    Annotated[float, "or inf"]: st.floats(), Callable: FUNCTIONS, Literal["a", "none", "1", 1, True, None]: st.sampled_from(["a", "none", "1", 1, True, None]),
    str | None: st.none() | TEXTS, int | str: WHOLE | TEXTS, str | float | bool: TEXTS | NUMBER | st.booleans(), Duration | None: st.none() | DURATIONS,
    list[int]: st.lists(WHOLE, max_size=3), list[str]: st.lists(TEXTS, max_size=3), list[Duration]: st.lists(DURATIONS, max_size=3),
    list[str] | None: st.none() | st.lists(TEXTS, max_size=3), list[str] | str: TEXTS | st.lists(TEXTS, max_size=3),
    float | list[float]: NUMBER | st.lists(NUMBER, max_size=3), list[Callable] | Callable: FUNCTIONS | st.lists(FUNCTIONS, max_size=2),
    list[list[str]]: st.lists(st.lists(TEXTS, max_size=2), max_size=2), tuple[int, str]: st.tuples(WHOLE, TEXTS),
    tuple[float, ...]: st.lists(NUMBER, max_size=3).map(tuple), dict[str, float | str]: st.dictionaries(TEXTS, NUMBER | TEXTS, max_size=3),
    dict[str, list[int]]: st.dictionaries(TEXTS, st.lists(WHOLE, max_size=2), max_size=2), dict: st.dictionaries(TEXTS, ANY, max_size=2),
    dict[int, bool] | None: st.none() | st.dictionaries(WHOLE, st.booleans(), max_size=2), list: st.lists(ANY, max_size=3),
}
MORE = settings(deadline=None, derandomize=True, database=None, max_examples=200, suppress_health_check=list(HealthCheck))


def same(one, other):
    """Whether two values are equal and of equal types; a whole number equals a float."""
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return type(other) is dict and list(one) == list(other) and all(map(same, one.values(), other.values()))
    kinds = {type(one), type(other)}
    return (len(kinds) == 1 or kinds == {int, float}) and (one == other or one != one)


@pytest.mark.parametrize("hint", TYPES, ids=str)
@pytest.mark.fault(row="K3", given="any value of any type of option: a tab, blanks at the ends, quotes, the word none, nested lists", right="its text is read as the value")
def test_the_text_of_a_value_is_read_as_the_value(hint):
    @given(value=TYPES[hint])
    @settings(MORE, max_examples=60)
    def check(value):
        text = format_value(value, hint)
        assert text.isprintable()
        assert same(parse_value(text, hint), value), text
    check()


def options_of(strategies):
    """A plugin class with an option of each type, called flag, a, b and so on."""
    names = ["flag", *(f"option{number}" for number in range(1, len(strategies)))]
    fields = [(name, hint, field(default=None)) for name, hint in zip(names, strategies, strict=True)]
    return make_dataclass("Subject", [*fields, ("options", dict, field(default_factory=dict))], eq=False), dict(zip(names, strategies.values(), strict=True))


SUBJECT, STRATEGIES = options_of(TYPES)


@given(values=st.fixed_dictionaries({}, optional=STRATEGIES), others=st.dictionaries(st.sampled_from(["gamma", "flag", "a b", "x,y=1"]), ANY, max_size=3))
@MORE
@pytest.mark.fault(row="K", given="a plugin with 25 options of any value, and others collected for a torch class, through run.toml", right="the same options")
def test_all_options_of_a_plugin_survive_a_configuration_file(values, others):
    plugin = SUBJECT(**values, options=others)
    spec = to_spec("it", plugin)
    (again,) = tomllib.loads(f"plugin = {json.dumps([spec], ensure_ascii=False)}")["plugin"]
    assert TextType().convert(again, None, None) == spec
    read = parse_options("it", again.removeprefix("it").removeprefix(":"), plugin_options(SUBJECT))
    for name, value in values.items():
        assert same(read.get(name), value), (name, spec)
    found = read.get("options", {})
    assert found.keys() == others.keys()
    assert all(same(found[key], others[key]) for key in others), spec
