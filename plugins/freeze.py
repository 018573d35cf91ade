"""Freezing: exclude parts of the model from training, for the whole run, until later or from later on."""
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import torch
from torch import nn

from loopctl import Duration, Run, UsageError, hookimpl
from loopctl.model.own_names import own_parameters
from loopctl.model.parameter_matching import matching_parameters
from loopctl.optim.several import each_optimizer


@dataclass(eq=False)
class Freeze:
    """Freeze parts of the model, for the whole run, until later, or from later on.

    A module whose parameters are all frozen is in evaluation mode: its BatchNorm statistics stay, its dropout is off.
    Parameters that were frozen before the run stay frozen. Those that are frozen when the run ends stay so after it.
    Gradual unfreezing is from ULMFiT, arXiv:1801.06146.

    patterns: what to freeze: globs (conv1.*, layer?.*), names of modules (layer1), or regular expressions
        (/^layer[12]\\./)
    keep: what to train, instead of patterns; everything else is frozen
    until: duration of the freeze, in epochs if it has no unit; the whole run if left out
    gradual: unfreeze one part each time this duration has passed, beginning nearest to the output, in epochs if it has
        no unit; with until, the first part is unfrozen at that time and the others follow
    start: duration from the start of the run from which the parts are frozen, trained until then, in epochs if it has
        no unit; gradual without until counts from it
    """

    patterns: list[str] = field(default_factory=list)
    keep: list[str] = field(default_factory=list)
    until: Duration | None = None
    gradual: Duration | None = None
    start: Duration | None = None
    topic = "weights"

    def __post_init__(self) -> None:
        for name in ("patterns", "keep"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} takes a list, such as ['conv1.*'], not {getattr(self, name)!r}")
        if bool(self.patterns) == bool(self.keep):
            raise ValueError("pass either patterns (what to freeze) or keep (what to train)")
        self.permanent = self.until is None and self.gradual is None and self.start is None
        if self.permanent:
            self.before_step = None     # type: ignore[method-assign, assignment]   # no step changes anything

    @hookimpl
    def setup(self, run: Run) -> None:
        matched = matching_parameters(run.model, self.patterns or self.keep)
        matching = {parameter for parameters in matched.values() for parameter in parameters}
        frozen = {name: parameter for name, parameter in own_parameters(run.model).items()
                  if parameter.requires_grad and (parameter in matching) != bool(self.keep)}
        self.names = list(frozen)
        self.parts = group_by_module(self.names)[::-1] if self.gradual else [self.names]
        self.starts: list[float] = [inf] * len(self.parts)      # the step at which each part is unfrozen
        self.begin = 0 if self.start is None else inf           # the step at which they are frozen
        self.eval_modules: set[nn.Module] = set()
        # Parameters that are unfrozen later are frozen only in train_start, so that the optimizer has them from the
        # beginning. It skips a parameter without gradient, weight decay and momentum included. So unfreezing changes no
        # parameter group, and a checkpoint can be resumed at any step.
        if self.permanent:
            for parameter in frozen.values():
                parameter.requires_grad_(False)

    @hookimpl
    def train_start(self, run: Run) -> None:
        if self.start is not None:
            self.begin = self.first_step(run)
        if self.until is not None or self.gradual is not None:
            first = run.duration(self.until or self.gradual, "epoch")
            if self.until is None and self.start is not None:
                first += run.duration(self.start, "epoch")
            later = run.duration(self.gradual, "epoch") if self.gradual else 0.0
            # Round up to a whole step, with a tolerance: 7 % of 100 steps are 7.000000000000001.
            starts = [run.planned.steps(first + part * later) for part in range(len(self.parts))]
            self.starts = [max(1, ceil(start - 1e-6)) for start in starts]
            if any(group["dampening"] for group in fused_momentum(run.optimizer)):
                raise UsageError("torch's fused SGD with dampening cannot begin to train a parameter later; "
                                 "use sgd:fused=false")
            if self.begin >= self.starts[0]:
                raise UsageError(f"until={self.until} is not after start={self.start}; use a later until")
        self.apply(run)
        if not any(parameter.requires_grad for parameter in run.model.parameters()):
            raise UsageError("nothing is left to train at the start; keep at least the last part trainable")
        if self.begin and not self.trained_at(run, self.begin):
            raise UsageError(f"nothing is left to train from start={self.start} on; keep at least the last part "
                             "trainable")

    def first_step(self, run: Run) -> int:
        """The step from which the parts are frozen. Raises UsageError where they never are, or cannot be then."""
        step = ceil(run.planned.steps(run.duration(self.start, "epoch")) - 1e-6)
        if step >= run.planned_steps:
            raise UsageError(f"start={self.start} is not before the run's end, so nothing would be frozen")
        if run.parallel:
            run.parallel.check_later_freezing(run)
        return step

    @hookimpl
    def epoch_start(self, run: Run) -> None:
        self.apply(run)
        if run.parallel and self.begin:
            run.parallel.follow_freezing(run)       # it may have looked before this plugin

    @hookimpl
    def before_step(self, run: Run) -> None:
        if not self.valid_from <= run.attempts < self.valid_until:
            self.apply(run)
            if run.parallel and run.attempts == self.begin:
                run.parallel.follow_freezing(run)

    def apply(self, run: Any) -> None:
        """Freeze and unfreeze parameters according to the current step. A resume may have moved that by many steps."""
        # Consider all instances of this plugin: a parameter is frozen as long as one of them freezes it.
        plugins = [plugin for plugin in run.hook.plugins.values() if isinstance(plugin, Freeze)]
        frozen = {name for plugin in plugins for name in plugin.frozen_names(run.attempts)}
        names = {name for plugin in plugins for name in plugin.names}
        for name, parameter in own_parameters(run.model).items():
            if name in names:
                parameter.requires_grad_(name not in frozen)
            if name in frozen:
                parameter.grad = None       # else clipping would include the gradient of an earlier backward pass
        for group in fused_momentum(run.optimizer) if run.attempts else ():
            for parameter in group["params"]:
                if parameter.requires_grad and not run.optimizer.state.get(parameter):
                    run.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        eval_modules = frozen_modules(run.model)
        for module in self.eval_modules | eval_modules:     # train() and eval() would change submodules too
            module.training = module not in eval_modules
        self.eval_modules = eval_modules
        # Nothing changes between these two steps.
        changes = [self.begin, *self.starts]
        self.valid_from = max((step for step in changes if step <= run.attempts), default=0)
        self.valid_until = min((step for step in changes if step > run.attempts), default=inf)

    def frozen_names(self, attempts: float) -> list[str]:
        """The names of the parameters that this plugin freezes after so many steps."""
        parts = zip(self.starts, self.parts, strict=True)
        return [name for start, names in parts if self.begin <= attempts < start for name in names]

    def trained_at(self, run: Run, attempts: float) -> bool:
        """Whether a parameter that is trained at the start is trained after so many steps, with all such plugins."""
        frozen = {name for plugin in run.hook.plugins.values() if isinstance(plugin, Freeze)
                  for name in plugin.frozen_names(attempts)}
        parameters = own_parameters(run.model)
        return any(parameter.requires_grad and name not in frozen for name, parameter in parameters.items())


def fused_momentum(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The parameter groups with momentum of torch's fused SGD, which needs the momentum buffers of all parameters or of
    none. Of other optimizers, none."""
    return [group for one in each_optimizer(optimizer) for group in one.param_groups
            if isinstance(one, torch.optim.SGD) and group["fused"] and group["momentum"]]


def group_by_module(names: list[str]) -> list[list[str]]:
    """Group parameter names by the outermost submodules that tell their modules apart, in the order of the model."""
    paths = [name.split(".")[:-1] for name in names]
    depth = 0
    while paths and all(len(path) > depth and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    parts: dict[tuple[str, ...], list[str]] = {}
    for name, path in zip(names, paths, strict=True):
        parts.setdefault(tuple(path[depth:depth + 1]), []).append(name)
    return list(parts.values())


def frozen_modules(model: nn.Module) -> set[nn.Module]:
    """The modules whose parameters are all frozen, by this plugin or otherwise, and their submodules."""
    frozen = []
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            frozen.append(module)
    return {inner for module in frozen for inner in module.modules()}
