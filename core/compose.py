"""Put the chosen plugins to work: name, order and check them, then reduce each hook to plain calls."""
from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pluggy

from loopctl import hooks
from loopctl.errors import UsageError, names, nearest
from loopctl.find import build, name_of
from loopctl.options import check

SPECS: dict[str, Any] = {name: spec for name, spec in vars(hooks).items() if hasattr(spec, "loopctl_spec")}
ARGUMENTS = {name: spec.__code__.co_varnames[:spec.__code__.co_argcount] for name, spec in SPECS.items()}


class Hooks:
    """What `run.hook` is: one function per hook, called with the hook's arguments by name."""

    plugins: dict[str, Any]       # by unique name, in the order they act
    hookimpls: list[Any]          # pluggy's, of plugins and defaults
    acting: dict[str, list[str]]  # per hook, the plugins that act there

    if TYPE_CHECKING:
        def __getattr__(self, name: str) -> Callable[..., Any]: ...


def compose(plugins: Iterable[Any]) -> Hooks:
    """Return the hooks of one run. `plugins`, instances or `name:option=value` strings, act in the order given.

    Raises UsageError for whatever cannot work: unknown names and options, hooks that do not exist, two plugins that
    replace the same hook.
    """
    from loopctl import defaults, loop  # here, for they import torch and this module
    from loopctl.parallel import Parallel
    from loopctl.world import rank

    chosen = named(plugins)
    elsewhere = rank() > 0 and any(isinstance(plugin, Parallel) for plugin in chosen.values())
    manager = pluggy.PluginManager("loopctl")
    manager.add_hookspecs(hooks)
    manager.register(defaults)
    manager.register(loop)
    for name, plugin in reversed(chosen.items()):         # pluggy calls the last registered first
        check_plugin(name, plugin, manager)
        if not (elsewhere and getattr(plugin, "on_first_rank", False)):
            manager.register(plugin, name)
    manager.check_pending()

    composed = Hooks()
    composed.plugins, composed.hookimpls, composed.acting = chosen, [], {}
    for name in SPECS:
        impls = getattr(manager.hook, name).get_hookimpls()[::-1]        # in the order they act
        composed.hookimpls += impls
        composed.acting[name] = [impl.plugin_name for impl in impls if impl.plugin_name in chosen]
        setattr(composed, name, compiled(name, impls, chosen))
    return composed


def named(plugins: Iterable[Any]) -> dict[str, Any]:
    """The plugins by unique name: the second `freeze` is `freeze.2`."""
    chosen: dict[str, Any] = {}
    for item in plugins:
        base, plugin = build(item) if isinstance(item, str) else (name_of(type(item)), item)
        if isinstance(plugin, type):
            raise UsageError(f"{plugin.__name__} is a class; pass an instance, {plugin.__name__}(...)")
        name, number = base, 1
        while name in chosen:
            name, number = f"{base}.{number + 1}", number + 1
        if any(plugin is other for other in chosen.values()):
            raise UsageError(f"{base}: the same instance is given twice; make a second one")
        chosen[name] = plugin
    return chosen


def check_plugin(name: str, plugin: Any, manager: pluggy.PluginManager) -> None:
    """Raise UsageError where `plugin` could not work as its author meant it."""
    if type(plugin).__hash__ is None:
        raise UsageError(f"{name}: equal instances would be taken for one; write @dataclass(eq=False)")
    try:
        check(plugin)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    if hasattr(plugin, "state_dict") != hasattr(plugin, "load_state_dict"):
        raise UsageError(f"{name}: has one of state_dict and load_state_dict; write both, or neither")
    marked = {attr for attr in dir(type(plugin)) if hasattr(getattr(type(plugin), attr, None), "loopctl_impl")}
    if not marked:
        raise UsageError(f"{name}: has no hooks; mark its methods with @hookimpl")
    for attr in sorted(marked - set(SPECS)):
        raise UsageError(f"{name}: no hook is called {attr!r}; {nearest(attr, SPECS)}")
    for attr in sorted(set(SPECS) & set(dir(type(plugin))) - marked):
        raise UsageError(f"{name}: {attr} is named as a hook but not marked; write @hookimpl above it, or rename it")
    for attr in sorted(marked):
        if manager.parse_hookimpl_opts(plugin, attr) is None:
            continue                                       # shadowed on the instance: not wanted in this configuration
        for argument in signature(getattr(plugin, attr)).parameters.values():
            if argument.name not in ARGUMENTS[attr]:
                has = nearest(argument.name, ARGUMENTS[attr], "it has")
                raise UsageError(f"{name}: {attr} has no argument {argument.name!r}; {has}")
            if argument.default is not argument.empty:
                raise UsageError(f"{name}: {attr} gives {argument.name!r} a default; a hook's arguments have none")


def compiled(hook: str, impls: list[Any], chosen: dict[str, Any]) -> Callable[..., Any]:
    """One function that does what pluggy's call of this hook would do, without the general machinery.

    A hook nobody joins is a function that does nothing; one with a single implementation that takes every argument is
    that implementation; the rest is generated, as `dataclasses` generates `__init__`. Unlike in pluggy, a replacement
    that returns None has still replaced the hook.
    """
    spec, arguments = SPECS[hook], ", ".join(ARGUMENTS[hook])
    first = spec.loopctl_spec["firstresult"]
    wrappers = [impl for impl in impls if impl.wrapper]
    plain = [impl for impl in impls if not impl.wrapper]
    if first:
        owners = [impl.plugin_name for impl in plain if impl.plugin_name in chosen]
        if len(owners) > 1:
            raise UsageError(f"{names(owners)} both replace {hook}; choose one")
        plain = plain[:1]

    calls = [f"f{i}({', '.join(impl.argnames)})" for i, impl in enumerate(plain)]
    collects = not first and spec.__annotations__["return"] != "None"        # such as lr_scale
    if first and calls:
        body = f"return {calls[0]}"
    elif collects:
        body = f"return [value for value in ({''.join(call + ', ' for call in calls)}) if value is not None]"
    else:
        body = "; ".join(calls) or "pass"
    if len(plain) == 1 and tuple(plain[0].argnames) == ARGUMENTS[hook] and not collects:
        function = plain[0].function
    else:
        scope = {f"f{i}": impl.function for i, impl in enumerate(plain)}
        function = define(f"def {hook}({arguments}): {body}", scope)
    for wrapper in reversed(wrappers):                     # the plugin given first is the outermost
        function = wrapped(hook, arguments, wrapper, function)
    return function


WRAPPED = """
def {hook}({arguments}):
    around = wrapper({taken})
    start(around, plugin)
    try:
        result = inner({arguments})
    except BaseException as error:
        return throw(around, error, plugin)
    return send(around, result, plugin)
"""


def wrapped(hook: str, arguments: str, wrapper: Any, inner: Callable[..., Any]) -> Callable[..., Any]:
    """`inner` inside a generator that yields once: what a `@hookimpl(wrapper=True)` is."""
    source = WRAPPED.format(hook=hook, arguments=arguments, taken=", ".join(wrapper.argnames))
    return define(source, {"wrapper": wrapper.function, "inner": inner, "start": start, "throw": throw, "send": send,
                           "plugin": wrapper.plugin_name})


def start(around: Iterator[Any], plugin: str) -> None:
    try:
        next(around)
    except StopIteration:
        raise RuntimeError(f"{plugin}: a wrapper must yield once, and did not") from None


def send(around: Any, result: Any, plugin: str) -> Any:
    try:
        around.send(result)
    except StopIteration as end:
        return end.value
    around.close()
    raise RuntimeError(f"{plugin}: a wrapper must yield once, and did so twice")


def throw(around: Any, error: BaseException, plugin: str) -> Any:
    try:
        around.throw(error)
    except StopIteration as end:
        return end.value                                   # the wrapper dealt with the error
    around.close()
    raise RuntimeError(f"{plugin}: a wrapper must yield once, and did so twice") from error


def define(source: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """The function that `source` defines; names that are not its arguments are found in `scope`."""
    exec(source, scope)
    return scope[source.split("(")[0].split()[-1]]


@contextmanager
def blame(composed: Hooks) -> Iterator[None]:
    """Name the plugin and the hook in whatever error one of them raises; the error itself stays what it was.

    Costs nothing until there is an error: the culprit is read from the traceback.
    """
    try:
        yield
    except Exception as error:
        culprit = innermost(error.__traceback__, composed)
        if culprit and isinstance(error, UsageError):
            error.args = (f"{culprit[0]}: {error}",)
        elif culprit:
            error.add_note(f"raised by plugin {culprit[0]!r} in its hook {culprit[1]}")
        raise


def innermost(trace: TracebackType | None, composed: Hooks) -> tuple[str, str] | None:
    """The plugin and hook whose code is deepest in a traceback; None if core, the model or the data came after it."""
    core = {sys.modules[name].__file__ for name in ("loopctl.loop", "loopctl.defaults")}
    culprit = None
    while trace:
        code = trace.tb_frame.f_code
        if code.co_filename in core:
            culprit = None
        for impl in composed.hookimpls:
            hook = getattr(impl.function, "__func__", impl.function).__code__
            # A generator inside a hook, such as one that group_batches returns, is the hook as well.
            same = f"{code.co_qualname}.<locals>.".startswith(f"{hook.co_qualname}.<locals>.")
            its_own = trace.tb_frame.f_locals.get("self", impl.plugin) is impl.plugin
            if same and its_own and code.co_filename == hook.co_filename and impl.plugin_name in composed.plugins:
                culprit = impl.plugin_name, impl.function.__name__
                break
        trace = trace.tb_next
    return culprit
