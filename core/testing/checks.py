"""Conformance checks for plugins: what is expected of any plugin, as functions that its author runs in tests.

The name of a check says what holds if it passes; its docstring says how this is tested. The checks train `tiny_run`s,
and restore global state that a faulty plugin changes.
"""
from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Any, get_args, get_origin
from unittest import SkipTest

from loopctl.composition.compose import FLAGS, compose, find_culprit
from loopctl.composition.discovery import available, build_plugin, plugin_name, split_spec
from loopctl.composition.option_types import as_written, describe_type, fits_type, is_same
from loopctl.composition.options import Option, parse_options, plugin_options, to_spec
from loopctl.data.batch import length_or_none
from loopctl.errors import UsageError, names, one_line
from loopctl.hooks import hookimpl
from loopctl.rng import host_rng_state
from loopctl.run import Run
from loopctl.testing.comparison import class_data, first_difference, run_result
from loopctl.testing.global_state import isolated, read_switches
from loopctl.testing.probes import (
    FailingLoader,
    InnerRandomProbe,
    Killed,
    OuterRandomProbe,
    PlantedError,
    RestoredStateProbe,
    SaveAndKill,
    StopEarly,
    TrainingModeProbe,
    Tripwire,
    changed_generators,
)
from loopctl.testing.tiny import default_arguments, scratch_folder, tiny_run

# Options for the built-ins that `composes` cannot run with their defaults, or not quickly.
EXAMPLES = {
    "compile": "backend=eager",
    "cosine_restarts": "t_0=1",
    "cyclic": "base_lr=0.01,max_lr=0.1,step_size_up=3",
    "distill": "teacher=loopctl.testing.tiny:tiny_model",
    "exponential": "gamma=0.9",
    "float8": "modules=0,emulate=true",
    "freeze": "patterns=0",
    "inverse_sqrt": "timescale=3",
    "lambda": "lr_lambda=math:exp",
    "layerwise_lr": "decay=0.5",
    "lora": "target_modules=0",
    "lr_finder": "num_steps=5",
    "max_time": "limit=1h",
    "multiplicative": "lr_lambda=math:cos",
    "multistep": "milestones=1",
    "onecycle": "max_lr=0.1",
    "profile": "start=1,steps=1",
    "prune": "amount=0.5",
    "qat": "group_size=0",
    "step": "step_size=1",
    "swa": "start=50%",
    "torch_scheduler": "cls=torch.optim.lr_scheduler:ExponentialLR,gamma=0.9",
    "trapezoidal": "max_lr=0.2,step_size=25%",
    "wandb": "mode=disabled",
}

# The hooks of a step. In these the host must not wait for the device.
IN_STEPS = ("group_batches", "lr_scale", "transform_batch", "batch_weight", "before_step", "optimizer_step",
            "micro_step", "compute_loss", "backward", "after_backward", "grads_ready", "after_step", "safe_point")


@dataclass(eq=False)
class Subject:
    """The plugin to check, the arguments of `plugin_checks`, and the outcomes so far."""

    plugin: Any
    options: Mapping[str, Any]
    draws_random: bool
    waits: bool
    measured: Collection[str]
    skip: Mapping[str, str]
    fit_arguments: Mapping[str, Any]
    results: dict[str, Exception | None] = field(default_factory=dict)      # by check: what it raised, or None

    def make(self) -> Any:
        """Return a new instance of the plugin."""
        if not isinstance(self.plugin, str):
            return self.plugin(**self.options)
        # `build_plugin` loads a file anew on each call, so that each instance would have a class of its own, and
        # `shares_nothing` could not find state that instances share.
        text = split_spec(self.plugin)[1]
        return self.cls(**parse_options(plugin_name(self.cls), text, plugin_options(self.cls)) | dict(self.options))

    @cached_property
    def cls(self) -> type:
        """The plugin's class."""
        if isinstance(self.plugin, str):
            return type(build_plugin(self.plugin)[1])
        return self.plugin if isinstance(self.plugin, type) else type(self.make())

    def arguments(self) -> dict[str, Any]:
        """Return the arguments for `fit`, copied so that runs do not affect each other."""
        return default_arguments() | {"epochs": 3} | deepcopy(dict(self.fit_arguments))

    def run(self, *plugins: Any, **others: Any) -> Run:
        """Train with `plugins` and return the run; `others` replace arguments of `fit`."""
        with isolated():
            return tiny_run(*plugins, **self.arguments() | others)

    def alone(self) -> Run:
        """Train with a new instance of the plugin only."""
        return self.run(self.make())


class CheckFailed(AssertionError):
    """The plugin does not do what a check expects."""


# The checks, in the order in which they run.


def options_are_documented(subject: Subject) -> None:
    """Every option has a type and a line of help in the docstring; a default, if it has one, is of that type.

    An instance's options, written as command-line text and parsed again, are the same.
    """
    cls = subject.cls
    if not dataclasses.is_dataclass(cls):
        if given := [*inspect.signature(cls).parameters]:
            raise CheckFailed(f"is not a dataclass, so {names(given)} cannot be an option; write @dataclass(eq=False)")
        return
    if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):       # what dataclass generates
        raise CheckFailed("has no docstring; write one, it is the help of the plugin")
    if untyped := list(untyped_fields(cls)):
        raise CheckFailed(f"{untyped[0]} has no type, so it is not an option; write {untyped[0]}: float = ..., or "
                          "ClassVar")
    known = plugin_options(cls)
    for option in known.values():
        hint = get_args(option.type)[0] if get_origin(option.type) is Annotated else option.type
        if describe_type(hint) == "a value":
            raise CheckFailed(f"{option.name} has the type {option.type}, against which text cannot be checked; use "
                              "int, float, bool, str, Path, Literal, Duration, or list or dict of them")
        if option.default is not dataclasses.MISSING and not fits_type(option.default, option.type):
            raise CheckFailed(f"{option.name} takes {describe_type(hint)}, and its default is {option.default!r}")
        if not option.help:
            raise CheckFailed(f"{option.name} has no help; add a line '{option.name}: what it means' to the docstring")
    check_round_trip(subject.make(), known)


def untyped_fields(cls: type) -> Iterator[str]:
    """Yield the names of a class's public data attributes without an annotation, except those that loopctl reads."""
    typed = {name for kind in cls.__mro__ for name in inspect.get_annotations(kind)} | {*FLAGS, "topic"}
    for kind in cls.__mro__[:-1]:
        for name, value in vars(kind).items():
            plain = not callable(value) and not hasattr(value, "__get__")
            if plain and name not in typed and not name.startswith("_") and not name.isupper() and value is not None:
                yield name


def check_round_trip(plugin: Any, known: dict[str, Option]) -> None:
    """Check that a plugin built from the command-line text of `plugin` has the same options."""
    try:
        text = to_spec("it", plugin).partition(":")[2]
    except UsageError:                      # an option that text cannot express, such as a nested function
        return
    again = type(plugin)(**parse_options("it", text, known))
    for name, option in known.items():
        value, read = (as_written(getattr(built, name), option.type) for built in (plugin, again))
        if not is_same(value, read):
            raise CheckFailed(f"{name} is {value!r}, is written as {text!r}, and reads back as {read!r}")


def hooks_exist(subject: Subject) -> None:
    """Each hook that the plugin implements exists and has the arguments that it declares; `fit` accepts the plugin."""
    compose([subject.make()])


def trains(subject: Subject) -> None:
    """A run with the plugin reaches its end and makes at least one update."""
    if not subject.alone().step:
        raise CheckFailed("made no update in the whole run")


def repeats(subject: Subject) -> None:
    """Two runs with the same seed, each with a new instance, are the same to the last bit."""
    if difference := runs_differ(subject, subject.alone(), subject.alone()):
        raise CheckFailed(f"two runs with the same seed differ: {difference}")


def composes(subject: Subject) -> None:
    """It trains before and after each built-in, or one of the two raises UsageError with a message of one line.

    fsdp is left out: whether a computation works on sharded tensors depends on torch more than on the plugin. mlflow is
    too, because it would write to its server.
    """
    for name, entry in available().items():
        if not entry.value.startswith("loopctl.plugins.") or name in ("fsdp", "mlflow"):
            continue
        other = f"{name}:{EXAMPLES[name]}" if name in EXAMPLES else name
        for first in (True, False):
            pair = (subject.make(), build_plugin(other)[1])
            try:
                subject.run(*(pair if first else reversed(pair)))
            except Exception as error:
                if isinstance(error, UsageError) and "\n" not in str(error):
                    continue
                where = f"{'before' if first else 'after'} {name}"
                raise CheckFailed(f"{where}: {type(error).__name__}: {one_line(error)}; a plugin that cannot work with "
                                  "another raises UsageError with one line, in setup or train_start") from error


def cleans_up(subject: Subject) -> None:
    """After a run, and after an error in forward or in a loader, global state and training mode are as they were.

    Global state is autocast, grad mode, default dtype and device, torch's deterministic settings, signal handlers and
    so on. Training mode is that of every module with parameters that train. The error is raised in training and in
    validation, in the first epoch and later, and `fit` must raise it too.
    """
    per_epoch = length_or_none(subject.arguments()["train"]) or 3
    forward, loader = "an error in forward", "an error in the loader"
    cases = [("the run", "", True, 0),
             *[(what, part, True, at) for what, part in ((forward, "loss_fn"), (loader, "train"))
               for at in (1, per_epoch + 2)],
             # The first validation batch is tried in the first step, outside of any evaluation: the second one fails.
             (f"{forward}, in validation", "loss_fn", False, 2), (f"{loader} of valid", "valid", False, 1)]
    for what, part, training, at in cases:
        arguments, wire, modes = subject.arguments(), Tripwire(at), TrainingModeProbe()
        model = arguments["model"]
        if part and not arguments[part]:
            continue
        if part == "loss_fn":       # called right after forward, and also if the model is compiled
            arguments[part] = wire.guard(arguments[part], model, training)
        elif part:
            arguments[part] = FailingLoader(arguments[part], wire)
        with isolated():
            before = read_switches()
            try:
                tiny_run(modes, subject.make(), **arguments)
            except PlantedError:
                pass
            else:
                if wire.raised:
                    raise CheckFailed(f"{what} is not raised by fit: a hook suppresses it; raise it again")
            for name, value in read_switches().items():
                if value != before[name]:
                    raise CheckFailed(f"after {what}, the {name} is {value}, and was {before[name]}; restore it in a "
                                      "wrapper, with try: yield, finally: ...")
        if in_eval := modes.in_eval(model):
            raise CheckFailed(f"after {what}, {in_eval[0] or 'the model'} is left in eval mode, and has parameters "
                              "that train; restore it with try: yield, finally: ...")


def draws_nothing(subject: Subject) -> None:
    """Neither creating the plugin nor its hooks draw from the global generators of Python, NumPy or torch.

    At hooks that read data or call the model, only wrapper hooks are checked: the code before and after their `yield`.
    """
    if subject.draws_random:
        raise SkipTest("draws_random=True")
    before = host_rng_state()
    plugin = subject.make()
    advice = "give it a generator of its own, or pass draws_random=True"
    if kind := changed_generators(before, host_rng_state()):
        raise CheckFailed(f"creating it draws random numbers from {kind}; {advice}")
    frames: list[list[Any]] = []
    drawn: list[str] = []
    subject.run(OuterRandomProbe(frames, drawn), plugin, InnerRandomProbe(frames, drawn))
    if drawn:
        raise CheckFailed(f"{drawn[0]}; {advice}")


def resumes(subject: Subject) -> None:
    """A run that is killed and resumed with a new instance gives the result of an uninterrupted run.

    It is killed at the end of an epoch and within two others. Weights, the state of the optimizer and the history
    are compared to the last bit.
    """
    counter = SaveAndKill(at=0)
    uninterrupted = subject.run(subject.make(), counter)
    for part in (2, 3, 5):                  # sixths of three epochs: the end of the first, within the two others
        at = max(1, counter.passed * part // 6)
        plugin, out = subject.make(), Path(mkdtemp(dir=scratch_folder()))
        killer = SaveAndKill(at, plugin, out / "killed.pt")
        try:
            subject.run(plugin, killer, out=out)
        except Killed:
            pass
        except UsageError as error:
            raise CheckFailed(f"cannot be saved: {error}") from error
        restored = subject.make()
        probe = RestoredStateProbe(restored, killer.state)
        where = f"killed after step {killer.step} and resumed"
        try:
            resumed = subject.run(probe, restored, resume=killer.file, out=out)
        except UsageError as error:
            raise CheckFailed(f"{where}: {error}") from error
        if probe.difference:
            raise CheckFailed(f"{where}, load_state_dict does not restore what state_dict returned: {probe.difference}")
        if difference := runs_differ(subject, uninterrupted, resumed):
            advice = "" if hasattr(plugin, "state_dict") else "; write state_dict and load_state_dict"
            raise CheckFailed(f"{where}, the run has another result: {difference}{advice}")


def runs_twice(subject: Subject) -> None:
    """A second run with the same instance gives the same result: state of the first run does not affect it."""
    plugin = subject.make()
    if difference := runs_differ(subject, subject.run(plugin), subject.run(plugin)):
        raise CheckFailed(f"a second run with the same instance differs from the first: {difference}; reset its state "
                          "in setup")


def shares_nothing(subject: Subject) -> None:
    """A run changes no data of the class or its module; nested runs with an instance each do not affect each other."""
    cls = subject.cls
    before = class_data(cls)
    for epochs in (1, 2):                   # of different lengths, so that the second run changes shared data again
        with suppress(UsageError):          # the plugin may refuse such a short run
            subject.run(subject.make(), epochs=epochs)
        after = class_data(cls)
        for name in before:
            if difference := first_difference(before[name], after.get(name), name):
                raise CheckFailed(f"a run changes what all instances share: {difference}; set it on the instance, in "
                                  "setup")
    if check_outcome(subject, repeats):
        return                          # no two runs are the same, nested or not
    alone, nested = subject.alone(), Nested(subject)
    outer = subject.run(subject.make(), nested)
    for run, which in ((outer, "around another"), (nested.inner, "within another")):
        if run and (difference := runs_differ(subject, alone, run)):
            raise CheckFailed(f"a run {which}, each with its own instance, differs from a run alone: {difference}; "
                              "keep state on the instance")


class Nested:
    """A plugin that trains a complete inner run during the second epoch of the outer run."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.inner: Run | None = None

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.epoch and run.seen_in_epoch and not self.inner:
            self.inner = self.subject.alone()


def never_waits(subject: Subject) -> None:
    """No hook of a step reads the value of a tensor, which would make the host wait for the device.

    The run trains on the meta device, where tensors have no values, so that reading one raises an error.
    """
    if subject.waits:
        raise SkipTest("waits=True")
    arguments = subject.arguments()
    batches = [*arguments["train"]]
    arguments |= {"model": arguments["model"].to("meta"), "train": batches * -(-30 // len(batches)), "valid": None}
    stopper = StopEarly()
    try:
        subject.run(subject.make(), stopper, **arguments | {"device": None})
    except Killed:
        return
    except UsageError as error:
        raise SkipTest(one_line(error)) from error
    except Exception as error:
        culprit = find_culprit(error.__traceback__, stopper.run.hook)
        if not culprit or culprit[1] not in IN_STEPS:
            raise SkipTest(f"outside of a step, {type(error).__name__}: {one_line(error)}") from error
        raise CheckFailed(f"{culprit[1]} reads a tensor in each step, or does what the meta device does not support: "
                          f"{type(error).__name__}: {one_line(error)}; if it must, pass waits=True") from error


CHECKS = (options_are_documented, hooks_exist, trains, repeats, composes, cleans_up, draws_nothing, resumes, runs_twice,
          shares_nothing, never_waits)
# By check, those that must pass for its outcome to mean anything. For a check not listed it is `trains`.
PREREQUISITES: dict[Any, tuple[Callable[[Subject], None], ...]] = {
    options_are_documented: (), hooks_exist: (), trains: (hooks_exist,), resumes: (trains, repeats),
    runs_twice: (trains, repeats),
}


def runs_differ(subject: Subject, one: Run, other: Run) -> str:
    """Describe the first difference between the results of two runs; empty if there is none."""
    return first_difference(run_result(one, subject.measured), run_result(other, subject.measured))


def run_check(subject: Subject, check: Callable[[Subject], None]) -> None:
    """Run one check; raise SkipTest if it is to be left out or if one of its prerequisites does not pass."""
    if check.__name__ in subject.skip:
        raise SkipTest(subject.skip[check.__name__])
    for prerequisite in PREREQUISITES.get(check, (trains,)):
        if check_outcome(subject, prerequisite):
            raise SkipTest(f"needs {prerequisite.__name__}, which does not pass")
    with isolated():
        check(subject)


def check_outcome(subject: Subject, check: Callable[[Subject], None]) -> Exception | None:
    """Return what a check raised, or None if it passed; each check runs once."""
    if check.__name__ not in subject.results:
        try:
            run_check(subject, check)
            subject.results[check.__name__] = None
        except Exception as error:
            subject.results[check.__name__] = error
    return subject.results[check.__name__]
