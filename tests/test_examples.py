"""The packages in docs/examples: each installs, passes its tests, is listed with its origin, and trains."""
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

EXAMPLES = sorted(path.parent for path in (Path(__file__).parents[1] / "docs" / "examples").glob("*/pyproject.toml"))


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_an_example_package_installs_passes_its_tests_and_trains(folder, install, tmp_path):
    site = install(folder)
    environment = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def call(*command):
        done = subprocess.run([sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    listed = call("loopctl", "plugins").splitlines()
    for name in project["entry-points"]["loopctl"]:
        (line,) = [line for line in listed if line.split()[:1] == [name]]
        assert line.endswith(f"[{project['name']} {project['version']}]")
    for command in re.findall(r"^\$ loopctl (run .*)$", (folder / "README.md").read_text(), re.MULTILINE):
        assert "finished: 1 epoch" in call("loopctl", *shlex.split(command), "--epochs", "1")
    call("pytest", "-q", "-p", "no:cacheprovider", str(folder))
