"""How a batch reaches the model, the loss and the metrics.

batch               model is called as        loss                                metrics
(input, target)     model(input)              loss_fn(output, target)             metric(output, target)
a dict              model(**entries)          loss_fn(output, batch["labels"])    metric(output, batch["labels"])
with loss_fn=None   model(input, target)      the one that the model returns      as above
with forward=       forward(model, batch)     the one that forward returns        metric(outputs, target)
with a state        forward(model, batch, state), which returns the state that it is given with the next batch

Of a dict, the model is given the entries that are named as arguments of its `forward`, which is the convention of
Hugging Face. The target is the entry "labels", "label", "targets" or "target"; of batches that are neither pairs nor
dicts with a target, it is the whole batch. Of an output that has `logits`, as those of Hugging Face's models, loss and
metrics get the logits.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loopctl.data.batch import TARGETS, map_nested, target_name, target_of
from loopctl.errors import UsageError, names

if TYPE_CHECKING:
    from loopctl.run import Run


class ForwardModule(nn.Module):
    """The model and the function `forward(model, batch)` as one module, for wrappers of the model.

    DistributedDataParallel averages the gradients of what its own forward pass has used, and torch.compile compiles a
    call of what it wraps. So both wrap the function, in which the user may call parts of the model.
    """

    def __init__(self, model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.model, self.functions = model, functions

    def forward(self, batch: Any, turn: str = "", *state: Any) -> Any:
        return self.functions[turn](self.model, batch, *state)


def unwrapped_network(run: Run) -> nn.Module:
    """What `run.network` is before a plugin wraps it: the model, or the model with the function `forward`."""
    if run.forward is None:
        return run.model
    return ForwardModule(run.model, run.forward if isinstance(run.forward, Mapping) else {"": run.forward})


def is_compiled(run: Run) -> bool:
    """Whether the model or a part of it is compiled with torch.compile."""
    markers = ("_orig_mod", "_torchdynamo_orig_callable")
    return any(getattr(part, "_compiled_call_impl", None) or any(hasattr(part, marker) for marker in markers)
               for part in (run.network, *run.model.modules()))


def loss_by_forward(run: Run, batch: Any) -> Any:
    """Call `run.forward`; return its loss, set `run.outputs`, and log the further values that it returns by name.

    Where it takes a state, `run.carried` is what it has returned for the batch before, detached: gradients end there.
    Raises UsageError where it returns something else.
    """
    if run.carries_state:
        result = run.network(batch, run.turn, run.carried)
        if not isinstance(result, tuple | list) or len(result) != 4 or not isinstance(result[2], Mapping):
            raise UsageError(f"forward takes a state and returned {describe_batch(result)}; return loss, outputs, a "
                             "dict of values to log, which may be empty, and the state for the next batch")
        *result, state = result
        run.carried = map_nested(detached, state)
    else:
        result = run.network(batch, run.turn)
    if isinstance(result, Tensor):
        result = result, None
    if (not isinstance(result, tuple | list) or len(result) not in (2, 3)
            or (len(result) == 3 and not isinstance(result[2], Mapping))):
        raise UsageError(f"forward returned {describe_batch(result)}; return loss, outputs, or loss, outputs and a "
                         "dict of values to log")
    for name, value in result[2].items() if len(result) == 3 else ():
        run.log(name, value)
    loss, run.outputs = result[:2]
    return loss


def takes_state(forward: Callable[..., Any]) -> bool:
    """Whether the function `forward` has an argument `state`, so that it carries one from batch to batch."""
    try:
        return "state" in inspect.signature(forward).parameters
    except ValueError:                  # some callables written in C have no signature
        return False


@contextmanager
def new_pass(run: Run) -> Iterator[None]:
    """Begin a pass over other data in the block, without a state; afterwards the state is what it was before."""
    before, run.carried = run.carried, None
    try:
        yield
    finally:
        run.carried = before


def detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def loss_of_batch(run: Run, batch: Any) -> Any:
    """Call the model with a batch that is no pair, or whose loss the model returns; return the loss, set `run.outputs`.

    Raises UsageError where model and batch do not fit together, or where there is no loss.
    """
    if isinstance(batch, Mapping):
        arguments = model_arguments(run, batch)
        try:
            output = run.network(**arguments)
        except Exception as error:
            if left := sorted(map(str, batch.keys() - arguments.keys())):
                error.add_note(f"the model was called with {names(arguments)}; of the batch, {names(left)} "
                               f"{'are no arguments' if left[1:] else 'is no argument'} of its forward")
            raise
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        if not can_be_called_with(run.model.forward, *batch):
            raise UsageError(f"loss_fn is None, so the model is called with input and target and returns the loss, but "
                             f"{type(run.model).__name__} takes one argument; pass a function of (output, target), "
                             "such as torch.nn.CrossEntropyLoss()")
        output = run.network(*batch)
    else:
        part = "train" if torch.is_grad_enabled() else "valid"
        raise UsageError(f"a batch is a pair (input, target) or a dict, but {part} gave {describe_batch(batch)}; pass "
                         "forward=..., a function (model, batch) that returns loss, outputs")
    if run.loss_fn is None:
        loss, run.outputs = own_loss(output)
        return loss
    run.outputs = predictions(output)
    target = target_of(batch)
    if target is batch:
        raise UsageError(f"loss_fn needs a target, and a batch has the entries {names(batch)}; name the target "
                         f"{TARGETS[0]!r}, or pass forward=...")
    return run.loss_fn(run.outputs, target)


def call_model(run: Run, batch: Any) -> Any:
    """Call the model with a batch as in training, without a loss function; return what it returns."""
    if run.forward is not None:
        network, state = unwrapped_network(run), (None,) if run.carries_state else ()
        return [network(batch, turn, *state) for turn in run.turns or [""]]
    if isinstance(batch, Mapping):
        return run.model(**model_arguments(run, batch))
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        return run.model(batch)
    own_loss = run.loss_fn is None and "compute_loss" not in run.hook.replaced
    return run.model(*batch) if own_loss else run.model(batch[0])


def outputs_of(run: Run, model: nn.Module, batch: Any) -> Any:
    """What another model gives for a batch in place of the run's own, as metrics get it."""
    if run.forward is not None:
        result = run.forward(model, batch)
        return result[1] if isinstance(result, tuple | list) else None
    if isinstance(batch, Mapping):
        return predictions(model(**named_inputs(model, batch, target_name(batch))))
    if run.loss_fn is None and "compute_loss" not in run.hook.replaced:         # the model returns its loss
        return own_loss(model(*batch))[1]
    return predictions(model(batch[0]))


def model_arguments(run: Run, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a dict that the model takes; without the target where `loss_fn` takes that."""
    found = named_inputs(run.model, batch, None if run.loss_fn is None else target_name(batch))
    if not found:
        accepted = argument_names(getattr(run.model.forward, "__func__", run.model.forward))
        takes = "" if accepted is None else f", and the model takes {names(sorted(accepted))}"
        raise UsageError(f"a batch has the entries {names(batch)}{takes}; name them alike, or pass forward=...")
    return found


def named_inputs(model: nn.Module, batch: Mapping[str, Any], target: str | None = None) -> dict[str, Any]:
    """The entries of a dict that are named as arguments of a model's `forward`, without the `target`."""
    accepted = argument_names(getattr(model.forward, "__func__", model.forward))
    return {name: batch[name] for name in batch if name != target and (accepted is None or name in accepted)}


def can_be_called_with(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a function takes these positional arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


@lru_cache(maxsize=64)
def argument_names(function: Callable[..., Any]) -> frozenset[str] | None:
    """The names of the arguments of a method; None if it has none but `**kwargs`, so that it takes any."""
    parameters = list(inspect.signature(function).parameters.values())
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - {"self"}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return None if takes_any and not named else frozenset(named)


def predictions(output: Any) -> Any:
    """The `logits` of an output of Hugging Face's kind, a dict whose entries are attributes too; else the output."""
    return output.logits if isinstance(output, Mapping) and hasattr(output, "logits") else output


def own_loss(output: Any) -> tuple[Any, Any]:
    """The loss that a model returns, and the rest: its `logits` if it has some. Raises UsageError if it has no loss.

    The loss is the entry `loss` of a dict, the attribute `loss`, the one scalar of a tuple, or a scalar alone.
    """
    if isinstance(output, Tensor) and output.numel() == 1:
        return output, None
    if isinstance(output, tuple | list) and not hasattr(output, "loss"):
        scalars = [part for part in output if isinstance(part, Tensor) and part.ndim == 0]
        if len(scalars) == 1:
            others = [part for part in output if part is not scalars[0]]
            return scalars[0], others[0] if len(others) == 1 else tuple(others)
    loss, logits = (output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
                    for name in ("loss", "logits"))
    if loss is None:
        raise UsageError(f"loss_fn is None, so the model returns its loss, but it returned {describe_batch(output)} "
                         "without one; pass a function of (output, target), such as torch.nn.CrossEntropyLoss()")
    return loss, output if logits is None else logits


def describe_batch(batch: Any) -> str:
    """The type of a batch, and its length if that is a tuple or a list, for a message."""
    kind = f"a {type(batch).__name__}"
    return f"{kind} of {len(batch)}" if isinstance(batch, tuple | list) else kind
