"""Optimizer steps without the wrappers that torch puts around the methods of its optimizers.

The wrappers serve torch.compile and the profiler. They take a fifth of a small step, and the first call of one imports
torch._dynamo, which takes a second or two. Here the same arithmetic is called directly, unless the wrappers are needed.
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

# Optimizers whose step does nothing with a closure but call it once, first.
SINGLE_CLOSURE_CALL = {kind for kind in vars(torch.optim).values() if isinstance(kind, type)} - {LBFGS, Optimizer}
OPTIMIZER_MODULE = sys.modules[Optimizer.__module__]        # it holds the hooks of all optimizers


def fast_step(optimizer: Optimizer, closure: Callable[[], Tensor]) -> Tensor:
    """Do what `optimizer.step(closure)` does; return the loss.

    As in a plain loop, the closure is called before the step, unless the optimizer may call it several times. Hooks on
    the optimizer, other wrappers around its `step` and the profiler work as usual.
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
    """Do what `optimizer.zero_grad()` does; call that method where the optimizer's class overrides it."""
    if getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


@cache
def unwrapped(method: Any) -> Any:
    """A method without torch's own wrappers; wrappers from elsewhere stay."""
    wrappers = {inspect.getfile(Optimizer), inspect.getfile(torch._disable_dynamo)}
    while hasattr(method, "__wrapped__") and method.__code__.co_filename in wrappers:
        method = method.__wrapped__
    return method


@contextmanager
def without_dynamo_wrappers() -> Iterator[None]:
    """Inside this block optimizers are made, saved and loaded without importing torch._dynamo."""
    methods = {name: vars(Optimizer)[name] for name in ("add_param_group", "state_dict", "load_state_dict")}
    for name, method in methods.items():
        setattr(Optimizer, name, unwrapped(method))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(Optimizer, name, method)
