"""The Lookahead optimizer as a plugin: slow weights that follow the weights of any torch optimizer."""
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from loopctl import Run, hookimpl
from loopctl.model.weight_averages import copy_weights, named_tensors, swapped_weights


@dataclass(eq=False)
class Lookahead:
    """Wrap the optimizer with Lookahead: every k updates, slow weights move towards its weights, which restart there.

    The method is Lookahead (arXiv:1907.08610); the optimizer keeps its state, such as momentum. The slow weights are
    evaluated, and the run ends with them. The plugins ema and swa average the fast weights, those of the optimizer.

    With alpha=1, a decay of 0.95**5 and buffers it is the Lookahead of airbench94 (github.com/KellerJordan/
    cifar10-airbench), whose moves become shorter during the run.

    k: updates of the optimizer between two moves of the slow weights; skipped steps do not count
    alpha: the fraction of the distance that the slow weights move, above 0 and up to 1; with 1 it is the optimizer alone
    decay: the part of alpha that is lost by the end of the run, 0 to 1
    power: alpha is lost with this power of the part of the run that is done, above 0
    buffers: move the buffers too, such as BatchNorm's statistics
    """

    k: int = 5
    alpha: float = 0.5
    decay: float = 0.0
    power: float = 3.0
    buffers: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is at least 1, not {self.k}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is above 0 and up to 1, not {self.alpha}")
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is 0 to 1, not {self.decay}")
        if not self.power > 0:
            raise ValueError(f"power is above 0, not {self.power}")
        self.slow: dict[str, Any] = {}

    @hookimpl
    def train_start(self, run: Run) -> None:
        trained = {id(weight) for group in run.optimizer.param_groups for weight in group["params"]}
        self.fast = {name: weight.detach() for name, weight in run.model.named_parameters() if id(weight) in trained}
        if self.buffers:
            self.fast |= {name: buffer for name, buffer in run.model.named_buffers() if buffer.is_floating_point()}
        self.slow = {name: weight.clone() for name, weight in self.fast.items()}

    # First, so that other plugins, such as ema, see the weights after this update.
    @hookimpl(tryfirst=True)
    def after_step(self, run: Run) -> None:
        if not run.skipped and run.step % self.k == 0:
            fast, slow = list(self.fast.values()), list(self.slow.values())
            done = min(1.0, run.step / run.planned_steps)
            torch._foreach_lerp_(slow, fast, self.alpha * (1 - self.decay * done ** self.power))
            torch._foreach_copy_(fast, slow)

    # Outermost, wherever the plugin is listed: the weights of an averaging plugin inside replace the slow weights.
    @hookimpl(wrapper=True, tryfirst=True)
    def evaluate(self, run: Run) -> Generator[None, dict[str, Any], dict[str, Any]]:
        with swapped_weights(named_tensors(run), self.slow):
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def after_evaluate(self, run: Run) -> Generator[None, None, None]:
        with swapped_weights(named_tensors(run), self.slow):
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def train_end(self, run: Run) -> Generator[None, None, None]:
        copy_weights(named_tensors(run), self.slow)
        return (yield)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slow = state["slow"]
