"""`record`: a tape of training code that does not use loopctl."""
from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from loopctl.data.batch import iter_tensors
from loopctl.errors import UsageError
from loopctl.metrics.step_values import StepValues
from loopctl.model.own_names import own_buffers, own_parameters
from loopctl.tape.header import describe_parameters, environment
from loopctl.tape.modules import Modes, ModuleWatch
from loopctl.tape.observations import Observations, Rows
from loopctl.tape.tape_file import TapeWriter, packed, records

MAX_BACKWARDS = 16          # of the backward passes of an update, whose gradients are recorded


@contextmanager
def record(file: str | Path, model: nn.Module | None = None, *, every_steps: int = 1, modules: bool = False,
           resume: bool = False) -> Generator[Recording]:
    """Record every update that optimizers make inside the block to the tape `file`, which must not exist yet.

    The code inside needs no change. An update is a call of `step` of any optimizer of torch, by its global hooks, or a
    step that a GradScaler skips. A batch is what a module at the top is called with in training: the inputs of the
    model, and the target of a loss function that is a module. The tape is that of the plugin `tape`, and `loopctl why`
    compares the two. Inside the block, `nn.Module.__call__`, `torch.autograd.backward` and `GradScaler.step` are
    replaced by functions that call them and take notes.

    model: whose parameters are trained; left out, the first module at the top that has parameters
    every_steps: how often to record: the first update and every N-th one
    modules: also record the output of every module of the model, and the gradient with respect to it
    resume: go on with the tape of an earlier part of the same training

    Raises UsageError where the file exists.
    """
    path = Path(file)
    if path.exists() and not resume:
        raise UsageError(f"{path} exists and is not overwritten; choose another file, or pass resume=True")
    recording = Recording(path, model, every_steps, modules)
    replaced: list[tuple[Any, str, Any]] = [(nn.Module, "__call__", recording.watched_call),
                                            (torch.autograd, "backward", recording.watched_backward),
                                            (GradScaler, "step", recording.watched_scaler_step)]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    handles = [register_optimizer_step_pre_hook(recording.before_update),
               register_optimizer_step_post_hook(recording.after_update)]
    try:
        for owner, name, watched in replaced:
            setattr(owner, name, watched(getattr(owner, name)))
        yield recording
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)
        for handle in handles:
            handle.remove()
        recording.close()


class Recording:
    """The tape that `record` writes, with methods for code that torch's hooks do not reach."""

    def __init__(self, file: Path, model: nn.Module | None, every_steps: int, modules: bool) -> None:
        self.file, self.model, self.modules = file, model, modules
        self.writer, self.steps = TapeWriter(file), StepValues(every_steps)
        self.attempts = max((found.get("update", 0) for found in records(file) if found), default=0) \
            if file.exists() else 0
        self.weights: Rows | None = None            # from the first call of the model on
        self.now: Observations | None = None        # of the update that is being prepared, if it is recorded
        self.begun = False                          # whether something of that update was seen
        self.depth = 0                              # of calls of modules
        self.updating = False                       # inside of an optimizer's step, closure excepted
        self.updates = 0
        self.optimizers: dict[int, Optimizer] = {}
        self.input: Any = None                      # of the model, until its backward pass
        self.target: Any = None
        self.loss: Tensor | None = None
        self.backwards = 0
        self.seen: ModuleWatch | None = None

    # What the functions inside the block are replaced by.

    def watched_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def watched(module: nn.Module, *arguments: Any, **named: Any) -> Any:
            top = not self.depth and torch.is_grad_enabled() and module.training and not torch.compiler.is_compiling()
            if top:
                self.before_call(module, arguments, named)
            self.depth += 1
            try:
                result = call(module, *arguments, **named)
            finally:
                self.depth -= 1
            if top:
                self.after_call(result)
            return result
        return watched

    def watched_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def watched(tensors: Any, *arguments: Any, **named: Any) -> None:
            roots = [*iter_tensors(tensors)]
            backward(tensors, *arguments, **named)
            self.after_backward(roots[0] if roots else None)
        return watched

    def watched_scaler_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def watched(scaler: GradScaler, optimizer: Optimizer, *arguments: Any, **named: Any) -> Any:
            before = self.updates
            self.optimizers[id(optimizer)] = optimizer
            scale = scaler.get_scale()
            result = step(scaler, optimizer, *arguments, **named)
            if self.updates == before:
                self.finish(skipped=True, loss_scale=scale)
            return result
        return watched

    # What happens in the code inside the block.

    def before_call(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Called before a module at the top is called in training."""
        given = [*iter_tensors([*arguments, *named.values()])]
        if self.model is None and next(module.parameters(), None) is not None:
            self.model = module
        is_loss = len(given) > 1 and any(tensor.requires_grad for tensor in given[:1])
        if is_loss:                             # a loss function, which gets what the model returned
            self.target = given[1]
            return
        self.begin()
        self.input = named or (arguments[0] if len(arguments) == 1 else arguments)

    def after_call(self, result: Any) -> None:
        """Called with what a module at the top returned."""
        loss = result.get("loss") if isinstance(result, dict) else result
        if isinstance(loss, Tensor) and not loss.ndim:
            self.loss = loss.detach()
        if self.now and isinstance(result, Tensor) and result.ndim:
            self.now.values["outputs"] = str(result.dtype).removeprefix("torch.")

    def after_backward(self, root: Tensor | None) -> None:
        """Called after a backward pass from `root`."""
        self.begin()
        self.backwards += 1
        if self.now and self.weights and self.backwards <= MAX_BACKWARDS:
            if self.input is not None:
                batch = self.input if self.target is None else (self.input, self.target)
                self.now.batch(str(self.backwards), batch)
            if root is not None:
                self.now.scalar("backward", str(self.backwards), root.detach().sum())
            if self.loss is not None:
                self.now.scalar("loss of a batch", str(self.backwards), self.loss)
            self.now.random("forward")
            self.add_gradients(f"backward {self.backwards}")
        self.input = self.target = self.loss = None

    def before_update(self, optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """A hook of torch, before any optimizer steps."""
        unknown = self.begun and not self.optimizers
        self.begin(optimizer)
        if self.now and unknown:                # as in the first update after a resume, where it has a state already
            self.now.state("start", [optimizer])
        if not (closure := next((each for each in (*arguments, *named.values()) if callable(each)), None)):
            self.add_gradients("update")
            return None

        @wraps(closure)
        def watched(*values: Any, **more: Any) -> Any:
            result = closure(*values, **more)
            self.add_gradients("update")
            return result

        def changed(value: Any) -> Any:
            return watched if value is closure else value
        return tuple(map(changed, arguments)), {key: changed(value) for key, value in named.items()}

    def after_update(self, optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook of torch, after any optimizer has stepped."""
        self.updates += 1
        self.finish()

    @contextmanager
    def update(self, **numbers: float) -> Generator[None]:
        """Record the block as an update, where no optimizer of torch makes it. numbers: such as lr=0.1."""
        self.begin()
        self.add_gradients("update")
        yield
        self.finish(groups=[{"group": 0, "numbers": numbers}])

    # The record of an update.

    def begin(self, optimizer: Optimizer | None = None) -> None:
        """Begin to record an update: what it starts from. Where that is under way, do nothing."""
        if optimizer is not None:
            self.optimizers[id(optimizer)] = optimizer
        if self.weights is None and not self.find_weights(optimizer):
            return
        if self.begun:
            return
        self.begun, self.backwards = True, 0
        if self.steps.due(self.attempts + 1):
            self.now = Observations(self.device)
            self.now.random("start")
            self.add_state(self.now, "start")
            if self.modes:
                self.modes.observe(self.now)
            if self.modules and self.model is not None:
                self.seen = ModuleWatch(self.model, self.device)

    def find_weights(self, optimizer: Optimizer | None) -> bool:
        """Find the parameters: those of the model, else those of the optimizer."""
        named: dict[str, Tensor] = dict(own_parameters(self.model)) if self.model is not None else {}
        if not named and optimizer is not None:
            held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
            named = {f"parameter {index}": tensor for index, tensor in enumerate(held)}
        if not named:
            return False
        self.named, self.device = named, next(iter(named.values())).device
        self.weights = Rows(named)
        self.buffers = Rows(own_buffers(self.model) if self.model is not None else {})
        self.modes = Modes(self.model) if self.model is not None else None
        return True

    def add_state(self, now: Observations, point: str) -> None:
        assert self.weights
        now.table("weights", point, self.weights.names, self.weights.tensors)
        now.table("buffers", point, self.buffers.names, self.buffers.tensors)
        now.state(point, self.optimizers.values())

    def add_gradients(self, point: str) -> None:
        if self.now and self.weights:
            self.now.table("gradients", point, self.weights.names, self.weights.gradients())

    def finish(self, skipped: bool = False, **values: Any) -> None:
        """Record what the update has made, and write it when its values are on the host."""
        self.attempts, self.begun = self.attempts + 1, False
        now, seen, self.now, self.seen = self.now, self.seen, None, None
        if not now:
            return
        if seen:
            seen.close(now)
        now.random("end")
        self.add_state(now, "end")
        now.groups(self.optimizers.values())
        now.values |= {"skipped": skipped, "micro_batches": self.backwards} | values
        self.steps.send(self.attempts, {"vector": now.vector(), "points": now.points, "values": now.values})
        self.write(wait=False)

    def write(self, wait: bool) -> None:
        for update, values in self.steps.arrived(wait):
            if not self.writer.opened:
                header = environment(self.device) | {
                    "model": type(self.model).__name__, "rank": 0, "world_size": 1, "seed": None, "config": {},
                    **describe_parameters(self.named, self.optimizers.values())}
                self.writer.begin(header, update - 1)
            points = [[what, point, self.writer.rows(rows) if isinstance(rows, tuple) else rows, columns]
                      for what, point, rows, columns in values["points"]]
            self.writer.add({"kind": "update", "update": update, **values["values"], "points": points,
                             "data": packed(values["vector"])})

    def close(self) -> None:
        """Write what is left, and close the file."""
        self.write(wait=True)
        self.writer.add({"kind": "end", "update": self.attempts, "why": ""})
        self.writer.close()
