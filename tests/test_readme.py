"""What the README says works, word for word."""
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from loopctl.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
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
