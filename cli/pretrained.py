"""Weights to begin with: `--init FILE`, and torchvision's models with weights and a new last layer."""
from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from loopctl.composition.options import Option, parse_options
from loopctl.errors import UsageError

if TYPE_CHECKING:
    from torch import nn


AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")       # second outputs in files of googlenet and inception_v3


def load_init(model: nn.Module, spec: str) -> str:
    """Load the weights that `spec`, FILE or FILE:strict=false, names; return the spec with the file that was read.

    Raises UsageError where they cannot be read, or do not fit.
    """
    from loopctl.checkpoint.weights_file import find_weights, load_weights

    found = re.fullmatch(r"(.+?):(\w+=[^/]*)", spec)          # a path may have colons
    path, text = found.groups() if found else (spec, "")
    if not path.strip():
        raise UsageError(f"--init: {path!r} is not a path; leave it out, or pass a file")
    options = parse_options("--init", text, {"strict": Option("strict", bool, True, "")})
    try:
        file = find_weights(Path(path))
        load_weights(model, file, **options)
    except UsageError as error:
        raise UsageError(f"--init: {error}") from error
    return f"{file}:{text}" if text else str(file)


def load_pretrained(label: str, model: nn.Module, path: str) -> None:
    """Load a file of weights, except for the last layer where the file's is for another number of classes.

    Raises UsageError, which starts with `label`, where the file cannot be read, or something else does not fit.
    """
    from loopctl.checkpoint.weights_file import find_weights, load_tensors, read_weights, without_wrappers

    try:
        file, own = find_weights(Path(path)), model.state_dict(keep_vars=True)
        tensors = {name: tensor for name, tensor in without_wrappers(read_weights(file), own).items()
                   if not name.startswith(AUXILIARY)}
        name, _ = require_last_layer(label, model)
        for key in (f"{name}.weight", f"{name}.bias"):
            if key in tensors and key in own and tensors[key].shape[1:] == own[key].shape[1:]:
                tensors[key] = tensors[key] if tensors[key].shape == own[key].shape else own[key].detach()
        load_tensors(model, tensors, file, strict=True)
    except UsageError as error:
        raise UsageError(f"{label}: {str(error).removeprefix(f'{label}: ')}") from error


def replace_head(label: str, model: nn.Module, classes: int) -> None:
    """Replace the last layer of `model` by a new one for another number of classes; not if the number is the same.

    Raises UsageError, which starts with `label`, where it has no last layer that can be replaced.
    """
    from torch import nn

    name, layer = require_last_layer(label, model)
    if layer.weight.shape[0] == classes:
        return
    bias = layer.bias is not None
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute,
            nn.Linear(layer.in_features, classes, bias) if isinstance(layer, nn.Linear) else
            nn.Conv2d(layer.in_channels, classes, layer.kernel_size, bias=bias))        # type: ignore[arg-type]


def require_last_layer(label: str, model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Return the layer of `model` that gives the logits, with its name.

    Raises UsageError, which starts with `label`, where there is none.
    """
    from loopctl.model.layers import last_layer

    if found := last_layer(model):
        return found
    raise UsageError(f"{label}: it has no linear layer or convolution to replace by one for the classes of the data; "
                     "leave out weights")
