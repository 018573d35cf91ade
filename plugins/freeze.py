"""Freezing."""
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import torch
from torch import nn

from loopctl import Duration, Run, UsageError, hookimpl
from loopctl.model.parameter_matching import matching_parameters


@dataclass(eq=False)
class Freeze:
    """Keep parts of the model as they are, for the whole run or until later.

    A part that is frozen whole is in evaluation mode: its BatchNorm statistics stay, its dropout is off. What was
    frozen before the run stays so, and so does what is frozen when the run ends. Gradual unfreezing is ULMFiT's,
    arXiv:1801.06146.

    patterns: what to freeze: globs (conv1.*, layer?.*), names of modules (layer1), or regular expressions
        (/^layer[12]\\./)
    keep: what to train, in place of patterns; everything else is frozen
    until: how long it is frozen, in epochs unless it says its unit; the whole run if left out
    gradual: train one frozen part more each time this length has passed, the nearest to the output first, in epochs
        unless it says its unit; with until, the first part waits for that and the others follow
    """

    patterns: list[str] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    until: Duration | None = None
    gradual: Duration | None = None

    def __post_init__(self) -> None:
        for name in ("patterns", "keep"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} takes a list, such as ['conv1.*'], not {getattr(self, name)!r}")
        if bool(self.patterns) == bool(self.keep):
            raise ValueError("takes patterns, what to freeze, or keep, what not to freeze: one of the two")
        self.for_good = self.until is None and self.gradual is None
        if self.for_good:
            self.before_step = None     # type: ignore[method-assign, assignment]   # nothing is due in any step

    @hookimpl
    def setup(self, run: Run) -> None:
        matched = matching_parameters(run.model, self.patterns or self.keep)
        found = {parameter for some in matched.values() for parameter in some}
        chosen = {name: parameter for name, parameter in run.model.named_parameters()
                  if parameter.requires_grad and (parameter in found) != bool(self.keep)}
        self.names = list(chosen)
        self.parts = top_level(self.names)[::-1] if self.gradual else [self.names]
        self.starts: list[float] = [inf] * len(self.parts)      # the step at which each part begins to train
        self.asleep: set[nn.Module] = set()
        # What will be trained later is frozen only in train_start, and so is in the optimizer from the start, whoever
        # makes its groups. An optimizer skips a parameter without gradient, with momentum and weight decay. Hence
        # thawing changes no group, and a checkpoint fits at any position.
        if self.for_good:
            for parameter in chosen.values():
                parameter.requires_grad_(False)

    @hookimpl
    def train_start(self, run: Run) -> None:
        if not self.for_good:
            per_epoch = run.plan()[0]
            first = run.duration(self.until or self.gradual, "epoch")
            later = run.duration(self.gradual, "epoch") if self.gradual else 0.0
            # Rounded up to a whole step, but 7 % of 100 steps are 7.000000000000001.
            self.starts = [max(1, ceil((first + part * later) * per_epoch - 1e-6)) for part in range(len(self.parts))]
            if any(group["dampening"] for group in fused_momentum(run.optimizer)):
                raise UsageError("torch's fused SGD cannot begin with a parameter later where there is dampening; "
                                 "use sgd:fused=false")
        self.follow(run)
        if not any(parameter.requires_grad for parameter in run.model.parameters()):
            raise UsageError("nothing is left to train at the start; keep at least the last part trainable")

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.follow(run)

    @hookimpl
    def before_step(self, run: Run) -> None:
        if not self.since <= run.attempts < self.next:
            self.follow(run)

    def follow(self, run: Any) -> None:
        """Freeze and thaw what is due where the run is, which may be far from where it was: a run can be resumed."""
        # All instances' parameters at once: each then sees the same model, and none thaws what another still holds.
        plugins = [plugin for plugin in run.hook.plugins.values() if isinstance(plugin, Freeze)]
        held = {name for plugin in plugins for name in plugin.held(run)}
        chosen = {name for plugin in plugins for name in plugin.names}
        for name, parameter in run.model.named_parameters():
            if name in chosen:
                parameter.requires_grad_(name not in held)
            if name in held:
                parameter.grad = None       # what an earlier backward left would be clipped and measured
        for group in fused_momentum(run.optimizer) if run.attempts else ():
            for parameter in group["params"]:
                if parameter.requires_grad and not run.optimizer.state.get(parameter):
                    run.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        still = asleep(run.model)
        for module in self.asleep | still:  # one by one, for train() and eval() would reach what is in them too
            module.training = module not in still
        self.asleep = still
        self.since = max((start for start in self.starts if start <= run.attempts), default=0)
        self.next = min((start for start in self.starts if start > run.attempts), default=inf)

    def held(self, run: Any) -> list[str]:
        """The names of what this plugin wants frozen where the run is now."""
        parts = zip(self.starts, self.parts, strict=True)
        return [name for start, names in parts if run.attempts < start for name in names]


def fused_momentum(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The parameter groups of torch's fused SGD, which begins momentum for all its parameters at once or for none."""
    return [group for group in optimizer.param_groups
            if isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]]


def top_level(names: list[str]) -> list[list[str]]:
    """`names` of parameters by the outermost part of the model in which their modules differ, in the model's order."""
    paths = [name.split(".")[:-1] for name in names]
    depth = 0
    while paths and all(len(path) > depth and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    parts: dict[tuple[str, ...], list[str]] = {}
    for name, path in zip(names, paths, strict=True):
        parts.setdefault(tuple(path[depth:depth + 1]), []).append(name)
    return list(parts.values())


def asleep(model: nn.Module) -> set[nn.Module]:
    """Every module all of whose parameters are frozen, by whomever, with the modules in it."""
    frozen = []
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            frozen.append(module)
    return {inner for module in frozen for inner in module.modules()}
