"""Draw the pictures of docs/gallery.md anew: each command on the page is run. Call it as `python docs/gallery.py`."""
import os
import re
from pathlib import Path

from click.testing import CliRunner

from loopctl.cli import main

PAGE = Path(__file__).with_suffix(".md")


def commands() -> list[list[str]]:
    """The arguments of each `loopctl` command on the page."""
    return [line.split()[1:] for line in re.findall(r"^loopctl lr .*$", PAGE.read_text(), re.MULTILINE)]


if __name__ == "__main__":
    os.chdir(PAGE.parents[1])           # where the commands are run from
    for arguments in commands():
        done = CliRunner().invoke(main, arguments)
        print(arguments[-1] if done.exit_code == 0 else done.stderr.strip())
