"""What can be expected of any plugin, as checks that its author runs on it.

Each check is a function of this module whose name says what holds if it passes; its docstring says how it is tried.
They train `tiny_run`s, and put back whatever a faulty plugin may leave behind.
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
from loopctl.composition.option_types import describe_type, fits_type
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

# How a built-in is tried beside a plugin, where its defaults will not do.
EXAMPLES = {
    "compile": "backend=eager", "cosine_restarts": "t_0=1", "cyclic": "base_lr=0.01,max_lr=0.1,step_size_up=3",
    "exponential": "gamma=0.9", "freeze": "patterns=0", "lambda": "lr_lambda=math:exp", "layerwise_lr": "decay=0.5",
    "multiplicative": "lr_lambda=math:cos", "multistep": "milestones=1", "onecycle": "max_lr=0.1",
    "profile": "start=1,steps=1", "step": "step_size=1", "swa": "start=50%",
    "torch_scheduler": "cls=torch.optim.lr_scheduler:ExponentialLR,gamma=0.9",
    "trapezoidal": "max_lr=0.2,step_size=25%",
}

# The hooks of a step, in which the host is not to wait for the device.
IN_STEPS = ("group_batches", "lr_scale", "batch_weight", "before_step", "optimizer_step", "micro_step", "compute_loss",
            "backward", "after_backward", "grads_ready", "after_step", "safe_point")


@dataclass(eq=False)
class Subject:
    """The plugin that is checked, and what it is run with."""

    plugin: Any
    options: Mapping[str, Any]
    draws_random: bool
    waits: bool
    measured: Collection[str]
    skip: Mapping[str, str]
    fit_arguments: Mapping[str, Any]
    results: dict[str, Exception | None] = field(default_factory=dict)      # by check: what it raised, if anything

    def make(self) -> Any:
        """A new instance."""
        if not isinstance(self.plugin, str):
            return self.plugin(**self.options)
        # Not by build, which reads a file anew each time: instances would have nothing in common that they could share.
        text = split_spec(self.plugin)[1]
        return self.cls(**parse_options(plugin_name(self.cls), text, plugin_options(self.cls)) | dict(self.options))

    @cached_property
    def cls(self) -> type:
        """The plugin's class."""
        if isinstance(self.plugin, str):
            return type(build_plugin(self.plugin)[1])
        return self.plugin if isinstance(self.plugin, type) else type(self.make())

    def arguments(self) -> dict[str, Any]:
        """What `fit` is called with: copies, so that no run finds what another one changed."""
        return default_arguments() | {"epochs": 3} | deepcopy(dict(self.fit_arguments))

    def run(self, *plugins: Any, **others: Any) -> Run:
        """A run with `plugins`; `others` replace arguments of `fit`."""
        with isolated():
            return tiny_run(*plugins, **self.arguments() | others)

    def alone(self) -> Run:
        """A run with a new instance."""
        return self.run(self.make())


class CheckFailed(AssertionError):
    """The plugin is not what can be expected."""


# The checks, in the order in which they are made.


def options_are_documented(subject: Subject) -> None:
    """Every option has a type, a default of that type or none, and a line of help in the docstring.

    What the command line would write for an instance reads back as the same options.
    """
    cls = subject.cls
    if not dataclasses.is_dataclass(cls):
        if given := [*inspect.signature(cls).parameters]:
            raise CheckFailed(f"is no dataclass, so {names(given)} cannot be an option; write @dataclass(eq=False)")
        return
    if not cls.__doc__ or cls.__doc__.startswith(f"{cls.__name__}("):       # the latter is what dataclass writes
        raise CheckFailed("has no docstring, which is its help")
    if untyped := list(untyped_fields(cls)):
        raise CheckFailed(f"{untyped[0]} has no type, so it is no option; write {untyped[0]}: float = ..., or ClassVar")
    known = plugin_options(cls)
    for option in known.values():
        hint = get_args(option.type)[0] if get_origin(option.type) is Annotated else option.type
        if describe_type(hint) == "a value":
            raise CheckFailed(f"{option.name} has the type {option.type}, which no text can be checked against; use "
                        "int, float, bool, str, Path, Literal, Length, or list or dict of them")
        if option.default is not dataclasses.MISSING and not fits_type(option.default, option.type):
            raise CheckFailed(f"{option.name} takes {describe_type(hint)}, and its default is {option.default!r}")
        if not option.help:
            raise CheckFailed(f"{option.name} has no help; add a line '{option.name}: what it means' to the docstring")
    check_round_trip(cls, subject.make(), known)


def untyped_fields(cls: type) -> Iterator[str]:
    """The public data of a class that has no annotation and is not what loopctl itself reads."""
    typed = {name for kind in cls.__mro__ for name in inspect.get_annotations(kind)} | {*FLAGS}
    for kind in cls.__mro__[:-1]:
        for name, value in vars(kind).items():
            plain = not callable(value) and not hasattr(value, "__get__")
            if plain and name not in typed and not name.startswith("_") and not name.isupper() and value is not None:
                yield name


def check_round_trip(cls: type, plugin: Any, known: dict[str, Option]) -> None:
    try:
        text = to_spec("it", plugin).partition(":")[2]
    except UsageError:                      # an option that has no text, such as a function within a function
        return
    read = parse_options("it", text, known)
    for name in known:
        value = getattr(plugin, name)
        if name in read and read[name] != (list(value) if isinstance(value, tuple) else value):
            raise CheckFailed(f"{name} is {value!r}, is written as {text!r}, and reads back as {read[name]!r}")


def hooks_exist(subject: Subject) -> None:
    """Each hook that it joins exists, with the arguments that it takes; whatever else `fit` asks of a plugin holds."""
    compose([subject.make()])


def trains(subject: Subject) -> None:
    """A run with it ends as a run ends, with an update at least."""
    if not subject.alone().step:
        raise CheckFailed("made no update in the whole run")


def repeats(subject: Subject) -> None:
    """Two runs with the same seed, and an instance each, are the same to the last bit."""
    if what := runs_differ(subject, subject.alone(), subject.alone()):
        raise CheckFailed(f"two runs with the same seed differ: {what}")


def composes(subject: Subject) -> None:
    """With each built-in, before it and after it, it trains, or one of the two refuses in one line, by UsageError.

    But for fsdp: whether pieces of weights suit what a plugin computes with them is torch's affair more than its own.
    """
    for name, entry in available().items():
        if not entry.value.startswith("loopctl.plugins.") or name == "fsdp":
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
    """After an error in forward or in a loader, and after none, all is as it was, and what trains is in training mode.

    That is autocast, grad mode, default dtype and device, torch's deterministic switches, signal handlers and the like.
    The error comes in training and in validation, in the first epoch and later, and must come out of the run.
    """
    per_epoch = length_or_none(subject.arguments()["train"]) or 3
    forward, loader = "an error in forward", "an error in the loader"
    cases = [("the run", "", True, 0),
             *[(what, part, True, at) for what, part in ((forward, "loss_fn"), (loader, "train"))
               for at in (1, per_epoch + 2)],
             (f"{forward}, in validation", "loss_fn", False, 1), (f"{loader} of valid", "valid", False, 1)]
    for what, part, training, at in cases:
        arguments, wire, modes = subject.arguments(), Tripwire(at), TrainingModeProbe()
        model = arguments["model"]
        if part and not arguments[part]:
            continue
        if part == "loss_fn":       # which is called where forward is, also where the model is compiled
            arguments[part] = wire.around(arguments[part], model, training)
        elif part:
            arguments[part] = FailingLoader(arguments[part], wire)
        with isolated():
            before = read_switches()
            try:
                tiny_run(modes, subject.make(), **arguments)
            except PlantedError:
                pass
            else:
                if wire.sprung:
                    raise CheckFailed(f"{what} does not come out of the run: a hook swallows it")
            for name, value in read_switches().items():
                if value != before[name]:
                    raise CheckFailed(f"after {what}, the {name} is {value}, and was {before[name]}; undo it in a "
                                      "wrapper, with try: yield, finally: ...")
        if left := modes.left(model):
            raise CheckFailed(f"after {what}, {left[0] or 'the model'} is left in evaluation mode, and has parameters "
                              "that train; undo it with try ... finally")


def draws_nothing(subject: Subject) -> None:
    """Neither making it nor any of its hooks draws from the random numbers of Python, NumPy or torch.

    Those hooks are not judged that read data or call the model, unless it wraps them, up to its yield and after.
    """
    if subject.draws_random:
        raise SkipTest("draws_random=True")
    before = host_rng_state()
    plugin = subject.make()
    way_out = "give it a generator of its own, or pass draws_random=True"
    if kind := changed_generators(before, host_rng_state()):
        raise CheckFailed(f"making it draws random numbers of {kind}; {way_out}")
    frames: list[list[Any]] = []
    drawn: list[str] = []
    subject.run(OuterRandomProbe(frames, drawn), plugin, InnerRandomProbe(frames, drawn))
    if drawn:
        raise CheckFailed(f"{drawn[0]}; {way_out}")


def resumes(subject: Subject) -> None:
    """A run that is killed, within epochs and between them, and goes on with a new instance, ends as one that was not.

    Weights, the optimizer's state and the history are the same to the last bit.
    """
    points = SaveAndKill(at=0)
    whole = subject.run(subject.make(), points)
    for part in (2, 3, 5):                  # sixths of three epochs: at the end of the first, within both others
        at = max(1, points.passed * part // 6)
        plugin, out = subject.make(), Path(mkdtemp(dir=scratch_folder()))
        killer = SaveAndKill(at, plugin, out / "killed.pt")
        try:
            subject.run(plugin, killer, out=out)
        except Killed:
            pass
        except UsageError as error:
            raise CheckFailed(f"cannot be saved: {error}") from error
        again = subject.make()
        back = RestoredStateProbe(again, killer.state)
        where = f"killed after step {killer.step} and resumed"
        try:
            resumed = subject.run(back, again, resume=killer.file, out=out)
        except UsageError as error:
            raise CheckFailed(f"{where}: {error}") from error
        if back.lost:
            raise CheckFailed(f"{where}, load_state_dict does not bring back what state_dict gave: {back.lost}")
        if what := runs_differ(subject, whole, resumed):
            missing = "" if hasattr(plugin, "state_dict") else "; write state_dict and load_state_dict for it"
            raise CheckFailed(f"{where}, the run ends otherwise: {what}{missing}")


def runs_twice(subject: Subject) -> None:
    """A second run with the same instance is the first again: it finds nothing on the instance that changes it."""
    plugin = subject.make()
    if what := runs_differ(subject, subject.run(plugin), subject.run(plugin)):
        raise CheckFailed(f"a second run with the same instance differs from its first: {what}; begin anew in setup")


def shares_nothing(subject: Subject) -> None:
    """Runs change nothing on the class or in its module; a run within a run, with other instances, disturbs neither."""
    cls = subject.cls
    before = class_data(cls)
    for epochs in (1, 2):                   # not alike, so that the second one has something to change, too
        with suppress(UsageError):          # a run may be too short for it
            subject.run(subject.make(), epochs=epochs)
        after = class_data(cls)
        for name in before:
            if what := first_difference(before[name], after.get(name), name):
                raise CheckFailed(f"a run changes what all instances share: {what}; set it on the instance, in setup")
    if check_outcome(subject, repeats):
        return                          # no two runs are the same in any case
    alone, nested = subject.alone(), Nested(subject)
    outer = subject.run(subject.make(), nested)
    for run, which in ((outer, "around another"), (nested.inner, "within another")):
        if run and (what := runs_differ(subject, alone, run)):
            raise CheckFailed(f"a run {which}, with instances of their own, differs from one alone: {what}")


class Nested:
    """A plugin that makes a whole run in the middle of the second epoch of another."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.inner: Run | None = None

    @hookimpl
    def safe_point(self, run: Run) -> None:
        if run.epoch and run.seen_in_epoch and not self.inner:
            self.inner = self.subject.alone()


def never_waits(subject: Subject) -> None:
    """In a step, nothing reads the value of a tensor, for which the host would wait.

    It trains on the meta device, where tensors have no values, so that reading one is an error.
    """
    if subject.waits:
        raise SkipTest("waits=True")
    arguments = subject.arguments()
    batches = [*arguments["train"]]
    arguments |= {"model": arguments["model"].to("meta"), "train": batches * -(-30 // len(batches)), "valid": None}
    enough = StopEarly()
    try:
        subject.run(subject.make(), enough, **arguments | {"device": None})
    except Killed:
        return
    except UsageError as error:
        raise SkipTest(one_line(error)) from error
    except Exception as error:
        culprit = find_culprit(error.__traceback__, enough.run.hook)
        if not culprit or culprit[1] not in IN_STEPS:
            raise SkipTest(f"outside of steps, {type(error).__name__}: {one_line(error)}") from error
        raise CheckFailed(f"{culprit[1]} reads a tensor in each step, or does what the meta device cannot: "
                    f"{type(error).__name__}: {one_line(error)}; where it must, pass waits=True") from error


CHECKS = (options_are_documented, hooks_exist, trains, repeats, composes, cleans_up, draws_nothing, resumes, runs_twice,
          shares_nothing, never_waits)
# What must have passed, for the check to mean anything; for others it is that it trains.
NEEDED: dict[Any, tuple[Callable[[Subject], None], ...]] = {
    options_are_documented: (), hooks_exist: (), trains: (hooks_exist,), resumes: (trains, repeats),
    runs_twice: (trains, repeats),
}


def runs_differ(subject: Subject, one: Run, other: Run) -> str:
    """Where two runs have ended differently, in words."""
    return first_difference(run_result(one, subject.measured), run_result(other, subject.measured))


def run_check(subject: Subject, check: Callable[[Subject], None]) -> None:
    if check.__name__ in subject.skip:
        raise SkipTest(subject.skip[check.__name__])
    for needed in NEEDED.get(check, (trains,)):
        if check_outcome(subject, needed):
            raise SkipTest(f"means nothing where {needed.__name__} does not pass")
    with isolated():
        check(subject)


def check_outcome(subject: Subject, check: Callable[[Subject], None]) -> Exception | None:
    """What a check raised, if anything; it is made once."""
    if check.__name__ not in subject.results:
        try:
            run_check(subject, check)
            subject.results[check.__name__] = None
        except Exception as error:
            subject.results[check.__name__] = error
    return subject.results[check.__name__]
