"""`StepGuard`: the base class of plugins that undo bad steps, such as nan_guard and spike."""
from __future__ import annotations

from cmath import isfinite
from collections import deque
from collections.abc import Generator
from copy import deepcopy
from math import inf
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import get_total_norm

from loopctl.checkpoint.state import roll_back
from loopctl.distributed.process_group import AgreedStop
from loopctl.errors import UsageError, names
from loopctl.hooks import hookimpl
from loopctl.metrics.host_copy import HostCopy

if TYPE_CHECKING:
    from loopctl.run import Run

ASYNCHRONOUS = ("cuda",)        # devices whose values the host would have to wait for


class StepGuard:
    """Undo every step that `examine` finds bad: by its loss or by its gradients, before any plugin changes these.

    Weights, optimizer and BatchNorm statistics are to the last bit what they were before the step. A step is then
    skipped, ends the run, or has it go back to the last checkpoint, as `action` says: "skip", "stop" or "rollback".
    `limit` bad steps in a row end the run in any case. Subclasses have these two options, and override `examine` and
    `report`.

    On CUDA a step is undone on the device, and the host learns of it some steps later.
    """

    action: Any
    limit: int

    @hookimpl
    def setup(self, run: Run) -> None:
        guards = [name for name, plugin in run.hook.plugins.items() if isinstance(plugin, StepGuard)]
        if len(guards) > 1:
            raise UsageError(f"{names(guards)} would undo the same steps; leave out all but one: each of them undoes "
                             "those that are not finite")
        if run.turns:
            raise UsageError("several optimizers with a loss each: the update of one cannot be undone alone; leave out "
                             f"{names(guards)}")
        self.run: Run | None = None
        self.in_a_row = 0
        self.due = ""                                                   # why a rollback is due, until it is done
        self.guarded: list[Tensor] = []                                 # tensors that a step may change,
        self.copies: list[Tensor] = []                                  # and their values before it
        self.coming: deque[tuple[dict[str, Any], HostCopy]] = deque()   # verdicts on their way to the host
        if self.action != "stop":
            run.metrics["skipped_steps"] = 0

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.run = run
        if self.action == "rollback" and not run.hook.acting["safe_point"]:
            raise UsageError("action=rollback needs checkpoints to go back to, and no plugin saves any; add checkpoint")
        self.statistics = [buffer for module in run.model.modules() if isinstance(module, _NormBase)
                           for buffer in module.buffers(recurse=False)]
        self.parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
        self.line_search = isinstance(run.optimizer, torch.optim.LBFGS)
        # Of torch's optimizers all but LBFGS do nothing at all without gradients; others may do anything.
        self.simple = type(run.optimizer).__module__.startswith("torch.optim.") and not self.line_search
        self.states: dict[Any, Any] = {}                # of the optimizer before the step, where they are needed
        self.groups: list[dict[str, Any]] = []
        # Fused optimizers skip the update on the device if found_inf is set. With float16 scaling, amp sets it.
        self.found_inf_supported = (getattr(run.optimizer, "_step_supports_amp_scaling", False)
                     and len(run.hook.acting["optimizer_step"]) == 1)

    @hookimpl
    def before_step(self, run: Run) -> None:
        self.what = ""                  # what is bad: loss, gradient or update, as far as the host knows
        self.bad: Any = None            # on the device: whether the loss and the gradient are bad
        self.evidence: Any = None       # on the device: numbers that `examine` has found, for `report`
        self.checked = False
        tensors, states = self.statistics, run.optimizer.state
        self.deferred = self.simple and run.device.type in ASYNCHRONOUS
        if self.deferred:
            held = [*self.parameters, *(value for state in states.values() for value in state.values())]
            self.deferred = all(isinstance(value, Tensor) and value.device == held[0].device for value in held)
            self.states = {parameter: state for parameter, state in states.items() if state}
            if self.deferred and not self.found_inf_supported:
                tensors = [*tensors, *held]
        elif not self.simple:
            tensors = [*tensors, *self.parameters]
            self.states = {parameter: deepcopy(state) for parameter, state in states.items()}
            self.groups = [dict(group) for group in run.optimizer.param_groups]
        if tensors or self.guarded:
            self.copy_guarded(tensors)

    # A wrapper, so that gradients are checked before any plugin clips them and cleared after every plugin has run.
    @hookimpl(wrapper=True)
    def grads_ready(self, run: Run) -> Generator[None, None, None]:
        self.check_gradients(run)
        result = yield
        if self.what:
            run.optimizer.zero_grad()
        elif self.deferred and self.found_inf_supported:
            run.optimizer.found_inf = self.bad.any().float()
        return result

    @hookimpl(wrapper=True)
    def optimizer_step(self, run: Run) -> Generator[None, Tensor, Tensor]:
        try:
            loss = yield
        finally:
            vars(run.optimizer).pop("found_inf", None)
        if self.deferred and self.bad is not None:
            self.undo_on_device(run)
        elif self.what or not self.simple:
            self.undo_if_bad(run)
        else:
            self.in_a_row = 0
        if self.due:
            self.roll_back(run)
        return loss

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Generator[None, dict[str, Any], dict[str, Any]]:
        self.read_verdicts(run, wait=True)       # an evaluation waits for the device in any case
        return (yield)

    # Not in evaluate, where averaged weights may be in place of the model's own.
    @hookimpl(wrapper=True)
    def epoch_end(self, run: Run) -> Generator[None, None, None]:
        if self.due:
            self.roll_back(run)
        return (yield)

    def examine(self, run: Run, gradients: list[Tensor]) -> Tensor:
        """Return whether the loss and the gradients are bad, two booleans on the device, the same in all processes.

        It may set `self.evidence` to a vector of what `report` needs.
        """
        raise NotImplementedError

    def examine_at_once(self, run: Run, gradients: list[Tensor]) -> str:
        """Return what is bad, "loss" or "gradient", or ""; waits for the device."""
        return first_bad(*self.examine(run, gradients).tolist())

    def report(self, run: Run, step: dict[str, Any], what: str, evidence: list[float]) -> str:
        """Return what is bad about a step, for a message. `step`: what `describe_step` returned."""
        return f"the {what} of step {step['step']} is not finite"

    def describe_step(self, run: Run) -> dict[str, Any]:
        """Return what identifies the current step, for `report`, which may be called some steps later."""
        return {"step": run.attempts + 1, "skipped": run.skipped}

    @torch.no_grad()
    def copy_guarded(self, tensors: list[Tensor]) -> None:
        if len(tensors) != len(self.guarded) or not all(map(is_, tensors, self.guarded)):
            self.guarded, self.copies = list(tensors), [tensor.clone() for tensor in tensors]
        else:
            torch._foreach_copy_(self.copies, tensors)

    @torch.no_grad()
    def check_gradients(self, run: Run) -> None:
        gradients = [gradient for parameter in self.parameters if (gradient := parameter.grad) is not None]
        if self.deferred:
            bad, evidence = self.bad, self.evidence
            self.bad = self.examine(run, gradients)
            if bad is not None:         # the gradients are computed again in this step
                self.bad = self.bad | bad
                self.evidence = None if evidence is None else torch.where(bad.any(), evidence, self.evidence)
        elif not (self.what or (self.line_search and self.checked)):
            self.checked = True
            self.what = self.examine_at_once(run, gradients)

    def undo_on_device(self, run: Run) -> None:
        """Undo the step on the device if it was bad, and send the verdict to the host."""
        if all(parameter in self.states for parameter, state in run.optimizer.state.items() if state):
            self.undo(run, self.bad[0] if run.skipped else self.bad.any())
            self.send_verdict(run)
            self.read_verdicts(run, wait=run.step + 1 >= run.max_steps)     # the loop must know if it was the last
        else:           # new optimizer state has no earlier value: wait, once in a run and when parts are unfrozen
            self.read_verdicts(run, wait=True)
            self.what = first_bad(*self.bad.tolist())
            self.undo_if_bad(run)

    def undo_if_bad(self, run: Run) -> None:
        """Undo the step if it was bad."""
        step = self.describe_step(run)
        if self.what == "gradient" and run.skipped:
            self.what = ""
        if not self.what and not self.simple and not finite([parameter.detach() for parameter in self.parameters]):
            self.what = "update"
        if self.what:
            self.undo(run)
            run.skipped = True
        self.count_step(run, step, self.what, self.evidence.tolist() if self.what and self.evidence is not None else [])

    @torch.no_grad()
    def undo(self, run: Run, bad: Tensor | None = None) -> None:
        """Undo the step; with `bad`, a flag on the device, only if that is true."""
        for tensor, before in zip(self.guarded, self.copies, strict=True):
            if bad is None:
                tensor.copy_(before)
            else:
                torch.where(bad, before, tensor, out=tensor)
        if bad is None and (self.deferred or not self.simple):
            run.optimizer.state.clear()
            run.optimizer.state.update(self.states)
            for group, was in zip(run.optimizer.param_groups, self.groups, strict=False):
                group.update(was)

    def send_verdict(self, run: Run) -> None:
        """Copy the verdict to the host without waiting."""
        verdict = self.bad if self.evidence is None else torch.cat((self.bad.to(self.evidence.dtype), self.evidence))
        self.coming.append((self.describe_step(run), HostCopy(verdict)))

    def read_verdicts(self, run: Run, wait: bool = False) -> None:
        """Act on the verdicts that have arrived on the host."""
        while self.coming and (wait or self.coming[0][1].arrived):
            step, verdict = self.coming.popleft()
            loss, gradient, *evidence = verdict.wait().tolist()
            what = first_bad(loss, gradient)
            if what == "gradient" and step["skipped"]:
                what = ""
            if what and not step["skipped"]:
                if step["step"] > run.attempts:         # the current step, which is not counted yet
                    run.skipped = True
                else:
                    run.counters.discard_update()
            self.count_step(run, step, what, evidence)

    def count_step(self, run: Run, step: dict[str, Any], what: str, evidence: list[float]) -> None:
        """Count a step and decide what to do; `what` names what was bad in it, if anything."""
        self.in_a_row = self.in_a_row + 1 if what else 0
        if not what:
            return
        if self.action != "stop":
            run.metrics["skipped_steps"] = run.metrics.get("skipped_steps", 0) + 1      # a resumed run may not have it
        fact = self.report(run, step, what, evidence)
        if run.stop:
            return
        if self.action == "stop":
            self.end(run, f"{fact}; the step was undone, and action=skip would continue")
        elif self.in_a_row >= self.limit:
            self.end(run, f"{fact}: {self.in_a_row} in a row, which is the limit")
        elif self.action == "rollback":
            self.due = fact

    def end(self, run: Run, reason: str) -> None:
        run.stop = run.stop or (AgreedStop(reason) if run.world_size > 1 else reason)     # every process stops here

    def roll_back(self, run: Run) -> None:
        self.read_verdicts(run, wait=True)      # of the steps that this undoes
        if run.last_checkpoint is None:
            self.end(run, f"{self.due}, and there is no checkpoint yet to go back to")
        else:
            in_a_row = self.in_a_row
            roll_back(run)
            self.in_a_row = in_a_row    # not restored, or rollbacks would never reach the limit
        self.due = ""

    def state_dict(self) -> dict[str, Any]:
        if self.run:
            self.read_verdicts(self.run, wait=True)     # so that the count of updates in the checkpoint is right
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]


def first_bad(loss: float, gradient: float) -> str:
    return "loss" if loss else "gradient" if gradient else ""


def finite(tensors: list[Tensor]) -> bool:
    """Whether every number is finite. Waits for the device."""
    if tensors and not tensors[0].is_cpu:
        return isfinite(get_total_norm(tensors, inf).item())
    # If a sum is finite, so is every term. If it is not, it may have overflowed, so the largest term is checked.
    return all(isfinite(tensor.sum().item()) or isfinite(get_total_norm([tensor], inf).item()) for tensor in tensors)
