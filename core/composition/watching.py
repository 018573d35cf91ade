"""Watch the hooks of a run: be told before a hook is called, after each plugin has acted, and after the hook."""
from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from loopctl.composition.compose import (
    ARGUMENTS,
    Hooks,
    compile_hook,
    define_function,
    send_result,
    start_wrapper,
    throw_error,
)

if TYPE_CHECKING:
    from loopctl.run import Run


class Watcher:
    """What is told of the calls of a hook. It must not change the run. Each method gets the run and the hook's name."""

    def entered(self, run: Run, hook: str, arguments: dict[str, Any]) -> None:
        """Called before anything acts at a hook."""

    def acted(self, run: Run, hook: str, plugin: str, begins: bool) -> None:
        """Called when a plugin has acted, or the default: then `plugin` is "".

        A wrapper acts twice: before what it wraps, when `begins` is true, and after it.
        """

    def left(self, run: Run, hook: str, result: Any) -> None:
        """Called when a hook returns; not where it raises."""


WATCHED = """
def {hook}({arguments}):
    given = {{{given}}}
    for watcher in watchers:
        watcher.entered(run, {hook!r}, given)
    result = inner({arguments})
    for watcher in watchers:
        watcher.left(run, {hook!r}, result)
    return result
"""


def watch_hooks(composed: Hooks, hooks: Iterable[str], watcher: Watcher) -> None:
    """Have `watcher` told of every call of these hooks of a run from now on. Any plugin may call it in `train_start`.

    The hooks are compiled anew. What they call, in which order, and what they return does not change.
    """
    for hook in hooks:
        watchers = composed.watchers.setdefault(hook, [])
        watchers.append(watcher)
        watched = [watched_impl(hook, impl, watchers, composed.plugins) for impl in composed.by_hook[hook]]
        source = WATCHED.format(hook=hook, arguments=", ".join(ARGUMENTS[hook]),
                                given=", ".join(f"{name!r}: {name}" for name in ARGUMENTS[hook]))
        inner = compile_hook(hook, watched, composed.plugins)
        setattr(composed, hook, define_function(source, {"watchers": watchers, "inner": inner}))


def watched_impl(hook: str, impl: Any, watchers: Sequence[Watcher], chosen: dict[str, Any]) -> Any:
    """An implementation of a hook that takes all arguments, does what `impl` does, and then tells the watchers."""
    wanted, function = impl.argnames, impl.function
    plugin = impl.plugin_name if impl.plugin_name in chosen else ""

    def plain(*values: Any) -> Any:
        given = dict(zip(ARGUMENTS[hook], values, strict=True))
        result = function(*(given[name] for name in wanted))
        for watcher in watchers:
            watcher.acted(given["run"], hook, plugin, begins=False)
        return result

    def wrapper(*values: Any) -> Generator[None, Any, Any]:
        given = dict(zip(ARGUMENTS[hook], values, strict=True))
        around = function(*(given[name] for name in wanted))
        start_wrapper(around, plugin)
        for watcher in watchers:
            watcher.acted(given["run"], hook, plugin, begins=True)
        try:
            result = yield
        except BaseException as error:
            result = throw_error(around, error, plugin)
        else:
            result = send_result(around, result, plugin)
        for watcher in watchers:
            watcher.acted(given["run"], hook, plugin, begins=False)
        return result

    return SimpleNamespace(function=wrapper if impl.wrapper else plain, argnames=ARGUMENTS[hook], wrapper=impl.wrapper,
                           plugin_name=impl.plugin_name)
