"""What torch's optimizers do, without what surrounds it.

Their methods come wrapped in layers for torch.compile and for the profiler. On a small step these cost a fifth of it,
and the first call of any of them imports torch._dynamo, for a second or two. Here the same arithmetic is reached
directly, unless somebody has asked for what the layers are there for.
"""
from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

# They do nothing with a closure but call it once, first.
SINGLE_CLOSURE_CALL = {kind for kind in vars(torch.optim).values() if isinstance(kind, type)} - {LBFGS, Optimizer}
OPTIMIZER_MODULE = sys.modules[Optimizer.__module__]              # which has the hooks of all optimizers


def fast_step(optimizer: Optimizer, closure: Callable[[], Tensor]) -> Tensor:
    """Do what `optimizer.step(closure)` does; return the loss.

    As in a plain loop, closure() comes before the step where an optimizer looks at it once. Wrappers that somebody else
    put around the method are kept, hooks are called, and a profiler sees what it always does.
    """
    if type(optimizer) not in SINGLE_CLOSURE_CALL:
        return optimizer.step(closure)      # type: ignore[arg-type, return-value]   # a closure returns a tensor
    loss = closure()
    if (optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
            or OPTIMIZER_MODULE._global_optimizer_pre_hooks or OPTIMIZER_MODULE._global_optimizer_post_hooks
            or "step" in vars(optimizer) or optimizer.defaults.get("differentiable")
            or torch.autograd._profiler_enabled()):
        optimizer.step()
    else:
        with torch.no_grad():
            unwrapped(type(optimizer).step)(optimizer)
    return loss


def zero_grad(optimizer: Optimizer) -> None:
    """Do what `optimizer.zero_grad()` does, unless it is the optimizer's own."""
    if getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


@cache
def unwrapped(method: Any) -> Any:
    """A method without torch's own layers; one that somebody else has wrapped as it is."""
    layers = {inspect.getfile(Optimizer), inspect.getfile(torch._disable_dynamo)}
    while hasattr(method, "__wrapped__") and method.__code__.co_filename in layers:
        method = method.__wrapped__
    return method


@contextmanager
def without_dynamo_wrappers() -> Iterator[None]:
    """Optimizers are made, saved and loaded in here without importing torch._dynamo."""
    methods = {name: vars(Optimizer)[name] for name in ("add_param_group", "state_dict", "load_state_dict")}
    for name, method in methods.items():
        setattr(Optimizer, name, unwrapped(method))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(Optimizer, name, method)
