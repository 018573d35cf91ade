"""What `tune` may change: everything here changes the speed of a run and not its recipe."""
from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from loopctl.composition.discovery import plugin_name, split_spec

CONVOLUTIONS = nn.Conv2d, nn.ConvTranspose2d


@dataclass(frozen=True)
class Choice:
    """One way to do something. A composition has at most one choice of each group.

    group: what is chosen, such as "precision"
    plugins: the plugins that it adds, as text
    optimizer: the options of the optimizer's class that it sets
    settings: the arguments of `torch_settings` that it sets
    workers: the number of processes that load data, if it sets that
    loader: the name of another loader of the same data, if it uses one
    rounds: whether it computes with fewer bits, so that a loss differs by their rounding
    draws: whether it draws other random numbers, so that a loss differs as with another seed
    slow: whether it takes long to prepare, so that it is tried last
    warmup: how many steps pass before it is at its full speed
    """

    group: str
    plugins: tuple[str, ...] = ()
    optimizer: tuple[tuple[str, bool], ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    workers: int | None = None
    loader: str = ""
    rounds: bool = False
    draws: bool = False
    slow: bool = False
    warmup: int = 2

    def __str__(self) -> str:
        return " ".join([*self.plugins, *(f"{name}={value}".lower() for name, value in self.optimizer if value),
                         *(f"{name}={value}".lower() for name, value in self.settings),
                         *([f"workers={self.workers}"] if self.workers is not None else []),
                         *([self.loader] if self.loader else [])])


Composition = tuple[Choice, ...]


def described(composition: Composition) -> str:
    """A composition in words: what it adds to the run as it was given."""
    return " + ".join(map(str, composition)) or "as given"


def plugins_of(composition: Composition) -> list[str]:
    return [text for choice in composition for text in choice.plugins]


def settings_of(composition: Composition) -> dict[str, Any]:
    """The arguments of `torch_settings`."""
    return {name: value for choice in composition for name, value in choice.settings}


def optimizer_options(composition: Composition) -> dict[str, bool]:
    return {name: value for choice in composition for name, value in choice.optimizer}


def optimizer_with(factory: Any, composition: Composition) -> Any:
    """The factory of the optimizer with the options of `composition`; unchanged where it sets none."""
    options = optimizer_options(composition)
    return partial(factory, **options) if options else factory


def possible_choices(arguments: Mapping[str, Any], device: torch.device) -> list[list[Choice]]:
    """What may be tried for a run on `device`, in the order in which it is tried: groups of alternatives.

    What the run has already is left out. What comes first is what others build on: a graph of a step is worth most for
    small networks, and the optimizer has to support it.

    arguments: those of `fit`
    """
    given = {name_of(plugin) for plugin in arguments.get("plugins", ())}
    cuda = device.type == "cuda"
    fused = supported(arguments["optimizer"], "fused")
    images = any(isinstance(module, CONVOLUTIONS) for module in arguments["model"].modules())
    groups: list[list[Choice]] = []

    def group(name: str, *choices: Choice, unless: Iterable[str] = ()) -> None:
        if choices and not given & {name, *unless}:
            groups.append([*choices])

    one_kernel = Choice("optimizer", optimizer=(("fused", True), ("foreach", False)))
    of_lists = Choice("optimizer", optimizer=(("foreach", True), ("fused", False)))
    group("optimizer", *[one_kernel] * fused, *[of_lists] * supported(arguments["optimizer"], "foreach"))
    if cuda:
        group("cudagraph", Choice("cudagraph", ("cudagraph",), one_kernel.optimizer if fused else (), warmup=6))
    half = ["bfloat16", "float16"] if cuda else ["bfloat16"]
    group("amp", *(Choice("amp", (f"amp:dtype={dtype}",), rounds=True) for dtype in half), unless=["bf16", "float8"])
    if images:
        group("channels_last", Choice("channels_last", ("channels_last",)))
    if cuda and images and not (torch.backends.cudnn.benchmark or torch.are_deterministic_algorithms_enabled()):
        group("cudnn_benchmark", Choice("cudnn_benchmark", settings=(("cudnn_benchmark", True),), warmup=4))
    if cuda and torch.get_float32_matmul_precision() == "highest":
        group("matmul", Choice("matmul", settings=(("matmul", "high"),), rounds=True))
    if not cuda:
        group("threads", *(Choice("threads", settings=(("threads", number),)) for number in other_thread_numbers()))
    group("split", Choice("split", ("split:into=2",)))
    modes = ["compile", *["compile:mode=reduce-overhead"] * cuda, "compile:mode=max-autotune-no-cudagraphs"]
    group("compile", *(Choice("compile", (mode,), draws=True, slow=True, warmup=4) for mode in modes))
    return groups


def name_of(plugin: Any) -> str:
    """The name of a plugin, given as text or as an instance."""
    return split_spec(plugin)[0] if isinstance(plugin, str) else plugin_name(type(plugin))


def supported(factory: Any, option: str) -> bool:
    """Whether an optimizer's factory takes an option of its class, such as fused, and does not set it already.

    That is known of a class, of a `functools.partial` of one, and of the command line's factories.
    """
    cls = getattr(factory, "func", factory)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        return False
    given = getattr(factory, "keywords", {})
    return option in inspect.signature(cls).parameters and not {"fused", "foreach", "differentiable"} & {*given}


def other_thread_numbers() -> list[int]:
    """Numbers of threads to try besides the one in use: all cores, half of them and one."""
    cores = os.cpu_count() or 1
    return [number for number in dict.fromkeys((cores, cores // 2, 1)) if number not in (0, torch.get_num_threads())]


def copies_in_advance(arguments: Mapping[str, Any], device: torch.device) -> list[Choice]:
    """What may be tried where batches are copied to the device, which only shows when the data is read."""
    given = {name_of(plugin) for plugin in arguments.get("plugins", ())}
    return [Choice("prefetch", ("prefetch",))] if device.type == "cuda" and "prefetch" not in given else []


def worker_numbers(current: int) -> list[int]:
    """Numbers of loader processes to try besides the current one: powers of two, none of them above the cores."""
    cores = os.cpu_count() or 1
    numbers = {0, cores, *(2**power for power in range(8) if 2**power <= cores)} - {current}
    return sorted(numbers, key=lambda number: (number != cores, -number))
