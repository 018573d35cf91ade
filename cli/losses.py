"""Losses for `--loss`: torch.nn's by name, `package.module:Thing` or the model's own; and functions for `--forward`."""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from loopctl.cli.optimizers import is_dict
from loopctl.cli.specs import names_in_source, resolve, with_options
from loopctl.composition.discovery import load
from loopctl.errors import UsageError

# A class of torch.nn that is called with an output and a target.
LOSS = (r"^class (\w+)Loss\(_(?:Weighted)?Loss\):\n(?:(?!class ).*\n)*?"
        r"    def forward\(self, \w+: Tensor, target: Tensor\)")

OWN = "model"                # the loss is the one that the model returns
TENSORS = ("weight", "pos_weight")


def known_names() -> list[str]:
    """The names of torch.nn's losses of an output and a target, and `model`, found without importing torch."""
    return sorted([*map(snake_case, torch_classes()), OWN])


def torch_classes() -> list[str]:
    """The names of those classes without "Loss", read from torch's source."""
    return [*names_in_source("torch", "nn/modules", LOSS)]


def snake_case(name: str) -> str:
    """The name of a class in lower case: BCEWithLogits is bce_with_logits, SmoothL1 is smooth_l1."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def make(spec: str) -> Callable[[Any, Any], Any] | None:
    """Return the loss function that `spec` names; None for `model`.

    A name of torch.nn may be written in any case, with or without underscores, and with "Loss" at its end. A class is
    instantiated with the options, a function gets them as keyword arguments. Raises UsageError where that fails.
    """
    from torch import float32, nn, tensor

    every = {snake_case(name.removesuffix("Loss")): cls for name, cls in vars(nn).items() if name.endswith("Loss")}
    classes = {key: every[key] for key in map(snake_case, torch_classes())}
    head, colon, rest = spec.partition(":")
    plain = {key.replace("_", ""): key for key in [*every, OWN]}
    key = plain.get(re.sub(r"_|loss$", "", head.lower()), head)
    if key == OWN:
        if colon:
            raise UsageError(f"loss {OWN} has no options, because the model computes it; pass them to the model")
        return None
    if key in every and key not in classes:
        raise UsageError(f"loss {key} is not one of an output and a target; compute it in a function of your own, "
                         "--forward file.py:function")
    name, found, options = resolve("loss", f"{key}{colon}{rest}", lambda: [*sorted(classes), OWN], classes.__getitem__)
    for option in TENSORS:
        if found in classes.values() and isinstance(options.get(option), int | float | tuple):
            options[option] = tensor(options[option], dtype=float32)
    loss = with_options(f"loss {name}", found, options, "output, target", {})
    if not callable(loss):
        raise UsageError(f"loss {name}: an instance of it cannot be called; define __call__(output, target)")
    reduction = getattr(loss, "reduction", "mean")
    if reduction not in ("mean", "sum"):
        raise UsageError(f"loss {name}: reduction is {reduction!r}; use mean or sum, so that a batch has one loss")
    return loss


def make_forward(spec: str) -> Any:
    """Return the function `forward(model, batch)` that `spec` names by its path, or the dict of such functions."""
    from loopctl.model.forward import takes_state

    if ":" not in spec:
        raise UsageError(f"--forward {spec}: name a function in a file or a module, as in file.py:function")
    name, found, options = resolve("forward", spec, list, load, is_object=is_dict)
    if is_dict(found):
        return dict(found)
    forward = with_options(f"forward {name}", found, options, "model, batch" + ", state" * takes_state(found), {})
    if not callable(forward):
        raise UsageError(f"forward {name}: an instance of it cannot be called; define __call__(model, batch)")
    return forward
