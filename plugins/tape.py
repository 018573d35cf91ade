"""A tape: fingerprints of everything that makes an update, from which `loopctl why` finds where two runs differ."""
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from loopctl import Run, UsageError, hookimpl
from loopctl.checkpoint.atomic_files import claim_output
from loopctl.checkpoint.state import TRAINING_HOOKS, run_config, training_plugins
from loopctl.composition.watching import Watcher, watch_hooks
from loopctl.metrics.step_values import StepLogger
from loopctl.metrics.weights import reported_loss
from loopctl.model.forward import is_compiled
from loopctl.model.own_names import own_buffers
from loopctl.model.ownership import named_parameters
from loopctl.optim.several import each_optimizer
from loopctl.tape.fingerprint import random_states
from loopctl.tape.header import describe_parameters, environment
from loopctl.tape.modules import Modes, ModuleWatch
from loopctl.tape.observations import Observations, Rows
from loopctl.tape.tape_file import TapeWriter

WATCHED = ("epoch_start", "before_step", "optimizer_step", "micro_step", "after_backward", "grads_ready", "after_step",
           "after_evaluate", "epoch_end", "safe_point")
MAX_CALLS = 4           # of the closure in a step, in which gradients are recorded
MAX_BATCHES = 64        # micro-batches of a step that are recorded
MAX_SUMS = 16           # micro-batches of a step up to which the sum of gradients is recorded after each


@dataclass(eq=False)
class Tape(StepLogger, Watcher):
    """Record what makes each update: batch, random numbers, weights, gradients, learning rates.

    `loopctl why A B` compares the tapes of two runs, and says what differs first and what that means; for code without
    loopctl see loopctl.tape.record. Of each tensor there are an exact checksum, the norm and a projection, of gradients
    before and after every plugin that acts on them. Of a model with more than 64 tensors, several share a row. No step
    waits for the device. With several processes each writes a tape: run.tape, run.1.tape and so on. A resumed run
    continues its tape.

    every_steps: how often to record: the first update and every N-th one
    modules: also record the output of every module, and the gradient of the loss with respect to it; not with compile
    path: the file, relative to the run's folder; it must not exist yet
    """

    every_steps: int = 1
    modules: bool = False
    path: str = "run.tape"
    observer_only: ClassVar[bool] = True        # it changes nothing
    topic = "logging and reports"

    @hookimpl
    def train_start(self, run: Run) -> None:
        path = Path(self.path)
        self.file = run.out / (path.with_suffix(f".{run.rank}{path.suffix}") if run.rank else path)
        claim_output(self.file, bool(run.resume), "path")
        for name, other in run.hook.plugins.items():
            if other is not self and isinstance(other, Tape) and other.path == self.path:
                raise UsageError(f"{name} writes to path={self.path} too; choose another path in one of them")
        if self.modules and is_compiled(run):
            raise UsageError("modules=true records what every module returns, and the model is compiled, which makes "
                             "one function of its modules; leave out one of the two")
        self.writer = TapeWriter(self.file)
        self.now: Observations | None = None            # of the step under way, if it is recorded
        self.modules_seen: ModuleWatch | None = None
        self.calls = self.depth = self.micro_batches = 0
        self.versions: list[int] = []                   # of the weights; empty where changes are not followed
        self.changed_by: list[tuple[str, str]] = []     # hook and plugin, in the step under way
        self.swapped: dict[tuple[str, str], bool] = {}  # wrappers under way, and whether each has changed the weights
        self.updating = False                           # from `before_step` to `after_step` of a step that is recorded
        self.evaluated: dict[str, Any] = {}
        self.optimizers = [*each_optimizer(run.optimizer)]
        self.weights, self.buffers = Rows(named_parameters(run)), Rows(own_buffers(run.model))
        self.modes = Modes(run.model)
        observers = {name for name, plugin in run.hook.plugins.items() if getattr(plugin, "observer_only", False)}
        self.changing = {hook: {*run.hook.acting[hook]} - observers for hook in WATCHED}    # plugins, by hook
        watch_hooks(run.hook, WATCHED, self)

    def begin(self, run: Run) -> None:
        header = environment(run.device) | {
            "model": type(run.model).__name__, "rank": run.rank, "world_size": run.world_size, "seed": run.seed,
            "reduction": run.reduction, "config": run.config or run_config(run),
            "acting": {hook: names for hook in TRAINING_HOOKS if (names := acting(run, hook))},
            **describe_parameters(named_parameters(run), self.optimizers)}
        self.writer.begin(header, run.attempts, run.counters.evaluated)

    # A step whose hooks do not run, as in a replayed CUDA graph, cannot be recorded: cudagraph refuses this hook.
    @hookimpl
    def before_step(self) -> None:
        pass

    @hookimpl(wrapper=True)
    def evaluate(self, run: Run) -> Generator[None, Any, Any]:
        before = random_states(run.device)
        found = yield
        self.evaluated = {"before": before, "after": random_states(run.device)}
        return found

    # The methods of a Watcher, which are called at the hooks in WATCHED.

    def entered(self, run: Run, hook: str, arguments: dict[str, Any]) -> None:
        if hook == "before_step":
            self.begin_step(run)
        if self.changing[hook] and (self.versions or self.follows_changes(run, hook)):
            self.versions = self.weights.versions()         # a change between hooks is no plugin's of this one
        if not (now := self.now):
            return
        if hook == "micro_step":
            self.depth += 1                     # `split` calls the hook again for each part of a batch
            if self.depth == 1 and not self.calls and self.micro_batches < MAX_BATCHES:
                self.micro_batches += 1
                now.batch(str(self.micro_batches), arguments["batch"])
        elif hook == "after_backward":
            self.calls += 1
            if self.calls == 1:
                now.random("forward")
            self.add_gradients(run, "backward")
        elif hook == "after_step":
            self.end_step(run)

    def acted(self, run: Run, hook: str, plugin: str, begins: bool) -> None:
        if plugin not in self.changing[hook]:
            return
        if self.now and hook in ("after_backward", "grads_ready"):
            self.add_gradients(run, f"{hook} {plugin}" + " (before)" * begins)
        if self.versions and hook != "optimizer_step":
            self.note_change(run, hook, plugin, begins)

    def follows_changes(self, run: Run, hook: str) -> bool:
        """Whether changes of weights are noted from this hook on: at the start, and where a resumed run goes on."""
        return hook == "epoch_start" and (not run.attempts or self.steps.due(run.attempts))

    def left(self, run: Run, hook: str, result: Any) -> None:
        if self.now and hook == "micro_step":
            self.depth -= 1
            if dtype := getattr(run.outputs, "dtype", None):
                self.now.values["outputs"] = str(dtype).removeprefix("torch.")
            if not self.depth and not self.calls and 1 < len(run.batches) <= MAX_SUMS:     # what each adds to the sum
                self.add_gradients(run, f"backward {self.micro_batches}")
        elif self.now and hook == "grads_ready":
            self.now.groups(self.optimizers)

    def begin_step(self, run: Run) -> None:
        """Begin to record a step if it is due: what its update starts from."""
        if self.modules_seen:
            self.modules_seen.remove()          # of a step that an error has ended
        self.now, self.modules_seen, self.calls, self.depth, self.micro_batches = None, None, 0, 0, 0
        if not self.steps.due(run.attempts + 1):
            self.versions = []
            return
        self.now, self.updating, self.changed_by = Observations(run.device), True, []
        self.now.random("start")
        self.add_state("start")
        self.modes.observe(self.now)
        if self.modules:
            self.modules_seen = ModuleWatch(run.model, run.device)

    def end_step(self, run: Run) -> None:
        """Record what the update has made, before other plugins act after the step."""
        assert self.now
        if self.modules_seen:
            self.modules_seen.close(self.now)
            self.modules_seen = None
        self.now.random("end")
        self.add_state("end")
        if run.loss is not None:
            self.now.scalar("loss", "", reported_loss(run, run.loss, run.weight, run.world_size))
        self.now.scalar("samples weight", "", run.weight)
        self.updating = False
        self.now.values |= {"epoch": run.epoch, "in_epoch": run.attempts - run.counters.began[1],
                            "skipped": run.skipped, "calls": self.calls, "micro_batches": len(run.batches),
                            "changed_by": self.changed_by}

    def add_state(self, point: str) -> None:
        """Add weights, buffers and the optimizer's state."""
        assert self.now
        self.now.tables(point, {"weights": self.weights, "buffers": self.buffers})
        self.now.state(point, self.optimizers)
        self.versions = self.weights.versions()

    def add_gradients(self, run: Run, point: str) -> None:
        """Add the gradients as they are now."""
        if self.now and self.calls <= MAX_CALLS:
            turn = f"{run.turn}: " * bool(run.turn)
            again = f" (call {self.calls})" * (self.calls > 1 and not run.turn)
            self.now.table("gradients", f"{turn}{point}{again}", self.weights.names, self.weights.gradients())

    def note_change(self, run: Run, hook: str, plugin: str, begins: bool) -> None:
        """Note a plugin that has just changed the weights, as far as torch counts that.

        Between two updates that is a record of its own, which a checkpoint that follows has behind it.
        """
        versions = self.weights.versions()
        changed, self.versions = versions != self.versions, versions
        before = self.swapped.pop((hook, plugin), False)
        if begins:
            self.swapped[hook, plugin] = changed
        elif changed == before:             # nothing, or other weights for the time of the hook, as of an average
            return
        elif self.updating:
            self.changed_by.append((hook, plugin))
        else:
            self.attempt(self.writer.add, {"kind": "changed", "update": run.attempts, "by": [hook, plugin]})

    # The methods of a StepLogger.

    def values(self, run: Run) -> dict[str, Any]:
        now, self.now = self.now, None
        if not now:
            return {}
        return {"vector": now.vector(), "points": now.points, "values": now.values}

    def write_values(self, run: Run, step: int, values: dict[str, Any]) -> None:
        if not values:
            return
        self.writer.add_update(step, **values)

    def write_metrics(self, run: Run) -> None:
        metrics = {name: value for name, value in run.metrics.items() if isinstance(value, int | float)}
        self.writer.add({"kind": "evaluation", "update": run.attempts, "epoch": run.epoch, "random": self.evaluated,
                         "metrics": metrics})
        self.writer.flush()

    def flush(self) -> None:
        self.writer.flush()

    def end(self, run: Run, error: BaseException | None) -> None:
        if self.modules_seen:
            self.modules_seen.remove()          # of a step that an error has ended
            self.modules_seen = None
        why = f"{type(error).__name__}" if error else run.stop or run.leave
        self.writer.add({"kind": "end", "update": run.attempts, "why": str(why)})
        self.writer.close()

    def target(self) -> Path:
        return self.file


def acting(run: Run, hook: str) -> list[str]:
    """The plugins that can change what is trained at a hook, in the order in which they act."""
    training = training_plugins(run)
    return [name for name in run.hook.acting[hook] if name in training]
