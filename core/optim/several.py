"""Several optimizers in one run: as one that steps them together, or in turn, each with a loss of its own.

`Optimizers` is for parts of a model that are trained by different optimizers with one loss. With a loss for each, as
in generative adversarial networks, every optimizer has its turn in a step: its loss is computed, and its update made,
before the next one's. In its turn it is `run.optimizer`, so that plugins clip, scale or skip the update of that one.
`by_kind` divides the parameters between two optimizers by their kind.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from loopctl.errors import UsageError
from loopctl.optim.fast_step import fast_step

if TYPE_CHECKING:
    from loopctl.run import Run


class Optimizers(Optimizer):
    """Several optimizers that behave as one: `step` makes the update of each, and their groups and states are joined.

    named: the optimizers by name; each of their parameter groups has the name as `group["optimizer"]`
    """

    def __init__(self, named: dict[str, Optimizer]) -> None:
        # Not torch's own constructor, which would make parameter groups and a state in addition.
        self.named = named
        for name, optimizer in named.items():
            for number, group in enumerate(optimizer.param_groups):
                group["optimizer"] = name
                group.setdefault("name", name if len(optimizer.param_groups) == 1 else f"{name} {number}")

    @property
    def param_groups(self) -> list[dict[str, Any]]:         # type: ignore[override]
        return [group for optimizer in self.named.values() for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Any, Any]:            # type: ignore[override]
        return JoinedState(list(self.named.values()))

    @property
    def defaults(self) -> dict[str, Any]:                   # type: ignore[override]
        found: dict[str, Any] = {f"class of {name}": type(one).__name__ for name, one in self.named.items()}
        return found | {f"{key} of {name}": value for name, one in self.named.items()
                        for key, value in one.defaults.items()}

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:       # type: ignore[override]
        """Compute the gradients once, and make the update of each optimizer; return the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.named.values():
            fast_step(optimizer, lambda: loss)              # type: ignore[arg-type, return-value]
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.named.values():
            optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise UsageError(f"there are several optimizers; add the group to one of {', '.join(self.named)}")

    def state_dict(self) -> dict[str, Any]:
        """The state dicts of all, joined into one of torch's form: parameters are numbered through.

        What a state dict has besides is under "more", by the name of its optimizer.
        """
        joined: dict[str, Any] = {"state": {}, "param_groups": [], "more": {}}
        for name, optimizer in self.named.items():
            first, own = sum(len(group["params"]) for group in joined["param_groups"]), optimizer.state_dict()
            if not has_torch_s_form(own):
                joined["more"][name] = own
                continue
            joined["state"] |= {first + number: state for number, state in own["state"].items()}
            joined["param_groups"] += [group | {"params": [first + number for number in group["params"]]}
                                       for group in own["param_groups"]]
            joined["more"][name] = {key: value for key, value in own.items() if key not in joined}
        return joined

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        first, groups = 0, iter(state_dict["param_groups"])
        for name, optimizer in self.named.items():
            if not has_torch_s_form(optimizer.state_dict()):
                optimizer.load_state_dict(state_dict["more"][name])
                continue
            own = [next(groups) for _ in optimizer.param_groups]
            count = sum(len(group["params"]) for group in own)
            optimizer.load_state_dict(state_dict.get("more", {}).get(name, {}) | {
                "state": {number - first: state for number, state in state_dict["state"].items()
                          if first <= number < first + count},
                "param_groups": [group | {"params": [number - first for number in group["params"]]} for group in own]})
            first += count

    def __repr__(self) -> str:
        return f"Optimizers({self.named})"

    def __getstate__(self) -> dict[str, Any]:
        return {"named": self.named}


@dataclass(frozen=True)
class OfKind:
    """A factory of an optimizer, and the kind of parameters that it trains."""

    factory: Callable[[list[dict[str, Any]]], Optimizer]
    kind: Literal["hidden matrices", "others"]

    def __call__(self, groups: list[dict[str, Any]]) -> Optimizer:
        return self.factory(groups)


def by_kind(**factories: Callable[[list[dict[str, Any]]], Optimizer]) -> dict[str, OfKind]:
    """Return the optimizers for `fit`: the first trains the matrices of hidden layers, the second everything else.

    `fit(optimizer=by_kind(muon=partial(torch.optim.Muon, lr=0.02), adamw=partial(torch.optim.AdamW, lr=3e-4)))` is how
    Muon is meant to be used: embeddings, the output layer, biases and norms are trained by AdamW, and so is what has
    not two dimensions, such as convolutions. See `hidden_matrices` in loopctl.model.hidden_matrices.

    factories: two, by the names that schedules and the history use
    """
    if len(factories) != 2:
        raise UsageError(f"by_kind takes two optimizers, not {len(factories)}: that of the hidden matrices and that of "
                         "everything else, as in by_kind(muon=..., adamw=...)")
    for name, factory in factories.items():
        if isinstance(factory, Optimizer) or not callable(factory):
            raise UsageError(f"by_kind: {name} is {type(factory).__name__}; pass a factory, such as "
                             "partial(torch.optim.SGD, lr=0.1), since its parameters are chosen for it")
    first, second = factories
    return {first: OfKind(factories[first], "hidden matrices"), second: OfKind(factories[second], "others")}


def has_torch_s_form(state_dict: dict[str, Any]) -> bool:
    """Whether a state dict has the entries of torch's own; a wrapper around an optimizer may have others."""
    return {"state", "param_groups"} <= state_dict.keys()


class JoinedState(MutableMapping[Any, Any]):
    """The states of several optimizers by parameter, as one mapping; a change is made in the one that holds it."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.states = [optimizer.state for optimizer in optimizers]
        self.owners = {id(parameter): optimizer.state for optimizer in optimizers
                       for group in optimizer.param_groups for parameter in group["params"]}

    def __getitem__(self, parameter: Any) -> Any:
        return self.owners[id(parameter)][parameter]

    def __contains__(self, parameter: Any) -> bool:
        return parameter in self.owners.get(id(parameter), ())

    def get(self, parameter: Any, default: Any = None) -> Any:
        return self.owners.get(id(parameter), {}).get(parameter, default)

    def __setitem__(self, parameter: Any, state: Any) -> None:
        self.owners[id(parameter)][parameter] = state

    def __delitem__(self, parameter: Any) -> None:
        del self.owners[id(parameter)][parameter]

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(self.states)

    def __len__(self) -> int:
        return sum(map(len, self.states))


def each_optimizer(optimizer: Any) -> list[Any]:
    """The optimizers in one: its own if it joins several, otherwise itself."""
    return list(optimizer.named.values()) if isinstance(optimizer, Optimizers) else [optimizer]


def step_in_turn(run: Run, closure: Callable[[], Tensor]) -> None:
    """Make the update of each optimizer of the run, of its own loss. `run.loss` becomes the sum of the losses.

    The step counts as skipped if every update was skipped. Each loss is logged as NAME_loss.
    """
    every, log_target = run.optimizer, run.log_target
    losses: list[Tensor] = []
    skipped = []
    try:
        for name in run.turns:
            run.turn, run.optimizer, run.loss, run.skipped = name, every.named[name], None, False
            run.hook.optimizer_step(run=run, closure=closure)
            run.log_target = log_target
            skipped.append(run.skipped)
            if run.loss is not None:
                run.log(f"{name}_loss", run.loss)
                losses.append(run.loss)
    finally:
        run.optimizer, run.turn = every, ""
    run.loss = torch.stack(losses).sum() if losses else None
    run.skipped = all(skipped)


def losses_in_turn(run: Run, batch: Any) -> Tensor:
    """The sum of the losses of all turns for one batch, in an evaluation; each is logged as NAME_loss."""
    losses, turn = [], run.turn         # not "" in the rehearsal
    try:
        for name in run.turns:
            run.turn = name
            losses.append(run.hook.compute_loss(run=run, batch=batch))
            run.log(f"{name}_loss", losses[-1])
    finally:
        run.turn = turn
    return torch.stack(losses).sum()
