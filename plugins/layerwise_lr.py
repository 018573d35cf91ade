"""Learning rates by layer."""
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
    """Give parts of the model learning rates of their own.

    What has the optimizer's own rate is its first group, whose rate the history shows. Layer-wise decay is ELECTRA's,
    arXiv:2003.10555, with layers counted as BEiT does, arXiv:2106.08254: each block of a stack and each other part is
    one; a norm goes with the layer it follows or, after a block, with the layer that it feeds.

    rates: rates by pattern, conv1.*=0.01,fc.*=x10, where x10 is ten times the optimizer's own; a pattern is a glob
        (conv1.*), the name of a module (layer1) or a regular expression (/^layer[12]\\./), and the first that matches
        counts
    decay: factor of the rate from each layer to the one before it, for what no pattern of rates matches
    no_decay: no weight decay for biases and norms, that is for parameters of at most one dimension
    """

    rates: dict[str, float | str] = field(default_factory=dict)
    decay: float | None = None
    no_decay: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rates, dict):
            raise ValueError(f"rates takes rates by pattern, such as {{'conv1.*': 0.01}}, not {self.rates!r}")
        if not (self.rates or self.decay is not None or self.no_decay):
            raise ValueError("takes rates, decay or no_decay; without them it changes nothing")
        if self.decay is not None and not 0 < self.decay <= 1:
            raise ValueError(f"decay is above 0 and at most 1, not {self.decay}")
        self.parsed = {pattern: parse_rate(pattern, rate) for pattern, rate in self.rates.items()}

    @hookimpl
    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        own, taken, rated = own_rate(run), set(), []
        for pattern, parameters in matching_parameters(run.model, self.parsed).items():
            number, relative = self.parsed[pattern]
            left = [parameter for parameter in parameters if parameter not in taken]
            if not left:
                raise UsageError(f"rates: patterns before {pattern!r} match all that it matches; put it before them")
            taken |= set(left)
            rated.append((own * number if relative else like(own, number), left))
        if self.decay is None:
            rest = [(own, list(run.model.parameters()))]
        else:
            rest = [(own * self.decay ** depth, layer) for depth, layer in enumerate(reversed(layers(run.model)))]
        rest = [(rate, [parameter for parameter in layer if parameter not in taken]) for rate, layer in rest]
        return [group for rate, parameters in rest + rated for group in self.groups(rate, parameters)]

    def groups(self, lr: Any, parameters: list[nn.Parameter]) -> Iterator[dict[str, Any]]:
        """The parameters that are trained: one group, or two where some have no weight decay."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        flat = [parameter for parameter in trained if self.no_decay and parameter.ndim <= 1]
        others = [parameter for parameter in trained if not self.no_decay or parameter.ndim > 1]
        if others:
            yield {"params": others, "lr": lr}
        if flat:
            yield {"params": flat, "lr": lr, "weight_decay": 0.0}


def parse_rate(pattern: str, rate: float | str) -> tuple[float, bool]:
    """The number, and whether it is a factor of the optimizer's own rate. Raises ValueError."""
    text = str(rate).strip()
    try:
        number = float(text.removeprefix("x").replace("_", "?"))          # 1_0 is no number that anybody means
    except ValueError:
        number = -1.0
    if not pattern or not (isfinite(number) and number >= 0):
        raise ValueError(f"rates takes conv1.*=0.01, or conv1.*=x10 for ten times the optimizer's own rate, "
                         f"not {pattern}={rate}")
    return number, text.startswith("x")


def own_rate(run: Any) -> Any:
    """The learning rate that the user's factory has of itself: asked by having it make an optimizer for nothing.

    Only so are the groups complete when the real optimizer is made, its rates right from the first look at them.
    """
    nothing = nn.Parameter(torch.zeros(1, 1, device=run.device))       # 2-D, for some optimizers take only matrices
    return run.optimizer([{"params": [nothing]}]).param_groups[0]["lr"]


def like(own: Any, number: float) -> Any:
    """`number`, as a tensor where the optimizer keeps its rates in tensors."""
    return torch.full_like(own, number) if isinstance(own, Tensor) else number


def layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each layer of `model`, from its input to its output."""
    found: list[list[nn.Parameter]] = []
    waiting: list[nn.Parameter] = []        # for the layer they feed
    seen: set[nn.Parameter] = set()         # shared ones belong to the first layer that has them
    after_block = True
    for part, inner in pieces(model, False):
        new = [parameter for parameter in inner if parameter not in seen]
        seen |= set(new)
        norm = part is not None and all(parameter.ndim <= 1 for parameter in inner)
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


def pieces(module: nn.Module, in_stack: bool) -> Iterator[tuple[nn.Module | None, list[nn.Parameter]]]:
    """The parts that are not divided further, and None with the parameters that a divided one has itself, in order."""
    yield None, list(module.parameters(recurse=False))
    in_stack = in_stack or is_stack(module)
    for child in module.children():
        if divides(child, in_stack):
            yield from pieces(child, in_stack)
        else:
            yield child, list(child.parameters())


def divides(module: nn.Module, in_stack: bool) -> bool:
    """Whether `module` is several layers; a block, that is an element of a stack, is one layer whatever is in it."""
    if isinstance(module, CONTAINERS):
        return type(module) in CONTAINERS or any(has_children(child) for child in module.children())
    return not in_stack and any(is_stack(inner) for inner in module.modules())


def is_stack(module: nn.Module) -> bool:
    """Whether `module` holds several blocks of a kind."""
    kinds = [type(child) for child in module.children() if has_children(child)]
    return isinstance(module, CONTAINERS) and len(set(kinds)) < len(kinds)


def has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())
