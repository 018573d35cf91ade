"""Random numbers: seed them, note where they are, put them back there."""
from __future__ import annotations

import random
from array import array
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(*loaders: Any) -> dict[str, Any]:
    """Where the random numbers of Python, NumPy and torch are, on every device, and those of the `loaders`' own
    generators; in types that `torch.load(weights_only=True)` takes."""
    return host_rng_state() | {
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "generators": [generator.get_state() for generator in loader_generators(loaders)],
    }


def set_rng_state(state: dict[str, Any], *loaders: Any) -> None:
    """Put the random numbers back to where `random_state` of the same `loaders` found them."""
    set_host_rng_state(state)
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
    if state["mps"] and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"][0].cpu())
    for generator, one in zip(loader_generators(loaders), state["generators"], strict=True):
        generator.set_state(one.cpu())


def host_rng_state() -> dict[str, Any]:
    """Where the random numbers of this process are, those of devices left alone: a loader's worker may not touch them.

    Three pieces of bytes, mainly: it travels with every batch that such a worker reads.
    """
    version, words, gauss = random.getstate()
    numbers: Any = np.random.get_state()
    kind, keys, *rest = numbers
    return {"python": (version, array("I", words).tobytes(), gauss), "numpy": (kind, keys.tobytes(), *rest),
            "torch": torch.get_rng_state().numpy().tobytes()}


def set_host_rng_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    kind, keys, *rest = state["numpy"]
    random.setstate((version, tuple(array("I", words)), gauss))
    np.random.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
    torch.set_rng_state(torch.frombuffer(bytearray(state["torch"]), dtype=torch.uint8))


def loader_generators(loaders: Any) -> list[torch.Generator]:
    """The generators that data loaders and their samplers have of their own, each once.

    A loader that tells its state, such as torchdata's, sees to its own.
    """
    loaders = [loader for loader in loaders if not hasattr(loader, "state_dict")]
    holders = [getattr(loader, name, None) for loader in loaders for name in ("sampler", "batch_sampler")]
    found = [getattr(holder, "generator", None) for holder in (*loaders, *holders)]
    return list(dict.fromkeys(one for one in found if isinstance(one, torch.Generator)))
