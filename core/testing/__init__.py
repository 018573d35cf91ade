"""For tests of plugins: run one in a line, see what a run calls, check what can be expected of any plugin."""
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
    """A plugin that writes down every hook that is called, indented by what it is called from, in `lines`."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0


def trace_hook(hook: str) -> Any:
    """A wrapper of one hook that notes its name."""
    def around(self: Trace) -> Iterator[None]:
        self.lines.append("  " * self.depth + hook)
        self.depth += 1
        try:
            return (yield)
        finally:
            self.depth -= 1
    return hookimpl(wrapper=True)(around)


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
    """The checks of a plugin, for `@pytest.mark.parametrize("check", plugin_checks(MyPlugin))`; each is called bare.

    A check's `__name__`, which pytest takes as its id, says what holds if it passes; its docstring, how it is tried.
    One raises AssertionError, or what the plugin itself raised; and unittest.SkipTest, which pytest shows as skipped,
    where it cannot mean anything because another fails or `skip` says so.

    plugin: a class, whatever else returns a new instance, or text as on the command line, "clip:max_norm=1"
    options: what a class is called with; some plugins do nothing without
    draws_random: it needs random numbers, Python's, NumPy's or torch's global ones
    waits: it needs the value of a tensor in each step
    measured: metrics that no two runs share, such as seconds
    skip: names of checks to leave out, and why
    fit_arguments: those of `fit`, where the plugin needs another model or other data than `tiny_run` has; each run has
        copies

    Raises UsageError where `skip` names a check that does not exist.
    """
    subject = Subject(plugin, options or {}, draws_random, waits, measured, skip or {}, fit_arguments)
    for name in subject.skip:
        if name not in (known := [check.__name__ for check in CHECKS]):
            raise UsageError(f"skip: no check is called {name!r}; {nearest(name, known, 'there are')}")
    return [bind_check(subject, check) for check in CHECKS]


def bind_check(subject: Subject, check: Callable[[Subject], None]) -> Callable[[], None]:
    """A check of one subject, to be called without arguments."""
    def call() -> None:
        run_check(subject, check)
    call.__name__, call.__doc__, call.subject = check.__name__, check.__doc__, subject  # type: ignore[attr-defined]
    return call


def check_plugin(plugin: Any, options: Mapping[str, Any] | None = None, **others: Any) -> str:
    """Make all checks of a plugin; return a report of them and of what the plugin costs.

    The arguments are those of `plugin_checks`. The cost is measured on tiny batches, of which a whole step takes some
    hundred microseconds; it says nothing about a GPU, and fails no check.

    Raises AssertionError, which names the checks that fail.
    """
    checks = plugin_checks(plugin, options, **others)
    subject = checks[0].subject                         # type: ignore[attr-defined]
    found = {check: check_outcome(subject, check) for check in CHECKS}
    lines = [f"{check.__name__:<24}" + ("ok" if error is None else describe_failure(error))
             for check, error in found.items()]
    title = plugin if isinstance(plugin, str) else plugin_name(subject.cls)
    faults = [error for error in found.values() if error and not isinstance(error, SkipTest)]
    if faults:
        raise AssertionError("\n".join([f"{title}: {len(faults)} of {len(CHECKS)} checks fail", *lines])) from faults[0]
    return "\n".join([title, *lines, f"{'costs':<24}{cost(subject):.1f} us per batch"])


def describe_failure(error: Exception) -> str:
    if isinstance(error, CheckFailed | SkipTest):
        return f"{'FAILS' if isinstance(error, CheckFailed) else 'left out'}: {error}"
    return f"FAILS: {type(error).__name__}: {one_line(error)}"


def cost(subject: Subject) -> float:
    """The microseconds by which a run with the plugin takes longer, per batch; the least of three tries."""
    arguments = subject.arguments()
    more = {"train": [*arguments["train"]] * 20, "valid": None, "epochs": 1}
    found = []
    for _ in range(3):
        clocks = StepTimer(), StepTimer()
        subject.run(clocks[0], **more)
        subject.run(subject.make(), clocks[1], **more)
        found.append(clocks[1].median() - clocks[0].median())
    return min(found, key=abs) * 1e6
