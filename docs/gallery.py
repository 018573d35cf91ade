"""Draw the pictures of docs/gallery.md: each command on the page is run. `python docs/gallery.py` draws all of them."""
import re
from pathlib import Path

from click.testing import CliRunner

from loopctl.cli import main

PAGE = Path(__file__).with_suffix(".md")
ROOT = PAGE.parents[1]                  # which the commands are written for


def commands() -> list[list[str]]:
    """The arguments of each `loopctl` command on the page; the last one is the picture."""
    return [line.split()[1:] for line in re.findall(r"^loopctl lr .*$", PAGE.read_text(), re.MULTILINE)]


def draw(root: Path = ROOT, outdated_only: bool = False) -> list[Path]:
    """Draw the pictures below `root`, in place of the repository's, and return their files.

    outdated_only: leave out those that are there and not older than the page
    """
    drawn = []
    for *arguments, name in commands():
        file = root / name
        if outdated_only and file.exists() and file.stat().st_mtime >= PAGE.stat().st_mtime:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        done = CliRunner().invoke(main, [*arguments, str(file)])
        if done.exit_code:
            raise RuntimeError(f"{name} cannot be drawn: {done.output.strip()}")
        drawn.append(file)
    return drawn


if __name__ == "__main__":
    for file in draw():
        print(file.relative_to(ROOT))
