"""Lookahead."""
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch

from loopctl import Run, hookimpl
from loopctl.model.weight_averages import copy_weights, swapped_weights


@dataclass(eq=False)
class Lookahead:
    """Let the optimizer run ahead for k updates, then follow it a part of the way, and have it run on from there.

    It is Lookahead, arXiv:1907.08610, around any optimizer, whose momentum stays as it is. The weights that follow are
    what is evaluated and what the run ends with. An average, of ema or swa, is of the weights that run ahead.

    k: updates that the optimizer runs ahead, skipped ones not counted
    alpha: the part of the way, above 0, up to 1, where it is the optimizer alone
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

    # Before others look at the weights that the step has led to.
    @hookimpl(tryfirst=True)
    def after_step(self, run: Run) -> None:
        if not run.skipped and run.step % self.k == 0:
            fast, slow = list(self.fast.values()), list(self.slow.values())
            torch._foreach_lerp_(slow, fast, self.alpha)
            torch._foreach_copy_(fast, slow)

    # Around all others, wherever it stands in the composition: the average that another one puts in is what counts.
    @hookimpl(wrapper=True, tryfirst=True)
    def evaluate(self, run: Run) -> Generator[None, dict[str, Any], dict[str, Any]]:
        with swapped_weights(run.model, self.slow):
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def after_evaluate(self, run: Run) -> Generator[None, None, None]:
        with swapped_weights(run.model, self.slow):
            return (yield)

    @hookimpl(wrapper=True, tryfirst=True)
    def train_end(self, run: Run) -> Generator[None, None, None]:
        copy_weights(run.model, self.slow)
        return (yield)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.slow = state["slow"]
