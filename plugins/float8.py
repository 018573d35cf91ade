"""Float8 training: compute the matrix products of linear layers in 8-bit floating point."""
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import nn

from loopctl import Run, UsageError, hookimpl
from loopctl.model.layers import last_layer
from loopctl.model.linear_layers import complete, linear_layers, put_back
from loopctl.report.terminal import one_line

CAPABILITY = (8, 9)     # the first CUDA compute capability with float8: RTX 40, L4, H100
# Plugins that it cannot work with, and why.
REFUSED = {"fsdp": "shards the weights, whose scales are those of the whole; use ddp"}


@dataclass(eq=False)
class Float8:
    """Compute the matrix products of linear layers in float8, forward and backward, with scales.

    FP8 formats, arXiv:2209.05433, by torchao.float8.convert_to_float8_training, which has to be installed. Weights,
    their gradients and the optimizer stay as they are, under their names; inputs, weights and gradients of outputs are
    cast when they are multiplied, with scales of their largest values at that moment, so there is no state to save. It
    is for layers of some thousand inputs and outputs, with compile, and amp or bf16. A batch whose rows are no multiple
    of 16 is padded. After the run the model has its own layers. Needs a GPU of compute capability 8.9 or newer.

    recipe: what has a scale: each tensor, each row, or each row with the gradients of weights in high precision
    modules: which linear layers: globs, names of modules or regular expressions, as in freeze; if left out, all but
        the last one, whose numbers of inputs and outputs are multiples of 16
    emulate: multiply in float32 what was cast to float8, on any device; slow, to try what the casts do to training
    """

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    modules: list[str] = field(default_factory=list)
    emulate: bool = False
    topic = "precision and speed"

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):
            raise ValueError(f"modules takes a list, such as ['layers.*'], not {self.modules!r}")

    @hookimpl
    def setup(self, run: Run) -> None:
        for name in run.hook.plugins:
            if reason := REFUSED.get(name.partition(".")[0]):
                raise UsageError(f"{name} {reason}")
        if not self.emulate:
            if run.device.type != "cuda":
                raise UsageError(f"it needs a GPU, and this run is on {run.device}; leave it out, or use "
                                 "emulate=true to try it")
            if (found := torch.cuda.get_device_capability(run.device)) < CAPABILITY:
                raise UsageError(f"this GPU has no float8: its compute capability is {found[0]}.{found[1]}, below 8.9; "
                                 "use amp:dtype=bfloat16")
        layers = self.choose(run.model)
        self.convert(run.model, layers)
        self.layers = layers

    def choose(self, model: nn.Module) -> dict[str, nn.Linear]:
        """The layers to convert, by name. Raises UsageError where there are none, or the GPU cannot multiply one."""
        layers = linear_layers(model, self.modules)
        odd = [name for name, layer in layers.items() if layer.in_features % 16 or layer.out_features % 16]
        if self.modules:
            if odd and not self.emulate:
                layer = layers[odd[0]]
                raise UsageError(f"{odd[0]} has {layer.in_features} inputs and {layer.out_features} outputs, which "
                                 "have to be multiples of 16; leave it out of modules")
            return layers
        last = last_layer(model)
        if chosen := {name: layer for name, layer in layers.items()
                      if name not in odd and not (last and layer is last[1])}:
            return chosen
        raise UsageError("no linear layer but the last one has inputs and outputs in multiples of 16, which a GPU can "
                         "multiply in float8; leave out float8")

    def convert(self, model: nn.Module, layers: dict[str, nn.Linear]) -> None:
        """Put torchao's layers in the places of `layers`. Raises UsageError if it is not installed."""
        try:
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        except ImportError as error:
            raise UsageError(f"it needs torchao ({one_line(error)}); pip install torchao") from error
        config = replace(Float8LinearConfig.from_recipe_name(self.recipe), emulate=self.emulate, pad_inner_dim=True)
        chosen = {*layers.values()}
        convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: module in chosen)
        complete(model, layers)

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        try:
            return (yield)
        finally:                        # also after an exception: the model is the user's own
            put_back(run.model, self.layers)
