"""Weighted means of losses and metrics, kept on the device so that adding a value does not wait for it."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loopctl.distributed.process_group import all_reduce_sum
from loopctl.errors import UsageError

if TYPE_CHECKING:
    from loopctl.run import Run


class Mean:
    """The weighted mean of scalars. Values are appended to a list, and 256 at a time are summed into one tensor."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self.weights: list[Any] = []
        self.total: Any = 0.0
        self.weight: Any = 0.0

    def add(self, value: Tensor | float, weight: Tensor | float) -> None:
        self.values.append(value)
        self.weights.append(weight)
        if len(self.values) == 256:
            self.fold()

    def fold(self) -> None:
        values, weights = as_vector(self.values), as_vector(self.weights)
        if values.device != weights.device:     # from pinned memory, so that the copy does not wait
            weights = (weights.pin_memory() if values.is_cuda else weights).to(values.device, non_blocking=True)
        self.total = self.total + values @ weights
        self.weight = self.weight + weights.sum()
        self.values, self.weights = [], []

    def sums(self) -> tuple[Any, Any]:
        """The weighted sum and the sum of the weights."""
        if self.values:
            self.fold()
        return self.total, self.weight

    def result(self) -> Tensor:
        total, weight = self.sums()
        return total / weight

    def state_dict(self) -> dict[str, Any]:
        # Not folded: the last digit of a sum depends on where it was folded.
        return {"values": list(self.values), "weights": list(self.weights), "total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def as_vector(scalars: list[Any]) -> Tensor:
    """Scalars as one vector, in float64 unless the device has none (mps)."""
    if not isinstance(scalars[0], Tensor):
        return torch.tensor([float(scalar) for scalar in scalars], dtype=torch.float64)
    vector = torch.stack(scalars).detach()
    return vector.float() if vector.device.type == "mps" else vector.double()


class Meters:
    """The loss and the metrics of one pass over data.

    functions: by name, `fn(output, target)` that returns a mean over the batch, or a torchmetrics object.
    prefix: what goes before each name, `train_` or `val_`.
    """

    def __init__(self, functions: dict[str, Any], prefix: str) -> None:
        self.prefix = prefix
        self.functions = functions
        self.loss = Mean()
        self.means: dict[str, Mean] = {}
        for name, function in functions.items():
            if is_stateful_metric(function):
                function.reset()
            else:
                self.means[name] = Mean()

    @torch.no_grad()
    def observe(self, outputs: Any, batch: Any, weight: Any) -> None:
        """Update the metrics with the outputs of one micro-batch, unless its weight is 0."""
        if isinstance(weight, int | float) and not weight:
            return
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise UsageError("metrics take (input, target) batches; for other batches, replace evaluate in a plugin")
        for name, function in self.functions.items():
            if name in self.means:
                self.means[name].add(function(outputs, batch[1]), weight)
            else:
                function.update(outputs, batch[1])

    def state_dict(self) -> dict[str, Any]:
        """The means so far, and the state of torchmetrics objects."""
        states = {name: metric_state(function) for name, function in self.functions.items() if name not in self.means}
        return {"": self.loss.state_dict()} | states | {name: mean.state_dict() for name, mean in self.means.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state[""])
        for name, function in self.functions.items():
            if name in self.means:
                self.means[name].load_state_dict(state[name])
            elif hasattr(function, "load_state_dict"):
                metric_state(function)
                function.load_state_dict(state[name])
            else:
                vars(function).update(state[name])

    def result(self, run: Run | None = None) -> dict[str, Tensor]:
        """The means so far by name, on the device.

        With a `run` of several processes they are means over all of them, and every process must call this.
        """
        means = {"loss": self.loss, **self.means}
        if run and run.world_size > 1:
            sums = [torch.as_tensor(part, dtype=torch.float64, device=run.device)
                    for mean in means.values() for part in mean.sums()]
            both = all_reduce_sum(run, torch.stack(sums)).view(-1, 2)
            results = dict(zip(means, both[:, 0] / both[:, 1], strict=True))
        else:
            results = {name: mean.result() for name, mean in means.items()}
        results |= {name: function.compute() for name, function in self.functions.items() if name not in means}
        return {self.prefix + name: results[name] for name in ("loss", *self.functions)}


def metric_state(function: Any) -> dict[str, Any]:
    """The state of a torchmetrics object."""
    if not hasattr(function, "state_dict"):
        return dict(vars(function))
    if hasattr(function, "persistent"):
        function.persistent(True)           # otherwise torchmetrics leaves its state out of the state dict
    return function.state_dict()


def is_stateful_metric(function: Any) -> bool:
    """Whether a metric is a torchmetrics object, which keeps its state itself."""
    return all(hasattr(function, method) for method in ("update", "compute", "reset"))
