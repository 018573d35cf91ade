"""Optimizers by name: every class of torch.optim, or `package.module:Class`."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from loopctl.cli.specs import names_in_source, resolve
from loopctl.composition.option_types import FLOAT32_MAX
from loopctl.errors import UsageError, one_line

if TYPE_CHECKING:
    import torch


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

    from loopctl.optim.fast_step import without_dynamo_wrappers

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
    if not (isinstance(rate, int | float) and 0 <= rate <= FLOAT32_MAX):
        raise UsageError(f"lr is {rate}; a learning rate is a number from 0, such as 1e-3")
    if cls in classes.values():
        check(name, cls, options)

    def factory(params: Any) -> Any:
        try:
            return cls(params, **options)
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise UsageError(f"optimizer {name}: {one_line(error)}") from error

    weight = torch.full((1, 1), 2.5, requires_grad=True)
    with without_dynamo_wrappers():
        tried = factory([weight])                                  # so that a wrong option is known now
    if not isinstance(tried, torch.optim.Optimizer):
        raise UsageError(f"optimizer {name} made a {type(tried).__name__}, not a torch.optim.Optimizer")
    if cls in classes.values() and device == "cpu":                # what a GPU has may not work with this weight
        step(name, tried, weight)
    return factory, None if own else tried.defaults.get("lr")


def check(name: str, cls: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise UsageError for pairs that are none, of which some of torch's classes see but the first two values."""
    for key, parameter in inspect.signature(cls).parameters.items():
        usual, value = parameter.default, options.get(key)
        if isinstance(usual, tuple) and isinstance(value, tuple) and len(value) != len(usual):
            raise UsageError(f"optimizer {name}: {key} takes {len(usual)} values, as in "
                             f"{key}={','.join(map(str, usual))}, not {value!r}")


def step(name: str, tried: torch.optim.Optimizer, weight: torch.Tensor) -> None:
    """Try one update, on the way to the minimum of weight**4: some of torch's classes look at an option only there."""
    import torch

    from loopctl.optim.fast_step import fast_step

    looks = iter(range(99))

    def closure() -> torch.Tensor:
        next(looks)
        gradient = 4 * weight.detach() ** 3
        weight.grad = gradient.to_sparse() if isinstance(tried, torch.optim.SparseAdam) else gradient
        return (weight.detach() ** 4).sum()

    try:
        closure()
        fast_step(tried, closure)
    except StopIteration:               # it looks on and on, as it may
        return
    except Exception as error:
        raise UsageError(f"optimizer {name}: {one_line(error) or type(error).__name__}") from error
