"""Optimizers by name for `--optimizer`: every class of torch.optim, or `package.module:Class`; or two, by a comma."""
from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any

from loopctl.cli.specs import names_in_source, resolve
from loopctl.composition.discovery import split_head
from loopctl.composition.option_types import FLOAT32_MAX
from loopctl.composition.quoting import BRACKETS, split
from loopctl.errors import UsageError, one_line

if TYPE_CHECKING:
    import torch


def known_names() -> list[str]:
    """The names of torch.optim's classes in lower case, found without importing torch."""
    return sorted(map(str.lower, class_modules()))


def class_modules() -> dict[str, str]:
    """The names of torch.optim's classes and their modules, read from its source."""
    classes = names_in_source("torch", "optim", r"^class (\w+)\((?:Optimizer|Adam)\)")
    return {name: module for name, module in classes.items() if not name.startswith("_")}


def make(spec: str, lr: float | None, device: str = "cpu") -> tuple[Any, float | None]:
    """Return a factory of the optimizer that `spec` names, and its learning rate: `lr`, or the class's default.

    The learning rate is None if `spec` has it among its options. A dict of factories, by the part of the model that
    each optimizer trains, is returned as it is. Two optimizers with a comma in between, "muon:lr=0.02,adamw", are such
    a dict: the first trains the hidden matrices, the second everything else. On a GPU the update is one fused kernel
    where torch has one, unless `spec` sets foreach, fused or differentiable. Raises UsageError where the options are
    wrong.
    """
    specs = split_specs(spec, known_names())
    return make_one(spec, lr, device) if len(specs) == 1 else (make_two(spec, specs, lr, device), None)


def split_specs(text: str, known: Container[str]) -> list[str]:
    """Split the specs of optimizers at the commas between them. Other commas are between options, or within a value.

    A spec begins where a piece is a name, where it has a colon before any equals sign, as in `adamw:lr=1e-3`, and after
    a spec without options.
    """
    specs: list[str] = []
    for piece in split(text):
        plain = piece.strip()
        begins = plain[:1] not in ('"', *BRACKETS) and ":" in plain.partition("=")[0]
        if not specs or begins or plain in known or "=" not in specs[-1]:
            specs.append(plain)
        else:
            specs[-1] += f",{piece}"
    return specs


def make_two(text: str, specs: list[str], lr: float | None, device: str) -> dict[str, Any]:
    """Return two optimizers by name, that of the hidden matrices and that of everything else.

    Raises UsageError where there are more, where they have one name, or where the second takes matrices only.
    """
    import torch

    from loopctl.optim.several import by_kind

    label = f"optimizer {text}"
    if len(specs) > 2:
        raise UsageError(f"{label}: {len(specs)} optimizers; there may be two, that of the hidden matrices and that of "
                         "everything else, or a dict of them by the part of the model in a file: file.py:name")
    if lr is not None:
        raise UsageError(f"{label}: --lr would be that of both; write it among the options of each, as in "
                         f"{split_head(specs[0], known_names())[0]}:lr={lr:g}")
    made = {}
    for spec in specs:
        name = split_head(spec, known_names())[0].rpartition(":")[2]
        factory = make_one(spec, None, device)[0]
        if is_dict(factory):
            raise UsageError(f"{label}: {spec} is a dict of optimizers, which cannot be one of two; use it alone")
        if name in made:
            raise UsageError(f"{label}: both are called {name}; use a dict by the part of the model in a file: "
                             "file.py:name")
        made[name] = factory
    try:
        made[name]([{"params": [torch.zeros(1, requires_grad=True)]}])
    except UsageError as error:
        raise UsageError(f"{error}; the second optimizer has everything that is no hidden matrix, so put {name} "
                         "first") from error
    return by_kind(**made)


def make_one(spec: str, lr: float | None, device: str) -> tuple[Any, float | None]:
    """Return what `make` does for one optimizer."""
    import torch

    from loopctl.optim.fast_step import KNOWN, takes_model, without_dynamo_wrappers

    classes = {name.lower(): cls for name, cls in vars(torch.optim).items()
               if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer}
    later = {name.lower(): name for name in KNOWN if name.lower() not in classes}
    if (head := split_head(spec, classes)[0]) in later:
        raise UsageError(f"optimizer {head}: torch {torch.__version__} has no torch.optim.{later[head]}, which later "
                         "versions have; install one, or name the class of another package")
    name, cls, options = resolve("optimizer", spec, lambda: sorted(classes), classes.__getitem__, is_object=is_dict)
    if is_dict(cls):
        if lr is not None:
            raise UsageError(f"optimizer {name} is a dict of optimizers with their own learning rates; leave out --lr")
        return dict(cls), None
    if lr is not None and "lr" in options:
        raise UsageError(f"optimizer {name}: lr is given twice, as --lr and as an option; leave one out")
    lr_in_spec = "lr" in options
    options |= {} if lr is None else {"lr": lr}
    given = dict(options)
    excluded = {"foreach", "fused", "differentiable"} & set(options)
    if device == "cuda" and "fused" in inspect.signature(cls).parameters and not excluded:
        options["fused"] = True
    rate = options.get("lr", 0)
    if not (isinstance(rate, int | float) and 0 <= rate <= FLOAT32_MAX):
        raise UsageError(f"lr is {rate}; use a number from 0 to 3.4e38, such as 1e-3")
    if cls in classes.values():
        check_tuple_options(name, cls, options)

    def factory(params: Any, **more: Any) -> Any:
        try:
            return cls(params, **options | more)
        except UsageError:
            raise
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise UsageError(f"optimizer {name}: {one_line(error)}") from error
        except Exception as error:              # their messages mean little without the type, such as KeyError's
            raise UsageError(f"optimizer {name}: {type(error).__name__}: {one_line(error)}") from error

    factory.__dict__.update(func=cls, keywords=given)              # as of a functools.partial, for `tune`
    weight = torch.nn.Parameter(torch.full((1, 1), 2.5))
    groups: Any = [{"params": [weight]}]
    if takes_model(cls):
        factory.__dict__["__signature__"] = inspect.signature(cls)
        groups = torch.nn.Module()
        groups.weight = weight
    with without_dynamo_wrappers():
        optimizer = factory(groups)                                # raises UsageError for a wrong option
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(f"optimizer {name} returned a {type(optimizer).__name__}, not a torch.optim.Optimizer")
    if cls in classes.values() and device == "cpu":                # fused kernels of a GPU refuse a weight on the CPU
        try_step(name, optimizer, weight)
    return factory, None if lr_in_spec else optimizer.defaults.get("lr")


def is_dict(found: Any) -> bool:
    return isinstance(found, Mapping)


def check_tuple_options(name: str, cls: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise UsageError for a tuple of the wrong length, such as betas of three: torch does not always check it."""
    for key, parameter in inspect.signature(cls).parameters.items():
        default, value = parameter.default, options.get(key)
        if isinstance(default, tuple) and isinstance(value, tuple) and len(value) != len(default):
            raise UsageError(f"optimizer {name}: {key} takes {len(default)} values, as in "
                             f"{key}={','.join(map(str, default))}, not {value!r}")


def try_step(name: str, optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> None:
    """Make one update of `weight` with the loss weight**4. Some of torch's classes check an option only in `step`.

    Raises UsageError where the step fails.
    """
    import torch

    from loopctl.optim.fast_step import fast_step

    calls = iter(range(99))             # a line search may call the closure very often; 99 calls are enough

    def closure() -> torch.Tensor:
        next(calls)
        gradient = 4 * weight.detach() ** 3
        weight.grad = gradient.to_sparse() if isinstance(optimizer, torch.optim.SparseAdam) else gradient
        return (weight.detach() ** 4).sum()

    try:
        closure()
        fast_step(optimizer, closure)
    except StopIteration:
        return
    except Exception as error:
        raise UsageError(f"optimizer {name}: {one_line(error) or type(error).__name__}") from error
