"""Random number generators of Python, NumPy, torch and data loaders: seed them, save and restore their states."""
from __future__ import annotations

import random
from array import array
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the random number generators of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(*loaders: Any) -> dict[str, Any]:
    """Return the states of the random number generators of Python, NumPy and torch on every device, and of `loaders`.

    Its values have types that `torch.load(weights_only=True)` can load.
    """
    return host_rng_state() | {
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "generators": [generator.get_state() for generator in loader_generators(loaders)],
    }


def set_rng_state(state: dict[str, Any], *loaders: Any) -> None:
    """Restore what `rng_state` of the same `loaders` returned."""
    set_host_rng_state(state)
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([device_state.cpu() for device_state in state["cuda"]])
    if state["mps"] and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"][0].cpu())
    for generator, generator_state in zip(loader_generators(loaders), state["generators"], strict=True):
        generator.set_state(generator_state.cpu())


def host_rng_state() -> dict[str, Any]:
    """Return the states of the random number generators on the host, without initializing a device.

    Loader workers call it, and they must not use a device. They send the result with every batch, so it is kept small:
    bytes instead of lists of numbers.
    """
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()
    kind, keys, *rest = numpy_state
    return {"python": (version, array("I", words).tobytes(), gauss), "numpy": (kind, keys.tobytes(), *rest),
            "torch": torch.get_rng_state().numpy().tobytes()}


def set_host_rng_state(state: dict[str, Any]) -> None:
    """Restore what `host_rng_state` returned."""
    version, words, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    random.setstate((version, tuple(array("I", words)), gauss))
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))


def loader_generators(loaders: Any) -> list[torch.Generator]:
    """Return the `torch.Generator` objects of data loaders and their samplers, each once.

    A loader with a `state_dict`, such as torchdata's StatefulDataLoader, is left out: it saves its own generators.
    """
    loaders = [loader for loader in loaders if not hasattr(loader, "state_dict")]
    samplers = [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")]
    found = [getattr(owner, "generator", None) for owner in (*loaders, *samplers)]
    return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))
