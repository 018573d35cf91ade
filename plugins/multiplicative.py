"""Learning-rate schedule: a function that returns ratios."""
from array import array
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from loopctl import Run, UsageError
from loopctl.optim.learning_rate import per_group
from loopctl.optim.schedule import Schedule


@dataclass(eq=False)
class Multiplicative(Schedule):
    """Multiply the learning rate every epoch or step by what a function returns there.

    Same as torch.optim.lr_scheduler.MultiplicativeLR.

    lr_lambda: function of the number of epochs or steps done, first called with 1; or a list with one per parameter
        group
    by: change the rate every epoch or every step, which is also the unit of durations without one
    """

    lr_lambda: list[Callable[[int], float]] | Callable[[int], float]
    by: Literal["epoch", "step"] = "epoch"

    def __post_init__(self) -> None:
        super().__post_init__()
        # For each function, the product of its values up to each position. It is extended over skipped positions too,
        # such as those before a resume.
        self.products: dict[Any, array[float]] = defaultdict(lambda: array("d", [1.0]))

    def scale(self, run: Run, position: int, initial_lr: float, group: dict[str, Any]) -> float:
        function = per_group(run, group, "lr_lambda", self.lr_lambda)
        products = self.products[id(function)]
        while len(products) <= position:
            factor = function(len(products))
            try:
                products.append(products[-1] * float(factor))
            except (TypeError, ValueError) as error:
                raise UsageError(f"lr_lambda returned {factor!r}; it must return a number") from error
        return products[position]
