"""Automatic mixed precision: torch.autocast and loss scaling."""
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loopctl import Run, UsageError, hookimpl


@dataclass(eq=False)
class Amp:
    """Compute forward passes in half precision, and scale the loss if that is float16.

    Same as torch.autocast and torch.amp.GradScaler; see Mixed Precision Training, arXiv:1710.03740.

    dtype: float16 scales the loss and skips a step whose gradients overflow; bfloat16 needs neither; auto is bfloat16,
        or float16 if the GPU has no bfloat16
    init_scale: with float16, the initial scale of the loss, at least 1
    growth_interval: with float16, steps without overflow after which the scale doubles
    """

    dtype: Literal["auto", "float16", "bfloat16"] = "auto"
    init_scale: float = 65536.0
    growth_interval: int = 2000
    capturable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.init_scale >= 1:
            raise ValueError(f"init_scale is at least 1, not {self.init_scale}")
        if self.growth_interval < 1:
            raise ValueError(f"growth_interval is at least 1, not {self.growth_interval}")
        if self.dtype == "auto":
            only_float16 = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
            self.dtype = "float16" if only_float16 else "bfloat16"
        if self.dtype == "bfloat16":        # no loss scaling: other plugins may replace these hooks
            self.train_start = self.before_step = self.backward = None             # type: ignore[assignment, method-assign]
            self.after_backward = self.optimizer_step = None                       # type: ignore[assignment, method-assign]

    @hookimpl(wrapper=True)
    def compute_loss(self, run: Run) -> Generator[None, Tensor, Tensor]:
        with torch.autocast(run.device.type, getattr(torch, self.dtype)):
            return (yield)

    @hookimpl
    def train_start(self, run: Run) -> None:
        if isinstance(run.optimizer, torch.optim.LBFGS):
            raise UsageError("float16 loss scaling does not work with LBFGS, which computes gradients several times "
                             "per step; use dtype=bfloat16")
        self.scaler = torch.amp.GradScaler(run.device.type, self.init_scale, growth_interval=self.growth_interval)
        self.scale = self.init_scale

    @hookimpl
    def before_step(self) -> None:
        self.unscaled = False

    @hookimpl
    def backward(self, loss: Tensor) -> Tensor:
        scaled = self.scaler.scale(loss)
        scaled.backward()
        return scaled

    @hookimpl
    def after_backward(self, run: Run) -> None:
        if self.unscaled:
            raise UsageError("float16 loss scaling allows one gradient computation per step; use dtype=bfloat16")
        self.scaler.unscale_(run.optimizer)
        self.unscaled = True

    @hookimpl
    def optimizer_step(self, run: Run, closure: Callable[[], Tensor]) -> Tensor:
        loss, states = closure(), run.optimizer.state
        num_states = len(states)
        self.scaler.step(run.optimizer)
        self.scaler.update()
        previous_scale, self.scale = self.scale, self.scaler.get_scale()       # synchronizes, as GradScaler does
        run.skipped = self.scale < previous_scale
        if run.skipped and len(states) > num_states:        # torch's fused SGD has added uninitialized momentum buffers
            for parameter in list(states)[num_states:]:
                del states[parameter]
        return loss

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict() if self.dtype == "float16" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self.scaler.load_state_dict(state)
            self.scale = self.scaler.get_scale()
