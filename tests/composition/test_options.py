"""Options of plugins: fields of a dataclass, parsed from text, checked, and formatted as text."""
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from loopctl import Duration, UsageError, available, load
from loopctl.composition.compose import compose
from loopctl.composition.discovery import build_plugin
from loopctl.composition.option_types import describe_type, format_value, guess_value
from loopctl.composition.options import check_options, parse_options, plugin_options, to_spec


@dataclass(eq=False)
class Everything:
    """Has an option of each type.

    number: a real number,
        on two lines
    flag: yes or no
    """

    number: float
    whole: int = 1
    flag: bool = False
    text: str = "a"
    path: Path = Path("x")
    kind: Literal["one", "two"] = "one"
    maybe: float | None = None
    length: Duration = 5
    t_max: Duration | None = None
    milestones: list[int] = field(default_factory=lambda: [30, 80])
    rates: dict[str, float] = field(default_factory=dict)
    function: Callable | None = None
    upper: Annotated[float, "or inf"] | None = None
    scale: float = float("inf")


KNOWN = plugin_options(Everything)


def parse(text):
    return parse_options("it", text, KNOWN)


def test_the_help_of_an_option_is_read_from_the_docstring():
    assert KNOWN["number"].help == "a real number, on two lines"
    assert KNOWN["flag"].help == "yes or no"
    assert KNOWN["milestones"].default == [30, 80]


@pytest.mark.parametrize(("text", "value"), [
    ("number=1e-3", 1e-3), ("upper=inf", float("inf")), ("scale=inf", float("inf")), ("scale=2", 2.0), ("whole=-3", -3), ("flag=true", True), ("flag=no", False),
    ("text=a b", "a b"), ("text=", ""), ("text=a,b", "a,b"), ("path=a/b", Path("a/b")), ("kind=two", "two"),
    ("maybe=none", None), ("maybe=2", 2.0), ("length=7", 7), ("length=2.5", 2.5), ("length=10%", "10%"), ("length=3ep", "3ep"),
    ("t_max=none", None), ("t_max=500st", "500st"), ("milestones=1,2,3", [1, 2, 3]), ("milestones=4", [4]),
    ("rates=conv1.*=0.01,fc.*=0.1", {"conv1.*": 0.01, "fc.*": 0.1}), ("function=math:sqrt", __import__("math").sqrt),
])
def test_text_is_parsed_to_a_value_of_the_options_type(text, value):
    parsed = next(iter(parse(text).values()))
    assert parsed == value
    assert type(parsed) is type(value)


def test_lists_and_mappings_continue_over_commas():
    assert parse("milestones=30,80,whole=2,rates=a=1,b=2,number=3") == {
        "milestones": [30, 80], "whole": 2, "rates": {"a": 1.0, "b": 2.0}, "number": 3.0}


@pytest.mark.parametrize(("text", "message"), [
    ("nubmer=1", "it: no option 'nubmer'; did you mean 'number'"),
    ("zzz=1", "it: no option 'zzz'; it has: flag, function"),
    ("5", "it: '5' is not option=value"),
    ("number=abc", "it: number takes a number, not 'abc'"),
    ("whole=1.5", "it: whole takes a whole number, not '1.5'"),
    ("flag=maybe", "it: flag takes true|false, not 'maybe'"),
    ("kind=three", "it: kind takes one|two, not 'three'"),
    ("maybe=x", "it: maybe takes a number, not 'x'"),
    ("length=5x", "it: length takes a duration, not '5x'"),
    ("t_max=-1", "it: t_max takes a duration above 0, not '-1'"),
    ("length=0%", "it: length takes a duration above 0, not '0%'"),
    ("milestones=1,b", "it: milestones takes a list of whole numbers, not '1,b'"),
    ("function=math:sqr", "it: function: math has no 'sqr'; did you mean 'sqrt'"),
    ("function=no_such_module:f", "it: function: no_such_module cannot be imported"),
    ("whole=1,whole=2", "it: option whole is given twice"),
    ("number=inf", "it: number takes a number of at most 3.4e38, not 'inf'"),
    ("number=nan", "it: number takes a number of at most 3.4e38, not 'nan'"),
    ("number=1e39", "it: number takes a number of at most 3.4e38, not '1e39'"),
    ("number=1_0", "it: number takes a number, not '1_0'"),
    ("number=٣", "it: number takes a number, not '٣'"),
    ("maybe=inf", "it: maybe takes a number of at most 3.4e38, not 'inf'"),
    ("whole=1_000", "it: whole takes a whole number, not '1_000'"),
    ("whole=9223372036854775808", "it: whole takes a whole number below 2**63, not '9223372036854775808'"),
    ("length=٣", "it: length takes a duration, not '٣'"),
    ("length=1e16", "it: length takes a duration from 1e-9 to 1e15, not '1e16'"),
    ("length=1e-10%", "it: length takes a duration from 1e-9 to 1e15, not '1e-10%'"),
    ("milestones=1,,2", "it: milestones takes a list of whole numbers, not '1,,2'"),
    ("number=1,", "it: number takes a number, not '1,'"),
    (",number=1", "it: '' is not option=value"),
    ("rates=a=1,a=2", "it: rates takes each name only once; 'a' is given twice"),
    ("function=math:pi", "it: function takes a function or class; math:pi is a float"),
    ("function=math", "it: function takes an import path, package.module:name or file.py:name, not 'math'"),
])
def test_wrong_options_are_refused_with_what_is_allowed(text, message):
    with pytest.raises(UsageError) as refused:
        parse(text)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(("values", "message"), [
    ({"number": "x"}, "number takes a number, not 'x'"),
    ({"number": True}, "number takes a number, not True"),
    ({"number": 1, "whole": 2.0}, "whole takes a whole number, not 2.0"),
    ({"number": 1, "kind": "three"}, r"kind takes one\|two, not 'three'"),
    ({"number": 1, "length": "5x"}, "length takes a duration, not '5x'"),
    ({"number": 1, "t_max": 0}, "t_max takes a duration above 0, not 0"),
    ({"number": 1, "maybe": "2"}, "maybe takes a number, not '2'"),
    ({"number": float("nan")}, "number takes a number, not nan"),
    ({"number": 10**400}, "number takes a number, not 1000"),
    ({"number": 1, "whole": 2**63}, "whole takes a whole number, not 9223372036854775808"),
    ({"number": 1, "length": True}, "length takes a duration, not True"),
    ({"number": 1, "function": 3.14}, r"function takes an import path, package.module:name or file.py:name, not 3.14"),
])
def test_values_set_by_python_code_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        check_options(Everything(**values))


def test_allowed_values_pass_the_check():
    check_options(Everything(number=1, maybe=2, length="5ep", t_max=None, milestones=(1,), function=print))
    check_options(Everything(number=1, upper=float("inf"), scale=float("nan"), length=1))       # caches 1, which equals True


def test_values_are_formatted_as_text_that_is_parsed_to_the_same_values():
    import math
    one = Everything(number=0.1 + 0.2, flag=True, length="10%", milestones=[1, 2], rates={"a.*": 0.5, "b": 1e-9}, function=math.sqrt)
    again = Everything(**parse(to_spec("it", one).removeprefix("it:")))
    assert vars(again) == vars(one)


@pytest.mark.parametrize("name", sorted(available()))
def test_the_text_of_a_built_in_builds_it_again_with_equal_options(name, example):
    cls = load(name)
    _, first = build_plugin(example(name))
    _, again = build_plugin(to_spec(name, first))
    assert {key: getattr(first, key) for key in plugin_options(cls)} == {key: getattr(again, key) for key in plugin_options(cls)}


@pytest.mark.parametrize("name", sorted(available()))
def test_every_option_of_a_built_in_has_a_type_and_help(name):
    cls = load(name)
    assert cls.__doc__
    assert len(cls.__doc__.split("\n")[0]) <= 90
    for option in plugin_options(cls).values():
        assert option.help, f"{name}: {option.name}"
        assert describe_type(option.type) != "a value", f"{name}: {option.name}"


def test_an_option_called_options_collects_unknown_options():
    @dataclass(eq=False)
    class Adapter:
        cls: str
        options: dict = field(default_factory=dict)

    values = parse_options("it", "cls=X,milestones=30,80,gamma=0.1,verbose=false", plugin_options(Adapter))
    assert values == {"cls": "X", "options": {"milestones": (30, 80), "gamma": 0.1, "verbose": False}}
    assert to_spec("it", Adapter(**values)) == "it:cls=X,milestones=30,80,gamma=0.1,verbose=false"


def test_untyped_text_is_converted_to_what_it_looks_like():
    assert guess_value("0.9,0.95") == (0.9, 0.95)
    assert [guess_value(text) for text in ("1", "1e-3", "true", "None", "abc")] == [1, 1e-3, True, None, "abc"]
    assert format_value((0.9, True, None)) == "0.9,true,none"


@pytest.mark.parametrize("text", ["nan", "-inf", "1e39", "0.9,inf", "9" * 20])
def test_untyped_numbers_that_are_not_finite_or_too_large_are_refused(text):
    with pytest.raises(ValueError, match="^takes a "):
        guess_value(text)


def test_unknown_options_are_merged_with_those_given_as_a_mapping():
    @dataclass(eq=False)
    class Adapter:
        options: dict = field(default_factory=dict)

    known = plugin_options(Adapter)
    assert parse_options("it", "gamma=0.1,options=step=3", known) == {"options": {"step": 3, "gamma": 0.1}}
    with pytest.raises(UsageError, match="it: option step is given twice"):
        parse_options("it", "step=1,options=step=3", known)


def test_a_function_without_an_import_path_cannot_be_formatted():
    with pytest.raises(UsageError, match="has no import path, so it cannot be saved"):
        format_value(lambda epoch: 1.0)


@pytest.mark.parametrize("text", ["clip:max_norm=0", "clip:max_norm=nan", "clip:max_norm=1,value=1", "accumulate:every=0",
                                  "cosine:eta_min=-1", "warmup:start_factor=-1", "early_stopping:patience=0", "amp:init_scale=0",
                                  "checkpoint:every_epochs=0"])
def test_options_out_of_range_are_refused(text):
    with pytest.raises(UsageError, match=f"^{text.partition(':')[0]}: "):
        compose([text])
