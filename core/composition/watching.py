"""Watch the hooks of a run: be told before a hook is called, after each plugin has acted, and after the hook."""
from __future__ import annotations

from collections.abc import Generator, Iterable
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

    def acted(self, run: Run, hook: str, plugin: str) -> None:
        """Called when a plugin has acted, or the default: then `plugin` is "". Of a wrapper, also when it begins."""

    def left(self, run: Run, hook: str, result: Any) -> None:
        """Called when a hook returns; not where it raises."""


class Watchers(Watcher):
    """Tells several watchers of the same calls, in the order in which they began to watch."""

    def __init__(self, watchers: list[Watcher]) -> None:
        self.watchers = watchers

    def entered(self, run: Run, hook: str, arguments: dict[str, Any]) -> None:
        for watcher in self.watchers:
            watcher.entered(run, hook, arguments)

    def acted(self, run: Run, hook: str, plugin: str) -> None:
        for watcher in self.watchers:
            watcher.acted(run, hook, plugin)

    def left(self, run: Run, hook: str, result: Any) -> None:
        for watcher in self.watchers:
            watcher.left(run, hook, result)


def watch_hooks(composed: Hooks, hooks: Iterable[str], watcher: Watcher) -> None:
    """Have `watcher` told of every call of these hooks of a run from now on. Any plugin may call it in `train_start`.

    The hooks are compiled anew. What they call, in which order, and what they return does not change.
    """
    for hook in hooks:
        watchers = composed.watchers.setdefault(hook, [])
        watchers.append(watcher)
        told = Watchers(watchers) if len(watchers) > 1 else watcher
        watched = [watched_impl(hook, impl, told, composed.plugins) for impl in composed.by_hook[hook]]
        function = compile_hook(hook, watched, composed.plugins)
        arguments = ARGUMENTS[hook]
        source = (f"def {hook}({', '.join(arguments)}):\n"
                  f"    entered(run, '{hook}', {{{', '.join(f'{name!r}: {name}' for name in arguments)}}})\n"
                  f"    result = inner({', '.join(arguments)})\n"
                  f"    left(run, '{hook}', result)\n"
                  "    return result\n")
        scope = {"entered": told.entered, "left": told.left, "inner": function}
        setattr(composed, hook, define_function(source, scope))


def watched_impl(hook: str, impl: Any, watcher: Watcher, chosen: dict[str, Any]) -> Any:
    """An implementation of a hook that takes all arguments, does what `impl` does, and then tells the watcher."""
    wanted, function = impl.argnames, impl.function
    plugin = impl.plugin_name if impl.plugin_name in chosen else ""

    def plain(*values: Any) -> Any:
        given = dict(zip(ARGUMENTS[hook], values, strict=True))
        result = function(*(given[name] for name in wanted))
        watcher.acted(given["run"], hook, plugin)
        return result

    def wrapper(*values: Any) -> Generator[None, Any, Any]:
        given = dict(zip(ARGUMENTS[hook], values, strict=True))
        around = function(*(given[name] for name in wanted))
        start_wrapper(around, plugin)
        watcher.acted(given["run"], hook, plugin)
        try:
            result = yield
        except BaseException as error:
            result = throw_error(around, error, plugin)
        else:
            result = send_result(around, result, plugin)
        watcher.acted(given["run"], hook, plugin)
        return result

    return SimpleNamespace(function=wrapper if impl.wrapper else plain, argnames=ARGUMENTS[hook], wrapper=impl.wrapper,
                           plugin_name=impl.plugin_name)
