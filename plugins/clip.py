"""Gradient clipping by norm or by value."""
from dataclasses import dataclass
from math import nan
from typing import Annotated, ClassVar

from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from loopctl import Run, hookimpl
from loopctl.model.ownership import trained_parameters


@dataclass(eq=False)
class Clip:
    """Clip gradients before each update, by their norm (the default, max_norm=1) or by value.

    Same as torch.nn.utils.clip_grad_norm_ and clip_grad_value_. The norm before clipping is reported as the metric
    grad_norm.

    max_norm: maximum norm of the gradients of all parameters that the optimizer holds, taken as one vector; 1 unless
        value is given; inf only measures the norm
    norm_type: the p of the p-norm, at least 1; inf for the maximum norm
    value: clip each element to [-value, value] instead of clipping the norm
    """

    max_norm: Annotated[float, "or inf"] | None = None
    norm_type: Annotated[float, "or inf"] = 2.0
    value: float | None = None
    capturable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.max_norm is not None and self.value is not None:
            raise ValueError("pass max_norm or value; for both, use clip twice")
        if self.value is None and self.max_norm is None:
            self.max_norm = 1.0
        for name in ("max_norm", "value"):
            if (number := getattr(self, name)) is not None and not number > 0:
                raise ValueError(f"{name} is above 0, not {number}")
        if not self.norm_type >= 1:
            raise ValueError(f"norm_type is at least 1, not {self.norm_type}")

    @hookimpl
    def setup(self, run: Run) -> None:
        if self.max_norm is not None:
            run.metrics["grad_norm"] = nan

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.parameters = trained_parameters(run)

    @hookimpl
    def grads_ready(self, run: Run) -> None:
        parameters = trained_parameters(run) if run.turn else self.parameters       # of several optimizers, one
        if self.max_norm is None:
            clip_grad_value_(parameters, self.value)        # type: ignore[arg-type]
        else:
            run.metrics["grad_norm"] = clip_grad_norm_(parameters, self.max_norm, self.norm_type)
