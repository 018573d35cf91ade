"""What the scripts for Keras share: notes of updates that torch's hooks do not see, and torch's form of momentum."""
from collections.abc import Sequence
from typing import Any

import keras
import torch

from loopctl.tape.recording import Recording


class SGD(keras.optimizers.Optimizer):
    """SGD with the momentum of torch, whose velocity is a sum of gradients, each to be multiplied by the present rate.

    The velocity of keras.optimizers.SGD has each gradient multiplied by the rate of its own time. The two are the same
    only while the rate stays the same.
    """

    def __init__(self, learning_rate: Any, momentum: float, **options: Any) -> None:
        super().__init__(learning_rate=learning_rate, **options)
        self.momentum = momentum

    def build(self, variables: Sequence[Any]) -> None:
        if not self.built:
            super().build(variables)
            self.velocities = self.add_optimizer_variables(variables, "velocity")

    @torch.no_grad()
    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        velocity = self.velocities[self._get_variable_index(variable)].value
        velocity.mul_(self.momentum).add_(gradient)
        variable.value.add_(velocity, alpha=-float(learning_rate))


def note_updates(optimizer: Any, tape: Recording) -> Any:
    """Have each update of the optimizer recorded, with the gradients that it uses, and each step that is skipped."""
    scaled = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    inner = optimizer.inner_optimizer if scaled else optimizer
    update, skip = inner._backend_update_step, getattr(optimizer, "_stateful_handle_non_finite_grads", None)

    def noted(gradients: Sequence[Any], variables: Sequence[Any], learning_rate: Any) -> None:
        for gradient, variable in zip(gradients, variables, strict=True):
            variable.value.grad = gradient      # that of the last batch until here, where several are accumulated
        with tape.update(lr=float(learning_rate)):
            update(gradients, variables, learning_rate)

    def skipped() -> None:
        skip()
        tape.finish(skipped=True)
    inner._backend_update_step = noted
    if scaled:
        optimizer._stateful_handle_non_finite_grads = skipped
    return optimizer
