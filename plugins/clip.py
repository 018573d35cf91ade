"""Gradient clipping by norm or by value."""
from dataclasses import dataclass
from math import inf, nan
from typing import Annotated, Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, get_total_norm

from loopctl import Run, hookimpl
from loopctl.checkpoint.sharded_tensors import full_tensor, local_rows
from loopctl.metrics.percentile import RunningPercentile
from loopctl.model.ownership import trained_parameters


@dataclass(eq=False)
class Clip:
    """Clip gradients before each update, by their norm (the default, max_norm=1) or by value.

    Same as torch.nn.utils.clip_grad_norm_ and clip_grad_value_; with auto, AutoClip, arXiv:2007.14469. The norm before
    clipping is reported as the metric grad_norm.

    max_norm: maximum norm of the gradients of all parameters that the optimizer holds, taken as one vector; 1 unless
        value or auto is given; inf only measures the norm
    norm_type: the p of the p-norm, at least 1; inf for the maximum norm
    value: clip each element to [-value, value] instead of clipping the norm
    auto: percentile of the norms of all steps so far, up to 100, that is the maximum norm; 10 in the paper. Norms that
        are not finite do not count; where a step computes gradients several times, the last do
    """

    max_norm: Annotated[float, "or inf"] | None = None
    norm_type: Annotated[float, "or inf"] = 2.0
    value: float | None = None
    auto: float | None = None
    topic = "gradients"

    def __post_init__(self) -> None:
        given = [name for name in ("max_norm", "value", "auto") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"pass {' or '.join(given)}; for both, use clip twice")
        if not given:
            self.max_norm = 1.0
        for name in ("max_norm", "value"):
            if (number := getattr(self, name)) is not None and not number > 0:
                raise ValueError(f"{name} is above 0, not {number}")
        if self.auto is not None and not 0 <= self.auto <= 100:
            raise ValueError(f"auto is a percentile, 0 to 100, not {self.auto}")
        if not self.norm_type >= 1:
            raise ValueError(f"norm_type is at least 1, not {self.norm_type}")
        self.capturable = self.auto is None     # the norms take more and more memory

    @hookimpl
    def setup(self, run: Run) -> None:
        if self.value is None:
            run.metrics["grad_norm"] = nan

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.parameters = trained_parameters(run)
        # By the optimizer whose turn it is. The norms of a generator and of a discriminator have nothing in common.
        self.norms = {turn: RunningPercentile(self.auto or 0) for turn in run.turns or ("",)}
        self.last_step = dict.fromkeys(self.norms, -1)
        others = run.hook.plugins.items()
        alike = [name for name, other in others if isinstance(other, Clip) and other.kind == self.kind]
        if len(alike) > 1 and self.max_norm != inf:
            run.say_once(f"clip {self.kind}", f"{' and '.join(alike)} clip the same {self.kind}, so the smaller "
                         "limit counts; leave one of them out")

    @property
    def kind(self) -> str:
        """What is limited. A norm that is only measured is a kind of its own."""
        measured = "unlimited " * (self.max_norm == inf)
        return "value" if self.value is not None else f"{measured}norm of type {self.norm_type:g}"

    @hookimpl
    def grads_ready(self, run: Run) -> None:
        parameters = trained_parameters(run) if run.turn else self.parameters       # of several optimizers, one
        if self.max_norm is not None:
            run.metrics["grad_norm"] = clip_grad_norm_(parameters, self.max_norm, self.norm_type)
        elif self.value is not None:
            clip_grad_value_(parameters, self.value)
        else:
            self.clip_to_percentile(run, parameters)

    @torch.no_grad()
    def clip_to_percentile(self, run: Run, parameters: list[nn.Parameter]) -> None:
        gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
        norm = full_tensor(get_total_norm(gradients, self.norm_type))
        limit = self.norms[run.turn].add(norm, replace=self.last_step[run.turn] == run.attempts)
        # As clip_grad_norm_ does, which would bring the limit to the host and wait for it.
        torch._foreach_mul_([local_rows(gradient) for gradient in gradients], (limit / (norm + 1e-6)).clamp(max=1))
        run.metrics["grad_norm"], self.last_step[run.turn] = norm, run.attempts

    def state_dict(self) -> dict[str, Any]:
        return {turn: norms.state_dict() for turn, norms in self.norms.items()} if self.auto is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.last_step = dict.fromkeys(self.norms, -1)
        for turn, norms in state.items():
            self.norms[turn].load_state_dict(norms)
