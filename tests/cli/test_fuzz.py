"""Fuzz tests of the command line: options of plugins and of commands with random values, right and wrong.

Each command line must be accepted, or refused with a one-line error before anything is trained, without leaving a file.
hypothesis runs with `derandomize`, so the examples are the same in every run.
"""
import json
import math
import shlex
from contextlib import chdir
from dataclasses import MISSING
from functools import cache
from string import digits

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopctl import UsageError, available, load
from loopctl.cli import main
from loopctl.composition.compose import compose
from loopctl.composition.discovery import build_plugin
from loopctl.composition.option_types import FLOAT32_MAX, describe_type
from loopctl.composition.options import plugin_options, to_spec

ODD = [
    "", " ", "none", "true", "no", "nan", "inf", "-inf", "-0", "0", "1", "-1", "2", "0.5", "1e400", "-1e400", "1e308", "1e-320",
    "1e39", "1_0", "0x10", "٣", "+1", ".5", "5.", "1e3", "9" * 400, "9" * 5000, str(2**63), str(2**63 - 1), "x" * 3000,
    "5ep", "3st", "10%", "0%", "200%", "nanep", "infst", "1e9ep", "1e308ep", "1e-323%", "5 ep", "-1ep", "%", "ep",
    "a b", "'x'", '"', "\n", "a\nb", "\0", "\x1b[31m", "\ud800", "é", "💥", "\u2028", "[/x]", "{0}", "%s", "$HOME",
    "1,2", "1,,2", ",", "1,", ",1", "a=b", "=", "a=1,a=2", "0=0.1,2=x3", "1:2", ":", "a:b", "::", "math:pi", "math:exp",
    "math:nope", "nope:nope", "math", "builtins:str", "builtins:int.bit_length", ".", "..", "/", "a/b", "*", "?", "[", "/(/",
    "/a{99999999999}/",
]
WRONG = st.sampled_from(["", "nan", "inf", "-1", "0", "1e39", "1e400", "1_0", "٣", "0x10", str(2**63), "9" * 400, "1,,2", "1,", "\n"])
COUNT, NUMBER = st.integers(1, 9).map(str), st.floats(0, 2).map(str)
ANYTHING = st.sampled_from(ODD) | st.text(max_size=12) | st.floats().map(str) | st.integers().map(str) | NUMBER
RIGHT = {"whole number": COUNT, "number": NUMBER, "true|false": st.sampled_from(["true", "no"]),
         "import path": st.sampled_from(["math:cos", "math:pi", "builtins:int.bit_length"]),
         "duration": st.builds("{}{}".format, COUNT, st.sampled_from(["", "ep", "st", "%"]))}
MORE = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
# Values of the required options, with which the other options of the plugin can be tried.
REQUIRED = {"t_0": "1", "base_lr": "0.01", "max_lr": "0.1", "gamma": "0.9", "lr_lambda": "math:cos", "milestones": "1",
            "step_size": "1", "limit": "1h", "cls": "torch.optim.lr_scheduler:ExponentialLR",
            "amount": "0.5", "target_modules": "1", "teacher": "loopctl.testing.tiny:tiny_model"}


def either(*strategies):
    """Values of one of several strategies, all equally likely. With `|`, a strategy of several parts is likelier."""
    return st.integers(0, len(strategies) - 1).flatmap(strategies.__getitem__)


def mostly(right):
    """Values of the strategy `right` in most cases, otherwise wrong numbers or any text."""
    return either(right, right, right, WRONG, ANYTHING)


def valid_values(option):
    """Values of an option's type, or of the first of its types."""
    kind = describe_type(option.type)
    if "|" in kind and kind not in RIGHT:
        return st.sampled_from(kind.split(" or ")[-1].split("|"))
    return next((values for word, values in RIGHT.items() if word in kind), st.sampled_from(["1", "val_loss", "a,b"]))


@cache
def plugin_cases():
    """Every option of every installed plugin, with its values and the required options of the plugin."""
    cases = []
    for name in available():
        known = plugin_options(load(name))
        missing = [option.name for option in known.values() if option.default is MISSING]
        required = {key: REQUIRED[key] for key in missing} | ({"gamma": "0.9"} if name == "torch_scheduler" else {})
        cases += [(name, required, key, mostly(valid_values(option))) for key, option in known.items()]
        cases += [(name, required, "gamma", ANYTHING), (name, required, "qqq", ANYTHING)]
    return cases


@st.composite
def plugin_specs(draw):
    """A plugin with its required options and one more, sometimes two, of any value."""
    name, required, option, values = draw(st.sampled_from(plugin_cases()))
    options = required | {option: draw(values)}
    if draw(st.integers(0, 3)) == 0:
        _, _, other, values = draw(st.sampled_from([case for case in plugin_cases() if case[0] == name]))
        options |= {other: draw(values)}
    comma = ",," if draw(st.integers(0, 9)) == 0 else ","
    return f"{name}:{comma.join(f'{key}={value}' for key, value in options.items())}"


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Run a command. Assert that it succeeds, or prints an error of one line, and leaves the folder unchanged."""
    folder = tmp_path_factory.mktemp("folder")
    (folder / "file").write_text("x")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("the only copy")
    before = contents(folder)

    def call(*words, failing=(2,)):
        with chdir(folder):
            result = CliRunner().invoke(main, list(words))
        command = shlex.join(words)
        assert result.exception is None or isinstance(result.exception, SystemExit), command
        assert result.exit_code in (0, *failing), command
        assert "Traceback" not in result.output, command
        if result.exit_code:
            assert result.stderr.startswith("error: "), command
            assert result.stderr.endswith("\n"), command
            assert result.stderr[:-1].isprintable(), command
            assert len(result.stderr) < 500, command
            assert result.stdout == "", command
        else:
            assert result.stderr == "", command
        assert contents(folder) == before, command
    return call


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# Without training


MAY_BE_INFINITE = [("clip", "max_norm"), ("clip", "norm_type")]


@given(text=plugin_specs())
@settings(MORE, max_examples=300)
def test_a_plugin_is_refused_or_built_again_from_its_own_spec(text):
    try:
        name, plugin = build_plugin(text)
    except UsageError:
        return
    values = {key: getattr(plugin, key) for key in plugin_options(type(plugin))}
    for key, value in values.items():
        if isinstance(value, int | float):
            limit = 2**63 - 1 if isinstance(value, int) else FLOAT32_MAX
            assert abs(value) <= limit or (value == math.inf and (name, key) in MAY_BE_INFINITE), text
    try:
        compose([plugin])
        spec = to_spec(name, plugin)
    except UsageError:
        return
    _, rebuilt = build_plugin(spec)
    assert {key: getattr(rebuilt, key) for key in values} == values, text


@given(text=plugin_specs(), command=st.sampled_from(["explain", "lr"]))
@settings(MORE, max_examples=150)
def test_a_plugin_is_explained_or_refused(call, text, command):
    call(command, "--model", "linear", "--optimizer", "sgd:momentum=0.9", "--epochs", "3", "--plugin", text, failing=(1, 2))


PATHS = ["os:path", "os:getcwd", "builtins:int", "torch.nn:Linear", "loopctl.run:Run", "loopctl.plugins.clip:Clip:max_norm=1", ":x", ".:x",
         "clip.py", "nope.py:X", f"{'x' * 300}.py:Mine", "x:", "clip:,"]


@given(text=either(st.sampled_from([*available(), *PATHS]), st.sampled_from(PATHS), ANYTHING, plugin_specs()))
@settings(MORE, max_examples=100)
def test_the_page_of_a_plugin_is_shown_or_refused(call, text):
    call("plugins", text)


def small_or_absurd(value):
    """Whether a value is small, or so large that it is refused. Values in between would take much memory or time."""
    try:
        return not 64 < abs(float(value)) < 1e8
    except ValueError:
        return not any(part.strip(digits) == "" and len(part) > 2 for part in value.split(","))


WORDS, PAIR = st.sampled_from(["true", "no", "none", "strong_wolfe"]), st.builds("{},{}".format, NUMBER, NUMBER)
MODELS = {"linear": {"image_size": COUNT}, "mlp": {"width": COUNT, "dropout": NUMBER},
          "cnn": {"width": COUNT, "dropout": NUMBER, "in_channels": COUNT},
          "vit": {"patch_size": COUNT, "width": COUNT, "depth": COUNT, "heads": COUNT, "dropout": NUMBER},
          "resnet18": {"weights": WORDS, "zero_init_residual": WORDS, "num_classes": COUNT}}
DATA = {"digits": {"channels": COUNT}, "fake": {"size": COUNT, "image": COUNT, "classes": COUNT, "channels": COUNT},
        "mnist": {"channels": COUNT}, "imagefolder": {"size": COUNT, "augment": WORDS}, "nothing": {}}
OPTIMIZERS = {"sgd": {"lr": NUMBER, "momentum": NUMBER, "nesterov": WORDS, "foreach": WORDS}, "rprop": {"etas": PAIR, "step_sizes": PAIR},
              "adamw": {"lr": NUMBER, "betas": PAIR, "eps": NUMBER, "amsgrad": WORDS, "fused": WORDS},
              "adafactor": {"eps": PAIR, "d": NUMBER}, "lbfgs": {"tolerance_grad": NUMBER, "line_search_fn": WORDS}}


@given(kind=st.sampled_from([("model", MODELS), ("data", DATA), ("optimizer", OPTIMIZERS)]), data=st.data())
@settings(MORE, max_examples=150)
def test_a_model_a_data_set_or_an_optimizer_is_accepted_or_refused(call, kind, data):
    flag, known = kind
    name = data.draw(st.sampled_from(sorted(known)))
    option = data.draw(st.sampled_from([*known[name], "qqq"]))
    value = data.draw(mostly(known[name].get(option, NUMBER)).filter(small_or_absurd))
    others = () if flag == "model" else ("--model", "linear")
    call("explain", *others, f"--{flag}", f"{name}:{option}={value}")


COUNTS = mostly(COUNT)
FLAGS = {"--epochs": COUNTS, "--max-steps": COUNTS, "--eval-every": COUNTS, "--batch-size": COUNTS, "--seed": COUNTS,
         "--workers": ANYTHING.filter(lambda value: not value.strip("+- ").isdecimal() or not 0 < int(value[:99]) < 10**6),
         "--lr": mostly(NUMBER), "--device": mostly(st.just("cpu")), "--model": mostly(st.just("linear")),
         "--data": mostly(st.just("digits")), "--optimizer": mostly(st.sampled_from(["sgd", "lbfgs"])),
         "--without": mostly(st.just("csv")), "--config": ANYTHING, "--data-root": mostly(st.just("a b/é")),
         "--plugin": mostly(st.sampled_from(["warmup", "csv", "freeze:patterns=1"])), "--qqq": ANYTHING}


@given(values=st.dictionaries(st.sampled_from(sorted(FLAGS)), st.data(), min_size=1, max_size=3))
@settings(MORE, max_examples=150)
def test_command_line_options_are_accepted_or_refused(call, values):
    words = [word for flag, data in values.items() for word in (flag, data.draw(FLAGS[flag]))]
    call("explain", *(() if "--model" in values else ("--model", "linear")), *words)


ATOMS = st.booleans() | st.integers() | st.floats() | ANYTHING | st.none()
GOOD = {"epochs": st.integers(1, 9), "lr": st.floats(0, 9), "model": st.just("linear"), "plugin": st.just(["clip"]),
        "without": st.just(["csv"]), "seed": st.integers(0, 2**64 - 1), "download": st.booleans(), "data_root": st.just("data")}
VALUES = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3))
ROWS = st.sampled_from(sorted(GOOD)).flatmap(lambda key: st.tuples(st.just(key), either(*[GOOD[key]] * 5, VALUES)))
ROW = either(*[ROWS] * 9, st.tuples(st.sampled_from(["out", "qqq"]) | st.text(), VALUES))


def toml(value):
    """`value` as TOML, which has no null: None is a date."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return "1979-05-27" if value is None else json.dumps(value)


FILES = st.lists(ROW, max_size=4).map(lambda rows: "\r\n".join(f"{json.dumps(key)} = {toml(value)}" for key, value in rows))


@given(content=either(FILES.map(str.encode), FILES.map(str.encode), st.text(max_size=60).map(str.encode), st.binary(max_size=60)))
@settings(MORE, max_examples=200)
def test_a_configuration_file_is_accepted_or_refused(call, tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_bytes(content)
    call("explain", "--config", str(file), "--model", "linear", "--optimizer", "sgd", "--epochs", "2", "--device", "cpu")


# With training, of one step if the command line is accepted


NAMES = st.sampled_from(["a b", "é", "💥", "-x", "--", "#", "'", '"', "\\", "[/x]", "a\nb", "a\nlr = 9", "a\0b", "a\x7fb", "\ud800", "x" * 300])


@given(folder=either(NAMES, ANYTHING.filter(lambda name: name.strip() and "/" not in name)), flag=st.sampled_from(["--out", "--out", "--resume"]))
@settings(MORE, max_examples=40)
def test_a_folder_of_any_name_is_accepted_or_refused(tmp_path_factory, folder, flag):
    parent = tmp_path_factory.mktemp("out")
    with chdir(parent):
        result = CliRunner().invoke(main, ["run", "--model", "linear", "--max-steps", "1", "--batch-size", "2000",
                                           "--without", "checkpoint", "--plugin", "progress", flag, folder])
    assert "Traceback" not in result.output
    if result.exit_code:
        assert result.exit_code in (1, 2)
        assert result.stderr[:-1].isprintable()
        assert len(result.stderr) < 500
        assert not list(parent.iterdir())
    else:
        with chdir(parent):
            again = CliRunner().invoke(main, ["explain", "--config", f"{folder}/run.toml"])
        assert again.exit_code == 0, again.stderr
