"""Weights in bfloat16: updates in float32, rounded stochastically, or applied to float32 master weights."""
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from loopctl import Run, UsageError, hookimpl
from loopctl.distributed.process_group import broadcast_from_rank0
from loopctl.model.ownership import named_parameters
from loopctl.optim.optimizer_mode import with_modes
from loopctl.optim.several import each_optimizer
from loopctl.optim.stand_ins import exchange, round_stochastically

REFUSED = {"amp": "computes in half precision too, with weights in float32", "fsdp": "shards the weights; use "
           "fsdp:param_dtype=bfloat16"}


@dataclass(eq=False)
class Bf16:
    """Hold weights, gradients and activations in bfloat16, which halves their memory.

    An update is computed in float32, with the optimizer's state in float32, since most updates are less than bfloat16
    can add to a weight. It is rounded stochastically, up or down with the probability of its distance, so that it is
    right on average: Revisiting BFloat16 Training, arXiv:2010.06192. Or it is added to master weights: Mixed Precision
    Training, arXiv:1710.03740. BatchNorm stays in float32. Inputs are converted to bfloat16, and outputs to float32 for
    the loss. Gradients of micro-batches are added in bfloat16. After the run the model has its own dtype again.

    master_weights: keep a copy of the weights in float32, which gets the updates; checkpoints have it too
    """

    master_weights: bool = False
    topic = "precision and speed"

    @hookimpl(wrapper=True)
    def setup(self, run: Run) -> Generator[None, None, None]:       # a wrapper: runs after plugins that add layers
        yield
        for name in run.hook.plugins:
            if reason := REFUSED.get(name.partition(".")[0]):
                raise UsageError(f"{name} {reason}; leave out one of the two")
        self.masters: dict[nn.Parameter, Tensor] = {}
        self.exchanged: dict[Tensor, Tensor] = {}       # while the optimizer steps: its float32 tensors, by the weights
        self.depth = 0                                  # of the step, which may call that of a base class
        self.before: list[tuple[Tensor, Tensor | None, torch.dtype]] = []       # what was converted, and how to go back
        for module in run.model.modules():
            if isinstance(module, _BatchNorm):
                continue
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point() and tensor.dtype != torch.bfloat16:
                    if self.master_weights and isinstance(tensor, nn.Parameter):
                        self.masters[tensor] = tensor.detach().float()
                    given = None if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
                    self.before.append((tensor, given, tensor.dtype))
                    tensor.grad = None
                    tensor.data = tensor.data.to(torch.bfloat16)    # in place: optimizers refer to the parameter

    # A hook that a CUDA graph cannot capture, as the random numbers of the rounding would be the same in each replay.
    @hookimpl
    def wrap_model(self, run: Run) -> None:
        for one in each_optimizer(run.optimizer):
            if isinstance(one, torch.optim.LBFGS):
                raise UsageError("LBFGS computes gradients several times per step; use another optimizer")
            if with_modes(one):
                raise UsageError(f"{type(one).__name__} changes weights outside of its steps; use another one")

    @hookimpl(wrapper=True)
    def train(self, run: Run) -> Generator[None, None, None]:
        device = "cpu" if run.device.type == "meta" else run.device             # which has no generator
        self.random = torch.Generator(device).manual_seed(broadcast_from_rank0(run, torch.initial_seed()))
        self.names = named_parameters(run)
        # A hook on the model itself also runs where a compiled or replicated network calls it.
        handles: list[Any] = [run.model.register_forward_pre_hook(convert_inputs, with_kwargs=True),
                              run.model.register_forward_hook(convert_outputs)]
        for one in each_optimizer(run.optimizer):
            handles += [one.register_step_pre_hook(self.widen), one.register_step_post_hook(self.narrow),
                        one.register_load_state_dict_pre_hook(self.widen_state),
                        one.register_load_state_dict_post_hook(self.restore)]
        try:
            return (yield)
        finally:
            for handle in handles:
                handle.remove()
            for one in each_optimizer(run.optimizer):       # where a step was ended by an exception
                self.restore(one)
            for tensor, given, dtype in self.before:
                tensor.grad = None
                unchanged = given is not None and torch.equal(given.to(tensor.dtype), tensor)
                tensor.data = given if unchanged and given is not None else tensor.data.to(dtype)

    def widen(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        """Before a step: have the optimizer hold float32 tensors, with gradients, in place of the weights."""
        self.depth += 1
        weights = [weight for group in optimizer.param_groups for weight in group["params"]
                   if weight.dtype == torch.bfloat16 and weight.grad is not None and self.depth == 1]
        for weight in weights:
            wide = self.masters.get(weight)
            self.exchanged[weight] = wide = weight.detach().float() if wide is None else wide
            wide.grad = weight.grad.float()
        exchange(optimizer, self.exchanged)

    @torch.no_grad()
    def narrow(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        """After a step: round what it has computed into the weights, which the optimizer holds again."""
        self.depth -= 1
        if self.depth:
            return
        for weight, wide in self.exchanged.items():
            weight.copy_(wide if weight in self.masters else round_stochastically(wide, self.random))
            wide.grad = None
        self.restore(optimizer)

    def widen_state(self, optimizer: torch.optim.Optimizer, state: Any) -> None:
        """Before a state is loaded: torch converts it to the dtype of the parameters."""
        self.exchanged = {weight: torch.empty_like(weight, dtype=torch.float32) for group in optimizer.param_groups
                          for weight in group["params"] if weight.dtype == torch.bfloat16}
        exchange(optimizer, self.exchanged)

    def restore(self, optimizer: torch.optim.Optimizer) -> None:
        exchange(optimizer, {wide: weight for weight, wide in self.exchanged.items()})
        self.exchanged, self.depth = {}, 0

    @hookimpl
    def after_backward(self) -> None:
        if self.exchanged:
            raise UsageError("the optimizer computes gradients again within its step; use another optimizer")

    def state_dict(self) -> dict[str, Any]:
        masters = {name: self.masters[weight] for name, weight in self.names.items() if weight in self.masters}
        return {"random": self.random.get_state(), "masters": masters}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.random.set_state(state["random"].cpu())
        for name, master in state["masters"].items():
            self.masters[self.names[name]].copy_(master)


def convert_inputs(model: nn.Module, args: Any, kwargs: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: to_float(tensor, torch.bfloat16), (args, kwargs))


def convert_outputs(model: nn.Module, args: Any, output: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: to_float(tensor, torch.float32), output)


def to_float(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a tensor of floating-point numbers; any other tensor stays unchanged."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
