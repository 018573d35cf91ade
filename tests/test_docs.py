"""What the pages in docs/ say works, word for word."""
import inspect
import re
from pathlib import Path

import pytest

from loopctl import fit, hooks
from loopctl.compose import SPECS
from loopctl.find import name_of

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
