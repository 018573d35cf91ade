"""Communication hooks of torch for `ddp`: how the gradients of a bucket are averaged over the processes.

Hooks that only change the dtype have no state. That of PowerSGD has: the error that compression has left in each
process, and a factor of the gradient from which the next step begins.
"""
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from loopctl.distributed.process_group import OfThisRank


def fp16(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return default_hooks.fp16_compress_hook(state, bucket)


# DistributedDataParallel refuses torch's function by its name where there is no GPU; gloo can add bfloat16 too.
def bf16(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    return default_hooks.bf16_compress_hook(state, bucket)


def power_sgd(state: "PowerSgd", bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook
    state.follow(bucket.index(), bucket.parameters())
    result = powerSGD_hook(state.own, bucket)
    if bucket.buffer().is_cpu:
        # gloo matches collectives by the order of their calls. The hook makes its next ones in other threads, while
        # the backward pass goes on with those of other buckets; then the order would differ between processes.
        result.wait()
    return result


HOOKS: dict[str, Callable[..., Any]] = {"fp16": fp16, "bf16": bf16, "powersgd": power_sgd}


class PowerSgd:
    """The state of torch's powerSGD_hook, which is that of buckets, kept for parameters.

    DistributedDataParallel puts parameters into other buckets after its first step, so after a resume as well, and
    where a model is wrapped again. Then each parameter takes its part of the state along.

    options: those of torch's PowerSGDState
    """

    def __init__(self, **options: Any) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
        self.own: Any = PowerSGDState(None, **options)
        self.buckets: dict[int, list[Any]] = {}             # the parameters of each bucket in the last step
        self.moving: dict[int, tuple[Tensor | None, Tensor | None]] = {}    # error and factor, by the parameter's id

    def follow(self, index: int, parameters: list[Any]) -> None:
        """Give the bucket `index` the state of `parameters`, which may have been in other buckets."""
        ids = [*map(id, parameters)]
        if [*map(id, self.buckets.get(index, ()))] == ids:
            return
        # Buckets of this step that are under way hold other parameters, so their state is not touched.
        for number, held in [*self.buckets.items()]:
            if number == index or any(id(one) in ids for one in held):
                self.moving |= self.state_of(number)
                del self.buckets[number]
                for memory in (self.own.error_dict, self.own.p_memory_dict, self.own.q_memory_dict):
                    memory.pop(number, None)
        self.buckets[index] = parameters
        found = [self.moving.pop(one, (None, None)) for one in ids]
        if any(error is not None for error, _ in found):
            self.own.error_dict[index] = torch.cat([
                parameter.new_zeros(parameter.numel()) if error is None else error
                for parameter, (error, _) in zip(parameters, found, strict=True)])
        compressed, factors = self.compressed(parameters), dict(zip(ids, (factor for _, factor in found), strict=True))
        known = [factor for one in compressed if (factor := factors[id(one)]) is not None]
        if known and len(known) == len(compressed):         # otherwise the hook begins with random ones
            self.own.q_memory_dict[index] = torch.cat(known)
            self.own.p_memory_dict[index] = known[0].new_empty(sum(len(one) * self.rank(one) for one in compressed))

    def state_of(self, index: int) -> dict[int, tuple[Tensor | None, Tensor | None]]:
        """The error and the factor of each parameter in a bucket, by the parameter's id, flattened."""
        held = self.buckets[index]
        errors, factors = self.own.error_dict.get(index), self.own.q_memory_dict.get(index)
        of_errors = {} if errors is None else dict(zip(
            map(id, held), errors.split([one.numel() for one in held]), strict=True))
        compressed = self.compressed(held)
        of_factors = {} if factors is None else dict(zip(map(id, compressed), factors.split(
            [one.numel() // len(one) * self.rank(one) for one in compressed]), strict=True))
        return {id(one): (of_errors.get(id(one)), of_factors.get(id(one))) for one in held}

    def compressed(self, parameters: list[Any]) -> list[Any]:
        """Those of `parameters` whose gradients are compressed, in the order of the hook: equal shapes together."""
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import _should_compress
        groups: dict[Any, list[Any]] = {}
        for one in parameters:
            shape = len(one), one.numel() // len(one)
            if _should_compress(*shape, self.rank(one), self.own.min_compression_rate)[0]:
                groups.setdefault(shape, []).append(one)
        return [one for group in groups.values() for one in group]

    def rank(self, parameter: Tensor) -> int:
        """The rank of the approximation of a gradient."""
        rows = len(parameter)
        return min(rows, parameter.numel() // rows, self.own.matrix_approximation_rank)

    def forget(self) -> None:
        """Begin anew: the last gradients were not finite, so the errors and factors that they left are not."""
        for memory in (self.own.error_dict, self.own.p_memory_dict, self.own.q_memory_dict, self.moving):
            memory.clear()

    def state_dict(self, names: dict[int, str]) -> dict[str, Any]:
        """The state by the name of each parameter. names: by the parameter's id"""
        found = dict(self.moving)
        for index in self.buckets:
            found |= self.state_of(index)
        kind, keys, *rest = self.own.rng.get_state()
        return {"iter": self.own.iter, "random": (kind, keys.tobytes(), *rest),
                "errors": {names[key]: OfThisRank(error.clone()) for key, (error, _) in found.items()
                           if error is not None},
                "factors": {names[key]: factor.clone() for key, (_, factor) in found.items() if factor is not None}}

    def load_state_dict(self, state: dict[str, Any], parameters: dict[str, nn.Parameter]) -> bool:
        """Load a state; return whether the errors are among it. parameters: by name"""
        kind, keys, *rest = state["random"]
        self.own.rng.set_state((kind, np.frombuffer(keys, np.uint32), *rest))
        self.own.iter = state["iter"]
        self.forget()
        self.buckets.clear()
        errors, factors = state["errors"], state["factors"]
        for name, parameter in parameters.items():
            error, factor = (part.get(name) for part in (errors, factors))
            if error is not None or factor is not None:
                self.moving[id(parameter)] = tuple(     # type: ignore[assignment]
                    None if one is None else one.to(parameter.device) for one in (error, factor))
        return None not in errors.values()
