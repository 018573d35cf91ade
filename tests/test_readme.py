"""The README and docs/writing-a-plugin.md: their commands, their Python and their links work as written."""
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from loopctl.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WRITING_A_PLUGIN = (ROOT / "docs" / "writing-a-plugin.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [command.strip() for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
            for line in re.findall(r"^\$ (.*?)(?:  #.*)?$", block, re.MULTILINE)
            for command in line.split("&&") if command.strip().startswith("loopctl")]


def invoke(command):
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_of_the_readme_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(command)


def test_the_first_command_prints_the_line_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first_line = invoke("loopctl run --plugin amp --plugin cosine --epochs 1").splitlines()[0]
    assert first_line in README


def test_the_python_example_trains():
    scope = {}
    exec(PYTHON[0], scope)
    assert len(scope["run"].history) == 3


def test_the_example_plugin_has_at_most_twenty_lines_and_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("noise.py").write_text(PYTHON[1])
    assert len(PYTHON[1].splitlines()) <= 20
    assert "the noise's standard deviation" in invoke("loopctl plugins noise.py:GradNoise")
    command = re.search(r"`(loopctl run --plugin noise.py[^`]*)`", README)[1]
    invoke(f"{command} --epochs 1")


@pytest.fixture
def follow(install, tmp_path, monkeypatch):
    """Run a command of the page. `pip install -e` installs to a new folder; it and the source folder are put on sys.path."""
    monkeypatch.chdir(tmp_path)

    def call(command, fails=False):
        words = shlex.split(command)
        if words[0] == "loopctl":
            sys.modules.pop("loopctl_smooth_loss", None)
            return invoke(command)
        if words[:3] == ["pip", "install", "-e"]:
            folder = tmp_path / words[3].removesuffix("[test]")
            for path in (install(folder), folder):
                monkeypatch.syspath_prepend(path)
            return None
        words = {"pip": [sys.executable, "-m", "pip"], "python": [sys.executable]}[words[0]] + words[1:]
        if "wheel" in words:
            words += ["--quiet", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2]), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                                    "PYTEST_ADDOPTS": "-k 'not composes'"}        # takes seconds, and is tested elsewhere
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == (1 if fails else 0), done.stdout + done.stderr
        return done.stdout
    yield call
    sys.modules.pop("loopctl_smooth_loss", None)


def edit(file, diff):
    """Replace the lines of `diff` with a minus by those with a plus."""
    old, new = ("\n".join(re.findall(rf"^\{sign}(.*)$", diff, re.MULTILINE)) for sign in "-+")
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


def test_the_steps_of_writing_a_plugin_work_in_order(follow, tmp_path):
    blocks = re.findall(r"^```(console|diff)\n(.*?)^```", WRITING_A_PLUGIN, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["console", "console", "diff", "diff", "console", "console"]
    commands = [[line.removeprefix("$ ") for line in text.splitlines()] for kind, text in blocks if kind == "console"]
    folder = tmp_path / "loopctl-smooth-loss"
    (new,), first, again, (share,) = commands

    follow(new)
    module = re.search(r"^```python\n(.*?)^```", WRITING_A_PLUGIN, re.DOTALL | re.MULTILINE)[1]
    assert (folder / "loopctl_smooth_loss.py").read_text() == module
    outputs = [follow(command) for command in first]
    assert "the fraction of the average that each step keeps" in outputs[2]
    assert "smooth_loss" in outputs[3]

    edit(folder / "loopctl_smooth_loss.py", blocks[2][1])
    assert "1 failed" in follow(again[0], fails=True)
    edit(folder / "test_smooth_loss.py", blocks[3][1])
    for command in again:
        follow(command)
    follow(share)
    assert [path.suffix for path in (tmp_path / "dist").iterdir()] == [".whl"]


def test_the_code_that_writing_a_plugin_quotes_is_in_the_templates():
    quoted = re.findall(r"^  ```python\n(.*?)^  ```", WRITING_A_PLUGIN, re.DOTALL | re.MULTILINE)
    assert len(quoted) == 3
    templates = [path.read_text() for path in (ROOT / "cli" / "templates").iterdir()]
    for text in quoted:
        assert any(text in template for template in templates), text


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_the_targets_of_links_exist(page):
    text = (ROOT / page).read_text()
    drawn = re.findall(r"^loopctl lr .* --out docs/(gallery/\w+\.svg)$", text, re.MULTILINE)      # when the site is built
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert target in drawn or (ROOT / page).parent.joinpath(target).exists(), target
