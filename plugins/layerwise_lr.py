"""Layer-wise learning rates, and no weight decay for biases and norms."""
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from loopctl import Run, UsageError, hookimpl
from loopctl.model.parameter_matching import matching_parameters

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(eq=False)
class LayerwiseLr:
    """Set different learning rates for different parts of the model.

    The first parameter group has the optimizer's own learning rate. A group's name is its pattern, or layer 3, counted
    from the input. Layer-wise decay is from ELECTRA, arXiv:2003.10555, with layers counted as in BEiT,
    arXiv:2106.08254: each block of a stack is a layer, and so is each other part; a norm belongs to the layer before it
    or, after a block, to the layer after it.

    rates: learning rates by pattern, conv1.*=0.01,fc.*=x10, where x10 is ten times the optimizer's own; a pattern is a
        glob (conv1.*), the name of a module (layer1) or a regular expression (/^layer[12]\\./); the first pattern that
        matches a parameter counts
    decay: factor of the learning rate from each layer to the one before it, for parameters that no pattern matches
    no_decay: no weight decay for biases and norms, that is, for parameters with at most one dimension
    """

    rates: dict[str, float | str] = field(default_factory=dict)
    decay: float | None = None
    no_decay: bool = False
    topic = "learning rates"

    def __post_init__(self) -> None:
        if not isinstance(self.rates, dict):
            raise ValueError(f"rates takes a dict of rates by pattern, such as {{'conv1.*': 0.01}}, not {self.rates!r}")
        if not (self.rates or self.decay is not None or self.no_decay):
            raise ValueError("one of rates, decay and no_decay is required; pass decay=0.75, for example")
        if self.decay is not None and not 0 < self.decay <= 1:
            raise ValueError(f"decay is above 0 and at most 1, not {self.decay}")
        self.parsed = {pattern: parse_rate(pattern, rate) for pattern, rate in self.rates.items()}

    @hookimpl
    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        base_lr, matched, by_pattern = optimizer_lr(run), set(), []
        for pattern, parameters in matching_parameters(run.model, self.parsed).items():
            number, relative = self.parsed[pattern]
            new = [parameter for parameter in parameters if parameter not in matched]
            if not new:
                raise UsageError(f"rates: earlier patterns match all parameters that {pattern!r} matches; put it first")
            matched |= set(new)
            by_pattern.append((pattern, base_lr * number if relative else same_type(base_lr, number), new))
        if self.decay is None:
            rest = [("rest", base_lr, list(run.model.parameters()))]
        else:
            found = layers(run.model)
            rest = [(f"layer {len(found) - depth}", base_lr * self.decay ** depth, layer)
                    for depth, layer in enumerate(reversed(found))]
        rest = [(name, lr, [parameter for parameter in layer if parameter not in matched]) for name, lr, layer in rest]
        return [group for part in rest + by_pattern for group in self.groups(*part)]

    def groups(self, name: str, lr: Any, parameters: list[nn.Parameter]) -> Iterator[dict[str, Any]]:
        """The parameter groups of the trainable `parameters`: one, or two if some have no weight decay."""
        trainable = [parameter for parameter in parameters if parameter.requires_grad]
        undecayed = [parameter for parameter in trainable if self.no_decay and parameter.ndim <= 1]
        decayed = [parameter for parameter in trainable if not self.no_decay or parameter.ndim > 1]
        if decayed:
            yield {"params": decayed, "lr": lr, "name": name}
        if undecayed:
            yield {"params": undecayed, "lr": lr, "name": f"{name} (no decay)", "weight_decay": 0.0}


def parse_rate(pattern: str, rate: float | str) -> tuple[float, bool]:
    """The number, and whether it is a factor of the optimizer's own rate. Raises ValueError if `rate` is neither."""
    text = str(rate).strip()
    try:
        number = float(text.removeprefix("x").replace("_", "?"))          # Python reads 1_0 as 10
    except ValueError:
        number = -1.0
    if not pattern or not (isfinite(number) and number >= 0):
        raise ValueError(f"rates takes conv1.*=0.01, or conv1.*=x10 for ten times the optimizer's own rate, "
                         f"not {pattern}={rate}")
    return number, text.startswith("x")


def optimizer_lr(run: Any) -> Any:
    """The learning rate that the user's factory sets, read from an optimizer of a dummy parameter.

    So the parameter groups have their final learning rates when the real optimizer is made.
    """
    dummy = nn.Parameter(torch.zeros(1, 1, device=run.device))         # 2-D, because some optimizers take only matrices
    return run.optimizer([{"params": [dummy]}]).param_groups[0]["lr"]


def same_type(lr: Any, number: float) -> Any:
    """`number`, as a tensor if `lr` is one."""
    return torch.full_like(lr, number) if isinstance(lr, Tensor) else number


def layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each layer of `model`, from its input to its output."""
    found: list[list[nn.Parameter]] = []
    waiting: list[nn.Parameter] = []        # parameters that belong to the next layer
    seen: set[nn.Parameter] = set()         # a shared parameter belongs to the first layer that has it
    after_block = True
    for part, parameters in undivided_parts(model, False):
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
            waiting, after_block = [], bool(list(part.children()))
    return [*found[:-1], found[-1] + waiting] if found else [waiting]


def undivided_parts(module: nn.Module, in_stack: bool) -> Iterator[tuple[nn.Module | None, list[nn.Parameter]]]:
    """The submodules that are not divided further, with their parameters, in order. A divided module yields None with
    the parameters that it has outside of its submodules."""
    yield None, list(module.parameters(recurse=False))
    in_stack = in_stack or is_stack(module)
    for child in module.children():
        if divides(child, in_stack):
            yield from undivided_parts(child, in_stack)
        else:
            yield child, list(child.parameters())


def divides(module: nn.Module, in_stack: bool) -> bool:
    """Whether `module` is several layers. A block, which is an element of a stack, is one layer."""
    if isinstance(module, CONTAINERS):
        return type(module) in CONTAINERS or any(has_children(child) for child in module.children())
    return not in_stack and any(is_stack(inner) for inner in module.modules())


def is_stack(module: nn.Module) -> bool:
    """Whether `module` is a container with several blocks of the same class."""
    classes = [type(child) for child in module.children() if has_children(child)]
    return isinstance(module, CONTAINERS) and len(set(classes)) < len(classes)


def has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())
