"""Norms of gradients, weights and updates, per layer."""
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from math import hypot
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.sharded_tensors import full_tensor
from loopctl.checkpoint.step_file import StepFile
from loopctl.metrics.step_values import StepLogger, give_to_loggers
from loopctl.model.ownership import named_parameters
from loopctl.report import charts, html

KINDS = ("gradient", "weight", "update")
MAX_LINES = 12          # layers in a chart of the report


@dataclass(eq=False)
class Norms(StepLogger):
    """Write the norms of the gradients, weights and updates of each layer, every N steps.

    A layer is a module with parameters of its own that are trained; its norm is the 2-norm of all of them together. The
    gradient is that of the whole step, unscaled and before other plugins change it, as `clip` does; the weight that
    before the step; the update is what the step adds to it. In these steps a copy of the weights is kept until the
    update is made. No step waits for the device.

    They are in a CSV file, in `report`, and in `tensorboard`, `wandb` and `mlflow` as norm_gradient/LAYER and so on. A
    resumed run continues the file; rows of steps after its checkpoint, which it makes again, are removed.

    every_steps: how often to measure: in the first step and in every N-th one
    path: CSV file, relative to the run's folder; it must not exist yet
    """

    every_steps: int = 50
    path: str = "norms.csv"
    observer_only: ClassVar[bool] = True        # it changes no gradient
    topic = "logging and reports"

    @hookimpl
    def train_start(self, run: Run) -> None:
        held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
        named = {name: parameter for name, parameter in named_parameters(run).items() if id(parameter) in held}
        if not named:
            raise UsageError("the optimizer holds no parameter of the model, so there are no norms; leave norms out")
        self.parameters = list(named.values())
        self.layers = [name.rpartition(".")[0] or name for name in named]
        self.gradients: dict[int, Tensor] = {}          # by the index of the parameter
        self.before: list[Tensor] = []                  # the weights before this step, if it is measured
        self.file = StepFile(run.out / self.path, "norms")
        if run.rank == 0:
            self.file.claim(bool(run.resume), "path")
        for name, other in run.hook.plugins.items():
            if other is not self and isinstance(other, Norms) and other.path == self.path:
                raise UsageError(f"{name} writes to path={self.path} too; choose another path in one of them")

    def begin(self, run: Run) -> None:
        if run.rank == 0:
            self.file.begin(run.attempts)

    @hookimpl
    def before_step(self, run: Run) -> None:
        self.gradients = {}
        self.before = []
        if self.steps.due(run.attempts + 1):
            self.before = [parameter.detach().clone() for parameter in self.parameters]

    @hookimpl(wrapper=True)
    def grads_ready(self, run: Run) -> Generator[None, None, None]:
        if self.before:                 # before the yield: before other plugins change the gradients
            turn = {id(each) for group in run.optimizer.param_groups for each in group["params"]} if run.turn else None
            found = {index: parameter.grad for index, parameter in enumerate(self.parameters)
                     if parameter.grad is not None and (turn is None or id(parameter) in turn)}
            self.gradients |= dict(zip(found, norms(found.values()), strict=True))
        yield

    def values(self, run: Run) -> dict[str, Any]:
        weights = norms(self.before)
        with torch.no_grad():
            torch._foreach_sub_(self.before, self.parameters)     # type: ignore[arg-type]
        measured = {"weight": weights, "update": norms(self.before), "gradient": [*self.gradients.values()]}
        self.before = []
        vectors = {kind: torch.stack([*map(full_tensor, found)]) for kind, found in measured.items() if found}
        return {"epoch": run.epochs_done, "indices": [*self.gradients], **vectors}

    def write_values(self, run: Run, step: int, values: dict[str, Any]) -> None:
        if run.rank:
            return
        gradients = dict(zip(values["indices"], values.get("gradient", ()), strict=True))
        found: dict[str, dict[str, list[float]]] = {}
        for index, layer in enumerate(self.layers):
            kinds = found.setdefault(layer, {kind: [] for kind in KINDS})
            kinds["weight"].append(values["weight"][index])
            kinds["update"].append(values["update"][index])
            if index in gradients:
                kinds["gradient"].append(gradients[index])
        rows = {layer: {kind: hypot(*parts) for kind, parts in kinds.items() if parts}
                for layer, kinds in found.items()}
        self.file.add({"step": step, "epoch": values["epoch"], "layer": layer, **dict.fromkeys(KINDS), **row}
                      for layer, row in rows.items())
        give_to_loggers(run, step, {f"norm_{kind}/{layer}": row[kind] for layer, row in rows.items() for kind in row})

    def report_sections(self, run: Run) -> list[str]:
        """Charts of the norms, for the plugin report."""
        rows = self.file.read() if self.file.file.exists() else []
        layers = [*dict.fromkeys(row["layer"] for row in rows)]
        chosen = {round(part * (len(layers) - 1) / (MAX_LINES - 1)) for part in range(MAX_LINES)}   # the ends included
        shown = [layer for index, layer in enumerate(layers) if index in chosen]
        drawn = ""
        for title, kind, divisor in (("gradient norm", "gradient", ""), ("weight norm", "weight", ""),
                                     ("update norm / weight norm", "update", "weight")):
            lines = [charts.Line(layer, [(float(row["epoch"]), ratio(row, kind, divisor)) for row in rows
                                         if row["layer"] == layer]) for layer in shown]
            drawn += charts.figure(f"norms-{kind}", title, lines)
        note = f"<p>{len(shown)} of {len(layers)} layers; all of them are in {html.escaped(self.path)}.</p>"
        return [html.section("Norms of layers", note if len(shown) < len(layers) else "",
                             f'<div class="charts">{drawn}</div>')] if rows else []

    def target(self) -> Path:
        return self.file.file


def norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The 2-norm of each tensor; of half precision in float32."""
    dense = [each.coalesce().values() if each.is_sparse else each for each in tensors]
    half = any(each.dtype in (torch.float16, torch.bfloat16) for each in dense)
    return list(torch._foreach_norm(dense, 2, dtype=torch.float32 if half else None)) if dense else []


def ratio(row: dict[str, str], kind: str, divisor: str) -> float | None:
    """A number of a row, divided by another one if `divisor` names it; None where there is none."""
    if not row[kind] or (divisor and not float(row[divisor])):
        return None
    return float(row[kind]) / (float(row[divisor]) if divisor else 1.0)
