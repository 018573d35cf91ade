"""What holds across the whole house: walls, lists that must agree, what may not be imported."""
import ast
import keyword
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import loopctl

ROOT = Path(__file__).parents[1]
PLUGINS = sorted(path.stem for path in (ROOT / "plugins").glob("*.py") if path.stem != "__init__")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imports(path):
    """The modules a file imports, as (module, names)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, []
        elif isinstance(node, ast.ImportFrom):
            yield node.module, [alias.name for alias in node.names]


def test_every_room_is_in_the_package_that_is_installed():
    rooms = {f"loopctl.{path.parent.name}" for path in (ROOT / "core").glob("*/__init__.py")}
    assert {*PYPROJECT["tool"]["setuptools"]["packages"]} == rooms | {"loopctl", "loopctl.plugins", "loopctl.cli"}


def test_files_entry_points_and_the_table_in_the_docs_agree():
    entries = PYPROJECT["project"]["entry-points"]["loopctl"]
    modules = {name: f"{name}_lr" if keyword.iskeyword(name) else name for name in entries}     # a keyword cannot be imported
    assert sorted(modules.values()) == PLUGINS
    for name, value in entries.items():
        assert value == f"loopctl.plugins.{modules[name]}:{''.join(part.title() for part in modules[name].split('_'))}"
    rows = re.findall(r"^\| `(\w+)` ", (ROOT / "docs" / "plugins.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(entries)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_imports_from_loopctl_only_what_everybody_may(name):
    """Public names, and modules of the rooms; not the loop's own files, the command line or another plugin."""
    for module, names in imports(ROOT / "plugins" / f"{name}.py"):
        if module == "loopctl":
            assert set(names) <= {*loopctl.__all__, "rng", "trial_run"}
        elif module.startswith("loopctl."):
            first, *rest = module.removeprefix("loopctl.").split(".")
            room = ROOT / "core" / first
            assert (room.is_dir() and first != "testing") or first in ("rng", "trial_run"), f"{name} imports {module}"
            assert not any(part.startswith("_") for part in (*rest, *names)), f"{name} imports {module}"


def test_core_imports_no_plugin_and_no_command_line():
    """Except for the two doors: what `python -m loopctl` runs, and what `loopctl` itself offers."""
    doors = {ROOT / "core" / "__main__.py": ["loopctl.cli"], ROOT / "core" / "__init__.py": ["loopctl.cli.saved_run"]}
    for path in (ROOT / "core").rglob("*.py"):
        above = [module for module, _ in imports(path) if module.startswith(("loopctl.plugins", "loopctl.cli"))]
        assert above == doors.get(path, [])


def test_no_built_in_orders_itself_by_number():
    for path in (ROOT / "plugins").glob("*.py"):
        assert "tryfirst" not in path.read_text()


def test_the_package_is_never_imported_a_second_time_as_core():
    assert not {"core", "plugins", "cli"} & set(sys.modules)


@pytest.mark.parametrize("command", [["--help"], ["plugins"], ["plugins", "--search", "momentum"], ["hooks"], ["run", "--help"], ["runs", "."], ["--version"]], ids=" ".join)
def test_what_only_informs_imports_no_torch_and_no_plugin(command):
    code = ("import sys; from loopctl.cli import main\n"
            f"try: main({command})\n"
            "except SystemExit as end: assert not end.code, end.code\n"
            "bad = [m for m in sys.modules if m in ('torch', 'rich') or m.startswith('loopctl.plugins.')]\n"
            "sys.exit(f'imports {bad}' if bad else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_everything_public_is_there():
    assert dir(loopctl) == sorted(loopctl.__all__)
    for name in loopctl.__all__:
        assert getattr(loopctl, name)
    assert loopctl.__version__ == PYPROJECT["project"]["version"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loopctl.nothing


def test_the_version_has_its_entry_in_the_changelog():
    assert f"## {PYPROJECT['project']['version']}" in (ROOT / "docs" / "changelog.md").read_text()
