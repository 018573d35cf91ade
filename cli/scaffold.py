"""What `loopctl new-plugin` writes: a package with one plugin and its test.

The texts in `templates/` are those of a plugin called `my_plugin`, whole and working; its name is replaced.
"""
from __future__ import annotations

import re
import shlex
import shutil
from contextlib import suppress
from keyword import iskeyword
from os.path import lexists
from pathlib import Path

from loopctl.cli.listing import origin
from loopctl.composition.discovery import available
from loopctl.errors import UsageError

TEMPLATES = Path(__file__).with_name("templates")
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def write(name: str, kind: str, out: Path | None) -> str:
    """Write the package into a new folder, `loopctl-NAME` if not `out`. Return what to say: the files, what to do next.

    Raises UsageError, and leaves nothing behind, for a name or a folder that cannot be.
    """
    plugin = checked(name)
    folder = out or Path(f"loopctl-{name}")
    files = {"pyproject.toml": "pyproject", "README.md": "readme", f"loopctl_{plugin}.py": kind,
             f"test_{plugin}.py": f"{kind}_test"}
    texts = {file: filled((TEMPLATES / f"{template}.txt").read_text(encoding="utf-8"), plugin)
             for file, template in files.items()}
    put(folder, texts)
    place = shlex.quote(str(folder))
    return "\n".join(["written:", *(f"  {folder / file}" for file in texts), "next:",
                      f"  pip install -e {shlex.quote(f'{folder}[test]')}",
                      f"  python -m pytest {place}",
                      f"  loopctl run --plugin {plugin}"])


def checked(name: str) -> str:
    """The plugin's name that `name` stands for: hyphens are underscores. Raises UsageError where it cannot be one."""
    plugin = name.replace("-", "_")
    if not NAME.fullmatch(plugin):
        parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", plugin)          # GradNoise is grad_noise
        near = re.sub(r"[^a-z0-9]+", "_", parts.lower()).strip("_")
        way = f"use {near}" if NAME.fullmatch(near) else "choose another"
        raise UsageError(f"{name!r} is no name of a plugin, which has lower-case letters, digits and underscores and "
                         f"begins with a letter; {way}")
    if plugin.startswith("loopctl_"):
        raise UsageError(f"{name}: the package is called loopctl-... by itself; use {plugin.removeprefix('loopctl_')}")
    if iskeyword(class_name(plugin)):
        raise UsageError(f"{name}: its class would be called {class_name(plugin)}, a word of Python; choose another name")
    if entry := available().get(plugin):
        raise UsageError(f"{plugin}: {origin(entry) or 'a package'} has a plugin of this name; choose another")
    return plugin


def class_name(plugin: str) -> str:
    return "".join(part.capitalize() for part in plugin.split("_"))


def filled(text: str, plugin: str) -> str:
    """A template with the plugin's name in place of `my_plugin`, as a class and as a package too."""
    words = {"my_plugin": plugin, "my-plugin": plugin.replace("_", "-"), "MyPlugin": class_name(plugin)}
    return re.sub("|".join(words), lambda found: words[found[0]], text)


def put(folder: Path, texts: dict[str, str]) -> None:
    """Write `texts` by file name into the new `folder`. Raises UsageError, and takes away what it made."""
    made: list[Path] = []
    try:
        if lexists(folder):
            raise UsageError(f"{folder} exists and is not overwritten; choose another folder with --out")
        for parent in [*reversed(folder.parents), folder]:
            if parent is folder or not parent.exists():
                parent.mkdir()
                made.append(parent)
        for file, text in texts.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        if folder in made:
            shutil.rmtree(folder, ignore_errors=True)
        for parent in reversed(made):
            with suppress(OSError):
                parent.rmdir()
        raise UsageError(f"{folder} cannot be written: {error.strerror}; choose another folder with --out") from error
