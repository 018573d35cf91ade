"""Which room may import from which: a new arrow between rooms is a decision, to be added here and explained."""
import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each room, or module at the top of core/, imports from. `Run` is left out where it is imported for its type alone.
ARROWS = {
    "errors": "",
    "rng": "",
    "counters": "",
    "determinism": "errors",
    "global_settings": "",
    "hooks": "",
    "optim": "errors hooks",
    "data": "errors rng",
    "distributed": "errors rng hooks optim data model",
    "metrics": "errors hooks distributed data",
    "model": "errors hooks data",
    "report": "errors metrics",
    "composition": "errors hooks optim data distributed model",
    "checkpoint": "errors rng counters hooks metrics optim data distributed composition model",
    "tape": "errors metrics optim model data distributed checkpoint",
    "why": "errors composition tape",
    "run": "errors counters metrics optim data distributed composition",
    "defaults": "errors hooks metrics optim model data run",
    "prepare": "errors rng metrics optim data distributed composition run model",
    "rehearsal": "errors rng metrics model data defaults",
    "loop": "errors hooks metrics optim data distributed composition checkpoint run defaults prepare model rehearsal determinism",
    "evaluation": "hooks metrics data distributed composition run prepare loop",
    "trial_run": "errors rng metrics optim model data distributed composition checkpoint run loop",
    "tuning": "errors rng global_settings hooks model data distributed composition checkpoint run prepare loop trial_run",
    "testing": "errors rng hooks optim model data composition checkpoint tape why run loop",
    "plugins": "errors rng hooks report metrics optim model data distributed composition checkpoint tape run trial_run",
    "cli": "errors determinism rng global_settings hooks report metrics optim model data distributed composition checkpoint run prepare loop evaluation tuning tape why plugins",
}


def name_of(path):
    """The module that a file is: core/data/batch.py is loopctl.data.batch."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["loopctl", *(parts[1:] if parts[0] == "core" else parts)]).removesuffix(".__init__")


MODULES = {name_of(path): path for folder in ("core", "plugins", "cli") for path in sorted((ROOT / folder).rglob("*.py"))}
PUBLIC = {alias.name: node.module for node in ast.walk(ast.parse((ROOT / "core" / "__init__.py").read_text()))
          if isinstance(node, ast.ImportFrom) for alias in node.names}          # what `loopctl` itself has, and from where


def inside(module):
    """Whether a module is in a room, and not the door to all of them."""
    return module not in ("loopctl", "loopctl.__main__")


INSIDE = [module for module in MODULES if inside(module)]


def imported(path):
    """The modules of loopctl that a file imports anywhere in it, in functions and for types too, and the line of each."""
    tree = ast.parse(path.read_text())
    types = {id(node) for part in ast.walk(tree) if isinstance(part, ast.If) and getattr(part.test, "id", "") == "TYPE_CHECKING"
             for node in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in found:
            if module.split(".")[0] != "loopctl" or (name == "Run" and id(node) in types):
                continue
            if f"{module}.{name}" in MODULES:
                yield f"{module}.{name}", node.lineno
            elif module != "loopctl":
                yield module, node.lineno
            elif name in PUBLIC:
                yield PUBLIC[name], node.lineno


def room(module):
    return module.split(".")[1]


@pytest.mark.parametrize("module", INSIDE)
def test_a_module_imports_from_the_rooms_that_its_own_may(module):
    here = room(module)
    for other, line in imported(MODULES[module]):
        assert room(other) in (here, *ARROWS[here].split()), (
            f"{MODULES[module].relative_to(ROOT)}:{line}: {here} imports {other}; a new arrow between rooms is a decision: "
            "avoid it, or add it to ARROWS and say why in docs/architecture.md")


def test_every_arrow_is_used_and_every_room_is_listed():
    used = {(room(module), room(other)) for module in INSIDE for other, _ in imported(MODULES[module])}
    assert {(here, other) for here, others in ARROWS.items() for other in others.split()} <= used
    assert {room(module) for module in INSIDE} == set(ARROWS)


def circle(graph):
    """The modules or rooms of a circle of imports, if there is one."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_rooms_import_in_one_direction():
    assert not circle({here: others.split() for here, others in ARROWS.items()})


def test_modules_import_in_one_direction():
    graph = {module: {other for other, _ in imported(MODULES[module]) if other != module} for module in INSIDE}
    assert not circle(graph)


def test_a_circle_is_found():
    assert circle({"a": ["b"], "b": ["c"], "c": ["a"]})
