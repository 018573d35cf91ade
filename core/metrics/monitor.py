"""Monitor a metric: whether its value is the best so far."""
from __future__ import annotations

import re
from dataclasses import dataclass
from math import isnan
from typing import TYPE_CHECKING, Any

from loopctl.errors import UsageError, nearest

if TYPE_CHECKING:
    from loopctl.run import Run

SMALLER = ("loss", "error", "err", "mse", "mae", "rmse", "perplexity", "ppl", "norm")
LARGER = ("accuracy", "acc", "auc", "auroc", "f1", "precision", "recall", "iou", "dice", "map", "bleu", "psnr", "r2")


def direction(metric: str) -> str:
    """Whether smaller or larger is better, by the name of a metric: min, max, or "" where the name does not tell."""
    kind = metric.lower().replace("-", "_").rpartition("_")[2]
    return "max" if kind in LARGER or re.fullmatch(r"top\d+", kind) else "min" if kind in SMALLER else ""


def direction_of_object(metric: str, run: Run) -> str:
    """Whether smaller or larger is better, by what the object of a metric says: min, max, or "" if nothing."""
    part, _, name = metric.partition("_")
    larger = getattr(run.metric_fns.get(part, {}).get(name), "higher_is_better", None)
    return "" if larger is None else "max" if larger else "min"


@dataclass(eq=False)
class Monitor:
    """The best value of a metric so far.

    metric: a name in `run.metrics`; empty is `run.monitor`, or else val_loss, or train_loss without validation data
    mode: min, max, or auto, which tells losses and errors from accuracies by name, or by the attribute
        `higher_is_better` that torchmetrics' classes have; what is unclear is refused
    min_delta: a value must be better than the best by more than this
    """

    metric: str = ""
    mode: str = "auto"
    min_delta: float = 0.0
    best: float | None = None

    def start(self, run: Run) -> None:
        """Raise UsageError if the run does not report the metric. Call it in `train_start`."""
        self.metric = self.metric or run.monitor or ("val_loss" if "val_loss" in run.metrics else "train_loss")
        if self.metric not in run.metrics and run.forward is not None:
            run.expected.append(self.metric)        # `forward` may log it, which the first step shows
        elif self.metric not in run.metrics:
            has = nearest(self.metric, run.metrics, "it has")
            raise UsageError(f"monitor={self.metric}: the run has no such metric; {has}")
        if self.mode == "auto":
            mode = direction(self.metric) or direction_of_object(self.metric, run)
            if not mode:
                raise UsageError(f"monitor={self.metric}: whether higher is better is unclear; pass mode=min or "
                                 "mode=max")
            self.mode = mode

    def improved(self, run: Run) -> bool:
        """Whether the metric is better than the best so far; if so, it becomes the best. NaN is never better."""
        value = run.metrics[self.metric]
        gain = 0 if self.best is None else self.best - value if self.mode == "min" else value - self.best
        if isnan(value) or (self.best is not None and not gain > self.min_delta):
            return False
        self.best = value
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "mode": self.mode, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (saved := (state["metric"], state["mode"])) != (own := (self.metric, self.mode)):
            raise UsageError("monitor={}, mode={} in the checkpoint and monitor={}, mode={} in this run: their best "
                             "values cannot be compared; use those of the checkpoint".format(*saved, *own))
        self.best = state["best"]
