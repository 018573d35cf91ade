"""Model summary: a table of the layers with output shapes, parameters, multiply-adds and sizes, from a forward pass."""
from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from loopctl.data.batch import iter_tensors
from loopctl.errors import one_line
from loopctl.model.macs import NO_MACS, macs_formula
from loopctl.model.own_names import own_modules

if TYPE_CHECKING:
    from rich.table import Table

    from loopctl.run import Run

# Modules that only hold layers.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Layer:
    """One module and what was recorded of it. Shared modules and tensors count only once, so that sums are correct."""

    name: str               # its path in the model; "" is the model itself
    depth: int              # 0 is the model itself
    type: str
    again: bool = False     # the module also has an earlier name, and counts there
    shared: str = ""        # the earlier names of the module, or of parameters and buffers in it
    parameters: int = 0     # its own, without those of submodules
    trainable: int = 0      # how many of these
    thawed: bool = False    # some of these were frozen when it was recorded, and were trained later
    size: int = 0           # bytes of its own parameters and buffers
    calls: int = 0          # how often its forward ran
    shape: str = "-"        # of the first output
    inputs: int = 0         # bytes of its inputs
    activations: int = 0    # bytes of its outputs, if no submodule ran
    multiply_adds: int = 0  # its own, over all calls
    more: bool = False      # `multiply_adds` lacks computations for which there is no formula


class Call(NamedTuple):
    """One call of a module: the shape of its first output, bytes of inputs and outputs, and multiply-adds."""

    shape: str
    inputs: int
    outputs: int
    multiply_adds: int


@contextmanager
def record_forward(model: nn.Module, when: Callable[[], bool] = lambda: True) -> Iterator[list[Layer]]:
    """Record the forward passes of `model` inside the block; the list that it yields is filled at the end of the block.

    when: called after each call of a module; a call for which it returns False is not recorded
    """
    calls: dict[nn.Module, list[Call]] = defaultdict(list)
    # A ScriptModule accepts no hooks.
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    formulas = {module: macs_formula(module) for module in modules}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if when():
            formula = formulas[module]
            calls[module].append(Call(shape(output), size([args, kwargs]), size(output),
                                      formula(module, args, kwargs, output) if formula else 0))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in modules]
    recorded: list[Layer] = []
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
    recorded += layers(model, calls)


class FirstStepLayers:
    """Records the layers of a model during the first micro-batch that a run trains on.

    A context manager around training, so that it leaves no hooks on the model, also after an exception.

    layers: what was recorded; empty before the first step has finished
    """

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.started = self.recording = False
        self.stack = ExitStack()

    def __enter__(self) -> FirstStepLayers:
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()

    def start(self, run: Run) -> None:
        """Start recording if this is the first step. Call it in `before_step`: no plugin copies the model later."""
        if not self.started:
            self.started = self.recording = True
            before = run.outputs            # each micro-batch sets run.outputs, so the first one ends when they change
            self.layers = self.stack.enter_context(record_forward(run.model, lambda: run.outputs is before))

    def finish(self) -> bool:
        """Stop recording; return whether this step was recorded. Call it in `after_step`."""
        self.stack.close()
        finished, self.recording = self.recording, False
        return finished


def after_thawing(recorded: list[Layer], model: nn.Module) -> list[Layer]:
    """The recorded layers, with what of them `model` trains by now; a plugin may have unfrozen parts since."""
    now = {layer.name: layer.trainable for layer in layers(model, {})}
    return [replace(layer, trainable=trained, thawed=True) if (trained := now.get(layer.name, 0)) > layer.trainable
            else layer for layer in recorded]


def layers(model: nn.Module, calls: dict[nn.Module, list[Call]]) -> Iterator[Layer]:
    """Yield a `Layer` for each module of `model`, parents before their submodules, with the numbers from `calls`."""
    first: dict[Any, str] = {}                      # the name under which each module, parameter or buffer occurs first
    again: tuple[str, ...] = ()
    for name, module in own_modules(model, remove_duplicate=False):
        if name.startswith(again):
            continue                                # inside a module that is listed under another name
        recorded, depth = calls.get(module, []), name.count(".") + bool(name)
        layer = Layer(name, depth, type(module).__name__, calls=len(recorded),
                      shape=recorded[0].shape if recorded else "-")
        if module in first:
            again += (f"{name}.",)
            yield replace(layer, again=True, shared=first[module])
            continue
        first[module] = name
        tensors = [tensor for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
                   if not nn.parameter.is_lazy(tensor)]         # a lazy one has no size before the first forward pass
        unshared = [tensor for tensor in tensors if first.setdefault(tensor, name) == name]
        layer.shared = ", ".join(dict.fromkeys(first[tensor] or "model" for tensor in tensors if first[tensor] != name))
        for tensor in unshared:
            layer.size += size(tensor)
            if isinstance(tensor, nn.Parameter):
                layer.parameters += tensor.numel()
                layer.trainable += tensor.numel() * tensor.requires_grad
        layer.inputs = sum(call.inputs for call in recorded)
        layer.multiply_adds = sum(call.multiply_adds for call in recorded)
        innermost = not any(part in calls for part in module.modules() if part is not module)
        if innermost:
            layer.activations = sum(call.outputs for call in recorded)
        if not macs_formula(module) and not isinstance(module, NO_MACS):
            scripted = isinstance(module, torch.jit.ScriptModule) and bool(tensors)
            layer.more = scripted or (bool(recorded) and innermost and any(True for _ in module.parameters()))
        yield layer


def size(value: Any) -> int:
    """Return the bytes of all tensors in `value`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in iter_tensors(value))


def shape(value: Any) -> str:
    """Return the shape of the first tensor in `value` as text, and the number of further tensors."""
    shapes = ["nested" if tensor.is_nested else str([*tensor.shape]) for tensor in iter_tensors(value)]
    return f"{shapes[0]} and {len(shapes) - 1} more" if len(shapes) > 1 else "".join(shapes) or "no tensor"


def table(layers: list[Layer], depth: int | None = None) -> Table:
    """Return the summary as a table: a row per layer down to `depth`, which includes deeper layers, and the totals."""
    from rich.box import SIMPLE
    from rich.table import Table
    from rich.text import Text

    shown: list[Layer] = []
    for layer in layers:
        if depth is None or layer.depth <= depth:
            shown.append(layer)
        else:
            parent = shown[-1]
            shown[-1] = replace(parent, parameters=parent.parameters + layer.parameters,
                                trainable=parent.trainable + layer.trainable, more=parent.more or layer.more,
                                multiply_adds=parent.multiply_adds + layer.multiply_adds)
    report = Table("Layer", "Type", "Output shape", "Parameters", "Share", "Mult-adds", "State", box=SIMPLE,
                   pad_edge=False, collapse_padding=True)
    for column in report.columns:
        column.overflow = "fold"                    # wrap in a narrow terminal instead of truncating
    for column in report.columns[3:6]:
        column.justify, column.no_wrap = "right", column.header != "Mult-adds"          # a header wider than its cells
    report.columns[5].min_width = len("45.6 M")
    total, trainable = sum(layer.parameters for layer in layers), sum(layer.trainable for layer in layers)
    for layer in shown:
        label = "  " * layer.depth + one_line(layer.name.rpartition(".")[2] or "model")
        report.add_row(Text(label), Text(one_line(layer.type)), "" if layer.again else layer.shape,
                       f"{layer.parameters:,}" if layer.parameters else "",
                       f"{layer.parameters / total:.1%}" if layer.parameters else "",
                       format_macs([layer]) if layer.multiply_adds else "", Text(one_line(state(layer))),
                       style="dim" if layer.parameters and not layer.trainable else "")
    report.add_section()

    ran = any(layer.calls for layer in layers)
    for label, value in {
        "Parameters": f"{total:,}", "  trainable": f"{trainable:,}", "  frozen": f"{total - trainable:,}",
        "Parameters and buffers": mebibytes(sum(layer.size for layer in layers)),
        "Activations, forward": mebibytes(sum(layer.activations for layer in layers)) if ran else "-",
        "Input": mebibytes(layers[0].inputs) if layers[0].calls else "-",
        "Multiply-adds, forward": format_macs(layers) if ran else "-",
    }.items():
        report.add_row(label, "", "", value)
    return report


def state(layer: Layer) -> str:
    """Return whether the layer is trainable or frozen, shared, or used several times, in words."""
    if layer.again:
        return f"used again: {layer.shared or 'model'}"
    training = "trainable" if layer.trainable == layer.parameters else "partly frozen" if layer.trainable else "frozen"
    notes = [training] * bool(layer.parameters) + ["frozen at first"] * layer.thawed
    notes += [f"shared: {layer.shared}"] * bool(layer.shared)
    return ", ".join(notes + [f"used {layer.calls} times"] * (layer.calls > 1))


def format_macs(layers: list[Layer]) -> str:
    """Return the sum of the layers' multiply-adds in three digits, as "at least" if some have no formula."""
    value, units = float(sum(layer.multiply_adds for layer in layers)), ["", " k", " M", " G", " T", " P"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    digits = f"{value:#.3g}".rstrip(".") if units[0] else f"{value:.0f}"
    return "at least " * any(layer.more for layer in layers) + digits + units[0]


def mebibytes(size: int) -> str:
    """Return bytes as text in MiB, units of 2**20 bytes."""
    return f"{size / 2**20:,.3f} MiB"


def render(report: Table) -> str:
    """Return the table as text: as wide as the terminal, or as wide as it needs where output is not a terminal."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 1000)
    with console.capture() as captured:
        console.print(report)
    return captured.get().rstrip("\n")


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that have submodules and whose class occurs more than once in the model."""
    blocks = {name: module for name, module in own_modules(model)
              if name and type(module) not in CONTAINERS and any(True for _ in module.children())}
    count = Counter(map(type, blocks.values()))
    names = [name for name, module in blocks.items() if count[type(module)] > 1]
    return [blocks[name] for name in names if not any(name.startswith(f"{other}.") for other in names)]
