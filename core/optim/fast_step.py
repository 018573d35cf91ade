"""Optimizer steps without the wrappers that torch puts around the methods of its optimizers.

The wrappers serve torch.compile and the profiler. They take a fifth of a small step, and the first call of one imports
torch._dynamo, which takes a second or two. Here the same arithmetic is called directly, for the optimizers in
`KNOWN`, unless the wrappers are needed. `LOOPCTL_FAST_STEP=0` in the environment switches this off, and it is off where
a version of torch lacks one of the private names that it uses.
"""
from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

# Optimizers of torch whose step does nothing with a closure but call it once, first.
KNOWN = ("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop",
         "Rprop", "SGD", "SparseAdam")
SINGLE_CLOSURE_CALL: set[Any] = {vars(torch.optim)[name] for name in KNOWN if name in vars(torch.optim)}
OPTIMIZER_MODULE = sys.modules[Optimizer.__module__]        # it holds the hooks of all optimizers
PRIVATE = [(OPTIMIZER_MODULE, "_global_optimizer_pre_hooks"), (OPTIMIZER_MODULE, "_global_optimizer_post_hooks"),
           (torch, "_disable_dynamo"), (torch.autograd, "_profiler_enabled")]
ATTRIBUTES = {"_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"}        # private ones of every optimizer
AVAILABLE = (os.environ.get("LOOPCTL_FAST_STEP") != "0" and all(hasattr(owner, name) for owner, name in PRIVATE)
             and Optimizer.__annotations__.keys() >= ATTRIBUTES)


def fast_step(optimizer: Any, closure: Callable[[], Tensor]) -> Tensor:
    """Do what `optimizer.step(closure)` does; return the loss.

    As in a plain loop, the closure is called before the step, unless the optimizer may call it several times. Hooks on
    the optimizer, other wrappers around its `step` and the profiler work as usual.
    """
    if stepped_class(optimizer) not in SINGLE_CLOSURE_CALL:
        if type(optimizer) is not LBFGS:
            return step_of_others(optimizer, closure)
        return optimizer.step(closure)
    loss = closure()
    if (not AVAILABLE or torch.autograd._profiler_enabled() or "step" in vars(optimizer)
            or OPTIMIZER_MODULE._global_optimizer_pre_hooks or OPTIMIZER_MODULE._global_optimizer_post_hooks
            or optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
            or optimizer.defaults.get("differentiable")):
        optimizer.step()
    else:
        with torch.no_grad():
            unwrapped(type(optimizer).step)(optimizer)
    return loss


def stepped_class(optimizer: Any) -> type:
    """The class that makes an update: of a ZeroRedundancyOptimizer, that of the optimizer that it wraps."""
    return type(optimizer.optim if is_divided(optimizer) else optimizer)


def is_divided(optimizer: Any) -> bool:
    """Whether the state of an optimizer is divided among processes, as that of a ZeroRedundancyOptimizer."""
    return hasattr(optimizer, "consolidate_state_dict")


def step_of_others(optimizer: Any, closure: Callable[[], Tensor]) -> Tensor:
    """Step an optimizer that may call the closure once, several times or never; return the loss at the first point.

    As in a plain loop, the gradients are computed before the step. So they are there for an optimizer that ignores the
    closure or takes none. Its first call of the closure gets that loss, unless it has changed the weights before.
    """
    loss = closure()
    if not takes_closure(optimizer):
        optimizer.step()
        return loss
    known, unchanged = [loss], versions(optimizer)

    def known_at_first() -> Tensor:
        if known and versions(optimizer) == unchanged:
            return known.pop()
        known.clear()
        with torch.enable_grad():
            return closure()

    optimizer.step(known_at_first)
    return loss


def versions(optimizer: Any) -> list[Any]:
    """What changes when the optimizer, or a closure, changes a weight or a gradient."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [(parameter._version, id(parameter.grad), None if parameter.grad is None else parameter.grad._version)
            for parameter in parameters]


def takes_closure(optimizer: Any) -> bool:
    """Whether `optimizer.step` can be called with a closure."""
    try:
        inspect.signature(optimizer.step).bind(None)
    except TypeError:
        return False
    except ValueError:          # some callables written in C have no signature
        return True
    return True


def takes_model(factory: Any) -> bool:
    """Whether a factory of optimizers takes the model in place of parameter groups: its first argument is `model`."""
    try:
        return next(iter(inspect.signature(factory).parameters), "") == "model"
    except (TypeError, ValueError):         # some callables written in C have no signature
        return False


def zero_grad(optimizer: Optimizer, others: Iterable[Tensor] = ()) -> None:
    """Do what `optimizer.zero_grad()` does; call that method where the optimizer's class overrides it.

    others: parameters that the optimizer does not hold, whose gradients are cleared as well
    """
    for parameter in others:
        parameter.grad = None
    own = getattr(optimizer.zero_grad, "__func__", None) is not Optimizer.zero_grad
    if own or not AVAILABLE or torch.autograd._profiler_enabled():
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
    if not AVAILABLE:
        yield
        return
    methods = {name: vars(Optimizer)[name] for name in ("add_param_group", "state_dict", "load_state_dict")}
    for name, method in methods.items():
        setattr(Optimizer, name, unwrapped(method))
    try:
        yield
    finally:
        for name, method in methods.items():
            setattr(Optimizer, name, method)
