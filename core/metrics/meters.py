"""Weighted means of losses and metrics, kept on the device so that adding a value does not wait for it."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loopctl.distributed.process_group import all_gather, all_reduce_sum
from loopctl.errors import UsageError
from loopctl.metrics.named import Sums
from loopctl.metrics.scalars import as_scalar
from loopctl.metrics.weights import counts_nothing

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
        self.total = self.total + torch.where(weights == 0, 0.0, values) @ weights     # a mean over nothing is NaN
        self.weight = self.weight + weights.sum()
        self.values, self.weights = [], []

    def sums(self) -> tuple[Any, Any]:
        """The weighted sum and the sum of the weights."""
        if self.values:
            self.fold()
        return self.total, self.weight

    def result(self) -> Tensor:
        total, weight = self.sums()
        return torch.as_tensor(total, dtype=torch.float64) / weight if isinstance(total, float) else total / weight

    def state_dict(self) -> dict[str, Any]:
        # Not folded: the last digit of a sum depends on where it was folded.
        return {"values": list(self.values), "weights": list(self.weights), "total": self.total, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def as_vector(scalars: list[Any]) -> Tensor:
    """Scalars as one vector, in float64 unless the device has none (mps)."""
    device = next((scalar.device for scalar in scalars if isinstance(scalar, Tensor)), None)
    if device is None:
        return torch.tensor([float(scalar) for scalar in scalars], dtype=torch.float64)
    try:
        vector = torch.stack(scalars).detach()
    except (TypeError, RuntimeError):       # some are numbers, or on another device
        exact = torch.float32 if device.type == "mps" else torch.float64
        vector = torch.stack([torch.as_tensor(scalar, dtype=exact, device=device) for scalar in scalars]).detach()
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
        self.logged: dict[str, Mean] = {}       # what `run.log` was given
        for name, function in functions.items():
            if is_stateful_metric(function):
                function.reset()
            else:
                self.means[name] = Mean()

    @torch.no_grad()
    def observe(self, outputs: Any, target: Any, weight: Any) -> None:
        """Update the metrics with the outputs of one micro-batch, unless its weight is 0."""
        if counts_nothing(weight):
            return
        for name, function in self.functions.items():
            try:
                if name not in self.means:
                    function.update(outputs, target)
                    continue
                value = function(outputs, target)
            except Exception as error:
                if not isinstance(error, UsageError):
                    error.add_note(f"raised by metric {name!r} for {describe_value('outputs', outputs)} and "
                                   f"{describe_value('targets', target)}")
                raise
            if not isinstance(value, Tensor) or value.ndim:
                value = as_scalar(value, f"metric {name!r}", "return one number for a batch, such as its mean")
            self.means[name].add(value, weight)

    def log(self, name: str, value: Any, weight: Any) -> None:
        """Add a value to the mean that is reported as `name`. Raises UsageError for a name that something else has."""
        mean = self.logged.get(name)
        if mean is None:
            if not isinstance(name, str) or not name or name == "loss" or name in self.functions:
                taken = "the loss" if name == "loss" else "a metric" if name in self.functions else "nothing"
                raise UsageError(f"run.log: {name!r} is the name of {taken}; use another")
            mean = self.logged[name] = Mean()
        if type(value) is not Tensor or value.ndim:
            value = as_scalar(value, f"run.log: {name!r}", "log one number")
        mean.add(value.detach() if isinstance(value, Tensor) else value, weight)

    def logged_state(self) -> dict[str, Any]:
        return {name: mean.state_dict() for name, mean in self.logged.items()}

    def load_logged_state(self, state: dict[str, Any]) -> None:
        for name, saved in state.items():
            self.logged[name] = Mean()
            self.logged[name].load_state_dict(saved)

    def state_dict(self) -> dict[str, Any]:
        """The means so far, and the state of torchmetrics objects. What was logged is `logged_state`."""
        states = {name: metric_state(function) for name, function in self.functions.items() if name not in self.means}
        return {"": self.loss.state_dict()} | states | {name: mean.state_dict() for name, mean in self.means.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state[""])
        for name, function in self.functions.items():
            if name in self.means:
                self.means[name].load_state_dict(state[name])
            else:
                load_metric_state(function, state[name])

    def result(self, run: Run | None = None) -> dict[str, Tensor]:
        """The means so far by name, on the device.

        With a `run` of several processes they are means over all of them, and every process must call this.
        """
        if run and run.world_size > 1:          # a process may have logged nothing under a name
            for name in sorted({name for names in all_gather(run, list(self.logged)) for name in names}):
                self.logged[name] = self.logged.pop(name, Mean())       # in the same order in all processes
        means = {"loss": self.loss, **self.means, **self.logged}
        if run and run.world_size > 1:
            sums = [torch.as_tensor(part, dtype=torch.float64, device=run.device)
                    for mean in means.values() for part in mean.sums()]
            both = all_reduce_sum(run, torch.stack(sums)).view(-1, 2)
            results = dict(zip(means, both[:, 0] / both[:, 1], strict=True))
        else:
            results = {name: mean.result() for name, mean in means.items()}
        reported: dict[str, Any] = {"loss": results["loss"]}
        for name, function in self.functions.items():
            reported |= {name: results[name]} if name in means else flattened(name, computed(function, run))
        reported |= {name: results[name] for name in self.logged}
        return {self.prefix + name: value for name, value in reported.items()}


def computed(function: Any, run: Run | None) -> Any:
    """What a metric object computes, over all processes of `run`. torchmetrics' exchange their states themselves."""
    if isinstance(function, Sums) and run and run.world_size > 1:
        return function.computed_with(all_gather(run, function.sums.cpu()))
    return function.compute()


def check_metrics(run: Run) -> None:
    """Raise UsageError for a metric object whose state several processes cannot put together."""
    for name, function in run.metric_fns["train"].items():
        if run.world_size > 1 and is_stateful_metric(function) and not (isinstance(function, Sums) or syncs(function)):
            raise UsageError(f"metric {name!r} keeps its state in each of {run.world_size} processes, and a "
                             f"{type(function).__name__} cannot put them together; make it a torchmetrics.Metric, or a "
                             "function that returns the mean of a batch")


def syncs(function: Any) -> bool:
    """Whether a metric object exchanges its state with other processes, as torchmetrics' classes do."""
    parts = function.modules() if isinstance(function, nn.Module) else [function]
    return any(hasattr(part, "sync") for part in parts)


def describe_value(what: str, value: Any) -> str:
    return f"{what} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{what}, a {type(value).__name__}"


def metric_prefix(validation_set: str) -> str:
    """What goes before the name of a metric of a validation set; the name of a single one is ""."""
    return f"val_{validation_set}_" if validation_set else "val_"


def flattened(name: str, value: Any) -> dict[str, Any]:
    """What a metric object has computed, as scalars by name: a dict gives NAME_KEY, a vector gives NAME_INDEX."""
    if isinstance(value, Mapping):
        return {full: part for key, inner in value.items() for full, part in flattened(f"{name}_{key}", inner).items()}
    if isinstance(value, Tensor) and value.ndim == 1 and len(value) > 1:
        return {f"{name}_{index}": part for index, part in enumerate(value)}
    return {name: as_scalar(value, f"metric {name!r}", "a metric computes one number, a vector, or a dict of them")}


def reported_names(functions: dict[str, Any]) -> list[str]:
    """The names under which metrics are reported, as far as they are known before anything is computed."""
    found = []
    for name, function in functions.items():
        several = is_stateful_metric(function) and callable(getattr(function, "keys", None))    # a MetricCollection
        found += [f"{name}_{key}" for key in function.keys()] if several else [name]            # noqa: SIM118
    return found


def without_placeholders(declared: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The declared metrics, without those that turned out to be vectors or dicts: `found` has a column per part."""
    return {name: value for name, value in declared.items()
            if name in found or value == value or not any(other.startswith(f"{name}_") for other in found)}


def metric_state(function: Any) -> dict[str, Any]:
    """The whole state of a metric object: its state dict, and the plain attributes of it and of the modules in it."""
    if not hasattr(function, "state_dict"):
        return {"attributes": {"": plain_attributes(function)}}
    if hasattr(function, "persistent"):
        function.persistent(True)           # otherwise torchmetrics leaves its state out of the state dict
    modules = dict(function.named_modules()) if isinstance(function, nn.Module) else {"": function}
    return {"state_dict": function.state_dict(),
            "attributes": {name: plain_attributes(module) for name, module in modules.items()}}


def load_metric_state(function: Any, state: dict[str, Any]) -> None:
    """Load what `metric_state` has returned."""
    if "state_dict" in state:
        metric_state(function)              # makes its state part of the state dict
        function.load_state_dict(state["state_dict"])
    modules = dict(function.named_modules()) if isinstance(function, nn.Module) else {"": function}
    for name, attributes in state["attributes"].items():
        for attribute, value in attributes.items():
            setattr(modules[name], attribute, value)


def plain_attributes(owner: Any) -> dict[str, Any]:
    """The attributes of an object that are plain values, such as a counter, or for an object that is no module all."""
    values = dict(vars(owner))
    if not isinstance(owner, nn.Module):
        return values
    of_torch = vars(nn.Module())
    return {name: value for name, value in values.items() if name not in of_torch and is_plain(value)}


def is_plain(value: Any) -> bool:
    """Whether a value consists of numbers, text, tensors, and lists, tuples and dicts of them."""
    if isinstance(value, Mapping):
        return type(value) is dict and all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, complex, str, bytes, Tensor)


def is_stateful_metric(function: Any) -> bool:
    """Whether a metric is a torchmetrics object, which keeps its state itself."""
    return all(hasattr(function, method) for method in ("update", "compute", "reset"))
