"""The pages in docs/: their commands and examples work as written, and the names on them exist."""
import ast
import html
import inspect
import re
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

import loopctl
from loopctl import available, fit, hooks
from loopctl.cli import main
from loopctl.composition.compose import SPECS
from loopctl.composition.discovery import build_plugin, plugin_name

DOCS = Path(__file__).parents[1] / "docs"


def blocks(text, kind="python"):
    return re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


PAGE = (DOCS / "hooks.md").read_text()
IMPORTS = blocks(PAGE)[0]
HOOKS = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", PAGE, re.DOTALL | re.MULTILINE))


def test_the_page_of_hooks_has_all_hooks_in_order():
    assert list(HOOKS) == list(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_the_page_shows_the_signature_of_a_hook(name):
    signature = inspect.signature(getattr(hooks, name))
    shown, example = blocks(HOOKS[name])
    assert shown == f"def {name}{signature}\n".replace("'", "")
    assert f"    def {name}(self" in example
    replaces = SPECS[name].loopctl_spec["firstresult"] and name != "train"
    assert not replaces or re.search("[Rr]eplace", HOOKS[name]) or name == "micro_step"


@pytest.mark.parametrize("name", SPECS)
def test_the_example_of_a_hook_trains(name, net, batches, valid, sgd):
    scope = {}
    exec(IMPORTS, scope)
    before = set(scope)
    exec(blocks(HOOKS[name])[1], scope)
    (cls,) = (scope[found] for found in set(scope) - before if isinstance(scope[found], type))
    run = fit(net, scope["nn"].CrossEntropyLoss(), sgd, batches, valid, epochs=2, plugins=[cls()])
    assert run.hook.acting[name] == [plugin_name(cls)]
    assert run.epoch == 2
    assert cls.__doc__


TUTORIAL = (DOCS / "tutorial.md").read_text()


def test_the_tutorial_works_as_written(tmp_path, monkeypatch):
    """Its files are written, and its commands and its Python are run, in the order of the page."""
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


def test_the_page_on_tasks_works_as_written(tmp_path, monkeypatch):
    """The file of its command-line section is written, and its commands and its other Python are run."""
    monkeypatch.chdir(tmp_path)
    ran, scope = 0, {"__name__": "page"}        # the Python goes on from block to block
    for kind, block in re.findall(r"```(console|python)\n(.*?)```", (DOCS / "tasks.md").read_text(), re.DOTALL):
        if "def data(" in block:
            Path("regression.py").write_text(block)
        elif kind == "python":
            exec(block, scope)
        else:
            for command in re.findall(r"^\$ (loopctl .*)$", block, re.MULTILINE):
                done = CliRunner().invoke(main, shlex.split(command)[1:])
                assert done.exit_code == 0, done.output
                ran += 1
    assert ran > 2


def specs(text):
    """The plugin specs in the right column of a page's tables."""
    cells = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ") and " | " in line]
    words = [word for cell in cells for word in re.findall(r"`([^`]+)`", cell)]
    return sorted({word for word in words if word.split(":")[0] in available()})


@pytest.mark.parametrize("spec", specs((DOCS / "coming-from.md").read_text()))
def test_a_plugin_spec_on_the_page_for_users_of_other_libraries_is_valid(spec):
    build_plugin(spec)


def test_the_hooks_and_options_on_the_page_for_users_of_other_libraries_exist():
    page = (DOCS / "coming-from.md").read_text()
    cells = " ".join(line.split(" | ")[1] for line in page.splitlines() if line.startswith("| ") and " | " in line)
    known = {*available(), *SPECS, "fit", *inspect.signature(fit).parameters}
    assert set(re.findall(r"`([a-z_]+)`", cells)) <= known
    options = {option for command in main.commands.values() for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(--[a-z-]+)", cells)) <= options


# docs/api.md


def rooms_of_plugins():
    """The modules of loopctl that the built-in plugins import, besides loopctl itself."""
    found = set()
    for path in (DOCS.parent / "plugins").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [(node.module, alias.name) for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            for module, name in names:
                if module.startswith("loopctl."):
                    inner = f"{module}.{name}"
                    found.add(inner if find_spec(module).submodule_search_locations and find_spec(inner) else module)
    return sorted(found)


API = (DOCS / "api.md").read_text()


@pytest.mark.parametrize("name", loopctl.__all__)
def test_every_exported_name_is_on_the_api_page(name):
    assert re.search(rf"^\.\. (?:auto|py:)\w+:: loopctl\.{name}\b", API, re.MULTILINE)


@pytest.mark.parametrize("module", rooms_of_plugins())
def test_every_module_that_a_plugin_imports_is_on_the_api_page(module):
    assert f"### `{module}`\n\n```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n" in API


def dense(text):
    """The text without spaces, backticks and the dashes of lists, which differ between a docstring and its page."""
    return re.sub(r"[\s`]+|^\s*- ", "", text, flags=re.MULTILINE)


def documented(module):
    """The functions and classes of a module that have a docstring, by their full names."""
    return {f"{module.__name__}.{name}": one for name, one in vars(module).items()
            if name[0] != "_" and getattr(one, "__module__", "") == module.__name__ and callable(one) and vars(one).get("__doc__", one.__doc__)}


def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    site = tmp_path / "site"
    done = subprocess.run([sys.executable, "-m", "sphinx", "-W", "-q", DOCS, site, "-d", tmp_path / "trees"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in available():
        assert (site / "generated" / f"{name}.html").exists()
    for picture in re.findall(r"!\[\w+\]\(gallery/(\w+\.svg)\)", (DOCS / "gallery.md").read_text()):
        assert (site / "_images" / picture).exists()
    page = (site / "api.html").read_text()
    shown = dense(html.unescape(re.sub(r"<[^>]+>", "", page)))
    known = {f"loopctl.{name}": getattr(loopctl, name) for name in loopctl.__all__}
    assert [name for name in known if f'id="{name}"' not in page] == []
    known = {name: one for name, one in known.items() if name not in ("loopctl.__version__", "loopctl.Duration", "loopctl.hookimpl")}
    for module in rooms_of_plugins():
        found = documented(import_module(module))
        assert [name for name in found if f'id="{name}"' not in page] == []
        known |= found
    for one in known.values():                          # word for word
        for paragraph in inspect.getdoc(one).split("\n\n"):
            assert dense(paragraph) in shown
