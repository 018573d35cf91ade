"""Read the weights that a run has written, `best.safetensors` or `weights.safetensors`, into a model."""
from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from loopctl.errors import UsageError, one_line


def load_weights(model: nn.Module, file: str | Path, strict: bool = True) -> list[str]:
    """Load a safetensors file of weights into `model`; return the names that only one of the two has.

    Tied weights, which the file has once, are filled in under all their names, and sparse tensors, which it has as
    dense ones, become sparse again. The file cannot run code.

    Raises UsageError where the file cannot be read, where a shape differs, or, with `strict`, where a name is missing.
    """
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read as weights: {one_line(error)}") from error
    own = model.state_dict(keep_vars=True)
    names = {id(own[name]): name for name in tensors if name in own}
    for name, tensor in own.items():
        if name not in tensors and id(tensor) in names:
            tensors[name] = tensors[names[id(tensor)]]
        if name in tensors and tensor.layout is not tensors[name].layout:
            tensors[name] = tensors[name].to_sparse(layout=tensor.layout)
    try:
        result = model.load_state_dict(tensors, strict=strict)
    except RuntimeError as error:
        raise UsageError(f"{file} does not fit the model: {one_line(error)}") from error
    return [*result.missing_keys, *result.unexpected_keys]
