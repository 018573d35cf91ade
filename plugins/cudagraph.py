"""A step of the GPU in one launch."""
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopctl import Run, UsageError, hookimpl
from loopctl.data.batch import map_nested

GRAPHS = ("cuda",)                          # devices whose work can be captured
# What happens in these is captured, or decides what is: their code does not run again in a replayed step.
INSIDE = ("wrap_model", "batch_weight", "before_step", "optimizer_step", "micro_step", "compute_loss", "backward",
          "after_backward", "grads_ready")


@dataclass(eq=False)
class Cudagraph:
    """Capture a step once as a CUDA graph, and replay it in one launch.

    A small network waits for the launches of its hundreds of kernels; a graph, which holds forward, backward, clipping
    and update, has one. Batches are copied to where it reads them; those of another shape, as an epoch's last may be,
    take the usual way. Python in the model runs no more. The graph's memory stays taken. The learning rate is a tensor,
    so the optimizer must take one: Adam's kin do, SGD does with fused=true. See torch.cuda.CUDAGraph.

    warmup: steps of a shape that take the usual way before it is captured
    """

    warmup: int = 3

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise ValueError(f"warmup is at least 1, not {self.warmup}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.graph: Any = None
        self.loss: Any = None
        self.seen: dict[Any, int] = {}      # steps so far, by the shapes of their batches
        if run.device.type not in GRAPHS:
            raise UsageError(f"captures the work of a GPU, and this run is on {run.device}; leave it out")
        for hook in INSIDE:
            for name in run.hook.acting[hook]:
                plugin = run.hook.plugins[name]
                if plugin is not self and not getattr(plugin, "capturable", False):
                    raise UsageError(f"{name} joins {hook}, and what it does there cannot be captured; leave one out")
        for name, metric in run.metric_fns["train"].items():
            if hasattr(metric, "update"):
                raise UsageError(f"metric {name!r} keeps a state that cannot be captured; give a function for it")
        for group in run.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
            elif not group.get("fused"):
                raise UsageError(f"{type(run.optimizer).__name__} takes no tensor as learning rate; use one that is "
                                 "capturable, such as adamw, or fused, such as sgd:fused=true")

    @hookimpl
    def optimizer_step(self, run: Run, closure: Callable[[], Tensor]) -> Tensor:
        if not self.seen:
            self.side = torch.cuda.Stream(run.device)
            self.rates = [torch.tensor(float(group["lr"]), device=run.device) for group in run.optimizer.param_groups]
        for group, rate in zip(run.optimizer.param_groups, self.rates, strict=True):
            if group["lr"] is not rate:     # somebody has set a number, or a checkpoint has brought a tensor
                group["lr"] = rate.fill_(group["lr"])
        shapes = self.shapes(run.batches)
        if self.graph is None and self.seen.get(shapes, 0) == self.warmup:
            self.capture(run, closure, shapes)
        if self.graph is None or shapes != self.captured:
            self.seen[shapes] = self.seen.get(shapes, 0) + 1
            return self.as_usual(run, closure)
        map_nested(copy, self.batches, run.batches)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        for mean, values in self.measured:
            for value, weight in values:
                run.meters.means[mean].add(value.clone(), weight)
        run.metrics |= self.metrics
        run.outputs, run.loss = self.outputs, self.loss.clone()
        return run.loss

    def shapes(self, batches: list[Any]) -> Any:
        """What must be the same for a replay: the shapes of tensors, and whatever is no tensor itself."""
        leaves: list[Any] = []
        map_nested(lambda leaf: leaves.append((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf), batches)
        return tuple(leaves)

    def as_usual(self, run: Run, closure: Callable[[], Tensor]) -> Tensor:
        # On a stream of its own, as torch asks for before a capture: gradients remember the stream they came from.
        here = torch.cuda.current_stream(run.device)
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            loss = closure()
            run.optimizer.step()
        here.wait_stream(self.side)
        return loss

    def capture(self, run: Run, closure: Callable[[], Tensor], shapes: Any) -> None:
        """Note down what the step does, with batches and results in memory of its own. Nothing is done yet."""
        given, meters, before = run.batches, run.meters, dict(run.metrics)
        self.batches = run.batches = map_nested(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, given)
        run.meters = type(meters)(meters.functions, meters.prefix)      # what it is given belongs to the graph
        run.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                closure()
                run.optimizer.step()
        finally:
            self.loss, self.outputs = run.loss, run.outputs
            self.measured = [(name, [*zip(mean.values, mean.weights, strict=True)])
                             for name, mean in run.meters.means.items()]
            self.metrics = {name: value for name, value in run.metrics.items() if value is not before.get(name)}
            run.batches, run.meters = given, meters
        self.gradients = [(parameter, parameter.grad) for group in run.optimizer.param_groups
                          for parameter in group["params"]]
        self.graph, self.captured = graph, shapes


def copy(held: Any, given: Any) -> None:
    if isinstance(held, Tensor):
        held.copy_(given, non_blocking=True)
