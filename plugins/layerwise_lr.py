"""Layer-wise learning rates and weight decays, and no weight decay for biases and norms."""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from loopctl import Run, UsageError, hookimpl
from loopctl.model.layers import layers
from loopctl.model.ownership import loss_parameters
from loopctl.model.parameter_matching import matching_parameters
from loopctl.model.weight_decay import Kind, undecayed_parameters


@dataclass(eq=False)
class LayerwiseLr:
    """Set different learning rates and weight decays for different parts of the model.

    The first parameter group has the optimizer's own learning rate. A group's name is its pattern, or layer 3, counted
    from the input. Layer-wise decay is from ELECTRA, arXiv:2003.10555, with layers counted as in BEiT,
    arXiv:2106.08254: each block of a stack is a layer, and so is each other part; a norm belongs to the layer before it
    or, after a block, to the layer after it.

    rates: learning rates by pattern, conv1.*=0.01,fc.*=x10, where x10 is ten times the optimizer's own; a pattern is a
        glob (conv1.*), the name of a module (layer1) or a regular expression (/^layer[12]\\./); the first pattern that
        matches a parameter counts
    decay: factor of the learning rate from each layer to the one before it, for parameters that no pattern matches
    no_decay: what has no weight decay: norms, biases, embeddings (nn.Embedding), tokens (class tokens, positions, and
        what the model's own no_weight_decay() names), or true for all parameters with at most one dimension, which are
        the biases and norms of most models
    weight_decays: weight decays by pattern, as in rates, also for what no_decay would exclude
    """

    rates: dict[str, float | str] = field(default_factory=dict)
    decay: float | None = None
    no_decay: bool | list[Kind] = False
    weight_decays: dict[str, float | str] = field(default_factory=dict)
    topic = "learning rates"

    def __post_init__(self) -> None:
        if not isinstance(self.rates, dict):
            raise ValueError(f"rates takes a dict of rates by pattern, such as {{'conv1.*': 0.01}}, not {self.rates!r}")
        if not isinstance(self.weight_decays, dict):
            raise ValueError("weight_decays takes a dict of weight decays by pattern, such as {'conv1.*': 0.01}, not "
                             f"{self.weight_decays!r}")
        if not (self.rates or self.decay is not None or self.no_decay or self.weight_decays):
            raise ValueError("one of rates, decay, no_decay and weight_decays is required; pass decay=0.75, for "
                             "example")
        if self.decay is not None and not 0 < self.decay <= 1:
            raise ValueError(f"decay is above 0 and at most 1, not {self.decay}")
        self.parsed = {pattern: parse_number("rates", pattern, rate, "rate") for pattern, rate in self.rates.items()}
        self.parsed_decays = {pattern: parse_number("weight_decays", pattern, number, "weight decay")
                              for pattern, number in self.weight_decays.items()}

    @hookimpl
    def param_groups(self, run: Run) -> list[dict[str, Any]]:
        own = own_options(run)
        base_lr, decays = own["lr"], self.decays(run.model, own)
        by_pattern = [(pattern, base_lr * number if relative else same_type(base_lr, number), parameters)
                      for pattern, (number, relative), parameters in first_matches("rates", run.model, self.parsed)]
        matched = {parameter for *_, parameters in by_pattern for parameter in parameters}
        if self.decay is None:
            rest = [("rest", base_lr, list(run.model.parameters()))]
        else:
            found = layers(run.model)
            rest = [(f"layer {len(found) - depth}", base_lr * self.decay ** depth, layer)
                    for depth, layer in enumerate(reversed(found))]
        rest = [(name, lr, [parameter for parameter in layer if parameter not in matched]) for name, lr, layer in rest]
        rest[0][2].extend(loss_parameters(run))
        return [group for part in rest + by_pattern for group in groups(*part, decays)]

    def decays(self, model: nn.Module, own: dict[str, Any]) -> dict[nn.Parameter, float]:
        """The weight decays of the parameters that have another one than the optimizer's own."""
        found: dict[nn.Parameter, float] = {}
        if self.no_decay is True:
            found = dict.fromkeys((parameter for parameter in model.parameters() if parameter.ndim <= 1), 0.0)
        elif self.no_decay:
            found = dict.fromkeys(undecayed_parameters(model, self.no_decay), 0.0)
        for _, (number, relative), parameters in first_matches("weight_decays", model, self.parsed_decays):
            if "weight_decay" not in own:
                raise UsageError("weight_decays: the optimizer has no weight decay; use another, such as adamw")
            found |= dict.fromkeys(parameters, number * own["weight_decay"] if relative else number)
        return found


def groups(
    name: str, lr: Any, parameters: list[nn.Parameter], decays: dict[nn.Parameter, float],
) -> Iterator[dict[str, Any]]:
    """The parameter groups of the trainable `parameters`, one for each weight decay; the optimizer's own is first."""
    by_decay: dict[float | None, list[nn.Parameter]] = {None: [], 0.0: []}
    for parameter in parameters:
        if parameter.requires_grad:
            by_decay.setdefault(decays.get(parameter), []).append(parameter)
    for number, members in by_decay.items():
        if not members:
            continue
        if number is None:
            yield {"params": members, "lr": lr, "name": name}
        else:
            decay = f"decay {number:g}" if number else "no decay"
            yield {"params": members, "lr": lr, "name": f"{name} ({decay})", "weight_decay": number}


def first_matches(
    option: str, model: nn.Module, patterns: dict[str, tuple[float, bool]],
) -> Iterable[tuple[str, tuple[float, bool], list[nn.Parameter]]]:
    """Each pattern, its value, and the parameters that it is the first to match. Raises UsageError if it has none."""
    matched: set[nn.Parameter] = set()
    for pattern, parameters in matching_parameters(model, patterns).items():
        new = [parameter for parameter in parameters if parameter not in matched]
        if not new:
            raise UsageError(f"{option}: earlier patterns match all parameters that {pattern!r} matches; put it first")
        matched |= set(new)
        yield pattern, patterns[pattern], new


def parse_number(option: str, pattern: str, value: float | str, what: str) -> tuple[float, bool]:
    """The number, and whether it is a factor of the optimizer's own. Raises ValueError if `value` is neither."""
    text = str(value).strip()
    try:
        number = float(text.removeprefix("x").replace("_", "?"))          # Python reads 1_0 as 10
    except ValueError:
        number = -1.0
    if not pattern or not (isfinite(number) and number >= 0):
        raise ValueError(f"{option} takes conv1.*=0.01, or conv1.*=x10 for ten times the optimizer's own {what}, "
                         f"not {pattern}={value}")
    return number, text.startswith("x")


def own_options(run: Any) -> dict[str, Any]:
    """The options that the user's factory sets, read from an optimizer of a dummy parameter.

    So the parameter groups have their final learning rates when the real optimizer is made.
    """
    dummy = nn.Parameter(torch.zeros(1, 1, device=run.device))         # 2-D, because some optimizers take only matrices
    return run.optimizer([{"params": [dummy]}]).param_groups[0]


def same_type(lr: Any, number: float) -> Any:
    """`number`, as a tensor if `lr` is one."""
    return torch.full_like(lr, number) if isinstance(lr, Tensor) else number
