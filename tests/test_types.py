"""Hooks are typed: what a plugin is given, what it returns, and what `run.hook` has."""
import ast
import re
from pathlib import Path
from textwrap import dedent

import pytest

from loopctl import UsageError, fit, hookimpl
from loopctl.composition.compose import FLAGS, SPECS, compose

ROOT = Path(__file__).parents[1]
FILES = [path for folder in ("core", "plugins", "cli", "docs/examples") for path in sorted((ROOT / folder).rglob("*.py")) if not path.name.startswith("test_")]
TEMPLATES = [path for path in sorted((ROOT / "cli" / "templates").glob("*.txt")) if "@hookimpl" in path.read_text()]
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "@hookimpl" in path.read_text()]


def sources(path):
    """The Python in a file: all of it, or the blocks of a page."""
    text = path.read_text()
    if path.suffix != ".md":
        return [text]
    return [dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE) if "@hookimpl" in block]


def hook_methods(source):
    """The functions in it that are marked with @hookimpl."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any("hookimpl" in ast.unparse(mark) for mark in node.decorator_list):
            yield node


@pytest.mark.parametrize("path", [*FILES, *TEMPLATES, *PAGES], ids=lambda path: str(path.relative_to(ROOT)))
def test_hook_methods_are_annotated_as_the_hooks_are(path):
    for source in sources(path):
        for method in hook_methods(source):
            for argument in method.args.args:
                if argument.arg != "self" and method.name in SPECS:
                    spec = SPECS[method.name].__annotations__[argument.arg]
                    assert argument.annotation is not None, f"{method.name}: {argument.arg} has no type"
                    assert ast.unparse(argument.annotation) == spec, f"{method.name}: {argument.arg} is of type {spec}"
            assert method.returns is not None, f"{method.name} has no return type"


def test_every_hook_method_that_is_looked_at_is_found():
    found = [method.name for path in [*FILES, *TEMPLATES, *PAGES] for source in sources(path) for method in hook_methods(source)]
    assert len(found) > 180
    assert set(SPECS) <= set(found)


def test_the_hooks_of_a_run_have_a_typed_method_each():
    """The methods are for type checkers only, so they are read from the source."""
    (cls,) = [node for node in ast.parse((ROOT / "core" / "composition" / "compose.py").read_text()).body
              if isinstance(node, ast.ClassDef) and node.name == "Hooks"]
    (typed,) = [node for node in cls.body if isinstance(node, ast.If)]
    names = [node.targets[0].id if isinstance(node, ast.Assign) else node.name for node in typed.body]
    assert sorted(names) == sorted(SPECS)
    for node in typed.body:
        if isinstance(node, ast.Assign):
            assert ast.unparse(node.value) == f"staticmethod(hooks.{node.targets[0].id})"


class Observes:
    @hookimpl
    def after_step(self):
        pass


@pytest.mark.parametrize(("flag", "nearest"), [
    ("observer_onyl", "observer_only"), ("observe_only", "observer_only"), ("rank_zero", "rank_zero_only"),
    ("rank0_only", "rank_zero_only"), ("capturabel", "capturable"), ("captureable", "capturable")])
@pytest.mark.parametrize("on_the_instance", [False, True])
def test_a_misspelt_flag_is_refused(flag, nearest, on_the_instance):
    cls = type("Mine", (Observes,), {} if on_the_instance else {flag: True})
    plugin = cls()
    if on_the_instance:
        setattr(plugin, flag, True)
    with pytest.raises(UsageError, match=f"^mine: no flag is called '{flag}'; did you mean '{nearest}'\\?$"):
        compose([plugin])


def test_flags_and_other_truth_values_are_taken(net, batches, sgd):
    cls = type("Mine", (Observes,), {**dict.fromkeys(FLAGS, True), "verbose": True, "only": False, "rank": True})
    assert fit(net, lambda output, target: output.sum(), sgd, batches, plugins=[cls()]).step == len(batches)
