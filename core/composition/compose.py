"""Put the chosen plugins to work: name, order and check them, then reduce each hook to plain calls."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from inspect import signature
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pluggy

from loopctl import hooks
from loopctl.composition.discovery import build_plugin, plugin_name
from loopctl.composition.options import check_options
from loopctl.errors import UsageError, names, nearest

if TYPE_CHECKING:
    from loopctl.run import Run

SPECS: dict[str, Any] = {name: spec for name, spec in vars(hooks).items() if hasattr(spec, "loopctl_spec")}
ARGUMENTS = {name: spec.__code__.co_varnames[:spec.__code__.co_argcount] for name, spec in SPECS.items()}


# Class attributes of a plugin that the loop reads.
FLAGS = ("observer_only", "rank_zero_only", "capturable")


class Hooks:
    """What `run.hook` is: one function per hook, called with the hook's arguments by name."""

    plugins: dict[str, Any]       # by unique name, in the order they act
    hookimpls: list[Any]          # pluggy's, of plugins and defaults
    acting: dict[str, list[str]]  # per hook, the plugins that act there

    if TYPE_CHECKING:             # as in hooks.py; `compose` sets the real ones
        setup = staticmethod(hooks.setup)
        param_groups = staticmethod(hooks.param_groups)
        wrap_model = staticmethod(hooks.wrap_model)
        train = staticmethod(hooks.train)
        train_start = staticmethod(hooks.train_start)
        epoch_start = staticmethod(hooks.epoch_start)
        group_batches = staticmethod(hooks.group_batches)
        batch_weight = staticmethod(hooks.batch_weight)
        before_step = staticmethod(hooks.before_step)
        optimizer_step = staticmethod(hooks.optimizer_step)
        micro_step = staticmethod(hooks.micro_step)
        compute_loss = staticmethod(hooks.compute_loss)
        backward = staticmethod(hooks.backward)
        after_backward = staticmethod(hooks.after_backward)
        grads_ready = staticmethod(hooks.grads_ready)
        after_step = staticmethod(hooks.after_step)
        safe_point = staticmethod(hooks.safe_point)
        evaluate = staticmethod(hooks.evaluate)
        after_evaluate = staticmethod(hooks.after_evaluate)
        epoch_end = staticmethod(hooks.epoch_end)
        train_end = staticmethod(hooks.train_end)

        @staticmethod
        def lr_scale(run: Run, initial_lr: float, group: dict[str, Any]) -> list[float]:
            """The factors of all plugins that return one."""


def compose(plugins: Iterable[Any], defaults: Iterable[Any] = ()) -> Hooks:
    """Return the hooks of one run. `plugins`, instances or `name:option=value` text, act in the order given.

    defaults: what implements the hooks that no plugin replaces; without them the plugins are only checked.

    Raises UsageError for whatever cannot work: unknown names and options, hooks that do not exist, two plugins that
    replace the same hook.
    """
    from loopctl.distributed.data_parallel import Parallel  # here, for they import torch
    from loopctl.distributed.process_group import rank

    chosen = named_plugins(plugins)
    elsewhere = rank() > 0 and any(isinstance(plugin, Parallel) for plugin in chosen.values())
    manager = pluggy.PluginManager("loopctl")
    manager.add_hookspecs(hooks)
    for default in defaults:
        manager.register(default)
    for name, plugin in reversed(chosen.items()):         # pluggy calls the last registered first
        check_plugin(name, plugin, manager)
        if not (elsewhere and getattr(plugin, "rank_zero_only", False)):
            manager.register(plugin, name)
    manager.check_pending()

    composed = Hooks()
    composed.plugins, composed.hookimpls, composed.acting = chosen, [], {}
    for name in SPECS:
        impls = getattr(manager.hook, name).get_hookimpls()[::-1]        # in the order they act
        composed.hookimpls += impls
        composed.acting[name] = [impl.plugin_name for impl in impls if impl.plugin_name in chosen]
        setattr(composed, name, compile_hook(name, impls, chosen))
    return composed


def named_plugins(plugins: Iterable[Any]) -> dict[str, Any]:
    """The plugins by unique name: the second `freeze` is `freeze.2`."""
    chosen: dict[str, Any] = {}
    for item in plugins:
        base, plugin = build_plugin(item) if isinstance(item, str) else (plugin_name(type(item)), item)
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
        check_options(plugin)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    if hasattr(plugin, "state_dict") != hasattr(plugin, "load_state_dict"):
        raise UsageError(f"{name}: has one of state_dict and load_state_dict; write both, or neither")
    check_flags(name, plugin)
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


def check_flags(name: str, plugin: Any) -> None:
    """Raise UsageError where a flag that the loop reads seems to be misspelt, which would otherwise have no effect."""
    attributes = {attr: value for kind in reversed(type(plugin).__mro__) for attr, value in vars(kind).items()}
    for attr, value in (attributes | getattr(plugin, "__dict__", {})).items():
        if isinstance(value, bool) and attr not in FLAGS and (near := get_close_matches(attr, FLAGS, n=1, cutoff=0.75)):
            raise UsageError(f"{name}: no flag is called {attr!r}; did you mean {near[0]!r}?")


def compile_hook(hook: str, impls: list[Any], chosen: dict[str, Any]) -> Callable[..., Any]:
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
        function = define_function(f"def {hook}({arguments}): {body}", scope)
    for wrapper in reversed(wrappers):                     # the plugin given first is the outermost
        function = wrap_hook(hook, arguments, wrapper, function)
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


def wrap_hook(hook: str, arguments: str, wrapper: Any, inner: Callable[..., Any]) -> Callable[..., Any]:
    """`inner` inside a generator that yields once: what a `@hookimpl(wrapper=True)` is."""
    source = WRAPPED.format(hook=hook, arguments=arguments, taken=", ".join(wrapper.argnames))
    return define_function(source, {"wrapper": wrapper.function, "inner": inner, "plugin": wrapper.plugin_name,
                                    "start": start_wrapper, "throw": throw_error, "send": send_result})


def start_wrapper(around: Iterator[Any], plugin: str) -> None:
    try:
        next(around)
    except StopIteration:
        raise RuntimeError(f"{plugin}: a wrapper must yield once, and did not") from None


def send_result(around: Any, result: Any, plugin: str) -> Any:
    try:
        around.send(result)
    except StopIteration as end:
        return end.value
    around.close()
    raise RuntimeError(f"{plugin}: a wrapper must yield once, and did so twice")


def throw_error(around: Any, error: BaseException, plugin: str) -> Any:
    try:
        around.throw(error)
    except StopIteration as end:
        return end.value                                   # the wrapper dealt with the error
    around.close()
    raise RuntimeError(f"{plugin}: a wrapper must yield once, and did so twice") from error


def define_function(source: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """The function that `source` defines; names that are not its arguments are found in `scope`."""
    exec(source, scope)
    return scope[source.split("(")[0].split()[-1]]


@contextmanager
def blame_plugin(composed: Hooks) -> Iterator[None]:
    """Name the plugin and the hook in whatever error one of them raises; the error itself stays what it was.

    Costs nothing until there is an error: the culprit is read from the traceback.
    """
    try:
        yield
    except Exception as error:
        culprit = find_culprit(error.__traceback__, composed)
        if culprit and isinstance(error, UsageError):
            error.args = (f"{culprit[0]}: {error}",)
        elif culprit:
            error.add_note(f"raised by plugin {culprit[0]!r} in its hook {culprit[1]}")
        raise


def find_culprit(trace: TracebackType | None, composed: Hooks) -> tuple[str, str] | None:
    """The plugin and hook whose code is deepest in a traceback; None if core, the model or the data came after it."""
    core = {impl.function.__code__.co_filename for impl in composed.hookimpls
            if impl.plugin_name not in composed.plugins}
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
