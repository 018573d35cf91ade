"""The header of a tape: with what the updates were made."""
from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def environment(device: torch.device) -> dict[str, Any]:
    """The versions and the settings that change the rounding of a run."""
    return {
        "torch": torch.__version__, "python": platform.python_version(), "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(), "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_benchmark": torch.backends.cudnn.benchmark}


def describe_parameters(named: Mapping[str, Tensor], optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Any]:
    """The parameters by name, with shape, dtype and whether they require gradients; and the groups that hold them."""
    names = {id(tensor): name for name, tensor in named.items()}
    groups = [{"optimizer": type(optimizer).__name__,
               "parameters": [names.get(id(parameter), "?") for parameter in group["params"]],
               "options": {key: value for key, value in group.items()
                           if isinstance(value, bool | str) or value is None}}
              for optimizer in optimizers for group in optimizer.param_groups]
    return {"parameters": [[name, "x".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch."),
                            tensor.requires_grad] for name, tensor in named.items()], "groups": groups}
