"""The layers of a model, seen in a forward pass: shapes, parameters, multiply-adds and sizes, as a table."""
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
from loopctl.model.macs import NO_MACS, macs_formula

if TYPE_CHECKING:
    from rich.table import Table

    from loopctl.run import Run

# Which hold layers, and are none.
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass
class Layer:
    """One module, and what was seen of it. What is shared counts where it comes first, so that sums are true."""

    name: str               # its path in the model; "" is the model itself
    depth: int              # 0 is the model itself
    type: str
    again: bool = False     # it is in the model under an earlier name too, and counted there
    shared: str = ""        # the earlier names under which it, or a parameter of it, is in the model
    parameters: int = 0     # those it holds itself, not those of the layers in it
    trainable: int = 0      # how many of these
    size: int = 0           # bytes of parameters and buffers it holds itself
    calls: int = 0          # times it ran
    shape: str = "-"        # of the first output
    inputs: int = 0         # bytes it was given
    activations: int = 0    # bytes it returned, if no layer in it ran
    multiply_adds: int = 0  # those it computes itself, in all its calls
    more: bool = False      # it computes with parameters, and there is no formula for that


class Call(NamedTuple):
    shape: str
    inputs: int
    outputs: int
    multiply_adds: int


@contextmanager
def record_forward(model: nn.Module, when: Callable[[], bool] = lambda: True) -> Iterator[list[Layer]]:
    """Look on at the forward passes of `model` made inside the block; the list that it gives is filled at its end.

    when: tells whether a module's call that has just returned counts.
    """
    calls: dict[nn.Module, list[Call]] = defaultdict(list)
    watched = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]  # refuses hooks
    formulas = {module: macs_formula(module) for module in watched}

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if when():
            count = formulas[module]
            calls[module].append(Call(shape(output), size([args, kwargs]), size(output),
                                      count(module, args, kwargs, output) if count else 0))

    handles = [module.register_forward_hook(hook, with_kwargs=True) for module in watched]
    found: list[Layer] = []
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found += layers(model, calls)


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
        """Begin to record, in the first step. Call it in `before_step`, when no plugin copies the model any more."""
        if not self.started:
            self.started = self.recording = True
            before = run.outputs            # every micro-batch sets its own, so the first one ends when they change
            self.layers = self.stack.enter_context(record_forward(run.model, lambda: run.outputs is before))

    def finish(self) -> bool:
        """End the recording; tell whether this was the step that was recorded. Call it in `after_step`."""
        self.stack.close()
        finished, self.recording = self.recording, False
        return finished


def layers(model: nn.Module, calls: dict[nn.Module, list[Call]]) -> Iterator[Layer]:
    """The modules of `model`, each before the modules in it, with what `calls` tells about them."""
    first: dict[Any, str] = {}                      # where each module, parameter and buffer was met first
    again: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(again):
            continue                                # inside a module that was listed before, so listed with it
        seen, depth = calls.get(module, []), name.count(".") + bool(name)
        layer = Layer(name, depth, type(module).__name__, calls=len(seen), shape=seen[0].shape if seen else "-")
        if module in first:
            again += (f"{name}.",)
            yield replace(layer, again=True, shared=first[module])
            continue
        first[module] = name
        held = [tensor for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
                if not nn.parameter.is_lazy(tensor)]                     # which has no size until it runs
        own = [tensor for tensor in held if first.setdefault(tensor, name) == name]
        layer.shared = ", ".join(dict.fromkeys(first[tensor] or "model" for tensor in held if first[tensor] != name))
        for tensor in own:
            layer.size += size(tensor)
            if isinstance(tensor, nn.Parameter):
                layer.parameters += tensor.numel()
                layer.trainable += tensor.numel() * tensor.requires_grad
        layer.inputs = sum(call.inputs for call in seen)
        layer.multiply_adds = sum(call.multiply_adds for call in seen)
        innermost = not any(part in calls for part in module.modules() if part is not module)
        if innermost:
            layer.activations = sum(call.outputs for call in seen)
        if not macs_formula(module) and not isinstance(module, NO_MACS):
            unseen = isinstance(module, torch.jit.ScriptModule) and bool(held)
            layer.more = unseen or (bool(seen) and innermost and any(True for _ in module.parameters()))
        yield layer


def size(value: Any) -> int:
    """The bytes of all tensors in `value`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in iter_tensors(value))


def shape(value: Any) -> str:
    """The shape of the first tensor in `value`, and how many more there are."""
    shapes = ["nested" if tensor.is_nested else str([*tensor.shape]) for tensor in iter_tensors(value)]
    return f"{shapes[0]} and {len(shapes) - 1} more" if len(shapes) > 1 else "".join(shapes) or "no tensor"


def table(layers: list[Layer], depth: int | None = None) -> Table:
    """The report: a row per layer down to `depth`, with the sums of what is deeper, and the totals."""
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
        column.overflow = "fold"                    # where the terminal is narrow, cut nothing off
    for column in report.columns[3:6]:
        column.justify, column.no_wrap = "right", column.header != "Mult-adds"          # which is wider than its cells
    report.columns[5].min_width = len("45.6 M")
    total, trainable = sum(layer.parameters for layer in layers), sum(layer.trainable for layer in layers)
    for layer in shown:
        label = "  " * layer.depth + (layer.name.rpartition(".")[2] or "model")
        report.add_row(Text(label), layer.type, "" if layer.again else layer.shape,
                       f"{layer.parameters:,}" if layer.parameters else "",
                       f"{layer.parameters / total:.1%}" if layer.parameters else "",
                       format_macs([layer]) if layer.multiply_adds else "", Text(state(layer)),
                       style="dim" if layer.parameters and not layer.trainable else "")
    report.add_section()

    ran = any(layer.calls for layer in layers)
    for label, value in {
        "Parameters": f"{total:,}", "  trainable": f"{trainable:,}", "  frozen": f"{total - trainable:,}",
        "Parameters and buffers": megabytes(sum(layer.size for layer in layers)),
        "Activations, forward": megabytes(sum(layer.activations for layer in layers)) if ran else "-",
        "Input": megabytes(layers[0].inputs) if layers[0].calls else "-",
        "Multiply-adds, forward": format_macs(layers) if ran else "-",
    }.items():
        report.add_row(label, "", "", value)
    return report


def state(layer: Layer) -> str:
    """Whether the layer learns, and how else it is used, in words."""
    if layer.again:
        return f"used again: {layer.shared or 'model'}"
    learns = "trainable" if layer.trainable == layer.parameters else "partly frozen" if layer.trainable else "frozen"
    notes = [learns] * bool(layer.parameters) + [f"shared: {layer.shared}"] * bool(layer.shared)
    return ", ".join(notes + [f"used {layer.calls} times"] * (layer.calls > 1))


def format_macs(layers: list[Layer]) -> str:
    """Their sum in three digits, and whether there are more."""
    value, units = float(sum(layer.multiply_adds for layer in layers)), ["", " k", " M", " G", " T", " P"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    digits = f"{value:#.3g}".rstrip(".") if units[0] else f"{value:.0f}"
    return "at least " * any(layer.more for layer in layers) + digits + units[0]


def megabytes(size: int) -> str:
    return f"{size / 2**20:,.3f} MB"


def render(report: Table) -> str:
    """The report as text, on a terminal as wide as that is, elsewhere as wide as the report is."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 1000)
    with console.capture() as captured:
        console.print(report)
    return captured.get().rstrip("\n")


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with parts of their own whose class the model has more than once."""
    blocks = {name: module for name, module in model.named_modules()
              if name and type(module) not in CONTAINERS and any(True for _ in module.children())}
    count = Counter(map(type, blocks.values()))
    names = [name for name, module in blocks.items() if count[type(module)] > 1]
    return [blocks[name] for name in names if not any(name.startswith(f"{other}.") for other in names)]
