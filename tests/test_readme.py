"""What the README and the tutorial say works, word for word."""
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
TUTORIAL = (ROOT / "docs" / "writing-a-plugin.md").read_text()
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
def test_commands(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke(command)


def test_the_first_command_shows_what_the_readme_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first_line = invoke("loopctl run --plugin amp --plugin cosine --epochs 1").splitlines()[0]
    assert first_line in README


def test_the_composition_in_python():
    scope = {}
    exec(PYTHON[0], scope)
    assert len(scope["run"].history) == 3


def test_the_plugin_of_twenty_lines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("noise.py").write_text(PYTHON[1])
    assert len(PYTHON[1].splitlines()) <= 20
    assert "the noise's standard deviation" in invoke("loopctl plugins noise.py:GradNoise")
    command = re.search(r"`(loopctl run --plugin noise.py[^`]*)`", README)[1]
    invoke(f"{command} --epochs 1")


@pytest.fixture
def follow(install, tmp_path, monkeypatch):
    """Type a command of the tutorial. What pip installs goes into a folder on the path, with the source before it, as -e has it."""
    monkeypatch.chdir(tmp_path)

    def call(command, fails=False):
        words = shlex.split(command)
        if words[0] == "loopctl":
            sys.modules.pop("loopctl_smooth_loss", None)
            return invoke(command)
        if words[:3] == ["pip", "install", "-e"]:
            folder = tmp_path / words[3].removesuffix("[test]")
            for place in (install(folder), folder):
                monkeypatch.syspath_prepend(place)
            return None
        words = {"pip": [sys.executable, "-m", "pip"], "python": [sys.executable]}[words[0]] + words[1:]
        if "wheel" in words:
            words += ["--quiet", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path[:2]), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                                    "PYTEST_ADDOPTS": "-k 'not composes'"}        # which is tried elsewhere, and takes seconds
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == (1 if fails else 0), done.stdout + done.stderr
        return done.stdout
    yield call
    sys.modules.pop("loopctl_smooth_loss", None)


def edit(file, diff):
    """Put the lines of `diff` with a plus in the place of those with a minus."""
    old, new = ("\n".join(re.findall(rf"^\{sign}(.*)$", diff, re.MULTILINE)) for sign in "-+")
    assert file.read_text().count(old) == 1
    file.write_text(file.read_text().replace(old, new))


def test_the_tutorial_from_its_beginning_to_its_end(follow, tmp_path):
    blocks = re.findall(r"^```(console|diff)\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["console", "console", "diff", "diff", "console", "console"]
    commands = [[line.removeprefix("$ ") for line in text.splitlines()] for kind, text in blocks if kind == "console"]
    folder = tmp_path / "loopctl-smooth-loss"
    (new,), first, again, (share,) = commands

    follow(new)
    whole = re.search(r"^```python\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE)[1]
    assert (folder / "loopctl_smooth_loss.py").read_text() == whole
    shown = [follow(command) for command in first]
    assert "the part of the average that each step keeps" in shown[2]
    assert "smooth_loss" in shown[3]

    edit(folder / "loopctl_smooth_loss.py", blocks[2][1])
    assert "1 failed" in follow(again[0], fails=True)
    edit(folder / "test_smooth_loss.py", blocks[3][1])
    for command in again:
        follow(command)
    follow(share)
    assert [path.suffix for path in (tmp_path / "dist").iterdir()] == [".whl"]


def test_what_the_tutorial_quotes_is_there():
    quoted = re.findall(r"^  ```python\n(.*?)^  ```", TUTORIAL, re.DOTALL | re.MULTILINE)
    assert len(quoted) == 3
    templates = [path.read_text() for path in (ROOT / "cli" / "templates").iterdir()]
    for text in quoted:
        assert any(text in template for template in templates), text


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    drawn = re.findall(r"^loopctl lr .* --out docs/(gallery/\w+\.svg)$", text, re.MULTILINE)      # when the site is built
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert target in drawn or (ROOT / page).parent.joinpath(target).exists(), target
