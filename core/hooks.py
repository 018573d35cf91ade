"""The hooks: every point of training at which a plugin can act, in the order in which they are called.

setup                     freeze parts, change layers; the model is not wrapped yet
param_groups              -> the optimizer's parameter groups (replace)
wrap_model                compile, shard or replicate the model: set run.network, which forward calls
train                     everything below; wrap it to keep something open: a progress bar, a profiler, signals
  train_start             the optimizer exists; no step has been made
  epoch_start             model.train() has just been called; put parts of the model back into eval mode here
    group_batches         -> lists of micro-batches, one list per step (replace)
    lr_scale              -> a factor of the learning rate; the factors of all plugins are multiplied
    transform_batch       -> the micro-batch to train on; each plugin gets what the one before it returned
    batch_weight          -> the weight of a micro-batch in its step; by default its number of samples (replace)
    before_step           a step over the micro-batches in run.batches begins
    optimizer_step        -> loss; calls closure() (wrap or replace)
      micro_step          forward and backward of one micro-batch (wrap: no_sync)
        compute_loss      -> mean loss of one micro-batch; sets run.outputs (wrap: autocast; replace: custom losses)
        backward          -> the tensor that backward() was called on (replace: loss scaling)
      after_backward      the gradients of the step are complete, but may be scaled: unscale them here
      grads_ready         the gradients are complete and unscaled: clip, measure, add noise
    after_step            run.step has been incremented, unless run.skipped
    safe_point            the state of the run is consistent: save it, or exit on a signal
  evaluate                -> metrics; at the end of each epoch and every eval_every steps (wrap: averaged weights)
  after_evaluate          run.metrics holds the new values, on the host; set run.stop to end the run
  epoch_end               the row of this epoch is in run.history
  safe_point              called again, so that a checkpoint contains the changes of after_evaluate and epoch_end
  train_end               the run is over, by count or by run.stop; not called after an exception

A plugin uses a hook in one of three ways. It observes: a method with `@hookimpl` is called at the hook. It wraps: a
generator method with `@hookimpl(wrapper=True)` yields once, and the wrapped calls run at the `yield`; whatever must be
undone is undone there. It replaces: at a hook marked (replace), the method runs in place of the default, and only one
plugin per run may do so. At `transform_batch` and `lr_scale` several plugins return a value: a batch for the next one,
and a factor. A method declares, by name, only those arguments of the hook that it needs.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pluggy import HookimplMarker, HookspecMarker

if TYPE_CHECKING:
    from torch import Tensor

    from loopctl.run import Run

CHAINED = {"transform_batch": "batch"}      # the hooks whose argument is what the plugin before returned
hookspec = HookspecMarker("loopctl")
hookimpl = HookimplMarker("loopctl")


# The return value is used if the annotation names a type, and dropped if it is None.


@hookspec
def setup(run: Run) -> None:
    """Called before the optimizer exists; the model may be changed: freeze parts, replace layers.

    A plugin that will report a metric declares it here with `run.metrics[name] = nan`, so that other plugins can check
    that it exists.
    """


@hookspec(firstresult=True)
def param_groups(run: Run) -> list[dict[str, Any]]:
    """Return the parameter groups, as `torch.optim` takes them. Default: one group of all trainable parameters."""


@hookspec
def wrap_model(run: Run) -> None:
    """Set `run.network`, which forward calls, to a compiled or replicated model. `run.model` stays unwrapped."""


@hookspec(firstresult=True)
def train(run: Run) -> None:
    """Train, from the first epoch to the last. Wrap it to keep something open during training."""


@hookspec
def train_start(run: Run) -> None:
    """Called when the optimizer exists and no step has been made: the last point at which to raise `UsageError`."""


@hookspec
def epoch_start(run: Run) -> None:
    """Called when a pass over the training data begins, after `model.train()`; `run.epoch` passes are complete."""


@hookspec(firstresult=True)
def group_batches(run: Run, batches: Iterable[Any]) -> Iterator[Sequence[Any]]:
    """Return an iterator over lists of micro-batches; each list makes one step. Default: one batch per step.

    It is also called with numbers in place of batches, to count the steps of an epoch without reading data. So group by
    count; or, if grouping depends on the data, have the user pass `steps_per_epoch` and pass numbers through.
    """


@hookspec
def lr_scale(run: Run, initial_lr: float, group: dict[str, Any]) -> float | None:
    """Return a factor for the learning rate of one parameter group in the step that begins, or None for no factor.

    The factors of all plugins are multiplied: `group["lr"] = initial_lr * product`. A wrapper gets the list of factors
    from its `yield` and returns the list to use. Called once per parameter group and step.
    """


@hookspec
def transform_batch(run: Run, batch: Any) -> Any:
    """Return the micro-batch to train on, on the device: mixed, resized, shortened. Not called in evaluation.

    Each plugin gets what the one before it returned. Metrics compare the outputs with the targets of what is returned,
    or with `run.metric_target` where a plugin sets it. A plugin that never changes the number of samples declares
    `keeps_sample_count = True`; then each micro-batch may be read and transformed when its turn comes.
    """


@hookspec(firstresult=True)
def batch_weight(run: Run, batch: Any) -> float | Tensor:
    """Return the weight of one micro-batch in its step and in reported means. Default: its number of samples."""


@hookspec
def before_step(run: Run) -> None:
    """Called when a step over the micro-batches in `run.batches` begins; its learning rates are set."""


@hookspec(firstresult=True)
def optimizer_step(run: Run, closure: Callable[[], Tensor]) -> Tensor:
    """Update the parameters and return the loss. Each call of `closure()` clears the gradients and computes them.

    A replacement that makes no update sets `run.skipped = True`.
    """


@hookspec(firstresult=True)
def micro_step(run: Run, batch: Any, weight: float | Tensor, last: bool) -> Tensor:
    """Run forward and backward of one micro-batch; return its loss times `weight`, detached.

    weight: the weight of the micro-batch divided by the weight of its step; with several processes, by the mean of the
    step's weight over all processes. last: whether this is the last micro-batch of the step.
    """


@hookspec(firstresult=True)
def compute_loss(run: Run, batch: Any) -> Tensor:
    """Return the mean loss of one micro-batch, a scalar; set `run.outputs`. Called in training and evaluation."""


@hookspec(firstresult=True)
def backward(run: Run, loss: Tensor) -> Tensor:
    """Add the gradients of `loss` to those of the parameters; return the tensor that backward() was called on."""


@hookspec
def after_backward(run: Run) -> None:
    """Called when the gradients of all micro-batches are complete; they may be scaled: unscale them here."""


@hookspec
def grads_ready(run: Run) -> None:
    """Called when the gradients are complete and unscaled: clip them, measure them, add noise."""


@hookspec
def after_step(run: Run) -> None:
    """Called after each step: `run.loss` is its loss; `run.step` has been incremented unless `run.skipped`."""


@hookspec
def safe_point(run: Run) -> None:
    """Called where the states of model, optimizer, counters and plugins are consistent: save them, or exit."""


@hookspec(firstresult=True)
def evaluate(run: Run) -> dict[str, Any]:
    """Return metrics by name, as numbers or scalar tensors. Default: the weighted means over `run.valid`."""


@hookspec
def after_evaluate(run: Run) -> None:
    """Called when `run.metrics` holds the new values, as Python numbers. Set `run.stop` to a reason to end the run."""


@hookspec
def epoch_end(run: Run) -> None:
    """Called at the end of an epoch; its row is `run.history[-1]`."""


@hookspec
def train_end(run: Run) -> None:
    """Called when training has ended by count or by `run.stop`, not after an exception.

    Put cleanup that must always happen into a wrapper of `train`.
    """
