"""What is observed of one update, kept on the device until the update is over."""
from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopctl.data.batch import map_nested
from loopctl.optim.group_numbers import numbers_by_name
from loopctl.tape.fingerprint import COLUMNS, MAX_SAMPLES, fingerprint, random_states, sample_checksums

MAX_ROWS = 64           # of a table; of a model with more tensors, several share a row
MAX_LEAVES = 64         # of a batch that are described, tensors and others


class Rows:
    """The rows of a table of fingerprints: named tensors, of which several share a row where there are many."""

    def __init__(self, named: Mapping[str, Tensor]) -> None:
        share = -(-len(named) // MAX_ROWS) or 1
        found = list(named.items())
        parts = [found[start:start + share] for start in range(0, len(found), share)]
        self.names = tuple(part[0][0] if len(part) == 1 else f"{part[0][0]} to {part[-1][0]}" for part in parts)
        self.tensors = [[tensor for _, tensor in part] for part in parts]

    def gradients(self) -> list[list[Tensor | None]]:
        """The gradients of the tensors, None for each without one."""
        return [[tensor.grad for tensor in row] for row in self.tensors]

    def versions(self) -> list[int]:
        """What changes when torch changes one of the tensors in place."""
        return [tensor._version for row in self.tensors for tensor in row]


class Observations:
    """The observations of one update: tables and columns of int32 on the device, and plain values.

    A point is where in the update something was observed, such as "start", "backward" or "grads_ready clip".
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.points: list[list[Any]] = []       # what, point, names of the rows, columns; in the order of the parts
        self.parts: list[Tensor] = []
        self.values: dict[str, Any] = {}

    def table(self, what: str, point: str, names: tuple[str, ...], rows: Sequence[Sequence[Tensor | None]]) -> None:
        """Add the fingerprints of tensors."""
        self.fingerprints(what, point, names, fingerprint(rows, self.device))

    def fingerprints(self, what: str, point: str, names: tuple[str, ...], table: Tensor) -> None:
        """Add fingerprints that are there already."""
        self.points.append([what, point, names, COLUMNS])
        self.parts.append(table.reshape(-1))

    def column(self, what: str, point: str, numbers: Tensor) -> None:
        """Add int32 or float32 numbers, one per row."""
        self.points.append([what, point, numbers.numel(), 1])
        self.parts.append(numbers.detach().reshape(-1).to(self.device).view(torch.int32))

    def scalar(self, what: str, point: str, value: Any) -> None:
        """Add a number that may be a tensor on the device."""
        if isinstance(value, Tensor):
            self.column(what, point, value.detach().to(torch.float32))
        else:
            self.points.append([what, point, float(value), 0])

    def random(self, point: str) -> None:
        """Add checksums of the states of the random-number generators."""
        self.values.setdefault("random", {})[point] = random_states(self.device)

    def batch(self, point: str, batch: Any) -> None:
        """Add the fingerprint of each tensor of a batch, and checksums of its samples."""
        named, others = leaves(batch)
        rows = Rows(named)
        self.table("batch", point, rows.names, rows.tensors)
        whole = [tensor for tensor in named.values() if tensor.ndim and not tensor.is_nested]
        kept = [*named.items()][:MAX_LEAVES]
        rest = others[MAX_LEAVES:]
        others = others[:MAX_LEAVES] + [f"and others: {zlib.crc32(repr(rest).encode()):08x}"] * bool(rest)
        described = {"leaves": [[name, "x".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")]
                                for name, tensor in kept if not tensor.is_nested],
                     "others": others, "samples": len(whole[0]) if whole else 0}
        self.values.setdefault("batches", {})[point] = described
        if whole and 0 < len(whole[0]) <= MAX_SAMPLES:      # of the input alone, for targets may not be known
            self.column("samples", point, sample_checksums(whole[0].to(self.device)))

    def groups(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Add every number of the parameter groups: learning rate, weight decay, momentum and so on."""
        found: list[dict[str, Any]] = []
        for optimizer in optimizers:
            for index, group in enumerate(optimizer.param_groups):
                numbers = {}
                for name, (key, item) in numbers_by_name(group).items():
                    value = group[key] if item is None else group[key][item]
                    if isinstance(value, Tensor):
                        self.scalar("numbers", f"{len(found)} {name}", value)
                    else:
                        numbers[name] = value
                found.append({"group": group.get("name", index), "numbers": numbers})
        self.values["groups"] = found

    def tables(self, point: str, rows: Mapping[str, Rows]) -> None:
        """Add several tables, such as weights and buffers, whose fingerprints are computed together."""
        table = fingerprint([row for each in rows.values() for row in each.tensors], self.device)
        parts = table.split([len(each.names) for each in rows.values()])
        for (what, each), part in zip(rows.items(), parts, strict=True):
            self.fingerprints(what, point, each.names, part)

    def state(self, point: str, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Add the fingerprint of each kind of optimizer state, such as exp_avg, over all parameters."""
        kinds: dict[str, list[Tensor | None]] = {}
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    for name, value in optimizer.state.get(parameter, {}).items():
                        if isinstance(value, Tensor) and name != "step":
                            kinds.setdefault(name, []).append(value)
        if kinds:
            self.table("state", point, tuple(kinds), [*kinds.values()])

    def vector(self) -> Tensor:
        """All numbers of the tables and columns, in one tensor."""
        return torch.cat(self.parts) if self.parts else torch.empty(0, dtype=torch.int32)


def leaves(batch: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors in a batch by name, and its other leaves as text.

    Of a pair the names are input and target, of a mapping its keys, of a longer sequence the indices.
    """
    named: list[tuple[str, Any]]
    if isinstance(batch, Mapping):
        named = [(str(key), value) for key, value in batch.items()]
    elif isinstance(batch, list | tuple):
        pair = len(batch) == 2
        named = [(("input", "target")[index] if pair else str(index), value) for index, value in enumerate(batch)]
    else:
        named = [("input", batch)]
    tensors: dict[str, Tensor] = {}
    others: list[str] = []
    for name, value in named:
        inner: list[Any] = []
        map_nested(inner.append, value)
        for index, leaf in enumerate(inner):
            label = f"{name}.{index}" if len(inner) > 1 else name
            if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
                leaf = torch.from_numpy(leaf)
            if isinstance(leaf, Tensor):
                tensors[label] = leaf
            elif isinstance(leaf, str | int | float | bool):
                others.append(f"{label} {leaf!r}"[:200])
    return tensors, others
