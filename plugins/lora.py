"""Low-rank adaptation (LoRA): train small matrices beside frozen weights, and add them to the weights at the end."""
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loopctl import Run, UsageError, hookimpl
from loopctl.model.parameter_matching import matching_parameters
from loopctl.report.terminal import one_line

# Plugins that it cannot work with, and why.
REFUSED = {"float8": "replaces the layers that the matrices are beside; leave out one of the two",
           "fsdp": "shards the weights that the matrices are added to; use ddp",
           "prune": "sets weights to 0 that the matrices are added to; leave out one of the two",
           "qat": "rounds the weights, and would round the matrices apart; leave out one of the two"}


@dataclass(eq=False)
class Lora:
    """Train small matrices beside frozen weights, and add their product to them at the end.

    Low-rank adaptation, arXiv:2106.09685, by peft's inject_adapter_in_model, which has to be installed. All parameters
    of the model are frozen but the matrices and what modules_to_save names. When the run ends, the model has its own
    modules and names again, with the products added, so its weights are those of the plain model, as the best weights
    of checkpoint are. A checkpoint has the matrices apart, as x.lora_A and x.lora_B beside x.base_layer; it is for
    resuming. BatchNorm statistics and dropout of the model are as in other training, as with peft.

    target_modules: names of linear, convolutional or embedding modules, whole or their ends after a dot, such as
        q_proj,v_proj
    r: rank of the matrices
    lora_alpha: the product is multiplied by lora_alpha / r
    lora_dropout: probability of dropout before the matrices
    modules_to_save: what is trained in full, such as a new head: globs, names of modules or regular expressions, as in
        freeze
    """

    target_modules: list[str]
    r: int = 8
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    modules_to_save: list[str] = field(default_factory=list)
    topic = "weights"

    def __post_init__(self) -> None:
        for name in ("target_modules", "modules_to_save"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} takes a list, such as ['fc'], not {getattr(self, name)!r}")
        if not self.target_modules:
            raise ValueError("target_modules names no module; name those that get matrices")
        if self.r < 1:
            raise ValueError(f"r is at least 1, not {self.r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout is from 0 to below 1, not {self.lora_dropout}")

    # A wrapper, so that plugins that choose parameters in this hook find the matrices.
    @hookimpl(wrapper=True)
    def setup(self, run: Run) -> Generator[None, None, None]:
        for name in run.hook.plugins:
            if reason := REFUSED.get(name.partition(".")[0]):
                raise UsageError(f"{name} {reason}")
        if isinstance(run.optimizer, torch.optim.Optimizer):
            raise UsageError("the optimizer was made before the matrices; pass a factory, such as "
                             "partial(torch.optim.AdamW, lr=1e-3)")
        self.inject(run.model)
        return (yield)

    def inject(self, model: nn.Module) -> None:
        """Replace the target modules by peft's, which have them inside. Raises UsageError where that is impossible."""
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise UsageError(f"it needs peft ({one_line(error)}); pip install peft") from error
        if any(isinstance(module, LoraLayer) for module in model.modules()):
            raise UsageError("the model has such matrices already; merge them first, or leave out lora")
        full = {parameter for found in matching_parameters(model, self.modules_to_save).values() for parameter in found}
        self.trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        config = LoraConfig(r=self.r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout,
                            target_modules=self.target_modules)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:             # a target that does not exist, or is no layer that peft knows
            raise UsageError(f"target_modules: {one_line(error)}") from error
        for parameter, required in self.trainable:
            parameter.requires_grad_(required and parameter in full)
        self.layers: dict[str, Any] = {name: module for name, module in model.named_modules()
                                       if isinstance(module, LoraLayer)}
        self.model = model
        self.check()
        model.exported_state_dict = self.merged_state       # type: ignore[assignment]   # see `Weights`

    def check(self) -> None:
        """Raise UsageError for a layer whose weight is not one of its own; the model is then as it was."""
        weights = [parameter for _, parameter in self.model.named_parameters(remove_duplicate=False)]
        for name, layer in self.layers.items():
            weight, kind = getattr(layer.get_base_layer(), "weight", None), type(layer.get_base_layer()).__name__
            if uses := sum(parameter is weight for parameter in weights) - 1:
                self.put_back()
                raise UsageError(f"target_modules: {name}, a {kind}, " + (
                    "has no weight that the matrices could be added to" if uses < 0 else
                    "shares its weight with another module, which would change too") + "; leave it out")

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """The state dict of the plain model, with the products added to its weights."""
        state = self.model.state_dict()
        for name, layer in self.layers.items():
            own = {key: state.pop(key) for key in [*state] if key.startswith(f"{name}.")}
            state |= {key.replace(f"{name}.base_layer.", f"{name}.", 1): value for key, value in own.items()
                      if key.startswith(f"{name}.base_layer.")}
            state[f"{name}.weight"] = state[f"{name}.weight"] + layer.get_delta_weight("default")
        return state

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        try:
            return (yield)
        finally:                        # also after an exception: the model is the user's own
            for layer in self.layers.values():
                layer.merge()
            self.put_back()

    def put_back(self) -> None:
        """Put the model's own modules in the places of peft's, those inside of others first."""
        for name, layer in reversed(self.layers.items()):
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.get_base_layer())
        for parameter, required in self.trainable:
            parameter.requires_grad_(required)
        for name in ("exported_state_dict", "peft_config"):
            vars(self.model).pop(name, None)
        self.layers = {}
