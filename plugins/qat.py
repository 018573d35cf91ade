"""Quantization-aware training: linear layers compute with weights rounded as they will be after quantization."""
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from loopctl import Run, UsageError, hookimpl
from loopctl.model.linear_layers import complete, linear_layers, put_back
from loopctl.report.terminal import one_line

# Plugins that it cannot work with, and why.
REFUSED = {"fsdp": "shards the weights, which are rounded whole; use ddp",
           "float8": "computes the same layers in float8; leave out one of the two"}


@dataclass(eq=False)
class Qat:
    """Train with linear layers whose weights are rounded, as they will be after quantization.

    Quantization-aware training, arXiv:1712.05877, by torchao.quantization.qat.QATConfig, which has to be installed. In
    training and in evaluations, forward passes round weights, and where base_config says so inputs, to integers and
    back; gradients pass unchanged, to weights that are floats. Checkpoints, averages and the final weights have those
    floats under their usual names, and after the run the model has its own layers, which do not round. So the weights
    are loaded as any others, with model = loopctl.load_run("runs/a").model, and to deploy them is one line more, of the
    same layers: torchao.quantization.quantize_(model, IntxWeightOnlyConfig(torch.int4, PerGroup(32))). That model
    computes what the run's evaluations did; the floats, which are not rounded, have other metrics.

    base_config: what the model will be quantized with, a class of torchao.quantization: integer weights with inputs
        in int8, integer weights alone, or int4 weights for its kernels in bfloat16
    weight_dtype: integer type of the weights
    group_size: how many weights of a row share a scale; 0 is the whole row
    modules: which layers of the class torch.nn.Linear: globs, names of modules or regular expressions, as in freeze;
        all of them if left out
    """

    base_config: Literal["Int8DynamicActivationIntxWeightConfig", "IntxWeightOnlyConfig",
                         "Int4WeightOnlyConfig"] = "Int8DynamicActivationIntxWeightConfig"
    weight_dtype: Literal["int2", "int3", "int4", "int5", "int6", "int7", "int8"] = "int4"
    group_size: int = 32
    modules: list[str] = field(default_factory=list)
    topic = "precision and speed"

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):
            raise ValueError(f"modules takes a list, such as ['layers.*'], not {self.modules!r}")
        if self.group_size < 0:
            raise ValueError(f"group_size is at least 1, or 0 for a whole row, not {self.group_size}")
        if self.base_config == "Int4WeightOnlyConfig" and (self.weight_dtype != "int4" or not self.group_size):
            raise ValueError("Int4WeightOnlyConfig has weights of int4 in groups; use IntxWeightOnlyConfig for others")

    @hookimpl
    def setup(self, run: Run) -> None:
        for name in run.hook.plugins:
            if reason := REFUSED.get(name.partition(".")[0]):
                raise UsageError(f"{name} {reason}")
        layers = linear_layers(run.model, self.modules)
        for name, layer in layers.items():
            if self.group_size and layer.in_features % self.group_size:
                raise UsageError(f"{name} has {layer.in_features} inputs, which is not a multiple of "
                                 f"group_size={self.group_size}; use another, 0 for whole rows, or choose with modules")
        self.prepare(run.model, layers)
        self.layers = layers

    def prepare(self, model: nn.Module, layers: dict[str, nn.Linear]) -> None:
        """Put torchao's layers, which round, in the places of `layers`. Raises UsageError if it is not installed."""
        try:
            from torchao.quantization import quantize_
            from torchao.quantization.qat import QATConfig
        except ImportError as error:
            raise UsageError(f"it needs torchao ({one_line(error)}); pip install torchao") from error
        chosen = {*layers.values()}
        devices = {layer.weight.device for layer in chosen if layer.weight.device.type == "cuda"}
        with torch.random.fork_rng([*devices]):         # it draws weights that it does not use
            quantize_(model, QATConfig(self.make_config(), step="prepare"), lambda module, name: module in chosen)
        complete(model, layers)

    def make_config(self) -> Any:
        """The base config that the options describe."""
        from torchao import quantization

        cls, dtype = getattr(quantization, self.base_config), getattr(torch, self.weight_dtype)
        granularity = quantization.PerGroup(self.group_size) if self.group_size else quantization.PerAxis(0)
        if self.base_config == "Int4WeightOnlyConfig":
            return cls(group_size=self.group_size)
        if self.base_config == "IntxWeightOnlyConfig":
            return cls(weight_dtype=dtype, granularity=granularity)
        return cls(weight_dtype=dtype, weight_granularity=granularity)

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        try:
            return (yield)
        finally:                        # also after an exception: the model is the user's own
            put_back(run.model, self.layers)
