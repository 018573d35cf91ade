"""`loopctl new-plugin`: write a Python package with one plugin, its tests and its README.

The files in `templates/` are a complete package of a plugin called `my_plugin`; only the name is replaced.
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
    """Write the package to the new folder `out`, or `loopctl-NAME`. Return the list of files and commands to run next.

    Raises UsageError, and leaves no files behind, for an invalid name or a folder that cannot be written.
    """
    plugin = check_name(name)
    folder = out or Path(f"loopctl-{name}")
    files = {"pyproject.toml": "pyproject", "README.md": "readme", f"loopctl_{plugin}.py": kind,
             f"test_{plugin}.py": f"{kind}_test"}
    texts = {file: fill_template((TEMPLATES / f"{template}.txt").read_text(encoding="utf-8"), plugin)
             for file, template in files.items()}
    write_files(folder, texts)
    return "\n".join(["written:", *(f"  {folder / file}" for file in texts), "next:",
                      f"  pip install -e {shlex.quote(f'{folder}[test]')}",
                      f"  python -m pytest {shlex.quote(str(folder))}",
                      f"  loopctl run --plugin {plugin}"])


def check_name(name: str) -> str:
    """Return `name` with underscores in place of hyphens. Raises UsageError if a new plugin cannot have this name."""
    plugin = name.replace("-", "_")
    if not NAME.fullmatch(plugin):
        parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", plugin)          # GradNoise is grad_noise
        similar = re.sub(r"[^a-z0-9]+", "_", parts.lower()).strip("_")
        advice = f"use {similar}" if NAME.fullmatch(similar) else "choose another"
        raise UsageError(f"{name!r} is not a valid plugin name, which has lower-case letters, digits and underscores "
                         f"and begins with a letter; {advice}")
    if plugin.startswith("loopctl_"):
        raise UsageError(f"{name}: the prefix loopctl is added to the package's name anyway; "
                         f"use {plugin.removeprefix('loopctl_')}")
    if iskeyword(class_name(plugin)):
        raise UsageError(f"{name}: its class would be called {class_name(plugin)}, a keyword of Python; "
                         "choose another name")
    if entry := available().get(plugin):
        raise UsageError(f"{plugin}: {origin(entry) or 'a package'} already has a plugin of this name; choose another")
    return plugin


def class_name(plugin: str) -> str:
    return "".join(part.capitalize() for part in plugin.split("_"))


def fill_template(text: str, plugin: str) -> str:
    """Replace `my_plugin` in a template by the plugin's name, also as the name of the class and of the package."""
    words = {"my_plugin": plugin, "my-plugin": plugin.replace("_", "-"), "MyPlugin": class_name(plugin)}
    return re.sub("|".join(words), lambda found: words[found[0]], text)


def write_files(folder: Path, texts: dict[str, str]) -> None:
    """Write `texts`, by file name, to the new `folder`. Where that fails, remove what was written; raise UsageError."""
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
