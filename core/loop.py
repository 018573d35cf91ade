"""The training loop. It says when; plugins say what.

Read it from the top: `fit` prepares a run, `training_loop` goes through epochs, `run_epoch` through steps, and
`run_step` makes one update of the parameters from the gradients of one or more micro-batches. At every `hook.` plugins
can join.
"""
from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopctl import defaults
from loopctl.checkpoint.sharded_tensors import full_tensor
from loopctl.checkpoint.state import restore
from loopctl.composition.compose import blame_plugin
from loopctl.data.batch import batches_to_device
from loopctl.data.micro_batches import MicroBatches, TransformedBatches, metric_target, transform_batches
from loopctl.data.resumable_loader import open_loaders
from loopctl.determinism import nondeterminism_named
from loopctl.distributed.data_parallel import step_weight
from loopctl.distributed.process_group import broadcast_from_rank0, restart_count
from loopctl.errors import UsageError, names
from loopctl.hooks import hookimpl
from loopctl.metrics.meters import Meters, without_placeholders
from loopctl.metrics.weights import counts_nothing, reported_loss, weighted_batches
from loopctl.model.forward import new_pass
from loopctl.model.ownership import modules_of
from loopctl.optim.fast_step import zero_grad
from loopctl.optim.learning_rate import apply_schedules, recorded_rates
from loopctl.optim.optimizer_mode import set_eval_mode, set_train_mode
from loopctl.optim.several import step_in_turn
from loopctl.prepare import build_run, rates_remembered
from loopctl.rehearsal import rehearse
from loopctl.run import Run

OptimizerOrFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | torch.optim.Optimizer
Forward = Callable[[nn.Module, Any], Any]
log = logging.getLogger("loopctl")
DEFAULTS = (defaults, sys.modules[__name__])        # what implements the hooks that no plugin replaces


def fit(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    optimizer: OptimizerOrFactory | dict[str, OptimizerOrFactory],
    train: Iterable[Any],
    valid: Iterable[Any] | dict[str, Iterable[Any]] | None = None,
    *,
    epochs: int = 1,
    max_steps: int | None = None,
    eval_every: int | None = None,
    eval_first: bool = False,
    plugins: Iterable[Any] = (),
    metrics: dict[str, Callable[[Any, Any], Any]] | None = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    resume: str | Path | None = None,
    steps_per_epoch: int | None = None,
    forward: Forward | dict[str, Forward] | None = None,
    reduction: str | None = None,
    monitor: str = "",
    out: str | Path = ".",
) -> Run:
    """Train `model` and return the run: `run.history` has a dict per evaluation, `run.stop` why it ended early, or "".
    Where a plugin such as `max_time` left it in the middle, `run.leaving` is true, and `run.leave` says why.

    loss_fn: `loss_fn(output, target)`; None where the model returns its loss, where `forward` does, or where a plugin
        replaces `compute_loss`. If it is a module, it belongs to the run as the model does: its tensors are moved to
        the device, saved, and trained where the optimizer holds them.
    optimizer: a factory of parameter groups, such as `partial(torch.optim.SGD, lr=0.1)`, or an optimizer. Or several,
        a dict of them by the part of the model that each trains: the name of a module, or a glob such as `*`, which
        is what no earlier one has.
    train, valid: iterables of batches, such as a DataLoader or a list. A batch is a pair (input, target), or a dict
        whose entries are arguments of the model; tensors nest as they like. Several validation sets are a dict of them
        by name, whose metrics are called `val_NAME_loss` and so on.
    epochs, max_steps: passes over `train`, and updates; whichever comes first ends the run.
    eval_every: also evaluate every so many steps, not only at the end of each epoch.
    eval_first: also evaluate before the first step.
    plugins: instances, or text as on the command line (`"clip:max_norm=1"`); they act in the order given.
    metrics: by name, `fn(output, target)` that returns a mean over the batch, or torchmetrics objects.
    device: where to train; None is where the model is, "auto" is cuda, then mps, then cpu.
    seed: seeds Python, NumPy and torch before anything else.
    resume: a checkpoint, or a folder with checkpoints, to resume from. After a restart by torchrun that is `out`.
    steps_per_epoch: updates per epoch; needed where `train` has no length.
    forward: `forward(model, batch)`, for other batches and losses; returns the mean loss of a batch and the outputs
        that metrics get, and may return a dict of values to log. It takes the place of `loss_fn`. With an argument
        `state` it carries a state from batch to batch, such as the hidden state of an LSTM. Or a dict of functions,
        one per optimizer: in each step every optimizer makes an update of its own loss, in that order.
    reduction: what `loss_fn` returns for a batch, "mean" or "sum"; None is `loss_fn.reduction`, or the mean if it has
        none.
    monitor: the metric that plugins judge by, such as "val_accuracy"; left out, val_loss, or train_loss without
        validation data. A plugin's own option `monitor` takes precedence.
    out: the folder that plugins write to.

    Raises UsageError, before anything is trained, where something asked for cannot be done.
    """
    run = build_run(
        DEFAULTS, plugins, metrics, device, seed, model=model, loss_fn=loss_fn, optimizer=optimizer, train=train,
        valid=valid, epochs=epochs, max_steps=inf if max_steps is None else max_steps, eval_every=eval_every,
        eval_first=eval_first, steps_per_epoch=steps_per_epoch, forward=forward, reduction=reduction, monitor=monitor,
        out=Path(out),
        resume=Path(resume) if resume else Path(out) if restart_count() else None)
    with nondeterminism_named(run), blame_plugin(run.hook), rates_remembered(run.optimizer):
        run.hook.train(run=run)
    if (lost := run.lost_loss()) and not run.config and run.rank == 0:      # the command line says it in its own words
        advice = "" if "nan_guard" in run.hook.plugins else ", or add the plugin nan_guard, which skips such steps"
        log.warning("%s, so the model is of no use; train again with a lower learning rate%s", lost, advice)
    return run


@hookimpl(trylast=True, specname="train")
def training_loop(run: Run) -> None:
    run.hook.train_start(run=run)
    with open_loaders(run):
        if run.resume:
            restore(run)
        rehearse(run)           # in the first step, before its update
        while not (run.finished or run.leaving):
            run_epoch(run)
    run.outputs = None          # with its autograd graph, in which gradients remember the CUDA stream of this run
    set_eval_mode(run.optimizer)
    if not run.leaving:
        run.hook.train_end(run=run)


def run_epoch(run: Run) -> None:
    """Train on one pass over the training data, or on the rest of it after a resume, then evaluate."""
    hook, counters = run.hook, run.counters
    if not counters.seen_in_epoch:
        run.meters, run.carried = Meters(run.metric_fns["train"], "train_"), None
    for module in modules_of(run):
        module.train()
    set_train_mode(run.optimizer)
    hook.epoch_start(run=run)
    evaluate_if_due(run)
    if not epoch_finished(run):
        for batches in hook.group_batches(run=run, batches=batches_to_device(run.loaders["train"], run.device)):
            run_step(run, batches)
            reach_safe_point(run)
            if run.leaving:
                return
            evaluate_if_due(run)
            if epoch_finished(run):
                break
    if not counters.seen_in_epoch and run.should_stop:
        return
    if not counters.seen_in_epoch:
        raise UsageError(f"train gave no batches in epoch {run.epoch + 1}; pass a list or a DataLoader, no iterator")
    run.note_epoch_length()
    counters.finish_epoch()
    evaluate(run)
    record_metrics(run)
    hook.epoch_end(run=run)
    reach_safe_point(run)


def reach_safe_point(run: Run) -> None:
    """Call `safe_point`. Whether the run leaves after it is decided before it, so that it is saved there if it does."""
    run.leaving = bool(run.leave) and not run.finished
    run.hook.safe_point(run=run)


def epoch_finished(run: Run) -> bool:
    """Whether the epoch ends here although its data may go on."""
    counters = run.counters             # asked after every step, so without properties: they take time
    return (bool(run.stop) or counters.step >= run.max_steps
            or counters.attempts - counters.began[1] == run.steps_per_epoch)


def run_step(run: Run, batches: Sequence[Any]) -> None:
    """Make one update of the parameters, from the micro-batches of one step."""
    hook, run.batches, run.loss = run.hook, batches, None
    if hook.acting["lr_scale"]:
        apply_schedules(run)
    if hook.acting["transform_batch"]:
        batches = run.batches = transform_batches(run)
    # The type is asked for, because isinstance takes longer.
    weights: list[Any] = (batches.weights if type(batches) is MicroBatches or type(batches) is TransformedBatches
                          else [hook.batch_weight(run=run, batch=batch) for batch in batches])
    run.weight, run.skipped = step_weight(run, weights), False
    run.log_target = whole_step = run.meters, run.weight
    hook.before_step(run=run)
    if run.batches is not batches:
        raise UsageError(f"before_step of {names(hook.acting['before_step'])} replaced run.batches, which are weighed "
                         "by then; change them in transform_batch")
    if counts_nothing(run.weight):
        skip_step(run)
    else:
        closure = partial(compute_gradients, run, weights, run.carried)
        if run.turns:                   # there are several optimizers, with a loss each
            step_in_turn(run, closure)
        else:
            hook.optimizer_step(run=run, closure=closure)
        if run.loss is not None:
            run.meters.loss.add(reported_loss(run, run.loss, run.weight, run.world_size), run.weight)
    run.counters.finish_step(len(batches), run.skipped)
    run.log_target = whole_step            # which the closure discards where it is called again
    hook.after_step(run=run)


def compute_gradients(run: Run, weights: list[Any], carried: Any) -> Tensor:
    """Clear the gradients and compute them anew; return the loss. This is the closure of `optimizer.step(closure)`."""
    hook, losses, meters = run.hook, [], run.meters
    first_call = run.loss is None       # an optimizer may call the closure again; what is reported is the first call's
    after, run.carried = run.carried, carried           # each call starts from the state at the start of the step
    zero_grad(run.optimizer, run.untrained)
    for batch, weight, share, last in weighted_batches(run, weights):
        run.log_target = (meters, weight) if first_call else None
        losses.append(hook.micro_step(run=run, batch=batch, weight=share, last=last))
        if first_call and meters.functions and run.turn == run.last_turn:
            meters.observe(run.outputs, metric_target(run, batch), weight)
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    run.log_target = (meters, run.weight) if first_call else None
    if first_call:
        run.loss = loss
    else:
        run.carried = after
    hook.after_backward(run=run)
    hook.grads_ready(run=run)
    return loss


def skip_step(run: Run) -> None:
    """Make no update in a step in which nothing counts: its batches are empty, or their weights are all 0."""
    run.skipped, run.loss = True, torch.zeros((), device=run.device)
    run.say_once("empty step", f"nothing counts in step {run.attempts + 1}, whose weight is 0, so it makes no update; "
                               "further such steps are not reported")


def evaluate_if_due(run: Run) -> None:
    """Evaluate within an epoch, every `eval_every` steps; before the first step where `eval_first` asks for it."""
    due = not run.attempts % run.eval_every if run.eval_every and run.attempts else run.eval_first and not run.attempts
    if due and run.counters.evaluated != run.attempts:
        evaluate(run)
        record_metrics(run)
        set_train_mode(run.optimizer)


def evaluate(run: Run) -> None:
    """Compute metrics and bring them to the host, which waits for the device; then plugins may judge them.

    Does nothing where the run was evaluated after its last step already.
    """
    if run.counters.evaluated == run.attempts:
        return
    set_eval_mode(run.optimizer)            # until the next step, so that the end of an epoch has the weights in use
    found = run.meters.result(run) if run.attempts else {}          # before the first step there are no means
    with new_pass(run):
        found |= run.hook.evaluate(run=run)
    run.metrics = broadcast_from_rank0(run, on_host(without_placeholders(run.metrics, found) | found))
    run.counters.finish_evaluation()
    run.hook.after_evaluate(run=run)


def on_host(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics as Python numbers, which waits for the device."""
    return {name: full_tensor(value).tolist() if hasattr(value, "tolist") else value for name, value in metrics.items()}


def record_metrics(run: Run) -> None:
    """Add the metrics to the history. At the end of an epoch, its row replaces one that was evaluated at the same step.

    Within an epoch, the row's epoch is a fraction, such as 2.25.
    """
    epoch = run.epochs_done if run.seen_in_epoch else run.epoch
    if run.history and run.counters.recorded == run.attempts:
        run.history.pop()
    run.counters.finish_record()
    known = {name: value for name, value in run.metrics.items() if run.attempts or value == value}     # no NaN at first
    run.history.append({"epoch": epoch, "step": run.step, **known, **recorded_rates(run.optimizer)})
