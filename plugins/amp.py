"""Automatic mixed precision: torch.autocast and loss scaling."""
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from loopctl import Run, UsageError, hookimpl
from loopctl.distributed.process_group import AgreedStop
from loopctl.optim.several import each_optimizer

# The run ends where steps are still skipped at a smaller scale: a gradient that overflows float16 there is above 1e9.
# It is the smallest normal number of float16; fairseq ends a run at 1e-4, DeepSpeed at 1.
MIN_SCALE = torch.finfo(torch.float16).tiny
MAX_SCALE = torch.finfo(torch.float32).max


@dataclass(eq=False)
class Amp:
    """Compute forward passes in half precision, and scale the loss if that is float16.

    Same as torch.autocast and torch.amp.GradScaler; see Mixed Precision Training, arXiv:1710.03740. A run whose
    gradients are not finite however small the scale is ended.

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
        if self.init_scale > MAX_SCALE:
            raise ValueError(f"init_scale takes a number of at most 3.4e38, not {self.init_scale}")
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
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in each_optimizer(run.optimizer)):
            raise UsageError("float16 loss scaling does not work with LBFGS, which computes gradients several times "
                             "per step; use dtype=bfloat16")
        # A scaler for each loss: of several optimizers with a loss each, the scales differ.
        self.scalers = {turn: torch.amp.GradScaler(run.device.type, self.init_scale,
                                                   growth_interval=self.growth_interval)
                        for turn in run.turns or ("",)}
        self.scales = dict.fromkeys(self.scalers, self.init_scale)
        self.in_a_row = dict.fromkeys(self.scalers, 0)      # steps that were skipped since the last update

    @hookimpl
    def before_step(self) -> None:
        self.unscaled = False

    @hookimpl
    def backward(self, run: Run, loss: Tensor) -> Tensor:
        scaled = self.scalers[run.turn].scale(loss)
        scaled.backward()
        return scaled

    @hookimpl
    def after_backward(self, run: Run) -> None:
        if self.unscaled:
            raise UsageError("float16 loss scaling allows one gradient computation per step; use dtype=bfloat16")
        self.scalers[run.turn].unscale_(run.optimizer)
        self.unscaled = True

    @hookimpl
    def optimizer_step(self, run: Run, closure: Callable[[], Tensor]) -> Tensor:
        loss, states, scaler = closure(), run.optimizer.state, self.scalers[run.turn]
        num_states = len(states)
        scaler.step(run.optimizer)
        scaler.update()
        self.unscaled = False           # for the next of several optimizers
        previous_scale, scale = self.scales[run.turn], scaler.get_scale()       # synchronizes, as GradScaler does
        self.scales[run.turn], run.skipped = scale, scale < previous_scale
        self.in_a_row[run.turn] = self.in_a_row[run.turn] + 1 if run.skipped else 0
        if run.skipped and len(states) > num_states:        # torch's fused SGD has added uninitialized momentum buffers
            for parameter in list(states)[num_states:]:
                del states[parameter]
        if run.skipped and scale < MIN_SCALE and not run.stop:
            reason = (f"the gradients of {self.in_a_row[run.turn]} steps in a row are not finite, at loss scales down "
                      f"to {scale:.3g}; use amp:dtype=bfloat16, and nan_guard to find the step")
            run.stop = AgreedStop(reason) if run.world_size > 1 else reason    # all processes have the same gradients
        return loss

    def state_dict(self) -> dict[str, Any]:
        if self.dtype != "float16":
            return {}
        return {turn: scaler.state_dict() | {"in_a_row": self.in_a_row[turn]} for turn, scaler in self.scalers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for turn, saved in state.items():
            if not saved["scale"]:      # torch would divide the gradients by it
                raise UsageError("the loss scale in the checkpoint is 0, because the gradients were not finite in many "
                                 "steps before; resume from an earlier checkpoint")
            self.scalers[turn].load_state_dict(saved)
            self.scales[turn] = self.scalers[turn].get_scale()
            self.in_a_row[turn] = saved["in_a_row"]
