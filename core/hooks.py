"""Every moment of training that a plugin can join, in the order they come.

setup                     freeze parts, change layers; the model is still the user's own
param_groups              -> the optimizer's parameter groups (replace)
wrap_model                compile, shard or replicate: sets run.network, what forward calls
train                     all that follows; wrap it to hold something open: a progress bar, a profiler, signals
  train_start             the optimizer exists, nothing is trained yet
  epoch_start             model.train() was called before this, so a plugin can put parts back to eval
    group_batches         -> lists of micro-batches, one list per step (replace)
    lr_scale              -> factors of the learning rate; all multiply; a wrapper may replace them
    batch_weight          -> what one micro-batch counts in its step; samples by default, tokens if you say so (replace)
    before_step           one update over run.batches begins
    optimizer_step        -> loss; calls closure() (wrap or replace)
      micro_step          one micro-batch forward and backward (wrap: no_sync)
        compute_loss      -> mean loss of one micro-batch; run.outputs (wrap: autocast; replace: custom losses)
        backward          -> what was differentiated (replace: loss scaling)
      after_backward      all gradients of the step are complete, perhaps still scaled: unscale here
      grads_ready         gradients are unscaled and complete: clip, measure, add noise
    after_step            run.step has moved on, unless run.skipped
    safe_point            state is consistent: save, or leave on a signal
  evaluate                -> metrics; at every epoch's end, and every eval_every steps if asked (wrap: averaged weights)
  after_evaluate          run.metrics is fresh and on the host: judge it, set run.stop to end the run
  epoch_end               the epoch's row is in run.history
  safe_point              again, so what is saved holds what the two before it changed
  train_end               the run ended by count or by run.stop; never after an exception

A plugin has three verbs. It observes with a plain hook. It wraps with `@hookimpl(wrapper=True)`, where what must be
undone is undone. It replaces a hook marked (replace), which one plugin per run may do. A hook takes those of the
arguments below that it needs, by name.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from torch import Tensor

    from loopctl.run import Run

hookspec = HookspecMarker("loopctl")
hookimpl = HookimplMarker("loopctl")


# A hook that is annotated to return something returns it; what the others return is dropped.


@hookspec
def setup(run: Run) -> None:
    """The model may change here: freeze parts, swap layers.

    A plugin that will report a metric names it here, `run.metrics[name] = nan`, so that others know it exists.
    """


@hookspec(firstresult=True)
def param_groups(run: Run) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, as `torch.optim` takes them. Default: one, of all that is trainable."""


@hookspec
def wrap_model(run: Run) -> None:
    """Set `run.network`, what forward calls, to a compiled or replicated one. `run.model` stays the user's own."""


@hookspec(firstresult=True)
def train(run: Run) -> None:
    """The whole training. Wrap it to hold something open meanwhile."""


@hookspec
def train_start(run: Run) -> None:
    """The optimizer exists, nothing is trained yet: the last moment to refuse, with `UsageError`."""


@hookspec
def epoch_start(run: Run) -> None:
    """A pass over the training data begins; `run.epoch` passes are complete. The model is in training mode."""


@hookspec(firstresult=True)
def group_batches(run: Run, batches: Iterable[Any]) -> Iterator[list[Any]]:
    """Return an iterator of lists of micro-batches; each list makes one step. Default: every batch alone.

    To count an epoch's steps without reading data, it is also called with numbers in place of batches: group by count,
    or have the user say `steps_per_epoch` and take numbers as they come.
    """


@hookspec
def lr_scale(run: Run, initial_lr: float, group: dict[str, Any]) -> float | None:
    """Return a factor for the learning rate of one parameter group in the step that begins.

    The factors of all plugins multiply: `group["lr"] = initial_lr * product`. Called once per group and step.
    """


@hookspec(firstresult=True)
def batch_weight(run: Run, batch: Any) -> float | Tensor:
    """Return what one micro-batch counts, in its step and in reported means. Default: its number of samples."""


@hookspec
def before_step(run: Run) -> None:
    """One update over `run.batches` begins; the learning rates are set."""


@hookspec(firstresult=True)
def optimizer_step(run: Run, closure: Callable[[], Tensor]) -> Tensor:
    """Update the parameters and return the loss. `closure()` clears and computes the gradients, as often as called.

    A replacement that did not update sets `run.skipped = True`.
    """


@hookspec(firstresult=True)
def micro_step(run: Run, batch: Any, weight: float | Tensor, last: bool) -> Tensor:
    """Go forward and backward over one micro-batch; return its share of the step's loss, detached.

    weight: the micro-batch's share of its step, 0 to 1; of several processes, of the mean of theirs. last: it is the
    step's last micro-batch.
    """


@hookspec(firstresult=True)
def compute_loss(run: Run, batch: Any) -> Tensor:
    """Return the mean loss of one batch, a scalar, and set `run.outputs`. Called in training and in evaluation."""


@hookspec(firstresult=True)
def backward(run: Run, loss: Tensor) -> Tensor:
    """Add the gradients of `loss`; return what was differentiated."""


@hookspec
def after_backward(run: Run) -> None:
    """The gradients of all micro-batches are complete, perhaps still scaled: unscale them here."""


@hookspec
def grads_ready(run: Run) -> None:
    """The gradients are unscaled and complete: clip them, measure them, add noise."""


@hookspec
def after_step(run: Run) -> None:
    """The update is done: `run.loss` is its loss, and `run.step` has moved on unless `run.skipped`."""


@hookspec
def safe_point(run: Run) -> None:
    """Model, optimizer, counters and plugins agree with each other: save, or leave."""


@hookspec(firstresult=True)
def evaluate(run: Run) -> dict[str, Any]:
    """Return metrics by name, numbers or scalar tensors. Default: the weighted means over `run.valid`."""


@hookspec
def after_evaluate(run: Run) -> None:
    """`run.metrics` is fresh and holds plain numbers. Set `run.stop` to a reason to end the run."""


@hookspec
def epoch_end(run: Run) -> None:
    """The epoch is over and its row is `run.history[-1]`."""


@hookspec
def train_end(run: Run) -> None:
    """Training ended by count or by `run.stop`. Not called after an error: what must always happen wraps `train`."""
