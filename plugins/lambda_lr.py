"""Learning-rate schedule: a function of your own."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Run, UsageError
from loopctl.optim.learning_rate import per_group
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class LambdaLr(Schedule):
    """Multiply the learning rate by what a function of the epoch or step returns.

    Same as torch.optim.lr_scheduler.LambdaLR.

    lr_lambda: function of the number of epochs or steps done; or a list with one per parameter group
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    lr_lambda: list[Callable[[int], float]] | Callable[[int], float]
    by: Literal["epoch", "step"] = "epoch"

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        factor = per_group(run, group, "lr_lambda", self.lr_lambda)(position)
        try:
            return float(factor)                # lr_scale would take None for "no factor"
        except (TypeError, ValueError) as error:
            raise UsageError(f"lr_lambda returned {factor!r}; it must return a number") from error
