"""`record_each`: a tape of every model that is trained inside a block, such as two loops to compare."""
from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer

from loopctl.data.batch import iter_tensors
from loopctl.tape.modules import in_backward
from loopctl.tape.recording import Recording, watched_torch


@contextmanager
def record_each(folder: str | Path, *, modules: bool = False) -> Generator[list[Path]]:
    """Record what `record` does, with a tape for each model that an optimizer steps: 1.tape, 2.tape and so on.

    Yields the list of these files, in the order in which the models are first trained; it is complete after the block.
    """
    every = Recordings(Path(folder), modules)
    try:
        with watched_torch(every):
            yield every.files
    finally:
        every.close()


class Recordings:
    """The tapes that `record_each` writes. What happens is given to that of the model that was called last."""

    def __init__(self, folder: Path, modules: bool) -> None:
        self.folder, self.modules = folder, modules
        self.files: list[Path] = []
        self.recordings: list[Recording] = []
        self.current: Recording | None = None
        self.depth = 0

    def of_model(self, module: nn.Module) -> Recording | None:
        """The recording of a module that has parameters; None for another, such as a loss function."""
        parameter = next(module.parameters(), None)
        if parameter is None:
            return None
        for recording in self.recordings:
            if recording.model is not None and any(parameter is each for each in recording.model.parameters()):
                return recording
        return self.begin(module)

    def of_optimizer(self, optimizer: Optimizer) -> Recording:
        """The recording of the model whose parameters an optimizer has."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for recording in reversed(self.recordings):
            if recording.model is not None and any(id(each) in held for each in recording.model.parameters()):
                return recording
            if id(optimizer) in recording.optimizers:
                return recording
        return self.begin(None)

    def begin(self, model: nn.Module | None) -> Recording:
        file = self.folder / f"{len(self.recordings) + 1}.tape"
        self.recordings.append(Recording(file, model, 1, self.modules))
        return self.recordings[-1]

    def watched_call(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def watched(module: nn.Module, *arguments: Any, **named: Any) -> Any:
            if torch.compiler.is_compiling():
                return call(module, *arguments, **named)
            top = not self.depth and torch.is_grad_enabled() and module.training
            if top:
                self.current = self.of_model(module) or self.current
                if self.current:
                    self.current.before_call(module, arguments, named)
            self.depth += 1
            try:
                result = call(module, *arguments, **named)
            finally:
                self.depth -= 1
            if top and self.current:
                self.current.after_call(result)
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
        def watched(scaler: GradScaler, optimizer: Optimizer, *arguments: Any, **named: Any) -> Any:
            return self.of_optimizer(optimizer).watched_scaler_step(step)(scaler, optimizer, *arguments, **named)
        return watched

    def before_update(self, optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        return self.of_optimizer(optimizer).before_update(optimizer, arguments, named)

    def after_update(self, optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.of_optimizer(optimizer).after_update(optimizer, arguments, named)

    def close(self) -> None:
        for recording in self.recordings:
            with suppress(RuntimeError):
                recording.close()
            if recording.attempts:
                self.files.append(recording.file)
