"""The layers of a model, from its input to its output, as layer-wise learning rates count them."""
from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from loopctl.model.own_names import own_children, own_modules, unwrapped

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each layer of `model`, from its input to its output."""
    found: list[list[nn.Parameter]] = []
    waiting: list[nn.Parameter] = []        # parameters that belong to the next layer
    seen: set[nn.Parameter] = set()         # a shared parameter belongs to the first layer that has it
    after_block = True
    for part, parameters in undivided_parts(unwrapped(model), False):
        new = [parameter for parameter in parameters if parameter not in seen]
        seen |= set(new)
        norm = part is not None and all(parameter.ndim <= 1 for parameter in parameters)
        if not new:
            continue
        if (norm and after_block) or (part is None and not found):
            waiting += new
        elif norm or part is None:
            found[-1] += new
        else:
            found.append(waiting + new)
            waiting, after_block = [], bool(own_children(part))
    return [*found[:-1], found[-1] + waiting] if found else [waiting]


def last_layer(model: nn.Module) -> tuple[str, nn.Linear | nn.Conv2d] | None:
    """The layer of `model` that gives the logits, with its name: the last linear one, else the last convolution."""
    for kind in (nn.Linear, nn.Conv2d):
        if found := [(name, layer) for name, layer in own_modules(model) if isinstance(layer, kind)]:
            return found[-1]
    return None


def undivided_parts(module: nn.Module, in_stack: bool) -> Iterator[tuple[nn.Module | None, list[nn.Parameter]]]:
    """The submodules that are not divided further, with their parameters, in order. A divided module yields None with
    the parameters that it has outside of its submodules."""
    yield None, list(module.parameters(recurse=False))
    in_stack = in_stack or is_stack(module)
    for child in own_children(module):
        if divides(child, in_stack):
            yield from undivided_parts(child, in_stack)
        else:
            yield child, list(child.parameters())


def divides(module: nn.Module, in_stack: bool) -> bool:
    """Whether `module` is several layers. A block, which is an element of a stack, is one layer."""
    if isinstance(module, CONTAINERS):
        return type(module) in CONTAINERS or any(has_children(child) for child in own_children(module))
    return not in_stack and any(is_stack(inner) for inner in module.modules())


def is_stack(module: nn.Module) -> bool:
    """Whether `module` is a container with several blocks of the same class."""
    classes = [type(child) for child in own_children(module) if has_children(child)]
    return isinstance(module, CONTAINERS) and len(set(classes)) < len(classes)


def has_children(module: nn.Module) -> bool:
    return any(True for _ in own_children(module))
