"""Optimizer state that is divided among processes: torch's ZeroRedundancyOptimizer, as `ddp:zero=true` uses it."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer

from loopctl.data.batch import map_nested


class ZeroOptimizer(ZeroRedundancyOptimizer):
    """The optimizer of a factory, with the state of each parameter in one process only, which makes its update.

    `state` is that of the parameters of this process. `state_dict` is that of all, in the form of the factory's own
    optimizer, after `consolidate_state_dict` in all processes.

    factory: makes the optimizer of a list of parameter groups
    """

    _sync_param_groups: Any             # torch's own, which has no types
    _default_device: Any

    def __init__(self, groups: list[dict[str, Any]], factory: Callable[[list[dict[str, Any]]], Optimizer]) -> None:
        super().__init__(groups, factory)               # type: ignore[arg-type]   # any callable, in place of a class
        self.defaults = self.optim.defaults

    @property
    def state(self) -> Any:
        return self.optim.state

    @state.setter
    def state(self, value: Any) -> None:                # which torch sets to an empty one
        pass

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Gather the state in process `to`; all processes take part. torch's own way takes many times as long."""
        self._sync_param_groups(self.param_groups, self.optim.param_groups)
        own = self.optim.state_dict()
        layouts: list[Any] = [None] * self.world_size
        dist.all_gather_object(layouts, map_nested(without_content, own), self.process_group)
        if self.rank != to:
            for group in by_dtype(tensors_in(own)):
                flat = torch.cat([one.to(self._default_device).reshape(-1) for one in group])
                dist.send(flat, group_dst=to, group=self.process_group)
            return
        self._all_state_dicts = []
        for rank, layout in enumerate(layouts):
            held = [one.cpu() if rank == to else torch.empty_like(one, device="cpu")
                    for one in tensors_in(own if rank == to else layout)]
            for group in by_dtype(held) if rank != to else ():
                flat = torch.empty(sum(one.numel() for one in group), dtype=group[0].dtype, device=self._default_device)
                dist.recv(flat, group_src=rank, group=self.process_group)
                for one, part in zip(group, flat.cpu().split([one.numel() for one in group]), strict=True):
                    one.copy_(part.view_as(one))
            given = iter(held)
            self._all_state_dicts.append(map_nested(
                lambda leaf, given=given: next(given) if isinstance(leaf, Tensor) else leaf, layout))

    def state_dict(self) -> dict[str, Any]:
        try:
            return super().state_dict()
        finally:
            self._all_state_dicts = []                  # a copy in the memory of rank 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict | {"state": dict(state_dict["state"])})      # torch changes that dict
        vars(self).pop("state", None)                   # torch keeps it beside that of `optim`


def without_content(leaf: Any) -> Any:
    """The shape and the dtype of a tensor, as one without memory; any other value itself."""
    return torch.empty_like(leaf, device="meta") if isinstance(leaf, Tensor) else leaf


def tensors_in(nested: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_nested(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, nested)
    return found


def by_dtype(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors in groups of the same dtype."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for one in tensors:
        groups.setdefault(one.dtype, []).append(one)
    return [*groups.values()]
