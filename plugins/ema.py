"""Exponential moving average of the weights."""
from dataclasses import dataclass
from typing import Any

from loopctl import Duration, Run, UsageError, hookimpl
from loopctl.model.own_names import own_buffers
from loopctl.model.ownership import named_parameters
from loopctl.model.weight_averages import WeightAverage, alike, is_averaged, lerp_average, loaded_average, new_average


@dataclass(eq=False)
class Ema(WeightAverage):
    """Average the weights exponentially over the updates; evaluate and end with the average.

    With warmup=false it is torch.optim.swa_utils.get_ema_multi_avg_fn; an average of the iterates is due to Polyak and
    Juditsky, doi:10.1137/0330046. Training continues with the raw weights. BatchNorm statistics are averaged like the
    weights, since the model's own belong to its raw weights; other buffers are the model's own, as they need not be
    means.

    decay: the part of the average that each update keeps, 0 to 1
    warmup: keep less at first, (1 + n) / (10 + n) at the n-th update, so that the first weights are soon forgotten
    start: the duration after which averaging starts; at the first update if left out
    evaluate_raw: evaluate the raw weights too, which takes as long again; their metrics are val_raw_loss and so on
    """

    decay: float = 0.999
    warmup: bool = True
    start: Duration | None = None
    evaluate_raw: bool = False
    topic = "weights"

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay is between 0 and 1, not {self.decay}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        if self.start is not None and run.duration(self.start, "step") > run.planned_steps:
            raise UsageError(f"start={self.start} is after the run's end, so nothing would be averaged")
        if not self.warmup:
            updates = run.planned_steps - (0 if self.start is None else run.duration(self.start, "step"))
            if (kept := self.decay ** updates) > 0.5:
                run.say_once("ema", f"ema: with decay={self.decay} the average has {kept:.0%} of the first weights at "
                                    f"the end of the run, after {updates:,.0f} updates; use a smaller decay, or "
                                    "warmup=true")
        self.average: dict[str, Any] = {}       # empty until it starts
        self.count = 0
        weights = {name: weight for name, weight in named_parameters(run).items() if is_averaged(weight)}
        statistics = {name: buffer for name, buffer in own_buffers(run.model).items()
                      if name.rpartition(".")[2] in ("running_mean", "running_var")}
        self.own = {name: tensor.detach() for name, tensor in (weights | statistics).items()}
        self.alike = alike(self.own)

    @hookimpl
    def after_step(self, run: Run) -> None:
        if run.skipped:
            return
        if not self.average:
            if self.start is None or run.epochs_done >= run.duration(self.start, "epoch"):
                self.average = new_average(self.own)
                self.count = 1
            return
        decay = min(self.decay, (1 + self.count) / (10 + self.count)) if self.warmup else self.decay
        for names in self.alike:
            lerp_average(self.average, self.own, names, 1 - decay)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average, self.count = loaded_average(state["average"]), state["count"]
