"""Compose the plugins of a run: name, order and check them, then compile each hook to plain function calls."""
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

# The boolean attributes of a plugin that the loop reads.
FLAGS = ("observer_only", "rank_zero_only", "capturable", "keeps_sample_count", "grouping_changes")


class Hooks:
    """The type of `run.hook`: one function per hook, called with the arguments of the hook by name."""

    plugins: dict[str, Any]       # by unique name, in the order given
    by_hook: dict[str, list[Any]]       # pluggy's HookImpl objects of each hook, of plugins and defaults, in that order
    acting: dict[str, list[str]]  # the names of the plugins that implement each hook, in the order in which they act
    replaced: dict[str, str]      # by hook, the plugin that replaces its default; only hooks that one replaces
    watchers: dict[str, list[Any]]      # by hook, what is told of its calls; by `watch_hooks`

    @property
    def hookimpls(self) -> list[Any]:
        """The HookImpl objects of all hooks."""
        return [impl for impls in self.by_hook.values() for impl in impls]

    if TYPE_CHECKING:             # for type checkers; `compose` sets the actual functions on the instance
        setup = staticmethod(hooks.setup)
        param_groups = staticmethod(hooks.param_groups)
        wrap_model = staticmethod(hooks.wrap_model)
        train = staticmethod(hooks.train)
        train_start = staticmethod(hooks.train_start)
        epoch_start = staticmethod(hooks.epoch_start)
        group_batches = staticmethod(hooks.group_batches)
        transform_batch = staticmethod(hooks.transform_batch)
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
            """Return the factors of all plugins that return one."""


def compose(plugins: Iterable[Any], defaults: Iterable[Any] = ()) -> Hooks:
    """Return the hooks of one run. `plugins`, instances or `name:option=value` strings, act in the order given.

    defaults: objects that implement the hooks that no plugin replaces; without them the plugins are only checked.

    Raises UsageError for plugins that cannot work: an unknown name or option, a hook that does not exist, two plugins
    that replace the same hook.
    """
    from loopctl.distributed.data_parallel import Parallel  # imported here because these modules import torch
    from loopctl.distributed.process_group import rank

    chosen = named_plugins(plugins)
    skip_rank_zero_only = rank() > 0 and any(isinstance(plugin, Parallel) for plugin in chosen.values())
    manager = pluggy.PluginManager("loopctl")
    manager.add_hookspecs(hooks)
    for default in defaults:
        manager.register(default)
    for name, plugin in reversed(chosen.items()):         # pluggy calls the last registered first
        check_plugin(name, plugin, manager)
        if not (skip_rank_zero_only and getattr(plugin, "rank_zero_only", False)):
            manager.register(plugin, name)
    manager.check_pending()

    composed = Hooks()
    composed.plugins, composed.by_hook, composed.acting = chosen, {}, {}
    composed.replaced, composed.watchers = {}, {}
    for name in SPECS:
        impls = getattr(manager.hook, name).get_hookimpls()[::-1]        # in the order in which they act
        composed.by_hook[name] = impls
        composed.acting[name] = [impl.plugin_name for impl in impls if impl.plugin_name in chosen]
        if SPECS[name].loopctl_spec["firstresult"]:
            for impl in impls:
                if impl.plugin_name in chosen and not impl.wrapper:
                    composed.replaced[name] = impl.plugin_name
                    break
        setattr(composed, name, compile_hook(name, impls, chosen))
    return composed


def named_plugins(plugins: Iterable[Any]) -> dict[str, Any]:
    """Return the plugins by unique name, built from text where given as text: the second `freeze` is `freeze.2`."""
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
    """Raise UsageError if `plugin` has wrong options, flags, hooks or hook arguments."""
    if type(plugin).__hash__ is None:
        raise UsageError(f"{name}: two equal instances could not be told apart; use @dataclass(eq=False)")
    try:
        check_options(plugin)
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    if hasattr(plugin, "state_dict") != hasattr(plugin, "load_state_dict"):
        raise UsageError(f"{name}: has only one of state_dict and load_state_dict; define both or neither")
    check_flags(name, plugin)
    marked = {attr for attr in dir(type(plugin)) if hasattr(getattr(type(plugin), attr, None), "loopctl_impl")}
    if not marked:
        raise UsageError(f"{name}: has no hooks; mark its methods with @hookimpl")
    for attr in sorted(marked - set(SPECS)):
        raise UsageError(f"{name}: no hook is called {attr!r}; {nearest(attr, SPECS)}")
    for attr in sorted(set(SPECS) & set(dir(type(plugin))) - marked):
        raise UsageError(f"{name}: {attr} has the name of a hook but no @hookimpl; add it, or rename the method")
    for attr in sorted(marked):
        if manager.parse_hookimpl_opts(plugin, attr) is None:
            continue       # `self.hook = None` in __post_init__: this configuration of the plugin does not use the hook
        for argument in signature(getattr(plugin, attr)).parameters.values():
            if argument.name not in ARGUMENTS[attr]:
                has = nearest(argument.name, ARGUMENTS[attr], "it has")
                raise UsageError(f"{name}: {attr} has no argument {argument.name!r}; {has}")
            if argument.default is not argument.empty:
                raise UsageError(f"{name}: {attr} gives {argument.name!r} a default value; remove the default")


def check_flags(name: str, plugin: Any) -> None:
    """Raise UsageError if a boolean attribute is a misspelt flag, which would otherwise be ignored silently."""
    attributes = {attr: value for kind in reversed(type(plugin).__mro__) for attr, value in vars(kind).items()}
    for attr, value in (attributes | getattr(plugin, "__dict__", {})).items():
        if isinstance(value, bool) and attr not in FLAGS and (near := get_close_matches(attr, FLAGS, n=1, cutoff=0.75)):
            raise UsageError(f"{name}: no flag is called {attr!r}; did you mean {near[0]!r}?")


def compile_hook(hook: str, impls: list[Any], chosen: dict[str, Any]) -> Callable[..., Any]:
    """Return one function that does what pluggy's call of this hook would do, without pluggy's overhead.

    A hook without implementations becomes a function that does nothing. A hook with a single implementation that takes
    every argument becomes that implementation. Other functions are generated, as `dataclasses` generates `__init__`.
    Unlike in pluggy, a replacement that returns None has still replaced the hook, and at a hook in `hooks.CHAINED` each
    plugin is called with what the one before it returned.
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
    carried = hooks.CHAINED.get(hook)
    collects = not first and not carried and spec.__annotations__["return"] != "None"        # such as lr_scale
    if first and calls:
        body = f"return {calls[0]}"
    elif carried:
        body = "".join(f"{carried} = returned({call}, f{i}); " for i, call in enumerate(calls)) + f"return {carried}"
    elif collects:
        body = f"return [value for value in ({''.join(call + ', ' for call in calls)}) if value is not None]"
    else:
        body = "; ".join(calls) or "pass"
    if len(plain) == 1 and tuple(plain[0].argnames) == ARGUMENTS[hook] and not collects and not carried:
        function = plain[0].function
    else:
        scope = {f"f{i}": impl.function for i, impl in enumerate(plain)} | {"returned": returned}
        function = define_function(f"def {hook}({arguments}): {body}", scope)
    for wrapper in reversed(wrappers):                     # the plugin given first is the outermost
        function = wrap_hook(hook, arguments, wrapper, function)
    return function


def returned(value: Any, method: Any) -> Any:
    """Return what a plugin returned for the next one. Raises UsageError where that is nothing."""
    if value is None:
        owner = plugin_name(type(method.__self__))
        raise UsageError(f"{owner}: {method.__name__} returned None; return the batch, changed or not")
    return value


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
    """Return a function that calls `inner` at the `yield` of `wrapper`, a generator function that yields once."""
    source = WRAPPED.format(hook=hook, arguments=arguments, taken=", ".join(wrapper.argnames))
    return define_function(source, {"wrapper": wrapper.function, "inner": inner, "plugin": wrapper.plugin_name,
                                    "start": start_wrapper, "throw": throw_error, "send": send_result})


def start_wrapper(around: Iterator[Any], plugin: str) -> None:
    try:
        next(around)
    except StopIteration:
        raise RuntimeError(f"{plugin}: a wrapper must yield exactly once; it did not yield") from None


def send_result(around: Any, result: Any, plugin: str) -> Any:
    try:
        around.send(result)
    except StopIteration as end:
        return end.value
    around.close()
    raise RuntimeError(f"{plugin}: a wrapper must yield exactly once; it yielded twice")


def throw_error(around: Any, error: BaseException, plugin: str) -> Any:
    try:
        around.throw(error)
    except StopIteration as end:
        return end.value                                   # the wrapper has handled the error
    around.close()
    raise RuntimeError(f"{plugin}: a wrapper must yield exactly once; it yielded twice") from error


def define_function(source: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """Return the function that `source` defines; its global names are looked up in `scope`."""
    exec(source, scope)
    return scope[source.split("(")[0].split()[-1]]


@contextmanager
def blame_plugin(composed: Hooks) -> Iterator[None]:
    """Add the names of the plugin and the hook to any error that a plugin raises inside the block.

    A UsageError is prefixed with the plugin's name; other errors get a note. It costs nothing until there is an error,
    because plugin and hook are found from the traceback.
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
    """Return the names of the plugin and hook whose code is deepest in a traceback.

    None if no plugin is in it, or if the code of the loop or of its default hooks is deeper than the plugin's.
    """
    core = {impl.function.__code__.co_filename for impl in composed.hookimpls
            if impl.plugin_name not in composed.plugins}
    culprit = None
    while trace:
        code = trace.tb_frame.f_code
        if code.co_filename in core:
            culprit = None
        for impl in composed.hookimpls:
            hook = getattr(impl.function, "__func__", impl.function).__code__
            # A function inside the hook counts as the hook, such as the generator that group_batches returns.
            in_hook = f"{code.co_qualname}.<locals>.".startswith(f"{hook.co_qualname}.<locals>.")
            same_instance = trace.tb_frame.f_locals.get("self", impl.plugin) is impl.plugin
            if (in_hook and same_instance and code.co_filename == hook.co_filename
                    and impl.plugin_name in composed.plugins):
                culprit = impl.plugin_name, impl.function.__name__
                break
        trace = trace.tb_next
    return culprit
