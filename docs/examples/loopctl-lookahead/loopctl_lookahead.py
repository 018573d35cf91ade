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

    k: updates of the optimizer between two moves of the slow weights; skipped steps do not count
    alpha: the fraction of the distance that the slow weights move, above 0 and up to 1; with 1 it is the optimizer alone
    """

    k: int = 5
    alpha: float = 0.5

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is at least 1, not {self.k}")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha is above 0 and up to 1, not {self.alpha}")
        self.slow: dict[str, Any] = {}

    @hookimpl
    def train_start(self, run: Run) -> None:
        trained = {id(weight) for group in run.optimizer.param_groups for weight in group["params"]}
        self.fast = {name: weight.detach() for name, weight in run.model.named_parameters() if id(weight) in trained}
        self.slow = {name: weight.clone() for name, weight in self.fast.items()}

    # First, so that other plugins, such as ema, see the weights after this update.
    @hookimpl(tryfirst=True)
    def after_step(self, run: Run) -> None:
        if not run.skipped and run.step % self.k == 0:
            fast, slow = list(self.fast.values()), list(self.slow.values())
            torch._foreach_lerp_(slow, fast, self.alpha)
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
