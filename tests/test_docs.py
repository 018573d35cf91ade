"""What the pages in docs/ say works, word for word."""
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from loopctl import available, fit, hooks
from loopctl.cli import main
from loopctl.compose import SPECS
from loopctl.find import build, name_of

DOCS = Path(__file__).parents[1] / "docs"


def blocks(text, kind="python"):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


PAGE = (DOCS / "hooks.md").read_text()
IMPORTS = blocks(PAGE)[0]
HOOKS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))


def test_every_hook_has_its_place_in_order():
    assert list(HOOKS) == list(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_a_hook_is_shown_as_it_is(name):
    signature = inspect.signature(getattr(hooks, name))
    shown, example = blocks(HOOKS[name])
    assert shown == f"def {name}{signature}\n".replace("'", "")
    assert f"    def {name}(self" in example
    replaces = SPECS[name].loopctl_spec["firstresult"] and name != "train"
    assert not replaces or re.search("[Rr]eplace", HOOKS[name]) or name == "micro_step"


@pytest.mark.parametrize("name", SPECS)
def test_its_example_trains(name, net, batches, valid, sgd):
    scope = {}
    exec(IMPORTS, scope)
    before = set(scope)
    exec(blocks(HOOKS[name])[1], scope)
    (cls,) = (scope[found] for found in set(scope) - before if isinstance(scope[found], type))
    run = fit(net, scope["nn"].CrossEntropyLoss(), sgd, batches, valid, epochs=2, plugins=[cls()])
    assert run.hook.acting[name] == [name_of(cls)]
    assert run.epoch == 2
    assert cls.__doc__


TUTORIAL = (DOCS / "tutorial.md").read_text()


def test_the_tutorial_word_for_word(tmp_path, monkeypatch):
    """Its files are written, its commands are run, and its Python, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    scope = {}
    for kind, block in re.findall(r"```(console|python)\n(.*?)```", TUTORIAL, re.DOTALL):
        if "def model(" in block:
            Path("mine.py").write_text(block)
        elif kind == "python":
            exec(block, scope)
        else:
            for command in re.findall(r"^\$ (loopctl .*)$", block, re.MULTILINE):
                done = CliRunner().invoke(main, shlex.split(command)[1:])
                assert done.exit_code == 0, done.output
    assert scope["run"].history[-1]["val_loss"] < 0.05
    listed = set(re.findall(r"^\| `([\w./]+)`", TUTORIAL, re.MULTILINE))
    assert {path.name for path in (tmp_path / "runs" / "first").iterdir()} == {name.rstrip("/") for name in listed}


def specs(text):
    """What is written as a plugin in the right column of a page's tables."""
    cells = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ") and " | " in line]
    words = [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]
    return sorted({word for word in words if word.split(":")[0] in available()})


@pytest.mark.parametrize("spec", specs((DOCS / "coming-from.md").read_text()))
def test_what_other_libraries_do_is_written_as_it_is_here(spec):
    build(spec)


def test_the_hooks_and_options_it_names_exist():
    page = (DOCS / "coming-from.md").read_text()
    cells = " ".join(line.split(" | ")[1] for line in page.splitlines() if line.startswith("| ") and " | " in line)
    known = {*available(), *SPECS, "fit"}
    assert set(re.findall(r"`([a-z_]+)`", cells)) <= known
    options = {option for command in main.commands.values() for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(--[a-z-]+)", cells)) <= options


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    done = subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", DOCS, tmp_path / "site", "-d", tmp_path / "trees"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in available():
        assert (tmp_path / "site" / "generated" / f"{name}.html").exists()
