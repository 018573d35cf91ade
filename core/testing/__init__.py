"""Tools for testing plugins: a tiny training run, a trace of the hooks that are called, and checks for any plugin."""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any
from unittest import SkipTest

from loopctl.composition.compose import SPECS
from loopctl.composition.discovery import plugin_name
from loopctl.errors import UsageError, nearest, one_line
from loopctl.hooks import hookimpl
from loopctl.testing.checks import CHECKS, CheckFailed, Subject, check_outcome, run_check
from loopctl.testing.probes import StepTimer
from loopctl.testing.tiny import tiny_run

__all__ = ["Trace", "check_plugin", "plugin_checks", "tiny_run"]


class Trace:
    """A plugin that records the name of every hook that is called in `lines`, indented by the depth of the call."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0


def trace_hook(hook: str) -> Any:
    """Return a wrapper hook that records the name of `hook`."""
    def record(self: Trace) -> Iterator[None]:
        self.lines.append("  " * self.depth + hook)
        self.depth += 1
        try:
            return (yield)
        finally:
            self.depth -= 1
    return hookimpl(wrapper=True)(record)


for name in SPECS:
    setattr(Trace, name, trace_hook(name))


def plugin_checks(
    plugin: Any,
    options: Mapping[str, Any] | None = None,
    *,
    draws_random: bool = False,
    waits: bool = False,
    measured: Collection[str] = (),
    skip: Mapping[str, str] | None = None,
    **fit_arguments: Any,
) -> list[Callable[[], None]]:
    """Return the checks of a plugin, for `@pytest.mark.parametrize("check", plugin_checks(MyPlugin))`.

    Each check is called without arguments. Its `__name__`, which pytest uses as the test's id, says what holds if it
    passes; its docstring says how this is tested. A check that fails raises AssertionError, or what the plugin raised.
    It raises unittest.SkipTest, which pytest shows as skipped, if `skip` names it or a check that it relies on fails.

    plugin: a class, a function that returns a new instance, or text as on the command line, "clip:max_norm=1"
    options: the arguments that the class is called with; some plugins do nothing without options
    draws_random: the plugin draws from the global random number generators of Python, NumPy or torch
    waits: the plugin reads the value of a tensor in each step
    measured: metrics that differ between any two runs, such as seconds
    skip: by the name of a check to leave out, the reason
    fit_arguments: arguments of `fit`, for a plugin that needs another model or other data than `tiny_run` has; each
        run gets copies

    Raises UsageError if `skip` names a check that does not exist.
    """
    subject = Subject(plugin, options or {}, draws_random, waits, measured, skip or {}, fit_arguments)
    for name in subject.skip:
        if name not in (known := [check.__name__ for check in CHECKS]):
            raise UsageError(f"skip: no check is called {name!r}; {nearest(name, known, 'there are')}")
    return [bind_check(subject, check) for check in CHECKS]


def bind_check(subject: Subject, check: Callable[[Subject], None]) -> Callable[[], None]:
    """Return `check` of `subject` as a function without arguments."""
    def call() -> None:
        run_check(subject, check)
    call.__name__, call.__doc__, call.subject = check.__name__, check.__doc__, subject  # type: ignore[attr-defined]
    return call


def check_plugin(plugin: Any, options: Mapping[str, Any] | None = None, **others: Any) -> str:
    """Run all checks of a plugin; return a report of their outcomes and of the time that the plugin costs.

    The arguments are those of `plugin_checks`. The cost is measured on a CPU, on tiny batches, where a step takes a
    few hundred microseconds; it is only reported, not checked.

    Raises AssertionError, which names the checks that fail.
    """
    checks = plugin_checks(plugin, options, **others)
    subject = checks[0].subject                         # type: ignore[attr-defined]
    outcomes = {check: check_outcome(subject, check) for check in CHECKS}
    lines = [f"{check.__name__:<24}" + ("ok" if error is None else describe_failure(error))
             for check, error in outcomes.items()]
    title = plugin if isinstance(plugin, str) else plugin_name(subject.cls)
    failures = [error for error in outcomes.values() if error and not isinstance(error, SkipTest)]
    if failures:
        summary = f"{title}: {len(failures)} of {len(CHECKS)} checks fail"
        raise AssertionError("\n".join([summary, *lines])) from failures[0]
    return "\n".join([title, *lines, f"{'costs':<24}{cost(subject)}"])


def describe_failure(error: Exception) -> str:
    if isinstance(error, CheckFailed | SkipTest):
        return f"{'FAILS' if isinstance(error, CheckFailed) else 'left out'}: {error}"
    return f"FAILS: {type(error).__name__}: {one_line(error)}"


def cost(subject: Subject) -> str:
    """Return what the plugin adds to the time of a batch: the value closest to 0 of three measurements.

    Where the optimizer, the model or the loss function needs the plugin, a run without it fails, and the time of a
    batch with it is returned.
    """
    arguments = subject.arguments()
    longer = {"train": [*arguments["train"]] * 20, "valid": None, "epochs": 1}
    added, failure = [], ""
    for _ in range(3):
        without, with_plugin = StepTimer(), StepTimer()
        try:
            subject.run(without, **longer)
        except Exception as error:          # whatever a run raises that lacks a part
            failure = f"{type(error).__name__}: {one_line(error)}"
        subject.run(subject.make(), with_plugin, **longer)
        added.append(with_plugin.median() - (0.0 if failure else without.median()))
    time = f"{min(added, key=abs) * 1e6:.1f} us per batch"
    return f"not known, since a run without it fails ({failure}); with it, {time}" if failure else time
