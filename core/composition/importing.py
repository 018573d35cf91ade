"""Functions and classes by name: `package.module:name` or `path/to/file.py:name`, wherever a name of one is taken."""
from __future__ import annotations

import importlib
import importlib.util
import operator
import sys
import types
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from loopctl.errors import UsageError, nearest, one_line

# What was imported by name, by id, with that name: a lambda or a partial has no usable name of its own.
IMPORTED: dict[int, tuple[Any, str]] = {}


def import_function(path: str) -> Any:
    """Import the function or class that `import_object` finds. Raises ValueError for anything else."""
    module, _, name = path.partition(":")
    if not (module and name):
        raise ValueError
    found = import_object(path)
    if not callable(found):
        raise ValueError(f"takes a function or class; {path} is a {type(found).__name__}")
    file, _, name = path.rpartition(":")
    IMPORTED[id(found)] = found, f"{Path(file).resolve() if file.endswith('.py') else file}:{name}"
    return found


def import_path(value: Any) -> str:
    """Return the text from which `import_object` imports a function or class. Raises UsageError if there is none."""
    module: Any = getattr(value, "__module__", None)
    name: Any = getattr(value, "__qualname__", None)
    try:
        if operator.attrgetter(name)(sys.modules[module]) is value:
            return f"{module}:{name}"
    except (AttributeError, KeyError, TypeError):
        pass
    if id(value) not in IMPORTED:
        raise UsageError(f"{value!r} has no import path, so it cannot be saved; use a function of a module")
    return IMPORTED[id(value)][1]


def import_object(path: str) -> Any:
    """Import and return `package.module:name` or `path/to/file.py:name`; the name may have dots.

    Raises ImportError with a message of one line if that fails.
    """
    if ".py:" in path:
        module, _, name = path.rpartition(":")
        found = import_file(module)
    else:
        module, _, name = path.partition(":")
        found = import_named(module, lambda: importlib.import_module(module))
    return get_attribute(found, name, module)


def import_file(file: str) -> types.ModuleType:
    """Import a file; again only if it has changed since. Raises ImportError."""
    try:
        status = Path(file).stat()
        if not Path(file).is_file():
            raise FileNotFoundError
        return run_file(str(Path(file).resolve()), (status.st_mtime_ns, status.st_size))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise ImportError(f"there is no file {file}") from None
    except OSError as error:                      # such as a file name that is too long
        raise ImportError(f"{file} cannot be read: {error.strerror}") from error


@cache
def run_file(path: str, version: tuple[int, int]) -> types.ModuleType:
    """Import the file at the absolute `path` in this `version` of it."""
    # The module is named by its path, so that it cannot hide a file of the same name or a module such as `random`.
    spec = importlib.util.spec_from_file_location(path, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path] = module                    # dataclasses and typing look up the module of a class here
    import_named(path, lambda: spec.loader.exec_module(module))          # type: ignore[union-attr]
    return module


def import_named(name: str, run: Callable[[], Any]) -> Any:
    """Return what `run`, which imports `name`, returns. Raises ImportError for any error of it."""
    try:
        return run()
    except (Exception, SystemExit) as error:      # importing a module may raise any error
        raise ImportError(f"{name} cannot be imported ({type(error).__name__}: {one_line(error)})") from error


def get_attribute(module: types.ModuleType, name: str, path: str) -> Any:
    """Return `module.name`; `name` may have dots. Raises ImportError with the nearest name if it does not exist."""
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            public = [known for known in vars(value) if not known.startswith("_")]
            raise ImportError(f"{path} has no {name!r}; {nearest(name, public, 'it has')}")
        value = getattr(value, part)
    return value
