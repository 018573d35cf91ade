"""`--help` of the commands with many options: the groups, and what is on the first screen."""
import re

import click
import pytest
from click.testing import CliRunner

from loopctl.cli import main
from loopctl.cli.grouped_help import GroupedCommand, GroupedOption
from loopctl.cli.options import SHARED_OPTIONS

TEN = ["--model", "--data", "--optimizer", "--lr", "--epochs", "--batch-size", "--plugin", "--device", "--out", "--resume"]


def help_of(command, name=""):
    done = CliRunner(env={"COLUMNS": "80"}).invoke(command, [*name.split(), "--help"])
    assert done.exit_code == 0, done.output
    return done.stdout.splitlines()


def flags(lines):
    return [found[1] for line in lines if (found := re.match(r"  (?:-h, )?(--[\w-]+)", line))]


def test_the_first_screen_of_run_shows_the_ten_options_that_matter():
    lines = help_of(main, "run")
    assert max(map(len, lines)) <= 80
    first = lines[:lines.index("Task:") - 1]
    assert flags(first) == TEN
    assert len(first) < 24                          # a line of the screen is the prompt's


@pytest.mark.parametrize("command", ["run", "explain", "lr", "summary"])
def test_every_option_is_shown_once_below_a_heading(command):
    lines = help_of(main, command)
    declared = [option.opts[0] for option in main.commands[command].params]
    assert sorted(flags(lines)) == sorted([*declared, "--help"])
    headings = [line for line in lines if re.fullmatch(r"\w[\w ]+:", line)]
    assert headings == ["Options:", "Task:", "Data:", "Length and evaluation:", "Devices and precision:", "Repeating a run:", "Other:"]


def test_a_group_is_one_word_in_the_definition_of_an_option():
    @click.command(cls=GroupedCommand)
    @click.option("--first", cls=GroupedOption, group="Options", help="One.")
    @click.option("--new", cls=GroupedOption, group="New", help="Two.")
    @click.option("--plain", help="Three.")
    def command():
        pass

    assert help_of(command)[2:] == [
        "Options:", "  --first TEXT  One.", "", "New:", "  --new TEXT    Two.", "",
        "Other:", "  --plain TEXT  Three.", "  --help        Show this message and exit."]


def test_a_command_without_groups_shows_its_options_under_one_heading():
    assert [line for line in help_of(main, "plugins") if line.endswith(":") and line[0] != " "] == ["Options:"]


def test_the_help_shows_defaults_and_no_bounds():
    text = " ".join(" ".join(help_of(main, "run")).split())
    assert "Samples per batch, in each process; auto: what fits. [default: 64]" in text
    assert "x>=" not in text
    assert "<=x" not in text


def test_the_options_that_are_shared_have_a_group():
    @click.command()
    def empty():
        pass

    for option in SHARED_OPTIONS:
        option(empty)
    assert all(isinstance(param, GroupedOption) for param in empty.params)
