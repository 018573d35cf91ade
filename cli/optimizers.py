"""Optimizers by name: every class of torch.optim, or `package.module:Class`."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from math import isfinite
from typing import Any

from loopctl.cli.specs import names_in_source, resolve
from loopctl.errors import UsageError, one_line


def known() -> list[str]:
    """The names, without importing torch."""
    classes = names_in_source("torch", "optim", r"^class (\w+)\((?:Optimizer|Adam)\)")
    return sorted({name.lower() for name in classes if not name.startswith("_")})


def make(spec: str, lr: float | None, device: str = "cpu") -> tuple[Callable[[Any], Any], float | None]:
    """The factory that `spec` says, and its learning rate, `lr` or the class's own; None where `spec` says it.

    On a GPU the update is one fused kernel where torch has that, unless `spec` says foreach, fused or what excludes it.
    Raises UsageError where the class refuses what it is given.
    """
    import torch

    classes = {name.lower(): cls for name, cls in vars(torch.optim).items()
               if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer}
    name, cls, options = resolve("optimizer", spec, lambda: sorted(classes), classes.__getitem__)
    if lr is not None and "lr" in options:
        raise UsageError(f"optimizer {name}: lr is given twice, as --lr and as an option; leave one out")
    own = "lr" in options
    options |= {} if lr is None else {"lr": lr}
    excluded = {"foreach", "fused", "differentiable"} & set(options)
    if device == "cuda" and "fused" in inspect.signature(cls).parameters and not excluded:
        options["fused"] = True
    rate = options.get("lr", 0)
    if not (isinstance(rate, int | float) and isfinite(rate) and rate >= 0):
        raise UsageError(f"lr is {rate}; a learning rate is a number from 0, such as 1e-3")

    def factory(params: Any) -> Any:
        try:
            return cls(params, **options)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise UsageError(f"optimizer {name}: {one_line(error)}") from error

    tried = factory([torch.zeros(1, 1, requires_grad=True)])       # so that a wrong option is known now
    if not isinstance(tried, torch.optim.Optimizer):
        raise UsageError(f"optimizer {name} made a {type(tried).__name__}, not a torch.optim.Optimizer")
    return factory, None if own else tried.defaults.get("lr")
