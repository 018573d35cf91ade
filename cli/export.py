"""`loopctl export`: the model of a run as a file for other programs, compared with the model before it is kept."""
from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopctl.checkpoint.atomic_files import atomic_write, claim_output, save_weights
from loopctl.checkpoint.weights_file import load_weights
from loopctl.cli.saved_run import SavedRun, build_model, load_run, read_run
from loopctl.errors import UsageError, one_line

# The endings of a file of each format, the first of them by default.
SUFFIXES = {"torch": (".pt", ".pth", ".safetensors"), "exported": (".pt2",), "onnx": (".onnx",)}
BATCH_SIZES = (2, 1, 3)         # of the comparison; the first is the one to export with
ROUNDING = 1e-4                 # of the largest output: by how much an output may differ
ONNX_LIMIT = 2 * 10**9          # bytes of one file
Model = Callable[[Tensor], Tensor]


def export_model(folder: Path, kind: str, out: Path | None, weights: str | None) -> str:
    """Write the model of the run in `folder` as a file of this kind, a key of SUFFIXES; say what was written.

    Raises UsageError where that cannot be done, or where the outputs of the file differ from those of the model.
    """
    suffixes = SUFFIXES[kind]
    out = out or folder / f"model{suffixes[0]}"
    if out.suffix.lower() not in suffixes:
        raise UsageError(f"--out {out}: a file of --format {kind} ends in {' or '.join(suffixes)}")
    if kind == "onnx" and not onnx_is_there():
        raise UsageError("--format onnx needs more packages; pip install 'loopctl[onnx]'")
    run = load_run(folder, weights)
    claim_output(out, False, "--out")
    if kind == "torch" and not takes_numbers(run):
        with atomic_write(out) as temporary:
            write_weights(run.model, temporary, out.suffix.lower())
            compare_weights(run.model, read_weights(folder, temporary, out.suffix.lower()), out)
        return (f"{out}: the state dict of the model of {folder}, with the weights in {run.weights}\n"
                "checked by loading it into a new model: every tensor is equal")
    if run.shape is None:
        raise UsageError(f"{folder}: the shape of an input is not known, as its samples are not pairs of a tensor and "
                         "a target; export the model in Python, from loopctl.load_run")
    if not takes_numbers(run):
        raise UsageError(f"--format {kind}: the model cannot be called with one tensor of {run.shape} floating-point "
                         "numbers; export it in Python, from loopctl.load_run, or use --format torch")
    batches = [torch.randn(size, *run.shape, generator=torch.Generator().manual_seed(size)) for size in BATCH_SIZES]
    with torch.no_grad(), warnings.catch_warnings(action="ignore"), atomic_write(out) as temporary:
        if kind == "torch":
            write_weights(run.model, temporary, out.suffix.lower())
            read: Model = read_weights(folder, temporary, out.suffix.lower())
        else:
            read = (write_exported if kind == "exported" else write_onnx)(run.model, batches[0], temporary)
        difference = compare(run.model, read, batches, out)
    sizes = ", ".join(map(str, BATCH_SIZES))
    return (f"{out}: the model of {folder}, with the weights in {run.weights}\n"
            f"checked with batches of {sizes}: its outputs differ by at most {difference:.1e} from those of the model")


def onnx_is_there() -> bool:
    """Whether the packages are installed that write an ONNX file and read it again."""
    return all(map(find_spec, ("onnx", "onnxscript", "onnxruntime")))


def compare(model: nn.Module, read: Model, batches: list[Tensor], out: Path) -> float:
    """Return the largest difference between the outputs of `model` and those of what was `read` from its file.

    Raises UsageError, which says that `out` was not kept, where they differ by more than rounding.
    """
    def call(called: Model, batch: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):         # a model may draw random numbers: the same for both
            return called(batch)

    largest = 0.0
    for batch in batches:
        expected = call(model, batch)
        try:
            found = call(read, batch)
        except Exception as error:          # a file for another batch size may raise anything
            raise UsageError(f"{out} was not kept: it cannot take a batch of {len(batch)} ({type(error).__name__}: "
                             f"{one_line(error)}); use --format torch") from error
        if found.shape != expected.shape:
            raise UsageError(f"{out} was not kept: for a batch of {len(batch)} its outputs have the shape "
                             f"{tuple(found.shape)}, and the model's {tuple(expected.shape)}; use --format torch")
        difference = (found.double() - expected.double()).abs().max().item()
        if not difference <= ROUNDING * expected.double().abs().max().item():       # also for NaN
            raise UsageError(f"{out} was not kept: its outputs differ by {difference:.1e} from those of the model, "
                             "which is more than rounding; a model that draws random numbers in eval mode, or whose "
                             "weights are not finite, cannot be compared")
        largest = max(largest, difference)
    return largest


def takes_numbers(run: SavedRun) -> bool:
    """Whether the model can be called with one tensor of random numbers, so that outputs can be compared."""
    if run.shape is None:
        return False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return isinstance(run.model(torch.randn(2, *run.shape)), Tensor)
    except Exception:           # a model may raise anything for inputs of another kind, such as tokens
        return False


def compare_weights(model: nn.Module, read: nn.Module, out: Path) -> None:
    """Raise UsageError, which says that `out` was not kept, where a tensor of the model was not read as it was."""
    found = read.state_dict()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and not torch.equal(torch.nan_to_num(tensor), torch.nan_to_num(found[name])):
            raise UsageError(f"{out} was not kept: {name} was read with other values")


def write_weights(model: nn.Module, file: Path, suffix: str) -> None:
    if suffix == ".safetensors":
        save_weights(model, file)
    else:
        torch.save(model.state_dict(), file)


def read_weights(folder: Path, file: Path, suffix: str) -> nn.Module:
    """A new model of the run in `folder` with the weights in `file`."""
    config, described = read_run(folder)
    model = build_model(folder, config["model"], described).eval()
    if suffix == ".safetensors":
        load_weights(model, file)
    else:
        model.load_state_dict(torch.load(file, weights_only=True))
    return model


@contextmanager
def export_errors(kind: str) -> Iterator[None]:
    """Raise UsageError where the block cannot export a model, with the first line of torch's explanation only."""
    before = logging.root.manager.disable
    logging.disable()                           # torch explains an error in a hundred lines
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    except Exception as error:                  # of many types
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise UsageError(f"--format {kind}: torch cannot export this model for batches of any size "
                         f"({one_line(reason)}); its code must not depend on the number of inputs, or on their values; "
                         "or use --format torch") from error
    finally:
        logging.disable(before)


def dynamic_batch() -> Any:
    """The dimensions of the model's one input that may have another size than in the example."""
    return ({0: torch.export.Dim("batch")},)


def write_exported(model: nn.Module, example: Tensor, file: Path) -> Model:
    """Write the program that torch.export makes of the model, for batches of any size; return what is read again."""
    with export_errors("exported"):
        program = torch.export.export(model, (example,), dynamic_shapes=dynamic_batch())
    with file.open("wb") as stream:
        torch.export.save(program, stream)
    with file.open("rb") as stream:
        return torch.export.load(stream).module()


def write_onnx(model: nn.Module, example: Tensor, file: Path) -> Model:
    """Write the model as ONNX, for batches of any size; return what onnxruntime reads again."""
    import onnxruntime

    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > ONNX_LIMIT:
        raise UsageError(f"--format onnx: the weights take {size / 1e9:,.1f} GB, and an ONNX file holds 2 GB; use "
                         "--format exported")
    with export_errors("onnx"):
        program: Any = torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=dynamic_batch(), verbose=False,
                                         input_names=["input"], output_names=["output"])
        program.save(str(file), external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3              # errors only
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda batch: torch.from_numpy(session.run(["output"], {"input": batch.numpy()})[0])
