"""The training loop. It says when; plugins say what.

Read it from the top: `fit` prepares a run, `train` goes through epochs, `epoch` through steps, and a step is one update
of the parameters from the gradients of one or more micro-batches. Every `hook.` is a moment that plugins can join.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loopctl.batches import moved
from loopctl.checkpoint import restore
from loopctl.compose import blame, compose
from loopctl.errors import UsageError
from loopctl.feed import feeding
from loopctl.hooks import hookimpl
from loopctl.meters import Meters
from loopctl.pieces import whole
from loopctl.prepare import prepare
from loopctl.rates import set_rates
from loopctl.run import Run
from loopctl.updates import zero_grad
from loopctl.world import restarts, told


def fit(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | torch.optim.Optimizer,
    train: Iterable[Any],
    valid: Iterable[Any] | None = None,
    epochs: int = 1,
    max_steps: int | None = None,
    eval_every: int | None = None,
    plugins: Iterable[Any] = (),
    metrics: dict[str, Callable[[Any, Any], Any]] | None = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    resume: str | Path | None = None,
    steps_per_epoch: int | None = None,
    out: str | Path = ".",
) -> Run:
    """Train `model` and return the run: `run.history` has one dict per epoch, `run.stop` why it ended early, or "".

    loss_fn: `loss_fn(output, target)`, the mean over the batch; None where a plugin replaces `compute_loss`.
    optimizer: a factory of parameter groups, such as `partial(torch.optim.SGD, lr=0.1)`, or an optimizer.
    train, valid: iterables of (input, target) batches, such as a DataLoader or a list; tensors nest as they like.
    epochs, max_steps: passes over `train`, and updates; whichever comes first ends the run.
    eval_every: evaluate every so many steps too, not only at every epoch's end.
    plugins: instances, or strings as on the command line (`"clip:max_norm=1"`); they act in the order given.
    metrics: by name, `fn(output, target)` that returns a mean over the batch, or torchmetrics objects.
    device: where to train; None is where the model is, "auto" is cuda, then mps, then cpu.
    seed: seeds Python, NumPy and torch before anything else.
    resume: a checkpoint, or a folder that has one, from which to go on. Started again by torchrun, it goes on in `out`.
    steps_per_epoch: updates per epoch; needed where `train` has no length.
    out: the folder that plugins write to.

    Raises UsageError, before anything is trained, where something asked for cannot be done.
    """
    run = Run(model, loss_fn, optimizer, train, valid, epochs, inf if max_steps is None else max_steps, eval_every,
              steps_per_epoch, out=Path(out), resume=Path(resume) if resume else Path(out) if restarts() else None)
    run.hook = compose(plugins)
    with blame(run.hook):
        prepare(run, metrics, device, seed)
        run.hook.train(run=run)
    return run


@hookimpl(trylast=True)
def train(run: Run) -> None:
    run.hook.train_start(run=run)
    with feeding(run):
        if run.resume:
            restore(run)
        while not run.over:
            epoch(run)
    run.hook.train_end(run=run)


def epoch(run: Run) -> None:
    """One pass over the training data, or what is left of it where the run goes on, then an evaluation."""
    hook = run.hook
    if not run.batch:
        run.meters = Meters(run.metric_fns["train"], "train_")
    run.model.train()
    hook.epoch_start(run=run)
    if not ends(run):
        for batches in hook.group_batches(run=run, batches=moved(run.feeds["train"], run.device)):
            step(run, batches)
            hook.safe_point(run=run)
            if ends(run):
                break
    if not run.batch and run.ends:
        return
    if not run.batch:
        raise UsageError(f"train gave no batches in epoch {run.epoch + 1}; pass a list or a DataLoader, no iterator")
    run.epoch, run.began = run.epoch + 1, (run.seen, run.attempts)
    evaluate(run)
    lr = float(run.optimizer.param_groups[0]["lr"])
    run.history.append({"epoch": run.epoch, "step": run.step, **run.metrics, "lr": lr})
    hook.epoch_end(run=run)
    hook.safe_point(run=run)


def ends(run: Run) -> bool:
    """Whether the epoch ends here, before its data does. Where an evaluation is due within it, that comes first."""
    if run.eval_every and run.attempts % run.eval_every == 0:
        evaluate(run)
    return run.ends or run.attempts - run.began[1] == run.steps_per_epoch


def step(run: Run, batches: list[Any]) -> None:
    """One update of the parameters, from a list of micro-batches."""
    hook, run.batches, run.loss = run.hook, batches, None
    if hook.acting["lr_scale"]:
        set_rates(run)
    weights = [hook.batch_weight(run=run, batch=batch) for batch in batches]
    run.weight, run.skipped = sum(weights), False
    hook.before_step(run=run)
    hook.optimizer_step(run=run, closure=partial(gradients, run, weights))
    if run.loss is not None:
        run.meters.loss.add(run.loss, run.weight)
    run.attempts += 1
    run.seen += len(batches)
    run.step += not run.skipped
    hook.after_step(run=run)


def gradients(run: Run, weights: list[Any]) -> Tensor:
    """Clear the gradients and compute them anew; return the loss. This is the closure of `optimizer.step(closure)`."""
    hook, losses, meters = run.hook, [], run.meters
    first = run.loss is None            # an optimizer may look again; what the run reports is its first look
    zero_grad(run.optimizer)
    for number, (batch, weight) in enumerate(zip(run.batches, weights, strict=True), 1):
        share, last = weight / run.weight, number == len(weights)
        losses.append(hook.micro_step(run=run, batch=batch, weight=share, last=last))
        if first and meters.functions:
            meters.observe(run.outputs, batch, weight)
    loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
    if first:
        run.loss = loss
    hook.after_backward(run=run)
    hook.grads_ready(run=run)
    return loss


def evaluate(run: Run) -> None:
    """Bring fresh metrics to the host, which is when the loop waits for the device, and have plugins judge them."""
    if run.judged == run.attempts:
        return
    run.metrics |= run.meters.result(run) | run.hook.evaluate(run=run)
    for name, value in run.metrics.items():
        if hasattr(value, "tolist"):
            run.metrics[name] = whole(value).tolist()
    run.metrics = told(run, run.metrics)
    run.judged = run.attempts
    run.hook.after_evaluate(run=run)
