"""`record`: a tape of training code that does not use loopctl."""
from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from loopctl.checkpoint.atomic_files import claim_output
from loopctl.data.batch import iter_tensors
from loopctl.distributed.process_group import launched_processes, rank
from loopctl.errors import UsageError, one_line
from loopctl.metrics.step_values import StepValues
from loopctl.model.own_names import own_buffers, own_parameters
from loopctl.tape.header import describe_parameters, environment
from loopctl.tape.modules import Modes, ModuleWatch, in_backward
from loopctl.tape.observations import Observations, Rows
from loopctl.tape.tape_file import TapeWriter, records

MAX_BACKWARDS = 16          # of the backward passes of an update, whose gradients are recorded
under_way: Path | None = None       # the tape that is recorded in this process
OPTIMIZER_FILE = Optimizer.__init__.__code__.co_filename
log = logging.getLogger("loopctl")


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
    modules: also record the output of every module of the model, and the gradient with respect to it; not if it is
        compiled
    resume: go on with the tape of an earlier part of the same training

    Of several processes that torchrun has started, each writes a tape: run.tape, run.1.tape and so on. Where the file
    cannot be written, training goes on.

    Raises UsageError where the file exists, or where a tape is recorded already.
    """
    global under_way
    path = Path(file)
    path = path.with_suffix(f".{rank()}{path.suffix}") if rank() else path
    claim_output(path, resume, "file")
    if under_way:
        raise UsageError(f"the tape {under_way} is being recorded, and one block cannot be in another; leave one out")
    if every_steps < 1:
        raise UsageError(f"every_steps is at least 1, not {every_steps}")
    recording = Recording(path, model, every_steps, modules)
    under_way = path
    try:
        with OneRecording(recording).watch():
            yield recording
    except BaseException as error:
        recording.error = error
        raise
    finally:
        under_way = None
        recording.close()
        if not recording.attempts:
            log.warning("record: no optimizer of torch has made an update, so %s was not written", path)


class TorchWatcher:
    """Gives what happens in torch, inside of `watch`, to the recording that it belongs to."""

    def __init__(self) -> None:
        self.current: Recording | None = None       # of the model that was called last
        self.depth = 0                              # of calls of modules

    def of_model(self, module: nn.Module) -> Recording | None:
        """The recording that the call of a module belongs to; None where that is the one of the call before."""
        raise NotImplementedError

    def of_optimizer(self, optimizer: Any) -> Recording:
        """The recording that the step of an optimizer belongs to."""
        raise NotImplementedError

    @contextmanager
    def watch(self) -> Generator[None]:
        """Be told of calls of modules, backward passes and steps inside the block."""
        replaced: list[tuple[Any, str, Any]] = [(nn.Module, "__call__", self.watched_call),
                                                (torch.autograd, "backward", self.watched_backward),
                                                (GradScaler, "step", self.watched_scaler_step)]
        originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
        handles = [register_optimizer_step_pre_hook(self.before_update),
                   register_optimizer_step_post_hook(self.after_update)]
        try:
            for owner, name, watched in replaced:
                setattr(owner, name, watched(getattr(owner, name)))
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)
            for handle in handles:
                handle.remove()

    def watched_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def watched(module: nn.Module, *arguments: Any, **named: Any) -> Any:
            if torch.compiler.is_compiling():
                return call(module, *arguments, **named)
            top = not self.depth and torch.is_grad_enabled() and module.training
            if top:
                self.current = self.of_model(module) or self.current
            recording = self.current if top else None
            if recording:
                recording.before_call(module, arguments, named)
            self.depth += 1
            try:
                result = call(module, *arguments, **named)
            finally:
                self.depth -= 1
            if recording:
                recording.after_call(result)
            return result
        return watched

    def watched_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def watched(tensors: Any, *arguments: Any, **named: Any) -> None:
            nested = in_backward()                  # in that of a part of the model, as in activation checkpointing
            backward(tensors, *arguments, **named)
            if self.current and not nested:
                self.current.after_backward(next(iter_tensors(tensors), None))
        return watched

    def watched_scaler_step(self, step: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(step)
        def watched(scaler: GradScaler, optimizer: Any, *arguments: Any, **named: Any) -> Any:
            return self.of_optimizer(optimizer).scaler_step(step, scaler, optimizer, *arguments, **named)
        return watched

    def before_update(self, optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return self.of_optimizer(optimizer).before_update(optimizer, arguments, named)

    def after_update(self, optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.of_optimizer(optimizer).after_update(optimizer, arguments, named)


class OneRecording(TorchWatcher):
    """Gives everything to one recording."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.current = self.recording = recording

    def of_model(self, module: nn.Module) -> Recording:
        return self.recording

    def of_optimizer(self, optimizer: Any) -> Recording:
        return self.recording


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
        self.versions: list[int] = []               # of the weights, when that began
        self.stepping: list[int] = []               # the optimizers inside of whose steps we are
        self.updates = 0
        self.failed = False                         # the file cannot be written
        self.error: BaseException | None = None     # that ended the block
        self.optimizers: dict[int, Optimizer] = {}
        self.input: Any = None                      # of the model, until its backward pass
        self.target: Any = None
        self.loss: Tensor | None = None
        self.backwards = 0
        self.seen: ModuleWatch | None = None

    # What happens in the code inside the block.

    def scaler_step(self, step: Callable[..., Any], scaler: GradScaler, optimizer: Any, *arguments: Any,
                    **named: Any) -> Any:
        """Have a scaler make a step, which is an update or is skipped."""
        before, scale = self.updates, scaler.get_scale()
        if isinstance(optimizer, Optimizer):
            self.optimizers[id(optimizer)] = optimizer
            result = step(scaler, optimizer, *arguments, **named)
            made = self.updates > before
        else:                       # something else with a `step`, which may make the update later
            with calls_of(optimizer, "step") as calls:
                result = step(scaler, optimizer, *arguments, **named)
            made = bool(calls)
        if not made:
            self.finish(skipped=True, loss_scale=scale)
        return result

    def before_call(self, module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Called before a module at the top is called in training."""
        given = [*iter_tensors([*arguments, *named.values()])]
        if self.model is None and next(module.parameters(), None) is not None:
            self.model = module
        is_loss = len(given) > 1 and given[0].requires_grad
        if is_loss:                             # a loss function, which gets what the model returned
            self.target = given[1]
            return
        if self.begun and not self.backwards and self.weights and self.versions != self.weights.versions():
            self.begun = False                  # what was called before is no part of the update: weights were loaded
            if self.seen:
                self.seen.remove()
        self.begin()
        self.observe_modes()
        unnamed = arguments[0] if len(arguments) == 1 else arguments
        self.input = {"input": unnamed} | named if named and arguments else named or unnamed

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
        self.observe_modes()            # unless the model was called, which it is not where it is in evaluation mode
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
        if id(optimizer) in self.stepping and not is_nested(optimizer):     # the step before was left by an error
            self.stepping = []
        self.stepping.append(id(optimizer))
        if len(self.stepping) > 1:                  # a part of the step of an optimizer around it
            return None
        unknown = self.begun and id(optimizer) not in self.optimizers
        self.begin(optimizer)
        if self.now and unknown and ["state", "start"] not in [point[:2] for point in self.now.points]:
            self.now.state("start", self.optimizers.values())       # it may have one, as after a resume
        if self.now:
            self.now.groups(self.optimizers.values())
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
        while self.stepping and self.stepping.pop() != id(optimizer):       # those that were left by an error
            pass
        if not self.stepping:
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
        if self.begun or (self.weights is None and not self.find_weights(optimizer)):
            return
        assert self.weights
        self.begun, self.backwards, self.versions = True, 0, self.weights.versions()
        if self.steps.due(self.attempts + 1):
            self.now = Observations(self.device)
            self.now.random("start")
            self.add_state(self.now, "start")
            if self.modules and self.model is not None:
                self.seen = ModuleWatch(self.model, self.device)

    def observe_modes(self) -> None:
        """Observe the modes once in an update, as they are in its forward pass; a closure may set them."""
        if self.now and self.modes and "modes" not in self.now.values:
            self.modes.observe(self.now)

    def find_weights(self, optimizer: Optimizer | None) -> bool:
        """Find the parameters: those of the model, else those of the optimizer."""
        if isinstance(self.model, DistributedDataParallel | DataParallel):
            self.model = self.model.module
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
        now.tables(point, {"weights": self.weights, "buffers": self.buffers})
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
        if skipped:
            now.groups(self.optimizers.values())
        now.values |= {"skipped": skipped, "micro_batches": self.backwards} | values
        self.steps.send(self.attempts, {"vector": now.vector(), "points": now.points, "values": now.values})
        self.attempt(self.write)

    def attempt(self, write: Callable[..., None], *arguments: Any) -> None:
        """Call `write`. Where the file cannot be written, warn, and write nothing more."""
        try:
            if not self.failed:
                write(*arguments)
        except OSError as error:
            self.failed = True
            log.warning("record: %s cannot be written (%s); nothing more is", self.file,
                        error.strerror or one_line(error))

    def write(self, wait: bool = False) -> None:
        """Write the updates whose values are on the host; with `wait` all of them."""
        for update, values in self.steps.arrived(wait):
            if not self.writer.opened:
                header = environment(self.device) | {
                    "model": type(self.model).__name__, "rank": rank(), "world_size": processes(),
                    "seed": None, "config": {}, **describe_parameters(self.named, self.optimizers.values())}
                self.writer.begin(header, update - 1)
            self.writer.add_update(update, **values)

    def close(self) -> None:
        """Write what is left, and close the file."""
        if self.seen:
            self.seen.remove()
        with suppress(RuntimeError):            # of a device that an error has made unusable
            self.attempt(self.write, not self.error)
        self.attempt(self.writer.add, {"kind": "end", "update": self.attempts,
                                       "why": type(self.error).__name__ if self.error else ""})
        self.attempt(self.writer.close)


@contextmanager
def calls_of(owner: Any, name: str) -> Generator[list[Any]]:
    """Yield a list with an entry for each call of a method of one object inside the block."""
    calls: list[Any] = []
    method, own = getattr(owner, name), name in vars(owner)

    @wraps(method)
    def noted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return method(*arguments, **named)

    setattr(owner, name, noted)
    try:
        yield calls
    finally:
        setattr(owner, name, method) if own else delattr(owner, name)


def is_nested(optimizer: Optimizer) -> bool:
    """Whether a step of this optimizer is made inside of another one of it, as where a class extends `step`."""
    frame, steps = sys._getframe(), 0
    while frame := frame.f_back:            # type: ignore[assignment]
        if frame.f_code.co_filename == OPTIMIZER_FILE and frame.f_code.co_name == "wrapper":
            steps += frame.f_locals["args"][0] is optimizer
    return steps > 1


def processes() -> int:
    """The number of processes that train together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else launched_processes()
