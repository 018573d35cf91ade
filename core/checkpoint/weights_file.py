"""Read weights into a model: from safetensors, from what `torch.save` wrote, from a checkpoint or from a run's folder.

Nothing in these files is executed: torch reads its own format with `weights_only=True`.
"""
from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopctl.checkpoint.atomic_files import DamagedCheckpoint, read_checkpoint
from loopctl.checkpoint.finding import find_candidates, restore_content
from loopctl.checkpoint.state import describe_shape
from loopctl.errors import UsageError, names, one_line
from loopctl.model.own_names import by_own_names, load_own_state_dict, own_state_dict

log = logging.getLogger("loopctl")

ENTRIES = ("state_dict", "model_state_dict", "model")       # which of a training program's checkpoint has the weights
WRAPPERS = "module.", "model."           # of names: from DataParallel, a Lightning module


def load_weights(model: nn.Module, file: str | Path, strict: bool = True) -> list[str]:
    """Load weights from a file into `model`; return the names of those that do not fit, which `strict` refuses.

    file: a safetensors file, a file of `torch.save` with a state dict, also one in an entry "state_dict" or "model", a
    checkpoint of loopctl, or the folder of a run, of which `find_weights` chooses the file. Prefixes of wrappers, such
    as "module.", are left out of the names. Tied weights, which safetensors has once, are filled in under all their
    names, and sparse tensors, which it has as dense ones, become sparse again. The file cannot run code.

    With `strict=False`, what fits is loaded, and the rest is named in a warning. Raises UsageError where the file
    cannot be read or nothing of it fits, and with `strict` where a name is missing, unknown or of another shape; the
    model is unchanged then.
    """
    file = find_weights(Path(file))
    return load_tensors(model, read_weights(file), file, strict)


def find_weights(path: Path) -> Path:
    """Return the file that `path` is, or of a run's folder its best weights, else its final ones, else a checkpoint."""
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    if not path.is_dir():
        return path
    found = [*sorted(path.glob("best.safetensors")), *sorted(path.glob("*/best.safetensors")),
             *path.glob("weights.safetensors"), *find_candidates(path)]
    if not found:
        raise UsageError(f"{path} has no weights: neither best.safetensors, weights.safetensors nor a checkpoint; "
                         "pass a file, or the folder of a run")
    return found[0]


def read_weights(file: Path) -> dict[str, Any]:
    """Return the tensors in a file by name, on the CPU. Raises UsageError where it cannot be read as weights."""
    try:
        with file.open("rb") as stream:
            is_safetensors = stream.read(9)[8:] == b"{" or file.suffix == ".safetensors"
        content = load_file(file) if is_safetensors else read_torch(file)
    except OSError as error:
        raise UsageError(f"{file} cannot be read as weights: {error.strerror or one_line(error)}") from error
    except SafetensorError as error:
        raise UsageError(f"{file} cannot be read as weights: {one_line(error)}") from error
    except DamagedCheckpoint as error:
        raise UsageError(f"{file} cannot be read as weights: it {one_line(error)}") from error
    for entry in ENTRIES:
        if isinstance(content, dict) and isinstance(content.get(entry), dict):
            content = content[entry]
            break
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and (
        isinstance(value, Tensor) or name.endswith("_extra_state"))} if isinstance(content, dict) else {}
    if not tensors:
        raise UsageError(f"{file} has no weights: it holds {describe_content(content)}, not tensors by name, also not "
                         f"in an entry {names(ENTRIES)}")
    return tensors


def read_torch(file: Path) -> Any:
    """Return what `torch.save` wrote to a file; of a checkpoint of loopctl, after its checksum was compared.

    Raises DamagedCheckpoint where it has other than tensors and plain values, which is not constructed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:                  # a damaged file may raise anything
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise DamagedCheckpoint(f"has a {found[1]}, which could run code and is not loaded; save the state dict "
                                    "alone") from error
        raise DamagedCheckpoint("is damaged, or is neither safetensors nor a file of torch.save") from error
    if isinstance(content, dict) and "loopctl" in content:
        content = restore_content(read_checkpoint(file))
        if "sharded" in content:
            raise DamagedCheckpoint("is the checkpoint of a sharded model; pass the run's weights.safetensors")
    return content


def load_tensors(model: nn.Module, tensors: dict[str, Any], file: Path, strict: bool) -> list[str]:
    """Load tensors by name into `model`; see `load_weights`. `file` is named in messages."""
    own = own_state_dict(model, keep_vars=True)
    tensors = without_wrappers(tensors, own)
    known = {id(own[name]): name for name in tensors if name in own}
    for name, tensor in own.items():
        if name not in tensors and id(tensor) in known:
            tensors[name] = tensors[known[id(tensor)]]
        if name in tensors and isinstance(tensor, Tensor) and tensor.layout is not tensors[name].layout:
            tensors[name] = tensors[name].to_sparse(layout=tensor.layout)
    missing = [name for name in own if name not in tensors]
    unknown = sorted(tensors.keys() - own.keys())
    differ = [name for name, tensor in own.items() if name in tensors and isinstance(tensor, Tensor)
              and not is_lazy(tensor) and tensor.shape != tensors[name].shape]
    wrong = [*missing, *unknown, *differ]
    if wrong:
        shapes = [f"{name} is {describe_shape(tensors[name])} and {describe_shape(own[name])} in the model"
                  for name in differ]
        parts = "; ".join(start + first_few(items) for start, items in (
            ("it has no ", missing), ("the model has no ", unknown), ("", shapes)) if items)
        fits = len(tensors) - len(unknown) - len(differ)
        if strict or not fits:
            advice = ("--init FILE:strict=false, in Python strict=False, loads what fits" if fits else
                      "it is of another model")
            raise UsageError(f"{file} does not fit the model: {one_line(parts)}; {advice}")
        log.warning("%s: %d of the model's %d tensors are loaded; %s", file, fits, len(own), one_line(parts))
    fitting = {name: tensor for name, tensor in tensors.items() if name not in wrong}
    try:
        load_own_state_dict(model, fitting, strict=False)
    except Exception as error:                  # a model may have code of its own here
        raise UsageError(f"{file} does not fit the model: {one_line(error)}") from error
    return wrong


def without_wrappers(tensors: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Rename the tensors as the model has them: without the prefixes of wrappers that the model's names do not have."""
    tensors = by_own_names(tensors)
    for prefix in WRAPPERS * len(WRAPPERS):                 # they may be nested in any order
        if not any(name.startswith(prefix) for name in own):
            tensors = renamed(tensors, lambda name: name.removeprefix(prefix))          # noqa: B023
    return tensors


def renamed(tensors: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """The tensors with their names changed; as they were where two would have one name."""
    changed = {rename(name): tensor for name, tensor in tensors.items()}
    return changed if len(changed) == len(tensors) else tensors


def first_few(items: list[str]) -> str:
    """Join the first three of `items`, with the number of the others."""
    return names(items[:3] + [f"{len(items) - 3} more"] * (len(items) > 3))


def describe_content(content: Any) -> str:
    """What a file holds in place of weights, for a message."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    return f"the entries {first_few([one_line(name) for name in content])}" if content else "nothing"
