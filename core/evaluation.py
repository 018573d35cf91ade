"""`evaluate`: loss and metrics of a model over data, as a run computes them, without training."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from loopctl.composition.compose import blame_plugin, compose
from loopctl.data.resumable_loader import open_loaders
from loopctl.distributed.data_parallel import Parallel
from loopctl.distributed.process_group import broadcast_from_rank0, launched_processes
from loopctl.hooks import hookimpl
from loopctl.loop import DEFAULTS, Forward, on_host
from loopctl.metrics.meters import without_placeholders
from loopctl.prepare import prepare
from loopctl.run import Run


def evaluate(
    model: nn.Module,
    data: Iterable[Any] | dict[str, Iterable[Any]],
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    *,
    metrics: dict[str, Callable[[Any, Any], Any]] | None = None,
    forward: Forward | dict[str, Forward] | None = None,
    plugins: Iterable[Any] = (),
    device: str | torch.device | None = None,
    reduction: str | None = None,
) -> dict[str, Any]:
    """Return the mean loss and the metrics of `model` over `data`, by name: `loss`, `accuracy` and so on.

    They are those that a run of `fit` with the same arguments reports as `val_loss` and so on. Of several data sets, a
    dict by name, they are called `NAME_loss` and so on. In processes that torchrun has started, each evaluates its part
    of the data, and all return the means over all. The model keeps its mode.

    plugins: those that act on the forward pass, such as `amp`; no optimizer exists, and no step is made
    The other arguments are those of `fit`.

    Raises UsageError where something asked for cannot be done.
    """
    chosen = list(plugins)
    if launched_processes() > 1:
        chosen.append(Parallel())
    run = Run(model=model, loss_fn=loss_fn, optimizer=partial(torch.optim.SGD, lr=0.0), train=[()], valid=data,
              forward=forward, reduction=reduction)
    run.hook = compose([*chosen, EvaluationOnly()], DEFAULTS)
    with blame_plugin(run.hook):
        prepare(run, metrics or {}, device, None)
        run.hook.train(run=run)
    return {name.removeprefix("val_"): value for name, value in run.metrics.items()}


class EvaluationOnly:
    """A plugin that evaluates in place of training."""

    observer_only = True

    @hookimpl
    def param_groups(self) -> list[dict[str, Any]]:
        return [{"params": [nn.Parameter(torch.zeros(()))]}]         # the optimizer holds nothing of the model

    @hookimpl
    def train(self, run: Run) -> None:
        declared = {name: value for name, value in run.metrics.items() if name.startswith("val_")}
        with open_loaders(run):
            found = run.hook.evaluate(run=run)
        run.metrics = broadcast_from_rank0(run, on_host(without_placeholders(declared, found) | found))
