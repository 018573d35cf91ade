"""What a run must remember to go on exactly as if it had never ended."""
from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_model
from torch import nn

from loopctl.errors import UsageError
from loopctl.run import Run

POSITION = ("epoch", "step", "attempts", "seen", "stop", "metrics", "history")


def state(run: Run) -> dict[str, Any]:
    """Everything that changes while training, in types that `torch.load(weights_only=True)` takes."""
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "plugins": {name: plugin.state_dict() for name, plugin in stateful(run)},
        "position": {name: getattr(run, name) for name in POSITION},
        "random": random_state(),
    }


def restore(run: Run) -> None:
    """Load the state that `run.resume` names, random numbers last. Raises UsageError where it is another run's."""
    file = find(run.resume)      # type: ignore[arg-type]
    saved = torch.load(file, map_location=run.device, weights_only=True)
    mine = dict(stateful(run))
    if set(saved["plugins"]) != set(mine):
        raise UsageError(f"{file} was saved with the plugins {sorted(saved['plugins'])}, this run has {sorted(mine)}")
    try:
        run.model.load_state_dict(saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"{file} does not fit this model and optimizer: {' '.join(str(error).split())}") from error
    for name, plugin in mine.items():
        plugin.load_state_dict(saved["plugins"][name])
    for name in POSITION:
        setattr(run, name, saved["position"][name])
    set_random_state(saved["random"])


def find(path: Path) -> Path:
    """The checkpoint that `path` means: a file, a folder of checkpoints, or a run's folder."""
    tried = [path, path / "last.pt", path / "checkpoints" / "last.pt"]
    for file in tried:
        if file.is_file():
            return file
    raise UsageError(f"resume={path}: no checkpoint there; a run's folder has one in checkpoints/last.pt")


def save(content: Any, file: Path) -> None:
    """Write `content` aside, then move it into place: `file` is whole at every moment."""
    aside = beside(file)
    with aside.open("wb") as stream:
        torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(aside, file)


def save_weights(model: nn.Module, file: Path) -> None:
    """Write the weights of `model` as safetensors, which any program reads and which runs no code."""
    aside = beside(file)
    save_model(model, str(aside))
    os.replace(aside, file)


def beside(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.with_name(f"{file.name}.new")


def stateful(run: Run) -> list[tuple[str, Any]]:
    return [(name, plugin) for name, plugin in run.hook.plugins.items() if hasattr(plugin, "state_dict")]


def random_state() -> dict[str, Any]:
    """The state of the random numbers of Python, NumPy and torch, on every device."""
    numbers: Any = np.random.get_state()
    kind, keys, *rest = numbers
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(saved: dict[str, Any]) -> None:
    kind, keys, *rest = saved["numpy"]
    random.setstate(saved["python"])
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(saved["torch"].cpu())
    if saved["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in saved["cuda"]])
