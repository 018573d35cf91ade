"""Steps that are not finite."""
from cmath import isfinite
from collections import deque
from collections.abc import Generator
from copy import deepcopy
from dataclasses import dataclass
from math import inf
from operator import is_
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import get_total_norm

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.state import roll_back
from loopctl.distributed.process_group import AgreedStop, all_reduce_max
from loopctl.metrics.host_copy import HostCopy

AHEAD = ("cuda",)       # devices that work ahead of the host, which would have to wait for a value


@dataclass(eq=False)
class NanGuard:
    """Let no step whose loss or gradient is NaN or infinite change anything.

    Weights, optimizer and BatchNorm statistics are to the last bit what they were before the step. Gradients are judged
    before others clip them, and each time where an optimizer wants them several times; but LBFGS may well look where
    nothing is finite, so for it the first ones count, and the weights that it ends with. An overflow that float16
    scaling skips is its own affair. The metric skipped_steps counts the steps; train_loss, the mean of an epoch, is NaN
    where one of its losses is.

    On CUDA a step is undone on the device, and the host hears of it some steps later, when run.skipped cannot say so
    any more: ema counts the weights before it twice. It costs least with fused optimizers. Those that count steps on
    the host, such as Adam that is neither fused nor capturable, are waited for in every step.

    action: stop ends the run; skip goes on with the next batches; rollback does too, but from the last checkpoint, as
        PaLM did, arXiv:2204.02311
    limit: such steps in a row that end the run, with skip and rollback
    """

    action: Literal["stop", "skip", "rollback"] = "stop"
    limit: int = 20

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"limit is at least 1, not {self.limit}")

    @hookimpl
    def setup(self, run: Run) -> None:
        self.run: Run | None = None
        self.in_a_row = 0
        self.due = ""                                                   # why to go back, until that is done
        self.kept: list[Tensor] = []                                    # what a step may change,
        self.copies: list[Tensor] = []                                  # and what it was before
        self.coming: deque[tuple[int, bool, HostCopy]] = deque()        # verdicts on their way to the host
        if self.action != "stop":
            run.metrics["skipped_steps"] = 0

    @hookimpl
    def train_start(self, run: Run) -> None:
        self.run = run
        if self.action == "rollback" and not run.hook.acting["safe_point"]:
            raise UsageError("action=rollback goes back to the last checkpoint, and nobody saves one; add checkpoint")
        self.statistics = [buffer for module in run.model.modules() if isinstance(module, _NormBase)
                           for buffer in module.buffers(recurse=False)]
        self.parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
        self.searches = isinstance(run.optimizer, torch.optim.LBFGS)
        # Torch's optimizers do nothing at all without gradients, but for LBFGS; of others nobody knows.
        self.simple = type(run.optimizer).__module__.startswith("torch.optim.") and not self.searches
        self.states: dict[Any, Any] = {}                # of the optimizer, before the step, where that is of use
        self.groups: list[dict[str, Any]] = []
        # Fused ones do nothing where the device says found_inf, which float16 scaling, if it is there, says itself.
        self.told = (getattr(run.optimizer, "_step_supports_amp_scaling", False)
                     and len(run.hook.acting["optimizer_step"]) == 1)

    @hookimpl
    def before_step(self, run: Run) -> None:
        self.what = ""                  # what is not finite, if the host knows
        self.bad: Any = None            # whether loss and gradient are not, if the device does
        self.looked = False
        tensors, states = self.statistics, run.optimizer.state
        self.late = self.simple and run.device.type in AHEAD
        if self.late:
            held = [*self.parameters, *(value for state in states.values() for value in state.values())]
            self.late = all(isinstance(value, Tensor) and value.device == held[0].device for value in held)
            self.states = {parameter: state for parameter, state in states.items() if state}
            if self.late and not self.told:
                tensors = [*tensors, *held]
        elif not self.simple:
            tensors = [*tensors, *self.parameters]
            self.states = {parameter: deepcopy(state) for parameter, state in states.items()}
            self.groups = [dict(group) for group in run.optimizer.param_groups]
        if tensors or self.kept:
            self.keep(tensors)

    # A wrapper, so that the gradients are judged before anybody clips them, and gone only when all have seen them.
    @hookimpl(wrapper=True)
    def grads_ready(self, run: Run) -> Generator[None, None, None]:
        self.judge(run)
        result = yield
        if self.what:
            run.optimizer.zero_grad()
        elif self.late and self.told:
            run.optimizer.found_inf = self.bad.any().float()
        return result

    @hookimpl(wrapper=True)
    def optimizer_step(self, run: Run) -> Generator[None, Tensor, Tensor]:
        try:
            loss = yield
        finally:
            vars(run.optimizer).pop("found_inf", None)
        if self.late and self.bad is not None:
            self.conclude_there(run)
        elif self.what or not self.simple:
            self.conclude(run)
        else:
            self.in_a_row = 0
        if self.due:
            self.go_back(run)
        return loss

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Generator[None, dict[str, Any], dict[str, Any]]:
        self.hear(run, wait=True)       # an evaluation waits for the device in any case
        return (yield)

    # Not in evaluate, where an average may stand in for the weights.
    @hookimpl(wrapper=True)
    def epoch_end(self, run: Run) -> Generator[None, None, None]:
        if self.due:
            self.go_back(run)
        return (yield)

    @torch.no_grad()
    def keep(self, tensors: list[Tensor]) -> None:
        if len(tensors) != len(self.kept) or not all(map(is_, tensors, self.kept)):
            self.kept, self.copies = list(tensors), [tensor.clone() for tensor in tensors]
        else:
            torch._foreach_copy_(self.copies, tensors)

    def judge(self, run: Run) -> None:
        gradients = [gradient for parameter in self.parameters if (gradient := parameter.grad) is not None]
        assert run.loss is not None
        if self.late:
            largest = get_total_norm(gradients, inf)        # no sum, which may be infinite where no term is
            bad = torch.stack((run.loss, largest.to(run.loss.device))).isfinite().logical_not()
            bad = all_reduce_max(run, bad.int()).bool()          # the loss is each process's own
            self.bad = bad if self.bad is None else self.bad | bad
        elif not (self.what or (self.searches and self.looked)):
            self.looked = True
            what = ("", "gradient", "loss")
            found = 2 if not isfinite(run.loss.item()) else 0 if finite(gradients) else 1
            self.what = what[int(all_reduce_max(run, found))]    # the loss is each process's own

    def conclude_there(self, run: Run) -> None:
        """Have the device undo the step if it was bad, and tell the host about it."""
        if all(parameter in self.states for parameter, state in run.optimizer.state.items() if state):
            self.put_back(run, self.bad[0] if run.skipped else self.bad.any())
            self.send(run)
            self.hear(run, wait=run.step + 1 >= run.max_steps)      # whether it is the last, the loop must know
        else:           # state is new, so there is nothing to put back: wait, once in a run or where parts thaw
            self.hear(run, wait=True)
            self.what = named(*self.bad.tolist())
            self.conclude(run)

    def conclude(self, run: Run) -> None:
        """Undo the step if it was bad."""
        if self.what == "gradient" and run.skipped:
            self.what = ""
        if not self.what and not self.simple and not finite([parameter.detach() for parameter in self.parameters]):
            self.what = "update"
        if self.what:
            self.put_back(run)
            run.skipped = True
        self.note(run, run.attempts + 1, self.what)

    @torch.no_grad()
    def put_back(self, run: Run, bad: Tensor | None = None) -> None:
        """Undo the step, or with `bad`, a flag on the device, undo it where that is true."""
        for now, before in zip(self.kept, self.copies, strict=True):
            if bad is None:
                now.copy_(before)
            else:
                torch.where(bad, before, now, out=now)
        if bad is None and (self.late or not self.simple):
            run.optimizer.state.clear()
            run.optimizer.state.update(self.states)
            for group, was in zip(run.optimizer.param_groups, self.groups, strict=False):
                group.update(was)

    def send(self, run: Run) -> None:
        """Have the verdict copied to the host, without waiting."""
        self.coming.append((run.attempts + 1, run.skipped, HostCopy(self.bad)))

    def hear(self, run: Run, wait: bool = False) -> None:
        """Take note of the verdicts that have arrived."""
        while self.coming and (wait or self.coming[0][2].arrived):
            step, skipped, verdict = self.coming.popleft()
            what = named(*verdict.wait().tolist())
            if what == "gradient" and skipped:
                what = ""
            if what and not skipped:
                if step > run.attempts:         # the step at hand, which is not counted yet
                    run.skipped = True
                else:
                    run.counters.discard_update()
            self.note(run, step, what)

    def note(self, run: Run, step: int, what: str) -> None:
        """Count a step, and decide what follows from it; `what` was not finite in it, if anything."""
        self.in_a_row = self.in_a_row + 1 if what else 0
        if what and self.action != "stop":
            run.metrics["skipped_steps"] = run.metrics.get("skipped_steps", 0) + 1      # a resumed run may not have it
        if not what or run.stop:
            return
        fact = f"the {what} of step {step} is not finite"
        if self.action == "stop":
            self.end(run, f"{fact}; nothing of that step was kept, and action=skip would go on")
        elif self.in_a_row >= self.limit:
            self.end(run, f"{fact}: {self.in_a_row} in a row, which is the limit")
        elif self.action == "rollback":
            self.due = fact

    def end(self, run: Run, reason: str) -> None:
        run.stop = run.stop or (AgreedStop(reason) if run.world_size > 1 else reason)     # all judge alike

    def go_back(self, run: Run) -> None:
        self.hear(run, wait=True)       # of the steps that this undoes
        if run.last_checkpoint is None:
            self.end(run, f"{self.due}, and there is no checkpoint yet to go back to")
        else:
            in_a_row = self.in_a_row
            roll_back(run)
            self.in_a_row = in_a_row    # else going back would never come to the limit
        self.due = ""

    def state_dict(self) -> dict[str, Any]:
        if self.run:
            self.hear(self.run, wait=True)      # what is written has the right count of updates
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]


def named(loss: bool, gradient: bool) -> str:
    return "loss" if loss else "gradient" if gradient else ""


def finite(tensors: list[Tensor]) -> bool:
    """Whether every number is finite. The host waits for the answer."""
    if tensors and not tensors[0].is_cpu:
        return isfinite(get_total_norm(tensors, inf).item())
    # The terms of a finite sum are finite. The reverse does not hold, for a sum may overflow, but that is rare.
    return all(isfinite(tensor.sum().item()) or isfinite(get_total_norm([tensor], inf).item()) for tensor in tensors)
