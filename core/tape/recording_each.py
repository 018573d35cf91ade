"""`record_each`: a tape of every model that is trained inside a block, such as two loops to compare."""
from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from loopctl.tape.recording import Recording, TorchWatcher


@contextmanager
def record_each(folder: str | Path, *, modules: bool = False) -> Generator[list[Path]]:
    """Record what `record` does, with a tape for each model that an optimizer steps: 1.tape, 2.tape and so on.

    Yields the list of these files, in the order in which the models are first trained; it is complete after the block.
    """
    every = Recordings(Path(folder), modules)
    try:
        with every.watch():
            yield every.files
    finally:
        every.close()


class Recordings(TorchWatcher):
    """The tapes that `record_each` writes. What happens is given to that of the model that was called last."""

    def __init__(self, folder: Path, modules: bool) -> None:
        super().__init__()
        self.folder, self.modules = folder, modules
        self.files: list[Path] = []
        self.recordings: list[Recording] = []

    def of_model(self, module: nn.Module) -> Recording | None:
        """The recording of a module that has parameters; None for another, such as a loss function."""
        parameter = next(module.parameters(), None)
        if parameter is None:
            return None
        for recording in self.recordings:
            if recording.model is not None and any(parameter is each for each in recording.model.parameters()):
                return recording
        return self.begin(module)

    def of_optimizer(self, optimizer: Any) -> Recording:
        """The recording of the model whose parameters an optimizer has."""
        groups = getattr(optimizer, "param_groups", ())          # which something that a scaler is given may lack
        if not groups and self.current:
            return self.current
        held = {id(parameter) for group in groups for parameter in group["params"]}
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

    def close(self) -> None:
        for recording in self.recordings:
            with suppress(RuntimeError):
                recording.close()
            if recording.attempts:
                self.files.append(recording.file)
