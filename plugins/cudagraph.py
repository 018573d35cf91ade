"""CUDA graphs: capture a training step once, and replay it in one launch."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loopctl import Run, UsageError, hookimpl
from loopctl.data.batch import map_nested
from loopctl.data.micro_batches import TransformedBatches
from loopctl.model.forward import detached

DEVICES = ("cuda",)                         # types of devices that have graphs
# The hooks that are captured, or that affect what is captured. Their code does not run in a replayed step.
CAPTURED = ("wrap_model", "batch_weight", "before_step", "optimizer_step", "micro_step", "compute_loss", "backward",
            "after_backward", "grads_ready")


@dataclass(eq=False)
class Cudagraph:
    """Capture a training step as a CUDA graph, and replay it in one launch.

    Same as torch.cuda.CUDAGraph. A small network spends its time on launching hundreds of kernels; a graph of forward
    pass, backward pass, clipping and update is launched once. Batches are copied into the graph's input tensors; a
    batch of another shape, such as the last of an epoch, runs without the graph. Python code in the model does not run
    in a replayed step. The graph's memory stays allocated. The learning rate becomes a tensor, which the optimizer must
    support: Adam and its variants do, SGD does with fused=true.

    warmup: steps with batches of the same shape that run without the graph before it is captured
    """

    warmup: int = 3
    topic = "precision and speed"

    def __post_init__(self) -> None:
        if self.warmup < 1:
            raise ValueError(f"warmup is at least 1, not {self.warmup}")

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.graph: Any = None
        self.loss: Any = None
        self.seen: dict[Any, int] = {}      # steps run without the graph, by the shapes of their batches
        if run.device.type not in DEVICES:
            raise UsageError(f"CUDA graphs need a GPU, and this run is on {run.device}; leave out cudagraph")
        if run.carries_state:
            raise UsageError("forward carries a state from batch to batch, which a graph would not update; leave out "
                             "cudagraph")
        if run.turns:
            raise UsageError("a step with several losses cannot be captured; leave out cudagraph")
        for hook in CAPTURED:
            for name in run.hook.acting[hook]:
                plugin = run.hook.plugins[name]
                if plugin is not self and not getattr(plugin, "capturable", False):
                    raise UsageError(f"the hook {hook} of {name} cannot be captured; leave out cudagraph or {name}")
        for name, metric in run.metric_fns["train"].items():
            if hasattr(metric, "update"):
                raise UsageError(f"metric {name!r} keeps a state, which cannot be captured; pass a function instead")
        for group in run.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
            elif not group.get("fused"):
                raise UsageError(f"{type(run.optimizer).__name__} does not take a tensor as learning rate; use an "
                                 "optimizer that is capturable, such as adamw, or fused, such as sgd:fused=true")

    @hookimpl
    def optimizer_step(self, run: Run, closure: Callable[[], Tensor]) -> Tensor:
        if not self.seen:
            self.side_stream = torch.cuda.Stream(run.device)
            self.rates = [torch.tensor(float(group["lr"]), device=run.device) for group in run.optimizer.param_groups]
        for group, rate in zip(run.optimizer.param_groups, self.rates, strict=True):
            if group["lr"] is not rate:     # set to a number by other code, or replaced by load_state_dict
                group["lr"] = rate.fill_(group["lr"])
        inputs = self.step_inputs(run.batches)
        shapes = self.shapes(inputs)
        if self.graph is None and self.seen.get(shapes, 0) == self.warmup:
            self.capture(run, closure, shapes)
        if self.graph is None or shapes != self.captured:
            self.seen[shapes] = self.seen.get(shapes, 0) + 1
            return self.step_without_graph(run, closure)
        map_nested(copy_into, self.inputs, inputs)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        for name, values in self.meter_values:
            for value, weight in values:
                run.meters.means[name].add(value.clone(), weight)
        for name, values in self.logged_values:
            for value, weight in values:
                run.meters.log(name, value.clone() if isinstance(value, Tensor) else value, weight)
        run.metrics |= self.metrics
        run.outputs, run.loss = self.outputs, self.loss.clone()
        return run.loss

    def step_inputs(self, batches: Sequence[Any]) -> list[list[Any]]:
        """The micro-batches of a step, and the targets that metrics compare with where plugins set others."""
        read = list(batches)                # map_nested descends into lists only
        return [read, batches.targets if isinstance(batches, TransformedBatches) else []]

    def shapes(self, batches: Any) -> Any:
        """What must match the captured batches: the shape and type of each tensor, and every other value."""
        leaves: list[Any] = []
        map_nested(lambda leaf: leaves.append((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf), batches)
        return tuple(leaves)

    def step_without_graph(self, run: Run, closure: Callable[[], Tensor]) -> Tensor:
        # On the stream of the capture. An accumulator of gradients remembers the stream on which it was made, and lives
        # as long as outputs or a loss of its pass do. On another stream torch would warn, or fail to capture.
        current = torch.cuda.current_stream(run.device)
        self.side_stream.wait_stream(current)
        with torch.cuda.stream(self.side_stream):
            loss = closure()
            run.optimizer.step()
        current.wait_stream(self.side_stream)
        return loss

    def capture(self, run: Run, closure: Callable[[], Tensor], shapes: Any) -> None:
        """Capture the step, with copies of the batches as the graph's inputs. Capturing executes nothing."""
        batches, meters, metrics = run.batches, run.meters, dict(run.metrics)
        self.inputs = map_nested(
            lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self.step_inputs(batches))
        run.batches = self.inputs[0]
        if isinstance(batches, TransformedBatches):
            run.batches = TransformedBatches(run, batches.source, batches.weights)
            run.batches.read, run.batches.targets = self.inputs
        run.meters = type(meters)(meters.functions, meters.prefix)      # collects the tensors that each replay fills
        run.optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.side_stream):
                closure()
                run.optimizer.step()
        finally:
            self.loss, self.outputs = run.loss, map_nested(detached, run.outputs)
            self.meter_values = [(name, [*zip(mean.values, mean.weights, strict=True)])
                                 for name, mean in run.meters.means.items()]
            self.logged_values = [(name, [*zip(mean.values, mean.weights, strict=True)])
                                  for name, mean in run.meters.logged.items()]
            self.metrics = {name: value for name, value in run.metrics.items() if value is not metrics.get(name)}
            run.batches, run.meters = batches, meters
        self.gradients = [(parameter, parameter.grad) for group in run.optimizer.param_groups
                          for parameter in group["params"]]
        self.graph, self.captured = graph, shapes


def copy_into(target: Any, source: Any) -> None:
    if isinstance(target, Tensor):
        target.copy_(source, non_blocking=True)
