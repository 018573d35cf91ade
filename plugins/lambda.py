"""A schedule of one's own."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Run, UsageError, hookimpl
from loopctl.optim.learning_rate import per_group


@dataclass(eq=False)
class Lambda:
    """Multiply the learning rate by what a function of the position returns.

    It is torch.optim.lr_scheduler.LambdaLR.

    lr_lambda: the function, of the epochs or steps done; or a list with one per parameter group
    by: call it with epochs, or with steps
    """

    lr_lambda: list[Callable[[int], float]] | Callable[[int], float]
    by: Literal["epoch", "step"] = "epoch"

    @hookimpl
    def lr_scale(self, run: Run, group: dict[str, Any]) -> float | None:
        factor = per_group(run, group, "lr_lambda", self.lr_lambda)(run.position(self.by))
        try:
            return float(factor)                # None would count as no schedule at all
        except (TypeError, ValueError) as error:
            raise UsageError(f"lr_lambda returned {factor!r}, which is no number") from error
