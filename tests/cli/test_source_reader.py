"""Plugins and functions read from their source: it gives what importing them gives, or says that it cannot."""
import inspect
import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import torch
from click.testing import CliRunner

from loopctl.cli import catalogue, data, listing, main, models
from loopctl.cli.source_reader import SourceReader, Unreadable
from loopctl.composition.discovery import available, load
from loopctl.errors import UsageError

READ_ALONE = """
import sys
from loopctl.cli import listing
from loopctl.cli.source_reader import SourceReader
from loopctl.composition.discovery import available
for name, entry in available().items():
    SourceReader().class_of(entry.module, entry.attr)               # raises where it cannot be read
    print(listing.page(name), end="\\0")
assert not {"torch", "torchvision", "numpy"} & set(sys.modules)
"""


def test_the_page_of_every_built_in_is_the_same_without_importing_it():
    done = subprocess.run([sys.executable, "-c", READ_ALONE], capture_output=True, text=True, check=True)
    pages = done.stdout.split("\0")[:-1]
    built_in = [name for name, entry in available().items() if entry.module.startswith("loopctl.")]
    assert len(pages) == len(available()) >= len(built_in) > 40
    for name, page in zip(available(), pages, strict=True):
        assert page == listing.page(name, check=True)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a module that is not imported; return its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text, name="read_only"):
        (tmp_path / f"{name}.py").write_text(text)
        return name
    yield write
    assert not {"read_only", "read_base"} & set(sys.modules)


PLAIN = '''
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from loopctl import Duration, hookimpl

try:
    import resource
except ImportError:
    resource = None
DEFAULT = 2 * math.pi
KINDS = Literal["a", "b"]


@dataclass
class Mine:
    """Do something.

    length: how long
    """

    length: Duration = "5ep"
    kind: KINDS = "a"
    size: float = DEFAULT
    names: list[str] = field(default_factory=lambda: ["x", "y"])
    capturable: ClassVar[bool] = True
    topic = "mine"

    @hookimpl(wrapper=True)
    def train(self, run):
        return (yield)
'''


def test_defaults_constants_and_types_are_those_of_the_text(write):
    module = write(PLAIN)
    cls = SourceReader().class_of(module, "Mine")
    known = listing.plugin_options(cls)
    scope = {"__name__": module}
    exec(PLAIN, scope)
    assert known == listing.plugin_options(scope["Mine"])
    assert (cls.__doc__, cls.__qualname__, cls.__module__) == (scope["Mine"].__doc__, "Mine", module)
    assert cls.train.loopctl_impl["wrapper"]
    assert (cls.capturable, cls.topic) == (True, "mine")


def test_options_and_topic_of_a_base_class_in_another_module_are_inherited(write):
    write(PLAIN, "read_base")
    module = write("from dataclasses import dataclass\nfrom read_base import Mine as Base\n@dataclass\nclass Mine(Base):\n"
                   "    more: int = 3\n")
    reader = SourceReader()
    cls = reader.class_of(module, "Mine")
    assert list(listing.plugin_options(cls)) == ["length", "kind", "size", "names", "more"]
    assert reader.attribute(module, "Mine", "topic") == "mine"
    assert hasattr(cls.train, "loopctl_impl")


@pytest.mark.parametrize("text", [
    "import torch\nclass Mine:\n    kind: torch.dtype = torch.float32\n",
    "class Mine:\n    size = len([1])\n",
    "class Mine:\n    size = open('here')\n",
    "class Mine:\n    if True:\n        size = 1\n",
    "class Mine:\n    pass\nMine.size = 1\n",
    "class Mine:\n    pass\nMine = print\n",
    "def change(cls):\n    return cls\n@change\nclass Mine:\n    pass\n",
    "import a_package_that_is_missing\nclass Mine:\n    pass\n",
    "from loopctl import hookimpl\nfrom functools import cache\nclass Mine:\n    @cache\n    @hookimpl\n    def train(self): ...\n",
    "class Mine(metaclass=print):\n    pass\n",
    "class Mine(Base):\n    pass\n",
    "class Mine:\n    size = ().__class__\n",
    "from dataclasses import dataclass\n@dataclass\nclass Mine:\n    size: list = []\n",
    "def Mine(): ...\n",
    "class Mine\n",
    "",
])
def test_a_class_that_the_text_alone_does_not_describe_is_not_guessed(write, text):
    with pytest.raises(Unreadable):
        SourceReader().class_of(write(text), "Mine")


def test_nothing_of_a_plugin_runs_when_it_is_read(write, tmp_path):
    ran = tmp_path / "ran"
    module = write(f"def run():\n    open({str(ran)!r}, 'w')\nclass Mine:\n    size = run()\n")
    with pytest.raises(Unreadable):
        SourceReader().class_of(module, "Mine")
    assert not ran.exists()


@pytest.fixture
def installed(monkeypatch):
    """Install plugins by name: `name="module:Class"`."""
    def install(**entries):
        found = available() | {name: EntryPoint(name, value, "loopctl") for name, value in entries.items()}
        monkeypatch.setattr(listing, "available", lambda: found)
        monkeypatch.setattr(listing, "entry_point", found.__getitem__)
    return install


def test_a_plugin_of_another_package_declares_its_topic(write, installed):
    installed(mine=f"{write(PLAIN)}:Mine", bare=f"{write('class Mine: ...', 'read_base')}:Mine")
    sections = [section.splitlines() for section in listing.table(False)[0].split("\n\n")]
    topics = {section[0]: [line.split()[0] for line in section[1:]] for section in sections}
    assert topics["mine"] == ["mine"]
    assert topics["other"] == ["bare"]
    assert list(topics)[-1] == "other"
    assert "amp" in topics["precision and speed"]
    assert {"cosine", "plateau"} <= set(topics["learning-rate schedules"])
    assert {"ddp", "fsdp", "local_sgd"} == set(topics["several processes"])


def test_every_built_in_declares_a_topic_that_several_share():
    topics = [load(name).topic for name in available() if available()[name].module.startswith("loopctl.")]
    assert all(topics.count(topic) > 1 for topic in topics)


def found(word):
    return [line.split()[0] for line in listing.table(False, word)[0].splitlines() if line.startswith("  ")]


@pytest.mark.parametrize(("word", "names"), [
    ("nan_guard", ["nan_guard"]), ("NaN-Guard", ["nan_guard"]), ("super-convergence", ["onecycle"]), ("1506.01186", ["cyclic", "lr_finder"]),
    ("weight_decays", ["layerwise_lr"]), ("weight  decays", ["layerwise_lr"]), ("several processes", ["ddp", "fsdp"]), ("bucket cap", ["ddp"])])
def test_a_search_finds_plugins_by_name_help_topic_and_options(word, names):
    assert set(names) <= set(found(word))
    assert "csv" not in found(word)


def test_a_search_finds_options_of_a_base_class_and_plugins_that_cannot_be_read(write, installed):
    installed(bare=f"{write('class Mine: ...')}:Mine", odd=f"{write('class Odd(print()): pass', 'odd_one')}:Odd")
    assert {"cosine", "warmup"} <= set(found("count_from"))
    assert found("bare") == ["bare"]
    assert found("odd") == ["odd"]


@pytest.mark.parametrize(("words", "message"), [
    (["--search", "perpetual motion"], "error: --search perpetual motion: no plugin has this in its name, help or options; loopctl plugins lists all of them\n"),
    (["clip", "--search", "norm"], "error: plugins clip --search: one plugin is not searched; leave out one of the two\n")])
def test_a_search_that_finds_nothing_or_has_nothing_to_search_is_refused(words, message):
    result = CliRunner().invoke(main, ["plugins", *words])
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", message)


def test_a_field_called_topic_is_an_option_and_not_the_topic(write):
    module = write("from dataclasses import dataclass\n@dataclass\nclass Mine:\n    topic: str = 'news'\n")
    assert SourceReader().attribute(module, "Mine", "topic") == ""


def test_a_plugin_whose_package_is_missing_is_refused_as_before(write, installed, monkeypatch):
    installed(mine=f"{write('import a_package_that_is_missing' + PLAIN)}:Mine")
    monkeypatch.setattr(listing, "load_class", lambda head: load("read_only:Mine"))
    with pytest.raises(UsageError, match="No module named 'a_package_that_is_missing'"):
        listing.page("mine")


@pytest.mark.parametrize("kind", ["model", "data", "optimizer"])
def test_names_have_the_arguments_and_defaults_that_they_have_when_imported(kind):
    import torchvision

    real = {"model": lambda name: vars(models).get(name) or torchvision.models.get_model_builder(name),
            "data": lambda name: data.NAMES[name],
            "optimizer": lambda name: next(cls for key, cls in vars(torch.optim).items() if key.lower() == name)}[kind]
    places = catalogue.places(kind)
    for name, place in places.items():
        read, _ = SourceReader().signature(*place)
        there = inspect.signature(real(name)).parameters
        assert list(read.parameters) == list(there)
        for key, parameter in read.parameters.items():
            assert parameter.kind == there[key].kind
            assert parameter.default == there[key].default
    assert len(places) >= 8
